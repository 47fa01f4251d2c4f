//! A VM that was written down: what is in it, and how it is made of it again
//! (`docs/formats.md`, "A saved VM").

mod machine;
pub(crate) mod memory;
mod state;
#[cfg(any(test, feature = "testing"))]
pub(crate) mod testing;

use std::io::{Read, Write};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use blanket_snapshot::{Kind, Reader, Writer};

use crate::builder::{self, Domain};
use crate::instance::Instance;
use crate::migration::Images;
use crate::sync::lock;
use crate::vm::{End, StillError, Then, Vm};

pub use machine::Machine;
pub use state::State;

/// Why a VM was not saved.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// There is nothing to save.
    #[error("the VM does not run")]
    NotRunning,
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
    /// Its memory.
    #[error(transparent)]
    Memory(#[from] builder::Error),
    /// The state of its xenstore.
    #[error("the saved VM's xenstore: {0}")]
    Xenstore(#[from] blanket_xenstore::state::RestoreError),
}

/// What a VM goes on from.
pub(crate) struct Resumed {
    pub(crate) state: State,
    /// It is the same VM, which has moved, and not another one that begins as it was.
    pub(crate) moved: bool,
}

/// All of a VM, which does not run.
pub(crate) struct Received {
    domain: Domain,
    machine: Machine,
    state: State,
}

/// What comes with a VM that moves, and not with a saved one.
pub(crate) struct Moving<'a, R> {
    /// Its disks.
    pub(crate) images: &'a mut Images,
    /// Tells its source that all up to a mark is here.
    pub(crate) answers: &'a mut dyn FnMut(&mut R) -> std::io::Result<()>,
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
fn now_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| {
        u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
    })
}

impl Instance {
    /// Writes the VM down, while it stands still. With `end` it ends then, else it goes
    /// on where it was. If it cannot be written, it goes on in any case.
    ///
    /// # Errors
    /// It does not run or does not stand still; the file.
    pub fn save(&self, to: impl Write, end: bool) -> Result<Saved, SaveError> {
        let running = lock(&self.now).running.clone();
        let running = running.ok_or(SaveError::NotRunning)?;
        // Until it is written: no device comes or goes.
        let devices = lock(&self.devices);
        let begun = Instant::now();
        let outcome = running.handle.standing_still(
            || running.bus.hold(),
            || {
                let written = self.console.standing_still(|console| {
                    running
                        .xenstore
                        .standing_still(|store| self.write(&running, &devices, store, console, to))
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
        let (bytes, pages) = outcome??;
        tracing::info!(bytes, pages, ?stood, "the VM is written down");
        Ok(Saved {
            bytes,
            pages,
            stood,
        })
    }

    fn write(
        &self,
        running: &crate::instance::Running,
        devices: &crate::devices::Devices,
        store: crate::xenstore::State,
        console: [u32; 2],
        to: impl Write,
    ) -> Result<(u64, u64), SaveError> {
        let mut writer = Writer::new(to)?;
        writer.text(Kind::Machine, &Machine::of(self, running, devices))?;
        let pages = memory::write(&mut writer, &running.domain)?;
        let state = State::read(
            &running.domain,
            self.spec().vcpus,
            store,
            console,
            self.target(),
        )?;
        writer.text(Kind::State, &state)?;
        let (_, bytes) = writer.finish()?;
        Ok((bytes, pages))
    }

    /// Starts a VM where it was when it was saved, in place of its first boot.
    ///
    /// # Errors
    /// It cannot be read, or cannot be had on this host; nothing is left running.
    pub fn resume(&self, from: impl Read) -> Result<Vm, crate::instance::Error> {
        let received = self.receive(from, None)?;
        self.go_on(received, false, || Ok(()))
    }

    /// Reads all of a VM, and of its disks if they come with it.
    ///
    /// # Errors
    /// It cannot be read, or cannot be had on this host.
    pub(crate) fn receive<R: Read>(
        &self,
        from: R,
        moving: Option<Moving<'_, R>>,
    ) -> Result<Received, ResumeError> {
        let (domain, machine, state) = self.read(from, moving)?;
        Ok(Received {
            domain,
            machine,
            state,
        })
    }

    /// Starts what was read, once `gate` allows it.
    ///
    /// # Errors
    /// It cannot be had on this host; nothing is left running.
    pub(crate) fn go_on(
        &self,
        received: Received,
        moved: bool,
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
        if moved {
            self.become_uuid(&machine.uuid);
        }
        self.launch(domain, Some(Resumed { state, moved }), gate)
    }

    fn read<R: Read>(
        &self,
        from: R,
        moving: Option<Moving<'_, R>>,
    ) -> Result<(Domain, Machine, State), ResumeError> {
        let mergeable = self.spec().mergeable;
        read(from, mergeable, moving, |machine| machine.fits(self))
    }
}

/// What is in a saved VM, if its machine `fits`.
fn read<R: Read>(
    from: R,
    mergeable: bool,
    mut moving: Option<Moving<'_, R>>,
    fits: impl FnOnce(&Machine) -> Result<(), ResumeError>,
) -> Result<(Domain, Machine, State), ResumeError> {
    let mut reader = Reader::new(from)?;
    let machine: Machine = reader.text(Kind::Machine)?;
    fits(&machine)?;
    let domain = machine.domain(mergeable)?;
    memory::read(&mut reader, &domain, &mut moving)?;
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
