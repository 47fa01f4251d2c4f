//! Taking up. All that is read comes from whoever made the VM, and may be anything.

use super::fits;
use crate::context::Context;
use crate::idx;
use crate::machine::{FpuImage, Machine};
use crate::vcpu::{Callback, Gate, Place, Start, State, rflags};
use blanket_abi::device::crash;
use blanket_abi::state::{self, VcpuState, VmState, life, place};
use blanket_abi::xen::event::PORTS;
use blanket_abi::xen::shared::{runstate, vcpu_info};
use blanket_abi::{Gfn, Va};
use core::sync::atomic::Ordering::{Relaxed, SeqCst};

/// Which part of a state cannot be.
type Bad = &'static str;

/// RFLAGS that a guest may have (`Context::start`).
const FLAGS: u64 = 0x3f_7fd5;
/// Entries that a guest's GDT may have: Xen's page follows.
const GDT_ENTRIES: u64 = 14 * 512;
/// Shortest period of a timer (`VCPUOP_set_periodic_timer`), ns.
const PERIOD: u64 = 1_000_000;

fn handler(address: u64) -> Result<u64, Bad> {
    (address == 0 || Va(address).is_guest())
        .then_some(address)
        .ok_or("a handler's address")
}

const fn low16(word: u64) -> u16 {
    let [a, b, ..] = word.to_le_bytes();
    u16::from_le_bytes([a, b])
}

const fn low8(word: u64) -> u8 {
    word.to_le_bytes()[0]
}

