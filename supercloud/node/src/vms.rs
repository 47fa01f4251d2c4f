//! VMs of this node: what they are to be is written down first and done then, so that it is
//! done by the next agent if this one is killed in between.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use supercloud_api::{
    ArrivalState, Bootfile, Code, Error, Life, NetPort, Place, Seen, SnapshotKind, Stop, Vm, VmSpec,
};

use supercloud_network::{Invalid, Protocol, Published};

use crate::agent::{Agent, lock, random};
use crate::blanket::{Process, Run, disk_option};
use crate::cluster::memory;
use crate::fail;
use crate::logic::{Deed, deed};
use crate::record::{ARRIVALS, Coming, VMS, VmRecord};

/// How often it is looked what runs.
const LOOK: Duration = Duration::from_secs(2);
/// How long `blanket run` may take until a VM runs.
const START: Duration = Duration::from_secs(300);
/// What a VM needs beside its memory.
const BESIDE: u64 = 64 << 20;
/// How long a guest has to stop.
pub(crate) const STOP_SECONDS: u64 = 60;
/// A deed that changes nothing is not done for ever.
const DEEDS: usize = 8;

/// Processes by the identities of their VMs.
pub(crate) type Processes = HashMap<String, Process>;

pub(crate) fn io(path: &Path, error: &std::io::Error) -> Error {
    Error::failed(format!("{}: {error}", path.display()))
}

pub(crate) fn new_mac() -> Result<String, Error> {
    let [a, b, c, d, e] = random::<5>()?;
    // Of one's own making, and of one card (IEEE 802, bits 1 and 0 of the first byte).
    Ok(format!("02:{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}"))
}

fn mac_of(net: &str) -> Result<String, Error> {
    let given = net
        .split(',')
        .find_map(|option| option.strip_prefix("mac="));
    given.map_or_else(new_mac, |mac| Ok(mac.to_lowercase()))
}

/// Whether the node has the memory for a VM.
pub(crate) fn room(node: &str, wanted: u64) -> Result<(), Error> {
    let (_, available) = memory();
    if available >= wanted.saturating_add(BESIDE) {
        return Ok(());
    }
    Err(Error::new(
        Code::NoMemory,
        format!(
            "{node} has {} MiB of memory available, and the VM needs {} MiB and {} MiB beside them",
            available >> 20,
            wanted >> 20,
            BESIDE >> 20
        ),
        "choose another node (`supercloud node list` shows what they have), or stop VMs there",
    ))
}

impl Agent {
    pub(crate) fn record(&self, name: &str) -> Result<VmRecord, Error> {
        self.store.get(VMS, name)?.ok_or_else(|| {
            Error::not_found(
                format!("there is no VM {name} on {}", self.name()),
                "`supercloud vm list` shows all",
            )
        })
    }

    /// Changes a VM's record, if it is there.
    pub(crate) fn change_vm(
        &self,
        name: &str,
        work: impl FnOnce(&mut VmRecord),
    ) -> Result<(), Error> {
        self.store.change(|change| {
            if let Some(mut vm) = change.get(VMS, name)? {
                work(&mut vm);
                change.put(VMS, name, &vm)?;
            }
            Ok(())
        })
    }

    /// Looks what runs.
    pub(crate) async fn observe(&self) -> Result<Processes, Error> {
        let all = self.blanket.ps().await?;
        let all: Processes = all.into_iter().map(|it| (it.uuid.clone(), it)).collect();
        all.clone_into(&mut lock(&self.processes));
        Ok(all)
    }

    fn shown(&self, vm: &VmRecord, processes: &Processes) -> Vm {
        let seen = match processes.get(&vm.uuid) {
            None => Seen {
                phase: "none".into(),
                pid: None,
                host: None,
                uptime_seconds: None,
            },
            Some(process) => Seen {
                phase: process.phase.word().into(),
                pid: Some(process.pid),
                host: Some(process.host.clone()),
                // Whole seconds of a time that is never negative.
                uptime_seconds: Duration::try_from_secs_f64(process.uptime_seconds)
                    .ok()
                    .map(|uptime| uptime.as_secs()),
            },
        };
        vm.shown(&self.name(), seen)
    }

