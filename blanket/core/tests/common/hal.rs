//! What the core asks of its machine, by a [`FakeMachine`].

use super::{ARGS, Crash, Exit, FakeMachine, HOST_BITS, POOL_HFN, crash_kind};
use blanket_abi::device::{RUN_DATA, Switch, VmPage, exit};
use blanket_abi::trace::Ring;
use blanket_abi::{Gfn, Va};
use blanket_core::machine::{Cpu, FpuImage, Host, Memory, Words};
use blanket_core::time::Clock;
use blanket_core::vcpu::NEVER;
use std::sync::atomic::Ordering::{Acquire, Release, SeqCst};
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64};
impl Memory for FakeMachine {
    fn frame(&self, gfn: Gfn) -> Option<&Words> {
        self.step();
        let f = &self.frames[gfn.0 as usize];
        self.present(gfn.0).then_some(&*f.words)
    }
    fn frame_bytes(&self, gfn: Gfn) -> Option<&[AtomicU8; 4096]> {
        self.present(gfn.0).then(|| self.bytes(gfn.0))
    }
    fn frame_pte(&self, gfn: Gfn) -> u64 {
        if self.present(gfn.0) {
            self.hfn(gfn.0) << 12 | HOST_BITS
        } else {
            0
        }
    }
    fn copy_from_frame(&self, gfn: Gfn, offset: usize, to: &mut [u8]) -> bool {
        self.step();
        let Some(bytes) = self.frame_bytes(gfn) else {
            return false;
        };
        let bytes = &bytes[offset..][..to.len()];
        for (to, byte) in to.iter_mut().zip(bytes) {
            *to = byte.load(SeqCst);
        }
        true
    }
    fn copy_to_frame(&self, gfn: Gfn, offset: usize, from: &[u8]) -> bool {
        self.step();
        let Some(bytes) = self.frame_bytes(gfn) else {
            return false;
        };
        for (from, byte) in from.iter().zip(&bytes[offset..][..from.len()]) {
            byte.store(*from, SeqCst);
        }
        true
    }
    fn pool(&self, page: u32) -> &Words {
        assert!(
            u64::from(page) < self.page.pool_pages.load(SeqCst),
            "pool page {page}"
        );
        assert!(
            !self.pool_taken.borrow().contains(&page),
            "the host has pool page {page}"
        );
        &self.pool[page as usize]
    }
    fn pool_pte(&self, page: u32) -> u64 {
        assert!(
            u64::from(page) < self.page.pool_pages.load(SeqCst),
            "pool page {page}"
        );
        assert!(
            !self.pool_taken.borrow().contains(&page),
            "the host has pool page {page}"
        );
        (POOL_HFN + u64::from(page)) << 12
    }
    fn revoked(&self, block: usize) -> &[AtomicU64; 64] {
        &self.revoked[block]
    }
    fn gfns(&self, page: u32) -> &[AtomicU32; 512] {
        &self.names[page as usize]
    }
    fn copy_from_guest(&self, va: Va, to: &mut [u8]) -> Result<(), Va> {
        self.step();
        assert!(
            va.is_guest() && Va(va.0 + to.len() as u64).is_guest(),
            "{va:?} is not the guest's"
        );
        if Self::in_args(va.0, to.len() as u64) {
            to.copy_from_slice(&self.args.borrow()[(va.0 - ARGS) as usize..][..to.len()]);
            return Ok(());
        }
        self.copy(va, to.len(), false, |i, b| to[i] = b.load(SeqCst))
    }
    fn copy_to_guest(&self, va: Va, from: &[u8]) -> Result<(), Va> {
        self.step();
        assert!(
            va.is_guest() && Va(va.0 + from.len() as u64).is_guest(),
            "{va:?} is not the guest's"
        );
        if Self::in_args(va.0, from.len() as u64) {
            self.arg(va.0 - ARGS, from);
            return Ok(());
        }
        self.copy(va, from.len(), true, |i, b| b.store(from[i], SeqCst))
    }
}

