//! The drivers against models of their cards.

mod model;

use std::cell::RefCell;
use std::ptr::NonNull;
use std::rc::Rc;

use bmcast_net::{Card, CardError, DMA_BYTES, Dma, Function, probe};
use model::e1000e::E1000e;
use model::virtio::Virtio;
use model::{Memory, Model, Only, PLACE};
use smoltcp::phy::{Device, RxToken, TxToken};
use smoltcp::time::Instant;

type Started<T> = (Rc<RefCell<T>>, Card<Only<T>>);

fn start<T: Model>(make: fn(Memory) -> T) -> Started<T> {
    let (memory, dma) = Memory::new();
    let model = Rc::new(RefCell::new(make(memory)));
    let card = Card::new(Only(model.clone()), PLACE, dma).unwrap();
    (model, card)
}

fn frame(number: usize) -> Vec<u8> {
    let len = 14 + number * 37 % 1501;
    (0..len)
        .map(|at| (at * 7 + number).to_le_bytes()[0])
        .collect()
}

fn take<T: Model>(card: &mut Card<Only<T>>) -> Option<Vec<u8>> {
    let (received, _) = card.receive(Instant::ZERO)?;
    Some(received.consume(<[u8]>::to_vec))
}

fn send<T: Model>(card: &mut Card<Only<T>>, now: i64, frame: &[u8]) -> bool {
    let Some(token) = card.transmit(Instant::from_millis(now)) else {
        return false;
    };
    token.consume(frame.len(), |buffer| buffer.copy_from_slice(frame));
    true
}

fn frames_both_ways<T: Model>(make: fn(Memory) -> T) {
    let (model, mut card) = start(make);
    assert_eq!(model.borrow_mut().config().command() & 0x406, 0x406);
    let mut next = 0;
    for round in 0..600 {
        let burst = round % 40;
        for number in next..next + burst {
            assert!(model.borrow_mut().deliver(&frame(number)));
        }
        for number in next..next + burst {
            assert!(send(&mut card, 0, &frame(number + 1)));
            assert_eq!(take(&mut card), Some(frame(number)));
        }
        assert_eq!(take(&mut card), None);
        let sent = model.borrow_mut().sent();
        let expected: Vec<_> = (next..next + burst)
            .map(|number| frame(number + 1))
            .collect();
        assert!(sent == expected);
        next += burst;
    }
    // An answer to what has come goes by the token that came with it.
    assert!(model.borrow_mut().deliver(&frame(1)));
    let (received, token) = card.receive(Instant::ZERO).unwrap();
    received.consume(|bytes| token.consume(bytes.len(), |buffer| buffer.copy_from_slice(bytes)));
    assert_eq!(model.borrow_mut().sent(), [frame(1)]);
}

#[test]
fn frames_go_both_ways() {
    frames_both_ways(Virtio::new);
    frames_both_ways(E1000e::new);
}

/// What comes while nobody polls is there afterwards, up to the size of the ring; then it is lost, and what
/// comes later is not.
fn bursts<T: Model>(make: fn(Memory) -> T, most: usize) {
    let (model, mut card) = start(make);
    let mut next = 0;
    for _ in 0..5 {
        let mut count = 0;
        while model.borrow_mut().deliver(&frame(next + count)) {
            count += 1;
        }
        assert_eq!(count, most);
        for number in next..next + count {
            assert_eq!(take(&mut card), Some(frame(number)));
        }
        assert_eq!(take(&mut card), None);
        next += count;
    }
}

#[test]
fn a_burst_is_kept() {
    bursts(Virtio::new, 1024);
    bursts(E1000e::new, 1023);
    fn small(memory: Memory) -> Virtio {
        let mut virtio = Virtio::new(memory);
        virtio.queues[0].size = 256;
        virtio
    }
    bursts(small, 256);
}

/// A card that does not send takes as many frames as it has places, and no more come in, for they
/// could not be answered.
fn full<T: Model>(make: fn(Memory) -> T, most: usize) {
    let (model, mut card) = start(make);
    for _ in 0..3 {
        let mut count = 0;
        while send(&mut card, 0, &frame(count)) {
            count += 1;
        }
        assert_eq!(count, most);
        assert!(model.borrow_mut().deliver(&frame(9)));
        assert_eq!(take(&mut card), None);
        assert_eq!(model.borrow_mut().sent().len(), most);
        assert_eq!(take(&mut card), Some(frame(9)));
    }
}

#[test]
fn the_ring_is_full() {
    full(Virtio::new, 64);
    full(E1000e::new, 63);
}

fn link<T: Model>(make: fn(Memory) -> T) {
    let (memory, dma) = Memory::new();
    let model = Rc::new(RefCell::new(make(memory)));
    model.borrow_mut().link(false);
    let mut card = Card::new(Only(model.clone()), PLACE, dma).unwrap();
    assert!(!card.link());
    assert!(!send(&mut card, 0, &frame(1)));
    model.borrow_mut().link(true);
    assert!(send(&mut card, 100, &frame(1)));
    assert!(card.link());
}

