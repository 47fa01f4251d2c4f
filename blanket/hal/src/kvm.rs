//! Inside a KVM VM: the core is alone at CPL 0, with a local APIC in the host's
//! kernel (split irqchip, x2APIC). Timers, idling, kicks and flushes never leave
//! that kernel; only what the VMM must do is an exit of the VM.

use crate::cpu;
use crate::machine::{Hal, at};
use blanket_abi::device::{CPUID_ANY, CPUID_MAX, CpuidEntry, exit, pending, quirk};
use blanket_abi::kvm::{
    EXIT_PORT, PREEMPTED, PREEMPTED_FLUSH, PV_EOI, PV_STEAL, PV_WALL, feature, msr, vector,
};
use blanket_abi::layout::CPUID_TABLE;
use blanket_core::machine::{Cpu, Host};
use blanket_core::time::Clock;
use blanket_core::vcpu::NEVER;
use core::sync::atomic::Ordering;

/// x2APIC: software enable.
const SVR_ENABLE: u64 = 1 << 8;
/// x2APIC timer: TSC-deadline mode.
const LVT_DEADLINE: u64 = 2 << 17;
/// x2APIC interrupt command: physical destination, fixed delivery, assert.
const ICR_ASSERT: u64 = 1 << 14;

fn has(hal: &Hal, feature: u32) -> bool {
    hal.vm_page().kvm_features & feature != 0
}

/// What a vCPU tells its APIC and KVM before its first use of either.
pub fn start(hal: &Hal) {
    cpu::wrmsr(msr::X2APIC_SVR, SVR_ENABLE | u64::from(vector::SPURIOUS));
    cpu::wrmsr(msr::X2APIC_TPR, 0);
    cpu::wrmsr(
        msr::X2APIC_LVT_TIMER,
        LVT_DEADLINE | u64::from(vector::TIMER),
    );
    let page = hal.switch().pv_address;
    cpu::wrmsr(msr::SYSTEM_TIME, page | 1);
    if has(hal, feature::PV_EOI) {
        cpu::wrmsr(msr::PV_EOI, (page + PV_EOI) | 1);
    }
    if has(hal, feature::STEAL_TIME) {
        cpu::wrmsr(msr::STEAL_TIME, (page + PV_STEAL) | 1);
    }
}

/// Whether the vCPU stays where it is for `reason`. While it idles and while it
/// waits for a flush, others need not wait for it.
#[inline]
pub fn in_place(reason: u32) -> bool {
    matches!(
        reason,
        exit::INTR
            | exit::NMI
            | exit::MCE
            | exit::FRAME
            | exit::KICK
            | exit::DEADLINE
            | exit::POOL
            | exit::BREATH
            | exit::FILL
    )
}

/// Answers what can be answered here, and leaves to the VMM for the rest.
#[allow(clippy::cast_possible_truncation, reason = "a vector has eight bits")]
pub fn exit(hal: &Hal, reason: u32, args: [u64; 4]) -> i64 {
    if let Some(count) = hal.switch().in_place.get(reason as usize) {
        count.store(
            count.load(Ordering::Relaxed).wrapping_add(1),
            Ordering::Relaxed,
        );
    }
    match reason {
        exit::INTR => interrupt(hal, args[0] as u8),
        exit::IDLE => idle(hal),
        exit::KICK => each(args[0], send),
        exit::DEADLINE => set_deadline(hal),
        exit::FLUSH => return flush(hal, args[0]),
        exit::POOL => return grow_pool(hal, args[0]),
        // The host gives a zeroed page to whoever touches it.
        exit::FILL => return args[0].cast_signed(),
        // The VMM gave all there is at the start. An NMI or a machine check that
        // arrives here is the host's to see, not ours. The host schedules the
        // core as it likes, so nobody waits for a breath.
        exit::FRAME | exit::NMI | exit::MCE | exit::BREATH => {}
        _ => return leave(hal, reason, args),
    }
    0
}

/// An exit of the VM: the VMM reads the switch block.
fn leave(hal: &Hal, reason: u32, args: [u64; 4]) -> i64 {
    hal.call(reason, args, |_| cpu::out8(EXIT_PORT, 0))
}

/// An interrupt of the local APIC, in the guest or while idle.
pub fn interrupt(hal: &Hal, which: u8) {
    match which {
        vector::TIMER => {
            let sw = hal.switch();
            sw.armed.store(NEVER, Ordering::Relaxed);
            // Ends an idle that has just begun.
            sw.pending.fetch_or(pending::KICK, Ordering::SeqCst);
        }
        // No end of interrupt for it (Intel SDM vol. 3, 11.9).
        vector::SPURIOUS => return,
        _ => {}
    }
    // Bit 0 is KVM's word that it needs none.
    if hal.pv().eoi.swap(0, Ordering::Relaxed) & 1 == 0 {
        cpu::wrmsr(msr::X2APIC_EOI, 0);
    }
    if hal.vm_page().quirks & quirk::INTERRUPTS_TWICE != 0 {
        // Always an exit of the VM.
        core::hint::black_box(core::arch::x86_64::__cpuid(0));
    }
}

/// Sleeps until a bit is pending or the deadline has come.
fn idle(hal: &Hal) {
    let sw = hal.switch();
    if sw.deadline.load(Ordering::Relaxed) != NEVER {
        set_deadline(hal);
    }
    while sw.pending.load(Ordering::SeqCst) == 0 {
        // Interrupts stay off between the look and HLT, which STI delays them to.
        cpu::halt();
    }
}

