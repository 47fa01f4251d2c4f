//! One vCPU at work: the context that every handler runs in.

use crate::arrive::Rounds;
use crate::machine::Machine;
use crate::mmu::{Access, Fault, Need};
use crate::vcpu::{Fast, NEVER, Place, State, TrapFrame, Vcpu, rflags};
use crate::vm::Vm;
use blanket_abi::device::{counter, crash, exit, pending};
use blanket_abi::layout::{WINDOW, sel};
use blanket_abi::trace::kind;
use blanket_abi::xen::errno;
use blanket_abi::xen::shared::{self, runstate, vcpu_info};
use blanket_abi::{Gfn, Va};
use core::fmt::Write as _;
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use core::sync::atomic::{AtomicU64, fence};

/// Result of a hypercall: a value, or a negative errno.
pub type Hyper = Result<i64, i64>;

/// Steps of a hypercall between two breaths: a step is a copy from or to the guest
/// or the change of a table's entry, far below a microsecond.
const BREATH: u32 = 2048;

/// Looks at a lock, or at another vCPU, before the host is asked to run others.
pub(crate) const SPINS: u32 = 4096;

/// Pages that the shadow pool grows by. What is added stays, so a small guest should
/// not be given much more than it needs.
const POOL_STEP: u64 = 64;

/// Times that one operation may find the shadow pool empty at its limit.
const POOL_TRIES: u32 = 1000;

/// The vCPU that runs on this CPU, between entry and return.
pub struct Context<'a, M: Machine> {
    /// Memory, CPU and host.
    pub m: &'a M,
    /// What the vCPUs share.
    pub vm: &'a Vm,
    /// What is this vCPU's own.
    pub v: &'a mut Vcpu,
    /// What the entry code's fast paths read.
    pub fast: &'a mut Fast,
    /// The guest's registers.
    pub f: &'a mut TrapFrame,
}

/// A text of bounded length, for crash reports.
pub struct Text {
    buf: [u8; 1024],
    len: usize,
}

impl core::fmt::Write for Text {
    fn write_str(&mut self, s: &str) -> core::fmt::Result {
        let room = &mut self.buf[self.len..];
        let n = s.len().min(room.len());
        room[..n].copy_from_slice(&s.as_bytes()[..n]);
        self.len += n;
        Ok(())
    }
}

impl Text {
    /// Formats; what does not fit is cut.
    #[must_use]
    pub fn new(args: core::fmt::Arguments<'_>) -> Self {
        let mut t = Self {
            buf: [0; 1024],
            len: 0,
        };
        // Writing to a Text cannot fail.
        let _cut = t.write_fmt(args);
        t
    }
    /// The bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.buf[..self.len]
    }
}

/// What a frame holds besides SS, RSP, RFLAGS, CS, RIP, R11 and RCX.
#[derive(Clone, Copy, Debug)]
pub enum Shape {
    /// Nothing.
    Plain,
    /// An error code.
    Error(u64),
    /// DS, ES, FS, GS: the failsafe frame.
    Selectors([u64; 4]),
}

