//! VMs that come from other nodes: a place is made for each of them, for no other, and
//! cleared away if it does not come.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use supercloud_api::{
    Arrival, ArrivalState, Code, Disk, Error, Life, Place, Prepare, Prepared, Vm,
};

use crate::agent::Agent;
use crate::blanket::Phase;
use crate::fail;
use crate::record::{ARRIVALS, Coming, VMS, VmRecord};
use crate::vms::{STOP_SECONDS, room};

impl Agent {
    /// Makes a place for a VM. Asked again for the same operation, it gives the same place.
    ///
    /// # Errors
    /// There is another VM of that name, or what the VM needs is not here.
    pub async fn prepare(
        self: &Arc<Self>,
        operation: &str,
        asked: &Prepare,
    ) -> Result<Prepared, Error> {
        let vm = &asked.vm;
        let name = &vm.name;
        supercloud_api::name("a VM", name)?;
        supercloud_api::name("a node", &asked.from)?;
        self.member(&asked.from)?;
        let _alone = self.alone_with(name).await;
        let coming = self.store.get(ARRIVALS, operation)?;
        if let Some(coming) = &coming
            && (coming.state != ArrivalState::Waiting || coming.uuid != vm.uuid)
        {
            return Err(Error::new(
                Code::Conflict,
                format!("the operation {operation} was used here before"),
                "begin another one",
            ));
        }
        match self.store.get(VMS, name)? {
            Some(present) if coming.is_some() && present.uuid == vm.uuid => {}
            Some(present) => {
                return Err(Error::new(
                    Code::Conflict,
                    format!(
                        "there is another VM {name} on {}: {}",
                        self.name(),
                        present.uuid
                    ),
                    format!(
                        "remove it first: supercloud vm rm {name} --node {}",
                        self.name()
                    ),
                ));
            }
            None => {}
        }
        let record = self.as_here(operation, asked)?;
        let processes = self.observe().await?;
        if coming.is_some() && processes.contains_key(&vm.uuid) {
            // Another agent of this node had begun with it.
            return self.place_of(&record).await;
        }
        room(&self.name(), vm.spec.memory)?;
        for port in &vm.ports {
            self.networks.can_attach(port).await?;
        }
        let stays = self.images.read().await;
        for image in &asked.images {
            self.fetch_image(&asked.from, image).await?;
        }
        for hash in record.images() {
            if self.image(hash)?.is_none() {
                return Err(Error::new(
                    Code::BadRequest,
                    format!("the image {hash} is needed, and not among those that were named"),
                    "",
                ));
            }
        }
        let waits = Coming {
            operation: operation.into(),
            from: asked.from.clone(),
            vm: name.clone(),
            uuid: vm.uuid.clone(),
            state: ArrivalState::Waiting,
        };
        self.store.change(|change| {
            let now: Option<Coming> = change.get(ARRIVALS, operation)?;
            if now.is_some_and(|now| now.state != ArrivalState::Waiting) {
                return Err(Error::new(
                    Code::Conflict,
                    format!("the operation {operation} was ended meanwhile"),
                    "begin another one",
                ));
            }
            change.put(ARRIVALS, operation, &waits)?;
            change.put(VMS, name, &record)
        })?;
        drop(stays);
        fail::point("arrival.recorded-first");
        let placed = self.place(&record).await;
        fail::point("arrival.placed");
        if let Err(error) = &placed {
            self.refuse(&record, operation).await?;
            return Err(Error {
                code: Code::Unfit,
                ..error.clone()
            });
        }
        self.say(
            "vm.expected",
            name,
            format!("{name} may come from {}", asked.from),
        );
        placed
    }

    /// The VM as it will be here.
    fn as_here(&self, operation: &str, asked: &Prepare) -> Result<VmRecord, Error> {
        let Vm {
            name,
            uuid,
            spec,
            kernel,
            initrd,
            seed,
            disks,
            ports,
            ..
        } = asked.vm.clone();
        let disks = disks.into_iter().enumerate();
        Ok(VmRecord {
            disks: disks
                .map(|(index, disk)| self.as_own(&name, index, disk))
                .collect::<Result<_, _>>()?,
            name,
            uuid,
            spec,
            kernel,
            initrd,
            seed,
            ports,
            life: Life::Running,
            place: Place::Coming {
                operation: operation.into(),
                from: asked.from.clone(),
            },
            fresh: false,
            stop_seconds: STOP_SECONDS,
            trouble: None,
            restore: None,
        })
    }

    /// A disk of another node's, or of a snapshot, as one of the agent's own.
    pub(crate) fn as_own(&self, vm: &str, index: usize, disk: Disk) -> Result<Disk, Error> {
        if disk.size == 0 {
            return Err(Error::new(Code::BadRequest, "a disk without a size", ""));
        }
        let format = match (&disk.base, disk.format.as_str()) {
            (None, "raw") => "raw",
            _ => "qcow2",
        };
        Ok(Disk {
            path: self.own_disk(vm, index, format),
            format: format.into(),
            size: disk.size,
            base: disk.base,
            owned: true,
        })
    }

