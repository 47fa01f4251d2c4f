//! What of physical memory the guest does not reach by itself: the VMM's own, and registers that are watched.
//!
//! None of it is in the nested page tables, so that each access exits.

use bmcast_svm::paging::{self, NoFrames, PRESENT, USER, WRITABLE};
use core::sync::atomic::{AtomicU64, Ordering};
use spin::Mutex;

use super::apic;
use super::memory::{PAGE, Tables};
use super::pci::Function;

/// What an address belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Window {
    /// The VMM's memory: reads as zeros.
    Own,
    /// A register of the local APIC.
    Apic(u32),
    /// The configuration of the VMM's network card: as if nothing were there.
    Hidden,
    /// The configuration of the disk's controller.
    Controller,
    /// A register of the disk's controller.
    Device(u32),
}

#[derive(Clone, Copy, Default)]
struct Range {
    from: u64,
    to: u64,
}

impl Range {
    fn has(self, address: u64) -> bool {
        (self.from..self.to).contains(&address)
    }
}

#[derive(Clone, Copy, Default)]
struct Windows {
    root: u64,
    own: Range,
    start: Range,
    hidden: Range,
    /// What the hidden function answers to; few have more than three.
    hidden_regions: [Range; 6],
    controller: Range,
    device: Range,
    register: u8,
}

static WINDOWS: Mutex<Option<Windows>> = Mutex::new(None);

/// Counts changes of the nested tables; a CPU that has seen fewer flushes its TLB.
pub static CHANGES: AtomicU64 = AtomicU64::new(0);

/// What the VMM has for itself.
pub struct Layout {
    /// Root of the nested page tables.
    pub root: u64,
    /// The region: begin and end.
    pub region: (u64, u64),
    /// The page where CPUs start.
    pub start: u64,
}

/// Takes the VMM's own memory and the APIC's page away from the guest.
pub fn open(layout: &Layout) -> Result<(), NoFrames> {
    let page = |from: u64| Range {
        from,
        to: from + bytes(PAGE),
    };
    let windows = Windows {
        root: layout.root,
        own: Range {
            from: layout.region.0,
            to: layout.region.1,
        },
        start: page(layout.start),
        ..Windows::default()
    };
    close_range(layout.root, windows.own)?;
    close_range(layout.root, windows.start)?;
    close_range(layout.root, page(apic::PAGE))?;
    *WINDOWS.lock() = Some(windows);
    Ok(())
}

/// Hides a function's page of configuration, and watches another's; `base` is where they are in memory.
pub fn configuration(
    base: u64,
    hidden: Option<Function>,
    controller: Function,
) -> Result<(), NoFrames> {
    let mut windows = WINDOWS.lock();
    let Some(windows) = windows.as_mut() else {
        return Ok(());
    };
    let page = |function: Function| Range {
        from: function.page(base),
        to: function.page(base) + bytes(PAGE),
    };
    windows.controller = page(controller);
    close_range(windows.root, windows.controller)?;
    if let Some(hidden) = hidden {
        windows.hidden = page(hidden);
        close_range(windows.root, windows.hidden)?;
    }
    Ok(())
}

/// Hides memory that a function answers to.
pub fn hide(regions: &[(u64, u64)]) -> Result<(), NoFrames> {
    let mut windows = WINDOWS.lock();
    let Some(windows) = windows.as_mut() else {
        return Ok(());
    };
    for (hidden, (from, length)) in windows.hidden_regions.iter_mut().zip(regions) {
        // Nothing else is in a page that a function has a part of.
        *hidden = Range {
            from: from & !0xfff,
            to: (from + length).next_multiple_of(bytes(PAGE)),
        };
        close_range(windows.root, *hidden)?;
    }
    Ok(())
}

/// Watches the controller's registers, `length` bytes at `base`, where base address register `number` says.
pub fn device(base: u64, length: u64, number: u8) -> Result<(), NoFrames> {
    if let Some(windows) = WINDOWS.lock().as_mut() {
        windows.register = number;
        windows.device.to = windows.device.from + length;
    }
    move_device(base)
}

/// The base address register that says where the controller is.
pub fn register() -> u8 {
    WINDOWS.lock().map_or(0, |windows| windows.register)
}

/// Where the controller's configuration is in memory, if it is.
pub fn controller_page() -> Option<u64> {
    let page = (*WINDOWS.lock())?.controller.from;
    (page != 0).then_some(page)
}

/// Watches the controller's registers at `base` from now on.
pub fn move_device(base: u64) -> Result<(), NoFrames> {
    let mut windows = WINDOWS.lock();
    let Some(windows) = windows.as_mut() else {
        return Ok(());
    };
    let device = Range {
        from: base,
        to: base + (windows.device.to - windows.device.from),
    };
    if windows.device.from != device.from {
        let old = windows.device;
        for page in (old.from..old.to).step_by(PAGE).filter(|_| old.from != 0) {
            paging::set(
                &mut Tables,
                windows.root,
                page,
                page,
                PRESENT | WRITABLE | USER,
            )?;
        }
        close_range(windows.root, device)?;
        windows.device = device;
        CHANGES.fetch_add(1, Ordering::AcqRel);
    }
    Ok(())
}

/// Where the device's registers are watched.
pub fn device_base() -> u64 {
    WINDOWS.lock().map_or(0, |windows| windows.device.from)
}

fn close_range(root: u64, range: Range) -> Result<(), NoFrames> {
    (range.from..range.to)
        .step_by(PAGE)
        .try_for_each(|page| paging::set(&mut Tables, root, page, 0, 0))
}

fn bytes(count: usize) -> u64 {
    u64::try_from(count).unwrap_or(0)
}

/// What is at an address.
pub fn at(address: u64) -> Option<Window> {
    if let Some(offset) = apic::offset(address) {
        return Some(Window::Apic(offset));
    }
    let windows = (*WINDOWS.lock())?;
    if windows.device.has(address) {
        let offset = u32::try_from(address - windows.device.from).ok()?;
        return Some(Window::Device(offset));
    }
    if windows.own.has(address) || windows.start.has(address) {
        Some(Window::Own)
    } else if windows.hidden.has(address)
        || windows
            .hidden_regions
            .iter()
            .any(|range| range.has(address))
    {
        Some(Window::Hidden)
    } else if windows.controller.has(address) {
        Some(Window::Controller)
    } else {
        None
    }
}

/// Whether `bytes` bytes at `address` are outside of the VMM's memory.
pub fn is_guests(address: u64, bytes: u64) -> bool {
    let Some(end) = address.checked_add(bytes) else {
        return false;
    };
    let Some(windows) = *WINDOWS.lock() else {
        return false;
    };
    [windows.own, windows.start]
        .iter()
        .chain(&windows.hidden_regions)
        .all(|range| end <= range.from || address >= range.to)
}