impl Cpu for FakeMachine {
    fn load_root(&self, cr3: u64) {
        assert!(
            self.page.revoked.iter().all(|w| w.load(SeqCst) == 0),
            "a root is loaded while leaves of frames that the host took are there"
        );
        self.cpu().cr3.set(cr3);
        self.cpu().flush();
        self.cpu().loads.set(self.cpu().loads.get() + 1);
    }
    fn invlpg(&self, va: Va) {
        self.cpu().invlpgs.borrow_mut().push(va.0);
        self.cpu().writable.borrow_mut().remove(&(va.0 >> 12));
    }
    fn swapgs(&self) {
        self.cpu().gs.swap(&self.cpu().kgs);
    }
    fn fs_base(&self) -> u64 {
        self.cpu().fs.get()
    }
    fn set_fs_base(&self, base: u64) {
        assert!(Va(base).is_canonical());
        self.cpu().fs.set(base);
    }
    fn gs_base(&self) -> u64 {
        self.cpu().gs.get()
    }
    fn set_gs_base(&self, base: u64) {
        assert!(Va(base).is_canonical());
        self.cpu().gs.set(base);
    }
    fn inactive_gs_base(&self) -> u64 {
        self.cpu().kgs.get()
    }
    fn set_inactive_gs_base(&self, base: u64) {
        assert!(Va(base).is_canonical());
        self.cpu().kgs.set(base);
    }
    fn load_user_gs(&self, sel: u16) {
        self.cpu().user_gs_sel.set(sel);
    }
    fn data_selectors(&self) -> [u16; 4] {
        self.cpu().selectors.get()
    }
    fn load_data_selectors(&self, sel: [u16; 4]) -> bool {
        self.cpu().selectors.set(sel);
        true
    }
    fn tsc(&self) -> u64 {
        self.tsc.get()
    }
    fn set_dr(&self, nr: u8, val: u64) {
        assert!(nr < 4 && Va(val).is_guest() || nr == 7, "DR{nr} = {val:#x}");
        self.cpu().dr.borrow_mut()[usize::from(nr)] = val;
    }
    fn cr2(&self) -> u64 {
        self.cpu().cr2.get()
    }
    fn take_dr6(&self) -> u64 {
        self.cpu().dr6.replace(0xffff_0ff0)
    }
    fn write_gdt(&self, index: u32, desc: u64) {
        self.step();
        assert!(index < 14 * 512, "GDT entry {index}");
        self.cpu().gdt.borrow_mut().insert(index, desc);
    }
    fn write_ldt(&self, index: u32, desc: u64) {
        self.step();
        assert!(index < 8192, "LDT entry {index}");
        self.cpu().ldt.borrow_mut().insert(index, desc);
    }
    fn descriptor(&self, selector: u16) -> u64 {
        let table = if selector & 4 == 0 {
            &self.cpu().gdt
        } else {
            &self.cpu().ldt
        };
        table
            .borrow()
            .get(&u32::from(selector >> 3))
            .copied()
            .unwrap_or(0)
    }
    fn load_ldt(&self, entries: u32) {
        assert!(entries <= 8192);
        self.cpu().ldt_entries.set(entries);
    }
    fn set_tsc_aux(&self, val: u64) {
        self.cpu().tsc_aux.set(val);
    }
    fn save_fpu(&self, to: &mut FpuImage, _xsave: bool) {
        assert_eq!(*to, FpuImage::ZERO);
        if let Some(image) = &*self.cpu().fpu.borrow() {
            to.clone_from(image);
        }
    }
    fn load_fpu(&self, from: &FpuImage, _xsave: bool) -> bool {
        if self.cpu().fpu_refused.get() {
            return false;
        }
        *self.cpu().fpu.borrow_mut() = Some(from.clone());
        true
    }
}

