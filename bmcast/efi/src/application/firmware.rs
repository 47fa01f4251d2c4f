//! What the firmware knows of the machine: CPUs, disks, where PCI configuration is in memory.

use alloc::string::String;
use alloc::vec::Vec;
use core::ffi::c_void;
use core::time::Duration;

use bmcast_image::{SECTOR, Sectors};
use uefi::boot::{self, OpenProtocolAttributes, OpenProtocolParams, ScopedProtocol, SearchType};
use uefi::proto::device_path::DevicePath;
use uefi::proto::device_path::DevicePathNodeEnum;
use uefi::proto::media::block::BlockIO;
use uefi::proto::network::snp::SimpleNetwork;
use uefi::proto::nvme::pass_thru::NvmePassThru;
use uefi::proto::nvme::{NvmeQueueType, NvmeRequestBuilder};
use uefi::proto::pi::mp::MpServices;
use uefi::proto::unsafe_protocol;
use uefi::{Handle, Identify as _, Status};

use super::memory::pointer;
use super::pci::Function;

/// What the firmware refuses.
#[derive(Debug, thiserror::Error)]
#[error("the firmware, {what}: {status}")]
pub struct Refused {
    what: &'static str,
    status: Status,
}

fn at(what: &'static str) -> impl Fn(uefi::Error) -> Refused {
    move |error| Refused {
        what,
        status: error.status(),
    }
}

/// EFI_PCI_IO_PROTOCOL (UEFI 2.10, 14.4), as much of it as is used.
#[repr(C)]
#[unsafe_protocol("4cf5b200-68b8-4ca5-9eec-b23e3f50029a")]
pub struct PciIo {
    others: [*const c_void; 14],
    get_location: unsafe extern "efiapi" fn(
        *const PciIo,
        *mut usize,
        *mut usize,
        *mut usize,
        *mut usize,
    ) -> Status,
}

/// A protocol that somebody else may have open too.
fn open<P: uefi::proto::ProtocolPointer + ?Sized>(
    handle: Handle,
) -> Result<ScopedProtocol<P>, uefi::Error> {
    let params = OpenProtocolParams {
        handle,
        agent: boot::image_handle(),
        controller: None,
    };
    // SAFETY: only read, by the one CPU that runs, while nothing else does.
    unsafe { boot::open_protocol(params, OpenProtocolAttributes::GetProtocol) }
}

/// The function that a handle stands for.
fn location(handle: Handle) -> Option<Function> {
    let pci = open::<PciIo>(handle).ok()?;
    let (mut segment, mut bus, mut device, mut function) = (0, 0, 0, 0);
    // SAFETY: the protocol's own function, with room for its four numbers.
    let status = unsafe {
        (pci.get_location)(
            &raw const *pci,
            &mut segment,
            &mut bus,
            &mut device,
            &mut function,
        )
    };
    if status != Status::SUCCESS || segment != 0 {
        return None;
    }
    Some(Function {
        bus: u8::try_from(bus).ok()?,
        device: u8::try_from(device).ok()?,
        function: u8::try_from(function).ok()?,
    })
}

/// Handles of all PCI functions, with these.
pub fn functions() -> Vec<(Handle, Function)> {
    let handles = boot::locate_handle_buffer(SearchType::ByProtocol(&PciIo::GUID));
    let handles = handles.map(|handles| handles.to_vec()).unwrap_or_default();
    let located = handles
        .into_iter()
        .filter_map(|handle| Some((handle, location(handle)?)));
    located.collect()
}

/// How a disk is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Port {
    /// A port of an AHCI controller.
    Ahci(u16),
    /// A namespace of an NVMe controller.
    Nvme(u32),
}

/// A disk that the firmware has found.
pub struct Disk {
    block: ScopedProtocol<BlockIO>,
    /// Its controller's handle.
    pub handle: Handle,
    /// Its controller.
    pub controller: Function,
    /// How it is reached there.
    pub port: Port,
    /// Its sectors of 512 bytes.
    pub sectors: u64,
}

/// Has the drivers of all devices started: firmware that boots quickly starts those that it needs.
pub fn connect_all() {
    for (handle, _) in functions() {
        // Those without a driver say so: no matter.
        let _ = boot::connect_controller(handle, &[], None, true);
    }
}

