//! A part of a VM's memory follows it: both sides, over real links, with pages that are really
//! missing.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::time::Instant;

use blanket_abi::PAGE_SIZE;
use blanket_migration::handover::{Memory, Source};
use blanket_migration::link::{Hears, Says};
use blanket_migration::message::{Hello, Message, Purpose};
use blanket_migration::pages::Pages;
use blanket_migration::pull::{Ask, Piece};
use blanket_snapshot::{Found, PAGE, Reader, Run, Writer};
use vm_memory::{Bytes as _, GuestAddress};

use super::arrival::Arrival;
use super::destination::{Given, Incoming};
use super::kept::Kept;
use super::outgoing::{Options, Outgoing, Stage};
use super::{Link, Phase, SendError, UserFaults, mourn};
use crate::builder::Domain;
use crate::console::Console;
use crate::instance::{Instance, Spec};
use crate::saved::Stored;
use crate::saved::testing::{domain, unnamed};
use crate::sync::lock;
use crate::testing::{Fake, Guest};

/// Pages that are missing: more than are sent at once, zero ones and others, in many runs.
fn missing(frames: u64) -> Pages {
    let mut missing = Pages::none(frames);
    (3..1000)
        .filter(|page| page % 7 != 0)
        .for_each(|page| missing.add(page));
    missing
}

fn content(page: u64) -> [u8; PAGE] {
    match page % 5 {
        0 => [0; PAGE],
        _ => {
            // Bytes that do not get shorter.
            let mut word = page | 1 << 40;
            std::array::from_fn(|_| {
                word ^= word << 13;
                word ^= word >> 7;
                word ^= word << 17;
                word.to_le_bytes()[3]
            })
        }
    }
}

fn read(domain: &Domain, page: u64) -> [u8; PAGE] {
    let mut bytes = [0; PAGE];
    let at = GuestAddress(page * PAGE_SIZE);
    domain.memory.read_slice(&mut bytes, at).expect("inside");
    bytes
}

/// Both sides of a VM that was given, and not started yet.
struct Both {
    out: Outgoing,
    source: Domain,
    destination: Domain,
    incoming: Arc<Incoming>,
    given: Arc<Given>,
    instance: Arc<Instance>,
    arrival: Arc<Arrival>,
}

impl Both {
    fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let incoming = Incoming::new(listener, Err("it is ours".into())).expect("random bytes");
        let out = Outgoing::new(Options::default(), incoming.token()).expect("random bytes");
        let given = Given::starting(out.hello.id, Memory::Apart);
        let spec = Spec {
            memory: 64 << 20,
            ..Spec::default()
        };
        let fake = Fake::new(|_, _| Box::new(|_: &Guest| unreachable!("no vCPU runs")));
        let console = Console::new().expect("a console");
        let instance = Instance::new(spec, fake, console).expect("an instance");
        let (source, destination) = (domain(), domain());
        let frames = destination.boot.state_base;
        for page in missing(frames).runs(1).map(|(page, _)| page) {
            let at = GuestAddress(page * PAGE_SIZE);
            let written = source.memory.write_slice(&content(page), at);
            written.expect("inside");
        }
        let faults = UserFaults::open().or_else(|_| UserFaults::of_programs());
        let faults = faults.expect("a userfaultfd");
        let arrival =
            Arrival::begin(faults, &destination.memory, missing(frames), &instance).expect("begun");
        Self {
            out,
            source,
            destination,
            incoming: Arc::new(incoming),
            given: Arc::new(given),
            instance,
            arrival,
        }
    }

    fn frames(&self) -> u64 {
        self.destination.boot.state_base
    }

    fn link_to(&self, at: SocketAddr) -> Link {
        let socket = TcpStream::connect(at).expect("connected");
        Link::to(socket, self.incoming.token()).expect("the right one")
    }

    /// A link, by way of `at`: the source's end and the destination's.
    fn links(&self, at: SocketAddr) -> (Link, Link) {
        std::thread::scope(|s| {
            let there = s.spawn(|| self.incoming.answer());
            (self.link_to(at), there.join().expect("no panic"))
        })
    }

    fn follow(&self, link: Link) {
        let (incoming, given) = (Arc::clone(&self.incoming), Arc::clone(&self.given));
        self.arrival
            .follow(Arc::clone(&self.instance), incoming, given, Some(link))
            .expect("a thread");
    }

    fn runs(&self) {
        self.arrival.word(self.given.started());
        self.arrival.settle(&self.given);
    }

    /// The source's life from GO on.
    fn serve(&self, link: Link) -> Result<Instant, SendError> {
        let kept = Kept::new(&self.source, &self.out, missing(self.frames()));
        let done = kept.follow(Source::Committed(Memory::Apart), Some(link));
        self.out.note(|progress| progress.stage = Stage::Over);
        done
    }

    fn check(&self) {
        let missing = missing(self.frames());
        for page in 0..self.frames() {
            let wanted = if missing.has(page) {
                content(page)
            } else {
                [0; PAGE]
            };
            assert!(read(&self.destination, page) == wanted, "page {page}");
        }
        let pull = self.arrival.pull();
        assert_eq!((pull.left, pull.pages), (0, missing.count()));
        assert!(pull.took.is_some() && pull.faults > 0, "{pull:?}");
    }

    fn ends(&self) {
        // The thread that waits for another link ends.
        self.instance.kill();
    }
}

