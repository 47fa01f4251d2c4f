//! Writing down.

use crate::context::Context;
use crate::machine::{FpuImage, Machine};
use crate::vcpu::{Callback, Gate, NEVER, Place, State, Vcpu};
use blanket_abi::Gfn;
use blanket_abi::state::{self, VcpuState, VmState, life, place};
use blanket_abi::xen::errno;
use core::sync::atomic::Ordering::{Relaxed, SeqCst};

const fn word(at: Option<Place>) -> u64 {
    match at {
        Some(Place { gfn, offset }) => place::of(gfn.0, offset),
        None => 0,
    }
}

/// The trap table as the record has it.
fn gates(traps: &[Gate; 256]) -> ([u64; 256], [u64; 32]) {
    let (chunks, _) = traps.as_chunks::<8>();
    let mut flags = [0; 32];
    for (word, chunk) in flags.iter_mut().zip(chunks) {
        *word = u64::from_le_bytes(chunk.map(|gate| gate.flags));
    }
    (traps.map(|gate| gate.address), flags)
}

/// What of a vCPU's record does not need it to be here.
fn record(v: &Vcpu, life: u64) -> VcpuState {
    let callbacks = [v.event, v.failsafe, v.syscall, v.syscall32, v.sysenter];
    let mut masks = 0;
    for (bit, Callback { mask, .. }) in callbacks.iter().enumerate() {
        masks |= u64::from(*mask) << bit;
    }
    let (traps, trap_flags) = gates(&v.traps);
    let [s0, s1, s2, s3] = v.runstate_time;
    let [d0, d1, d2, d3] = v.dr;
    let mut roots = v.root_gfns.map(|gfn| gfn.0);
    let (mut start, mut start_bases) = ([0; 25], [0; 3]);
    if let Some(first) = &v.start {
        start = first.regs;
        start_bases = first.bases;
        roots = [first.kernel_root, first.user_root.unwrap_or(Gfn(u64::MAX))].map(|gfn| gfn.0);
    }
    let runstate_area = v.runstate_area.map_or([0; 2], |(first, last)| {
        [place::of(first.gfn.0, first.offset), place::of(last.0, 0)]
    });
    VcpuState {
        life,
        general: [0; 15],
        frame: [0; 5],
        kernel_mode: 1,
        bases: [0; 3],
        selectors: [0; 4],
        traps,
        trap_flags,
        callbacks: callbacks.map(|callback| callback.address),
        callback_masks: masks,
        kernel_ss: v.kernel_ss,
        kernel_sp: v.kernel_sp,
        roots,
        info: word(v.info),
        time_area: word(v.time_area),
        runstate_area,
        runstate: [u64::from(v.runstate), v.runstate_since, s0, s1, s2, s3],
        gdt: v.gdt.map(|gfn| gfn.0),
        gdt_entries: v.gdt_entries.into(),
        ldt: v.ldt,
        ldt_entries: v.ldt_entries.into(),
        cr4: v.cr4,
        iopl: v.iopl.into(),
        debug: [d0, d1, d2, d3, v.dr6, v.dr7],
        xcr0: v.xcr0,
        tsc_aux: v.tsc_aux,
        singleshot: v.singleshot,
        period: v.period,
        periodic: v.periodic,
        nmi_blocked: v.nmi_blocked.into(),
        start,
        start_bases,
        fpu: 0,
    }
}

