//! The nodes of a domain's devices (`docs/misc/xenstore-paths.pandoc`,
//! `tools/libs/light/libxl_device.c`).

use crate::{Access, ConnId, DomId, Errno, Path, Perm, Store, TxId};

/// Which device of a domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceId {
    /// Its domain.
    pub domain: DomId,
    /// Its class: `vbd`, `vif`.
    pub class: &'static str,
    /// Its number.
    pub number: u32,
}

impl DeviceId {
    /// The directory that the guest finds it in, and answers in.
    #[must_use]
    pub fn frontend(&self) -> String {
        format!(
            "/local/domain/{}/device/{}/{}",
            self.domain, self.class, self.number
        )
    }

    /// The directory of its backend in domain 0.
    #[must_use]
    pub fn backend(&self) -> String {
        format!(
            "/local/domain/0/backend/{}/{}/{}",
            self.class, self.domain, self.number
        )
    }

    /// A node that is none of a device's, and its directory.
    fn nothing(&self) -> Result<(Path, Path), Errno> {
        let directory = format!("/local/domain/{}/device/gone", self.domain);
        let path = format!("{directory}/{}-{}", self.class, self.number);
        Ok((Path::parse(&directory, 0)?, Path::parse(&path, 0)?))
    }
}

impl Store {
    /// Writes the nodes of a new device, both ends in state 1 (initialising), with more
    /// of each from the caller. What stood there before is removed.
    ///
    /// # Errors
    /// `EACCES` unless `conn` belongs to domain 0; those of a write.
    pub fn add_device(
        &mut self,
        conn: ConnId,
        device: &DeviceId,
        frontend: &[(String, String)],
        backend: &[(String, String)],
    ) -> Result<(), Errno> {
        if self.domain(conn) != Some(0) {
            return Err(Errno::Acces);
        }
        let tx = self.begin(conn)?;
        let result = self.put_device(conn, tx, device, frontend, backend);
        let ended = self.end(conn, tx, result.is_ok());
        result.and(ended)
    }

    fn put_device(
        &mut self,
        conn: ConnId,
        tx: TxId,
        device: &DeviceId,
        frontend: &[(String, String)],
        backend: &[(String, String)],
    ) -> Result<(), Errno> {
        let guest = device.domain;
        let (front, back) = (device.frontend(), device.backend());
        // The guest answers in its own directory, and only reads the backend's.
        let its_own = [Perm::new(guest, Access::NONE), Perm::new(0, Access::READ)];
        let readable = [Perm::new(0, Access::NONE), Perm::new(guest, Access::READ)];
        let fixed = |pairs: &[(&str, &str)]| -> Vec<(String, String)> {
            let owned = |&(name, value): &(&str, &str)| (name.to_owned(), value.to_owned());
            pairs.iter().map(owned).collect()
        };
        let number = guest.to_string();
        let mut at_front = fixed(&[("backend", &back), ("backend-id", "0"), ("state", "1")]);
        at_front.extend_from_slice(frontend);
        let mut at_back = fixed(&[
            ("frontend", &front),
            ("frontend-id", &number),
            ("online", "1"),
            ("state", "1"),
        ]);
        at_back.extend_from_slice(backend);
        for (directory, perms, nodes) in [
            (&back, &readable, &at_back),
            // Last: the guest looks when its directory appears.
            (&front, &its_own, &at_front),
        ] {
            let path = Path::parse(directory, 0)?;
            match self.remove(conn, Some(tx), &path) {
                Ok(()) | Err(Errno::NoEnt) => {}
                Err(error) => return Err(error),
            }
            self.mkdir(conn, Some(tx), &path)?;
            self.set_perms(conn, Some(tx), &path, perms)?;
            for (name, value) in nodes {
                let path = Path::parse(&format!("{directory}/{name}"), 0)?;
                self.write(conn, Some(tx), &path, value.as_bytes())?;
                self.set_perms(conn, Some(tx), &path, perms)?;
            }
        }
        Ok(())
    }

    /// Removes the nodes of a device.
    ///
    /// # Errors
    /// `EACCES` unless `conn` belongs to domain 0.
    pub fn remove_device(&mut self, conn: ConnId, device: &DeviceId) -> Result<(), Errno> {
        if self.domain(conn) != Some(0) {
            return Err(Errno::Acces);
        }
        for directory in [device.frontend(), device.backend()] {
            match self.remove(conn, None, &Path::parse(&directory, 0)?) {
                Ok(()) | Err(Errno::NoEnt) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Has the domain of a device that was removed told of a node which never was one, as what comes
    /// after the removal: when it has looked for that ([`Store::is_forgotten`]), it has done all that
    /// was to be done before. Linux' bus takes events one after the other, and looks for each node
    /// that it hears of (`drivers/xen/xenbus/xenbus_probe.c`, `xenbus_dev_changed()`).
    ///
    /// # Errors
    /// Those of a write.
    pub fn tell_of_nothing(&mut self, conn: ConnId, device: &DeviceId) -> Result<(), Errno> {
        let (directory, path) = device.nothing()?;
        let clients = self.clients.iter();
        let told: Vec<ConnId> = clients
            .filter(|(_, client)| client.domain == device.domain)
            .filter(|(_, client)| client.watches.list.iter().any(|it| it.sees(&path)))
            .map(|(id, _)| *id)
            .collect();
        self.write(conn, None, &path, b"")?;
        self.remove(conn, None, &directory)?;
        self.awaited
            .extend(told.into_iter().map(|id| (id, path.clone())));
        Ok(())
    }

    /// Whether all clients that were told by [`Store::tell_of_nothing`] have looked, or are gone.
    #[must_use]
    pub fn is_forgotten(&self, device: &DeviceId) -> bool {
        let Ok((_, path)) = device.nothing() else {
            return true;
        };
        let mut awaited = self.awaited.iter();
        !awaited.any(|(conn, awaited)| *awaited == path && self.clients.contains_key(conn))
    }

    /// They are not waited for any more.
    pub fn await_no_more(&mut self, device: &DeviceId) {
        if let Ok((_, path)) = device.nothing() {
            self.awaited.retain(|(_, awaited)| *awaited != path);
        }
    }
}