/// Passes bytes on until so many have come from the source, then hangs up.
fn cut_after(to: SocketAddr, most: usize) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let at = listener.local_addr().expect("an address");
    std::thread::spawn(move || {
        let (mut source, _) = listener.accept().expect("a connection");
        let mut destination = TcpStream::connect(to).expect("connected");
        let ends = (source.try_clone(), destination.try_clone());
        let (Ok(mut back), Ok(mut from)) = ends else {
            return;
        };
        std::thread::spawn(move || std::io::copy(&mut from, &mut back));
        let mut bytes = [0; 1000];
        let mut passed = 0;
        while passed < most {
            let Ok(count @ 1..) = source.read(&mut bytes) else {
                break;
            };
            if destination.write_all(&bytes[..count]).is_err() {
                break;
            }
            passed += count;
        }
        for end in [source, destination] {
            let _ = end.shutdown(Shutdown::Both);
        }
    });
    at
}

#[test]
fn what_is_waited_for_comes_and_the_rest_too() {
    let both = Both::new();
    let (here, there) = both.links(both.incoming.address().expect("an address"));
    std::thread::scope(|s| {
        let source = s.spawn(|| both.serve(here));
        // Before the VM runs, and before there is a link.
        let late = s.spawn(|| read(&both.destination, 997));
        let never = s.spawn(|| read(&both.destination, 7));
        assert!(never.join().expect("no panic") == [0; PAGE]);
        both.follow(there);
        assert!(late.join().expect("no panic") == content(997));
        both.runs();
        source.join().expect("no panic").expect("it has followed");
    });
    both.check();
    assert_eq!(both.out.progress().pages, both.arrival.pull().pages);
    both.ends();
}

#[test]
fn it_goes_on_over_another_link() {
    let both = Both::new();
    let at = cut_after(both.incoming.address().expect("an address"), 200_000);
    let (here, there) = both.links(at);
    std::thread::scope(|s| {
        let source = s.spawn(|| both.serve(here));
        both.follow(there);
        both.runs();
        both.out.wait();
        assert_eq!(both.out.progress().stage, Stage::Cut);
        assert!(!both.out.claim(), "it runs there");
        while !both.arrival.is_cut() {
            std::thread::yield_now();
        }
        let left = both.arrival.pull().left;
        assert!(left > 0 && left < missing(both.frames()).count());
        // Whoever waits meanwhile goes on afterwards.
        let late = s.spawn(|| read(&both.destination, 998));
        while both.arrival.pull().faults == 0 {
            std::thread::yield_now();
        }
        both.out
            .ask(both.link_to(both.incoming.address().expect("an address")));
        assert!(late.join().expect("no panic") == content(998));
        source.join().expect("no panic").expect("it has followed");
    });
    both.check();
    both.ends();
}