/// Makes the timer follow the deadline. One that is later than what is armed costs
/// nothing: the interrupt finds nothing due, and arms again.
fn set_deadline(hal: &Hal) {
    let sw = hal.switch();
    let deadline = sw.deadline.load(Ordering::Relaxed);
    let now = hal.tsc();
    let clock = hal.clock();
    let armed = sw.armed.load(Ordering::Relaxed);
    if deadline >= armed && armed > clock.at(now) {
        return;
    }
    sw.armed.store(deadline, Ordering::Relaxed);
    // 0 would disarm; a time that has passed fires at once.
    cpu::wrmsr(msr::TSC_DEADLINE, clock.tsc_at(deadline, now).max(1));
}

/// Asks vCPUs to flush. The answer is the mask of those for which KVM will do it:
/// they do not run.
fn flush(hal: &Hal, mask: u64) -> i64 {
    let mut done = 0;
    let by_kvm = has(hal, feature::TLB_FLUSH) && has(hal, feature::STEAL_TIME);
    each(mask, |id| {
        if by_kvm && flush_preempted(hal, id) {
            done |= 1 << id;
            return;
        }
        hal.pending_of(id)
            .fetch_or(pending::FLUSH, Ordering::SeqCst);
        send(id);
    });
    done
}

/// Whether KVM has taken vCPU `id` off its CPU.
pub fn preempted(hal: &Hal, id: u32) -> bool {
    hal.pv_of(id).preempted.load(Ordering::Relaxed) & PREEMPTED != 0
}

/// Has KVM flush the TLB of a vCPU that does not run (`kvm_flush_tlb_multi` of
/// Linux, `arch/x86/kernel/kvm.c`). False if it runs.
fn flush_preempted(hal: &Hal, id: u32) -> bool {
    let preempted = &hal.pv_of(id).preempted;
    let now = preempted.load(Ordering::SeqCst);
    now & PREEMPTED != 0
        && preempted
            .compare_exchange(
                now,
                now | PREEMPTED_FLUSH,
                Ordering::SeqCst,
                Ordering::SeqCst,
            )
            .is_ok()
}

/// Adds up to `pages` pages to the shadow pool; the VMM has mapped as many as there
/// may be, and the host gives those that are touched. How many were added.
fn grow_pool(hal: &Hal, pages: u64) -> i64 {
    let page = hal.vm_page();
    let grown = page
        .pool_pages
        .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |have| {
            Some(have.saturating_add(pages).min(page.pool_limit))
        });
    let have = grown.unwrap_or(page.pool_limit);
    page.pool_limit
        .saturating_sub(have)
        .min(pages)
        .cast_signed()
}

/// Interrupts vCPU `id`.
fn send(id: u32) {
    cpu::wrmsr(
        msr::X2APIC_ICR,
        u64::from(id) << 32 | ICR_ASSERT | u64::from(vector::KICK),
    );
}

fn each(mask: u64, mut f: impl FnMut(u32)) {
    let mut left = mask;
    while left != 0 {
        f(left.trailing_zeros());
        left &= left - 1;
    }
}

/// kvmclock: KVM writes it for this vCPU, before the vCPU runs.
#[inline]
pub fn clock(hal: &Hal) -> Clock {
    let pv = hal.pv();
    Clock::consistent(
        || pv.version.load(Ordering::Relaxed),
        || Clock {
            version: 0,
            tsc_timestamp: pv.tsc_timestamp.load(Ordering::Relaxed),
            system_time: pv.system_time.load(Ordering::Relaxed),
            mul: pv.tsc_mul.load(Ordering::Relaxed),
            shift: pv.tsc_shift.load(Ordering::Relaxed).cast_signed(),
            flags: pv.flags.load(Ordering::Relaxed) & 1,
        },
    )
}

/// The wall clock at system time 0, as KVM computes it now.
pub fn wall_clock(hal: &Hal) -> (u64, u32) {
    cpu::wrmsr(msr::WALL_CLOCK, hal.switch().pv_address + PV_WALL);
    let pv = hal.pv();
    (
        u64::from(pv.wall_sec.load(Ordering::Acquire)),
        pv.wall_nsec.load(Ordering::Acquire),
    )
}

/// The VMM's table: executing CPUID would be an exit.
pub fn cpuid(hal: &Hal, leaf: u32, subleaf: u32) -> [u32; 4] {
    let entries = (hal.vm_page().cpuid_entries as usize).min(CPUID_MAX);
    // SAFETY: the VMM maps a page of entries there, written before the VM started.
    let table: &[CpuidEntry; CPUID_MAX] = unsafe { at(CPUID_TABLE) };
    let find = |leaf, subleaf| {
        table[..entries]
            .iter()
            .find(|e| e.leaf == leaf && (e.subleaf == subleaf || e.subleaf == CPUID_ANY))
            .map_or([0; 4], |e| e.regs)
    };
    let mut regs = find(leaf, subleaf);
    if (leaf, subleaf) == (0xd, 0) {
        // The size for the XCR0 that is loaded (Intel SDM vol. 1, 13.2): legacy
        // region and header, or the end of the last component.
        let xcr0 = hal.switch().guest_xcr0;
        regs[1] = (2..32)
            .filter(|i| xcr0 >> i & 1 != 0)
            .map(|i| find(0xd, i))
            .map(|[size, offset, ..]| offset.saturating_add(size))
            .fold(576, u32::max);
    }
    regs
}

/// XSETBV at CPL 0 is for the VMM: some KVM hosts lose what the VM itself sets.
pub fn set_xcr0(hal: &Hal, val: u64) {
    leave(hal, exit::XCR0, [val, 0, 0, 0]);
}