    /// VMs of this node.
    ///
    /// # Errors
    /// The disk, `blanket`.
    pub async fn vms(&self) -> Result<Vec<Vm>, Error> {
        let processes = self.observe().await?;
        let all = self.store.all(VMS)?;
        Ok(all.iter().map(|vm| self.shown(vm, &processes)).collect())
    }

    /// A VM of this node.
    ///
    /// # Errors
    /// There is none.
    pub async fn vm(&self, name: &str) -> Result<Vm, Error> {
        let record = self.record(name)?;
        Ok(self.shown(&record, &self.observe().await?))
    }

    /// Has a VM, and runs it if it is new. Twice is as once.
    ///
    /// # Errors
    /// Another one has the name, or it cannot be started: then nothing of it stays.
    pub async fn put_vm(self: &Arc<Self>, name: &str, spec: VmSpec) -> Result<Vm, Error> {
        supercloud_api::name("a VM", name)?;
        check(&spec, self.config.listen.port())?;
        let alone = self.alone_with(name).await;
        if let Some(present) = self.store.get(VMS, name)? {
            let same = present.spec == spec && present.life != Life::Removing;
            if !same {
                return Err(taken(name, &self.name()));
            }
        } else {
            if let Ok(other) = self.find_vm(name).await {
                return Err(taken(name, &other.node));
            }
            room(&self.name(), spec.memory)?;
            let stays = self.images.read().await;
            let record = self.made(name, spec).await?;
            self.store.change(|change| change.put(VMS, name, &record))?;
            drop(stays);
            fail::point("vm.recorded");
            self.say("vm.made", name, format!("{name} is made"));
        }
        self.settle_alone(name).await?;
        drop(alone);
        self.vm(name).await
    }

    /// What a VM of this node consists of.
    async fn made(&self, name: &str, spec: VmSpec) -> Result<VmRecord, Error> {
        let mut ports = Vec::new();
        for net in &spec.nets {
            let port = NetPort {
                net: net.clone(),
                mac: mac_of(net)?,
            };
            self.networks.can_attach(&port).await?;
            ports.push(port);
        }
        let mut disks = Vec::new();
        for (index, wanted) in spec.image.iter().chain(&spec.disks).enumerate() {
            disks.push(self.disk_of(name, index, wanted).await?);
        }
        let mut bootfiles = Vec::new();
        for path in [&spec.kernel, &spec.initrd] {
            bootfiles.push(match path {
                None => None,
                Some(path) => Some(Bootfile {
                    hash: self.add_image(path, None, false).await?.hash,
                }),
            });
        }
        let initrd = bootfiles.pop().flatten();
        let seed = match &spec.cloud_init {
            None => None,
            Some(cloud_init) => Some(Bootfile {
                hash: self.made_seed(name, cloud_init).await?.hash,
            }),
        };
        Ok(VmRecord {
            name: name.into(),
            uuid: Self::new_id()?,
            kernel: bootfiles.pop().flatten(),
            initrd,
            seed,
            spec,
            disks,
            ports,
            life: Life::Starting,
            place: Place::Here,
            fresh: true,
            stop_seconds: STOP_SECONDS,
            trouble: None,
            restore: None,
        })
    }

