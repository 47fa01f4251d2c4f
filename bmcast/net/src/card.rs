//! A network card as smoltcp sees one.

use smoltcp::phy::{self, DeviceCapabilities, Medium};
use smoltcp::time::Instant;

use crate::{Dma, Function, Machine, e1000e, pci, virtio};

/// Receive descriptors: as many as the client's windows let come while nobody polls (a virtio
/// device may have fewer).
pub(crate) const RX: u16 = 1024;
/// Transmit descriptors.
pub(crate) const TX: u16 = 64;
/// Bytes of a frame's buffer.
pub(crate) const BUFFER: usize = 2048;
/// Longest frame without its check sequence: MTU 1500.
pub(crate) const FRAME: usize = 1514;

/// Where things are in the DMA memory. Rings first, then buffers.
pub(crate) mod layout {
    use super::{BUFFER, RX, TX};

    pub(crate) const RX_DESCRIPTORS: usize = 0;
    pub(crate) const TX_DESCRIPTORS: usize = 0x4000;
    pub(crate) const RX_AVAILABLE: usize = 0x4800;
    pub(crate) const TX_AVAILABLE: usize = 0x5400;
    pub(crate) const RX_USED: usize = 0x6000;
    pub(crate) const TX_USED: usize = 0x8800;
    pub(crate) const RX_BUFFERS: usize = 0x9000;
    pub(crate) const TX_BUFFERS: usize = RX_BUFFERS + RX as usize * BUFFER;
    pub(crate) const END: usize = TX_BUFFERS + TX as usize * BUFFER;

    // Descriptors have 16 bytes; an available ring 6 and 2 for each, a used ring 6 and 8 (virtio 1.2, section 2.7).
    const _: () = assert!(RX_DESCRIPTORS + 16 * RX as usize <= TX_DESCRIPTORS);
    const _: () = assert!(TX_DESCRIPTORS + 16 * TX as usize <= RX_AVAILABLE);
    const _: () = assert!(RX_AVAILABLE + 6 + 2 * RX as usize <= TX_AVAILABLE);
    const _: () = assert!(TX_AVAILABLE + 6 + 2 * TX as usize <= RX_USED);
    const _: () = assert!(RX_USED + 6 + 8 * RX as usize <= TX_USED);
    const _: () = assert!(TX_USED + 6 + 8 * TX as usize <= RX_BUFFERS);
}

/// How much memory a [`Card`] needs for DMA, in bytes.
pub const DMA_BYTES: usize = layout::END;

/// How often the link is looked at while it is down, and while it is up.
const LINK_DOWN_MS: i64 = 50;
const LINK_UP_MS: i64 = 1000;

/// Why a card cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CardError {
    /// None that this crate has a driver for.
    #[error("{vendor:04x}:{device:04x} is no network card that there is a driver for")]
    Unknown {
        /// The vendor; 0xffff if there is no such function.
        vendor: u16,
        /// The device.
        device: u16,
    },
    /// It has no such memory BAR, or the firmware has given it no address.
    #[error("BAR {0} of the network card is not memory, or has no address")]
    Bar(u8),
    /// A virtio structure is missing (virtio 1.2, section 4.1.4): a legacy device.
    #[error("the virtio network card has no capability of type {0}: it is a legacy one")]
    Capability(u8),
    /// It does not take the features that the driver needs (`VIRTIO_F_VERSION_1`, `VIRTIO_NET_F_MAC`).
    #[error("the virtio network card does not take the features {0:#x}")]
    Features(u64),
    /// It has fewer descriptors than can be used, or a queue that is in use.
    #[error("queue {0} of the virtio network card cannot be used")]
    Queue(u16),
    /// Its reset does not end.
    #[error("the network card does not come out of its reset")]
    Reset,
    /// It has no address of its own.
    #[error("the network card has no MAC address")]
    NoAddress,
    /// Too little memory was given.
    #[error("the network card needs {DMA_BYTES} bytes of memory, and got {0}")]
    Memory(usize),
}

/// The cards that there are drivers for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Model {
    /// A modern virtio network device over PCI (virtio 1.2, section 5.1).
    Virtio,
    /// Intel's 82574L, QEMU's `e1000e`.
    E1000e,
}

/// Which card a function is, if it is one.
pub fn probe(machine: &mut impl Machine, function: Function) -> Option<Model> {
    match pci::ids(machine, function) {
        virtio::TRANSITIONAL | virtio::MODERN => Some(Model::Virtio),
        e1000e::I82574L | e1000e::I82574LA => Some(Model::E1000e),
        _ => None,
    }
}

#[expect(clippy::large_enum_variant, reason = "there is one, within a card")]
enum Driver {
    Virtio(virtio::Driver),
    E1000e(e1000e::Driver),
}

/// Where a frame is in the DMA memory.
#[derive(Clone, Copy)]
pub(crate) struct Frame {
    pub(crate) at: usize,
    pub(crate) len: usize,
}

/// A running card.
pub struct Card<M: Machine> {
    machine: M,
    function: Function,
    /// The command register as it was found.
    command: u16,
    dma: Dma,
    driver: Driver,
    mac: [u8; 6],
    up: bool,
    /// When the link is to be looked at again.
    look: i64,
}

