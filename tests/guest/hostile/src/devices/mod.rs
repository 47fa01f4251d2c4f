//! Attacks on what stands behind a VM's devices: the xenstore, the bus, and the backends
//! of disks and networks. The guest is an honest frontend at first, and after each attack:
//! on a connection that begins anew, what it writes must be what it reads, and the
//! instance must answer it.
//!
//! It writes the first [`blkfront::WINDOW`] sectors of its first disk only, by requests
//! that are right. Whoever runs it compares the rest, and its second disk.

mod blkfront;
pub mod guest;
mod netfront;
mod packets;
mod pages;
mod requests;
mod rings;
mod states;
mod store;
mod xenstore;

use core::fmt::Write;

use blkfront::{Blkfront, DATA};
use guest::{PATIENCE, claim, sleep};
use netfront::Netfront;
use xenstore::{Store, kind};

use crate::kernel::{Console, Kernel};
use crate::rng::Rng;

/// Pages of a disk: its ring's and its data's.
const DISK_PAGES: usize = 4 + DATA;

/// Names of the families, in the order of their numbers.
const FAMILIES: [&str; 18] = [
    "store-nonsense",
    "store-halves",
    "store-transactions",
    "store-watches",
    "store-foreign",
    "store-quota",
    "disk-ring",
    "disk-header",
    "disk-requests",
    "disk-changing",
    "disk-grants",
    "disk-offers",
    "disk-moves",
    "net-ring",
    "net-packets",
    "net-changing",
    "net-endless",
    "states",
];
/// One more: storms of connections.
const STORM: u64 = FAMILIES.len() as u64;

struct Devices {
    store: Store,
    disk: Blkfront,
    /// A disk that nothing is done to.
    other: Blkfront,
    net: Netfront,
}

impl Devices {
    fn attack(&mut self, k: &Kernel, rng: &mut Rng, family: u64) {
        let Self {
            store, disk, net, ..
        } = self;
        match family {
            0 => store::nonsense(store, rng),
            1 => store::halves(store, rng),
            2 => store::transactions(store, rng),
            3 => store::watches(store, rng),
            4 => store::foreign(store, rng),
            5 => store::quota(store, rng),
            6 => rings::disk(store, disk, rng),
            7 => rings::header(disk, rng),
            8 => requests::attack(disk, rng),
            9 => requests::changing(disk, rng),
            10 => pages::attack(k, disk, rng),
            11 => states::offers(store, disk, rng),
            12 => states::moves(store, disk, rng),
            13 => rings::network(store, net, rng),
            14 => packets::attack(k, net, rng),
            15 => packets::changing(net, rng),
            16 => packets::endless(store, net, rng),
            17 => states::jumps(store, disk, net, rng),
            _ => states::storm(store, disk, net, rng),
        }
        // All begins anew and works.
        match family {
            0..6 => {
                if rng.once_in(2) {
                    disk.reconnect(store, 0);
                } else {
                    net.reconnect(store);
                }
            }
            6..13 => disk.reconnect(store, rng.below(3) as u32),
            13..17 => net.reconnect(store),
            _ => {
                disk.reconnect(store, rng.below(3) as u32);
                net.reconnect(store);
            }
        }
        disk.honest(rng.below(blkfront::WINDOW - 8), rng.next() as u32);
        net.honest();
    }
}

/// How it ends, by the seed: the devices are broken; the store's ring is; the directories
/// are gone. What is left works, and waits for its end.
fn end(devices: &mut Devices, rng: &mut Rng, how: u64) -> &'static str {
    let Devices {
        store, disk, net, ..
    } = devices;
    match how {
        0 => {
            rings::disk(store, disk, rng);
            rings::network(store, net, rng);
            "devices-broken"
        }
        1 | 2 => {
            store::break_ring(store, rng, how == 2);
            disk.honest(8, 0x600d);
            net.honest();
            "store-broken"
        }
        _ => {
            for directory in [disk.directory, net.directory] {
                let gone = store.ask(kind::RM, 0, &[directory.bytes(), b"\0"]);
                claim(gone.is_ok(), "a frontend's directory can go");
                let read = store.read(directory.str());
                claim(read.is_err(), "it is gone");
            }
            for backend in [disk.backend_node("state"), net.backend_node("state")] {
                let closed = store.wait(backend.str(), b"6", PATIENCE);
                claim(closed, "a device without a frontend is closed");
            }
            "directories-gone"
        }
    }
}

/// The life of a VM that attacks its devices: `steps` families, each of them once before
/// any comes again.
pub fn run(k: &Kernel, store: (u64, u32), seed: u64, steps: u64) -> ! {
    let mut rng = Rng::new(seed);
    guest::map_grants(k);
    let mut store = Store::new(store.0, store.1);
    let mut devices = Devices {
        disk: Blkfront::new(&mut store, 0, 0),
        other: Blkfront::new(&mut store, 1, DISK_PAGES),
        net: Netfront::new(&mut store, 2 * DISK_PAGES),
        store,
    };
    let Devices {
        store,
        disk,
        other,
        net,
    } = &mut devices;
    disk.connect(store, 0);
    other.connect(store, 0);
    net.connect(store);
    disk.honest(0, 0xb00);
    net.honest();
    // Seeds that follow each other begin with other families, so that a few of a few steps
    // have them all.
    let first = seed.wrapping_mul(10);
    for step in 0..steps {
        let family = if step <= STORM {
            first.wrapping_add(step) % (STORM + 1)
        } else {
            rng.below(STORM + 1)
        };
        let name = FAMILIES.get(family as usize).unwrap_or(&"storm");
        let _ = writeln!(Console, "HOSTILE family={name}");
        devices.attack(k, &mut rng, family);
    }
    // A mark for who looks at the image.
    devices.disk.honest(0, 0x600d_600d);
    let how = end(&mut devices, &mut rng, seed % 4);
    let (asked, requests, packets) = (
        devices.store.asked,
        devices.disk.requests,
        devices.net.requests,
    );
    let _ = writeln!(
        Console,
        "\nHOSTILE-DEVICES seed={seed} families={steps} store={asked} disk={requests} \
         net={packets} end={how}"
    );
    // Until it is told to end, where it can be, or is ended.
    let store = &mut devices.store;
    let port = store.port;
    loop {
        if how != "store-broken" && store.read("control/shutdown") == Ok(b"poweroff") {
            crate::kernel::power_off();
        }
        sleep(port, 50);
    }
}
