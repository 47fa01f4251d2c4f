//! Just enough of TCP in a guest to talk with a real one.

use crate::net::headers::Transport;
use crate::net::protocol::{Gso, tx_flag};
use crate::testing::{Got, NetQueue};

use super::packets::{Build, checksum_is_right};

const FIN: u8 = 1;
const SYN: u8 = 2;
const ACK: u8 = 0x10;
const SYN_ACK: u8 = SYN | ACK;

/// A connection, seen from the guest.
pub struct Connection<'a> {
    queue: &'a mut NetQueue,
    build: Build,
    /// All that came.
    pub received: Vec<u8>,
    /// How often a segment was missing before one that came.
    pub gaps: usize,
    /// Packets that came, without their bytes.
    pub packets: Vec<(usize, u16, Option<Gso>)>,
}

/// A segment's place and fields.
struct Segment {
    sequence: u32,
    flags: u8,
    payload: Vec<u8>,
}

impl<'a> Connection<'a> {
    /// Connects to where `build` says.
    pub fn open(queue: &'a mut NetQueue, build: Build) -> Self {
        let build = Build {
            sequence: 1000,
            acknowledge: 0,
            flags: SYN,
            ..build
        };
        let mut it = Self {
            queue,
            build,
            received: Vec::new(),
            gaps: 0,
            packets: Vec::new(),
        };
        it.send(&[], None);
        let (answer, _) = it.segment();
        assert_eq!(answer.flags, SYN_ACK);
        it.build.sequence += 1;
        it.build.acknowledge = answer.sequence.wrapping_add(1);
        it.build.flags = ACK;
        it.send(&[], None);
        it
    }

    /// Waits for somebody to connect to the port, and accepts, with options of TCP.
    pub fn accept(queue: &'a mut NetQueue, port: u16, options: &'static [u8]) -> Self {
        let build = Build {
            source: ([0; 4], port),
            target: ([0; 4], 0),
            sequence: 5000,
            flags: SYN_ACK,
            options,
            ..Build::tcp4()
        };
        let mut it = Self {
            queue,
            build,
            received: Vec::new(),
            gaps: 0,
            packets: Vec::new(),
        };
        let (asked, bytes) = it.segment();
        assert_eq!(asked.flags & SYN_ACK, SYN);
        it.build.to.copy_from_slice(&bytes[6..12]);
        it.build.source.0.copy_from_slice(&bytes[30..34]);
        it.build.target.0.copy_from_slice(&bytes[26..30]);
        it.build.target.1 = u16::from_be_bytes([bytes[34], bytes[35]]);
        it.build.acknowledge = asked.sequence.wrapping_add(1);
        it.send(&[], None);
        it.build.sequence += 1;
        it.build.flags = ACK;
        it.build.options = &[];
        it
    }

    /// Sends bytes in one segment.
    pub fn send(&mut self, payload: &[u8], gso: Option<Gso>) {
        let packet = self.build.blank(payload);
        let ids = self.queue.send(&packet, tx_flag::CSUM_BLANK, gso);
        assert!(self.queue.answers(&ids).iter().all(|status| *status == 0));
        let length = u32::try_from(payload.len()).expect("short");
        self.build.sequence = self.build.sequence.wrapping_add(length);
    }

    /// Receives until so many bytes are there, and acknowledges them.
    pub fn receive(&mut self, length: usize) {
        while self.received.len() < length {
            let (segment, _) = self.segment();
            // Whether it lies behind what is awaited, in numbers that go round.
            let ahead = segment.sequence.wrapping_sub(self.build.acknowledge);
            if segment.payload.is_empty() || ahead != 0 {
                self.gaps += usize::from((1..1 << 31).contains(&ahead));
                continue;
            }
            let came = u32::try_from(segment.payload.len()).expect("short");
            self.build.acknowledge = segment.sequence.wrapping_add(came);
            self.received.extend(segment.payload);
            self.send(&[], None);
        }
    }

    /// Ends it, waits until the other end has done so too, and says twice at once that it has seen
    /// that. The packets' numbers.
    pub fn end(mut self) -> Vec<u16> {
        self.build.flags = FIN | ACK;
        self.send(&[], None);
        self.build.flags = ACK;
        self.build.sequence = self.build.sequence.wrapping_add(1);
        loop {
            let (segment, _) = self.segment();
            if segment.flags & FIN != 0 {
                self.build.acknowledge = segment.sequence.wrapping_add(1);
                break;
            }
        }
        let packet = self.build.blank(&[]);
        let mut ids = Vec::new();
        for _ in 0..2 {
            ids.extend(self.queue.put(&packet, tx_flag::CSUM_BLANK, None));
        }
        ids
    }

    /// The next segment to this port; what else comes is passed over.
    fn segment(&mut self) -> (Segment, Vec<u8>) {
        loop {
            let Got { bytes, flags, gso } = self.queue.receive();
            let Some(found) = Transport::find(&bytes, bytes.len()) else {
                continue;
            };
            let port = u16::from_be_bytes([bytes[found.start + 2], bytes[found.start + 3]]);
            if port != self.build.source.1 || bytes[13] != 0 {
                continue;
            }
            if flags & crate::net::protocol::rx_flag::CSUM_BLANK == 0 {
                assert!(checksum_is_right(&bytes));
            }
            self.packets.push((bytes.len(), flags, gso));
            let at = found.start + 4;
            let sequence = bytes[at..at + 4].try_into().expect("four bytes");
            let segment = Segment {
                sequence: u32::from_be_bytes(sequence),
                flags: bytes[found.start + 13] & (FIN | SYN_ACK),
                payload: bytes[found.payload..found.end].to_vec(),
            };
            return (segment, bytes);
        }
    }
}