impl<M: Machine> Context<'_, M> {
    /// Whether the guest is in kernel mode.
    #[inline]
    #[must_use]
    pub fn kernel_mode(&self) -> bool {
        self.fast.kernel_mode != 0
    }

    /// The shadow of the root that is in use.
    #[inline]
    #[must_use]
    pub fn root(&self) -> u32 {
        if self.kernel_mode() {
            self.v.kernel_root
        } else {
            self.v.user_root
        }
    }

    /// Loads the root of the present mode: flushes the TLB.
    pub fn load_root(&mut self) {
        self.count(counter::CR3_LOAD);
        self.vm.epochs.enter(self.v.id);
        let cr3 = if self.kernel_mode() {
            self.fast.kernel_cr3
        } else {
            self.fast.user_cr3
        };
        if cr3 != 0 {
            self.m.load_root(cr3);
        }
    }

    /// Asks the host; unless it answers in place, all translations are fresh then.
    #[inline(never)]
    pub fn exit(&mut self, reason: u32, args: [u64; 4]) -> i64 {
        if self.fast.traced {
            self.record(kind::EXIT, reason.into(), args);
        }
        if self.m.in_place(reason) {
            self.v.check_timers |= reason == exit::INTR;
            return self.m.exit(reason, args);
        }
        self.v.check_timers = true;
        self.publish_fast_counters();
        // What the host may run others after: the guest's own locks do not spin for a
        // vCPU that is not running, and its clock of stolen time counts.
        let stolen = self.v.runstate == runstate::RUNNING
            && matches!(reason, exit::INTR | exit::YIELD | exit::BREATH);
        if stolen {
            self.set_runstate(runstate::RUNNABLE);
        }
        self.vm.epochs.leave(self.v.id);
        let ret = self.m.exit(reason, args);
        self.arrive();
        if stolen {
            self.set_runstate(runstate::RUNNING);
        }
        self.load_root();
        ret
    }

    /// Ends the VM with a report. Returns only if the VMM enters again; the vCPU
    /// then leaves again at once.
    pub fn crash(&mut self, why: u64, args: core::fmt::Arguments<'_>) -> ! {
        let f = *self.f;
        let text = Text::new(format_args!(
            "vCPU {}: {args}\nmode {} rip {:#018x} cs {:#x} rflags {:#x} rsp {:#018x} ss {:#x}\n\
             rax {:#018x} rbx {:#018x} rcx {:#018x} rdx {:#018x}\n\
             rsi {:#018x} rdi {:#018x} rbp {:#018x} r8 {:#018x}\n\
             entered by {} error {:#x} cr2 {:#x}\n",
            self.v.id,
            if self.kernel_mode() { "kernel" } else { "user" },
            f.rip,
            f.cs,
            f.rflags,
            f.rsp,
            f.ss,
            f.rax,
            f.rbx,
            f.rcx,
            f.rdx,
            f.rsi,
            f.rdi,
            f.rbp,
            f.r8,
            f.vector,
            f.error,
            self.m.cr2(),
        ));
        loop {
            let len = self.m.set_data(text.bytes());
            self.exit(exit::CRASH, [why, 0, 0, len as u64]);
        }
    }

    /// Counts `steps` of a hypercall that the guest can make as long as it likes,
    /// and lets interrupts in between.
    #[inline]
    pub fn breathe(&mut self, steps: u32) {
        self.v.work += steps;
        if self.v.work >= BREATH {
            self.v.work = 0;
            self.exit(exit::BREATH, [0; 4]);
        }
    }

    #[cold]
    pub(crate) fn mend(&mut self, need: Need, pool_tries: u32) {
        match need {
            Need::Frame(gfn) => {
                let ret = self.exit(exit::FRAME, [gfn.0, 0, 0, 0]);
                if ret < 0 && self.m.frame(gfn).is_none() {
                    self.crash(
                        crash::MEMORY,
                        format_args!("the host has no memory for {gfn:?} (error {ret})"),
                    );
                }
            }
            Need::Breath => {
                self.exit(exit::BREATH, [0; 4]);
            }
            Need::Flush(mask) => self.flush_vcpus(mask),
            Need::Pool => {
                if self.refill() || self.exit(exit::POOL, [POOL_STEP, 0, 0, 0]) > 0 {
                    return;
                }
                // At the limit: first what is free but not yet safe, then all. Other
                // vCPUs may take what was freed, hence more than two tries.
                if pool_tries > POOL_TRIES {
                    self.crash(crash::MEMORY, format_args!("the shadow pool is too small"));
                }
                let retired = pool_tries == 1 && self.lock_mmu().has_retired();
                if !retired {
                    self.count(counter::SHADOW_DROP_ALL);
                    let mut mmu = self.lock_mmu();
                    mmu.drop_all(self.m, &self.vm.epochs);
                    let freed = mmu.has_retired();
                    drop(mmu);
                    if !freed {
                        self.crash(crash::MEMORY, format_args!("the shadow pool is too small"));
                    }
                }
                self.flush_vcpus(u64::MAX);
            }
        }
    }

    /// Flushes the TLBs of the vCPUs in `mask`, this one included if it is in it.
    pub fn flush_vcpus(&mut self, mask: u64) {
        fence(SeqCst);
        let me = 1u64 << self.v.id;
        let mut others = 0;
        for id in 0..self.vm.nr_vcpus {
            if mask & !me & 1 << id != 0 && self.vm.epochs.inside(id) {
                others |= 1 << id;
            }
        }
        let since = self.vm.epochs.begin();
        if others != 0 {
            let left = |c: &Self| {
                (0..c.vm.nr_vcpus)
                    .filter(|&id| others & 1 << id != 0 && !c.vm.epochs.reached(id, since))
                    .fold(0u64, |left, id| left | 1 << id)
            };
            // Our own translations are fresh when the exit returns. The module has
            // waited for the others then; inside KVM it is we who wait.
            let mut stale = others;
            loop {
                let flushed = self.exit(exit::FLUSH, [stale, 0, 0, 0]).cast_unsigned();
                for id in 0..self.vm.nr_vcpus {
                    if stale & flushed & 1 << id != 0 {
                        self.vm.epochs.reach(id, since);
                    }
                }
                for _ in 0..SPINS {
                    stale = left(self);
                    if stale == 0 {
                        return;
                    }
                    // Two that wait for each other must both go on.
                    self.answer_flush();
                    core::hint::spin_loop();
                }
                self.exit(exit::YIELD, [0; 4]);
            }
        } else if mask & me != 0 {
            self.load_root();
        }
    }

    /// Flushes this vCPU's TLB if another one waits for it.
    pub(crate) fn answer_flush(&mut self) {
        let pending = &self.m.switch().pending;
        if pending.load(Relaxed) & pending::FLUSH != 0 {
            pending.fetch_and(!pending::FLUSH, SeqCst);
            self.load_root();
        }
    }

    /// Makes vCPUs look at their events.
    pub fn kick(&mut self, mask: u64) {
        let mut todo = 0;
        for id in 0..self.vm.nr_vcpus {
            if id != self.v.id
                && mask & 1 << id != 0
                && self.m.pending_of(id).fetch_or(pending::KICK, SeqCst) & pending::KICK == 0
            {
                todo |= 1 << id;
            }
        }
        if todo != 0 {
            self.exit(exit::KICK, [todo, 0, 0, 0]);
        }
    }

    /// Handles a missing translation in the present address space.
    ///
    /// # Errors
    /// EFAULT where the guest's own tables do not allow the access.
    #[cold]
    #[inline(never)]
    pub fn resolve(&mut self, va: Va, write: bool) -> Result<(), i64> {
        if !va.is_guest() {
            return Err(errno::EFAULT);
        }
        let root = self.root();
        let access = Access {
            write,
            fetch: false,
        };
        match self.mmu(|mmu, m, ep| mmu.fault(m, ep, root, va, access)) {
            Fault::Fixed => Ok(()),
            Fault::Guest { .. } | Fault::Table { .. } => Err(errno::EFAULT),
        }
    }

    fn guest_range(va: Va, len: usize) -> Result<(), i64> {
        let last = va.0.checked_add(len as u64).ok_or(errno::EFAULT)?;
        (va.is_guest() && Va(last).is_guest())
            .then_some(())
            .ok_or(errno::EFAULT)
    }

    /// Copies from the guest's present address space.
    ///
    /// # Errors
    /// EFAULT.
    #[inline]
    pub fn copy_in(&mut self, va: Va, to: &mut [u8]) -> Result<(), i64> {
        Self::guest_range(va, to.len())?;
        if self.fast.isolated != 0 {
            return self.copy_in_by_frame(va, to);
        }
        let mut rounds = Rounds::new(self.v.revocations);
        loop {
            match self.m.copy_from_guest(va, to) {
                Ok(()) => return Ok(()),
                Err(at) => self.resolve(at, false)?,
            }
            rounds.next(self.v.revocations)?;
        }
    }

    /// Copies to the guest's present address space.
    ///
    /// # Errors
    /// EFAULT.
    #[inline]
    pub fn copy_out(&mut self, va: Va, from: &[u8]) -> Result<(), i64> {
        Self::guest_range(va, from.len())?;
        if self.fast.isolated != 0 {
            return self.copy_out_by_frame(va, from);
        }
        let mut rounds = Rounds::new(self.v.revocations);
        loop {
            match self.m.copy_to_guest(va, from) {
                Ok(()) => return Ok(()),
                Err(at) => self.resolve(at, true)?,
            }
            rounds.next(self.v.revocations)?;
        }
    }

    /// Reads `N` words from the guest.
    ///
    /// # Errors
    /// EFAULT.
    #[inline]
    pub fn read_words<const N: usize>(&mut self, va: u64) -> Result<[u64; N], i64> {
        let mut bytes = [[0u8; 8]; N];
        self.copy_in(Va(va), bytes.as_flattened_mut())?;
        Ok(bytes.map(u64::from_le_bytes))
    }

    /// Writes `N` words to the guest.
    ///
    /// # Errors
    /// EFAULT.
    #[inline]
    pub fn write_words<const N: usize>(&mut self, va: u64, words: [u64; N]) -> Result<(), i64> {
        let bytes = words.map(u64::to_le_bytes);
        self.copy_out(Va(va), bytes.as_flattened())
    }

    /// Reads a 32-bit word.
    ///
    /// # Errors
    /// EFAULT.
    pub fn read_u32(&mut self, va: u64) -> Result<u32, i64> {
        let mut b = [0; 4];
        self.copy_in(Va(va), &mut b)?;
        Ok(u32::from_le_bytes(b))
    }

    /// Writes a 32-bit word.
    ///
    /// # Errors
    /// EFAULT.
    pub fn write_u32(&mut self, va: u64, val: u32) -> Result<(), i64> {
        self.copy_out(Va(va), &val.to_le_bytes())
    }

    /// Word `offset / 8` of a place in a frame that the host has given.
    #[inline]
    #[must_use]
    pub fn word(&self, gfn: Gfn, offset: u64) -> Option<&AtomicU64> {
        if gfn.0 >= self.vm.nr_frames {
            return None;
        }
        self.m.frame(gfn)?.get((offset >> 3) as usize & 511)
    }

    /// Makes sure that the host has given a frame.
    ///
    /// # Errors
    /// EINVAL for a frame that the VM does not have, or that the guest has given up.
    pub fn need_frame(&mut self, gfn: Gfn) -> Result<(), i64> {
        self.with_frame(gfn, |_, m, _| {
            m.frame(gfn).map(|_| ()).ok_or(Need::Frame(gfn))
        })
    }

    /// Translates a kernel virtual address once, for an area of `size` bytes that
    /// the guest registers. The area must not cross a page.
    ///
    /// # Errors
    /// EINVAL, EFAULT.
    pub fn place(&mut self, va: Va, size: u64) -> Result<Place, i64> {
        let offset = va.0 & 0xfff;
        if !va.is_guest() || offset & 7 != 0 || offset + size > 4096 {
            return Err(errno::EINVAL);
        }
        let root = self.v.kernel_root;
        let gfn = self.mmu(|mmu, m, _| {
            let Some(table) = mmu.leaf_table(m, mmu.root_gfn(root), va)? else {
                return Ok(None);
            };
            let leaf = m.frame(table).ok_or(Need::Frame(table))?[va.index(1)].load(Relaxed);
            Ok((leaf & crate::pte::P != 0).then(|| Gfn(crate::pte::frame(leaf))))
        });
        let gfn = gfn.ok_or(errno::EFAULT)?;
        self.need_frame(gfn)?;
        Ok(Place { gfn, offset })
    }

    /// Brings the CPU to the state in which a vCPU starts.
    pub fn reset_cpu(&mut self) {
        let page = self.m.vm_page();
        if page.xcr0_mask != 0 {
            self.v.xcr0 = 1;
            self.m.set_xcr0(1);
        }
        // Null selectors; the bases follow from the start context.
        let _all_null = self.m.load_data_selectors([0; 4]);
        self.m.set_fs_base(0);
        self.m.set_gs_base(0);
        self.m.set_inactive_gs_base(0);
        self.m.load_ldt(0);
    }

    /// What CPUID says to this guest.
    #[must_use]
    pub fn cpuid_policy(&self) -> crate::cpuid::Policy {
        let page = self.m.vm_page();
        let xcr0_mask = u64::from(page.xcr0_mask);
        let clock = self.clock();
        crate::cpuid::Policy {
            vcpu_id: self.v.id,
            xcr0_mask,
            xcr0: self.v.xcr0,
            osxsave: xcr0_mask != 0,
            hidden: crate::cpuid::Hidden(page.cpuid_hidden),
            tsc_aux: false,
            stable_tsc: clock.flags & 1 != 0,
            tsc_khz: u32::try_from(page.tsc_khz).unwrap_or(u32::MAX),
            tsc_mul: clock.mul,
            tsc_shift: clock.shift,
        }
    }

    /// Counts one of `blanket_abi::device::counter`. Only this vCPU writes its
    /// counters, so that a plain increment is enough.
    #[inline]
    pub fn count(&self, what: usize) {
        if let Some(c) = self.m.switch().counters.get(what) {
            c.store(c.load(Relaxed).wrapping_add(1), Relaxed);
        }
    }

    /// Publishes the counters that the entry code keeps.
    fn publish_fast_counters(&self) {
        let all = &self.m.switch().counters;
        all[counter::FAST_SYSCALL].store(self.fast.fast_syscalls, Relaxed);
        all[counter::FAST_IRET].store(self.fast.fast_irets, Relaxed);
    }

    // ---- vcpu_info ----

    /// Word of the vcpu_info at byte offset `field`.
    #[inline]
    fn info_word(&self, field: u64) -> Option<&AtomicU64> {
        let Place { gfn, offset } = self.v.info?;
        self.word(gfn, offset + field)
    }

    /// Sets the fast paths' pointer to the vcpu_info.
    pub fn info_publish(&mut self) {
        self.fast.vcpu_info = self.v.info.map_or(0, |p| WINDOW + p.gfn.base() + p.offset);
        self.publish_entry();
    }

    /// Whether an event waits, masked or not.
    #[must_use]
    pub fn event_pending(&self) -> bool {
        self.info_word(vcpu_info::PENDING)
            .is_some_and(|w| w.load(SeqCst) & 0xff != 0)
    }

    /// Whether events are masked.
    #[inline]
    #[must_use]
    pub fn events_masked(&self) -> bool {
        self.info_word(vcpu_info::PENDING)
            .is_none_or(|w| w.load(SeqCst) & 0xff00 != 0)
    }

    /// Masks or unmasks events.
    #[inline]
    pub fn set_events_masked(&mut self, mask: bool) {
        if let Some(Place { gfn, offset }) = self.v.info
            && let Some(bytes) = self.m.frame_bytes(gfn)
            && let Some(byte) = bytes.get(crate::idx(offset + vcpu_info::MASK))
        {
            byte.store(u8::from(mask), SeqCst);
        }
    }

    /// Tells the guest the address of a page fault.
    pub fn set_cr2(&mut self, va: u64) {
        if let Some(w) = self.info_word(vcpu_info::CR2) {
            w.store(va, Relaxed);
        }
    }

    // ---- modes and frames ----

    /// To kernel mode: kernel root, kernel GS base.
    pub fn to_kernel_mode(&mut self) {
        self.fast.kernel_mode = 1;
        self.m.swapgs();
        self.load_root();
    }

    /// To user mode: user root, user GS base.
    pub fn to_user_mode(&mut self) {
        self.fast.kernel_mode = 0;
        self.m.swapgs();
        self.load_root();
    }

    /// Enters the guest kernel at `handler` with a frame on its stack
    /// (Xen `create_bounce_frame`): SS, RSP, RFLAGS, CS with the event mask in
    /// its upper half, RIP, `extra` (error code), R11, RCX.
    pub fn bounce(&mut self, handler: u64, mask: bool, error: Option<u64>) {
        self.bounce_as(handler, mask, error.map_or(Shape::Plain, Shape::Error));
    }

    /// As [`Self::bounce`], with a frame of any shape.
    pub fn bounce_as(&mut self, handler: u64, mask: bool, shape: Shape) {
        let was_kernel = self.kernel_mode();
        if !was_kernel {
            self.to_kernel_mode();
        }
        let masked = self.events_masked();
        let sp = if was_kernel {
            self.f.rsp
        } else {
            self.v.kernel_sp
        } & !15;
        let cs = if was_kernel {
            self.f.cs & 0xfffc
        } else {
            self.f.cs & 0xffff
        };
        let mut flags = self.f.rflags & !(rflags::IF | rflags::IOPL);
        if !masked {
            flags |= rflags::IF;
        }
        let from = [
            self.f.rip,
            cs | u64::from(masked) << 32,
            flags,
            self.f.rsp,
            self.f.ss & 0xffff,
        ];
        let [rip, cs, flags, rsp, ss] = from;
        let (rcx, r11) = (self.f.rcx, self.f.r11);
        let vector = self.f.vector;
        if handler == 0 || !Va(handler).is_guest() {
            self.crash(crash::GUEST, format_args!("vector {vector} has no handler"));
        }
        let (new_sp, pushed) = match shape {
            Shape::Plain => {
                let at = sp.wrapping_sub(56);
                (
                    at,
                    self.write_words(at, [rcx, r11, rip, cs, flags, rsp, ss]),
                )
            }
            Shape::Error(code) => {
                let at = sp.wrapping_sub(64);
                (
                    at,
                    self.write_words(at, [rcx, r11, code, rip, cs, flags, rsp, ss]),
                )
            }
            Shape::Selectors([ds, es, fs, gs]) => {
                let at = sp.wrapping_sub(88);
                let words = [rcx, r11, ds, es, fs, gs, rip, cs, flags, rsp, ss];
                (at, self.write_words(at, words))
            }
        };
        if pushed.is_err() {
            self.crash(
                crash::GUEST,
                format_args!("no stack at {new_sp:#x} for an entry to {handler:#x}"),
            );
        }
        self.f.rsp = new_sp;
        self.f.rip = handler;
        self.f.cs = u64::from(sel::GUEST_CS64);
        self.f.ss = u64::from(sel::GUEST_SS);
        self.f.rflags &= !(rflags::AC | rflags::RF | rflags::NT | rflags::TF | rflags::HYPERVISOR);
        self.f.rflags |= rflags::IF | rflags::ONE;
        if mask {
            self.set_events_masked(true);
        }
    }

    /// Gives an exception to the guest.
    pub fn inject(&mut self, vector: u8, error: Option<u64>) {
        self.count(counter::TRAP);
        let gate = self.v.traps[usize::from(vector)];
        if gate.address == 0 {
            self.crash(
                crash::GUEST,
                format_args!("exception {vector} (error {error:x?}) has no handler"),
            );
        }
        self.bounce(gate.address, gate.flags & 4 != 0, error);
    }

    // ---- the way back ----

    /// Everything that must happen before the guest runs on: requests of others,
    /// timers, NMIs, events.
    pub fn prepare_return(&mut self) {
        loop {
            if self.vm.states[self.v.id as usize].get() != State::UP {
                self.stay_down();
            }
            if self.m.switch().pending.load(Relaxed) != 0 {
                self.take_pending();
            }
            if self.v.pause_asked {
                self.pause();
                continue;
            }
            if self.v.check_timers {
                self.v.check_timers = false;
                self.publish_time();
                self.run_timers();
            }
            let nmi = 1u64 << self.v.id;
            if self.vm.nmi.load(Relaxed) & nmi != 0
                && !self.v.nmi_blocked
                && self.v.traps[2].address != 0
            {
                self.vm.nmi.fetch_and(!nmi, SeqCst);
                self.v.nmi_blocked = true;
                self.fast.slow_iret |= 1;
                self.inject(2, None);
            }
            let info = self
                .info_word(vcpu_info::PENDING)
                .map_or(0, |w| w.load(SeqCst));
            if info & 0xffff != 0 && info & 0xff00 == 0 && self.v.event.address != 0 {
                self.count(counter::UPCALL);
                self.note_upcall();
                let handler = self.v.event.address;
                self.bounce(handler, true, None);
            }
            if self.m.switch().pending.load(SeqCst) == 0 && !self.v.check_timers {
                return;
            }
        }
    }

    /// Answers what others and the NMI stub asked of this vCPU.
    pub fn take_pending(&mut self) {
        let bits = self.m.switch().pending.swap(0, SeqCst);
        self.follow_trace();
        self.follow_reclaim();
        self.follow_pause();
        if bits & pending::FLUSH != 0 {
            self.load_root();
        }
        if bits & pending::RAISED != 0 {
            self.take_raised();
        }
        if bits & pending::NMI != 0 {
            self.exit(exit::NMI, [0; 4]);
        }
        if bits & pending::MCE != 0 {
            self.exit(exit::MCE, [0; 4]);
        }
    }

    /// Waits until another vCPU brings this one up.
    fn stay_down(&mut self) {
        self.set_runstate(shared::runstate::OFFLINE);
        while self.vm.states[self.v.id as usize].get() != State::UP {
            self.v.singleshot = NEVER;
            self.m.switch().deadline.store(NEVER, Release);
            self.take_pending();
            if self.vm.states[self.v.id as usize].get() == State::UP {
                break;
            }
            if self.v.pause_asked {
                self.pause();
                continue;
            }
            self.exit(exit::IDLE, [0; 4]);
        }
        self.adopt_runstate();
        self.set_runstate(shared::runstate::RUNNING);
    }

    /// Takes what backends and the toolstack have raised.
    pub fn take_raised(&mut self) {
        const PART: usize = 16;
        let mut kick = 0;
        let page = self.m.vm_page();
        // Nearly all are zero: looked at several at a time.
        for (first, part) in (0u32..).step_by(PART).zip(page.raised.chunks(PART)) {
            if part.iter().fold(0, |all, word| all | word.load(Relaxed)) == 0 {
                continue;
            }
            for (w, word) in (first..).zip(part) {
                if word.load(Relaxed) == 0 {
                    continue;
                }
                let mut bits = word.swap(0, Acquire);
                while bits != 0 {
                    let port = w * 64 + bits.trailing_zeros();
                    bits &= bits - 1;
                    if let Some(vcpu) = self.vm.ports.raise_from_backend(port, &self.bits()) {
                        kick |= 1 << vcpu;
                    }
                }
            }
        }
        let mut virqs = page.raised_virqs.swap(0, Acquire);
        while virqs != 0 {
            let virq = virqs.trailing_zeros();
            virqs &= virqs - 1;
            if let Some(vcpu) = self.vm.ports.raise_virq(virq, 0, &self.bits()) {
                kick |= 1 << vcpu;
            }
        }
        kick |= self.vm.polling.load(SeqCst);
        self.kick(kick);
    }
}
