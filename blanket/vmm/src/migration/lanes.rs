//! A VM that comes over several links at once.

use std::io::{self, Read};
use std::os::fd::AsFd as _;

use blanket_migration::lanes::Gathered;
use blanket_migration::link::Link;
use blanket_migration::message::{Hello, Purpose};
use vmm_sys_util::eventfd::EventFd;

use super::ReceiveError;
use super::destination::{Incoming, Next, refuse};
use crate::instance::Error;

/// What a VM is read from; its source is answered over its link.
pub(super) struct Comes {
    pub(super) link: Link,
    pub(super) lanes: Option<Gathered>,
}

impl Read for Comes {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        match &mut self.lanes {
            Some(lanes) => lanes.read(into),
            None => self.link.read(into),
        }
    }
}

/// The lanes of a VM that comes, which its source has said that there will be.
pub(super) fn lanes_of(
    incoming: &Incoming,
    killed: &EventFd,
    link: &Link,
    hello: &Hello,
) -> Result<Option<Gathered>, Error> {
    let Purpose::Moves {
        lanes: wanted @ 1..,
    } = hello.purpose
    else {
        return Ok(None);
    };
    let failed = |error: io::Error| ReceiveError::Hello(error.into());
    let mut lanes: Vec<Option<Link>> = (0..wanted).map(|_| None).collect();
    while lanes.iter().any(Option::is_none) {
        // Nothing comes over the first link before: if it is readable, it is lost.
        let next = incoming.connection(killed, Some(link.as_fd()))?;
        let Next::Link(mut other, its) = next else {
            return Err(failed(io::ErrorKind::UnexpectedEof.into()).into());
        };
        let place = match its.purpose {
            Purpose::Joins { lane } if its.id == hello.id => lanes.get_mut(usize::from(lane)),
            _ => None,
        };
        match place {
            Some(place) if place.is_none() => *place = Some(other),
            _ => refuse(&mut other, &its),
        }
    }
    let all = Gathered::of(lanes.into_iter().flatten().collect());
    all.map(Some).map_err(|error| failed(error).into())
}
