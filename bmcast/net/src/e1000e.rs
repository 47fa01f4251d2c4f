//! Intel 82574, polled, with legacy descriptors (82574 GbE Controller Family Datasheet, revision 3.4:
//! section 4.6 for the order of things, 7.1 and 7.2 for descriptors, chapter 10 for registers).
//!
//! Descriptor `i` of a ring is buffer `i` for ever. All interrupts stay masked.

use core::sync::atomic::{Ordering, fence};

use crate::card::{BUFFER, FRAME, Frame, RX, TX, layout};
use crate::{CardError, Dma, Function, Machine, pci};

/// 82574L and 82574L of another stepping (table of device IDs, section 9.3).
pub(crate) const I82574L: (u16, u16) = (0x8086, 0x10d3);
pub(crate) const I82574LA: (u16, u16) = (0x8086, 0x10f6);

const CTRL: u64 = 0x0000;
const STATUS: u64 = 0x0008;
const ICR: u64 = 0x00c0;
const IMC: u64 = 0x00d8;
const RCTL: u64 = 0x0100;
const TCTL: u64 = 0x0400;
const TIPG: u64 = 0x0410;
const RDBAL: u64 = 0x2800;
const RDBAH: u64 = 0x2804;
const RDLEN: u64 = 0x2808;
const RDH: u64 = 0x2810;
const RDT: u64 = 0x2818;
const TDBAL: u64 = 0x3800;
const TDBAH: u64 = 0x3804;
const TDLEN: u64 = 0x3808;
const TDH: u64 = 0x3810;
const TDT: u64 = 0x3818;
const TXDCTL: u64 = 0x3828;
const RXCSUM: u64 = 0x5000;
const RFCTL: u64 = 0x5008;
const MTA: u64 = 0x5200;
const RAL: u64 = 0x5400;
const RAH: u64 = 0x5404;
const MRQC: u64 = 0x5818;

const CTRL_GIO_MASTER_DISABLE: u32 = 1 << 2;
const CTRL_ASDE: u32 = 1 << 5;
const CTRL_SLU: u32 = 1 << 6;
const CTRL_FRCSPD: u32 = 1 << 11;
const CTRL_FRCDPLX: u32 = 1 << 12;
const CTRL_RST: u32 = 1 << 26;
const CTRL_VME: u32 = 1 << 30;
const CTRL_PHY_RST: u32 = 1 << 31;
const STATUS_LU: u32 = 1 << 1;
const STATUS_GIO_MASTER_ENABLE: u32 = 1 << 19;
const RCTL_EN: u32 = 1 << 1;
const RCTL_BAM: u32 = 1 << 15;
/// The check sequence is not put into memory. The size of a buffer, bits 17:16, is 0: 2048 bytes.
const RCTL_SECRC: u32 = 1 << 26;
const TCTL_EN: u32 = 1 << 1;
const TCTL_PSP: u32 = 1 << 3;
/// Collision threshold 15 and distance 63, as full duplex wants them.
const TCTL_CT_COLD: u32 = 0xf << 4 | 0x3f << 12;
/// The value after power up: IPGT 8, IPGR1 8, IPGR2 6.
const TIPG_COPPER: u32 = 8 | 8 << 10 | 6 << 20;
/// Bit 22 is to be set; write-back of each descriptor by itself (GRAN, WTHRESH 1).
const TXDCTL_VALUE: u32 = 1 << 16 | 1 << 22 | 1 << 24;
const RAH_AV: u32 = 1 << 31;

/// Receive status: descriptor done, end of packet. Transmit command: end of packet, insert FCS, report status.
const DD: u8 = 1 << 0;
const EOP: u8 = 1 << 1;
const SEND: u8 = 1 << 0 | 1 << 1 | 1 << 3;

/// A reset takes 1 ms; the NVM is read after it (section 4.2).
const RESET_STEPS: u32 = 1000;
const RESET_STEP: u32 = 100;
/// How many buffers are collected before the card is told of them, which is an access to its registers.
const BATCH: u16 = 16;

pub(crate) struct Driver {
    base: u64,
    /// The descriptor that is looked at next.
    next: u16,
    /// Whether the one before was given out by the last `receive`.
    out: bool,
    /// How many are the driver's, and the card does not know yet.
    held: u16,
    /// The transmit descriptor that is written next, how many are the card's.
    tail: u16,
    busy: u16,
}

