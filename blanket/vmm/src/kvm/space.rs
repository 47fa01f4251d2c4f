//! The core's memory in a KVM VM: what `blanket.ko` makes of host pages, made of
//! one memory slot above the guest's frames. The same tables, the same places
//! (`blanket_abi::layout`), and no other memory is mapped in them.

use std::mem::offset_of;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use blanket_abi::PAGE_SIZE;
use blanket_abi::cpuid::Hidden;
use blanket_abi::device::{
    Boot, COUNTERS, CPUID_MAX, CpuidEntry, EXIT_REASONS, ImageHeader, RUN_DATA, STUB_STRIDE,
    Switch, VmPage, host, pending,
};
use blanket_abi::kvm::RAM_BASE;
use blanket_abi::layout::{
    CPUID_TABLE, GFN_INFO, GFN_INFO_SIZE, HOLE_FIRST_SLOT, IMAGE, M2P, POOL, POOL_GFNS, POOL_INFO,
    POOL_INFO_SIZE, VCPU, VCPU_STRIDE, VM_PAGE, WINDOW, sel, vcpu as area,
};
use blanket_abi::trace::Ring;
use rustix::mm::{Advice, madvise};
use vm_memory::{Bytes as _, MmapRegion, VolatileMemory as _};

use super::Error;
use super::audit::Use;
use super::image::Image;
use crate::builder::Domain;
use crate::trace::Record;

/// Bits of a page-table entry.
pub(super) mod entry {
    pub const P: u64 = 1;
    pub const RW: u64 = 1 << 1;
    pub const US: u64 = 1 << 2;
    pub const A: u64 = 1 << 5;
    pub const D: u64 = 1 << 6;
    pub const NX: u64 = 1 << 63;
    pub const FRAME: u64 = 0x000f_ffff_ffff_f000;
}

pub(super) const RX: u64 = entry::P | entry::A;
pub(super) const RO: u64 = entry::P | entry::A | entry::NX;
pub(super) const RW: u64 = entry::P | entry::RW | entry::A | entry::D | entry::NX;
pub(super) const USER_RO: u64 = RO | entry::US;

/// Slots of the hole that have tables: M2P, core, window, pool.
pub(super) const SLOTS: usize = 4;
pub(super) const SLOT_M2P: usize = 0;
pub(super) const SLOT_CORE: usize = 1;
pub(super) const SLOT_WINDOW: usize = 2;
pub(super) const SLOT_POOL: usize = 3;
/// L3 index of the recursive entry of window and pool.
pub(super) const RECURSIVE: u64 = 511;

/// The TSS lies behind the switch block, in the second hardware page.
pub const TSS: u64 = 0x1c00;
/// Limit of a TSS without an I/O bitmap.
pub const TSS_LIMIT: u32 = 103;
/// Pages that the shadow pool has from the start, at least.
const POOL_MIN: u64 = 256;
const IST_STACKS: u64 = 4;
const GDT_PAGES: u64 = 15;
const LDT_PAGES: u64 = 16;
/// Limit of the core's GDT.
pub const GDT_LIMIT: u16 = 0xefff;
/// Size of a shadow page's list of gfns.
const POOL_GFNS_SIZE: u64 = 2048;

const _: () = assert!(size_of::<Switch>() as u64 <= TSS && GDT_PAGES * PAGE_SIZE == 0xf000);
const _: () = assert!(size_of::<VmPage>() as u64 <= PAGE_SIZE);
const _: () = assert!(TSS + (TSS_LIMIT as u64) < area::HW_SIZE);

/// What a VM's core memory is made for.
pub struct Plan<'a> {
    /// The core.
    pub image: &'a Image,
    /// The domain.
    pub domain: &'a Domain,
    /// vCPUs.
    pub vcpus: u32,
    /// Most pages of the shadow pool.
    pub pool: u64,
    /// XCR0 components that the VM may use.
    pub xcr0_mask: u32,
    /// Frequency of the TSC.
    pub tsc_khz: u64,
    /// KVM's features that the core may use.
    pub features: u32,
    /// What this KVM does wrong, bits of [`blanket_abi::device::quirk`].
    pub quirks: u32,
    /// The core runs with SMAP.
    pub smap: bool,
    /// The core runs on a root of its own.
    pub isolate: bool,
    /// Features that the VM has not, although the host has them.
    pub hidden: Hidden,
    /// CPUID as the core sees it.
    pub cpuid: &'a [CpuidEntry],
}

