//! The copy in reserved memory: sets everything up while the firmware is there, then becomes the host of what called it.

use alloc::boxed::Box;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::arch::naked_asm;

use bmcast_image::{BootConfig, ConfigError, Key};
use bmcast_install::{Boot, Install, Options};
use bmcast_mediator::{Ahci, Nvme};
use bmcast_svm::paging::{self, PRESENT, USER, WRITABLE};
use bmcast_svm::{IO_PAGES, MSR_PAGES, Segment, trap_msr, trap_port};
use uefi::{Handle, cstr16};

use super::cpu::{self, SVME};
use super::exits::read_device;
use super::firmware::{self, Port, Refused};
use super::machine::{self, Controller, Machine};
use super::memory::{self, Tables, address};
use super::network::{Network, NetworkError};
use super::pci::{self, Region};
use super::vcpu::{COMMON, Common, Cpu};
use super::{apic, clock, heap, host, log, start, switch, windows};
use crate::say;

/// What the application gives its copy.
#[repr(C)]
pub struct Handover {
    /// UEFI's system table.
    pub system_table: u64,
    /// The application's handle.
    pub image: u64,
    /// Begin of the region.
    pub region: u64,
    /// Its bytes.
    pub bytes: u64,
    /// Bytes at its begin that the copy takes.
    pub used: u64,
    /// A page below 1 MiB.
    pub start_page: u64,
    /// Answer: the handle of the disk's controller.
    pub disk: u64,
    /// Why it has failed.
    pub failure: Failure,
}

/// A text of bounded length, for the caller in other memory.
#[repr(C)]
pub struct Failure {
    /// Bytes of it.
    pub length: usize,
    /// UTF-8.
    pub text: [u8; 256],
}

/// Why there is no VMM.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The CPU.
    #[error("this CPU has no AMD-V (SVM)")]
    NoSvm,
    /// The firmware.
    #[error("AMD-V (SVM) is switched off: switch it on in the firmware's setup")]
    SwitchedOff,
    /// The CPU.
    #[error("this CPU's AMD-V has no nested paging")]
    NoNestedPaging,
    /// Memory.
    #[error("the VMM's memory is used up")]
    Memory,
    /// The firmware.
    #[error(transparent)]
    Firmware(#[from] Refused),
    /// The boot medium.
    #[error("{0}: it belongs beside BMcast on the boot medium (`bmcast image` puts it there)")]
    Config(String),
    /// Its content.
    #[error(transparent)]
    BadConfig(#[from] ConfigError),
    /// No disk.
    #[error(
        "there is no disk as bmcast.conf wants it that can be mediated: a SATA disk by AHCI, or an NVMe one"
    )]
    NoDisk,
    /// The network.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// The image and the disk.
    #[error("{0}")]
    Install(String),
}

/// Where the application calls the copy: `handover`, the caller's stack, and where it goes on as the guest.
///
/// # Safety
///
/// To be called by [`switch::call_resident`] only.
#[unsafe(naked)]
pub unsafe extern "sysv64" fn enter(handover: &mut Handover, stack: u64, resume: u64) -> u64 {
    naked_asm!("jmp {}", sym resident)
}

unsafe extern "sysv64" fn resident(handover: &mut Handover, stack: u64, resume: u64) -> u64 {
    // SAFETY: the region behind the copy is nobody's, and this copy's heap has nothing yet.
    unsafe {
        let start = memory::pointer::<u8>(handover.region + handover.used);
        let bytes = handover.bytes - handover.used;
        heap::give(start, usize::try_from(bytes).unwrap_or(0));
    }
    // SAFETY: both are as the firmware has given them to the application.
    unsafe {
        uefi::table::set_system_table(memory::pointer(handover.system_table));
        if let Some(image) = Handle::from_ptr(memory::pointer(handover.image)) {
            uefi::boot::set_image_handle(image);
        }
    }
    match prepare(handover) {
        Ok(Ready::Guest(cpu)) => launch(cpu, stack, resume),
        Ok(Ready::Installed) => 0,
        Err(error) => {
            let text = alloc::format!("{error}");
            let length = text.len().min(handover.failure.text.len());
            handover.failure.text[..length].copy_from_slice(&text.as_bytes()[..length]);
            handover.failure.length = length;
            1
        }
    }
}