impl<M: Machine> Context<'_, M> {
    /// Writes down this vCPU, which has run.
    pub(super) fn write_vcpu(&mut self) -> Result<(), i64> {
        // What is held back for a while would be forgotten.
        self.release_self_ipi(NEVER);
        let mut image = FpuImage::ZERO;
        let fpu = self.save_fpu(&mut image);
        let up = self.vm.states[self.v.id as usize].get() == State::UP;
        let f = &*self.f;
        let mut record = VcpuState {
            general: [
                f.r15, f.r14, f.r13, f.r12, f.rbp, f.rbx, f.r11, f.r10, f.r9, f.r8, f.rax, f.rcx,
                f.rdx, f.rsi, f.rdi,
            ],
            frame: [f.rip, f.cs, f.rflags, f.rsp, f.ss],
            kernel_mode: self.fast.kernel_mode.into(),
            bases: [
                self.m.fs_base(),
                self.m.gs_base(),
                self.m.inactive_gs_base(),
            ],
            selectors: self.m.data_selectors().map(u64::from),
            fpu,
            ..record(self.v, if up { life::UP } else { life::DOWN })
        };
        self.wanted_runstate(self.v.id, &mut record);
        let at = state::vcpu_at(self.v.id);
        self.put_words(at, &record.to_words())?;
        self.put_fpu(at + 1, &image)
    }

    /// A run-state area that another vCPU has registered and this one not yet taken.
    fn wanted_runstate(&self, id: u32, record: &mut VcpuState) {
        let Some([first, last]) = self.vm.runstates.get(id as usize) else {
            return;
        };
        let last = last.load(SeqCst);
        if last != 0 {
            let first = first.load(SeqCst);
            record.runstate_area = [
                place::of(first >> 12, first & 0xfff),
                place::of(last - 1, 0),
            ];
        }
    }

    /// The whole FPU, also what the guest has switched off in its XCR0.
    fn save_fpu(&mut self, image: &mut FpuImage) -> u64 {
        let mask = u64::from(self.m.vm_page().xcr0_mask);
        if mask == 0 {
            self.m.save_fpu(image, false);
            return FpuImage::FXSAVE;
        }
        self.m.set_xcr0(mask);
        self.m.save_fpu(image, true);
        self.m.set_xcr0(self.v.xcr0);
        FpuImage::XSAVE
    }

    /// Writes down what the vCPUs share, and those that have not started.
    pub(super) fn write_vm(&mut self) -> Result<(), i64> {
        let vm = self.vm;
        let me = self.v.id;
        for id in (0..vm.nr_vcpus).filter(|&id| id != me) {
            // The others are somewhere in `pause`, with their own lock.
            let Some(other) = vm.vcpus.get(id as usize).and_then(|v| v.try_lock()) else {
                continue;
            };
            let life = match vm.states[id as usize].get() {
                State::RAW => life::RAW,
                _ => life::INITIALISED,
            };
            let mut record = record(&other, life);
            drop(other);
            record.info = match vm.infos[id as usize].load(SeqCst) {
                0 => 0,
                info => place::of(info >> 12, info & 0xfff),
            };
            self.wanted_runstate(id, &mut record);
            self.put_words(state::vcpu_at(id), &record.to_words())?;
        }
        self.write_ports()?;
        self.write_marks()?;
        let grant_frames = vm.grants.lock().nr_frames().into();
        let record = VmState {
            version: state::VERSION,
            nr_vcpus: vm.nr_vcpus.into(),
            ram_frames: vm.boot.ram_frames,
            system_time: self.now(),
            time_offset: vm.time_offset.load(Relaxed),
            grant_frames,
            shutdown_code: vm.shutdown_code.load(SeqCst),
            runstate_flag: vm.runstate_flag.load(SeqCst).into(),
            infos_moved: vm.infos_moved.load(SeqCst),
            nmi: vm.nmi.load(SeqCst),
            out: vm.out.load(SeqCst),
        };
        self.put_words(0, &record.to_words())
    }

    fn write_ports(&mut self) -> Result<(), i64> {
        // Raised by backends, and not looked at yet: now it is in the guest's memory.
        self.take_raised();
        let mut words = [0; 512];
        for frame in 0..state::VCPUS_AT - state::PORTS_AT {
            for (word, port) in words.iter_mut().zip(512 * frame..) {
                *word = u32::try_from(port).map_or(0, |port| self.vm.ports.word_of(port));
            }
            self.put_words(state::PORTS_AT + frame, &words)?;
        }
        Ok(())
    }

    fn write_marks(&mut self) -> Result<(), i64> {
        let first = state::marks_at(self.vm.nr_vcpus);
        let ram = self.vm.boot.ram_frames;
        let mut words = [0; 512];
        for frame in 0..ram.div_ceil(4096) {
            self.breathe(512);
            let mmu = self.lock_mmu();
            for (word, gfn) in words.iter_mut().zip((4096 * frame..).step_by(8)) {
                let mut bytes = [0; 8];
                for (byte, gfn) in bytes.iter_mut().zip(gfn..ram) {
                    *byte = mmu.mark_of(Gfn(gfn));
                }
                *word = u64::from_le_bytes(bytes);
            }
            drop(mmu);
            self.put_words(first + frame, &words)?;
        }
        // What the guest has got by the marks is the guest's: nothing else to say.
        (first + ram.div_ceil(4096) <= self.vm.boot.state_frames)
            .then_some(())
            .ok_or(errno::EINVAL)
    }
}
