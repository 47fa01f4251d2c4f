//! VMs as they were at a moment: taken while they run or when they do not, restored on any node,
//! copied, and carried away in a file. What `blanket save` or `blanket disk save` writes is kept as an
//! image, by its hash, with those that the VM needs.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use supercloud_api::{
    CloneVm, Code, Error, ExportTo, Image, ImageFormat, ImportFrom, Life, NetPort, Place, Restore,
    Snapshot, SnapshotKind, TakeSnapshot, Vm,
};

use crate::agent::Agent;
use crate::archive;
use crate::blanket::Phase;
use crate::events::now_ms;
use crate::fail;
use crate::record::{COPYING, IMAGES, Restoring, SNAPSHOTS, VMS, VmRecord};
use crate::vms::{STOP_SECONDS, is_here, new_mac, room, taken};

impl Agent {
    /// Snapshots of this node.
    ///
    /// # Errors
    /// The disk.
    pub fn snapshots(&self) -> Result<Vec<Snapshot>, Error> {
        let mut all = self.store.all(SNAPSHOTS)?;
        all.sort_by_key(|it| it.taken_ms);
        Ok(all)
    }

    /// Snapshots of all nodes that answer.
    ///
    /// # Errors
    /// The disk.
    pub async fn all_snapshots(self: &Arc<Self>) -> Result<Vec<Snapshot>, Error> {
        let mut all = self.snapshots()?;
        let others = self.of_others::<Vec<Snapshot>>("/v1/snapshots").await?;
        all.extend(others.into_iter().flatten());
        all.sort_by_key(|it| it.taken_ms);
        Ok(all)
    }

    /// A snapshot, whichever node has it.
    ///
    /// # Errors
    /// No node that answers has it.
    pub async fn find_snapshot(self: &Arc<Self>, name: &str) -> Result<Snapshot, Error> {
        supercloud_api::name("a snapshot", name)?;
        if let Some(here) = self.store.get(SNAPSHOTS, name)? {
            return Ok(here);
        }
        let all = self.all_snapshots().await?;
        all.into_iter().find(|it| it.name == name).ok_or_else(|| {
            Error::not_found(
                format!("there is no snapshot {name}"),
                "`supercloud snapshot list` shows all, `supercloud node list` nodes that do not answer",
            )
        })
    }

    /// Takes a snapshot of a VM: of one that runs, which it does meanwhile but for a moment, or of
    /// what is in the disks of one that is stopped, which cannot be started meanwhile.
    ///
    /// # Errors
    /// It does neither, or cannot be written.
    pub async fn take_snapshot(
        self: &Arc<Self>,
        name: &str,
        wanted: &TakeSnapshot,
    ) -> Result<Snapshot, Error> {
        let called = match &wanted.name {
            Some(called) => called.clone(),
            None => format!("{name}-{}", now_ms() / 1000),
        };
        supercloud_api::name("a snapshot", &called)?;
        let _alone = self.alone_with(name).await;
        let kind = self.takes(name).await?;
        let mut vm = self.record(name)?;
        self.is_free(&called).await?;
        let _stays = self.images.read().await;
        let part = self.new_part()?;
        let stood_ms = match kind {
            SnapshotKind::Running => self.blanket.save(name, part.path()).await?,
            SnapshotKind::Stopped => {
                self.save_disks(&mut vm, part.path()).await?;
                0
            }
        };
        fail::point("snapshot.written");
        let (hash, bytes) = self.named_by_hash(part).await?;
        fail::point("snapshot.named");
        let saved = Image {
            hash,
            names: Vec::new(),
            format: ImageFormat::File,
            bytes,
            size: bytes,
        };
        let mut images = Vec::new();
        for hash in vm.images() {
            images.extend(self.image(hash)?);
        }
        let snapshot = Snapshot {
            name: called,
            node: self.name(),
            kind,
            vm: name.into(),
            uuid: vm.uuid,
            spec: vm.spec,
            kernel: vm.kernel,
            initrd: vm.initrd,
            seed: vm.seed,
            disks: vm.disks,
            ports: vm.ports,
            saved,
            images,
            taken_ms: now_ms(),
            stood_ms,
        };
        self.note_snapshot(&snapshot)?;
        let how = match kind {
            SnapshotKind::Running => format!("of {name}, which stood still for {stood_ms} ms"),
            SnapshotKind::Stopped => format!("of the disks of {name}, which is stopped"),
        };
        self.say("snapshot.taken", &snapshot.name, how);
        Ok(snapshot)
    }