/// The memory, with everything in place for the first instruction.
pub struct Space {
    region: MmapRegion<()>,
    /// Guest-physical address of it.
    pub(super) base: u64,
    /// Frames of the guest, from [`RAM_BASE`].
    pub(super) frames: u64,
    /// Offset of the first byte that is not given out.
    next: u64,
    /// What has been given out, for what: where each range ends.
    pub(super) uses: Vec<(u64, Use)>,
    /// Offsets of the slots' L3 tables.
    pub(super) l3: [u64; SLOTS],
    /// Offset of the table that isolated guests' roots have in place of the core's.
    pub(super) entry_l3: Option<u64>,
    vm_page: u64,
    /// Offset of the records of the pool's pages.
    pub(super) pool_info: u64,
    /// Offset of the pool, and its pages.
    pub(super) pool: (u64, u64),
    /// Offsets of the switch blocks.
    pub(super) switches: Vec<u64>,
    /// Offsets of the vCPUs' traces.
    traces: Vec<u64>,
    /// Offset of the image.
    image: u64,
    /// In the image: where the entry section begins, its size, the IDT.
    pub(super) entry_section: (u64, u64, u64),
    root: u64,
}

/// Index of a table's entry for `va`.
fn index(va: u64, level: u32) -> u64 {
    va >> (12 + 9 * (level - 1)) & 511
}

impl Space {
    /// Builds it all.
    ///
    /// # Errors
    /// The host has no memory, or the sizes do not fit.
    pub fn build(plan: &Plan<'_>) -> Result<Self, Error> {
        let frames = plan.domain.frames;
        let header = &plan.image.header;
        // Two tables for each 512 pages are more than enough, and what nobody
        // touches costs nothing.
        let size = plan.pool * (PAGE_SIZE + POOL_GFNS_SIZE + POOL_INFO_SIZE)
            + frames * (GFN_INFO_SIZE + 8)
            + u64::from(plan.vcpus) * area::END
            + header.data_end
            + (2 * (frames + plan.pool) / 512 + 4096) * PAGE_SIZE;
        let mut space = Self {
            region: reserve(size.next_multiple_of(2 << 20))?,
            base: (RAM_BASE + frames * PAGE_SIZE).next_multiple_of(1 << 30),
            frames,
            next: 0,
            uses: Vec::new(),
            l3: [0; SLOTS],
            entry_l3: None,
            vm_page: 0,
            pool_info: 0,
            pool: (0, plan.pool),
            switches: Vec::new(),
            traces: Vec::new(),
            image: 0,
            entry_section: (
                header.entry_start,
                header.entry_end - header.entry_start,
                header.idt,
            ),
            root: 0,
        };
        let mut hole = space.make_slots()?;
        space.map_m2p(frames)?;
        space.map_image(plan.image, plan.smap, plan.isolate)?;
        space.vm_page = space.map_new(VM_PAGE, PAGE_SIZE, RW)?;
        let cpuid = space.map_new(CPUID_TABLE, PAGE_SIZE, RO)?;
        space.map_new(GFN_INFO, frames * GFN_INFO_SIZE, RW)?;
        space.pool_info = space.map_new(POOL_INFO, plan.pool * POOL_INFO_SIZE, RW)?;
        space.map_new(POOL_GFNS, plan.pool * POOL_GFNS_SIZE, RW)?;
        space.map(WINDOW, RAM_BASE, frames, RW)?;
        for id in 0..plan.vcpus {
            space.map_area(plan.image, id)?;
        }
        if plan.isolate {
            hole = space.make_entry_area(header, plan.vcpus, &hole)?;
        }
        space.pool.0 = space.map_new(POOL, plan.pool * PAGE_SIZE, RW)?;
        space.fill_cpuid(cpuid, plan.cpuid)?;
        space.fill_vm_page(plan, &hole)?;
        Ok(space)
    }

    /// The memory slot for KVM: guest-physical address, bytes, address here.
    pub fn slot(&self) -> (u64, u64, u64) {
        let bytes = self.region.size() as u64;
        (self.base, bytes, self.region.as_ptr() as u64)
    }