/// Everything that can fail: nothing of the machine's is changed before it has gone well, but that its network card is
/// the VMM's.
fn prepare(handover: &mut Handover) -> Result<Ready, Error> {
    let config = firmware::file(cstr16!("\\EFI\\BOOT\\bmcast.conf")).map_err(Error::Config)?;
    let config = BootConfig::parse(&config)?;
    log::to_serial(config.serial);
    supported()?;
    clock::measure();
    host::prepare().map_err(|_| Error::Memory)?;
    firmware::connect_all();
    let mut disk = firmware::disk(&config.disk)?.ok_or(Error::NoDisk)?;
    let mut network = Network::start(&config)?;
    let manifest = network.manifest(config.manifest)?;
    let boot = Boot {
        random: network.random(manifest.id()),
        key: config.key.unwrap_or(Key([0; 32])),
        may_begin: config.erase || disk.is_blank()?,
    };
    let options = Options {
        rate: config.rate,
        ..Options::default()
    };
    let install = Install::open(disk.sectors, manifest, boot, options, |sectors, into| {
        disk.read(sectors, into)
    })
    .map_err(|error| Error::Install(format!("{error}")))?;
    handover.disk = address(disk.handle.as_ptr());
    if install.complete() {
        network.stop();
        return Ok(Ready::Installed);
    }
    let hidden = network.function();
    let cpu = guest(handover, network.regions())?;
    let register = match disk.port {
        Port::Ahci(_) => 5,
        Port::Nvme(_) => 0,
    };
    let base = disk.controller.bar(register).ok_or(Error::NoDisk)?;
    let (mediator, length): (Box<machine::Disk>, u32) = match disk.port {
        Port::Ahci(port) => (Box::new(Ahci::new(u8::try_from(port).unwrap_or(0))), 0x1000),
        Port::Nvme(nsid) => {
            // CAP, upper half.
            let [capabilities, _] = cpu::halves(read_device(base + 4, 4));
            let window = Nvme::window(capabilities);
            (Box::new(Nvme::new(nsid, window)), window)
        }
    };
    windows::device(base, length.into(), register).map_err(|_| Error::Memory)?;
    if let Some(base) = firmware::configuration() {
        windows::configuration(base, Some(hidden), disk.controller).map_err(|_| Error::Memory)?;
    }
    let controller = Controller::new().ok_or(Error::Memory)?;
    // SAFETY: the firmware has made its tables and uses them no more; one CPU runs.
    if unsafe { firmware::hide_iommus() } {
        say!("this machine's IOMMU is hidden from the OS until its next start");
    }
    let machine = Machine {
        disk: mediator,
        controller,
        install,
        network,
    };
    let function = disk.controller;
    machine::begin(machine, function, hidden);
    Ok(Ready::Guest(cpu))
}

/// What is to be done with the machine.
enum Ready {
    /// All of the image is on its disk.
    Installed,
    /// It becomes a guest, this CPU first.
    Guest(Box<Cpu>),
}

