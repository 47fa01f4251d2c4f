//! Models of the cards: the registers and rings that their manuals describe, with frames at the other end.

pub mod e1000e;
pub mod virtio;

use std::alloc::{Layout, alloc_zeroed};
use std::cell::RefCell;
use std::ptr::NonNull;
use std::rc::Rc;

use bmcast_net::{DMA_BYTES, Dma, Function, Machine};

pub const PLACE: Function = Function {
    segment: 0,
    bus: 3,
    device: 5,
    function: 1,
};

/// One card, as a machine sees it.
pub trait Model {
    fn config(&mut self) -> &mut Config;
    /// Where its registers are.
    fn bar(&self) -> u64;
    fn read(&mut self, offset: u64, width: u8) -> u32;
    fn write(&mut self, offset: u64, width: u8, value: u32);
    /// Puts a frame into memory, if the driver has given a place.
    fn deliver(&mut self, frame: &[u8]) -> bool;
    /// Frames that the driver has sent since, which it gets to know.
    fn sent(&mut self) -> Vec<Vec<u8>>;
    /// Whether it does nothing in memory.
    fn quiet(&self) -> bool;
    fn link(&mut self, up: bool);
}

pub struct Config(pub [u32; 64]);

impl Config {
    pub fn command(&self) -> u32 {
        self.0[1] & 0xffff
    }
}

/// A machine with nothing but a card.
pub struct Only<T>(pub Rc<RefCell<T>>);

impl<T: Model> Machine for Only<T> {
    fn config_read(&mut self, function: Function, offset: u16) -> u32 {
        assert_eq!(offset % 4, 0);
        if function != PLACE {
            return u32::MAX;
        }
        self.0.borrow_mut().config().0[usize::from(offset / 4)]
    }

    fn config_write(&mut self, function: Function, offset: u16, value: u32) {
        assert_eq!(
            (function, offset),
            (PLACE, 4),
            "only the command is written"
        );
        let mut model = self.0.borrow_mut();
        let status = model.config().0[1] & !(value & 0xffff_0000) & 0xffff_0000;
        model.config().0[1] = status | value & 0xffff;
    }

    fn mmio_read(&mut self, address: u64, width: u8) -> u32 {
        assert_ne!(
            self.0.borrow_mut().config().command() & 2,
            0,
            "memory is on"
        );
        let mut model = self.0.borrow_mut();
        let offset = address - model.bar();
        model.read(offset, width)
    }

    fn mmio_write(&mut self, address: u64, width: u8, value: u32) {
        assert_ne!(
            self.0.borrow_mut().config().command() & 2,
            0,
            "memory is on"
        );
        let mut model = self.0.borrow_mut();
        let offset = address - model.bar();
        model.write(offset, width, value);
    }

    fn wait(&mut self, _: u32) {}
}

/// The memory that the card may use; it stays for ever.
#[derive(Clone, Copy)]
pub struct Memory {
    base: u64,
}

impl Memory {
    /// Some, and the same as a driver wants it.
    pub fn new() -> (Self, Dma) {
        let layout = Layout::from_size_align(DMA_BYTES, 4096).unwrap();
        // SAFETY: its size is not 0.
        let base = NonNull::new(unsafe { alloc_zeroed(layout) }).unwrap();
        let address = base.as_ptr() as u64;
        // SAFETY: it is never freed, and only the driver and the model have it.
        let dma = unsafe { Dma::new(base, address, DMA_BYTES) };
        (Self { base: address }, dma)
    }

    fn place<T>(&self, address: u64) -> *mut T {
        let end = address + size_of::<T>() as u64;
        assert!(address >= self.base && end <= self.base + DMA_BYTES as u64);
        assert_eq!(address % align_of::<T>() as u64, 0);
        address as *mut T
    }

    pub fn get<T: Copy>(&self, address: u64) -> T {
        // SAFETY: within the memory and aligned, as was just seen; only integers are asked for.
        unsafe { self.place::<T>(address).read_volatile() }
    }

    pub fn set<T: Copy>(&self, address: u64, value: T) {
        // SAFETY: as above.
        unsafe { self.place::<T>(address).write_volatile(value) }
    }

    pub fn copy(&self, address: u64, bytes: &[u8]) {
        for (at, byte) in (address..).zip(bytes) {
            self.set(at, *byte);
        }
    }

    pub fn bytes(&self, address: u64, len: u64) -> Vec<u8> {
        (address..address + len).map(|at| self.get(at)).collect()
    }
}