    /// Value of CR3 for a root that holds the hole and nothing else.
    pub fn root(&self) -> u64 {
        self.base + self.root
    }

    // ---- pages and words ----

    /// `count` pages in a row, zeroed; the offset of the first.
    fn pages(&mut self, count: u64, what: Use) -> Result<u64, Error> {
        let at = self.next;
        self.next += count * PAGE_SIZE;
        self.uses.push((self.next, what));
        if self.next > self.region.size() as u64 {
            return Err(Error::NoMemory("hold the core"));
        }
        Ok(at)
    }

    pub(super) fn word(&self, at: u64) -> Result<&AtomicU64, Error> {
        let at = usize::try_from(at).map_err(Error::memory)?;
        self.region.get_atomic_ref(at).map_err(Error::memory)
    }

    fn half(&self, at: u64) -> Result<&AtomicU32, Error> {
        let at = usize::try_from(at).map_err(Error::memory)?;
        self.region.get_atomic_ref(at).map_err(Error::memory)
    }

    fn put_bytes(&self, at: u64, bytes: &[u8]) -> Result<(), Error> {
        let at = usize::try_from(at).map_err(Error::memory)?;
        let slice = self
            .region
            .get_slice(at, bytes.len())
            .map_err(Error::memory)?;
        slice.write_slice(bytes, 0).map_err(Error::memory)
    }

    fn put(&self, at: u64, words: &[u64]) -> Result<(), Error> {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        self.put_bytes(at, &bytes)
    }

    // ---- tables ----

    /// L4 entries of slots 256 to 271, and the root that holds them alone.
    fn make_slots(&mut self) -> Result<[u64; 16], Error> {
        let mut hole = [0; 16];
        for (slot, word) in hole.iter_mut().enumerate().take(SLOTS) {
            let at = self.pages(1, Use::Table)?;
            self.l3[slot] = at;
            let address = self.base + at;
            // Read-only at this level: the core sees its leaf entries, no more.
            if matches!(slot, SLOT_WINDOW | SLOT_POOL) {
                self.put(at + RECURSIVE * 8, &[address | RO | entry::D])?;
            }
            let user = if slot == SLOT_M2P { entry::US } else { 0 };
            *word = address | entry::P | entry::RW | entry::A | user;
        }
        self.root = self.pages(1, Use::Root)?;
        self.put(self.root + HOLE_FIRST_SLOT as u64 * 8, &hole)?;
        Ok(hole)
    }

    /// The part of the hole that an isolated guest's roots hold: what is used before the
    /// entry code has changed CR3. The level-4 entries for it.
    fn make_entry_area(
        &mut self,
        header: &ImageHeader,
        vcpus: u32,
        hole: &[u64; 16],
    ) -> Result<[u64; 16], Error> {
        let l3 = self.pages(1, Use::Table)?;
        self.entry_l3 = Some(l3);
        let text = header.entry_end - header.entry_start;
        self.show(l3, IMAGE + header.entry_start, text)?;
        // The CPU only reads the IDT.
        let idt = self.show(l3, IMAGE + header.idt, PAGE_SIZE)?;
        let readable = self.word(idt)?.load(Ordering::Relaxed) & !(entry::RW | entry::D);
        self.put(idt, &[readable])?;
        for id in 0..vcpus {
            let va = VCPU + u64::from(id) * VCPU_STRIDE;
            self.show(l3, va + area::ENTRY, text)?;
            self.show(l3, va + area::HW - PAGE_SIZE, PAGE_SIZE)?;
            self.show(l3, va + area::HW + PAGE_SIZE, PAGE_SIZE)?;
            for stack in 0..IST_STACKS {
                let page = va + area::IST + (2 * stack + 1) * PAGE_SIZE;
                self.show(l3, page, PAGE_SIZE)?;
            }
            self.show(l3, va + area::GDT, GDT_PAGES * PAGE_SIZE)?;
            self.show(l3, va + area::LDT, LDT_PAGES * PAGE_SIZE)?;
        }
        let mut entries = [0; 16];
        entries[SLOT_M2P] = hole[SLOT_M2P];
        entries[SLOT_CORE] = (self.base + l3) | entry::P | entry::RW | entry::A;
        Ok(entries)
    }

