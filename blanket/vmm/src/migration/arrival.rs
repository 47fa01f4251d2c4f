//! The part of a VM's memory that follows it: at the destination, or from the file that it was
//! saved in.
//!
//! Two threads see to it. One hears of frames that somebody waits for, and asks the source for
//! them, or the other one, which takes in what comes, wanted or not, or reads it. Neither touches the guest's memory
//! itself: a frame gets its content by a system call that needs no other frame. The only lock
//! that both take, and backends and vCPUs with them ([`Arrival::gives_up`]), is that of the sets
//! of frames; under it nobody touches the guest's memory, and nobody waits but for the kernel to
//! put pages there. So whoever stands on a missing frame, with whatever locks, waits for the link
//! alone, and not for somebody who waits for him.

use std::io;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use blanket_migration::link::{Link, Says};
use blanket_migration::message::Message;
use blanket_migration::pages::Pages;
use blanket_migration::pull::{Ask, Needed, Piece, Pulling};
use blanket_snapshot::{Error, PAGE, Run};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::retry_on_intr;
use vmm_sys_util::eventfd::EventFd;

use super::NotGiven;
use super::destination::{Given, Incoming, borrowed, event, is_readable};
use super::faults::{Holes, UserFaults};
use crate::builder::GuestMemory;
use crate::instance::{self, Instance};
use crate::saved::Stored;
use crate::sync::lock;

/// What frames that were never written have.
static ZERO: [u8; PAGE] = [0; PAGE];

/// How often the source is told how much is missing.
const TELL: Duration = Duration::from_secs(1);

/// How far it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pull {
    /// Pages that are missing.
    pub left: u64,
    /// Pages that have come.
    pub pages: u64,
    /// Touches of pages that were missing.
    pub faults: u64,
    /// The source can be heard, or the file read.
    pub linked: bool,
    /// The source has ended, or the file is damaged: what is missing is lost.
    pub lost: bool,
    /// From the moment in which the VM was given to the last page.
    pub took: Option<Duration>,
}

/// Who is asked for what is needed at once.
#[derive(Default)]
enum Asked {
    /// Nobody can be heard.
    #[default]
    Nobody,
    /// The source.
    Source(Says),
    /// The thread that reads the file.
    File(Sender<u64>),
}

/// See above.
pub(crate) struct Arrival {
    holes: Holes,
    /// Keeps what the holes are in, until there are none.
    memory: Mutex<Option<Arc<GuestMemory>>>,
    pulling: Mutex<Pulling>,
    asked: Mutex<Asked>,
    now: Mutex<Pull>,
    begun: Instant,
    /// Nothing is needed any more of what is missing.
    released: AtomicBool,
    /// There are no holes any more.
    ended: AtomicBool,
    /// Readable once there is nothing more to do.
    done: EventFd,
}

impl std::fmt::Debug for Arrival {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.pull().fmt(f)
    }
}

impl Arrival {
    /// Of the frames of `memory` below `missing.frames()`; from now on whoever touches one that
    /// has no content waits for this.
    pub(crate) fn begin(
        faults: UserFaults,
        memory: &Arc<GuestMemory>,
        missing: Pages,
        instance: &Arc<Instance>,
    ) -> io::Result<Arc<Self>> {
        let pull = Pull {
            left: missing.count(),
            ..Pull::default()
        };
        let this = Arc::new(Self {
            holes: Holes::of(faults, memory, missing.frames())?,
            memory: Mutex::new(Some(Arc::clone(memory))),
            pulling: Mutex::new(Pulling::new(missing)),
            asked: Mutex::default(),
            now: Mutex::new(pull),
            begun: Instant::now(),
            released: AtomicBool::new(false),
            ended: AtomicBool::new(false),
            done: event()?,
        });
        let (serves, instance) = (Arc::clone(&this), Arc::clone(instance));
        crate::thread::named("faults").spawn(move || {
            // Who waited when they ended was woken by that.
            if let Err(error) = serves.serve()
                && !serves.ended.load(Ordering::SeqCst)
            {
                // Somebody waits for a frame that he never gets.
                tracing::error!(%error, "the VM's memory cannot be given to it");
                instance.kill();
            }
        })?;
        Ok(this)
    }

    /// How far it is.
    pub(crate) fn pull(&self) -> Pull {
        *lock(&self.now)
    }

    /// Whether frames are missing.
    pub(crate) fn is_apart(&self) -> bool {
        self.pull().left > 0
    }

    /// Whether frames are missing that do not come now.
    pub(crate) fn is_cut(&self) -> bool {
        let now = self.pull();
        now.left > 0 && !now.linked
    }

    /// The guest has given up frames: what comes of them is not placed.
    pub(crate) fn gives_up(&self, gfns: &[u64]) {
        if self.is_apart() {
            let mut pulling = lock(&self.pulling);
            gfns.iter().for_each(|gfn| pulling.gives_up(*gfn));
        }
    }

    // ---- whoever waits for a frame ----