#[test]
fn a_source_that_sends_something_else_is_hung_up_on() {
    let some = |first, count: usize| {
        let bytes = vec![1; count * PAGE];
        Piece::Pages(Run::pack(first, &bytes).expect("pages"))
    };
    for piece in [
        some(7, 1),
        some(998, 40),
        some(u64::MAX - 8, 4),
        Piece::Pages(vec![1; 30]),
        Piece::Zero {
            first: 998,
            count: 9,
        },
        Piece::Word(Message::Known),
        Piece::Word(Message::Go),
    ] {
        let both = Both::new();
        let (here, there) = both.links(both.incoming.address().expect("an address"));
        both.follow(there);
        let (mut hears, mut says): (Hears, Says) = here.split().expect("split");
        let ask = Ask::read(&mut hears, both.frames()).expect("what is missing");
        assert_eq!(ask, Ask::Missing(missing(both.frames())));
        piece.write(&mut says).expect("said");
        assert!(Ask::read(&mut hears, both.frames()).is_err(), "{piece:?}");
        assert_eq!(both.arrival.pull().pages, 0);
        both.ends();
    }
}

#[test]
fn a_destination_that_asks_for_something_else_is_hung_up_on() {
    let more = |frames| {
        let mut more = missing(frames);
        more.add(7);
        more
    };
    let frames = domain().boot.state_base;
    for asks in [
        vec![Ask::Missing(more(frames))],
        vec![Ask::Missing(missing(frames)), Ask::Missing(missing(frames))],
        vec![Ask::Missing(Pages::none(frames + 64))],
        vec![Ask::Want(frames)],
        vec![Ask::Left(u64::MAX)],
        vec![Ask::Word(Message::Go)],
    ] {
        let both = Both::new();
        let (here, there) = both.links(both.incoming.address().expect("an address"));
        std::thread::scope(|s| {
            let source = s.spawn(|| both.serve(here));
            let (mut hears, mut says): (Hears, Says) = there.split().expect("split");
            for ask in &asks {
                ask.write(&mut says).expect("said");
            }
            // Whatever came before, it ends.
            while Piece::read(&mut hears).is_ok() {}
            both.out.wait();
            assert_eq!(both.out.progress().stage, Stage::Doubt, "{asks:?}");
            assert!(both.out.claim());
            let outcome = source.join().expect("no panic");
            assert!(matches!(outcome, Err(SendError::Refused)), "{outcome:?}");
        });
        both.ends();
    }
}

#[test]
fn what_the_guest_gives_up_does_not_come_back() {
    let both = Both::new();
    both.arrival.gives_up(&[4, 7, 8]);
    let (here, there) = both.links(both.incoming.address().expect("an address"));
    std::thread::scope(|s| {
        let source = s.spawn(|| both.serve(here));
        both.follow(there);
        both.runs();
        source.join().expect("no panic").expect("it has followed");
    });
    for page in [4, 8] {
        assert!(content(page) != [0; PAGE]);
        assert!(read(&both.destination, page) == [0; PAGE], "page {page}");
    }
    both.ends();
}

#[test]
fn one_that_has_ended_needs_nothing_more() {
    let both = Both::new();
    let (here, there) = both.links(both.incoming.address().expect("an address"));
    both.follow(there);
    both.runs();
    let (mut hears, mut says) = here.split().expect("split");
    let first = Ask::read(&mut hears, both.frames()).expect("what is missing");
    assert!(matches!(first, Ask::Missing(_) | Ask::Word(Message::Runs)));
    both.arrival.release(Some(&both.given));
    loop {
        match Ask::read(&mut hears, both.frames()).expect("a word") {
            Ask::Word(Message::Here) => break,
            Ask::Missing(_) | Ask::Word(Message::Runs) => {}
            other => panic!("it asks for {other:?}"),
        }
    }
    Piece::Word(Message::Known).write(&mut says).expect("said");
    // It waits for nobody any more.
    while Ask::read(&mut hears, both.frames()).is_ok() {}
    both.ends();
}