    /// Maps in the tables below `l3` what a range of the hole maps; where its last entry is.
    fn show(&mut self, l3: u64, va: u64, size: u64) -> Result<u64, Error> {
        let mut last = 0;
        for at in (va..va + size).step_by(4096) {
            let from = self.leaf_table(at)? + index(at, 1) * 8;
            last = self.table_below(l3, at, 0)? + index(at, 1) * 8;
            let word = self.word(from)?.load(Ordering::Relaxed);
            self.put(last, &[word])?;
        }
        Ok(last)
    }

    /// Offset of the leaf table for `va`, with the tables above it made.
    fn leaf_table(&mut self, va: u64) -> Result<u64, Error> {
        let slot = usize::try_from(index(va, 4)).map_err(Error::memory)? - HOLE_FIRST_SLOT;
        let user = if slot == SLOT_M2P { entry::US } else { 0 };
        self.table_below(self.l3[slot], va, user)
    }

    /// As [`Self::leaf_table`], below the L3 table at offset `table`.
    fn table_below(&mut self, mut table: u64, va: u64, user: u64) -> Result<u64, Error> {
        for level in [3, 2] {
            let at = table + index(va, level) * 8;
            let mut word = self.word(at)?.load(Ordering::Relaxed);
            if word & entry::P == 0 {
                // D too: through the recursive entry, tables are leaves.
                word = (self.base + self.pages(1, Use::Table)?)
                    | entry::P
                    | entry::RW
                    | entry::A
                    | entry::D
                    | user;
                self.put(at, &[word])?;
            }
            table = (word & entry::FRAME) - self.base;
        }
        Ok(table)
    }

    /// Maps `count` pages from `va` to those from the physical `address`.
    fn map(&mut self, va: u64, address: u64, count: u64, flags: u64) -> Result<(), Error> {
        let mut done = 0;
        while done < count {
            let at = va + done * PAGE_SIZE;
            let run = (512 - index(at, 1)).min(count - done);
            let entries: Vec<u64> = (done..done + run)
                .map(|page| (address + page * PAGE_SIZE) | flags)
                .collect();
            let table = self.leaf_table(at)?;
            self.put(table + index(at, 1) * 8, &entries)?;
            done += run;
        }
        Ok(())
    }

    /// Maps new zeroed pages over `size` bytes; the offset of the first.
    fn map_new(&mut self, va: u64, size: u64, flags: u64) -> Result<u64, Error> {
        let count = size.div_ceil(PAGE_SIZE);
        let what = match va {
            M2P..IMAGE => Use::M2p,
            POOL.. => Use::Pool,
            _ if flags == RO => Use::Rodata,
            _ => Use::Data,
        };
        let at = self.pages(count, what)?;
        self.map(va, self.base + at, count, flags)?;
        Ok(at)
    }

    // ---- contents ----

    /// The M2P of an identity VM: entry *i* is *i*.
    fn map_m2p(&mut self, frames: u64) -> Result<(), Error> {
        let entries = frames.next_multiple_of(512);
        let at = self.map_new(M2P, entries * 8, USER_RO)?;
        let words: Vec<u64> = (0..entries).collect();
        self.put(at, &words)
    }

    fn map_image(&mut self, image: &Image, smap: bool, isolate: bool) -> Result<(), Error> {
        let header = &image.header;
        let at = self.pages(header.text_end / PAGE_SIZE, Use::Text)?;
        self.pages(
            (header.rodata_end - header.text_end) / PAGE_SIZE,
            Use::Rodata,
        )?;
        self.pages((header.data_end - header.rodata_end) / PAGE_SIZE, Use::Data)?;
        let bytes = usize::try_from(header.file_end).map_err(Error::memory)?;
        let file = image.prepared(smap, isolate)?;
        self.put_bytes(at, &file[..bytes])?;
        self.fill_idt(at + header.idt, header.stubs)?;
        let mut from = 0;
        for (to, flags) in [
            (header.text_end, RX),
            (header.rodata_end, RO),
            (header.data_end, RW),
        ] {
            let (va, address) = (IMAGE + from, self.base + at + from);
            self.map(va, address, (to - from) / PAGE_SIZE, flags)?;
            from = to;
        }
        // The vCPU areas show the same pages again.
        self.image = at;
        Ok(())
    }