/// Has the firmware's drivers let a network card go: first what stands on its interfaces, then these, then itself. What they
/// answer is no matter: a driver that stays does not reach the card any more once there is a guest.
pub fn let_go(function: Function) {
    let path = |handle| open::<DevicePath>(handle).map(|path| path.as_bytes().to_vec());
    for (handle, _) in functions()
        .into_iter()
        .filter(|(_, found)| *found == function)
    {
        let Ok(card) = path(handle) else { continue };
        // Without the node that ends every path.
        let card = &card[..card.len().saturating_sub(4)];
        for network in boot::find_handles::<SimpleNetwork>().unwrap_or_default() {
            if path(network).is_ok_and(|path| path.starts_with(card)) {
                let _ = boot::disconnect_controller(network, None, None);
                if let Ok(mut interface) = open::<SimpleNetwork>(network) {
                    let _ = interface.shutdown();
                    let _ = interface.stop();
                }
            }
        }
        let _ = boot::disconnect_controller(handle, None, None);
    }
}

/// EFI_DISK_INFO_PROTOCOL (PI 1.7, volume 5, 10.7), as much of it as is used.
#[repr(C)]
#[unsafe_protocol("d432a67f-14dc-484b-b3bb-3f0291849327")]
struct DiskInfo {
    interface: uefi::Guid,
    inquiry: *const c_void,
    identify: unsafe extern "efiapi" fn(*const DiskInfo, *mut c_void, *mut u32) -> Status,
}

/// The serial number of an ATA disk: words 10 to 19 of its identity, two letters each, the first one above (ACS-4,
/// 7.13.6.7).
fn serial(handle: Handle) -> Option<String> {
    let info = open::<DiskInfo>(handle).ok()?;
    let mut identity = [0u8; 512];
    let mut size = 512;
    let into = identity.as_mut_ptr().cast();
    // SAFETY: the protocol's own function, with room for as many bytes as it is told of.
    let status = unsafe { (info.identify)(&raw const *info, into, &mut size) };
    if status != Status::SUCCESS || size < 40 {
        return None;
    }
    let letters = identity[20..40]
        .chunks_exact(2)
        .flat_map(|pair| [pair[1], pair[0]])
        .map(char::from);
    let text: String = letters.collect();
    Some(text.trim_matches([' ', '\0']).into())
}

/// The serial number of an NVMe controller: bytes 4 to 23 of what it says of itself (NVMe 1.4, figure 247).
fn controller_serial(handle: Handle) -> Option<String> {
    /// Identify, of the controller.
    const IDENTIFY: u8 = 6;
    const CONTROLLER: u32 = 1;
    let nvme = open::<NvmePassThru>(handle).ok()?;
    let request = NvmeRequestBuilder::new(nvme.io_align(), IDENTIFY, NvmeQueueType::ADMIN)
        .with_timeout(Duration::from_secs(1))
        .with_cdw10(CONTROLLER)
        .with_transfer_buffer(4096)
        .ok()?
        .build();
    let response = nvme.controller().execute_command(request).ok()?;
    let letters = response.transfer_buffer()?.get(4..24)?;
    let text: String = letters.iter().copied().map(char::from).collect();
    Some(text.trim_matches([' ', '\0']).into())
}

/// The first disk that can be mediated and is the wanted one.
pub fn disk(wanted: &bmcast_image::Disk) -> Result<Option<Disk>, Refused> {
    let controllers = functions();
    for handle in boot::find_handles::<BlockIO>().map_err(at("disks"))? {
        let Ok(block) = open::<BlockIO>(handle) else {
            continue;
        };
        let media = block.media();
        if media.is_logical_partition() || !media.is_media_present() || media.is_read_only() {
            continue;
        }
        let Ok(path) = open::<DevicePath>(handle) else {
            continue;
        };
        let port = path.node_iter().find_map(|node| match node.as_enum() {
            Ok(DevicePathNodeEnum::MessagingSata(sata)) => Some(Port::Ahci(sata.hba_port_number())),
            Ok(DevicePathNodeEnum::MessagingNvmeNamespace(nvme)) => {
                Some(Port::Nvme(nvme.namespace_identifier()))
            }
            _ => None,
        });
        let Some(port) = port else { continue };
        // The mediator counts sectors of 512 bytes, as commands do on such disks only.
        if matches!(port, Port::Ahci(_)) && u64::from(media.block_size()) != SECTOR {
            continue;
        }
        // Its controller's handle is the nearest one above that is a PCI function.
        let mut above: &DevicePath = &path;
        let Ok(parent) = boot::locate_device_path::<PciIo>(&mut above) else {
            continue;
        };
        let Some((_, controller)) = controllers.iter().find(|(handle, _)| *handle == parent) else {
            continue;
        };
        if let bmcast_image::Disk::Serial(wanted) = wanted {
            let found = match port {
                Port::Ahci(_) => serial(handle),
                Port::Nvme(_) => controller_serial(parent),
            };
            if found.as_ref() != Some(wanted) {
                continue;
            }
        }
        let size = u64::from(media.block_size());
        let sectors = media.last_block().saturating_add(1).saturating_mul(size) / SECTOR;
        return Ok(Some(Disk {
            handle: parent,
            controller: *controller,
            port,
            sectors,
            block,
        }));
    }
    Ok(None)
}

