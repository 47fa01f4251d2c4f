//! The nodes that a domain finds when it starts (`docs/misc/xenstore-paths.pandoc`,
//! `tools/libs/light/libxl_create.c`).

use crate::{Access, ConnId, DomId, Errno, Path, Perm, Store};

/// What the tree says about a new domain.
#[derive(Clone, Debug)]
pub struct DomainSpec {
    /// Its number.
    pub domain: DomId,
    /// Its name.
    pub name: String,
    /// Its UUID, in text.
    pub uuid: String,
    /// Which life of the domain it is: two numbers with a colon between.
    pub generation: String,
    /// Memory that it is to have, KiB.
    pub memory_kib: u64,
    /// Most memory it may have, KiB.
    pub max_memory_kib: u64,
    /// vCPUs, all available.
    pub vcpus: u32,
    /// Frame and port of the xenstore ring.
    pub store_ring: (u64, u32),
    /// Frame and port of the console ring.
    pub console_ring: (u64, u32),
}

impl Store {
    /// Writes a domain's nodes and announces it.
    ///
    /// # Errors
    /// `EACCES` unless `conn` belongs to domain 0; those of a write.
    pub fn introduce(&mut self, conn: ConnId, spec: &DomainSpec) -> Result<(), Errno> {
        if self.domain(conn) != Some(0) {
            return Err(Errno::Acces);
        }
        let id = spec.domain;
        let home = Path::home(id);
        let vm = Path::parse(&format!("/vm/{}", spec.uuid), 0)?;
        // The guest may read what is said about it and write where it answers.
        let readable = [Perm::new(0, Access::NONE), Perm::new(id, Access::READ)];
        let its_own = [Perm::new(id, Access::NONE)];

        let tx = self.begin(conn)?;
        let result = (|| {
            for (top, perms) in [
                ("/local", Access::READ),
                ("/local/domain", Access::READ),
                ("/vm", Access::READ),
            ] {
                let path = Path::parse(top, 0)?;
                self.mkdir(conn, Some(tx), &path)?;
                self.set_perms(conn, Some(tx), &path, &[Perm::new(0, perms)])?;
            }
            for dir in [&home, &vm] {
                self.remove_if_there(conn, tx, dir)?;
                self.mkdir(conn, Some(tx), dir)?;
                self.set_perms(conn, Some(tx), dir, &readable)?;
            }
            let mut put = |base: &Path, rel: &str, value: &str, perms: &[Perm]| {
                let path = Path::parse(&format!("{base}/{rel}"), 0)?;
                self.write(conn, Some(tx), &path, value.as_bytes())?;
                self.set_perms(conn, Some(tx), &path, perms)
            };
            put(&vm, "uuid", &spec.uuid, &readable)?;
            put(&vm, "name", &spec.name, &readable)?;
            for (rel, value) in [
                ("name", spec.name.clone()),
                ("domid", id.to_string()),
                ("vm", vm.to_string()),
                ("memory", String::new()),
                ("memory/target", spec.memory_kib.to_string()),
                ("memory/static-max", spec.max_memory_kib.to_string()),
                ("cpu", String::new()),
                ("store", String::new()),
                ("store/ring-ref", spec.store_ring.0.to_string()),
                ("store/port", spec.store_ring.1.to_string()),
                ("console", String::new()),
                ("console/backend-id", "0".to_owned()),
                ("console/type", "blanket".to_owned()),
                ("console/ring-ref", spec.console_ring.0.to_string()),
                ("console/port", spec.console_ring.1.to_string()),
                ("device", String::new()),
                ("platform", String::new()),
                ("platform/generation-id", spec.generation.clone()),
                ("control", String::new()),
                (
                    "control/platform-feature-multiprocessor-suspend",
                    "1".to_owned(),
                ),
                ("control/platform-feature-xs_reset_watches", "1".to_owned()),
            ] {
                put(&home, rel, &value, &readable)?;
            }
            for cpu in 0..spec.vcpus {
                put(&home, &format!("cpu/{cpu}"), "", &readable)?;
                put(
                    &home,
                    &format!("cpu/{cpu}/availability"),
                    "online",
                    &readable,
                )?;
            }
            for rel in [
                "control/shutdown",
                "control/feature-poweroff",
                "control/feature-reboot",
                "control/feature-suspend",
                "control/sysrq",
                "data",
                "drivers",
                "feature",
                "attr",
                "error",
            ] {
                put(&home, rel, "", &its_own)?;
            }
            Ok(())
        })();
        self.end(conn, tx, result.is_ok())?;
        result?;
        self.announce("@introduceDomain", id);
        Ok(())
    }

    /// Removes a domain's nodes and announces that it is gone.
    ///
    /// # Errors
    /// `EACCES` unless `conn` belongs to domain 0.
    pub fn release(&mut self, conn: ConnId, domain: DomId) -> Result<(), Errno> {
        if self.domain(conn) != Some(0) {
            return Err(Errno::Acces);
        }
        self.remove(conn, None, &Path::home(domain))?;
        self.announce("@releaseDomain", domain);
        Ok(())
    }

    /// Whether a domain's nodes exist.
    #[must_use]
    pub fn is_introduced(&self, domain: DomId) -> bool {
        domain == 0 || self.tree().get(&Path::home(domain)).is_some()
    }

    fn remove_if_there(&mut self, conn: ConnId, tx: crate::TxId, path: &Path) -> Result<(), Errno> {
        match self.remove(conn, Some(tx), path) {
            Ok(()) | Err(Errno::NoEnt) => Ok(()),
            Err(error) => Err(error),
        }
    }
}
