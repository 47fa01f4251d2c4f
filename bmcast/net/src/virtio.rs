//! virtio-net by modern PCI (virtio 1.2, sections 4.1 and 5.1).

use alloc::alloc::{Layout, alloc_zeroed, dealloc};
use alloc::vec::Vec;
use core::ptr::NonNull;

use virtio_drivers::device::net::{TxBuffer, VirtIONet};
use virtio_drivers::transport::pci::PciTransport;
use virtio_drivers::transport::pci::bus::{ConfigurationAccess, DeviceFunction, PciRoot};
use virtio_drivers::{BufferDirection, Hal, PAGE_SIZE, PhysAddr};

use crate::Card;

/// Vendor and device of virtio-net, transitional and modern, as the first word of the configuration has them.
pub const VIRTIO_NET: [u32; 2] = [0x1000_1af4, 0x1041_1af4];

/// Buffers of each queue.
const QUEUE: usize = 256;
/// Bytes of each: a frame and the header before it.
const BUFFER: usize = 2048;

/// How the configuration of a function is read and written.
#[derive(Clone, Copy)]
pub struct Configuration {
    /// Bus, device and function.
    pub function: (u8, u8, u8),
    /// Reads four bytes at a register.
    pub read: fn((u8, u8, u8), u8) -> u32,
    /// Writes them.
    pub write: fn((u8, u8, u8), u8, u32),
}

/// The card cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the virtio-net card cannot be used: {0}")]
pub struct VirtioError(&'static str);

impl ConfigurationAccess for Configuration {
    fn read_word(&self, function: DeviceFunction, register: u8) -> u32 {
        (self.read)((function.bus, function.device, function.function), register)
    }

    fn write_word(&mut self, function: DeviceFunction, register: u8, data: u32) {
        (self.write)(
            (function.bus, function.device, function.function),
            register,
            data,
        );
    }

    unsafe fn unsafe_clone(&self) -> Self {
        *self
    }
}

/// Memory that is mapped to itself: what the heap gives is what the device sees.
struct Identity;

// SAFETY: pages are from the heap, zeroed, aligned, and given to nobody else; the VMM maps all physical memory to
// itself, so that addresses of devices and of buffers are the physical ones.
unsafe impl Hal for Identity {
    fn dma_alloc(pages: usize, _: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        let memory = Layout::from_size_align(pages * PAGE_SIZE, PAGE_SIZE)
            .ok()
            .filter(|layout| layout.size() > 0)
            // SAFETY: the layout is not empty.
            .and_then(|layout| NonNull::new(unsafe { alloc_zeroed(layout) }));
        match memory {
            Some(memory) => (number(memory), memory),
            // 0 says that there is none.
            None => (0, NonNull::dangling()),
        }
    }

    unsafe fn dma_dealloc(_: PhysAddr, memory: NonNull<u8>, pages: usize) -> i32 {
        if let Ok(layout) = Layout::from_size_align(pages * PAGE_SIZE, PAGE_SIZE) {
            // SAFETY: it is from `dma_alloc`, with this layout.
            unsafe { dealloc(memory.as_ptr(), layout) };
        }
        0
    }

    unsafe fn mmio_phys_to_virt(address: PhysAddr, _: usize) -> NonNull<u8> {
        let address = usize::try_from(address).unwrap_or(0);
        NonNull::new(core::ptr::with_exposed_provenance_mut(address)).unwrap_or(NonNull::dangling())
    }

    unsafe fn share(buffer: NonNull<[u8]>, _: BufferDirection) -> PhysAddr {
        number(buffer.cast())
    }

    unsafe fn unshare(_: PhysAddr, _: NonNull<[u8]>, _: BufferDirection) {}
}

fn number(pointer: NonNull<u8>) -> u64 {
    u64::try_from(pointer.as_ptr().expose_provenance()).unwrap_or(0)
}

/// A virtio-net card.
pub struct VirtioNet {
    // Taken when it is stopped.
    card: Option<VirtIONet<Identity, PciTransport, QUEUE>>,
    mac: [u8; 6],
}

impl VirtioNet {
    /// Takes the card, which nobody else uses, answers to memory accesses and may reach memory.
    ///
    /// # Safety
    /// All physical memory is mapped to itself, and nobody else uses the card.
    pub unsafe fn new(configuration: Configuration) -> Result<Self, VirtioError> {
        let mut root = PciRoot::new(configuration);
        let (bus, device, function) = configuration.function;
        let function = DeviceFunction {
            bus,
            device,
            function,
        };
        let transport = PciTransport::new::<Identity, _>(&mut root, function)
            .map_err(|_| VirtioError("it is none of virtio 1.0 or later"))?;
        let mut card =
            VirtIONet::new(transport, BUFFER).map_err(|_| VirtioError("it does not come up"))?;
        card.disable_interrupts();
        let mac = card.mac_address();
        Ok(Self {
            card: Some(card),
            mac,
        })
    }
}

impl Card for VirtioNet {
    fn mac(&self) -> [u8; 6] {
        self.mac
    }

    fn receive(&mut self) -> Option<Vec<u8>> {
        let card = self.card.as_mut()?;
        let buffer = card.receive().ok()?;
        let frame = buffer.packet().to_vec();
        // What cannot be given back is one buffer less.
        let _ = card.recycle_rx_buffer(buffer);
        Some(frame)
    }

    fn send(&mut self, frame: &[u8]) {
        if let Some(card) = self.card.as_mut() {
            // A frame that is not sent is lost, as on a wire.
            let _ = card.send(TxBuffer::from(frame));
        }
    }

    fn stop(&mut self) {
        // The device is reset when it is dropped.
        self.card = None;
    }
}