    /// Interrupt gates to the stubs, all closed to `int n` but #BP and #OF.
    fn fill_idt(&self, at: u64, stubs: u64) -> Result<(), Error> {
        let mut words = Vec::with_capacity(512);
        for vector in 0..256 {
            let address = IMAGE + stubs + vector * STUB_STRIDE;
            let ist = match vector {
                8 => 1,
                2 => 2,
                1 => 3,
                18 => 4,
                _ => 0,
            };
            let dpl = if matches!(vector, 3 | 4) { 3 } else { 0 };
            // A 64-bit interrupt gate (Intel SDM vol. 3, 6.14.1).
            words.push(
                address & 0xffff
                    | u64::from(sel::CORE_CS) << 16
                    | ist << 32
                    | (0x8e | dpl << 5) << 40
                    | (address >> 16 & 0xffff) << 48,
            );
            words.push(address >> 32);
        }
        self.put(at, &words)
    }

    /// A vCPU's area: entry section, stacks, hardware page, GDT, LDT.
    fn map_area(&mut self, image: &Image, id: u32) -> Result<(), Error> {
        let header = &image.header;
        let va = VCPU + u64::from(id) * VCPU_STRIDE;
        let entry = self.base + self.image + header.entry_start;
        let entry_pages = (header.entry_end - header.entry_start) / PAGE_SIZE;
        self.map(va + area::ENTRY, entry, entry_pages, RX)?;
        self.map_new(va + area::STACK, area::STACK_SIZE, RW)?;
        let hw = self.map_new(va + area::HW, area::HW_SIZE, RW)?;
        let pv = self.map_new(va + area::PV, PAGE_SIZE, RW)?;
        for stack in 0..IST_STACKS {
            self.map_new(va + area::IST + (2 * stack + 1) * PAGE_SIZE, PAGE_SIZE, RW)?;
        }
        let gdt = self.map_new(va + area::GDT, GDT_PAGES * PAGE_SIZE, RW)?;
        self.map_new(va + area::LDT, LDT_PAGES * PAGE_SIZE, RW)?;
        let trace = self.map_new(va + area::TRACE, area::TRACE_SIZE, RW)?;
        self.traces.push(trace);

        self.fill_gdt(gdt, va + area::HW + TSS)?;
        self.fill_tss(hw + TSS, va)?;
        self.switches.push(hw);
        let field = |offset: usize| hw + offset as u64;
        self.put(field(offset_of!(Switch, deadline)), &[u64::MAX])?;
        self.put(field(offset_of!(Switch, armed)), &[u64::MAX])?;
        self.put(field(offset_of!(Switch, guest_xcr0)), &[1])?;
        self.put(field(offset_of!(Switch, pv_address)), &[self.base + pv])?;
        self.half(field(offset_of!(Switch, vcpu_id)))?
            .store(id, Ordering::Relaxed);
        Ok(())
    }

    fn fill_gdt(&self, gdt: u64, tss: u64) -> Result<(), Error> {
        let descriptor =
            |selector: u16, words: &[u64]| self.put(gdt + u64::from(selector & !7), words);
        descriptor(sel::CORE_CS, &[0x00af_9b00_0000_ffff])?;
        descriptor(sel::CORE_SS, &[0x00cf_9300_0000_ffff])?;
        descriptor(sel::GUEST_CS32, &[0x00cf_fb00_0000_ffff])?;
        descriptor(sel::GUEST_SS, &[0x00cf_f300_0000_ffff])?;
        descriptor(sel::GUEST_CS64, &[0x00af_fb00_0000_ffff])?;
        let low =
            u64::from(TSS_LIMIT) | (tss & 0xff_ffff) << 16 | 0x8b << 40 | (tss >> 24 & 0xff) << 56;
        descriptor(sel::CORE_TSS, &[low, tss >> 32])
    }

    /// RSP0 and four IST stacks (Intel SDM vol. 3, 7.7). The fields are at odd
    /// multiples of four bytes.
    fn fill_tss(&self, tss: u64, va: u64) -> Result<(), Error> {
        let mut bytes = [0; TSS_LIMIT as usize + 1];
        bytes[4..12].copy_from_slice(&(va + area::HW).to_le_bytes());
        for stack in 0..IST_STACKS {
            let top = va + area::IST + (2 * stack + 2) * PAGE_SIZE;
            let at = usize::try_from(36 + 8 * stack).map_err(Error::memory)?;
            bytes[at..at + 8].copy_from_slice(&top.to_le_bytes());
        }
        // No I/O bitmap: it would begin behind the limit.
        bytes[102..104].copy_from_slice(&[104, 0]);
        self.put_bytes(tss, &bytes)
    }