    /// The life of the thread that hears of faults.
    fn serve(&self) -> io::Result<()> {
        loop {
            let mut wanted = [
                PollFd::new(&self.holes, PollFlags::IN),
                PollFd::from_borrowed_fd(borrowed(&self.done), PollFlags::IN),
            ];
            retry_on_intr(|| poll(&mut wanted, None))?;
            if is_readable(&self.done, &wanted) {
                return Ok(());
            }
            for frame in self.holes.waited_for()? {
                self.fault(frame)?;
            }
        }
    }

    fn fault(&self, frame: u64) -> io::Result<()> {
        let needed = lock(&self.pulling).needs(frame);
        match needed {
            Needed::Zero => {
                self.holes.fill(frame, &ZERO)?;
            }
            Needed::Ask => {
                lock(&self.now).faults += 1;
                self.say(&Ask::Want(frame));
            }
            Needed::Wait => {}
        }
        Ok(())
    }

    /// Says something to the source. Not heard is as good as lost: it is said again over the
    /// next link.
    fn say(&self, what: &Ask) {
        match (&mut *lock(&self.asked), what) {
            (Asked::Source(says), what) => {
                if let Err(error) = what.write(says) {
                    tracing::debug!(%error, "the source is not told");
                }
            }
            // It has ended, or says itself why it reads no more.
            (Asked::File(wants), Ask::Want(page)) => drop(wants.send(*page)),
            (Asked::File(_) | Asked::Nobody, _) => {}
        }
    }

    /// Says a word.
    pub(super) fn word(&self, word: Message) {
        self.say(&Ask::Word(word));
    }

    // ---- what comes ----

