//! The side that gets the VM.

use std::io::BufReader;
use std::net::TcpListener;
use std::os::fd::{AsRawFd as _, BorrowedFd};
use std::sync::{Arc, Mutex};

use blanket_migration::handover::{Destination, DestinationDoes};
use blanket_migration::link::{self, Link, Server, Token};
use blanket_migration::message::{Hello, Id, Message};

use rustix::event::{PollFd, PollFlags, poll};
use vmm_sys_util::eventfd::EventFd;

use super::disks::Images;
use super::{NotGiven, ReceiveError};
use crate::instance::{Error, Instance};
use crate::sync::lock;
use crate::vm::Vm;

/// Where a VM may come from.
#[derive(Debug)]
pub struct Incoming {
    listener: TcpListener,
    server: Server,
}

/// What is known of the VM that came.
struct Given {
    id: Id,
    state: Mutex<Destination>,
}

impl Incoming {
    /// Listens with a key and a token of its own.
    ///
    /// # Errors
    /// There are no random bytes.
    pub fn new(listener: TcpListener) -> Result<Self, link::Error> {
        Ok(Self {
            listener,
            server: Server::new()?,
        })
    }

    /// What the source needs, beside the address.
    #[must_use]
    pub fn token(&self) -> &Token {
        self.server.token()
    }

    /// The next connection of somebody who has the token; none once `killed` is readable.
    fn connection(&self, killed: &EventFd) -> Result<(Link, Hello), Error> {
        // SAFETY: the descriptor is open as long as what it is borrowed from.
        let killed = unsafe { BorrowedFd::borrow_raw(killed.as_raw_fd()) };
        let failed = |error: std::io::Error| ReceiveError::Hello(error.into());
        loop {
            let mut wanted = [
                PollFd::new(&self.listener, PollFlags::IN),
                PollFd::from_borrowed_fd(killed, PollFlags::IN),
            ];
            poll(&mut wanted, None).map_err(|error| failed(error.into()))?;
            if !wanted[1].revents().is_empty() {
                return Err(NotGiven::Killed.into());
            }
            let (socket, peer) = self.listener.accept().map_err(failed)?;
            let mut link = match self.server.answer(socket) {
                Ok(link) => link,
                Err(error) => {
                    tracing::warn!(%peer, "a connection is refused: {error}");
                    continue;
                }
            };
            match Hello::read(&mut link) {
                Ok(hello) if self.token().is_secret(&hello.secret) => return Ok((link, hello)),
                Ok(_) => tracing::warn!(%peer, "a connection is refused: it has another token"),
                Err(error) => tracing::warn!(%peer, "a connection is refused: {error}"),
            }
        }
    }
}

impl Instance {
    /// Waits for a VM, and starts it when its source has given it.
    ///
    /// # Errors
    /// It did not come, cannot be had here, or was kept; nothing is left running.
    pub fn receive_from(self: &Arc<Self>, incoming: Incoming) -> Result<Vm, Error> {
        let incoming = Arc::new(incoming);
        let (mut link, hello) = first(&incoming, &self.killed)?;
        let given = Arc::new(Given {
            id: hello.id,
            state: Mutex::new(Destination::Receiving),
        });
        // Not held while it is received: devices are looked at then, too.
        let images = Images::of(&lock(&self.devices));
        let received = images
            .and_then(|mut images| self.receive(BufReader::new(&mut link), Some(&mut images)));
        let does = lock(&given.state).received(received.is_ok());
        if let DestinationDoes::Says(message) = does {
            // Not heard is as good as lost.
            let _ = message.write(&mut link);
        }
        let received = received?;
        tracing::debug!("all of the VM is here");
        let mut link = Some(link);
        let vm = self.go_on(received, true, || {
            given.wait(&incoming, &self.killed, &mut link)
        });
        if lock(&given.state).eq(&Destination::Starting) {
            let message = lock(&given.state).started(vm.is_ok());
            if let Some(link) = &mut link {
                let _ = message.write(link);
            }
        }
        let vm = vm?;
        tracing::debug!("the VM runs");
        for network in self.networks() {
            network.announce();
        }
        answer_later(Arc::clone(self), incoming, given, link);
        Ok(vm)
    }
}

fn first(incoming: &Incoming, killed: &EventFd) -> Result<(Link, Hello), Error> {
    loop {
        let (mut link, hello) = incoming.connection(killed)?;
        if !hello.again {
            return Ok((link, hello));
        }
        // Nothing was ever received here.
        let _ = Message::Gone.write(&mut link);
    }
}

impl Given {
    /// Waits until the source has given the VM, over as many links as it takes.
    fn wait(
        &self,
        incoming: &Incoming,
        killed: &EventFd,
        link: &mut Option<Link>,
    ) -> Result<(), Error> {
        loop {
            let does = match link.as_mut().map(Message::read) {
                Some(Ok(message)) => lock(&self.state).hears(message),
                Some(Err(error)) => {
                    tracing::warn!(%error, "the link is lost; the VM waits for its source");
                    lock(&self.state).loses()
                }
                None => DestinationDoes::Listens,
            };
            match does {
                DestinationDoes::Starts => {
                    tracing::debug!("the VM is given");
                    return Ok(());
                }
                DestinationDoes::Discards => return Err(NotGiven::Kept.into()),
                DestinationDoes::Says(message) => {
                    if let Some(link) = link {
                        let _ = message.write(link);
                    }
                }
                DestinationDoes::Listens | DestinationDoes::Waits => {
                    *link = Some(self.again(incoming, killed)?);
                }
            }
        }
    }

    /// The next link of the same source, greeted.
    fn again(&self, incoming: &Incoming, killed: &EventFd) -> Result<Link, Error> {
        loop {
            let (mut link, hello) = incoming.connection(killed)?;
            if hello.again && hello.id == self.id {
                if let Some(message) = lock(&self.state).greets() {
                    let _ = message.write(&mut link);
                }
                return Ok(link);
            }
            tracing::warn!("another VM is refused: one is here already");
            let _ = Message::Gone.write(&mut link);
        }
    }
}

/// Tells a source that asks again, having lost the answer, that the VM runs, until it has
/// said that it knows.
fn answer_later(
    instance: Arc<Instance>,
    incoming: Arc<Incoming>,
    given: Arc<Given>,
    mut link: Option<Link>,
) {
    let answers = move || {
        while !matches!(link.as_mut().map(Message::read), Some(Ok(Message::Known))) {
            match given.again(&incoming, &instance.killed) {
                Ok(new) => link = Some(new),
                Err(_) => return,
            }
        }
    };
    if let Err(error) = crate::thread::named("moved").spawn(answers) {
        tracing::warn!(%error, "a source that asks again gets no answer");
    }
}
