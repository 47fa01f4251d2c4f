//! virtio-net over PCI, polled (virtio 1.2, sections 2.7, 4.1 and 5.1).
//!
//! The crate `virtio-drivers` has a driver too. Its machine is a set of functions without a `self`, so a
//! card's memory would have to be a global, its registers are raw pointers that no test can stand in for,
//! and it waits for a reset without end.
//!
//! Descriptor `i` of a queue is buffer `i` for ever. No feature that puts more than one frame into a buffer,
//! or less, is taken.

use core::sync::atomic::{Ordering, fence};

use crate::card::{BUFFER, FRAME, Frame, RX, TX, layout};
use crate::pci::low;
use crate::{CardError, Dma, Function, Machine, pci};

/// With a legacy interface too (section 4.1.2.1).
pub(crate) const TRANSITIONAL: (u16, u16) = (0x1af4, 0x1000);
/// Without.
pub(crate) const MODERN: (u16, u16) = (0x1af4, 0x1041);

/// `VIRTIO_NET_F_MAC`, `VIRTIO_NET_F_STATUS` (section 5.1.3).
const F_MAC: u64 = 1 << 5;
const F_STATUS: u64 = 1 << 16;
/// `VIRTIO_F_VERSION_1`, `VIRTIO_F_ACCESS_PLATFORM` (section 6).
const F_VERSION_1: u64 = 1 << 32;
const F_ACCESS_PLATFORM: u64 = 1 << 33;

/// Device status (section 2.1).
const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 2;
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;

/// The common configuration (section 4.1.4.3).
mod common {
    pub(super) const DEVICE_FEATURE_SELECT: u64 = 0x00;
    pub(super) const DEVICE_FEATURE: u64 = 0x04;
    pub(super) const DRIVER_FEATURE_SELECT: u64 = 0x08;
    pub(super) const DRIVER_FEATURE: u64 = 0x0c;
    pub(super) const MSIX_CONFIG: u64 = 0x10;
    pub(super) const DEVICE_STATUS: u64 = 0x14;
    pub(super) const QUEUE_SELECT: u64 = 0x16;
    pub(super) const QUEUE_SIZE: u64 = 0x18;
    pub(super) const QUEUE_MSIX_VECTOR: u64 = 0x1a;
    pub(super) const QUEUE_ENABLE: u64 = 0x1c;
    pub(super) const QUEUE_NOTIFY_OFF: u64 = 0x1e;
    pub(super) const QUEUE_DESC: u64 = 0x20;
    pub(super) const QUEUE_DRIVER: u64 = 0x28;
    pub(super) const QUEUE_DEVICE: u64 = 0x30;
}

/// Capability types (section 4.1.4).
const COMMON_CFG: u8 = 1;
const NOTIFY_CFG: u8 = 2;
const DEVICE_CFG: u8 = 4;

/// `struct virtio_net_hdr` with `num_buffers` (section 5.1.6).
const HEADER: usize = 12;
const NO_VECTOR: u32 = 0xffff;
/// `VIRTQ_DESC_F_WRITE`, `VIRTQ_AVAIL_F_NO_INTERRUPT`, `VIRTQ_USED_F_NO_NOTIFY` (section 2.7).
const WRITE: u16 = 2;
const NO_INTERRUPT: u16 = 1;
const NO_NOTIFY: u16 = 1;

/// A reset takes no longer than this many steps of `RESET_STEP` microseconds.
const RESET_STEPS: u32 = 10_000;
const RESET_STEP: u32 = 100;

/// A queue, of which descriptor `i` is buffer `i`.
struct Queue {
    index: u16,
    size: u16,
    descriptors: usize,
    available: usize,
    used: usize,
    /// Where it is told of new buffers.
    doorbell: u64,
    /// How many buffers were made available, and how many came back.
    given: u16,
    seen: u16,
}