    /// The source has given the VM: takes in what follows, over as many links as it takes.
    pub(super) fn follow(
        self: &Arc<Self>,
        instance: Arc<Instance>,
        incoming: Arc<Incoming>,
        given: Arc<Given>,
        link: Option<Link>,
    ) -> io::Result<()> {
        let this = Arc::clone(self);
        let pulls = move || {
            let mut link = link;
            loop {
                if let Some(link) = link.take() {
                    let heard = this.hear(link, &given);
                    *lock(&this.asked) = Asked::Nobody;
                    match heard {
                        Ok(()) => return,
                        // What it would read is wrong, and no other link makes it right.
                        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                            tracing::error!(%error, "the VM's memory is spoilt");
                            this.loses(&instance);
                            return;
                        }
                        Err(error) => tracing::warn!(
                            %error,
                            missing = this.pull().left,
                            "the link is lost; the VM waits for its source where it needs the \
                             memory that is missing"
                        ),
                    }
                }
                lock(&this.now).linked = false;
                match given.again(&incoming, &instance.killed) {
                    Ok(new) => link = new,
                    Err(instance::Error::NotGiven(NotGiven::Bereft)) => {
                        this.loses(&instance);
                        return;
                    }
                    Err(instance::Error::NotGiven(NotGiven::Killed)) => return,
                    Err(error) => {
                        tracing::error!(%error, "nothing more comes of the VM's memory");
                        return;
                    }
                }
            }
        };
        crate::thread::named("pull").spawn(pulls).map(drop)
    }

    /// What is missing does not come any more.
    fn loses(&self, instance: &Instance) {
        let missing = {
            let mut now = lock(&self.now);
            now.lost = true;
            now.left
        };
        tracing::error!(
            "{missing} pages of the VM's memory are lost: it does nothing more, and can only be killed"
        );
        instance.loses_memory();
    }

    /// Hears all that comes over a link, until the source knows that nothing is missing.
    fn hear(&self, link: Link, given: &Given) -> io::Result<()> {
        let (mut hears, says) = link.split()?;
        self.connect(says)?;
        // It may have been started meanwhile.
        if let Some(word) = given.greets() {
            self.word(word);
        }
        let mut told = Instant::now();
        loop {
            match Piece::read(&mut hears)? {
                Piece::Word(Message::Known) if !self.is_apart() => return Ok(()),
                Piece::Word(_) => return Err(io::ErrorKind::InvalidData.into()),
                Piece::Zero { first, count } => self.place(first, count.into(), None)?,
                Piece::Pages(packed) => {
                    let run = Run::unpack(&packed).ok_or(io::ErrorKind::InvalidData)?;
                    let count = run.bytes.len() / PAGE;
                    self.place(run.first, count as u64, Some(&run.bytes))?;
                }
            }
            self.settle(given);
            if told.elapsed() >= TELL && self.is_apart() {
                told = Instant::now();
                self.say(&Ask::Left(self.pull().left));
            }
        }
    }

    /// There is a link: says what is missing, and what is wanted of it.
    fn connect(&self, mut to: Says) -> io::Result<()> {
        // Held meanwhile: what is wanted from now on is said behind this.
        let mut asked = lock(&self.asked);
        let (missing, wanted) = {
            let pulling = lock(&self.pulling);
            (pulling.missing().clone(), pulling.asks_again())
        };
        if missing.count() > 0 {
            Ask::Missing(missing).write(&mut to)?;
        }
        for page in wanted {
            Ask::Want(page).write(&mut to)?;
        }
        *asked = Asked::Source(to);
        drop(asked);
        lock(&self.now).linked = true;
        Ok(())
    }

    /// A run has come; those that are zero have no bytes.
    fn place(&self, first: u64, count: u64, bytes: Option<&[u8]>) -> io::Result<()> {
        let mut pulling = lock(&self.pulling);
        if self.released.load(Ordering::SeqCst) {
            // It was on its way.
            return Ok(());
        }
        let wanted = pulling.comes(first, count)?;
        let mut pages = bytes.map(|bytes| bytes.as_chunks::<PAGE>().0.iter());
        for (frame, wanted) in (first..).zip(wanted) {
            // Of one that was given up nothing comes, but who waits for it has to go on.
            let page = pages.as_mut().and_then(Iterator::next);
            let page = page.filter(|_| wanted);
            // What is zero and nobody waits for costs no memory.
            if (page.is_some() || pulling.is_asked(frame))
                && !self.holes.fill(frame, page.unwrap_or(&ZERO))?
                && wanted
            {
                return Err(io::Error::new(
                    io::ErrorKind::AlreadyExists,
                    format!("frame {frame:#x} has another content already"),
                ));
            }
            // One by one: a run that broke off comes again over the next link.
            pulling.placed(frame, 1);
            let mut now = lock(&self.now);
            now.left = now.left.saturating_sub(1);
            now.pages += 1;
        }
        Ok(())
    }

    // ---- what is read from a file ----

    /// Has what is missing read from the file that the VM was saved in: what is needed first.
    pub(crate) fn load(
        self: &Arc<Self>,
        instance: Arc<Instance>,
        stored: Stored,
    ) -> io::Result<()> {
        let (wants, wanted) = channel();
        {
            // Held meanwhile: who comes to wait now asks behind these.
            let mut asked = lock(&self.asked);
            for page in lock(&self.pulling).asks_again() {
                // There is whoever receives it.
                let _ = wants.send(page);
            }
            *asked = Asked::File(wants);
        }
        lock(&self.now).linked = true;
        let this = Arc::clone(self);
        let loads = move || {
            if let Err(error) = this.load_all(&stored, &wanted)
                && !this.ended.load(Ordering::SeqCst)
            {
                tracing::error!("the file that the VM was saved in {error}");
                lock(&this.now).linked = false;
                this.loses(&instance);
            }
        };
        crate::thread::named("load").spawn(loads).map(drop)
    }

    fn load_all(&self, stored: &Stored, wanted: &Receiver<u64>) -> Result<(), Error> {
        // Where to go on with what nobody waits for.
        let mut at = 0;
        while self.is_apart() {
            let is_missing = |page: &u64| lock(&self.pulling).missing().has(*page);
            let page = if let Some(page) = wanted.try_recv().ok().filter(is_missing) {
                page
            } else if let Some(page) = lock(&self.pulling).missing().next(at) {
                at = page;
                page
            } else if at > 0 {
                at = 0;
                continue;
            } else {
                // It was released a moment ago.
                break;
            };
            let run = stored.run_with(page)?;
            // Others of its chunk have come with another one that needed them, or with the VM.
            for (page, content) in run.pages().filter(|(page, _)| is_missing(page)) {
                let content = (*content != ZERO).then_some(&content[..]);
                self.place(page, 1, content).map_err(Error::Read)?;
            }
        }
        self.finish();
        Ok(())
    }

    // ---- the end ----

    /// Tells the source when nothing is missing any more, of a VM that runs.
    pub(super) fn settle(&self, given: &Given) {
        if self.is_apart() {
            return;
        }
        if let Some(word) = given.pulled() {
            self.finish();
            self.word(word);
        }
    }

    /// Nothing is missing any more.
    fn finish(&self) {
        if self.ended.load(Ordering::SeqCst) {
            return;
        }
        let took = self.begun.elapsed();
        lock(&self.now).took = Some(took);
        let pull = self.pull();
        tracing::info!(?pull, "all of the VM's memory is here");
        self.end();
    }

    /// Nobody waits for a frame any more.
    pub(crate) fn end(&self) {
        self.ended.store(true, Ordering::SeqCst);
        if let Err(error) = self.holes.end() {
            tracing::warn!(%error, "the userfaultfd is not ended");
        }
        *lock(&self.memory) = None;
        // Cannot be full: it is written once.
        let _ = self.done.write(1);
    }

    /// The VM has ended, and nobody touches its memory: what is missing is not needed.
    pub(super) fn release(&self, given: Option<&Given>) {
        {
            let mut pulling = lock(&self.pulling);
            self.released.store(true, Ordering::SeqCst);
            *pulling = Pulling::new(Pages::none(0));
        }
        lock(&self.now).left = 0;
        // Who reads a file sees it by itself.
        if let Some(given) = given {
            self.settle(given);
        }
    }
}