    /// Makes what a VM's process needs, as far as it is not there yet.
    pub(crate) async fn furnish(&self, vm: &VmRecord) -> Result<Run, Error> {
        let directory = self.config.vm(&vm.name);
        std::fs::create_dir_all(&directory).map_err(|error| io(&directory, &error))?;
        self.have_disks(vm).await?;
        let mut disks: Vec<String> = vm.disks.iter().map(|disk| self.option(disk)).collect();
        let file = |name: &str, file: &Option<Bootfile>| match file {
            None => Ok(None),
            // In a directory that has nothing of other VMs': the VM's process may read it.
            Some(file) => self.linked(&file.hash, directory.join(name)).map(Some),
        };
        if let Some(seed) = file("seed", &vm.seed)? {
            let seed = seed.display().to_string();
            disks.push(format!("{},ro", disk_option(&seed, "raw", None)));
        }
        let mut nets = Vec::new();
        for port in &vm.ports {
            nets.push(self.networks.attach(&vm.name, port).await?);
        }
        // One that did not run boots.
        let goes_on = vm.restore.as_ref();
        let goes_on = goes_on.filter(|it| it.kind == SnapshotKind::Running);
        Ok(Run {
            name: vm.name.clone(),
            uuid: vm.uuid.clone(),
            memory: vm.spec.memory,
            cpus: vm.spec.cpus,
            cpu: vm.spec.cpu.clone(),
            kernel: file("kernel", &vm.kernel)?,
            initrd: file("initrd", &vm.initrd)?,
            cmdline: vm.spec.cmdline.clone(),
            disks,
            nets,
            host: vm.spec.host.clone(),
            console: directory.join("console.log"),
            restore: goes_on.map(|it| self.image_path(&it.saved)),
            lazy: goes_on.is_some_and(|it| it.lazy),
        })
    }

    fn linked(&self, hash: &str, to: PathBuf) -> Result<PathBuf, Error> {
        if !to.exists() {
            std::fs::hard_link(self.image_path(hash), &to).map_err(|error| io(&to, &error))?;
        }
        Ok(to)
    }

    /// Starts a VM that does not run.
    ///
    /// # Errors
    /// It changes hands, or cannot be started.
    pub async fn start_vm(&self, name: &str) -> Result<Vm, Error> {
        let alone = self.alone_with(name).await;
        let vm = self.record(name)?;
        is_here(&vm)?;
        if vm.life == Life::Stopped {
            room(&self.name(), vm.spec.memory)?;
            self.change_vm(name, |vm| {
                vm.life = Life::Starting;
                vm.trouble = None;
            })?;
            fail::point("vm.starting");
        }
        self.settle_alone(name).await?;
        drop(alone);
        self.vm(name).await
    }

    /// Stops a VM.
    ///
    /// # Errors
    /// It changes hands, or its guest does not stop.
    pub async fn stop_vm(&self, name: &str, wanted: &Stop) -> Result<Vm, Error> {
        let alone = self.alone_with(name).await;
        let vm = self.record(name)?;
        is_here(&vm)?;
        if vm.life != Life::Stopped {
            self.change_vm(name, |vm| {
                vm.life = Life::Stopping;
                vm.stop_seconds = if wanted.now {
                    0
                } else {
                    wanted.seconds.unwrap_or(STOP_SECONDS).max(1)
                };
            })?;
            fail::point("vm.stopping");
        }
        self.settle_alone(name).await?;
        drop(alone);
        self.vm(name).await
    }

    /// Removes a VM that does not run, with the disks that are the agent's.
    ///
    /// # Errors
    /// It runs, or changes hands.
    pub async fn remove_vm(&self, name: &str) -> Result<(), Error> {
        let _alone = self.alone_with(name).await;
        let Some(vm) = self.store.get(VMS, name)? else {
            return Ok(());
        };
        is_here(&vm)?;
        if !matches!(vm.life, Life::Stopped | Life::Removing) {
            return Err(Error::new(
                Code::Conflict,
                format!("{name} runs"),
                format!("stop it first: supercloud vm stop {name}"),
            ));
        }
        self.change_vm(name, |vm| vm.life = Life::Removing)?;
        fail::point("vm.removing");
        self.settle_alone(name).await
    }

    /// Does what is to be done with a VM, whose lock is held.
    pub(crate) async fn settle_alone(&self, name: &str) -> Result<(), Error> {
        for _ in 0..DEEDS {
            let processes = self.observe().await?;
            let Some(vm) = self.store.get(VMS, name)? else {
                return Ok(());
            };
            let phase = processes.get(&vm.uuid).map(|process| process.phase);
            match deed(vm.life, &vm.place, phase) {
                Deed::Nothing => return Ok(()),
                Deed::Lost => return self.lost(&vm).await,
                done => self.perform(&vm, done).await?,
            }
        }
        Err(Error::new(
            Code::Failed,
            format!("{name} does not become what it is to be"),
            format!("`supercloud vm show {name}` tells how it is; it is tried again"),
        ))
    }

