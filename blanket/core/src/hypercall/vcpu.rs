//! vcpu_op (`public/vcpu.h`).

use super::super::context::{Context, Hyper};
use crate::machine::Machine;
use crate::vcpu::{Callback, Gate, NEVER, Place, State, rflags};
use blanket_abi::layout::sel;
use blanket_abi::xen::errno;
use blanket_abi::xen::event::virq;
use blanket_abi::xen::hypercall::{vcpu, vgcf};
use blanket_abi::xen::shared::{guest_context as gc, runstate, shared_info, vcpu_info};
use blanket_abi::{Gfn, Va};
use core::sync::atomic::Ordering::{Relaxed, SeqCst};

/// `VCPU_SSHOTTMR_future`: the timer must not be due already (`public/vcpu.h`).
const SSHOTTMR_FUTURE: u64 = 1;
/// Linux's ETIME, as Xen numbers its errors (`public/errno.h`).
const ETIME: i64 = -62;

impl<M: Machine> Context<'_, M> {
    /// `vcpu_op(cmd, vcpu, ptr)`.
    pub(super) fn vcpu_op(&mut self, cmd: u64, id: u64, ptr: u64) -> Hyper {
        if id >= u64::from(self.vm.nr_vcpus) {
            return Err(errno::ENOENT);
        }
        #[allow(clippy::cast_possible_truncation, reason = "below the vCPU count")]
        let id = id as u32;
        let own = id == self.v.id;
        match cmd {
            vcpu::IS_UP => Ok(i64::from(self.vm.states[id as usize].get() == State::UP)),
            vcpu::INITIALISE => self.initialise(id, ptr),
            vcpu::UP => match self.vm.states[id as usize].get() {
                State::RAW => Err(errno::EINVAL),
                State::UP => Ok(0),
                _ => {
                    self.vm.states[id as usize].set(State::UP);
                    self.kick(1 << id);
                    Ok(0)
                }
            },
            vcpu::DOWN => self.down(id),
            vcpu::REGISTER_VCPU_INFO => self.register_info(id, ptr),
            vcpu::SEND_NMI => {
                self.vm.nmi.fetch_or(1 << id, SeqCst);
                self.kick(1 << id);
                Ok(0)
            }
            vcpu::GET_PHYSID => Err(errno::EINVAL),
            vcpu::REGISTER_RUNSTATE_MEMORY_AREA => {
                let [va] = self.read_words::<1>(ptr)?;
                let area = self.runstate_place(Va(va))?;
                self.note_area(id, 1, Some(area.0.gfn));
                self.note_area(id, 2, Some(area.1));
                if own {
                    self.v.runstate_area = Some(area);
                    self.stand();
                    self.publish_runstate();
                } else {
                    // Linux does it for a vCPU before that is up.
                    let (first, last) = area;
                    let slot = &self.vm.runstates[id as usize];
                    slot[0].store(first.gfn.base() | first.offset, SeqCst);
                    slot[1].store(last.0 + 1, SeqCst);
                }
                Ok(0)
            }
            vcpu::GET_RUNSTATE_INFO if own => {
                let words = self.runstate_words();
                self.write_words(ptr, words).map(|()| 0)
            }
            vcpu::REGISTER_VCPU_TIME_MEMORY_AREA if own => {
                let [va] = self.read_words::<1>(ptr)?;
                self.v.time_area = match va {
                    0 => None,
                    va => Some(self.place(Va(va), 32)?),
                };
                self.note_area(id, 0, self.v.time_area.map(|place| place.gfn));
                self.stand();
                self.publish_time_now();
                Ok(0)
            }
            vcpu::SET_PERIODIC_TIMER if own => {
                let [period] = self.read_words::<1>(ptr)?;
                // Xen refuses periods below a millisecond.
                if period < 1_000_000 || period > i64::MAX as u64 {
                    return Err(errno::EINVAL);
                }
                self.v.period = period;
                self.v.periodic = self.now().saturating_add(period);
                self.arm();
                Ok(0)
            }
            vcpu::STOP_PERIODIC_TIMER if own => {
                self.v.period = 0;
                self.v.periodic = NEVER;
                self.arm();
                Ok(0)
            }
            vcpu::SET_SINGLESHOT_TIMER if own => {
                let [at, flags] = self.read_words::<2>(ptr)?;
                if flags & SSHOTTMR_FUTURE != 0 && at < self.now() {
                    return Err(ETIME);
                }
                self.set_singleshot(at);
                Ok(0)
            }
            vcpu::STOP_SINGLESHOT_TIMER if own => {
                self.v.singleshot = NEVER;
                self.arm();
                Ok(0)
            }
            vcpu::GET_RUNSTATE_INFO
            | vcpu::REGISTER_VCPU_TIME_MEMORY_AREA
            | vcpu::SET_PERIODIC_TIMER
            | vcpu::STOP_PERIODIC_TIMER
            | vcpu::SET_SINGLESHOT_TIMER
            | vcpu::STOP_SINGLESHOT_TIMER => Err(errno::EINVAL),
            _ => Err(errno::ENOSYS),
        }
    }

    /// Another vCPU's private state, while it does not need it.
    pub(crate) fn other(
        &self,
        id: u32,
    ) -> Result<spin::MutexGuard<'static, crate::vcpu::Vcpu>, i64> {
        let vcpus: &'static [_] = self.vm.vcpus;
        vcpus
            .get(id as usize)
            .and_then(|v| v.try_lock())
            .ok_or(errno::EBUSY)
    }

    /// Arms the one-shot timer; a time that has passed fires at once.
    pub(super) fn set_singleshot(&mut self, at: u64) {
        self.v.singleshot = at;
        if at <= self.now() {
            self.v.singleshot = NEVER;
            self.raise_own_virq(virq::TIMER);
        }
        self.arm();
    }

    /// Where a vCPU's vcpu_info is before the guest moves it.
    pub fn default_info(&mut self) {
        if self.v.id < shared_info::LEGACY_VCPUS && self.v.info.is_none() {
            let place = Place {
                gfn: Gfn(self.vm.boot.shared_info),
                offset: shared_info::VCPU_INFO + u64::from(self.v.id) * vcpu_info::SIZE,
            };
            if self.need_frame(place.gfn).is_ok() {
                self.v.info = Some(place);
                self.vm.infos[self.v.id as usize].store(place.gfn.base() | place.offset, SeqCst);
                self.info_publish();
                self.publish_time_now();
            }
        }
    }

    fn register_info(&mut self, id: u32, ptr: u64) -> Hyper {
        let [mfn, offset] = self.read_words::<2>(ptr)?;
        let offset = offset & 0xffff_ffff;
        if offset & 7 != 0 || offset > 4096 - vcpu_info::SIZE {
            return Err(errno::EINVAL);
        }
        let gfn = Gfn(mfn);
        self.need_frame(gfn)?;
        if self.vm.infos_moved.fetch_or(1 << id, SeqCst) & 1 << id != 0 {
            return Err(errno::EBUSY);
        }
        // Copy the old one, then make every port look pending, so that nothing
        // that arrives meanwhile is lost (`xen/common/domain.c`, map_vcpu_info).
        let old = self.vm.infos[id as usize].load(SeqCst);
        for i in 0..vcpu_info::SIZE / 8 {
            let word = self
                .word(Gfn::containing(old), (old & 0xfff) + 8 * i)
                .filter(|_| old != 0)
                .map_or(u64::from(i == 0) << 8, |w| w.load(Relaxed));
            if let Some(to) = self.word(gfn, offset + 8 * i) {
                to.store(word, Relaxed);
            }
        }
        self.vm.infos[id as usize].store(gfn.base() | offset, SeqCst);
        if let Some(w) = self.word(gfn, offset + vcpu_info::PENDING_SEL) {
            w.store(u64::MAX, SeqCst);
        }
        if let Some(w) = self.word(gfn, offset + vcpu_info::PENDING) {
            w.fetch_or(1, SeqCst);
        }
        if id == self.v.id {
            self.v.info = Some(Place { gfn, offset });
            self.info_publish();
            self.publish_time_now();
        }
        Ok(0)
    }

    /// Takes the place of the vcpu_info that another vCPU registered for this one.
    fn adopt_info(&mut self) {
        let place = self.vm.infos[self.v.id as usize].load(SeqCst);
        if place != 0 {
            self.v.info = Some(Place {
                gfn: Gfn::containing(place),
                offset: place & 0xfff,
            });
            self.info_publish();
        } else {
            self.default_info();
        }
    }

    /// Notes the frame of an area, which the guest cannot give up from now on.
    pub(crate) fn note_area(&mut self, id: u32, which: usize, gfn: Option<Gfn>) {
        if let Some(gfn) = gfn {
            self.note_written(gfn);
        }
        let areas = self.vm.areas.get(id as usize);
        if let Some(area) = areas.and_then(|areas| areas.get(which)) {
            area.store(gfn.map_or(0, |gfn| gfn.0 + 1), SeqCst);
        }
    }

    /// Takes the run-state area that another vCPU registered for this one.
    pub(crate) fn adopt_runstate(&mut self) {
        let [place, last] = &self.vm.runstates[self.v.id as usize];
        let last = last.swap(0, SeqCst);
        if last != 0 {
            let place = place.load(SeqCst);
            let first = Place {
                gfn: Gfn::containing(place),
                offset: place & 0xfff,
            };
            self.v.runstate_area = Some((first, Gfn(last - 1)));
            self.stand();
        }
    }

    /// `VCPUOP_initialise`: the context is kept with the target until it is up.
    fn initialise(&mut self, id: u32, ptr: u64) -> Hyper {
        if id == self.v.id || self.vm.states[id as usize].get() != State::RAW {
            return Err(errno::EEXIST);
        }
        let vm = self.vm;
        self.breathe(256);
        let mut target = self.other(id)?;
        // Another vCPU may have been faster. From here to the end only this one can
        // change the state, so the target's own thread does not wait for the lock
        // that is held while the guest's structure is read.
        if vm.states[id as usize].get() != State::RAW {
            return Err(errno::EEXIST);
        }
        let word = |c: &mut Self, at: u64| c.read_words::<1>(ptr.wrapping_add(at)).map(|w| w[0]);
        let flags = word(self, gc::FLAGS)?;
        for v in 0..256u64 {
            let [head, address] = self.read_words::<2>(ptr.wrapping_add(gc::TRAP_CTXT + 16 * v))?;
            if address != 0 && !Va(address).is_guest() {
                return Err(errno::EINVAL);
            }
            let [_, gate_flags, ..] = head.to_le_bytes();
            target.traps[crate::idx(v)] = Gate {
                address,
                flags: gate_flags,
            };
        }
        let entries = word(self, gc::GDT_ENTS)?;
        if entries > 14 * 512 || word(self, gc::LDT_ENTS)? != 0 {
            return Err(errno::EINVAL);
        }
        for i in 0..entries.div_ceil(512) {
            let gfn = Gfn(word(self, gc::GDT_FRAMES + 8 * i)?);
            self.need_frame(gfn)?;
            target.gdt[crate::idx(i) % 14] = gfn;
        }
        let regs: [u64; 25] = self.read_words(ptr.wrapping_add(gc::USER_REGS))?;
        let bases = [
            word(self, gc::FS_BASE)?,
            word(self, gc::GS_BASE_KERNEL)?,
            word(self, gc::GS_BASE_USER)?,
        ];
        let callbacks = [
            word(self, gc::EVENT_CALLBACK)?,
            word(self, gc::FAILSAFE_CALLBACK)?,
            word(self, gc::SYSCALL_CALLBACK)?,
        ];
        let kernel_sp = word(self, gc::KERNEL_SP)?;
        let kernel_ss = word(self, gc::KERNEL_SS)?;
        let cr3 = Gfn::containing(word(self, gc::CTRLREG + 3 * 8)?);
        let cr1 = word(self, gc::CTRLREG + 8)?;
        if !bases
            .iter()
            .chain(&callbacks)
            .all(|&a| Va(a).is_canonical())
            || cr3.0 >= vm.nr_frames
            || Gfn::containing(cr1).0 >= vm.nr_frames
            || flags & vgcf::IN_KERNEL == 0
        {
            return Err(errno::EINVAL);
        }
        target.gdt_entries = u32::try_from(entries).map_err(|_| errno::EINVAL)?;
        target.event = Callback {
            address: callbacks[0],
            mask: true,
        };
        target.failsafe = Callback {
            address: callbacks[1],
            mask: flags & vgcf::FAILSAFE_DISABLES_EVENTS != 0,
        };
        target.syscall = Callback {
            address: callbacks[2],
            mask: flags & vgcf::SYSCALL_DISABLES_EVENTS != 0,
        };
        target.kernel_sp = kernel_sp;
        target.kernel_ss = kernel_ss;
        target.start = Some(crate::vcpu::Start {
            regs,
            bases,
            kernel_root: cr3,
            user_root: (cr1 != 0).then(|| Gfn::containing(cr1)),
        });
        vm.states[id as usize].set(State::DOWN);
        Ok(0)
    }

    /// Starts this vCPU with the context that another one gave it.
    pub fn start(&mut self) {
        let Some(start) = self.v.start.take() else {
            self.core_bug("a vCPU without a context was started")
        };
        self.fast.kernel_mode = 1;
        self.adopt_info();
        self.adopt_runstate();
        let r = start.regs;
        [
            self.f.r15, self.f.r14, self.f.r13, self.f.r12, self.f.rbp, self.f.rbx, self.f.r11,
            self.f.r10, self.f.r9, self.f.r8, self.f.rax, self.f.rcx, self.f.rdx, self.f.rsi,
            self.f.rdi,
        ] = r[..15].try_into().unwrap_or_default();
        // 15 is error code and vector.
        self.f.rip = r[16];
        self.f.cs = r[17] & 0xfffc | 3;
        self.f.rflags = r[18] & 0x3f_7fd5 & !rflags::HYPERVISOR | rflags::IF | rflags::ONE;
        // The virtual IOPL comes with the flags (`xen/arch/x86/domain.c`).
        self.v.iopl = (r[18] >> 12 & 3) as u8;
        self.f.rsp = r[19];
        self.f.ss = if r[20] & 0xfffc == 0 {
            u64::from(sel::GUEST_SS)
        } else {
            r[20] & 0xffff | 3
        };
        let select = |i: usize| (r[i] & 0xffff) as u16;
        let roots = self
            .set_kernel_root(start.kernel_root)
            .and_then(|()| self.set_user_root(start.user_root));
        if roots.is_err() {
            let (kernel, user) = (start.kernel_root, start.user_root);
            self.crash(
                blanket_abi::device::crash::GUEST,
                format_args!(
                    "the guest has given up root {kernel:?} or {user:?} of a vCPU that starts"
                ),
            );
        }
        let (gdt, entries) = (self.v.gdt, u64::from(self.v.gdt_entries));
        self.load_gdt(gdt, entries);
        // ds, es, fs, gs; a bad one becomes null.
        let _all_loaded =
            self.m
                .load_data_selectors([select(22), select(21), select(23), select(24)]);
        self.m.set_fs_base(start.bases[0]);
        self.m.set_gs_base(start.bases[1]);
        self.m.set_inactive_gs_base(start.bases[2]);
        self.publish_entry();
        self.set_events_masked(true);
        self.v.check_timers = true;
        self.publish_time_now();
        self.set_runstate(runstate::RUNNING);
    }

    fn down(&mut self, id: u32) -> Hyper {
        use blanket_abi::device::exit;
        use blanket_abi::xen::hypercall::sched;
        if self.vm.states[id as usize].get() == State::RAW {
            return Err(errno::EINVAL);
        }
        let last =
            (0..self.vm.nr_vcpus).all(|i| i == id || self.vm.states[i as usize].get() != State::UP);
        if last {
            loop {
                self.exit(exit::SHUTDOWN, [sched::SHUTDOWN_POWEROFF, 0, 0, 0]);
            }
        }
        self.vm.states[id as usize].set(State::DOWN);
        // It stops at its next return to the guest.
        self.kick(1 << id);
        Ok(0)
    }
}
