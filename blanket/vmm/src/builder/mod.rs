//! The domain builder: puts a kernel into fresh memory the way Xen's toolstack
//! does (`tools/libs/guest/xg_dom_core.c`, `xg_dom_x86.c`).
//!
//! From frame 0 upward, mapped linearly at the kernel's `VIRT_BASE`: the kernel,
//! start info, the xenstore page, the console page, the page tables (L4, L3, L2,
//! L1s), the boot stack, and slack up to a 4 MiB boundary. Then, not mapped
//! there, the initrd and the p2m list with the tables that map it. Every machine
//! frame number equals the guest frame number. Above that, up to the most that the
//! domain may have, lies RAM that it asks for later, of which start info and the p2m
//! list do not speak. Above RAM lie the frames that the hypervisor gives: shared info,
//! then the grant table.

mod hypercall_page;
mod layout;
mod start_info;
mod tables;

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use blanket_abi::device::{Boot, boot_flags};
use blanket_abi::layout::{MAX_FRAMES, MAX_VCPUS, SECTION};
use blanket_abi::state;
use blanket_abi::xen::domid;
use blanket_abi::xen::grant;
use blanket_abi::{Gfn, PAGE_SIZE};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{Advice, madvise};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestRegionMmap, MmapRegion};

use layout::Ram;
pub use layout::{EXTRA_MEM_RATIO, FrameRange, Layout};

use crate::kernel::Kernel;

pub use blanket_devices::GuestMemory;

/// Event channel port of the xenstore ring.
pub const STORE_PORT: u32 = 1;
/// Event channel port of the console ring.
pub const CONSOLE_PORT: u32 = 2;
/// Frames of the grant table, 512 entries each.
pub const GRANT_FRAMES: u64 = 32;
/// Longest command line, without its final NUL (`MAX_GUEST_CMDLINE`, `public/xen.h`).
pub const MAX_CMDLINE: usize = 1023;
/// The memory file is a multiple of this, so that the host may use large pages.
const FILE_ALIGN: u64 = 2 << 20;

/// What a domain shall be like.
#[derive(Clone, Debug)]
pub struct Config {
    /// RAM at the start in bytes, a multiple of the page size.
    pub memory: u64,
    /// vCPUs.
    pub vcpus: u32,
    /// RAM that the guest can get at most, likewise; less than `memory` is as much.
    pub max_memory: u64,
    /// Kernel command line.
    pub cmdline: String,
    /// Have the core report every hypercall that it refuses.
    pub verbose: bool,
    /// Private memory that the host may merge with others' (KSM), instead of a
    /// memory file.
    pub mergeable: bool,
    /// The guest may break the core on purpose (`blanket_abi::device::inject`).
    pub inject: bool,
}

impl Config {
    fn ram(&self) -> Ram {
        Ram {
            start: self.memory / PAGE_SIZE,
            most: self.max_memory.max(self.memory) / PAGE_SIZE,
        }
    }
}

/// A domain in memory, ready to be given to the hypervisor.
#[derive(Debug)]
pub struct Domain {
    /// Its memory: RAM and the hypervisor's frames above, from address 0.
    pub memory: Arc<GuestMemory>,
    /// Frames of the VM.
    pub frames: u64,
    /// What the hypervisor must know.
    pub boot: Boot,
    /// The frame of the xenstore's ring.
    pub store: Gfn,
    /// The frame of the console's ring.
    pub console: Gfn,
}

impl Domain {
    /// Pages that its shadow tables may have, unless the user says: by the memory that the
    /// guest may have at once.
    #[must_use]
    pub fn pool_limit(&self) -> u64 {
        let never_at_once = self.boot.ram_frames.saturating_sub(self.boot.most());
        1024 + self.frames.saturating_sub(never_at_once) / 16
    }
}