impl Queue {
    /// Hands over buffer `id`; the device may not know before `publish`.
    fn give(&mut self, dma: &mut Dma, id: u16) {
        let slot = usize::from(self.given % self.size);
        dma.write(self.available + 4 + 2 * slot, id);
        self.given = self.given.wrapping_add(1);
    }

    /// Tells the device, if it wants to hear (section 2.7.13).
    fn publish(&mut self, machine: &mut impl Machine, dma: &mut Dma) {
        fence(Ordering::Release);
        dma.write(self.available + 2, self.given);
        fence(Ordering::SeqCst);
        if dma.read::<u16>(self.used) & NO_NOTIFY == 0 {
            machine.mmio_write(self.doorbell, 2, u32::from(self.index));
        }
    }

    /// The next buffer that came back, and how many bytes the device wrote (section 2.7.14).
    fn back(&mut self, dma: &Dma) -> Option<(u32, u32)> {
        if dma.read::<u16>(self.used + 2) == self.seen {
            return None;
        }
        fence(Ordering::Acquire);
        let at = self.used + 4 + 8 * usize::from(self.seen % self.size);
        self.seen = self.seen.wrapping_add(1);
        Some((dma.read(at), dma.read(at + 4)))
    }
}

pub(crate) struct Driver {
    common: u64,
    /// The network configuration, if the link's state is in it.
    status: Option<u64>,
    rx: Queue,
    tx: Queue,
    /// The buffer that the last `receive` gave out.
    out: Option<u16>,
    /// Transmit buffers that are free.
    free: [u16; TX as usize],
    free_count: usize,
}

impl Driver {
    /// Section 3.1.1.
    pub(crate) fn start(
        machine: &mut impl Machine,
        function: Function,
        dma: &mut Dma,
    ) -> Result<(Self, [u8; 6]), CardError> {
        let places = Places::find(machine, function)?;
        let common = places.common;
        reset(machine, common)?;
        machine.mmio_write(common + common::DEVICE_STATUS, 1, ACKNOWLEDGE);
        machine.mmio_write(common + common::DEVICE_STATUS, 1, ACKNOWLEDGE | DRIVER);

        let needed = F_VERSION_1 | F_MAC;
        let offered = features(machine, common);
        if offered & needed != needed {
            return Err(CardError::Features(needed & !offered));
        }
        let taken = offered & (needed | F_STATUS | F_ACCESS_PLATFORM);
        for half in 0..2 {
            machine.mmio_write(common + common::DRIVER_FEATURE_SELECT, 4, half);
            let word = u32::try_from(taken >> (32 * half) & 0xffff_ffff).unwrap_or(0);
            machine.mmio_write(common + common::DRIVER_FEATURE, 4, word);
        }
        let ready = ACKNOWLEDGE | DRIVER | FEATURES_OK;
        machine.mmio_write(common + common::DEVICE_STATUS, 1, ready);
        if machine.mmio_read(common + common::DEVICE_STATUS, 1) & FEATURES_OK == 0 {
            return Err(CardError::Features(taken));
        }
        machine.mmio_write(common + common::MSIX_CONFIG, 2, NO_VECTOR);

        let mut mac = [0; 6];
        for (i, byte) in mac.iter_mut().enumerate() {
            *byte = machine.mmio_read(places.device + i as u64, 1).to_le_bytes()[0];
        }
        let rings = (
            layout::RX_DESCRIPTORS,
            layout::RX_AVAILABLE,
            layout::RX_USED,
        );
        let rx = queue(machine, dma, &places, 0, RX, rings)?;
        let rings = (
            layout::TX_DESCRIPTORS,
            layout::TX_AVAILABLE,
            layout::TX_USED,
        );
        let tx = queue(machine, dma, &places, 1, TX, rings)?;
        let mut driver = Self {
            common,
            status: (taken & F_STATUS != 0).then_some(places.device + 6),
            rx,
            tx,
            out: None,
            free: [0; TX as usize],
            free_count: 0,
        };
        for i in 0..driver.rx.size {
            let buffer = layout::RX_BUFFERS + BUFFER * usize::from(i);
            let at = driver.rx.descriptors + 16 * usize::from(i);
            dma.write(at, dma.address(buffer));
            dma.write(at + 8, 2048_u32);
            dma.write(at + 12, WRITE);
            driver.rx.give(dma, i);
        }
        for i in 0..driver.tx.size {
            let buffer = layout::TX_BUFFERS + BUFFER * usize::from(i);
            dma.write(
                driver.tx.descriptors + 16 * usize::from(i),
                dma.address(buffer),
            );
            driver.free[usize::from(i)] = i;
        }
        driver.free_count = usize::from(driver.tx.size);
        machine.mmio_write(common + common::DEVICE_STATUS, 1, ready | DRIVER_OK);
        driver.rx.publish(machine, dma);
        Ok((driver, mac))
    }