impl Driver {
    pub(crate) fn start(
        machine: &mut impl Machine,
        function: Function,
        dma: &mut Dma,
    ) -> Result<(Self, [u8; 6]), CardError> {
        let base = pci::bar(machine, function, 0)?;
        let driver = Self {
            base,
            next: 0,
            out: false,
            held: 0,
            tail: 0,
            busy: 0,
        };
        driver.reset(machine)?;
        // 4.6.3: speed and duplex are the PHY's.
        let ctrl = driver.read(machine, CTRL);
        let cleared = CTRL_FRCSPD | CTRL_FRCDPLX | CTRL_VME | CTRL_PHY_RST;
        driver.write(machine, CTRL, ctrl & !cleared | CTRL_SLU | CTRL_ASDE);
        let mac = driver.address(machine)?;
        driver.start_receive(machine, dma);
        driver.start_transmit(machine, dma);
        Ok((driver, mac))
    }

    /// Sections 4.6.1 and 4.6.2: masked, reset, masked again.
    fn reset(&self, machine: &mut impl Machine) -> Result<(), CardError> {
        self.write(machine, IMC, u32::MAX);
        self.write(machine, RCTL, 0);
        self.write(machine, TCTL, 0);
        // What it is doing in memory comes to an end first.
        let ctrl = self.read(machine, CTRL);
        self.write(machine, CTRL, ctrl | CTRL_GIO_MASTER_DISABLE);
        for _ in 0..RESET_STEPS {
            if self.read(machine, STATUS) & STATUS_GIO_MASTER_ENABLE == 0 {
                break;
            }
            machine.wait(RESET_STEP);
        }
        let ctrl = self.read(machine, CTRL);
        self.write(machine, CTRL, ctrl | CTRL_RST);
        // Not to be touched for a moment after it.
        machine.wait(10_000);
        for _ in 0..RESET_STEPS {
            let ctrl = self.read(machine, CTRL);
            if ctrl & CTRL_RST == 0 {
                self.write(machine, IMC, u32::MAX);
                self.read(machine, ICR);
                return Ok(());
            }
            machine.wait(RESET_STEP);
        }
        Err(CardError::Reset)
    }

    /// What the NVM has put into the first receive address.
    fn address(&self, machine: &mut impl Machine) -> Result<[u8; 6], CardError> {
        let low = self.read(machine, RAL).to_le_bytes();
        let high = self.read(machine, RAH);
        let [a, b, ..] = high.to_le_bytes();
        let mac = [low[0], low[1], low[2], low[3], a, b];
        // A group's address or none is an NVM that was not read.
        if high & RAH_AV == 0 || mac[0] & 1 != 0 || mac == [0; 6] {
            return Err(CardError::NoAddress);
        }
        Ok(mac)
    }

    /// Section 4.6.5.
    fn start_receive(&self, machine: &mut impl Machine, dma: &mut Dma) {
        for i in 0..128 {
            self.write(machine, MTA + 4 * i, 0);
        }
        // No offload, one queue, legacy descriptors.
        for register in [RXCSUM, RFCTL, MRQC] {
            self.write(machine, register, 0);
        }
        for i in 0..RX {
            give(dma, i);
        }
        let [low, high] = halves(dma.address(layout::RX_DESCRIPTORS));
        self.write(machine, RDBAL, low);
        self.write(machine, RDBAH, high);
        self.write(machine, RDLEN, u32::from(RX) * 16);
        self.write(machine, RDH, 0);
        self.write(machine, RDT, 0);
        self.write(machine, RCTL, RCTL_EN | RCTL_BAM | RCTL_SECRC);
        fence(Ordering::Release);
        // Tail at head would be an empty ring: one descriptor stays back.
        self.write(machine, RDT, u32::from(RX - 1));
    }

    /// Section 4.6.6.
    fn start_transmit(&self, machine: &mut impl Machine, dma: &Dma) {
        let [low, high] = halves(dma.address(layout::TX_DESCRIPTORS));
        self.write(machine, TDBAL, low);
        self.write(machine, TDBAH, high);
        self.write(machine, TDLEN, u32::from(TX) * 16);
        self.write(machine, TDH, 0);
        self.write(machine, TDT, 0);
        self.write(machine, TXDCTL, TXDCTL_VALUE);
        self.write(machine, TIPG, TIPG_COPPER);
        self.write(machine, TCTL, TCTL_EN | TCTL_PSP | TCTL_CT_COLD);
    }