impl<M: Machine> Card<M> {
    /// Resets and starts the card at `function`, with `dma` as its memory.
    ///
    /// Nobody else may drive it. Its BARs are where they are now; memory accesses and bus mastering are turned on here.
    pub fn new(mut machine: M, function: Function, mut dma: Dma) -> Result<Self, CardError> {
        if dma.len() < DMA_BYTES {
            return Err(CardError::Memory(dma.len()));
        }
        let Some(model) = probe(&mut machine, function) else {
            let (vendor, device) = pci::ids(&mut machine, function);
            return Err(CardError::Unknown { vendor, device });
        };
        dma.clear();
        let command = pci::enable(&mut machine, function);
        let started = match model {
            Model::Virtio => virtio::Driver::start(&mut machine, function, &mut dma)
                .map(|(driver, mac)| (Driver::Virtio(driver), mac)),
            Model::E1000e => e1000e::Driver::start(&mut machine, function, &mut dma)
                .map(|(driver, mac)| (Driver::E1000e(driver), mac)),
        };
        let (driver, mac) = started.inspect_err(|_| {
            pci::disable(&mut machine, function, command);
        })?;
        Ok(Self {
            machine,
            function,
            command,
            dma,
            driver,
            mac,
            up: false,
            look: i64::MIN,
        })
    }

    /// Its address.
    pub fn mac(&self) -> [u8; 6] {
        self.mac
    }

    /// Which card it is.
    pub fn model(&self) -> Model {
        match self.driver {
            Driver::Virtio(_) => Model::Virtio,
            Driver::E1000e(_) => Model::E1000e,
        }
    }

    /// Whether its link is up, asked now.
    pub fn link(&mut self) -> bool {
        self.up = match &self.driver {
            Driver::Virtio(driver) => driver.link(&mut self.machine),
            Driver::E1000e(driver) => driver.link(&mut self.machine),
        };
        self.up
    }

    /// Resets the card, sets its command register to what it was but without bus mastering, and gives back what it was made of. From then on
    /// the memory is not the card's, unless the reset failed: then the memory must never be used
    /// for anything else.
    pub fn stop(mut self) -> (M, Dma, Result<(), CardError>) {
        let reset = match &mut self.driver {
            Driver::Virtio(driver) => driver.stop(&mut self.machine),
            Driver::E1000e(driver) => driver.stop(&mut self.machine),
        };
        pci::disable(&mut self.machine, self.function, self.command);
        (self.machine, self.dma, reset)
    }

    /// Whether frames may be sent: without a link they would only be late.
    fn linked(&mut self, now: Instant) -> bool {
        let now = now.total_millis();
        if now >= self.look {
            let up = self.link();
            self.look = now + if up { LINK_UP_MS } else { LINK_DOWN_MS };
        }
        self.up
    }
}

impl Driver {
    fn receive(&mut self, machine: &mut impl Machine, dma: &mut Dma) -> Option<Frame> {
        match self {
            Self::Virtio(driver) => driver.receive(machine, dma),
            Self::E1000e(driver) => driver.receive(machine, dma),
        }
    }

    fn room(&mut self, dma: &Dma) -> Option<usize> {
        match self {
            Self::Virtio(driver) => driver.room(dma),
            Self::E1000e(driver) => driver.room(dma),
        }
    }

    fn send(&mut self, machine: &mut impl Machine, dma: &mut Dma, len: usize) {
        match self {
            Self::Virtio(driver) => driver.send(machine, dma, len),
            Self::E1000e(driver) => driver.send(machine, dma, len),
        }
    }
}

/// A frame that has come.
pub struct RxToken<'a>(&'a [u8]);

impl phy::RxToken for RxToken<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(self.0)
    }
}

/// Room for a frame to be sent.
pub struct TxToken<'a, M: Machine> {
    machine: &'a mut M,
    dma: &'a mut Dma,
    driver: &'a mut Driver,
    at: usize,
}

impl<M: Machine> phy::TxToken for TxToken<'_, M> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        // smoltcp keeps to `max_transmission_unit`.
        assert!(len <= FRAME);
        // SAFETY: `room` found that the device is done with this buffer, and `send` gives it to it afterwards.
        // No frame that came is in it.
        let result = f(unsafe { self.dma.bytes_mut(self.at, len) });
        self.driver.send(self.machine, self.dma, len);
        result
    }
}

impl<M: Machine> phy::Device for Card<M> {
    type RxToken<'a>
        = RxToken<'a>
    where
        M: 'a;
    type TxToken<'a>
        = TxToken<'a, M>
    where
        M: 'a;

    fn receive(&mut self, _: Instant) -> Option<(Self::RxToken<'_>, Self::TxToken<'_>)> {
        let at = self.driver.room(&self.dma)?;
        let frame = self.driver.receive(&mut self.machine, &mut self.dma)?;
        // SAFETY: the device is done with this buffer, and gets it back at the next `receive` of the driver,
        // which the token's borrow of the card keeps from happening.
        let bytes = unsafe { self.dma.bytes(frame.at, frame.len) };
        Some((
            RxToken(bytes),
            TxToken {
                machine: &mut self.machine,
                dma: &mut self.dma,
                driver: &mut self.driver,
                at,
            },
        ))
    }

    fn transmit(&mut self, now: Instant) -> Option<Self::TxToken<'_>> {
        if !self.linked(now) {
            return None;
        }
        let at = self.driver.room(&self.dma)?;
        Some(TxToken {
            machine: &mut self.machine,
            dma: &mut self.dma,
            driver: &mut self.driver,
            at,
        })
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = FRAME;
        capabilities
    }
}
