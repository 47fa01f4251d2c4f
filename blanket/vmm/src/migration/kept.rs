//! The part of a VM's memory that follows it: at the source, which keeps it until the
//! destination has all.

use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Instant;

use blanket_migration::handover::{Source, SourceDoes};
use blanket_migration::link::{Cutter, Link, Says};
use blanket_migration::message::Message;
use blanket_migration::pages::Pages;
use blanket_migration::pull::{Ask, Piece, Serving};

use super::SendError;
use super::outgoing::{Answer, Outgoing, Stage};
use crate::builder::Domain;
use crate::saved::memory;
use crate::sync::lock;

/// What is left of a VM that stands still.
pub(super) struct Kept<'a> {
    domain: &'a Domain,
    out: &'a Outgoing,
    now: Mutex<Now>,
    changed: Condvar,
}

struct Now {
    serving: Serving,
    /// Words to be said before anything else.
    words: Vec<Message>,
    /// The link is lost, or there is nothing more to say on it.
    over: bool,
}

/// How a link ended.
enum Over {
    /// The destination has all.
    Here,
    /// It does not have the VM, and never will.
    Gone,
    /// The link is lost.
    Lost(std::io::Error),
}

impl<'a> Kept<'a> {
    pub(super) fn new(domain: &'a Domain, out: &'a Outgoing, kept: Pages) -> Self {
        Self {
            domain,
            out,
            now: Mutex::new(Now {
                serving: Serving::new(kept),
                words: Vec::new(),
                over: false,
            }),
            changed: Condvar::new(),
        }
    }

    /// GO was said, if it was heard: the VM runs at the destination, or does not; and has what
    /// is kept here once this returns. When it began to run there.
    pub(super) fn follow(
        &self,
        mut source: Source,
        link: Option<Link>,
    ) -> Result<Instant, SendError> {
        let (mut link, out) = (link, self.out);
        let mut ran = None;
        loop {
            if let Some(link) = link.take() {
                match self.serve(link, &mut source, &mut ran) {
                    Over::Here => return Ok(ran.unwrap_or_else(Instant::now)),
                    Over::Gone => return Err(SendError::Refused),
                    Over::Lost(error) => {
                        tracing::warn!(%error, "the link to the destination is lost");
                    }
                }
            }
            let stage = match source {
                Source::Serving => Stage::Cut,
                _ => Stage::Doubt,
            };
            match out.doubt(stage) {
                Answer::Claimed => return Err(SendError::Refused),
                Answer::Link(mut new) => {
                    link = out.again().write(&mut new).is_ok().then_some(new);
                }
            }
        }
    }

    /// Serves a link until it ends.
    fn serve(&self, link: Link, source: &mut Source, ran: &mut Option<Instant>) -> Over {
        let out = self.out;
        let both = link.split().and_then(|(hears, says)| {
            let cutter = hears.cutter()?;
            Ok((hears, says, cutter))
        });
        let (mut hears, says, cutter) = match both {
            Ok(both) => both,
            Err(error) => return Over::Lost(error),
        };
        {
            let mut now = lock(&self.now);
            now.serving.loses();
            now.words.clear();
            now.over = false;
        }
        let frames = lock(&self.now).serving.frames();
        std::thread::scope(|s| {
            let sender = crate::thread::named("serve").spawn_scoped(s, || self.send(says, &cutter));
            if let Err(error) = sender {
                return Over::Lost(error);
            }
            let mut told = false;
            let over = loop {
                let ask = match Ask::read(&mut hears, frames) {
                    Ok(ask) => ask,
                    Err(error) => {
                        break match source.loses() {
                            SourceDoes::GoesOn => Over::Gone,
                            _ => Over::Lost(error),
                        };
                    }
                };
                let does = match ask {
                    Ask::Word(message) => {
                        let does = source.hears(message);
                        if *source == Source::Serving {
                            ran.get_or_insert_with(Instant::now);
                            out.note(|progress| progress.stage = Stage::Pulling);
                        }
                        does
                    }
                    Ask::Missing(pages) if !told => {
                        told = true;
                        match self.missing(pages) {
                            Ok(()) => SourceDoes::Waits,
                            Err(error) => break Over::Lost(error),
                        }
                    }
                    Ask::Missing(_) => break Over::Lost(std::io::ErrorKind::InvalidData.into()),
                    Ask::Want(page) => {
                        lock(&self.now).serving.wants(page);
                        self.changed.notify_all();
                        out.note(|progress| progress.wanted += 1);
                        SourceDoes::Waits
                    }
                    Ask::Left(pages) => {
                        out.note(|progress| progress.left = pages);
                        SourceDoes::Waits
                    }
                };
                match does {
                    SourceDoes::Waits => {}
                    SourceDoes::Says(message) => {
                        let mut now = lock(&self.now);
                        // Whoever says READY again and again, and does not read, is answered once.
                        if !now.words.contains(&message) {
                            now.words.push(message);
                        }
                        drop(now);
                        self.changed.notify_all();
                    }
                    SourceDoes::Ends => {
                        lock(&self.now).words.push(Message::Known);
                        out.note(|progress| progress.left = 0);
                        break Over::Here;
                    }
                    SourceDoes::GoesOn => break Over::Gone,
                    SourceDoes::Asks => {
                        break Over::Lost(std::io::ErrorKind::InvalidData.into());
                    }
                }
            };
            lock(&self.now).over = true;
            self.changed.notify_all();
            if matches!(over, Over::Lost(_)) {
                cutter.cut();
            }
            over
        })
    }

    fn missing(&self, pages: Pages) -> std::io::Result<()> {
        let left = pages.count();
        lock(&self.now).serving.misses(pages)?;
        self.changed.notify_all();
        self.out.note(|progress| progress.left = left);
        Ok(())
    }

    /// The life of the thread that says things over a link.
    fn send(&self, mut says: Says, cutter: &Cutter) {
        if let Err(error) = self.say_all(&mut says) {
            tracing::debug!(%error, "the destination is not told");
            // Whoever hears it finds out.
            cutter.cut();
        }
    }

    fn say_all(&self, says: &mut Says) -> std::io::Result<()> {
        loop {
            let (words, run) = {
                let mut now = lock(&self.now);
                loop {
                    let words = std::mem::take(&mut now.words);
                    let over = now.over;
                    let run = if over { None } else { now.serving.sends() };
                    if run.is_some() || over || !words.is_empty() {
                        break (words, run);
                    }
                    now = self
                        .changed
                        .wait(now)
                        .unwrap_or_else(PoisonError::into_inner);
                }
            };
            let done = words.is_empty() && run.is_none();
            for word in words {
                Piece::Word(word).write(&mut *says)?;
            }
            if let Some((first, count)) = run {
                let pieces = memory::piece(self.domain, first, count);
                for piece in pieces.map_err(std::io::Error::other)? {
                    piece.write(&mut *says)?;
                    if let Piece::Pages(packed) = &piece {
                        let bytes = packed.len() as u64;
                        self.out.note(|progress| progress.bytes += bytes);
                    }
                }
                self.out.note(|progress| progress.pages += count);
            }
            if done {
                return Ok(());
            }
        }
    }
}