    /// What kind of snapshot can be taken of a VM, whose lock is held.
    async fn takes(&self, name: &str) -> Result<SnapshotKind, Error> {
        let mut vm = self.record(name)?;
        is_here(&vm)?;
        let mut phase = self.phase_of(&vm).await?;
        if phase.is_none() && vm.life != Life::Stopped {
            // It has just ended, and nobody has noted it.
            self.settle_alone(name).await?;
            vm = self.record(name)?;
            phase = self.phase_of(&vm).await?;
        }
        let waits = vm.restore.as_ref();
        match (vm.life, phase) {
            (_, Some(Phase::Running)) => Ok(SnapshotKind::Running),
            (Life::Stopped, None) if waits.is_none_or(|it| it.kind == SnapshotKind::Stopped) => {
                Ok(SnapshotKind::Stopped)
            }
            (Life::Stopped, None) => Err(Error::new(
                Code::Conflict,
                format!("{name} has not gone on yet from the snapshot that it is made of"),
                format!("have it do that first: supercloud vm start {name}"),
            )),
            _ => Err(Error::new(
                Code::Conflict,
                format!("{name} neither runs as a whole nor is stopped"),
                format!("`supercloud vm show {name}` tells how it is; wait, or stop it"),
            )),
        }
    }

    async fn phase_of(&self, vm: &VmRecord) -> Result<Option<Phase>, Error> {
        let phase = self.observe().await?.get(&vm.uuid).map(|it| it.phase);
        // A process that has done its work ends by itself.
        Ok(phase.filter(|phase| *phase != Phase::Ended))
    }

