//! Synthetic kernels: a small ELF with Xen notes, and bzImages around it.

use std::io::Write as _;

use crate::kernel::Kernel;

/// Recipe of an ELF kernel with one loaded segment and a PT_NOTE.
#[derive(Clone, Debug)]
pub struct Synthetic {
    /// Note VIRT_BASE.
    pub virt_base: u64,
    /// Note ENTRY.
    pub entry: u64,
    /// Note INIT_P2M.
    pub init_p2m: Option<u64>,
    /// Note MOD_START_PFN.
    pub mod_start_pfn: bool,
    /// Whether it has a hypercall page.
    pub hypercall_page: bool,
    /// Note FEATURES.
    pub features: &'static str,
    /// Whether it has Xen PV notes at all.
    pub xen: bool,
    /// Zeroed bytes after the file's.
    pub bss: u64,
}

/// Where the segment is loaded.
const PADDR: u64 = 0x10_0000;
const TEXT: usize = 0x3000;

impl Default for Synthetic {
    fn default() -> Self {
        Self {
            virt_base: 0xffff_ffff_8000_0000,
            entry: 0xffff_ffff_8000_0000 + PADDR + 0x123,
            init_p2m: Some(0x80_0000_0000),
            mod_start_pfn: true,
            hypercall_page: false,
            features: "!writable_page_tables|pae_pgdir_above_4gb",
            xen: true,
            bss: 0x5432,
        }
    }
}

impl Synthetic {
    /// The kernel, parsed.
    ///
    /// # Panics
    /// If the recipe makes no valid kernel.
    #[must_use]
    pub fn kernel(&self) -> Kernel {
        Kernel::parse(self.elf()).expect("a synthetic kernel is a kernel")
    }

    /// The ELF file.
    #[must_use]
    pub fn elf(&self) -> Vec<u8> {
        let notes = self.notes();
        let text: Vec<u8> = (0..TEXT).map(|n| (n * 7 + (n >> 8)) as u8).collect();
        let mut elf = Vec::new();
        elf.extend_from_slice(&[0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        for half in [2u16, 62] {
            elf.extend_from_slice(&half.to_le_bytes());
        }
        elf.extend_from_slice(&1u32.to_le_bytes());
        for word in [PADDR, 64, 0] {
            elf.extend_from_slice(&word.to_le_bytes());
        }
        elf.extend_from_slice(&0u32.to_le_bytes());
        for half in [64u16, 56, 2, 0, 0, 0] {
            elf.extend_from_slice(&half.to_le_bytes());
        }
        let text_at = 0x1000u64;
        let notes_at = text_at + TEXT as u64;
        let headers = [
            (1u32, text_at, PADDR, TEXT as u64, TEXT as u64 + self.bss),
            (4, notes_at, 0, notes.len() as u64, notes.len() as u64),
        ];
        for (kind, offset, paddr, filesz, memsz) in headers {
            elf.extend_from_slice(&kind.to_le_bytes());
            elf.extend_from_slice(&7u32.to_le_bytes());
            for word in [
                offset,
                self.virt_base.wrapping_add(paddr),
                paddr,
                filesz,
                memsz,
                4,
            ] {
                elf.extend_from_slice(&word.to_le_bytes());
            }
        }
        elf.resize(0x1000, 0);
        elf.extend_from_slice(&text);
        elf.extend_from_slice(&notes);
        elf
    }

    fn notes(&self) -> Vec<u8> {
        let mut out = Vec::new();
        let mut note = |kind: u32, desc: &[u8]| {
            for word in [4, desc.len() as u32, kind] {
                out.extend_from_slice(&word.to_le_bytes());
            }
            out.extend_from_slice(b"Xen\0");
            out.extend_from_slice(desc);
            out.resize(out.len().next_multiple_of(4), 0);
        };
        note(18, &0x100_0850u32.to_le_bytes());
        if !self.xen {
            return out;
        }
        note(6, b"linux\0");
        note(5, b"xen-3.0\0");
        note(3, &self.virt_base.to_le_bytes());
        note(4, &0u64.to_le_bytes());
        note(1, &self.entry.to_le_bytes());
        if self.hypercall_page {
            note(2, &(self.virt_base + PADDR + 0x1000).to_le_bytes());
        }
        note(10, self.features.as_bytes());
        if let Some(va) = self.init_p2m {
            note(15, &va.to_le_bytes());
        }
        note(16, &u32::from(self.mod_start_pfn).to_le_bytes());
        out
    }
}

/// A bzImage around a payload that is packed already.
#[must_use]
pub fn bzimage_raw(payload: &[u8]) -> Vec<u8> {
    let mut image = vec![0; 3 * 512];
    image[0x1f1] = 2;
    image[0x1fe..0x200].copy_from_slice(&0xaa55u16.to_le_bytes());
    image[0x202..0x206].copy_from_slice(b"HdrS");
    image[0x206..0x208].copy_from_slice(&0x020fu16.to_le_bytes());
    image[0x248..0x24c].copy_from_slice(&64u32.to_le_bytes());
    image[0x24c..0x250].copy_from_slice(&(payload.len() as u32).to_le_bytes());
    image.extend_from_slice(&[0x90; 64]);
    image.extend_from_slice(payload);
    image
}

/// A bzImage with an LZ4 payload, as Debian's.
#[must_use]
pub fn bzimage(elf: &[u8]) -> Vec<u8> {
    bzimage_raw(&lz4_legacy(elf))
}

/// Packed as the kernel's build does it.
#[must_use]
pub fn lz4_legacy(data: &[u8]) -> Vec<u8> {
    let mut out = vec![0x02, 0x21, 0x4c, 0x18];
    for block in data.chunks(8 << 20) {
        let packed = lz4_flex::block::compress(block);
        out.extend_from_slice(&(packed.len() as u32).to_le_bytes());
        out.extend_from_slice(&packed);
    }
    out.extend_from_slice(&(data.len() as u32).to_le_bytes());
    out
}

/// Packed as the kernel's build does it.
///
/// # Panics
/// Never: it writes to memory.
#[must_use]
pub fn gzip(data: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(data).expect("memory");
    encoder.finish().expect("memory")
}

/// Packed as the kernel's build does it.
///
/// # Panics
/// Never: it writes to memory.
#[must_use]
pub fn bzip2(data: &[u8]) -> Vec<u8> {
    let mut encoder = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::fast());
    encoder.write_all(data).expect("memory");
    with_size(encoder.finish().expect("memory"), data)
}

/// Packed as the kernel's build does it.
#[must_use]
pub fn zstd(data: &[u8]) -> Vec<u8> {
    let packed =
        ruzstd::encoding::compress_to_vec(data, ruzstd::encoding::CompressionLevel::Fastest);
    with_size(packed, data)
}

/// The unpacked size that the kernel's build appends.
#[must_use]
pub fn with_size(mut packed: Vec<u8>, data: &[u8]) -> Vec<u8> {
    packed.extend_from_slice(&(data.len() as u32).to_le_bytes());
    packed
}