#[test]
fn its_memory_is_lost_with_its_source() {
    let both = Both::new();
    let (here, there) = both.links(both.incoming.address().expect("an address"));
    both.follow(there);
    both.runs();
    drop(here);
    while !both.arrival.is_cut() {
        std::thread::yield_now();
    }
    assert!(!both.arrival.pull().lost, "its source may come back");
    let mut link = both.link_to(both.incoming.address().expect("an address"));
    let said = mourn(&mut link, both.incoming.token());
    assert_eq!(said.expect("said"), Message::Lost);
    while !both.arrival.pull().lost {
        std::thread::yield_now();
    }
    assert!(both.arrival.is_cut());
    both.ends();
}

#[test]
fn the_source_asks_as_it_began() {
    let both = Both::new();
    let again = both.out.again();
    assert_eq!(
        again,
        Hello {
            purpose: Purpose::Asks,
            ..both.out.hello
        }
    );
    both.ends();
}

/// A file with what is missing, some of it more than once.
fn stored(both: &Both, frames: u64) -> (File, Stored) {
    let mut writer = Writer::new(Vec::new()).expect("memory");
    for (first, count) in missing(frames).runs(3) {
        let old = vec![0x77; usize::try_from(count).expect("few") * PAGE];
        writer.pages(first, &old).expect("memory");
    }
    for (first, count) in missing(frames).runs(5) {
        let mut bytes = vec![0; usize::try_from(count).expect("few") * PAGE];
        let at = GuestAddress(first * PAGE_SIZE);
        both.source
            .memory
            .read_slice(&mut bytes, at)
            .expect("inside");
        writer.pages(first, &bytes).expect("memory");
    }
    let (bytes, _) = writer.finish().expect("memory");
    let file = unnamed(&bytes);
    let mut stored = Stored::new(file.try_clone().expect("a descriptor"));
    let mut reader = Reader::new(&bytes[..]).expect("ours");
    while let Some(Found::Pages(place)) = reader.found().expect("ours") {
        stored.add(place, frames).expect("its frames");
    }
    (file, stored)
}

#[test]
fn memory_comes_from_a_file_when_it_is_needed() {
    let both = Both::new();
    let (_file, stored) = stored(&both, both.frames());
    let instance = Arc::clone(&both.instance);
    std::thread::scope(|s| {
        // Whoever touches it before anything is read waits.
        let touches = s.spawn(|| read(&both.destination, 998));
        while both.arrival.pull().faults == 0 {
            std::thread::yield_now();
        }
        both.arrival.load(instance, stored).expect("a thread");
        assert!(touches.join().expect("no panic") == content(998));
    });
    for page in 3..1000 {
        let wanted = if page % 7 == 0 {
            [0; PAGE]
        } else {
            content(page)
        };
        assert!(read(&both.destination, page) == wanted, "page {page}");
    }
    while both.arrival.pull().took.is_none() {
        std::thread::yield_now();
    }
    let pull = both.arrival.pull();
    assert_eq!((pull.left, pull.pages), (0, missing(both.frames()).count()));
    assert!(!pull.lost && pull.faults > 0);
}

#[test]
fn memory_is_lost_with_the_file_that_it_stays_in() {
    let both = Both::new();
    let (file, stored) = stored(&both, both.frames());
    // Behind the head of a chunk somewhere in its middle.
    let middle = file.metadata().expect("there").len() / 2;
    file.write_all_at(&[0x55; 9000], middle).expect("written");
    *lock(&both.instance.arrival) = Some(Arc::clone(&both.arrival));
    both.arrival
        .load(Arc::clone(&both.instance), stored)
        .expect("a thread");
    while !both.arrival.pull().lost {
        std::thread::yield_now();
    }
    assert!(both.arrival.is_cut());
    assert_eq!(both.instance.phase(), Phase::Lost);
    both.ends();
}