    pub(crate) fn link(&self, machine: &mut impl Machine) -> bool {
        self.status
            .is_none_or(|at| machine.mmio_read(at, 2) & 1 != 0)
    }

    /// The next frame. The one before goes back to the device.
    pub(crate) fn receive(&mut self, machine: &mut impl Machine, dma: &mut Dma) -> Option<Frame> {
        // What is no frame goes back at once: once around the ring at most.
        for _ in 0..=self.rx.size {
            if let Some(id) = self.out.take() {
                self.rx.give(dma, id);
                self.rx.publish(machine, dma);
            }
            let (id, len) = self.rx.back(dma)?;
            let Some(id) = u16::try_from(id).ok().filter(|id| *id < self.rx.size) else {
                continue;
            };
            self.out = Some(id);
            let frame = usize::try_from(len)
                .ok()
                .and_then(|len| len.checked_sub(HEADER));
            if let Some(len) = frame.filter(|len| *len <= FRAME) {
                let at = layout::RX_BUFFERS + BUFFER * usize::from(id) + HEADER;
                return Some(Frame { at, len });
            }
        }
        None
    }

    /// Where the next frame to send is to be written.
    pub(crate) fn room(&mut self, dma: &Dma) -> Option<usize> {
        for _ in 0..self.tx.size {
            let Some((id, _)) = self.tx.back(dma) else {
                break;
            };
            let id = u16::try_from(id).ok().filter(|id| *id < self.tx.size);
            if let Some(id) = id.filter(|_| self.free_count < usize::from(self.tx.size)) {
                self.free[self.free_count] = id;
                self.free_count += 1;
            }
        }
        let id = self.free[..self.free_count].last()?;
        Some(layout::TX_BUFFERS + BUFFER * usize::from(*id) + HEADER)
    }

    /// Sends the frame of `len` bytes that was written where `room` said.
    pub(crate) fn send(&mut self, machine: &mut impl Machine, dma: &mut Dma, len: usize) {
        let Some(last) = self.free_count.checked_sub(1) else {
            return;
        };
        self.free_count = last;
        let id = self.free[last];
        // The header before it stays zeros: no offload.
        let bytes = u32::try_from(len + HEADER).unwrap_or(0);
        dma.write(self.tx.descriptors + 16 * usize::from(id) + 8, bytes);
        self.tx.give(dma, id);
        self.tx.publish(machine, dma);
    }

    pub(crate) fn stop(&mut self, machine: &mut impl Machine) -> Result<(), CardError> {
        reset(machine, self.common)
    }
}

/// Section 2.4.1: 0 is written, and read when it is done.
fn reset(machine: &mut impl Machine, common: u64) -> Result<(), CardError> {
    machine.mmio_write(common + common::DEVICE_STATUS, 1, 0);
    for _ in 0..RESET_STEPS {
        if machine.mmio_read(common + common::DEVICE_STATUS, 1) == 0 {
            return Ok(());
        }
        machine.wait(RESET_STEP);
    }
    Err(CardError::Reset)
}

