//! `struct start_info` as bytes (`public/xen.h`).

use std::mem::offset_of;

use blanket_abi::xen::boot::{SIF_MOD_START_PFN, SIF_VIRT_P2M_4TOOLS, START_MAGIC, StartInfo};

use super::{CONSOLE_PORT, Layout, STORE_PORT};

/// The start info page's contents; the rest of the page stays zero.
pub fn contents(layout: &Layout, initrd: u64, cmdline: &str) -> Vec<u8> {
    let mut page = vec![0; size_of::<StartInfo>()];
    let mut put = |at: usize, bytes: &[u8]| page[at..at + bytes.len()].copy_from_slice(bytes);

    // The tools never read the guest's p2m (it is the identity), so the guest
    // need not build a second, three-level one for them.
    let mut flags = SIF_VIRT_P2M_4TOOLS;
    let mut mod_start = 0;
    if let Some(range) = layout.initrd {
        if layout.initrd_by_frame {
            flags |= SIF_MOD_START_PFN;
            mod_start = range.first.0;
        } else {
            mod_start = layout.va(range.first).0;
        }
    }
    let separate_p2m = layout.p2m_tables.count > 0;
    let (first_p2m_pfn, nr_p2m_frames) = if separate_p2m {
        (
            layout.p2m.first.0,
            layout.p2m.count + layout.p2m_tables.count,
        )
    } else {
        (0, 0)
    };

    put(offset_of!(StartInfo, magic), START_MAGIC);
    put(offset_of!(StartInfo, flags), &flags.to_le_bytes());
    put(
        offset_of!(StartInfo, store_evtchn),
        &STORE_PORT.to_le_bytes(),
    );
    put(
        offset_of!(StartInfo, console_evtchn),
        &CONSOLE_PORT.to_le_bytes(),
    );
    put(offset_of!(StartInfo, cmd_line), cmdline.as_bytes());
    for (at, value) in [
        (offset_of!(StartInfo, nr_pages), layout.ram_frames),
        (
            offset_of!(StartInfo, shared_info),
            layout.shared_info.base(),
        ),
        (offset_of!(StartInfo, store_mfn), layout.store.0),
        (offset_of!(StartInfo, console_mfn), layout.console.0),
        (
            offset_of!(StartInfo, pt_base),
            layout.va(layout.tables.first).0,
        ),
        (offset_of!(StartInfo, nr_pt_frames), layout.tables.count),
        (offset_of!(StartInfo, mfn_list), layout.p2m_va.0),
        (offset_of!(StartInfo, mod_start), mod_start),
        (offset_of!(StartInfo, mod_len), initrd),
        (offset_of!(StartInfo, first_p2m_pfn), first_p2m_pfn),
        (offset_of!(StartInfo, nr_p2m_frames), nr_p2m_frames),
    ] {
        put(at, &value.to_le_bytes());
    }
    page
}