    pub(crate) fn link(&self, machine: &mut impl Machine) -> bool {
        self.read(machine, STATUS) & STATUS_LU != 0
    }

    /// The next frame. The one before goes back to the card.
    pub(crate) fn receive(&mut self, machine: &mut impl Machine, dma: &mut Dma) -> Option<Frame> {
        // What is no frame goes back at once: once around the ring at most.
        for _ in 0..RX {
            if self.out {
                self.out = false;
                let last = (self.next + RX - 1) % RX;
                give(dma, last);
                self.held += 1;
                if self.held >= BATCH {
                    self.publish(machine);
                }
            }
            let at = layout::RX_DESCRIPTORS + 16 * usize::from(self.next);
            let status = dma.read::<u8>(at + 12);
            if status & DD == 0 {
                if self.held > 0 {
                    self.publish(machine);
                }
                return None;
            }
            fence(Ordering::Acquire);
            let len = usize::from(dma.read::<u16>(at + 8));
            let errors = dma.read::<u8>(at + 13);
            let buffer = layout::RX_BUFFERS + BUFFER * usize::from(self.next);
            self.next = (self.next + 1) % RX;
            self.out = true;
            if status & EOP != 0 && errors == 0 && len <= FRAME {
                return Some(Frame { at: buffer, len });
            }
        }
        None
    }

    /// Tells the card of the descriptors that are its again (section 7.1.8).
    fn publish(&mut self, machine: &mut impl Machine) {
        self.held = 0;
        fence(Ordering::Release);
        self.write(machine, RDT, u32::from((self.next + RX - 1) % RX));
    }

    /// Where the next frame to send is to be written.
    pub(crate) fn room(&mut self, dma: &Dma) -> Option<usize> {
        for _ in 0..self.busy {
            let oldest = (self.tail + TX - self.busy) % TX;
            let at = layout::TX_DESCRIPTORS + 16 * usize::from(oldest);
            if dma.read::<u8>(at + 12) & DD == 0 {
                break;
            }
            fence(Ordering::Acquire);
            self.busy -= 1;
        }
        // As above, not all of them.
        (self.busy < TX - 1).then_some(layout::TX_BUFFERS + BUFFER * usize::from(self.tail))
    }

    /// Sends the frame of `len` bytes that was written where `room` said.
    pub(crate) fn send(&mut self, machine: &mut impl Machine, dma: &mut Dma, len: usize) {
        let at = layout::TX_DESCRIPTORS + 16 * usize::from(self.tail);
        let buffer = layout::TX_BUFFERS + BUFFER * usize::from(self.tail);
        dma.write(at, dma.address(buffer));
        dma.write(at + 8, u16::try_from(len).unwrap_or(0));
        dma.write(at + 10, 0_u8);
        dma.write(at + 11, SEND);
        dma.write(at + 12, 0_u32);
        self.tail = (self.tail + 1) % TX;
        self.busy += 1;
        fence(Ordering::Release);
        self.write(machine, TDT, u32::from(self.tail));
    }

    pub(crate) fn stop(&mut self, machine: &mut impl Machine) -> Result<(), CardError> {
        self.reset(machine)
    }

    fn read(&self, machine: &mut impl Machine, register: u64) -> u32 {
        machine.mmio_read(self.base + register, 4)
    }

    fn write(&self, machine: &mut impl Machine, register: u64, value: u32) {
        machine.mmio_write(self.base + register, 4, value);
    }
}

/// Makes receive descriptor `i` the card's.
fn give(dma: &mut Dma, i: u16) {
    let at = layout::RX_DESCRIPTORS + 16 * usize::from(i);
    let buffer = layout::RX_BUFFERS + BUFFER * usize::from(i);
    dma.write(at, dma.address(buffer));
    dma.write(at + 8, 0_u64);
}

fn halves(address: u64) -> [u32; 2] {
    [address, address >> 32].map(|half| u32::try_from(half & 0xffff_ffff).unwrap_or(0))
}