impl Disk {
    /// Whether nothing is where a partition table would be.
    pub fn is_blank(&mut self) -> Result<bool, Refused> {
        let mut start = [0; 8 << 10];
        let sectors = Sectors {
            start: 0,
            count: 16,
        };
        self.read(sectors, &mut start)?;
        Ok(start.iter().all(|byte| *byte == 0))
    }

    /// Reads sectors through the firmware.
    pub fn read(&mut self, sectors: Sectors, into: &mut [u8]) -> Result<(), Refused> {
        let media = self.block.media();
        let (id, size) = (media.media_id(), u64::from(media.block_size()).max(1));
        let lba = sectors.start * SECTOR / size;
        let read = self.block.read_blocks(id, lba, into);
        read.map_err(at("reading the disk"))
    }
}

/// The CPUs' APIC IDs.
pub fn apic_ids() -> Result<Vec<u8>, Refused> {
    let handle = boot::get_handle_for_protocol::<MpServices>().map_err(at("CPUs"))?;
    let services = open::<MpServices>(handle).map_err(at("CPUs"))?;
    let count = services
        .get_number_of_processors()
        .map_err(at("CPUs"))?
        .total;
    (0..count)
        .map(|number| {
            let info = services.get_processor_info(number).map_err(at("CPUs"))?;
            // Only APIC IDs of 8 bits are used.
            Ok(info.processor_id.to_le_bytes()[0])
        })
        .collect()
}

/// Addresses of the ACPI tables that the XSDT lists (ACPI 6.4, 5.2.5.3 and 5.2.8).
fn tables() -> Vec<u64> {
    let root = uefi::system::with_config_table(|tables| {
        let wanted = [
            uefi::table::cfg::ConfigTableEntry::ACPI2_GUID,
            uefi::table::cfg::ConfigTableEntry::ACPI_GUID,
        ];
        wanted.iter().find_map(|guid| {
            let entry = tables.iter().find(|table| table.guid == *guid)?;
            Some(super::memory::address(entry.address))
        })
    });
    let Some(root) = root else {
        return Vec::new();
    };
    let xsdt = word(root + 24);
    let length = u64::from(dword(xsdt + 4)).min(1 << 16);
    (36..length).step_by(8).map(|at| word(xsdt + at)).collect()
}

/// Whether a table has this signature.
fn is(table: u64, signature: [u8; 4]) -> bool {
    dword(table) == u32::from_le_bytes(signature)
}

/// Where the PCI configuration of bus 0 is in memory, if it is (MCFG).
pub fn configuration() -> Option<u64> {
    let table = tables().into_iter().find(|table| is(*table, *b"MCFG"))?;
    Some(word(table + 44))
}

/// Has the OS not find the machine's IOMMUs: their tables (DMAR, IVRS) get a signature that nobody knows. The OS would have them
/// translate what the VMM's own commands and its network card access, and these would fail. Whether there were any.
///
/// # Safety
///
/// Nobody uses the tables meanwhile, and the OS is not to use these any more.
pub unsafe fn hide_iommus() -> bool {
    let found = tables()
        .into_iter()
        .filter(|table| is(*table, *b"DMAR") || is(*table, *b"IVRS"));
    let mut any = false;
    for table in found {
        // SAFETY: as the caller says; a table has a signature of four bytes and a checksum at 9 (ACPI 6.4, 5.2.6), and the sum of all its
        // bytes stays 0.
        unsafe {
            let first = pointer::<u8>(table);
            let sum = pointer::<u8>(table + 9);
            let changed = b'X'.wrapping_sub(first.read());
            first.write(b'X');
            sum.write(sum.read().wrapping_sub(changed));
        }
        any = true;
    }
    any
}

/// The firmware's tables are where it says.
fn word(address: u64) -> u64 {
    // SAFETY: all physical memory is mapped to itself, and reading memory has no effect.
    unsafe { pointer::<u64>(address).read_unaligned() }
}

fn dword(address: u64) -> u32 {
    // SAFETY: as in `word`.
    unsafe { pointer::<u32>(address).read_unaligned() }
}

/// The file `name` beside the application, from the volume that it came from.
pub fn file(name: &uefi::CStr16) -> Result<Vec<u8>, String> {
    let volume = boot::get_image_file_system(boot::image_handle())
        .map_err(|error| alloc::format!("the boot medium: {}", error.status()))?;
    let mut volume = uefi::fs::FileSystem::new(volume);
    volume
        .read(name)
        .map_err(|error| alloc::format!("{name}: {error}"))
}