/// Why a domain cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The memory is not a whole number of pages, or nothing.
    #[error("the memory size must be a multiple of {PAGE_SIZE} bytes and not 0, not {0}")]
    MemorySize(u64),
    /// The domain does not fit.
    #[error(
        "{} MiB of memory are too little: the kernel, its page tables{} need at least {} MiB; \
         give it more with --memory",
        given >> 20,
        if *initrd > 0 { format!(" and the initrd of {} MiB", initrd.div_ceil(1 << 20)) }
        else { String::new() },
        needed.div_ceil(1 << 20)
    )]
    TooLittleMemory {
        /// Bytes that were asked for.
        given: u64,
        /// Bytes needed to start the kernel and unpack the initrd.
        needed: u64,
        /// Bytes of the initrd.
        initrd: u64,
    },
    /// More than the hypervisor can address or the first mapping can hold.
    #[error("{0}")]
    TooLarge(String),
    /// The command line does not fit.
    #[error("the kernel command line has {0} bytes, at most {MAX_CMDLINE} are possible")]
    CmdlineTooLong(usize),
    /// The command line cannot be passed on.
    #[error("the kernel command line contains a NUL byte")]
    CmdlineNul,
    /// The kernel's notes ask for a layout that is not possible.
    #[error("the kernel asks for an impossible layout: {0}")]
    Kernel(String),
    /// The host gave no memory.
    #[error(
        "cannot get {} MiB of memory from the host: {source}; \
         give the VM less with --memory, or end other programs",
        size >> 20
    )]
    HostMemory {
        /// Bytes.
        size: u64,
        /// The host's answer.
        source: io::Error,
    },
    /// The host's kernel merges no pages.
    #[error("the host cannot merge memory ({0}): its kernel has no KSM; run without --mergeable")]
    NotMergeable(#[source] io::Error),
    /// A write to guest memory failed; a bug in the layout.
    #[error("cannot fill guest memory: {0}")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

/// Where everything of a domain is to be.
///
/// # Errors
/// As for [`build`].
pub fn plan(kernel: &Kernel, initrd: Option<&[u8]>, config: &Config) -> Result<Layout, Error> {
    for size in [config.memory, config.max_memory.max(config.memory)] {
        if size == 0 || !size.is_multiple_of(PAGE_SIZE) {
            return Err(Error::MemorySize(size));
        }
    }
    if config.cmdline.len() > MAX_CMDLINE {
        return Err(Error::CmdlineTooLong(config.cmdline.len()));
    }
    if config.cmdline.contains('\0') {
        return Err(Error::CmdlineNul);
    }
    let initrd_len = initrd.map_or(0, |bytes| bytes.len() as u64);
    Layout::plan(kernel, initrd_len, config.ram())
}

/// Builds a domain.
///
/// # Errors
/// Says what does not fit and how much would; nothing is left behind.
pub fn build(kernel: &Kernel, initrd: Option<&[u8]>, config: &Config) -> Result<Domain, Error> {
    let layout = plan(kernel, initrd, config)?;
    let ram = config.ram();
    let initrd = initrd.filter(|bytes| !bytes.is_empty());
    let initrd_len = initrd.map_or(0, |bytes| bytes.len() as u64);

    let state_base = layout.grants.end();
    let state_frames = state::frames(config.vcpus, ram.numbers());
    let frames = state_base + state_frames;
    let memory = allocate(frames * PAGE_SIZE, config.mergeable)?;

    for segment in kernel.segments() {
        memory.write_slice(kernel.bytes(segment), GuestAddress(segment.paddr))?;
    }
    if let Some(page) = layout.hypercall_page {
        memory.write_slice(&hypercall_page::contents(), address(page))?;
    }
    if let (Some(bytes), Some(range)) = (initrd, layout.initrd) {
        memory.write_slice(bytes, address(range.first))?;
    }
    tables::write(&memory, &layout)?;
    tables::write_p2m(&memory, &layout)?;
    memory.write_slice(
        &start_info::contents(&layout, initrd_len, &config.cmdline),
        address(layout.start_info),
    )?;
    reserve_grants(&memory, &layout)?;

    let boot = Boot {
        ram_frames: ram.numbers(),
        start_frames: ram.start,
        shared_info: layout.shared_info.0,
        grant_base: layout.grants.first.0,
        grant_frames: layout.grants.count,
        cr3: layout.tables.first.0,
        rip: kernel.notes().entry,
        rsp: layout.va(layout.boot_stack).0 + PAGE_SIZE,
        start_info: layout.va(layout.start_info).0,
        store_port: STORE_PORT,
        console_port: CONSOLE_PORT,
        flags: [
            (config.verbose, boot_flags::VERBOSE),
            (config.inject, boot_flags::INJECT),
        ]
        .into_iter()
        .filter_map(|(on, flag)| on.then_some(flag))
        .sum(),
        hypercall_page: layout.hypercall_page.map_or(0, |page| layout.va(page).0),
        state_base,
        state_frames,
        most_frames: ram.most,
    };
    Ok(Domain {
        memory: Arc::new(memory),
        frames,
        boot,
        store: layout.store,
        console: layout.console,
    })
}

/// Frames of RAM that a VM with as many vCPUs as there can be may have.
const MOST_RAM: u64 = MAX_FRAMES - 1 - GRANT_FRAMES - state::frames(MAX_VCPUS, MAX_FRAMES);

// Numbers for what a guest adds end before what lies above RAM.
const _: () = assert!(MAX_FRAMES - SECTION <= MOST_RAM);

fn too_large(ram_frames: u64) -> Error {
    Error::TooLarge(format!(
        "{} MiB of memory are too much: a VM has at most {} MiB",
        ram_frames.saturating_mul(PAGE_SIZE) >> 20,
        (MOST_RAM * PAGE_SIZE) >> 20
    ))
}

/// Guest-physical address of a frame.
pub(crate) fn address(frame: Gfn) -> GuestAddress {
    GuestAddress(frame.base())
}

/// Memory for a VM, all zero.
pub(crate) fn allocate(size: u64, mergeable: bool) -> Result<GuestMemory, Error> {
    let size = size.next_multiple_of(FILE_ALIGN);
    let failed = |source| Error::HostMemory { size, source };
    let length = usize::try_from(size).map_err(|e| failed(io::Error::other(e)))?;
    let region = if mergeable {
        let region = MmapRegion::new(length).map_err(|e| failed(io::Error::other(e)))?;
        // SAFETY: the whole of a mapping that was just made. The advice changes nothing
        // that its users can see.
        unsafe { madvise(region.as_ptr().cast(), length, Advice::LinuxMergeable) }
            .map_err(|e| Error::NotMergeable(e.into()))?;
        region
    } else {
        let fd: OwnedFd =
            memfd_create("blanket-vm", MemfdFlags::CLOEXEC).map_err(|e| failed(e.into()))?;
        ftruncate(&fd, size).map_err(|e| failed(e.into()))?;
        MmapRegion::from_file(FileOffset::new(File::from(fd), 0), length)
            .map_err(|e| failed(io::Error::other(e)))?
    };
    let region = GuestRegionMmap::new(region, GuestAddress(0))
        .ok_or_else(|| failed(io::Error::other("the region wraps around")))?;
    GuestMemory::from_regions(vec![region]).map_err(|e| failed(io::Error::other(e)))
}

/// Grants the two rings to the backend in the entries that the ABI reserves for
/// them (`GNTTAB_RESERVED_CONSOLE`, `GNTTAB_RESERVED_XENSTORE`, `public/grant_table.h`).
fn reserve_grants(memory: &GuestMemory, layout: &Layout) -> Result<(), Error> {
    for (index, frame) in [
        (grant::RESERVED_CONSOLE, layout.console),
        (grant::RESERVED_XENSTORE, layout.store),
    ] {
        let mut entry = [0; 8];
        entry[0..2].copy_from_slice(&grant::flag::PERMIT_ACCESS.to_le_bytes());
        entry[2..4].copy_from_slice(&domid::BACKEND.to_le_bytes());
        let frame = u32::try_from(frame.0)
            .map_err(|_| Error::TooLarge("a ring lies above 16 TiB".to_owned()))?;
        entry[4..8].copy_from_slice(&frame.to_le_bytes());
        let at = layout.grants.first.base() + u64::from(index) * 8;
        memory.write_slice(&entry, GuestAddress(at))?;
    }
    Ok(())
}

#[cfg(test)]
mod check;
#[cfg(test)]
#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_possible_wrap,
    reason = "small numbers of the tests' own making"
)]
mod tests;