    async fn perform(&self, vm: &VmRecord, done: Deed) -> Result<(), Error> {
        let name = &vm.name;
        match done {
            Deed::Nothing => Ok(()),
            Deed::Start => self.start(vm).await,
            Deed::Runs => self.runs(vm).await,
            Deed::Ended => {
                self.change_vm(name, |vm| {
                    vm.life = Life::Stopped;
                    vm.trouble = Some("it has ended by itself".into());
                })?;
                self.detach(vm).await;
                self.say("vm.ended", name, format!("{name} has ended by itself"));
                Ok(())
            }
            Deed::Stopped => {
                self.change_vm(name, |vm| {
                    vm.life = Life::Stopped;
                    vm.trouble = None;
                })?;
                self.detach(vm).await;
                self.say("vm.stopped", name, format!("{name} has stopped"));
                Ok(())
            }
            // It has run, and has something to lose.
            Deed::Stop | Deed::Kill if vm.fresh => self.change_vm(name, |vm| vm.fresh = false),
            Deed::Stop if vm.stop_seconds == 0 => self.kill(vm).await,
            Deed::Stop => {
                let stopped = self.blanket.stop(name, vm.stop_seconds).await;
                if let Err(error) = stopped {
                    // It may have ended just then, by itself.
                    if self.observe().await?.contains_key(&vm.uuid) {
                        self.change_vm(name, |vm| vm.life = Life::Running)?;
                        return Err(Error {
                            hint: format!("at once: supercloud vm stop {name} --now"),
                            ..error
                        });
                    }
                }
                Ok(())
            }
            Deed::Kill => self.kill(vm).await,
            Deed::Remove => self.remove(vm).await,
            Deed::Arrived => self.arrived(vm).await,
            Deed::Lost => self.lost(vm).await,
            Deed::Bereave => self.bereave(vm).await,
        }
    }

    async fn start(&self, vm: &VmRecord) -> Result<(), Error> {
        let name = &vm.name;
        let started = async {
            let run = self.furnish(vm).await?;
            fail::point("vm.furnished");
            self.blanket.run(&run, START).await
        };
        let Err(error) = started.await else {
            fail::point("vm.run");
            // If it has ended since, it has ended by itself, and is not started again.
            return self.runs(vm).await;
        };
        // Another agent's `blanket run` may have been faster.
        if self.observe().await?.contains_key(&vm.uuid) {
            return Ok(());
        }
        self.change_vm(name, |vm| {
            vm.trouble = Some(error.message.clone());
            vm.life = if vm.fresh {
                Life::Removing
            } else {
                Life::Stopped
            };
        })?;
        self.detach(vm).await;
        self.say("vm.failed", name, error.message.clone());
        if vm.fresh {
            self.remove(vm).await?;
        }
        Err(error)
    }

    /// Notes that it runs.
    async fn runs(&self, vm: &VmRecord) -> Result<(), Error> {
        let name = &vm.name;
        if vm.restore.as_ref().is_some_and(|it| it.other)
            && let Err(error) = self.given_new_addresses(vm).await
        {
            tracing::warn!("{name} has not got all of its networks: {error}");
        }
        fail::point("vm.restored");
        self.change_vm(name, |vm| {
            vm.life = Life::Running;
            vm.fresh = false;
            vm.trouble = None;
            vm.restore = None;
        })?;
        self.say("vm.started", name, format!("{name} runs"));
        Ok(())
    }

    async fn remove(&self, vm: &VmRecord) -> Result<(), Error> {
        self.release(vm).await;
        self.forget(vm).await?;
        self.drop_unneeded(&vm.images())
    }

    async fn kill(&self, vm: &VmRecord) -> Result<(), Error> {
        let killed = self.blanket.kill(&vm.name).await;
        // It may have ended just then, by itself.
        if killed.is_err() && !self.observe().await?.contains_key(&vm.uuid) {
            return Ok(());
        }
        killed
    }