impl Host for FakeMachine {
    fn exit(&self, reason: u32, args: [u64; 4]) -> i64 {
        let me = self.current.get();
        let out = Exit {
            vcpu: me as u32,
            reason,
            args,
        };
        self.log.borrow_mut().push(out);
        self.work.set((0, self.work.get().1));
        assert!(
            self.log.borrow().len() < 200_000,
            "the core leaves for ever: {out:?}"
        );
        // The rule of `Vm`: no lock is held while the world is left.
        if let Some(vm) = self.vm.get() {
            assert!(
                vm.mmu.try_lock().is_some(),
                "the MMU lock is held at {out:?}"
            );
            assert!(
                vm.ports_lock.try_lock().is_some(),
                "the ports lock is held at {out:?}"
            );
            assert!(
                vm.grants.try_lock().is_some(),
                "the grant lock is held at {out:?}"
            );
            assert!(
                !vm.epochs.inside(me as u32),
                "the epoch was not left at {out:?}"
            );
        }
        self.cpu().flush();
        let hook = self.hook.borrow_mut().take();
        let mut answer = None;
        if let Some(mut f) = hook {
            answer = f(self, out);
            self.current.set(me);
            self.hook.borrow_mut().get_or_insert(f);
        }
        let answer = answer.unwrap_or_else(|| self.serve(out));
        self.steal();
        let sw = self.switch();
        sw.armed.store(sw.deadline.load(Acquire), Release);
        answer
    }
    fn in_place(&self, _: u32) -> bool {
        false
    }
    fn trap_entry(&self, traced: bool) -> u64 {
        0x1000 + u64::from(traced)
    }
    fn trace_ring(&self) -> &Ring {
        &self.cpu().trace
    }
    fn clock(&self) -> Clock {
        Clock::of_page(&self.page)
    }
    fn wall_clock(&self) -> (u64, u32) {
        (
            self.page.wall_sec.load(Acquire),
            self.page.wall_nsec.load(Acquire),
        )
    }
    fn cpuid(&self, leaf: u32, subleaf: u32) -> [u32; 4] {
        [
            leaf ^ 0x1111_1111,
            subleaf ^ 0x2222_2222,
            0xffff_ffff,
            0xffff_ffff,
        ]
    }
    fn set_xcr0(&self, val: u64) {
        self.cpu().xcr0.set(val);
    }
    fn switch(&self) -> &Switch {
        &self.switches[self.current.get()]
    }
    fn pending_of(&self, vcpu: u32) -> &AtomicU32 {
        &self.switches[vcpu as usize].pending
    }
    fn preempted(&self, _: u32) -> bool {
        false
    }
    fn vm_page(&self) -> &VmPage {
        &self.page
    }
    fn set_data(&self, text: &[u8]) -> usize {
        let n = text.len().min(RUN_DATA);
        self.texts.borrow_mut().push(text[..n].to_vec());
        n
    }
}

impl FakeMachine {
    /// What the module would do.
    fn serve(&self, out: Exit) -> i64 {
        match out.reason {
            exit::FRAME => {
                if self.refused.borrow().contains(&out.args[0]) {
                    return blanket_abi::xen::errno::ENOMEM;
                }
                // A frame that the guest has given up is not needed by anything.
                if let Some(vm) = self.vm.get() {
                    let mmu = vm.mmu.try_lock().expect("checked above");
                    assert!(
                        mmu.has(Gfn(out.args[0])),
                        "{out:?} asks for a frame that is out"
                    );
                }
                self.give(out.args[0]);
                0
            }
            exit::BALLOON => self.take_given_up(out),
            exit::TRIM => self.take_pool(out),
            exit::FILL => self.fill_pool(out),
            exit::POOL => {
                let now = self.page.pool_pages.load(SeqCst);
                let more = out.args[0].min(self.page.pool_limit - now);
                self.page.pool_pages.store(now + more, SeqCst);
                more.cast_signed()
            }
            exit::FLUSH => {
                let vm = self.vm.get().expect("a VM");
                for (id, cpu) in self.cpus.iter().enumerate() {
                    if out.args[0] & 1 << id != 0 {
                        cpu.flush();
                        if vm.epochs.inside(id as u32) {
                            vm.epochs.enter(id as u32);
                        }
                    }
                }
                0
            }
            exit::IDLE => {
                let sw = self.switch();
                let deadline = sw.deadline.load(Acquire);
                if deadline == NEVER {
                    assert_ne!(
                        sw.pending.load(SeqCst),
                        0,
                        "vCPU {} sleeps for ever",
                        out.vcpu
                    );
                } else {
                    self.tsc.set(self.tsc.get().max(deadline));
                }
                0
            }
            exit::CRASH => {
                let text = self.texts.borrow().last().cloned().unwrap_or_default();
                let text = String::from_utf8_lossy(&text).into_owned();
                let why = out.args[0];
                *self.crashed.borrow_mut() = Some(Crash {
                    why,
                    text: text.clone(),
                });
                panic!("the core ends the VM ({}): {text}", crash_kind(why))
            }
            _ => 0,
        }
    }
}
