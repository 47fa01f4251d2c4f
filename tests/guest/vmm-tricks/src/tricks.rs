//! The tricks. Each says whether the guest must go on.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::faults::{Faults, Handler, Mode};
use crate::memory::{Memory, PAGE, done};
use crate::{Guest, Result};

/// What must follow.
pub enum Outcome {
    /// The guest works on, with the data that it had; what there is to say.
    GoesOn(String),
    /// This VM ends with a word on its memory.
    Ends,
    /// Anything may become of the guest, but not of the core.
    Anything,
}

pub struct Trick {
    pub name: &'static str,
    /// The VM's memory is private memory of the process, not a file's.
    pub private: bool,
    pub play: fn(&Guest, &Memory) -> Result<Outcome>,
}

const fn trick(name: &'static str, play: fn(&Guest, &Memory) -> Result<Outcome>) -> Trick {
    Trick {
        name,
        private: false,
        play,
    }
}

pub const TRICKS: &[Trick] = &[
    trick("unmapped-pages", unmapped_pages),
    trick("moved-away-and-back", moved_away_and_back),
    trick("protected-and-back", protected_and_back),
    trick("post-copy", post_copy),
    trick("dirty-log", dirty_log),
    Trick {
        private: true,
        ..trick("fork", fork)
    },
    trick("munmap", |_, memory| {
        memory.upper().unmap()?;
        Ok(Outcome::Ends)
    }),
    trick("no-access", |_, memory| {
        memory.upper().protect(libc::PROT_NONE)?;
        Ok(Outcome::Ends)
    }),
    trick("read-only", |_, memory| {
        memory.upper().protect(libc::PROT_READ)?;
        Ok(Outcome::Ends)
    }),
    trick("moved-away", |_, memory| {
        memory.upper().moved(None)?;
        Ok(Outcome::Ends)
    }),
    trick("punched", punched),
];

/// The file keeps the pages, the process's tables lose them, again and again.
fn unmapped_pages(guest: &Guest, memory: &Memory) -> Result<Outcome> {
    for _ in 0..20 {
        memory.advise(libc::MADV_DONTNEED)?;
        // Not so often that the guest does nothing but ask for its pages.
        if guest.handle.wait_ended(Duration::from_millis(500)) {
            return Err("the VM has ended".into());
        }
    }
    Ok(Outcome::GoesOn("20 times".into()))
}

fn moved_away_and_back(guest: &Guest, memory: &Memory) -> Result<Outcome> {
    let upper = memory.upper();
    for _ in 0..5 {
        guest.paused(|| upper.moved(None)?.moved(Some(upper.start)))?;
        guest.ticking(1)?;
    }
    Ok(Outcome::GoesOn("5 times".into()))
}

fn protected_and_back(guest: &Guest, memory: &Memory) -> Result<Outcome> {
    let upper = memory.upper();
    for prot in [libc::PROT_NONE, libc::PROT_READ].repeat(3) {
        guest.paused(|| {
            upper.protect(prot)?;
            upper.protect(libc::PROT_READ | libc::PROT_WRITE)
        })?;
        guest.ticking(1)?;
    }
    Ok(Outcome::GoesOn("6 times".into()))
}

/// What the far end of a migration does after the VM has changed places: all of memory is
/// missing, and a page comes when somebody asks for it; the rest later.
fn post_copy(guest: &Guest, memory: &Memory) -> Result<Outcome> {
    let memory = *memory;
    let (faults, handler, copy) = guest.paused(|| {
        let faults = Faults::on(memory, Mode::Missing)?;
        let copy = Arc::new(Mutex::new(vec![[0u8; PAGE]; memory.pages()]));
        let pages = Arc::clone(&copy);
        let handler = Handler::start(Arc::clone(&faults), Mode::Missing, move |faults, page| {
            let content = pages.lock().map_err(|e| e.to_string())?[page];
            faults.fill(page, &content).map(drop)
        });
        for page in 0..memory.pages() {
            // One that was never there is asked for, and is zero. Of what the VMM's own
            // threads write, rings, nothing is lost: the guest rests.
            let content = memory.page(page);
            copy.lock().map_err(|e| e.to_string())?[page] = content;
            memory.only(page).advise(libc::MADV_REMOVE)?;
        }
        Ok((faults, handler, copy))
    })?;
    guest.ticking(6)?;
    let mut later = 0;
    for page in 0..memory.pages() {
        let content = copy.lock().map_err(|e| e.to_string())?[page];
        later += usize::from(faults.fill(page, &content)?);
    }
    guest.ticking(2)?;
    handler.stop()?;
    let asked = memory.pages() - later;
    if asked == 0 {
        return Err("nobody asked for a page".into());
    }
    Ok(Outcome::GoesOn(format!(
        "{asked} pages came when they were asked for, {later} later"
    )))
}

/// What the near end of a migration does: all of memory is protected against writing, and
/// who writes is seen. No page may change that is not in the log.
fn dirty_log(guest: &Guest, memory: &Memory) -> Result<Outcome> {
    let memory = *memory;
    let faults = Faults::on(memory, Mode::WriteProtect)?;
    let handler = Handler::start(Arc::clone(&faults), Mode::WriteProtect, |faults, page| {
        faults.protect(page, 1, false)
    });
    // The VMM's own threads write too, and are seen as well.
    let before = guest.paused(|| {
        faults.protect(0, memory.pages(), true)?;
        Ok((0..memory.pages())
            .map(|page| memory.page(page))
            .collect::<Vec<_>>())
    })?;
    guest.ticking(6)?;
    let changed: Vec<usize> = guest.paused(|| {
        Ok((0..memory.pages())
            .filter(|&page| memory.page(page) != before[page])
            .collect())
    })?;
    let log = handler.stop()?;
    drop(faults);
    let missed: Vec<_> = changed.iter().filter(|page| !log.contains(page)).collect();
    if changed.is_empty() || !missed.is_empty() {
        return Err(format!(
            "{} pages changed, {} are logged; not among them: {missed:?}",
            changed.len(),
            log.len()
        ));
    }
    Ok(Outcome::GoesOn(format!(
        "{} pages are logged, {} of them changed",
        log.len(),
        changed.len()
    )))
}

/// A child has the memory as it was at the fork, whatever the guest writes.
fn fork(guest: &Guest, memory: &Memory) -> Result<Outcome> {
    for round in 0..5 {
        // SAFETY: the child reads memory and exits; it takes no lock.
        let child = unsafe { libc::fork() };
        if child == 0 {
            let first = memory.sum();
            let mut same = true;
            for _ in 0..3 {
                same &= memory.sum() == first;
            }
            // SAFETY: ends the child.
            unsafe { libc::_exit(i32::from(!same)) }
        }
        done("fork", child)?;
        guest.ticking(1)?;
        let mut status = 0;
        // SAFETY: waits for the child.
        done("waitpid", unsafe {
            libc::waitpid(child, &raw mut status, 0)
        })?;
        if status != 0 {
            return Err(format!(
                "the child of round {round} saw its memory change (status {status:#x})"
            ));
        }
    }
    Ok(Outcome::GoesOn("5 children saw one state each".into()))
}

/// The guest's data is gone, so anything may become of it, but nothing of the host.
fn punched(guest: &Guest, memory: &Memory) -> Result<Outcome> {
    memory.upper().advise(libc::MADV_REMOVE)?;
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(10)
        && !guest.handle.wait_ended(Duration::from_millis(100))
    {
        // Again, for what it has touched meanwhile.
        memory.upper().advise(libc::MADV_REMOVE)?;
    }
    Ok(Outcome::Anything)
}