    fn fill_cpuid(&self, at: u64, entries: &[CpuidEntry]) -> Result<(), Error> {
        if entries.len() > CPUID_MAX {
            return Err(Error::Cpuid("it has more leaves than the core takes"));
        }
        for (index, entry) in entries.iter().enumerate() {
            let [a, b, c, d] = entry.regs;
            let bytes: Vec<u8> = [entry.leaf, entry.subleaf, a, b, c, d]
                .into_iter()
                .flat_map(u32::to_le_bytes)
                .collect();
            self.put_bytes(at + (index * size_of::<CpuidEntry>()) as u64, &bytes)?;
        }
        Ok(())
    }

    fn fill_vm_page(&self, plan: &Plan<'_>, hole: &[u64; 16]) -> Result<(), Error> {
        let field = |offset: usize| self.vm_page + offset as u64;
        let half = |offset: usize, value: u32| {
            self.half(field(offset))
                .map(|word| word.store(value, Ordering::Relaxed))
        };
        let entries = u32::try_from(plan.cpuid.len()).map_err(Error::memory)?;
        self.put(
            field(offset_of!(VmPage, boot)),
            &boot_words(&plan.domain.boot),
        )?;
        self.put(field(offset_of!(VmPage, nr_frames)), &[plan.domain.frames])?;
        half(offset_of!(VmPage, nr_vcpus), plan.vcpus)?;
        // The core takes more as it needs them: `kvm::grow_pool` of the hal.
        let first = POOL_MIN.max(plan.domain.frames / 50).min(plan.pool);
        self.put(field(offset_of!(VmPage, pool_pages)), &[first])?;
        self.put(field(offset_of!(VmPage, pool_limit)), &[plan.pool])?;
        half(offset_of!(VmPage, xcr0_mask), plan.xcr0_mask)?;
        for (word, at) in plan.hidden.0.iter().zip((0..).step_by(size_of::<u32>())) {
            half(offset_of!(VmPage, cpuid_hidden) + at, *word)?;
        }
        self.put(field(offset_of!(VmPage, tsc_khz)), &[plan.tsc_khz])?;
        self.put(field(offset_of!(VmPage, hole)), hole)?;
        let core_cr3 = if plan.isolate { self.root() } else { 0 };
        self.put(field(offset_of!(VmPage, core_cr3)), &[core_cr3])?;
        half(offset_of!(VmPage, host), host::KVM)?;
        half(offset_of!(VmPage, kvm_features), plan.features)?;
        half(offset_of!(VmPage, quirks), plan.quirks)?;
        half(offset_of!(VmPage, cpuid_entries), entries)
    }

    // ---- while the VM runs ----

    /// Pages of the shadow pool in use.
    ///
    /// # Errors
    /// None that a built space has.
    pub fn pool_pages(&self) -> Result<u64, Error> {
        let at = |field: usize| self.word(self.vm_page + field as u64);
        let pages = at(offset_of!(VmPage, pool_pages))?.load(Ordering::Relaxed);
        let gone = at(offset_of!(VmPage, pool_gone))?.load(Ordering::Relaxed);
        Ok(pages.saturating_sub(gone))
    }

    /// Asks the core for shadow pages that nothing uses. Whether vCPU 0 must be
    /// interrupted for it.
    ///
    /// # Errors
    /// None that a built space has.
    pub fn reclaim(&self) -> Result<bool, Error> {
        let at = self.vm_page + offset_of!(VmPage, reclaim) as u64;
        self.half(at)?.store(1, Ordering::SeqCst);
        let before = self.pending(0)?.fetch_or(pending::KICK, Ordering::SeqCst);
        Ok(before & pending::KICK == 0)
    }