    async fn is_free(self: &Arc<Self>, name: &str) -> Result<(), Error> {
        match self.find_snapshot(name).await {
            Ok(other) => Err(Error::new(
                Code::Conflict,
                format!("there is another snapshot {name} on {}", other.node),
                "choose another name",
            )),
            Err(error) if error.code == Code::NotFound => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Writes a snapshot down whose files are there.
    fn note_snapshot(&self, snapshot: &Snapshot) -> Result<(), Error> {
        self.store.change(|change| {
            if change.get(SNAPSHOTS, &snapshot.name)?.is_some() {
                return Err(Error::new(
                    Code::Conflict,
                    format!("there is another snapshot {}", snapshot.name),
                    "choose another name",
                ));
            }
            for image in snapshot.files() {
                if change.get(IMAGES, &image.hash)?.is_none() {
                    let unnamed = Image {
                        names: Vec::new(),
                        ..image.clone()
                    };
                    change.put(IMAGES, &image.hash, &unnamed)?;
                }
            }
            change.put(SNAPSHOTS, &snapshot.name, snapshot)
        })
    }

    /// Removes a snapshot of this node, with what nobody else needs. Twice is as once.
    ///
    /// # Errors
    /// The disk.
    pub fn remove_snapshot(&self, name: &str) -> Result<(), Error> {
        let Some(snapshot) = self.store.get(SNAPSHOTS, name)? else {
            return Ok(());
        };
        self.store.change(|change| change.remove(SNAPSHOTS, name))?;
        fail::point("snapshot.removed");
        let files: Vec<&str> = snapshot.files().map(|it| it.hash.as_str()).collect();
        self.drop_unneeded(&files)
    }

    /// Has a VM go on here from a snapshot, or boot if it did not run then; as another one, if that
    /// is wanted.
    ///
    /// # Errors
    /// There is such a VM, or it cannot go on here: then nothing of it stays.
    pub async fn restore(self: &Arc<Self>, from: &str, wanted: &Restore) -> Result<Vm, Error> {
        let snapshot = self.find_snapshot(from).await?;
        if wanted.lazy && snapshot.kind == SnapshotKind::Stopped {
            return Err(Error::new(
                Code::BadRequest,
                format!(
                    "{} did not run when the snapshot {from} was taken: there is no memory in it \
                     that could come later",
                    snapshot.vm
                ),
                "leave --lazy out: it boots",
            ));
        }
        let name = wanted.name.as_ref().unwrap_or(&snapshot.vm);
        supercloud_api::name("a VM", name)?;
        let alone = self.alone_with(name).await;
        let other = wanted.name.is_some();
        let all = self.all_vms().await?;
        if let Some(vm) = all.iter().find(|vm| vm.name == *name) {
            return Err(taken(name, &vm.node));
        }
        if let Some(vm) = all.iter().find(|vm| !other && vm.uuid == snapshot.uuid) {
            return Err(Error::new(
                Code::Conflict,
                format!("the VM itself is on {}, as {}", vm.node, vm.name),
                "remove that one first, or give --name, which makes another one",
            ));
        }
        room(&self.name(), snapshot.spec.memory)?;
        let stays = self.images.read().await;
        for image in snapshot.files() {
            if snapshot.node != self.name() {
                self.fetch_image(&snapshot.node, image).await?;
            } else if self.image(&image.hash)?.is_none() {
                return Err(Error::failed(format!("the image {} is gone", image.hash)));
            }
        }
        let record = self.as_restored(name, &snapshot, wanted)?;
        for port in &record.ports {
            self.networks.can_attach(port).await?;
        }
        self.store.change(|change| change.put(VMS, name, &record))?;
        fail::point("restore.recorded");
        let text = format!("{name} is made of the snapshot {}", snapshot.name);
        self.say("vm.made", name, text);
        drop(stays);
        let settled = self.settle_alone(name).await;
        drop(alone);
        // What was only fetched for it: the saved VM, or all of it if it could not be started.
        let files: Vec<&str> = snapshot.files().map(|it| it.hash.as_str()).collect();
        self.drop_unneeded(&files)?;
        settled?;
        self.vm(name).await
    }

    fn as_restored(
        &self,
        name: &str,
        snapshot: &Snapshot,
        wanted: &Restore,
    ) -> Result<VmRecord, Error> {
        let other = wanted.name.is_some();
        let port = |port: &NetPort| {
            let mac = if other { new_mac()? } else { port.mac.clone() };
            Ok(NetPort {
                net: port.net.clone(),
                mac,
            })
        };
        let ports: Result<Vec<NetPort>, Error> = snapshot.ports.iter().map(port).collect();
        let disks = snapshot.disks.iter().cloned().enumerate();
        let mut spec = snapshot.spec.clone();
        if other {
            // They lead to the one that it was.
            spec.publish.clear();
        }
        Ok(VmRecord {
            name: name.into(),
            uuid: if other {
                Self::new_id()?
            } else {
                snapshot.uuid.clone()
            },
            disks: disks
                .map(|(index, disk)| self.as_own(name, index, disk))
                .collect::<Result<_, _>>()?,
            spec,
            kernel: snapshot.kernel.clone(),
            initrd: snapshot.initrd.clone(),
            seed: snapshot.seed.clone(),
            ports: ports?,
            life: Life::Starting,
            place: Place::Here,
            fresh: true,
            stop_seconds: STOP_SECONDS,
            trouble: None,
            restore: Some(Restoring {
                saved: snapshot.saved.hash.clone(),
                kind: snapshot.kind,
                // A guest that boots finds what it has.
                other: other && snapshot.kind == SnapshotKind::Running,
                lazy: wanted.lazy,
            }),
        })
    }

    /// A VM that goes on as another one has the addresses of the one that it was: its networks are
    /// taken from it and given again, so that its guest finds new ones. Twice is as once.
    pub(crate) async fn given_new_addresses(&self, vm: &VmRecord) -> Result<(), Error> {
        for (index, port) in vm.ports.iter().enumerate() {
            let spec = self.networks.attach(&vm.name, port).await?;
            // Another agent may have been here before.
            if let Err(error) = self.blanket.net_detach(&vm.name, index).await {
                tracing::info!("{}: {error}", vm.name);
            }
            self.blanket.net_attach(&vm.name, &spec).await?;
        }
        Ok(())
    }

    /// Makes a copy of a VM of this node, as another one: it goes on from the same moment, or boots
    /// if the VM does not run.
    ///
    /// # Errors
    /// As of a snapshot and its restoring.
    pub async fn clone_vm(self: &Arc<Self>, name: &str, wanted: &CloneVm) -> Result<Vm, Error> {
        supercloud_api::name("a VM", &wanted.name)?;
        if let Ok(other) = self.find_vm(&wanted.name).await {
            return Err(taken(&wanted.name, &other.node));
        }
        let passing = format!("clone-{}", Self::new_id()?);
        self.store
            .change(|change| change.put(COPYING, &passing, &passing))?;
        let made = self.copied(name, &passing, &wanted.name).await;
        self.clear_copy(&passing)?;
        made
    }

    async fn copied(self: &Arc<Self>, name: &str, passing: &str, other: &str) -> Result<Vm, Error> {
        let take = TakeSnapshot {
            name: Some(passing.into()),
        };
        self.take_snapshot(name, &take).await?;
        fail::point("clone.taken");
        let restore = Restore {
            name: Some(other.into()),
            // Its file goes away with it.
            lazy: false,
        };
        self.restore(passing, &restore).await
    }

    fn clear_copy(&self, passing: &str) -> Result<(), Error> {
        self.remove_snapshot(passing)?;
        self.store.change(|change| change.remove(COPYING, passing))
    }

    /// Removes the snapshots of copies that another agent had begun to make.
    ///
    /// # Errors
    /// The disk.
    pub(crate) fn clear_copying(&self) -> Result<(), Error> {
        let all = self.store.all(COPYING)?;
        all.iter().try_for_each(|passing| self.clear_copy(passing))
    }

    /// Writes a snapshot to a file, with all that it needs.
    ///
    /// # Errors
    /// There is a file, or the disk.
    pub async fn export(
        self: &Arc<Self>,
        name: &str,
        wanted: &ExportTo,
    ) -> Result<Snapshot, Error> {
        let path = absolute(&wanted.path)?;
        let snapshot = self.find_snapshot(name).await?;
        let stays = self.images.read().await;
        if snapshot.node != self.name() {
            for image in snapshot.files() {
                self.fetch_image(&snapshot.node, image).await?;
            }
        }
        let (directory, written) = (self.config.images(), snapshot.clone());
        blocking(move || archive::write(&path, &written, &directory)).await?;
        let files: Vec<&str> = snapshot.files().map(|it| it.hash.as_str()).collect();
        drop(stays);
        // What was only fetched for it.
        self.drop_unneeded(&files)?;
        Ok(snapshot)
    }

    /// Reads a snapshot from a file.
    ///
    /// # Errors
    /// It is none, or damaged, or there is another one of that name.
    pub async fn import(self: &Arc<Self>, wanted: &ImportFrom) -> Result<Snapshot, Error> {
        let path = absolute(&wanted.path)?;
        let _stays = self.images.read().await;
        let directory = self.config.images();
        let read = blocking(move || archive::read(&path, &directory)).await?;
        let snapshot = Snapshot {
            name: wanted.name.clone().unwrap_or(read.name),
            node: self.name(),
            ..read
        };
        let noted = async {
            supercloud_api::name("a snapshot", &snapshot.name)?;
            self.is_free(&snapshot.name).await?;
            self.note_snapshot(&snapshot)
        };
        if let Err(error) = noted.await {
            self.forget_files(&snapshot);
            return Err(error);
        }
        self.say("snapshot.imported", &snapshot.name, &*wanted.path);
        Ok(snapshot)
    }

    /// Files of a snapshot that was not noted, and that nothing else has.
    fn forget_files(&self, snapshot: &Snapshot) {
        for image in snapshot.files() {
            if matches!(self.image(&image.hash), Ok(None)) {
                let _ = std::fs::remove_file(self.image_path(&image.hash));
            }
        }
    }
}

fn absolute(path: &str) -> Result<PathBuf, Error> {
    if Path::new(path).is_absolute() {
        return Ok(path.into());
    }
    Err(Error::new(
        Code::BadRequest,
        format!("{path} is not an absolute path"),
        "",
    ))
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|error| Err(Error::failed(error.to_string())))
}