fn features(machine: &mut impl Machine, common: u64) -> u64 {
    let mut offered = 0;
    for half in 0..2 {
        machine.mmio_write(common + common::DEVICE_FEATURE_SELECT, 4, half);
        let word = machine.mmio_read(common + common::DEVICE_FEATURE, 4);
        offered |= u64::from(word) << (32 * half);
    }
    offered
}

/// Sets a queue up (section 4.1.5.1.3).
fn queue(
    machine: &mut impl Machine,
    dma: &mut Dma,
    places: &Places,
    index: u16,
    most: u16,
    (descriptors, available, used): (usize, usize, usize),
) -> Result<Queue, CardError> {
    let common = places.common;
    machine.mmio_write(common + common::QUEUE_SELECT, 2, u32::from(index));
    let offered = low(machine.mmio_read(common + common::QUEUE_SIZE, 2));
    let enabled = machine.mmio_read(common + common::QUEUE_ENABLE, 2) != 0;
    // A size is a power of two, or 0 if there is no such queue.
    if !offered.is_power_of_two() || offered < 2 || enabled {
        return Err(CardError::Queue(index));
    }
    let size = offered.min(most);
    machine.mmio_write(common + common::QUEUE_SIZE, 2, u32::from(size));
    machine.mmio_write(common + common::QUEUE_MSIX_VECTOR, 2, NO_VECTOR);
    for (register, offset) in [
        (common::QUEUE_DESC, descriptors),
        (common::QUEUE_DRIVER, available),
        (common::QUEUE_DEVICE, used),
    ] {
        let address = dma.address(offset);
        let halves = [address & 0xffff_ffff, address >> 32];
        for (at, half) in [0, 4].into_iter().zip(halves) {
            let half = u32::try_from(half).unwrap_or(0);
            machine.mmio_write(common + register + at, 4, half);
        }
    }
    let off = u64::from(machine.mmio_read(common + common::QUEUE_NOTIFY_OFF, 2));
    dma.write(available, NO_INTERRUPT);
    machine.mmio_write(common + common::QUEUE_ENABLE, 2, 1);
    Ok(Queue {
        index,
        size,
        descriptors,
        available,
        used,
        doorbell: places.notify + off * places.notify_multiplier,
        given: 0,
        seen: 0,
    })
}

/// Where the structures are (section 4.1.4).
struct Places {
    common: u64,
    notify: u64,
    notify_multiplier: u64,
    device: u64,
}

impl Places {
    fn find(machine: &mut impl Machine, function: Function) -> Result<Self, CardError> {
        let mut found: [Option<(u8, u32, u32)>; 5] = [None; 5];
        pci::capabilities(machine, function, |machine, at, word| {
            let [id, _, len, kind] = word.to_le_bytes();
            let slot = found.get_mut(usize::from(kind));
            if let (0x09, true, Some(slot @ None)) = (id, len >= 16, slot) {
                let bar = machine.config_read(function, at + 4).to_le_bytes()[0];
                let offset = machine.config_read(function, at + 8);
                let more = if len >= 20 {
                    machine.config_read(function, at + 16)
                } else {
                    0
                };
                *slot = Some((bar, offset, more));
            }
        });
        let mut place = |kind: u8| {
            let (bar, offset, more) =
                found[usize::from(kind)].ok_or(CardError::Capability(kind))?;
            Ok::<_, CardError>((
                pci::bar(machine, function, bar)? + u64::from(offset),
                u64::from(more),
            ))
        };
        let (common, _) = place(COMMON_CFG)?;
        let (notify, notify_multiplier) = place(NOTIFY_CFG)?;
        let (device, _) = place(DEVICE_CFG)?;
        Ok(Self {
            common,
            notify,
            notify_multiplier,
            device,
        })
    }
}