/// What guests need: nested page tables, permission maps, CPUs.
fn guest(handover: &Handover, hidden: &[Region]) -> Result<Box<Cpu>, Error> {
    let root = paging::identity(&mut Tables, host::width(), PRESENT | WRITABLE | USER)
        .map_err(|_| Error::Memory)?;
    windows::open(&windows::Layout {
        root,
        region: (handover.region, handover.region + handover.bytes),
        start: handover.start_page,
    })
    .map_err(|_| Error::Memory)?;
    let iopm = memory::bytes(IO_PAGES).ok_or(Error::Memory)?;
    let msrpm = memory::bytes(MSR_PAGES).ok_or(Error::Memory)?;
    for port in pci::DATA..pci::DATA + 4 {
        trap_port(iopm, port);
    }
    let mut memory = Vec::new();
    for region in hidden {
        match *region {
            Region::Memory { from, length } => memory.push((from, length)),
            Region::Ports { from, length } => {
                (from..from.saturating_add(length)).for_each(|port| trap_port(iopm, port));
            }
        }
    }
    windows::hide(&memory).map_err(|_| Error::Memory)?;
    trap_msr(msrpm, cpu::EFER, true, true);
    trap_msr(msrpm, cpu::HSAVE, true, true);
    trap_msr(msrpm, cpu::VM_CR, true, true);
    trap_msr(msrpm, cpu::APIC_BASE, false, true);
    trap_msr(msrpm, apic::X2APIC_ICR, false, true);
    COMMON.call_once(|| Common {
        nested: root,
        iopm: address(iopm.as_ptr()),
        msrpm: address(msrpm.as_ptr()),
    });
    let own = cpu::apic_id();
    let others: Vec<u8> = firmware::apic_ids()?
        .into_iter()
        .filter(|id| *id != own)
        .collect();
    start::know(&others).ok_or(Error::Memory)?;
    // SAFETY: the application has reserved this page for it.
    unsafe { start::prepare(handover.start_page) };
    let cpu = Cpu::new(own).ok_or(Error::Memory)?;
    say!(
        "{} CPUs, {} KiB of {} at {:#x} free",
        others.len() + 1,
        heap::free() >> 10,
        handover.bytes >> 10,
        handover.region
    );
    Ok(cpu)
}

/// APM 15.4.
fn supported() -> Result<(), Error> {
    if cpu::cpuid(0x8000_0001)[2] & 1 << 2 == 0 {
        return Err(Error::NoSvm);
    }
    // SAFETY: a CPU with SVM has it.
    if unsafe { cpu::rdmsr(cpu::VM_CR) } & 1 << 4 != 0 {
        return Err(Error::SwitchedOff);
    }
    if cpu::cpuid(0x8000_000a)[3] & 1 == 0 {
        return Err(Error::NoNestedPaging);
    }
    Ok(())
}

/// This CPU becomes a guest: where it was called from, as if by a return.
fn launch(cpu: Box<Cpu>, stack: u64, resume: u64) -> ! {
    let cpu = Box::leak(cpu);
    let gdtr = cpu::gdtr();
    let idtr = cpu::idtr();
    let segment = |selector: u16| {
        let entry = gdtr.base + u64::from(selector & !7);
        // SAFETY: the firmware's GDT has what the CPU has loaded from it.
        let descriptor = unsafe { memory::pointer::<u64>(entry).read_unaligned() };
        Segment::new(selector, if selector & !7 == 0 { 0 } else { descriptor })
    };
    let save = &mut cpu.vmcb.save;
    save.cs = segment(cpu::cs());
    save.ss = segment(cpu::ss());
    save.ds = segment(cpu::ds());
    save.es = segment(cpu::es());
    let table = |of: cpu::TablePointer| Segment {
        selector: 0,
        attributes: 0,
        limit: u32::from(of.limit),
        base: of.base,
    };
    save.gdtr = table(gdtr);
    save.idtr = table(idtr);
    save.cr0 = cpu::cr0();
    save.cr2 = cpu::cr2();
    save.cr3 = cpu::cr3();
    save.cr4 = cpu::cr4();
    save.dr6 = cpu::dr6();
    save.dr7 = cpu::dr7();
    // SAFETY: every CPU in long mode has these.
    unsafe {
        save.efer = cpu::rdmsr(cpu::EFER) | SVME;
        save.pat = cpu::rdmsr(cpu::PAT);
    }
    // Interrupts are on, as in every application at this level.
    save.rflags = 0x202;
    save.rip = resume;
    save.rsp = stack;
    save.rax = 0;
    // SAFETY: from here on the VMM's tables are this CPU's; interrupts are off until GIF is 0.
    unsafe {
        core::arch::asm!("cli");
        host::enter();
        cpu.turn_on();
        switch::on_stack(
            cpu.stack,
            address(on_own_stack as *const ()),
            address(&raw const *cpu),
        )
    }
}

unsafe extern "sysv64" fn on_own_stack(cpu: &mut Cpu) -> ! {
    cpu.run()
}
