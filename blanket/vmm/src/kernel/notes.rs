//! The Xen ELF notes of a kernel (`public/elfnote.h`): what it offers and asks for.

use blanket_abi::xen::boot::note;
use elf::ElfBytes;
use elf::abi::PT_NOTE;
use elf::endian::LittleEndian;
use elf::note::Note;

use super::ErrorKind;

/// PVH entry (`XEN_ELFNOTE_PHYS32_ENTRY`), only looked at to explain its kernels.
const PHYS32_ENTRY: u32 = 18;
/// Notes that are read; a file with more is not a kernel.
const MAX_NOTES: usize = 1024;

/// Features (`XENFEAT_*` names, `public/features.h`) that a guest may require
/// because Blanket behaves as they say.
const GIVEN_FEATURES: &[&str] = &[
    "writable_page_tables",
    "writable_descriptor_tables",
    "pae_pgdir_above_4gb",
    "mmu_pt_update_preserve_ad",
    "gnttab_map_avail_bits",
    "memory_op_vnode_supported",
];

/// What the notes say, checked for form.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct XenNotes {
    /// Virtual address of the PV entry point.
    pub entry: u64,
    /// Virtual address of the page that the loader fills with hypercall stubs.
    pub hypercall_page: Option<u64>,
    /// Virtual address at which frame 0 is mapped.
    pub virt_base: u64,
    /// Offset to take from ELF physical addresses.
    pub paddr_offset: u64,
    /// Virtual address at which the p2m list is to be mapped.
    pub init_p2m: Option<u64>,
    /// Whether the initrd may be handed over as a frame number, unmapped.
    pub mod_start_pfn: bool,
    /// Name of the guest operating system.
    pub guest_os: String,
}

impl XenNotes {
    /// Of a kernel without notes, entered at frame 0's mapping plus `paddr`.
    pub fn bare(paddr: u64) -> Self {
        let virt_base = 0xffff_ffff_8000_0000;
        Self {
            entry: virt_base + paddr,
            hypercall_page: None,
            virt_base,
            paddr_offset: 0,
            init_p2m: None,
            mod_start_pfn: false,
            guest_os: "probe".to_owned(),
        }
    }

    /// Reads the notes of an ELF file.
    pub fn read(file: &ElfBytes<'_, LittleEndian>) -> Result<Self, ErrorKind> {
        let mut raw = Raw::default();
        let mut count = 0;
        for segment in file.segments().into_iter().flatten() {
            if segment.p_type != PT_NOTE {
                continue;
            }
            let notes = file
                .segment_data_as_notes(&segment)
                .map_err(|e| ErrorKind::corrupt(format!("its ELF notes: {e}")))?;
            for found in notes {
                count += 1;
                if count > MAX_NOTES {
                    return Err(ErrorKind::corrupt("it has too many ELF notes"));
                }
                if let Note::Unknown(any) = found
                    && any.name.strip_suffix(b"\0").unwrap_or(any.name) == b"Xen"
                {
                    raw.take(any.n_type, any.desc)?;
                }
            }
        }
        raw.finish()
    }
}

#[derive(Default)]
struct Raw {
    entry: Option<u64>,
    hypercall_page: Option<u64>,
    virt_base: Option<u64>,
    paddr_offset: Option<u64>,
    xen_version: Option<String>,
    features: Option<String>,
    init_p2m: Option<u64>,
    mod_start_pfn: Option<u64>,
    guest_os: Option<String>,
    pvh: bool,
}

impl Raw {
    fn take(&mut self, kind: u64, desc: &[u8]) -> Result<(), ErrorKind> {
        let Ok(kind) = u32::try_from(kind) else {
            return Ok(());
        };
        match kind {
            note::ENTRY => self.entry = Some(number(kind, desc)?),
            note::HYPERCALL_PAGE => self.hypercall_page = Some(number(kind, desc)?),
            note::VIRT_BASE => self.virt_base = Some(number(kind, desc)?),
            note::PADDR_OFFSET => self.paddr_offset = Some(number(kind, desc)?),
            note::INIT_P2M => self.init_p2m = Some(number(kind, desc)?),
            note::MOD_START_PFN => self.mod_start_pfn = Some(number(kind, desc)?),
            note::XEN_VERSION => self.xen_version = Some(text(desc)),
            note::FEATURES => self.features = Some(text(desc)),
            note::GUEST_OS => self.guest_os = Some(text(desc)),
            PHYS32_ENTRY => self.pvh = true,
            _ => {}
        }
        Ok(())
    }

    fn finish(self) -> Result<XenNotes, ErrorKind> {
        let Some(entry) = self.entry else {
            return Err(ErrorKind::NoXenPv { pvh: self.pvh });
        };
        let Some(virt_base) = self.virt_base else {
            return Err(ErrorKind::corrupt(
                "its Xen notes give an entry but no VIRT_BASE",
            ));
        };
        match self.xen_version.as_deref() {
            Some("xen-3.0") => {}
            Some(other) => {
                return Err(ErrorKind::Unsupported(format!(
                    "it speaks the hypervisor interface {other:?}, only \"xen-3.0\" is known"
                )));
            }
            None => {
                return Err(ErrorKind::corrupt(
                    "its Xen notes do not name their version",
                ));
            }
        }
        for feature in self.features.as_deref().unwrap_or_default().split('|') {
            // A leading '!' means that the guest cannot do without.
            if let Some(required) = feature.strip_prefix('!')
                && !GIVEN_FEATURES.contains(&required)
            {
                return Err(ErrorKind::Unsupported(format!(
                    "it requires the Xen feature {required:?}"
                )));
            }
        }
        Ok(XenNotes {
            entry,
            hypercall_page: self.hypercall_page,
            virt_base,
            paddr_offset: self.paddr_offset.unwrap_or(0),
            init_p2m: self.init_p2m,
            mod_start_pfn: self.mod_start_pfn.unwrap_or(0) != 0,
            guest_os: self.guest_os.unwrap_or_default(),
        })
    }
}

fn number(kind: u32, desc: &[u8]) -> Result<u64, ErrorKind> {
    match *desc {
        [a, b, c, d] => Ok(u64::from(u32::from_le_bytes([a, b, c, d]))),
        [a, b, c, d, e, f, g, h] => Ok(u64::from_le_bytes([a, b, c, d, e, f, g, h])),
        _ => Err(ErrorKind::corrupt(format!(
            "its Xen note {kind} has {} bytes, a number has 4 or 8",
            desc.len()
        ))),
    }
}

/// At most 256 characters of a NUL-terminated text.
fn text(desc: &[u8]) -> String {
    let end = desc
        .iter()
        .position(|&b| b == 0)
        .unwrap_or(desc.len())
        .min(256);
    String::from_utf8_lossy(&desc[..end]).into_owned()
}
