//! The machine under the guest: its mediated disk, the network that the image comes by, and what is where.

use alloc::boxed::Box;
use core::sync::atomic::{AtomicU32, Ordering};

use bmcast_install::Install;
use bmcast_mediator::{Mediator, OWN_MEMORY, Platform};
use spin::Mutex;

use super::exits::{read_device, write_device};
use super::memory::{self, PAGE, address, pointer};
use super::network::Network;
use super::pci::{self, Function};
use super::vcpu::{EXITS, LEAVE};
use super::windows::{self, is_guests};
use super::{clock, cpu};
use crate::say;

/// The disk's controller as a mediator touches it.
pub struct Controller {
    own: &'static mut [u8],
}

impl Controller {
    /// With memory for DMA; none when it is used up.
    pub fn new() -> Option<Self> {
        let own = memory::bytes(OWN_MEMORY.div_ceil(PAGE))?;
        Some(Self { own })
    }
}

impl Platform for Controller {
    fn read_register(&mut self, offset: u32, width: u8) -> u64 {
        read_device(windows::device_base() + u64::from(offset), width)
    }

    fn write_register(&mut self, offset: u32, width: u8, value: u64) {
        write_device(windows::device_base() + u64::from(offset), width, value);
    }

    fn read_memory(&mut self, address: u64, into: &mut [u8]) -> bool {
        let there = is_memory(address, into.len());
        if there {
            // SAFETY: physical memory is mapped to itself, the range is the guest's and no register of a device. The
            // guest may write it meanwhile: bytes are bytes.
            unsafe {
                core::ptr::copy_nonoverlapping(
                    pointer::<u8>(address),
                    into.as_mut_ptr(),
                    into.len(),
                );
            }
        }
        there
    }

    fn write_memory(&mut self, address: u64, from: &[u8]) -> bool {
        let there = is_memory(address, from.len());
        if there {
            // SAFETY: as in `read_memory`; nothing of the VMM's is there.
            unsafe {
                core::ptr::copy_nonoverlapping(from.as_ptr(), pointer::<u8>(address), from.len());
            }
        }
        there
    }

    fn own_address(&self) -> u64 {
        address(self.own.as_ptr())
    }

    fn own_memory(&mut self) -> &mut [u8] {
        self.own
    }

    fn now(&self) -> u64 {
        clock::micros()
    }
}

/// Whether a range is memory of the guest's: in the CPU's physical width, and none of the VMM's.
fn is_memory(address: u64, bytes: usize) -> bool {
    let bytes = u64::try_from(bytes).unwrap_or(u64::MAX);
    let end = 1u64 << super::host::width().bits.min(48);
    address.checked_add(bytes).is_some_and(|to| to <= end) && is_guests(address, bytes)
}

/// What makes a mediator one of this machine's.
pub type Disk = dyn Mediator<Controller, Install> + Send;

/// Everything that is used by whichever CPU is in the VMM.
pub struct Machine {
    /// The mediator.
    pub disk: Box<Disk>,
    /// Its controller.
    pub controller: Controller,
    /// Where the truth is.
    pub install: Install,
    /// Where the image comes from.
    pub network: Network,
}

static MACHINE: Mutex<Option<Machine>> = Mutex::new(None);
/// The function of the disk's controller, and of the hidden card: in the form of [`number`].
static CONTROLLER: AtomicU32 = AtomicU32::new(0);
static HIDDEN: AtomicU32 = AtomicU32::new(0);

/// A function as one number, which is not 0.
fn number(function: Function) -> u32 {
    u32::from_le_bytes([1, function.bus, function.device, function.function])
}

fn function(number: u32) -> Option<Function> {
    let [there, bus, device, function] = number.to_le_bytes();
    (there == 1).then_some(Function {
        bus,
        device,
        function,
    })
}

/// Has it for the guest from now on.
pub fn begin(machine: Machine, controller: Function, hidden: Function) {
    CONTROLLER.store(number(controller), Ordering::Release);
    HIDDEN.store(number(hidden), Ordering::Release);
    *MACHINE.lock() = Some(machine);
}

/// Whether what was written to the address port names the hidden card.
pub fn is_hidden(named: u32) -> bool {
    function(HIDDEN.load(Ordering::Acquire)).is_some_and(|function| function.is_named(named))
}

/// Whether it names the disk's controller.
pub fn is_controller(named: u32) -> bool {
    function(CONTROLLER.load(Ordering::Acquire)).is_some_and(|function| function.is_named(named))
}

/// The guest has written to the controller's configuration: its registers may be elsewhere now.
pub fn follow() {
    let number = windows::register();
    let base = if let Some(page) = windows::controller_page() {
        pci::bar(number, |register| {
            let [value, _] = cpu::halves(read_device(page + u64::from(register), 4));
            value
        })
    } else {
        // The guest is at the data port: the address port names this function, and is left so.
        function(CONTROLLER.load(Ordering::Acquire)).and_then(|controller| controller.bar(number))
    };
    if let Some(base) = base
        && let Err(error) = windows::move_device(base)
    {
        say!("the disk's controller is at {base:#x} now: {error}");
    }
}

/// The guest reads a register of the controller's.
pub fn read(offset: u32, width: u8) -> u64 {
    let mut machine = MACHINE.lock();
    let Some(machine) = machine.as_mut() else {
        return read_device(windows::device_base() + u64::from(offset), width);
    };
    let (controller, install) = (&mut machine.controller, &mut machine.install);
    machine.disk.read(controller, install, offset, width)
}

/// The guest writes one.
pub fn write(offset: u32, width: u8, value: u64) {
    let mut machine = MACHINE.lock();
    let Some(machine) = machine.as_mut() else {
        write_device(windows::device_base() + u64::from(offset), width, value);
        return;
    };
    let (controller, install) = (&mut machine.controller, &mut machine.install);
    machine
        .disk
        .write(controller, install, offset, width, value);
}

/// Does something while no CPU is at the machine.
pub fn alone(act: impl FnOnce()) {
    let _machine = MACHINE.lock();
    act();
}

/// Goes on with whatever can go on, unless another CPU does just now.
pub fn turn() {
    let Some(mut locked) = MACHINE.try_lock() else {
        return;
    };
    let Some(machine) = locked.as_mut() else {
        return;
    };
    machine.turn();
    if machine.install.complete() && machine.disk.transparent() {
        let exits = EXITS.load(Ordering::Relaxed);
        if machine.network.farewell(&machine.install) {
            say!("all is on the disk, after {exits} exits: leaving");
            *locked = None;
            LEAVE.store(true, Ordering::Release);
        }
    }
}

impl Machine {
    fn turn(&mut self) {
        self.install.tick(clock::micros());
        self.network.turn(&mut self.install);
        self.disk.poll(&mut self.controller, &mut self.install);
    }
}
