//! A VM that was written down: what is in it, and how it is made of it again
//! (`docs/formats.md`, "A saved VM").

pub mod disks;
mod machine;
pub(crate) mod memory;
mod state;
mod stored;
#[cfg(any(test, feature = "testing"))]
pub(crate) mod testing;

use std::fs::File;
use std::io::{BufReader, Read, Seek as _, Write};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use blanket_migration::handover::Memory;
use blanket_migration::pages::Pages;
use blanket_snapshot::{Kind, Reader};

use crate::builder::{self, Domain};
use crate::instance::Instance;
use crate::migration::{
    Arrival, Bases, Images, Moving as Disks, PostCopy, Sending, UserFaults, Wishes,
};
use crate::sync::lock;
use crate::vm::{End, StillError, Then, Vm};

pub use machine::Machine;
pub use state::State;
pub(crate) use stored::Stored;

/// Why a VM was not saved.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// There is nothing to save.
    #[error("the VM does not run")]
    NotRunning,
    /// It has not come as a whole yet.
    #[error("{}", crate::migration::APART)]
    Apart,
    /// It does not stand still.
    #[error(transparent)]
    Still(#[from] StillError),
    /// Its file.
    #[error("its file {0}")]
    File(#[from] blanket_snapshot::Error),
    /// A disk.
    #[error("disk {0} cannot be read: {1}")]
    Disk(u32, #[source] std::io::Error),
    /// What the core wrote down.
    #[error("what the core wrote down cannot be read: {0}")]
    Core(#[from] vm_memory::GuestMemoryError),
}

/// Why a saved VM does not go on.
#[derive(Debug, thiserror::Error)]
pub enum ResumeError {
    /// Its file.
    #[error("the saved VM {0}")]
    File(#[from] blanket_snapshot::Error),
    /// This host cannot have it.
    #[error("the saved VM cannot go on here: {0}")]
    Impossible(String),
    /// A disk that was to be copied.
    #[error("disk {0} cannot be copied here: {1}")]
    Disk(u32, String),
    /// What a disk stands on, in which pages are said to be.
    #[error("disk {0}: {1}")]
    Base(u32, String),
    /// Its memory.
    #[error(transparent)]
    Memory(#[from] builder::Error),
    /// Its memory cannot stay in the file.
    #[error("the saved VM's memory cannot stay in its file: {0}")]
    Stays(#[source] std::io::Error),
    /// The state of its xenstore.
    #[error("the saved VM's xenstore: {0}")]
    Xenstore(#[from] blanket_xenstore::state::RestoreError),
}

/// What a VM goes on from.
pub(crate) struct Resumed {
    pub(crate) state: State,
    /// It is the same VM, which has moved, and not another one that begins as it was.
    pub(crate) moved: bool,
    /// What follows it.
    pub(crate) arrival: Option<Arc<Arrival>>,
}

/// All of a VM, which does not run.
pub(crate) struct Received {
    domain: Domain,
    machine: Machine,
    state: State,
}

impl Received {
    /// Its memory.
    pub(crate) fn memory(&self) -> &Arc<builder::GuestMemory> {
        &self.domain.memory
    }
}

/// How a VM is written down that runs meanwhile: each round more makes the file longer.
const ROUNDS: Wishes = Wishes {
    downtime: Duration::from_millis(300),
    rounds: 3,
    post_copy: PostCopy::Never,
};

/// What comes with a VM beside its memory and its state.
pub(crate) struct Moving<'a, R> {
    /// Its disks, of a VM that moves or was saved with them.
    pub(crate) images: &'a mut Images,
    /// What these stand on, of a VM that moves: pages that are in it may be named only.
    pub(crate) bases: Option<&'a Bases>,
    /// Tells its source that all up to a mark is here.
    pub(crate) answers: &'a mut dyn FnMut(&mut R) -> std::io::Result<()>,
    /// A part of its memory may follow.
    pub(crate) may_follow: bool,
    /// Which, once that is known.
    pub(crate) missing: &'a mut Option<Pages>,
}

/// What saving a VM came to.
#[derive(Clone, Copy, Debug)]
pub struct Saved {
    /// Bytes of the file.
    pub bytes: u64,
    /// Pages in it; the others are zero.
    pub pages: u64,
    /// How long the VM stood still.
    pub stood: Duration,
}

/// Nanoseconds since 1970; 0 before.
pub(crate) fn now_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| {
        u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
    })
}

impl Instance {
    /// Writes the VM down while it runs, but for the last of it, for which it stands still; with
    /// `disks`, also what is in those that its guest can write. With `end` it ends then, else it goes
    /// on where it was. If it cannot be written, it goes on in any case.
    ///
    /// # Errors
    /// It does not run or does not stand still; the file.
    pub fn save(&self, to: impl Write, disks: bool, end: bool) -> Result<Saved, SaveError> {
        let running = lock(&self.now).running.clone();
        let running = running.ok_or(SaveError::NotRunning)?;
        if self.is_apart() {
            return Err(SaveError::Apart);
        }
        // Until it is written: no device comes or goes.
        let devices = lock(&self.devices);
        let machine = Machine::of(self, &running, &devices);
        let (machine, disks) = if disks {
            let content = Disks::writable(&devices);
            (machine.with(&content), Disks::begin(&devices))
        } else {
            (machine, Disks::none())
        };
        let mut sending = Sending::begin(&running, self.spec().vcpus, to, &machine, &disks)?;
        let mut pages = 0;
        let rounds = sending.rounds(ROUNDS, |_| Ok(()), |round, _| pages += round.sent);
        let (rest, whole): (_, Memory) = rounds.map_err(|error: SaveError| error)?;
        let mut begun = Instant::now();
        let outcome = running.handle.standing_still_logged(
            || {
                begun = Instant::now();
                running.bus.hold();
            },
            || {
                // Just now its core wrote down what its clock said.
                let stopped_at = now_ns();
                let written = self.console.standing_still(|console| {
                    running.xenstore.standing_still(|store| {
                        sending.finish(rest, whole, |domain, vcpus| {
                            let target = self.target();
                            State::read(domain, vcpus, store, console, target, stopped_at)
                        })
                    })
                });
                let then = if end && written.is_ok() {
                    Then::End(End::Saved)
                } else {
                    Then::GoOn
                };
                (written, then)
            },
        );
        let stood = begun.elapsed();
        // What is written down is all that has happened: where the VM has ended, its
        // devices do nothing more of what it asked for.
        if !(end && matches!(outcome, Ok(Ok(_)))) {
            running.bus.go_on();
        }
        let done = outcome??;
        pages += done.pages;
        tracing::info!(bytes = done.bytes, pages, ?stood, "the VM is written down");
        Ok(Saved {
            bytes: done.bytes,
            pages,
            stood,
        })
    }

    /// Starts a VM where it was when it was saved, in place of its first boot.
    ///
    /// # Errors
    /// It cannot be read, or cannot be had on this host; nothing is left running.
    pub fn resume(&self, from: impl Read) -> Result<Vm, crate::instance::Error> {
        let received = self.receive(from, None, None)?;
        self.go_on(received, false, None, || Ok(()))
    }

    /// As [`Self::resume`], of a file: all of it is looked at first, but its pages stay there. They
    /// come when the VM touches them, which `faults` tells, and one by one in the background. The file
    /// must not be written to meanwhile.
    ///
    /// # Errors
    /// As there.
    pub fn resume_lazily(
        self: &Arc<Self>,
        mut file: File,
        faults: UserFaults,
    ) -> Result<Vm, crate::instance::Error> {
        let stays = |error| ResumeError::Stays(error);
        file.rewind().map_err(stays)?;
        let mut stored = Stored::new(file.try_clone().map_err(stays)?);
        let received = self.receive(BufReader::new(file), None, Some(&mut stored))?;
        let missing = stored.lay_standing(&received.domain)?;
        let arrival = Arrival::begin(faults, received.memory(), missing, self).map_err(stays)?;
        *lock(&self.arrival) = Some(Arc::clone(&arrival));
        // What is needed to start it is served, too.
        arrival.load(Arc::clone(self), stored).map_err(stays)?;
        let vm = self.go_on(received, false, Some(Arc::clone(&arrival)), || Ok(()));
        let vm = vm.inspect_err(|_| arrival.end())?;
        if arrival.pull().lost {
            self.loses_memory();
        }
        Ok(vm)
    }

    /// Reads all of a VM, and of its disks if they come with it. With `stays`, its pages are only
    /// found.
    ///
    /// # Errors
    /// It cannot be read, or cannot be had on this host.
    pub(crate) fn receive<R: Read>(
        &self,
        from: R,
        moving: Option<Moving<'_, R>>,
        stays: Option<&mut Stored>,
    ) -> Result<Received, ResumeError> {
        let mergeable = self.spec().mergeable;
        let moves = moving.is_some();
        let (domain, machine, state) = read(from, mergeable, moving, stays, |machine| {
            machine.fits(self)?;
            if moves || machine.content.is_empty() {
                return Ok(None);
            }
            let wanted = |number| machine.content.contains(&number);
            Images::of(&lock(&self.devices), wanted).map(Some)
        })?;
        Ok(Received {
            domain,
            machine,
            state,
        })
    }

    /// Starts what was read, once `gate` allows it: the same VM if it has `moved`. A part of its memory
    /// may follow it.
    ///
    /// # Errors
    /// It cannot be had on this host; nothing is left running.
    pub(crate) fn go_on(
        &self,
        received: Received,
        moved: bool,
        arrival: Option<Arc<Arrival>>,
        gate: impl FnOnce() -> Result<(), crate::instance::Error>,
    ) -> Result<Vm, crate::instance::Error> {
        let Received {
            domain,
            machine,
            state,
        } = received;
        {
            let mut now = lock(&self.now);
            now.booted.clone_from(&machine.kernel);
            now.target = state.target;
        }
        self.has_only(machine.only().cloned());
        if moved {
            self.become_uuid(&machine.uuid);
        }
        let resumed = Resumed {
            state,
            moved,
            arrival,
        };
        self.launch(domain, Some(resumed), gate)
    }
}

/// What is in a saved VM, if its machine `fits`, which gives the images that its disks' content is
/// for if it does not move. With `stays`, its pages are only found.
fn read<R: Read>(
    from: R,
    mergeable: bool,
    moving: Option<Moving<'_, R>>,
    stays: Option<&mut Stored>,
    fits: impl FnOnce(&Machine) -> Result<Option<Images>, ResumeError>,
) -> Result<(Domain, Machine, State), ResumeError> {
    let mut reader = Reader::new(from)?;
    let machine: Machine = reader.text(Kind::Machine)?;
    let Some(mut images) = fits(&machine)? else {
        return rest(reader, machine, mergeable, moving, stays);
    };
    let own = Moving {
        images: &mut images,
        bases: None,
        answers: &mut |_: &mut R| Err(std::io::Error::other("a saved VM waits for no answers")),
        may_follow: false,
        missing: &mut None,
    };
    rest(reader, machine, mergeable, Some(own), stays)
}

fn rest<R: Read>(
    mut reader: Reader<R>,
    machine: Machine,
    mergeable: bool,
    mut moving: Option<Moving<'_, R>>,
    stays: Option<&mut Stored>,
) -> Result<(Domain, Machine, State), ResumeError> {
    let domain = machine.domain(mergeable)?;
    memory::read(&mut reader, &domain, &mut moving, stays)?;
    if let Some(moving) = moving {
        moving.images.flush()?;
    }
    let state: State = reader.text(Kind::State)?;
    reader.finish()?;
    state.check(&machine)?;
    Ok((domain, machine, state))
}

/// What a VM is made of that is offered by another host, and nothing else.
pub(crate) fn offered(from: impl Read) -> Result<Machine, ResumeError> {
    let mut reader = Reader::new(from)?;
    let machine = reader.text(Kind::Machine)?;
    reader.finish()?;
    Ok(machine)
}

/// What a saved VM is made of, from its beginning alone.
///
/// # Errors
/// It cannot be read.
pub fn machine(from: impl Read) -> Result<Machine, ResumeError> {
    Ok(Reader::new(from)?.text(Kind::Machine)?)
}
