//! What a driver touches of the machine.

use core::ptr::NonNull;

/// A function of a PCI device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Function {
    /// The segment group, 0 on most machines.
    pub segment: u16,
    /// The bus.
    pub bus: u8,
    /// The device, below 32.
    pub device: u8,
    /// The function, below 8.
    pub function: u8,
}

/// What a driver touches of the machine, beside its [`Dma`] memory.
pub trait Machine {
    /// Reads 4 bytes of a function's configuration space at `offset`, a multiple of 4. All ones if
    /// there is no such function.
    fn config_read(&mut self, function: Function, offset: u16) -> u32;
    /// Writes them.
    fn config_write(&mut self, function: Function, offset: u16, value: u32);
    /// Reads `width` (1, 2 or 4) bytes of a device's registers at a physical address within one of
    /// its BARs, in one access, not cached.
    fn mmio_read(&mut self, address: u64, width: u8) -> u32;
    /// Writes them.
    fn mmio_write(&mut self, address: u64, width: u8, value: u32);
    /// Lets this many microseconds pass (used in resets only).
    fn wait(&mut self, micros: u32);
}

/// Memory that a device reads and writes: physically contiguous, and as one sees it, so does the other.
#[derive(Debug)]
pub struct Dma {
    base: NonNull<u8>,
    address: u64,
    len: usize,
}

// SAFETY: the memory belongs to this value alone (the contract of `new`), whichever CPU has it.
unsafe impl Send for Dma {}

impl Dma {
    /// Memory of `len` bytes at `base`, which the device sees at `address`.
    ///
    /// # Safety
    ///
    /// From `base` on, `len` bytes can be read and written for as long as this value lives or a device uses
    /// them; nothing but this value and the device does so. They are cached as write-back (x86's DMA is coherent), `base` is
    /// aligned to 4096, and so is `address`.
    pub unsafe fn new(base: NonNull<u8>, address: u64, len: usize) -> Self {
        Self { base, address, len }
    }

    /// How many bytes there are.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The pointer of `new`.
    pub fn base(&self) -> NonNull<u8> {
        self.base
    }

    /// What the device calls the byte at `offset`.
    pub(crate) fn address(&self, offset: usize) -> u64 {
        self.address + offset as u64
    }

    /// All zeros.
    pub(crate) fn clear(&mut self) {
        // SAFETY: all of it is this value's, and no device was told of it yet.
        unsafe { self.base.as_ptr().write_bytes(0, self.len) }
    }

    /// The place of a `T` at `offset`. The offsets are the drivers' own constants and indices below
    /// a ring's size, never a device's word.
    fn place<T>(&self, offset: usize) -> *mut T {
        assert!(offset.is_multiple_of(align_of::<T>()) && offset + size_of::<T>() <= self.len);
        // SAFETY: within the region, as was just seen.
        unsafe { self.base.as_ptr().add(offset).cast() }
    }

    pub(crate) fn read<T: Plain>(&self, offset: usize) -> T {
        // SAFETY: within the region and aligned; any bytes are a `T`. The device may write at the same
        // time, therefore volatile.
        unsafe { self.place::<T>(offset).read_volatile() }
    }

    pub(crate) fn write<T: Plain>(&mut self, offset: usize, value: T) {
        // SAFETY: within the region and aligned.
        unsafe { self.place::<T>(offset).write_volatile(value) }
    }

    /// `len` bytes from `offset` on.
    ///
    /// # Safety
    ///
    /// The device does not write them, and nobody else has them mutably, while the slice lives.
    pub(crate) unsafe fn bytes<'a>(&self, offset: usize, len: usize) -> &'a [u8] {
        assert!(offset + len <= self.len);
        // SAFETY: within the region; nobody writes it, as the caller says.
        unsafe { core::slice::from_raw_parts(self.base.as_ptr().add(offset), len) }
    }

    /// The same to write to.
    ///
    /// # Safety
    ///
    /// Neither the device nor anybody else uses them while the slice lives.
    pub(crate) unsafe fn bytes_mut<'a>(&mut self, offset: usize, len: usize) -> &'a mut [u8] {
        assert!(offset + len <= self.len);
        // SAFETY: within the region; nobody else has it, as the caller says.
        unsafe { core::slice::from_raw_parts_mut(self.base.as_ptr().add(offset), len) }
    }
}

/// Integers, of which any bytes are one.
pub(crate) trait Plain: Copy {}
impl Plain for u8 {}
impl Plain for u16 {}
impl Plain for u32 {}
impl Plain for u64 {}
