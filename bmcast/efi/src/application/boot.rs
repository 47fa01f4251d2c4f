//! The application as the firmware has loaded it.

use alloc::string::String;
use alloc::vec::Vec;

use uefi::boot::{self, AllocateType, LoadImageSource, MemoryType};
use uefi::proto::BootPolicy;
use uefi::proto::device_path::DevicePath;
use uefi::proto::device_path::build::{DevicePathBuilder, media::FilePath};
use uefi::proto::loaded_image::LoadedImage;
use uefi::proto::media::fs::SimpleFileSystem;
use uefi::{CStr16, Handle, Status, cstr16, entry, println};

use super::memory::{self, PAGE, address};
use super::resident::{self, Failure, Handover};
use super::{cpu, heap, relocate, switch};

/// Bytes of the VMM's region.
const REGION: usize = 64 << 20;
/// Bytes of the application's heap.
const HEAP: usize = 4 << 20;

#[entry]
fn main() -> Status {
    match start() {
        Ok(()) => Status::SUCCESS,
        Err(error) => {
            println!("bmcast: {error}");
            Status::ABORTED
        }
    }
}

#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("the firmware, {0}: {1}")]
    Firmware(&'static str, Status),
    #[error("this program cannot be copied: its {0}")]
    Malformed(&'static str),
    #[error("{0}")]
    Resident(String),
    #[error("no disk has a loader ({LOADER})")]
    NoLoader,
}

fn start() -> Result<(), Error> {
    let at = |what| move |error: uefi::Error| Error::Firmware(what, error.status());
    let memory = boot::allocate_pages(AllocateType::AnyPages, MemoryType::LOADER_DATA, HEAP / PAGE)
        .map_err(at("memory"))?;
    // SAFETY: the firmware has just given it, and the heap has nothing yet.
    unsafe { heap::give(memory.as_ptr(), HEAP) };
    let (base, size) = {
        let image = boot::open_protocol_exclusive::<LoadedImage>(boot::image_handle())
            .map_err(at("its own image"))?;
        let (base, size) = image.info();
        (base.cast::<u8>(), usize::try_from(size).unwrap_or(0))
    };
    // Below 4 GiB, since CPUs that start load its page tables in 32 bits.
    let region = boot::allocate_pages(
        AllocateType::MaxAddress(0xffff_ffff),
        MemoryType::RESERVED,
        REGION / PAGE,
    )
    .map_err(at("memory of the VMM"))?;
    let start_page =
        boot::allocate_pages(AllocateType::MaxAddress(0xf_ffff), MemoryType::RESERVED, 1)
            .map_err(at("a page below 1 MiB"))?;
    // SAFETY: this application as the firmware has loaded it, and memory that nobody else has.
    unsafe { relocate::copy(base, size, region.as_ptr()) }
        .map_err(|malformed| Error::Malformed(malformed.0))?;
    let used = size.next_multiple_of(PAGE);
    let mut handover = Handover {
        system_table: uefi::table::system_table_raw().map_or(0, |table| address(table.as_ptr())),
        image: address(boot::image_handle().as_ptr()),
        region: address(region.as_ptr()),
        bytes: u64::try_from(REGION).unwrap_or(0),
        used: u64::try_from(used).unwrap_or(0),
        start_page: address(start_page.as_ptr()),
        disk: 0,
        failure: Failure {
            length: 0,
            text: [0; 256],
        },
    };
    let offset = address(resident::enter as *const ()) - address(base);
    let entry = handover.region + offset;
    // SAFETY: `enter` in the copy.
    let status = unsafe { switch::call_resident(entry, address(&raw mut handover)) };
    if status != 0 {
        let text = &handover.failure.text[..handover.failure.length];
        return Err(Error::Resident(String::from_utf8_lossy(text).into_owned()));
    }
    // SAFETY: the handle is one that the firmware has given to the copy.
    let disk = unsafe { Handle::from_ptr(memory::pointer(handover.disk)) };
    start_os(disk)
}

/// What firmware starts from a disk that it has no boot entry for (UEFI 2.10, 3.5.1.1).
const LOADER: &CStr16 = cstr16!("\\EFI\\BOOT\\BOOTX64.EFI");

/// Starts the OS from the first volume that has a loader and is not the one that this application came from.
///
/// What the firmware has read of the disk before it was mediated is forgotten.
fn start_os(disk: Option<Handle>) -> Result<(), Error> {
    let at = |what| move |error: uefi::Error| Error::Firmware(what, error.status());
    let own = boot::open_protocol_exclusive::<LoadedImage>(boot::image_handle())
        .map_err(at("its own image"))?
        .device();
    if let Some(disk) = disk {
        boot::disconnect_controller(disk, None, None).map_err(at("letting go of the disk"))?;
        boot::connect_controller(disk, &[], None, true).map_err(at("finding the disk again"))?;
    }
    let volumes = boot::find_handles::<SimpleFileSystem>().map_err(at("file systems"))?;
    for volume in volumes {
        if Some(volume) == own {
            continue;
        }
        let Ok(path) = boot::open_protocol_exclusive::<DevicePath>(volume) else {
            continue;
        };
        let mut buffer = Vec::new();
        let builder = path
            .node_iter()
            .try_fold(DevicePathBuilder::with_vec(&mut buffer), |builder, node| {
                builder.push(&node)
            });
        let Ok(whole) = builder
            .and_then(|builder| builder.push(&FilePath { path_name: LOADER }))
            .and_then(DevicePathBuilder::finalize)
        else {
            continue;
        };
        let source = LoadImageSource::FromDevicePath {
            device_path: whole,
            boot_policy: BootPolicy::ExactMatch,
        };
        match boot::load_image(boot::image_handle(), source) {
            Ok(loader) => return boot::start_image(loader).map_err(at("the loader on the disk")),
            Err(error) if error.status() == Status::NOT_FOUND => {}
            Err(error) => return Err(at("a loader")(error)),
        }
    }
    Err(Error::NoLoader)
}

#[panic_handler]
fn panicked(info: &core::panic::PanicInfo<'_>) -> ! {
    super::log::to_serial(true);
    crate::say!("{info}");
    cpu::stop()
}
