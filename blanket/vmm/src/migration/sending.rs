//! A VM that is written down while it runs: in rounds, until it stands still for the rest of it. The
//! same goes over a link to another host, and into a file.

use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use blanket_migration::handover::Memory;
use blanket_migration::pages::Pages;
use blanket_migration::precopy::{Control, Next, Round, Wishes};
use blanket_snapshot::{Kind, Writer};

use super::Dirty;
use super::disks::{Blocks, Moving};
use crate::instance::Running;
use crate::saved::{Machine, SaveError, State, memory};
use crate::vm::Handle;

/// A slow guest's time comes in slices of this length, of which it has the first part.
const SLICE: Duration = Duration::from_millis(40);
/// That part is no shorter, or to stop the guest would take longer than it runs; the slice is
/// longer then.
const RUNS: Duration = Duration::from_millis(2);

/// A VM that is being written. It is logged what is written to it until this is dropped.
pub(crate) struct Sending<'a, W: Write> {
    running: &'a Running,
    vcpus: u32,
    writer: Writer<W>,
    disks: &'a Moving,
    logged: Logged<'a>,
}

/// All of it is written.
pub(crate) struct Done<W> {
    /// Where to.
    pub(crate) to: W,
    /// Bytes in all.
    pub(crate) bytes: u64,
    /// Pages since the last round.
    pub(crate) pages: u64,
    /// Pages that follow it.
    pub(crate) kept: Option<Pages>,
}

/// What is to be sent again.
pub(crate) struct Rest {
    memory: Dirty,
    disks: Blocks,
}

struct Logged<'a>(&'a Running);

impl Drop for Logged<'_> {
    fn drop(&mut self) {
        self.0.grants.log(false);
        // One that has ended needs no word; of one that will not stand still, the core
        // goes on to note what nobody reads.
        if let Err(error) = self.0.handle.end_log() {
            tracing::debug!(%error, "the dirty log is not ended");
        }
    }
}

impl<'a, W: Write> Sending<'a, W> {
    /// Begins with what it is made of.
    pub(crate) fn begin(
        running: &'a Running,
        vcpus: u32,
        to: W,
        machine: &Machine,
        disks: &'a Moving,
    ) -> Result<Self, SaveError> {
        let mut writer = Writer::new(to)?;
        writer.text(Kind::Machine, machine)?;
        running.grants.log(true);
        let logged = Logged(running);
        running.handle.log(|| ())?;
        Ok(Self {
            running,
            vcpus,
            writer,
            disks,
            logged,
        })
    }

    /// Writes memory and disks until the rest is little, or is to follow; what the rest is, and
    /// which it is. `settle` ends a round, `note` hears of it and of the guest's part of its time.
    pub(crate) fn rounds<E: From<SaveError>>(
        &mut self,
        wishes: Wishes,
        mut settle: impl FnMut(&mut Writer<W>) -> Result<(), E>,
        mut note: impl FnMut(&Round, u32),
    ) -> Result<(Rest, Memory), E> {
        let mut control = Control::new(wishes);
        let mut rest = None;
        let mut share = 100;
        loop {
            let begun = Instant::now();
            let handle = &self.running.handle;
            let sent = slowed(handle, share, || {
                let sent = round(self.running, self.disks, &mut self.writer, rest.as_ref())?;
                settle(&mut self.writer).map(|()| sent)
            })?;
            let took = begun.elapsed();
            let left = self.take_log()?;
            let dirty = left.memory.count() + left.disks.pages();
            let round = Round { sent, took, dirty };
            let next = control.after(&round);
            tracing::debug!(?round, ?next, "a round is over");
            if let Next::Round { share: now } = next {
                share = now;
            }
            note(&round, share);
            match next {
                Next::Stop => return Ok((left, Memory::Whole)),
                Next::Switch => return Ok((left, Memory::Apart)),
                Next::Round { .. } => {}
            }
            rest = Some(left);
        }
    }