    async fn detach(&self, vm: &VmRecord) {
        for port in &vm.ports {
            if let Err(error) = self.networks.detach(&vm.name, port).await {
                tracing::warn!("{}: {error}", vm.name);
            }
        }
    }

    /// A VM that is removed for good needs its addresses no more.
    async fn release(&self, vm: &VmRecord) {
        for port in &vm.ports {
            if let Err(error) = self.networks.release(&vm.name, port).await {
                tracing::warn!("{}: its address stays taken: {error}", vm.name);
            }
        }
    }

    /// Removes what a VM has here, and then its record.
    pub(crate) async fn forget(&self, vm: &VmRecord) -> Result<(), Error> {
        self.detach(vm).await;
        let directory = self.config.vm(&vm.name);
        match std::fs::remove_dir_all(&directory) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(io(&directory, &error));
            }
            _ => {}
        }
        fail::point("vm.cleared");
        self.store.change(|change| {
            let present: Option<VmRecord> = change.get(VMS, &vm.name)?;
            if present.is_some_and(|present| present.uuid == vm.uuid) {
                change.remove(VMS, &vm.name)?;
            }
            Ok(())
        })?;
        self.say(
            "vm.removed",
            &vm.name,
            format!("{} is not here any more", vm.name),
        );
        Ok(())
    }

    /// A VM that was to come runs here: it is this node's.
    async fn arrived(&self, vm: &VmRecord) -> Result<(), Error> {
        fail::point("arrival.seen");
        self.store.change(|change| {
            let Some(mut present): Option<VmRecord> = change.get(VMS, &vm.name)? else {
                return Ok(());
            };
            if let Place::Coming { operation, .. } = &present.place
                && let Some(mut coming) = change.get::<Coming>(ARRIVALS, operation)?
            {
                coming.state = ArrivalState::Here;
                change.put(ARRIVALS, operation, &coming)?;
            }
            present.place = Place::Here;
            present.life = Life::Running;
            present.fresh = false;
            change.put(VMS, &vm.name, &present)
        })?;
        fail::point("arrival.recorded");
        for port in &vm.ports {
            if let Err(error) = self.networks.moved(&vm.name, port).await {
                tracing::warn!("{}: {error}", vm.name);
            }
        }
        self.say("vm.arrived", &vm.name, format!("{} runs here", vm.name));
        Ok(())
    }

    /// A part of a VM's memory is lost with the node that it came from, or with the file that it was
    /// restored from: what is left of it ends, and its disks are as after a power failure.
    pub(crate) async fn bereave(&self, vm: &VmRecord) -> Result<(), Error> {
        self.kill(vm).await?;
        let trouble = "what it came from, a node or a snapshot's file, was gone before all of its \
                       memory had come";
        self.store.change(|change| {
            let Some(mut present): Option<VmRecord> = change.get(VMS, &vm.name)? else {
                return Ok(());
            };
            for mut coming in change.all(ARRIVALS)? {
                if coming.uuid == vm.uuid && coming.state == ArrivalState::Here {
                    coming.state = ArrivalState::Bereft;
                    change.put(ARRIVALS, &coming.operation.clone(), &coming)?;
                }
            }
            present.life = Life::Stopped;
            present.trouble = Some(trouble.into());
            change.put(VMS, &vm.name, &present)
        })?;
        self.detach(vm).await;
        self.say("vm.bereft", &vm.name, format!("{}: {trouble}", vm.name));
        Ok(())
    }

    /// The process that a VM was to come to is gone, and nobody has sent it away. Its token
    /// is there until the VM is given to it: then it has never run here.
    async fn lost(&self, vm: &VmRecord) -> Result<(), Error> {
        let Place::Coming { operation, .. } = &vm.place else {
            return Ok(());
        };
        let token = std::fs::metadata(self.token_file(&vm.name));
        if token.is_ok_and(|token| token.len() > 0) {
            return self.refuse(vm, operation).await;
        }
        self.store.change(|change| {
            if let Some(mut coming) = change.get::<Coming>(ARRIVALS, operation)?
                && matches!(coming.state, ArrivalState::Waiting | ArrivalState::Received)
            {
                coming.state = ArrivalState::Lost;
                change.put(ARRIVALS, operation, &coming)?;
            }
            Ok(())
        })
    }

    /// Looks what runs again and again, and does what is to be done.
    pub async fn watch(self: Arc<Self>) {
        loop {
            if let Err(error) = self.look().await {
                tracing::warn!("{error}");
            }
            tokio::select! {
                () = tokio::time::sleep(LOOK) => {}
                () = self.wake.notified() => {}
            }
        }
    }

    async fn look(self: &Arc<Self>) -> Result<(), Error> {
        let records = self.store.all(VMS)?;
        if records.is_empty() {
            return Ok(());
        }
        let processes = self.observe().await?;
        for vm in records {
            let phase = processes.get(&vm.uuid).map(|process| process.phase);
            let done = deed(vm.life, &vm.place, phase);
            let recorded = done == Deed::Lost && self.is_lost(&vm)?;
            if done != Deed::Nothing && !recorded {
                let agent = Arc::clone(self);
                // Somebody may be at it, and take his time.
                tokio::spawn(async move {
                    let _alone = agent.alone_with(&vm.name).await;
                    if let Err(error) = agent.settle_alone(&vm.name).await {
                        tracing::warn!("{}: {error}", vm.name);
                    }
                });
            }
        }
        Ok(())
    }

    fn is_lost(&self, vm: &VmRecord) -> Result<bool, Error> {
        let Place::Coming { operation, .. } = &vm.place else {
            return Ok(false);
        };
        let coming = self.store.get(ARRIVALS, operation)?;
        Ok(coming.is_none_or(|it: Coming| it.state == ArrivalState::Lost))
    }
}

