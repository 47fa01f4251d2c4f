//! What the domain builder hands to the guest (`public/xen.h` start_info,
//! `public/elfnote.h`).

/// Magic of [`StartInfo`].
pub const START_MAGIC: &[u8] = b"xen-3.0-x86_64";
/// `mod_start` is a frame number and the module is not mapped.
pub const SIF_MOD_START_PFN: u32 = 8;
/// The toolstack understands the virtual p2m.
pub const SIF_VIRT_P2M_4TOOLS: u32 = 16;

/// `struct start_info`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct StartInfo {
    /// [`START_MAGIC`], NUL-terminated.
    pub magic: [u8; 32],
    /// Frames of RAM.
    pub nr_pages: u64,
    /// Machine address of shared info.
    pub shared_info: u64,
    /// `SIF_*`.
    pub flags: u32,
    /// Padding.
    pub pad0: u32,
    /// Machine frame of the xenstore ring.
    pub store_mfn: u64,
    /// Port of the xenstore ring.
    pub store_evtchn: u32,
    /// Padding.
    pub pad1: u32,
    /// Machine frame of the console ring.
    pub console_mfn: u64,
    /// Port of the console ring.
    pub console_evtchn: u32,
    /// Padding.
    pub pad2: u32,
    /// Virtual address of the initial L4.
    pub pt_base: u64,
    /// Page-table frames of the initial mapping.
    pub nr_pt_frames: u64,
    /// Virtual address of the p2m list.
    pub mfn_list: u64,
    /// Frame or virtual address of the initrd.
    pub mod_start: u64,
    /// Bytes of the initrd.
    pub mod_len: u64,
    /// Command line.
    pub cmd_line: [u8; 1024],
    /// First frame of the p2m and its tables.
    pub first_p2m_pfn: u64,
    /// Frames of the p2m and its tables.
    pub nr_p2m_frames: u64,
}

/// ELF note numbers, name "Xen" (`public/elfnote.h`).
pub mod note {
    /// Entry point.
    pub const ENTRY: u32 = 1;
    /// Hypercall page.
    pub const HYPERCALL_PAGE: u32 = 2;
    /// Virtual address of frame 0.
    pub const VIRT_BASE: u32 = 3;
    /// Offset of physical addresses.
    pub const PADDR_OFFSET: u32 = 4;
    /// Interface version, "xen-3.0".
    pub const XEN_VERSION: u32 = 5;
    /// Name of the guest OS.
    pub const GUEST_OS: u32 = 6;
    /// Version of the guest OS.
    pub const GUEST_VERSION: u32 = 7;
    /// Loader.
    pub const LOADER: u32 = 8;
    /// Features, as text.
    pub const FEATURES: u32 = 10;
    /// Lowest address that the hypervisor may use.
    pub const HV_START_LOW: u32 = 12;
    /// Where the p2m is to be mapped.
    pub const INIT_P2M: u32 = 15;
    /// The initrd may be unmapped.
    pub const MOD_START_PFN: u32 = 16;
    /// Features, as bits.
    pub const SUPPORTED_FEATURES: u32 = 17;
}

const _: () = assert!(size_of::<StartInfo>() == 1168);