#[test]
fn nothing_is_sent_without_a_link() {
    link(Virtio::new);
    link(E1000e::new);
}

fn stops<T: Model>(make: fn(Memory) -> T) {
    let (model, card) = start(make);
    assert_eq!(model.borrow_mut().config().command(), 0x406);
    let (_, dma, stopped) = card.stop();
    assert_eq!(stopped, Ok(()));
    assert!(model.borrow().quiet());
    assert_eq!(model.borrow_mut().config().command(), 0);
    assert!(!model.borrow_mut().deliver(&frame(1)));
    // And it can be started again.
    let mut card = Card::new(Only(model.clone()), PLACE, dma).unwrap();
    assert!(model.borrow_mut().deliver(&frame(1)));
    assert_eq!(take(&mut card), Some(frame(1)));
}

#[test]
fn it_stops() {
    stops(Virtio::new);
    stops(E1000e::new);
}

#[test]
fn a_virtio_device_that_lies() {
    let (model, mut card) = start(Virtio::new);
    for (id, len) in [
        (1024, 100),
        (u32::MAX, 100),
        (0, 11),
        (1, 12 + 1515),
        (2, u32::MAX),
    ] {
        model.borrow_mut().used(0, id, len);
        assert_eq!(take(&mut card), None, "{id} {len}");
    }
    // A transmit buffer that was never given, more of them than there are.
    for id in 0..200 {
        model.borrow_mut().used(1, id, 0);
    }
    let mut count = 0;
    while send(&mut card, 0, &frame(1)) {
        count += 1;
    }
    assert_eq!(count, 64);
}

#[test]
fn frames_with_errors() {
    let (model, mut card) = start(E1000e::new);
    // Not the end of a packet, a check sequence that is wrong, too long.
    for lie in [(1, 0, 100), (3, 1, 100), (3, 0, 1515), (3, 0, u16::MAX)] {
        model.borrow_mut().lie = Some(lie);
        assert!(model.borrow_mut().deliver(&frame(1)));
        assert_eq!(take(&mut card), None, "{lie:?}");
    }
    assert!(model.borrow_mut().deliver(&frame(2)));
    assert_eq!(take(&mut card), Some(frame(2)));
}

fn refused<T: Model>(make: fn(Memory) -> T, change: fn(&mut T)) -> CardError {
    let (memory, dma) = Memory::new();
    let model = Rc::new(RefCell::new(make(memory)));
    change(&mut model.borrow_mut());
    let error = Card::new(Only(model.clone()), PLACE, dma).err().unwrap();
    assert_eq!(model.borrow_mut().config().command() & 4, 0, "{error}");
    error
}

#[test]
fn what_cannot_be_used() {
    // The last capability of the list, the common one, is cut off; and so is the list.
    let error = refused(Virtio::new, |model| model.config.0[0xa4 / 4] = 0x0410_0009);
    assert_eq!(error, CardError::Capability(1));
    let error = refused(Virtio::new, |model| model.config.0[1] = 0);
    assert_eq!(error, CardError::Capability(1));
    // A list without end.
    let error = refused(Virtio::new, |model| model.config.0[0xa4 / 4] = 0x0410_9009);
    assert_eq!(error, CardError::Capability(1));
    let error = refused(Virtio::new, |model| model.config.0[8] = 1);
    assert_eq!(error, CardError::Bar(4));
    let error = refused(Virtio::new, |model| model.features &= !(1 << 32));
    assert_eq!(error, CardError::Features(1 << 32));
    let error = refused(Virtio::new, |model| model.queues[1].size = 0);
    assert_eq!(error, CardError::Queue(1));
    let error = refused(Virtio::new, |model| {
        (model.stuck, model.status) = (true, 7);
    });
    assert_eq!(error, CardError::Reset);
    let error = refused(E1000e::new, |model| model.stuck = true);
    assert_eq!(error, CardError::Reset);
    let error = refused(E1000e::new, |model| model.config.0[4] = 0);
    assert_eq!(error, CardError::Bar(0));
    let error = refused(E1000e::new, |model| model.config.0[0] = 0x100e_8086);
    let (vendor, device) = (0x8086, 0x100e);
    assert_eq!(error, CardError::Unknown { vendor, device });

    let (memory, dma) = Memory::new();
    let mut machine = Only(Rc::new(RefCell::new(E1000e::new(memory))));
    let nowhere = Function { bus: 0, ..PLACE };
    assert_eq!(probe(&mut machine, nowhere), None);
    // SAFETY: a part of the memory, which `dma` is not used for any more.
    let less = unsafe { Dma::new(NonNull::new(dma.base().as_ptr()).unwrap(), 0, DMA_BYTES - 1) };
    let error = Card::new(machine, PLACE, less).err();
    assert_eq!(error, Some(CardError::Memory(DMA_BYTES - 1)));
}