    /// Starts the process that waits for it.
    async fn place(&self, vm: &VmRecord) -> Result<Prepared, Error> {
        let run = self.furnish(vm).await?;
        let token = self.token_file(&vm.name);
        match std::fs::remove_file(&token) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::failed(format!("{}: {error}", token.display())));
            }
            _ => {}
        }
        let at = self.config.listen.ip();
        self.blanket.run_incoming(&run, at, &token).await?;
        self.place_of(vm).await
    }

    /// Where the process waits, and what it wants to hear.
    async fn place_of(&self, vm: &VmRecord) -> Result<Prepared, Error> {
        let processes = self.observe().await?;
        let at = processes.get(&vm.uuid).and_then(|process| process.incoming);
        let at = at.ok_or_else(|| Error::failed(format!("no process waits for {}", vm.name)))?;
        let file = self.token_file(&vm.name);
        let token = std::fs::read_to_string(&file)
            .map_err(|error| Error::failed(format!("{}: {error}", file.display())))?;
        let own = self.config.address()?;
        let address = match own.parse::<SocketAddr>() {
            Ok(own) => SocketAddr::new(own.ip(), at.port()).to_string(),
            Err(_) => {
                let host = own.rsplit_once(':').map_or(own.as_str(), |(host, _)| host);
                format!("{host}:{}", at.port())
            }
        };
        Ok(Prepared {
            address,
            token: token.trim().into(),
        })
    }

    /// What became of a VM that was to come.
    ///
    /// # Errors
    /// The disk, `blanket`.
    pub async fn arrival(&self, operation: &str) -> Result<Arrival, Error> {
        let Some(coming): Option<Coming> = self.store.get(ARRIVALS, operation)? else {
            return Ok(said(operation, ArrivalState::Unknown));
        };
        let _alone = self.alone_with(&coming.vm).await;
        self.settle_alone(&coming.vm).await?;
        self.arrival_alone(operation).await
    }

    async fn arrival_alone(&self, operation: &str) -> Result<Arrival, Error> {
        let Some(coming): Option<Coming> = self.store.get(ARRIVALS, operation)? else {
            return Ok(said(operation, ArrivalState::Unknown));
        };
        let phase = self.observe().await?.get(&coming.uuid).map(|it| it.phase);
        let state = match (coming.state, phase) {
            (ArrivalState::Waiting | ArrivalState::Lost, Some(Phase::Received)) => {
                ArrivalState::Received
            }
            (ArrivalState::Here, Some(Phase::Pulling | Phase::Lost)) => ArrivalState::Following,
            (ArrivalState::Here, None | Some(Phase::Ended)) => ArrivalState::Ended,
            (state, _) => state,
        };
        Ok(said(operation, state))
    }

    /// Its source has ended for good: if all of it is here, it runs here.
    ///
    /// # Errors
    /// The disk, `blanket`.
    pub async fn claim(&self, operation: &str) -> Result<Arrival, Error> {
        let Some(coming): Option<Coming> = self.store.get(ARRIVALS, operation)? else {
            return Ok(said(operation, ArrivalState::Unknown));
        };
        let _alone = self.alone_with(&coming.vm).await;
        if self.arrival_alone(operation).await?.state == ArrivalState::Received {
            self.blanket.keep(&coming.vm).await?;
            fail::point("arrival.claimed");
        }
        self.settle_alone(&coming.vm).await?;
        self.arrival_alone(operation).await
    }

    /// Its source has ended for good, with a part of its memory: if that is missing, it is ended here.
    ///
    /// # Errors
    /// The disk, `blanket`.
    pub async fn bereave_arrival(&self, operation: &str) -> Result<Arrival, Error> {
        let Some(coming): Option<Coming> = self.store.get(ARRIVALS, operation)? else {
            return Ok(said(operation, ArrivalState::Unknown));
        };
        let _alone = self.alone_with(&coming.vm).await;
        self.settle_alone(&coming.vm).await?;
        if self.arrival_alone(operation).await?.state == ArrivalState::Following
            && let Some(vm) = self.store.get(VMS, &coming.vm)?
        {
            self.bereave(&vm).await?;
            fail::point("arrival.bereft");
        }
        self.arrival_alone(operation).await
    }

    /// A VM does not come: what was prepared is cleared away, unless it runs here. What was not yet
    /// will not be: the request for it may still be under way.
    ///
    /// # Errors
    /// The disk, `blanket`.
    pub async fn clear_arrival(&self, operation: &str) -> Result<Arrival, Error> {
        supercloud_api::name("an operation", operation)?;
        let coming = self.store.change(|change| {
            let coming: Option<Coming> = change.get(ARRIVALS, operation)?;
            if coming.is_none() {
                let never = Coming {
                    operation: operation.into(),
                    from: String::new(),
                    vm: String::new(),
                    uuid: String::new(),
                    state: ArrivalState::Refused,
                };
                change.put(ARRIVALS, operation, &never)?;
            }
            Ok(coming)
        })?;
        let Some(coming) = coming else {
            return Ok(said(operation, ArrivalState::Unknown));
        };
        let _alone = self.alone_with(&coming.vm).await;
        self.settle_alone(&coming.vm).await?;
        let coming: Option<Coming> = self.store.get(ARRIVALS, operation)?;
        let coming = coming.ok_or_else(|| Error::failed("the arrival is gone"))?;
        match coming.state {
            ArrivalState::Here
            | ArrivalState::Following
            | ArrivalState::Ended
            | ArrivalState::Bereft
            | ArrivalState::Unknown => {
                return self.arrival_alone(operation).await;
            }
            ArrivalState::Waiting
            | ArrivalState::Received
            | ArrivalState::Lost
            | ArrivalState::Refused => {}
        }
        let waits = self.observe().await?.contains_key(&coming.uuid);
        if waits && let Err(error) = self.blanket.dismiss(&coming.vm).await {
            // It runs, or has ended just then.
            tracing::info!("{}: {error}", coming.vm);
            self.settle_alone(&coming.vm).await?;
            if self.observe().await?.contains_key(&coming.uuid) {
                return self.arrival_alone(operation).await;
            }
        }
        fail::point("arrival.dismissed");
        let vm: Option<VmRecord> = self.store.get(VMS, &coming.vm)?;
        match vm.filter(|vm| is_of(vm, operation)) {
            Some(vm) => self.refuse(&vm, operation).await?,
            None => self.mark(operation, ArrivalState::Refused)?,
        }
        Ok(said(operation, ArrivalState::Refused))
    }

    /// The token of the process that waits for a VM.
    pub(crate) fn token_file(&self, vm: &str) -> PathBuf {
        self.config.vm(vm).join("token")
    }

    /// It never ran here, and never will.
    pub(crate) async fn refuse(&self, vm: &VmRecord, operation: &str) -> Result<(), Error> {
        self.mark(operation, ArrivalState::Refused)?;
        fail::point("arrival.refused");
        self.forget(vm).await
    }

    fn mark(&self, operation: &str, state: ArrivalState) -> Result<(), Error> {
        self.store.change(|change| {
            if let Some(mut coming) = change.get::<Coming>(ARRIVALS, operation)? {
                coming.state = state;
                change.put(ARRIVALS, operation, &coming)?;
            }
            Ok(())
        })
    }

    /// By its user's word, a VM whose place is in doubt is here.
    ///
    /// # Errors
    /// There is no doubt.
    pub async fn keep_vm(&self, name: &str) -> Result<Vm, Error> {
        let alone = self.alone_with(name).await;
        let vm = self.record(name)?;
        let phase = self.observe().await?.get(&vm.uuid).map(|it| it.phase);
        let no_doubt = || {
            Error::new(
                Code::Conflict,
                format!("there is no doubt where {name} is"),
                "`supercloud vm show` tells",
            )
        };
        match (&vm.place, phase) {
            (Place::Leaving { to, .. }, Some(Phase::Serving | Phase::Cut)) => {
                return Err(Error::new(
                    Code::Conflict,
                    format!("{name} runs on {to}: what it has done there is not here"),
                    format!("if {to} is gone for good: blanket kill {name}, and then again"),
                ));
            }
            (Place::Leaving { operation, .. }, Some(Phase::Doubt) | None) => {
                if phase.is_some() {
                    self.blanket.keep(name).await?;
                }
                self.note_kept(operation)?;
            }
            (Place::Coming { .. }, Some(Phase::Received)) => self.blanket.keep(name).await?,
            (Place::Coming { operation, .. }, None) => {
                let lost = self.arrival_alone(operation).await?.state == ArrivalState::Lost;
                if !lost {
                    return Err(no_doubt());
                }
                self.mark(operation, ArrivalState::Here)?;
                self.change_vm(name, |vm| {
                    vm.place = Place::Here;
                    vm.life = Life::Stopped;
                    vm.trouble = Some("it came here and has ended".into());
                })?;
            }
            _ => return Err(no_doubt()),
        }
        self.settle_alone(name).await?;
        drop(alone);
        self.vm(name).await
    }
}

fn is_of(vm: &VmRecord, wanted: &str) -> bool {
    matches!(&vm.place, Place::Coming { operation, .. } if operation == wanted)
}

fn said(operation: &str, state: ArrivalState) -> Arrival {
    Arrival {
        operation: operation.into(),
        state,
        error: None,
    }
}
