//! A network card, for smoltcp.

use alloc::boxed::Box;
use alloc::vec::Vec;

use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::time::Instant;

/// Bytes of the largest frame, without its checksum.
pub const FRAME: usize = 1514;

/// A card that is polled.
pub trait Card: Send {
    /// Its address.
    fn mac(&self) -> [u8; 6];
    /// A frame that has come.
    fn receive(&mut self) -> Option<Vec<u8>>;
    /// Sends a frame of at most [`FRAME`] bytes; a frame that finds no room is lost, as on a wire.
    fn send(&mut self, frame: &[u8]);
    /// Resets it: it reaches memory no more.
    fn stop(&mut self);
}

/// A card as smoltcp wants it.
pub struct Wire(pub Box<dyn Card>);

/// A frame.
pub struct Received(Vec<u8>);

/// Room for one.
pub struct Room<'a>(&'a mut dyn Card);

impl RxToken for Received {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl TxToken for Room<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, f: F) -> R {
        let mut frame = alloc::vec![0; length];
        let result = f(&mut frame);
        self.0.send(&frame);
        result
    }
}

impl Device for Wire {
    type RxToken<'a> = Received;
    type TxToken<'a> = Room<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Received, Room<'_>)> {
        let frame = self.0.receive()?;
        Some((Received(frame), Room(&mut *self.0)))
    }

    fn transmit(&mut self, _: Instant) -> Option<Room<'_>> {
        Some(Room(&mut *self.0))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = FRAME;
        capabilities
    }
}