    /// Gives the host the memory of pool pages that the core has named in an exit. What
    /// is found there next is zero, as the core has left it.
    ///
    /// # Errors
    /// There is no such vCPU; the host refuses.
    pub fn trim(&self, vcpu: u32, length: u64) -> Result<(), Error> {
        let list = self.text(vcpu, length)?;
        for page in list.as_chunks().0 {
            let page = u64::from(u32::from_le_bytes(*page));
            let (first, pages) = self.pool;
            if page >= pages {
                continue;
            }
            let at = usize::try_from(first + page * PAGE_SIZE).map_err(Error::memory)?;
            let size = usize::try_from(PAGE_SIZE).map_err(Error::memory)?;
            // SAFETY: the page lies in the pool, whose whole range is in the region, and
            // that is mapped as long as `self`. This program keeps nothing there.
            unsafe {
                madvise(
                    self.region.as_ptr().add(at).cast(),
                    size,
                    Advice::LinuxDontNeed,
                )
            }
            .map_err(Error::memory)?;
        }
        Ok(())
    }

    /// Sets how many frames of RAM the guest may have at most.
    ///
    /// # Errors
    /// None that a built space has.
    pub fn set_target(&self, frames: u64) -> Result<(), Error> {
        let at = self.vm_page + offset_of!(VmPage, target) as u64;
        self.word(at)?.store(frames, Ordering::Relaxed);
        Ok(())
    }

    fn switch_field(&self, vcpu: u32, offset: usize) -> Result<u64, Error> {
        self.switches
            .get(vcpu as usize)
            .map(|at| at + offset as u64)
            .ok_or(Error::NoVcpu(vcpu))
    }

    /// What the core wrote before it left: reason and arguments.
    ///
    /// # Errors
    /// There is no such vCPU.
    pub fn exit(&self, vcpu: u32) -> Result<(u32, [u64; 4]), Error> {
        let reason = self.half(self.switch_field(vcpu, offset_of!(Switch, exit))?)?;
        let at = self.switch_field(vcpu, offset_of!(Switch, args))?;
        let mut args = [0; 4];
        for (arg, index) in args.iter_mut().zip(0u64..) {
            *arg = self.word(at + index * 8)?.load(Ordering::Relaxed);
        }
        Ok((reason.load(Ordering::Acquire), args))
    }

    /// The text of an exit, `length` bytes of it, or what there is room for.
    ///
    /// # Errors
    /// There is no such vCPU.
    pub fn text(&self, vcpu: u32, length: u64) -> Result<Vec<u8>, Error> {
        let length = usize::try_from(length).unwrap_or(RUN_DATA).min(RUN_DATA);
        let at = self.switch_field(vcpu, offset_of!(Switch, data))?;
        let at = usize::try_from(at).map_err(Error::memory)?;
        let mut text = vec![0; length];
        let slice = self.region.get_slice(at, length).map_err(Error::memory)?;
        slice.read_slice(&mut text, 0).map_err(Error::memory)?;
        Ok(text)
    }

    /// Notes that a backend has raised `port`. The vCPU that must be interrupted for
    /// it, if one must.
    ///
    /// # Errors
    /// The port does not exist.
    pub fn raise(&self, port: u32) -> Result<Option<u32>, Error> {
        if port >= blanket_abi::xen::event::PORTS {
            return Err(Error::NoPort(port));
        }
        let (word, bit) = (u64::from(port / 64), port % 64);
        let raised = self.vm_page + offset_of!(VmPage, raised) as u64 + word * 8;
        self.word(raised)?.fetch_or(1 << bit, Ordering::SeqCst);
        // Where the port is bound; those without an entry are vCPU 0's.
        let owners = self.vm_page + offset_of!(VmPage, port_vcpu) as u64;
        let owner = if port < 2048 {
            let word = self.word(owners + u64::from(port / 8) * 8)?;
            (word.load(Ordering::Relaxed) >> (port % 8 * 8) & 0xff) as u32
        } else {
            0
        };
        let vcpu = if (owner as usize) < self.switches.len() {
            owner
        } else {
            0
        };
        let before = self
            .pending(vcpu)?
            .fetch_or(pending::RAISED, Ordering::SeqCst);
        // Who set the bit first has sent an interrupt, or is about to.
        Ok((before & pending::RAISED == 0).then_some(vcpu))
    }

    /// Switches the trace on or off. The vCPUs that must be interrupted to see it.
    ///
    /// # Errors
    /// None that a built space has.
    pub fn trace(&self, on: bool) -> Result<Vec<u32>, Error> {
        self.tell_all(offset_of!(VmPage, trace), on.into())
    }

