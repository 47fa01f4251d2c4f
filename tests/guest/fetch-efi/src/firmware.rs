//! What is asked of the firmware.

use alloc::string::String;
use alloc::vec::Vec;
use core::ptr::NonNull;
use core::time::Duration;

use bmcast_net::{DMA_BYTES, Dma, Function};
use linked_list_allocator::LockedHeap;
use uefi::boot::{self, AllocateType, ScopedProtocol};
use uefi::mem::memory_map::MemoryType;
use uefi::proto::device_path::DevicePath;
use uefi::proto::network::snp::SimpleNetwork;
use uefi::proto::{ProtocolPointer, unsafe_protocol};
use uefi::{CString16, Handle, Status};

use crate::{machine, say};

#[global_allocator]
static HEAP: LockedHeap = LockedHeap::empty();

const HEAP_BYTES: usize = 32 << 20;

/// `EFI_PCI_IO_PROTOCOL` (UEFI 2.10, section 14.4.2), as far as it is needed.
#[repr(C)]
#[unsafe_protocol("4cf5b200-68b8-4ca5-9eec-b23e3f50029a")]
pub struct PciIo {
    /// From `PollMem` to `Flush`.
    before: [usize; 14],
    location: unsafe extern "efiapi" fn(
        this: *const PciIo,
        segment: *mut usize,
        bus: *mut usize,
        device: *mut usize,
        function: *mut usize,
    ) -> Status,
}

fn pages(bytes: usize) -> NonNull<u8> {
    boot::allocate_pages(
        AllocateType::AnyPages,
        MemoryType::RESERVED,
        bytes.div_ceil(4096),
    )
    .expect("the firmware has memory")
}

/// A heap that is there without boot services too.
pub fn start_heap() {
    let base = pages(HEAP_BYTES);
    // SAFETY: it was just allocated, for ever.
    unsafe { HEAP.lock().init(base.as_ptr(), HEAP_BYTES) }
}

/// Memory for a card.
pub fn dma() -> Dma {
    let base = pages(DMA_BYTES);
    // SAFETY: it was just allocated, for ever, in pages; the firmware maps memory where it is.
    unsafe { Dma::new(base, base.as_ptr() as u64, DMA_BYTES) }
}

/// Ticks of the time stamp counter in a microsecond.
pub fn clock() -> u64 {
    let begin = machine::ticks();
    boot::stall(Duration::from_millis(100));
    (machine::ticks() - begin) / 100_000
}

/// A file beside this application.
pub fn read(name: &str) -> String {
    let mut fs = uefi::fs::FileSystem::new(
        boot::get_image_file_system(boot::image_handle()).expect("a file system"),
    );
    let name = CString16::try_from(name).expect("a name");
    let bytes: Vec<u8> = fs.read(&*name).expect("the file");
    String::from_utf8(bytes).expect("text")
}

/// All PCI functions that the firmware knows.
pub fn functions() -> Vec<(Handle, Function)> {
    let handles = boot::find_handles::<PciIo>().unwrap_or_default();
    handles
        .into_iter()
        .filter_map(|handle| Some((handle, function(handle)?)))
        .collect()
}

fn function(handle: Handle) -> Option<Function> {
    let (mut segment, mut bus, mut device, mut function) = (0, 0, 0, 0);
    let io = open::<PciIo>(handle)?;
    // SAFETY: the protocol's own function, with places for its four results.
    let status = unsafe {
        (io.location)(
            &raw const *io,
            &raw mut segment,
            &raw mut bus,
            &raw mut device,
            &raw mut function,
        )
    };
    status.is_success().then_some(())?;
    Some(Function {
        segment: segment.try_into().ok()?,
        bus: bus.try_into().ok()?,
        device: device.try_into().ok()?,
        function: function.try_into().ok()?,
    })
}

/// Takes a function from the firmware's drivers: they are stopped, and cannot come back.
///
/// OVMF's driver of virtio-net refuses to be stopped while its network interface is started. So
/// what uses the interface is disconnected, the interface stopped, and then the function is opened exclusively,
/// at which the firmware disconnects the driver.
pub fn take(handle: Handle) -> ScopedProtocol<PciIo> {
    let before = networks();
    let card = path(handle);
    for network in boot::find_handles::<SimpleNetwork>().unwrap_or_default() {
        if !path(network).starts_with(&card) {
            continue;
        }
        let disconnected = boot::disconnect_controller(network, None, None);
        let stopped = open::<SimpleNetwork>(network).map(|mut interface| {
            let down = interface.shutdown();
            (down, interface.stop())
        });
        say!(
            "FETCH its interface: disconnected {disconnected:?}, shut down and stopped {stopped:?}"
        );
    }
    let disconnected = boot::disconnect_controller(handle, None, None);
    say!("FETCH the card: disconnected {disconnected:?}");
    let held = boot::open_protocol_exclusive::<PciIo>(handle).expect("the card is given");
    say!(
        "FETCH the firmware had {before} network interfaces, and has {}",
        networks()
    );
    held
}

/// The nodes of a handle's device path, without the last one, which is the end.
fn path(handle: Handle) -> Vec<u8> {
    let Some(path) = open::<DevicePath>(handle) else {
        return Vec::new();
    };
    let bytes = path.as_bytes();
    bytes[..bytes.len().saturating_sub(4)].to_vec()
}

/// A protocol of a handle, whoever else uses it.
fn open<P: ProtocolPointer + ?Sized>(handle: Handle) -> Option<ScopedProtocol<P>> {
    let parameters = boot::OpenProtocolParams {
        handle,
        agent: boot::image_handle(),
        controller: None,
    };
    // SAFETY: this program runs alone, and drops it before anybody else runs.
    unsafe { boot::open_protocol::<P>(parameters, boot::OpenProtocolAttributes::GetProtocol) }.ok()
}

/// Asks the firmware's drivers to come back to a function; how many network interfaces there are then.
pub fn connect_again(handle: Handle) -> usize {
    let connected = boot::connect_controller(handle, &[], None, true);
    let networks = networks();
    say!(
        "FETCH connected again: {:?}, {networks} network interfaces",
        connected.map_err(|error| error.status()),
    );
    networks
}

fn networks() -> usize {
    boot::find_handles::<SimpleNetwork>().map_or(0, |handles| handles.len())
}

/// Leaves boot services.
pub fn leave() {
    // SAFETY: nothing of them is used afterwards: heap, serial port and card are this program's own.
    let map = unsafe { boot::exit_boot_services(None) };
    core::mem::forget(map);
}