    /// What was written since it was asked last.
    fn take_log(&self) -> Result<Rest, SaveError> {
        let domain = &self.running.domain;
        let mut dirty = Dirty::none(domain);
        let read = self
            .running
            .handle
            .log(|| dirty.add_logged(domain, self.vcpus))?;
        read?;
        self.running.grants.take_log(dirty.words());
        Ok(Rest {
            memory: dirty,
            disks: self.disks.take_log(),
        })
    }

    /// Sends the rest of a VM that stands still, with its state; or of its memory what its start
    /// needs, and says what follows, which is returned.
    pub(crate) fn finish<E: Into<SaveError>>(
        mut self,
        mut rest: Rest,
        apart: Memory,
        state: impl FnOnce(&crate::builder::Domain, u32) -> Result<State, E>,
    ) -> Result<Done<W>, SaveError> {
        tracing::debug!("its core has written itself down");
        let domain = &self.running.domain;
        // The core notes nothing any more, and could not be told so while it stands still.
        std::mem::forget(self.logged);
        let read = rest.memory.add_logged(domain, self.vcpus);
        self.running.grants.take_log(rest.memory.words());
        self.running.grants.log(false);
        read?;
        let blocks = [&rest.disks, &self.disks.take_log()];
        for blocks in blocks {
            self.disks.write(&mut self.writer, blocks)?;
        }
        let now = match apart {
            Memory::Whole => rest.memory.clone(),
            Memory::Apart => {
                // What is written at any moment is needed at once, and before anybody serves it.
                let mut now = Dirty::none(domain);
                now.add_standing(domain);
                self.running.grants.add_written(now.words());
                now
            }
        };
        let pages = memory::write_dirty(&mut self.writer, domain, &now, self.disks.bases())?;
        let kept = match apart {
            Memory::Whole => None,
            Memory::Apart => {
                let kept = rest.memory.without(&now);
                let packed = kept.pack().map_err(blanket_snapshot::Error::Write)?;
                self.writer.chunk(Kind::Missing, &packed)?;
                Some(kept)
            }
        };
        let disks: u64 = blocks.iter().map(|blocks| blocks.pages()).sum();
        let state = state(domain, self.vcpus).map_err(Into::into)?;
        self.writer.text(Kind::State, &state)?;
        let (to, bytes) = self.writer.finish()?;
        tracing::debug!("all of the VM is written");
        Ok(Done {
            to,
            bytes,
            pages: pages + disks,
            kept,
        })
    }
}

/// Writes everything, or what is left. How many pages were sent: by their pace it is estimated how
/// long the rest takes.
fn round<W: Write>(
    running: &Running,
    disks: &Moving,
    writer: &mut Writer<W>,
    rest: Option<&Rest>,
) -> Result<u64, SaveError> {
    let domain = &running.domain;
    match rest {
        None => {
            let all = disks.all()?;
            disks.write(writer, &all)?;
            Ok(memory::write(writer, domain, disks.bases())? + all.pages())
        }
        Some(rest) => {
            disks.write(writer, &rest.disks)?;
            Ok(
                memory::write_dirty(writer, domain, &rest.memory, disks.bases())?
                    + rest.disks.pages(),
            )
        }
    }
}

/// Does `work`, while the guest has `share` percent of its time.
fn slowed<T>(handle: &Handle, share: u32, work: impl FnOnce() -> T) -> T {
    if share >= 100 {
        return work();
    }
    let done = AtomicBool::new(false);
    std::thread::scope(|s| {
        let slower = crate::thread::named("slower").spawn_scoped(s, || {
            let runs = (SLICE * share / 100).max(RUNS);
            let stands = runs * (100 - share) / share.max(1);
            while !done.load(Ordering::Acquire) {
                // Time is what is to pass.
                if handle.paused(|| std::thread::sleep(stands)).is_none() {
                    return;
                }
                std::thread::sleep(runs);
            }
        });
        if let Err(error) = slower {
            tracing::warn!(%error, "the guest is not slowed down");
        }
        let out = work();
        done.store(true, Ordering::Release);
        out
    })
}