/// A VM that changes hands is this node's and another's: neither starts, stops or removes it.
pub(crate) fn is_here(vm: &VmRecord) -> Result<(), Error> {
    let (other, what) = match &vm.place {
        Place::Here => return Ok(()),
        Place::Leaving { to, .. } => (to, "to"),
        Place::Coming { from, .. } => (from, "from"),
    };
    Err(Error::new(
        Code::Conflict,
        format!("{} is on its way {what} {other}", vm.name),
        format!(
            "wait until it is there, or: supercloud vm cancel {}",
            vm.name
        ),
    ))
}

pub(crate) fn taken(name: &str, node: &str) -> Error {
    Error::new(
        Code::Conflict,
        format!("there is another VM {name} on {node}"),
        format!("choose another --name, or remove that one: supercloud vm rm {name}"),
    )
}

/// Where the user gets into his nodes.
const SSH: u16 = 22;

/// Whether a VM may be as it is wanted, on nodes whose agents listen at `listen`.
fn check(spec: &VmSpec, listen: u16) -> Result<(), Error> {
    for text in &spec.publish {
        let published: Published = text
            .parse()
            .map_err(|error: Invalid| Error::new(Code::BadRequest, error.to_string(), ""))?;
        let taken = [SSH, listen].contains(&published.port);
        if taken && published.protocol == Protocol::Tcp {
            return Err(Error::new(
                Code::BadRequest,
                format!("{text}: the nodes themselves are reached at that port"),
                "publish another one, such as 2222:22",
            ));
        }
    }
    let wrong = |what: &str, hint: &str| Err(Error::new(Code::BadRequest, what, hint));
    if spec.image.is_none() && spec.kernel.is_none() && spec.disks.is_empty() {
        return wrong("there is nothing to boot", "give an image, or --kernel");
    }
    if spec.memory < 16 << 20 || spec.cpus == 0 {
        return wrong("a VM has 16M of memory at least, and one vCPU", "");
    }
    if spec.initrd.is_some() && spec.kernel.is_none() {
        return wrong("an initrd needs a kernel", "give --kernel as well");
    }
    if !matches!(spec.host.as_deref(), None | Some("auto" | "module" | "kvm")) {
        return wrong("a VM runs on auto, module or kvm", "");
    }
    Ok(())
}