    /// Makes the VM stand still or go on. The vCPUs that must be interrupted to see it.
    ///
    /// # Errors
    /// None that a built space has.
    pub fn pause(&self, what: u32) -> Result<Vec<u32>, Error> {
        self.tell_all(offset_of!(VmPage, pause), what)
    }

    /// Sets a word of the shared page and has all vCPUs look.
    fn tell_all(&self, field: usize, what: u32) -> Result<Vec<u32>, Error> {
        self.half(self.vm_page + field as u64)?
            .store(what, Ordering::SeqCst);
        let mut asked = Vec::new();
        for vcpu in (0u32..).take(self.switches.len()) {
            let before = self
                .pending(vcpu)?
                .fetch_or(pending::KICK, Ordering::SeqCst);
            // Who set the bit first has sent an interrupt, or is about to.
            if before & pending::KICK == 0 {
                asked.push(vcpu);
            }
        }
        Ok(asked)
    }

    /// The last records of all vCPUs.
    ///
    /// # Errors
    /// None that a built space has.
    pub fn trace_records(&self) -> Result<Vec<Record>, Error> {
        let mut all = Vec::new();
        for (vcpu, &at) in (0u32..).zip(&self.traces) {
            let at = usize::try_from(at).map_err(Error::memory)?;
            let slice = self
                .region
                .get_slice(at, size_of::<Ring>())
                .map_err(Error::memory)?;
            let guard = slice.ptr_guard();
            // SAFETY: `Ring` is all atomics, for which every content is valid; the
            // slice has its size, lies on a page, and lives as long as `self`.
            let ring = unsafe { &*guard.as_ptr().cast::<Ring>() };
            all.extend(ring.read().map(|record| Record::of(vcpu, &record)));
        }
        Ok(all)
    }

    /// The word of bits that others set for a vCPU and its core takes.
    ///
    /// # Errors
    /// There is no such vCPU.
    pub fn pending(&self, vcpu: u32) -> Result<&AtomicU32, Error> {
        self.half(self.switch_field(vcpu, offset_of!(Switch, pending))?)
    }

    /// Exits by reason and the core's counters, summed over the vCPUs.
    ///
    /// # Errors
    /// None that a built space has.
    pub fn counters(&self) -> Result<([u64; EXIT_REASONS], [u64; COUNTERS]), Error> {
        let mut exits = [0u64; EXIT_REASONS];
        let mut counters = [0u64; COUNTERS];
        for vcpu in (0u32..).take(self.switches.len()) {
            let of = |offset, index: usize| {
                let at = self.switch_field(vcpu, offset)? + index as u64 * 8;
                Ok::<u64, Error>(self.word(at)?.load(Ordering::Relaxed))
            };
            for (index, sum) in exits.iter_mut().enumerate() {
                *sum = sum.wrapping_add(of(offset_of!(Switch, in_place), index)?);
            }
            for (index, sum) in counters.iter_mut().enumerate() {
                *sum = sum.wrapping_add(of(offset_of!(Switch, counters), index)?);
            }
        }
        Ok((exits, counters))
    }
}

/// Memory that costs nothing until it is touched.
fn reserve(size: u64) -> Result<MmapRegion<()>, Error> {
    let bytes = usize::try_from(size).map_err(Error::memory)?;
    MmapRegion::build(
        None,
        bytes,
        libc::PROT_READ | libc::PROT_WRITE,
        libc::MAP_ANONYMOUS | libc::MAP_PRIVATE | libc::MAP_NORESERVE,
    )
    .map_err(Error::memory)
}

fn boot_words(boot: &Boot) -> [u64; 15] {
    const _: () = assert!(size_of::<Boot>() == 15 * 8);
    [
        boot.ram_frames,
        boot.shared_info,
        boot.grant_base,
        boot.grant_frames,
        boot.cr3,
        boot.rip,
        boot.rsp,
        boot.start_info,
        u64::from(boot.store_port) | u64::from(boot.console_port) << 32,
        boot.flags,
        boot.hypercall_page,
        boot.start_frames,
        boot.state_base,
        boot.state_frames,
        boot.most_frames,
    ]
}

#[cfg(test)]
pub(super) mod tests;