impl<M: Machine> Context<'_, M> {
    /// vCPU 0 takes up what the vCPUs share. The others may begin then, each with
    /// [`Self::resume_vcpu`] where its bit in [`crate::vm::Vm::resumed`] says so.
    pub fn resume_vm(&mut self) {
        if let Err(what) = self.take_vm() {
            self.cannot_resume(what);
        }
    }

    /// This vCPU takes up its own state.
    pub fn resume_vcpu(&mut self) {
        if let Err(what) = self.take_vcpu() {
            self.cannot_resume(what);
        }
    }

    fn cannot_resume(&mut self, what: Bad) -> ! {
        self.crash(
            crash::GUEST,
            format_args!("the state that the VM should go on from is not one: {what}"),
        )
    }

    fn take_vm(&mut self) -> Result<(), Bad> {
        let vm = self.vm;
        let boot = vm.boot;
        let shared_info = Gfn(boot.shared_info);
        if !fits(&boot, vm.nr_frames, vm.nr_vcpus) || shared_info.0 >= vm.nr_frames {
            return Err("its frames");
        }
        let words = self.get_words(0).map_err(|_| "no frame")?;
        let record = VmState::from_words(&words);
        if record.version != state::VERSION {
            return Err("its version");
        }
        if record.nr_vcpus != u64::from(vm.nr_vcpus) || record.ram_frames != boot.ram_frames {
            return Err("the size of the VM");
        }
        vm.time_offset.store(record.time_offset, SeqCst);
        vm.shutdown_code.store(record.shutdown_code, SeqCst);
        vm.runstate_flag.store(record.runstate_flag != 0, SeqCst);
        vm.infos_moved.store(record.infos_moved, SeqCst);
        let all = u64::MAX >> (64 - vm.nr_vcpus.clamp(1, 64));
        vm.nmi.store(record.nmi & all, SeqCst);
        let grants = u32::try_from(record.grant_frames).map_err(|_| "the grant table's size")?;
        vm.grants
            .lock()
            .setup(blanket_abi::xen::domid::SELF, grants)
            .map_err(|_| "the grant table's size")?;
        self.take_marks()?;
        self.take_ports()?;
        self.need_frame(shared_info).map_err(|_| "shared info")?;
        let mut resumed = 0;
        for id in 0..vm.nr_vcpus {
            if self.take_life(id)? {
                resumed |= 1 << id;
            }
        }
        if resumed & 1 << self.v.id == 0 {
            return Err("the first vCPU never ran");
        }
        self.stand();
        vm.resumed.store(resumed, SeqCst);
        self.kick(resumed);
        Ok(())
    }

    fn take_marks(&mut self) -> Result<(), Bad> {
        let first = state::marks_at(self.vm.nr_vcpus);
        let ram = self.vm.boot.ram_frames;
        for frame in 0..ram.div_ceil(4096) {
            self.breathe(512);
            let words: [u64; 512] = self.get_words(first + frame).map_err(|_| "no frame")?;
            let mut mmu = self.lock_mmu();
            for (word, gfn) in words.iter().zip((4096 * frame..).step_by(8)) {
                for (byte, gfn) in word.to_le_bytes().into_iter().zip(gfn..ram) {
                    mmu.set_mark(Gfn(gfn), byte);
                }
            }
            self.vm.out.store(mmu.out(), Relaxed);
        }
        Ok(())
    }

    fn take_ports(&mut self) -> Result<(), Bad> {
        let vm = self.vm;
        for frame in 0..state::VCPUS_AT - state::PORTS_AT {
            let at = state::PORTS_AT + frame;
            let words: [u64; 512] = self.get_words(at).map_err(|_| "no frame")?;
            for (word, port) in words.into_iter().zip(512 * frame..) {
                if word == 0 {
                    continue;
                }
                let port = u32::try_from(port).map_err(|_| "a port")?;
                {
                    let _lock = vm.ports_lock.lock();
                    vm.ports.restore(port, word).map_err(|_| "a port")?;
                }
                self.publish_port(port);
            }
        }
        // Both ends of what the domain has with itself.
        let _lock = vm.ports_lock.lock();
        (1..PORTS)
            .all(|port| vm.ports.is_paired(port))
            .then_some(())
            .ok_or("a port without its other end")
    }

    /// What others must know of a vCPU. True: it has run, and goes on.
    fn take_life(&mut self, id: u32) -> Result<bool, Bad> {
        let vm = self.vm;
        let words = self.get_words(state::vcpu_at(id)).map_err(|_| "no frame")?;
        let record = VcpuState::from_words(&words);
        if record.life == life::RAW {
            return Ok(false);
        }
        if let Some(Place { gfn, offset }) = self.taken_place(record.info, vcpu_info::SIZE)? {
            vm.infos[id as usize].store(gfn.base() | offset, SeqCst);
        }
        let areas = [
            self.taken_place(record.time_area, 32)?,
            self.taken_place(record.runstate_area[0], 8)?,
            self.taken_place(record.runstate_area[1], 8)?,
        ];
        for (which, area) in areas.iter().enumerate() {
            self.note_area(id, which, area.map(|place| place.gfn));
        }
        match record.life {
            life::INITIALISED if id != self.v.id => {
                if let (Some(first), Some(last)) = (areas[1], areas[2]) {
                    let slot = &vm.runstates[id as usize];
                    slot[0].store(first.gfn.base() | first.offset, SeqCst);
                    slot[1].store(last.gfn.0 + 1, SeqCst);
                }
                self.take_start(id, &record)?;
                vm.states[id as usize].set(State::DOWN);
                Ok(false)
            }
            life::DOWN => {
                vm.states[id as usize].set(State::DOWN);
                Ok(true)
            }
            life::UP => {
                vm.states[id as usize].set(State::UP);
                Ok(true)
            }
            _ => Err("a vCPU's life"),
        }
    }

    /// A place in a frame that the VM has, for `size` bytes.
    fn taken_place(&mut self, word: u64, size: u64) -> Result<Option<Place>, Bad> {
        let Some((gfn, offset)) = place::split(word) else {
            return Ok(None);
        };
        let gfn = Gfn(gfn);
        if offset + size > 4096 {
            return Err("a place that crosses a page");
        }
        self.need_frame(gfn)
            .map_err(|_| "a place in a frame that the VM does not have")?;
        Ok(Some(Place { gfn, offset }))
    }

    /// The part of a record that a vCPU has from `VCPUOP_initialise` on.
    fn taken_tables(&mut self, record: &VcpuState) -> Result<([Gate; 256], [Callback; 5]), Bad> {
        let mut traps = [Gate::default(); 256];
        for (gate, address) in traps.iter_mut().zip(record.traps) {
            gate.address = handler(address)?;
        }
        let flags = record.trap_flags.map(u64::to_le_bytes);
        for (gate, flags) in traps.iter_mut().zip(flags.as_flattened()) {
            gate.flags = *flags;
        }
        let mut callbacks = [Callback::default(); 5];
        for ((bit, callback), address) in callbacks.iter_mut().enumerate().zip(record.callbacks) {
            callback.address = handler(address)?;
            callback.mask = record.callback_masks >> bit & 1 != 0;
        }
        if record.gdt_entries > GDT_ENTRIES {
            return Err("the size of a GDT");
        }
        for gfn in record
            .gdt
            .iter()
            .take(idx(record.gdt_entries.div_ceil(512)))
        {
            self.need_frame(Gfn(*gfn)).map_err(|_| "a frame of a GDT")?;
        }
        Ok((traps, callbacks))
    }

    /// A vCPU that has been initialised and never ran.
    fn take_start(&mut self, id: u32, record: &VcpuState) -> Result<(), Bad> {
        let (traps, callbacks) = self.taken_tables(record)?;
        let canonical = |base: &u64| Va(*base).is_canonical();
        if !record.start_bases.iter().all(canonical) {
            return Err("a segment's base");
        }
        let mut target = self.other(id).map_err(|_| "a vCPU that runs")?;
        target.traps = traps;
        [
            target.event,
            target.failsafe,
            target.syscall,
            target.syscall32,
            target.sysenter,
        ] = callbacks;
        target.kernel_ss = record.kernel_ss;
        target.kernel_sp = record.kernel_sp;
        target.gdt = record.gdt.map(Gfn);
        target.gdt_entries = u32::try_from(record.gdt_entries).map_err(|_| "the size of a GDT")?;
        let [kernel, user] = record.roots;
        target.start = Some(Start {
            regs: record.start,
            bases: record.start_bases,
            kernel_root: Gfn(kernel),
            user_root: (user != u64::MAX).then_some(Gfn(user)),
        });
        Ok(())
    }

    fn take_vcpu(&mut self) -> Result<(), Bad> {
        let at = state::vcpu_at(self.v.id);
        let words = self.get_words(at).map_err(|_| "no frame")?;
        let record = VcpuState::from_words(&words);
        self.take_areas(&record)?;
        let (traps, callbacks) = self.taken_tables(&record)?;
        self.v.traps = traps;
        [
            self.v.event,
            self.v.failsafe,
            self.v.syscall,
            self.v.syscall32,
            self.v.sysenter,
        ] = callbacks;
        self.v.kernel_ss = record.kernel_ss;
        self.v.kernel_sp = record.kernel_sp;
        self.take_address_space(&record)?;
        self.take_segments(&record)?;
        self.take_registers(&record)?;
        self.take_time(&record)?;
        self.fast.kernel_mode = low8(record.kernel_mode);
        self.publish_entry();
        self.load_root();
        Ok(())
    }

    fn take_areas(&mut self, record: &VcpuState) -> Result<(), Bad> {
        self.v.info = self.taken_place(record.info, vcpu_info::SIZE)?;
        if self.v.info.is_none() {
            return Err("no vcpu_info");
        }
        self.v.time_area = self.taken_place(record.time_area, 32)?;
        let [first, last] = record.runstate_area;
        self.v.runstate_area = match self.taken_place(first, 8)? {
            None => None,
            Some(first) => {
                let last = self.taken_place(last, 8)?;
                let last = last.ok_or("half a run-state area")?;
                Some((first, last.gfn))
            }
        };
        self.stand();
        self.info_publish();
        Ok(())
    }

    fn take_address_space(&mut self, record: &VcpuState) -> Result<(), Bad> {
        let [kernel, user] = record.roots;
        self.fast.kernel_mode = 1;
        self.set_kernel_root(Gfn(kernel))
            .map_err(|_| "a kernel's root")?;
        self.set_user_root((user != u64::MAX).then_some(Gfn(user)))
            .map_err(|_| "a user's root")?;
        match record.kernel_mode {
            0 if user != u64::MAX => Ok(()),
            1 => Ok(()),
            _ => Err("its mode"),
        }
    }

    fn take_segments(&mut self, record: &VcpuState) -> Result<(), Bad> {
        self.load_gdt(record.gdt.map(Gfn), record.gdt_entries);
        self.set_ldt(record.ldt, record.ldt_entries)
            .map_err(|_| "an LDT")?;
        if !record.bases.iter().all(|base| Va(*base).is_canonical()) {
            return Err("a segment's base");
        }
        let [ds, es, fs, gs] = record.selectors.map(low16);
        // One that the CPU refuses becomes null, as at a guest's own load.
        let _all_loaded = self.m.load_data_selectors([ds, es, fs, gs]);
        let [fs, gs, inactive] = record.bases;
        self.m.set_fs_base(fs);
        self.m.set_gs_base(gs);
        self.m.set_inactive_gs_base(inactive);
        Ok(())
    }

    fn take_registers(&mut self, record: &VcpuState) -> Result<(), Bad> {
        let f = &mut *self.f;
        [
            f.r15, f.r14, f.r13, f.r12, f.rbp, f.rbx, f.r11, f.r10, f.r9, f.r8, f.rax, f.rcx,
            f.rdx, f.rsi, f.rdi,
        ] = record.general;
        let [rip, cs, flags, rsp, ss] = record.frame;
        f.rip = rip;
        f.cs = cs & 0xfffc | 3;
        f.rflags = flags & FLAGS & !rflags::HYPERVISOR | rflags::IF | rflags::ONE;
        f.rsp = rsp;
        f.ss = ss & 0xfffc | 3;
        self.v.cr4 = record.cr4 & crate::emulate::CR4_GUEST;
        self.v.iopl = low8(record.iopl) & 3;
        for (nr, value) in [0, 1, 2, 3, 6, 7].into_iter().zip(record.debug) {
            self.set_debugreg(nr, value)
                .map_err(|_| "a debug register")?;
        }
        self.v.tsc_aux = record.tsc_aux;
        self.m.set_tsc_aux(record.tsc_aux);
        self.take_fpu(record)
    }

    fn take_fpu(&mut self, record: &VcpuState) -> Result<(), Bad> {
        let mask = u64::from(self.m.vm_page().xcr0_mask);
        let image = self
            .get_fpu(state::vcpu_at(self.v.id) + 1)
            .map_err(|_| "no frame")?;
        if mask == 0 {
            return (record.fpu == FpuImage::FXSAVE && self.m.load_fpu(&image, false))
                .then_some(())
                .ok_or("an FPU that this CPU cannot have");
        }
        if record.fpu != FpuImage::XSAVE || !image.is_within(mask) {
            return Err("an FPU that this CPU cannot have");
        }
        self.m.set_xcr0(mask);
        let loaded = self.m.load_fpu(&image, true);
        // Whatever comes of it, the CPU has a value that the guest may have.
        self.m.set_xcr0(1);
        (self.set_xcr0(record.xcr0) && loaded)
            .then_some(())
            .ok_or("an FPU or XCR0 that this CPU cannot have")
    }

    fn take_time(&mut self, record: &VcpuState) -> Result<(), Bad> {
        if record.period != 0 && !(PERIOD..=i64::MAX.cast_unsigned()).contains(&record.period) {
            return Err("a timer's period");
        }
        self.v.singleshot = record.singleshot;
        self.v.period = record.period;
        self.v.periodic = record.periodic;
        self.v.nmi_blocked = record.nmi_blocked != 0;
        if self.v.nmi_blocked {
            self.fast.slow_iret |= 1;
        }
        let up = self.vm.states[self.v.id as usize].get() == State::UP;
        let [_, since, times @ ..] = record.runstate;
        self.v.runstate_time = times;
        self.v.runstate_since = since;
        // While it was away it would have liked to run, if it was up.
        self.v.runstate = if up {
            runstate::RUNNABLE
        } else {
            runstate::OFFLINE
        };
        self.v.check_timers = true;
        if up {
            self.set_runstate(runstate::RUNNING);
        }
        Ok(())
    }
}
