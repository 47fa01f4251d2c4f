//! What the entry code calls: start of a vCPU, traps, faults in the core, panics.

use crate::cpu;
use crate::entry;
use crate::kvm;
use crate::machine::Hal;
use crate::report::{At, die};
use blanket_abi::device::{WATCH_LIMIT, boot_flags, exit, pause, pending};
use blanket_abi::layout::{IMAGE, MAX_VCPUS, VCPU, VCPU_STRIDE, vcpu as area};
use blanket_core::context::Context;
use blanket_core::evtchn::Ports;
use blanket_core::machine::Host;
use blanket_core::mmu::Mmu;
use blanket_core::vcpu::{NEVER, State, TrapFrame, Vcpu, entry as reason};
use blanket_core::vm::Vm;
use core::sync::atomic::{AtomicBool, Ordering};
use spin::{Mutex, Once};

/// First vector that is no exception.
const FIRST_INTERRUPT: u64 = 32;

static VM: Once<Vm> = Once::new();
static PORTS: Ports = Ports::new();
static CLAIMED: AtomicBool = AtomicBool::new(false);

static VCPUS: [Mutex<Vcpu>; MAX_VCPUS as usize] = {
    let mut all = [const { Mutex::new(Vcpu::new(0)) }; MAX_VCPUS as usize];
    let mut i = 0;
    while i < MAX_VCPUS {
        all[i as usize] = Mutex::new(Vcpu::new(i));
        i += 1;
    }
    all
};

/// Runs `work` as the vCPU of `hal`.
///
/// # Safety
/// `hal` is the vCPU that runs on this CPU, and no other `Context` of it exists.
unsafe fn with_context(hal: &Hal, vm: &'static Vm, work: impl FnOnce(&mut Context<'_, Hal>)) {
    let Some(cell) = VCPUS.get(hal.id() as usize) else {
        return;
    };
    let mut v = cell.lock();
    // SAFETY: frame and fast fields belong to this vCPU, are mapped for the VM's
    // life, and only its entry code touches them while no context exists.
    let (fast, f) = unsafe { (&mut *hal.fast(), &mut *hal.frame()) };
    let mut c = Context {
        m: hal,
        vm,
        v: &mut v,
        fast,
        f,
    };
    work(&mut c);
}

/// A trap from the guest; `f` is the frame on top of the main stack. The entry code
/// finds it in [`Fast::trap`](blanket_core::vcpu::Fast::trap).
extern "C" fn blanket_trap(f: *mut TrapFrame) {
    // SAFETY: the frame lies in the area of the vCPU that runs on this CPU.
    let hal = unsafe { Hal::containing(f as u64) };
    let Some(vm) = VM.get() else { return };
    // SAFETY: the entry code has just saved the guest's registers; nothing else
    // of this vCPU runs.
    unsafe {
        with_context(&hal, vm, |c| {
            c.enter();
            c.prepare_return();
        });
    }
}

/// As [`blanket_trap`], with a record of the entry.
extern "C" fn blanket_trap_traced(f: *mut TrapFrame) {
    // SAFETY: the frame lies in the area of the vCPU that runs on this CPU.
    let hal = unsafe { Hal::containing(f as u64) };
    let Some(vm) = VM.get() else { return };
    // SAFETY: as for `blanket_trap`.
    unsafe { with_context(&hal, vm, |c| c.trace_entry()) };
    blanket_trap(f);
}

/// Address of what the entry code calls.
pub fn trap_entry(traced: bool) -> u64 {
    let entry: extern "C" fn(*mut TrapFrame) = if traced {
        blanket_trap_traced
    } else {
        blanket_trap
    };
    entry as usize as u64
}

/// First Rust code of a vCPU; returns when the guest may run.
#[unsafe(no_mangle)]
extern "C" fn blanket_start_vcpu(f: *mut TrapFrame) {
    // SAFETY: as for `blanket_trap`.
    let hal = unsafe { Hal::containing(f as u64) };
    let isolated = hal.vm_page().core_cr3;
    if isolated != 0 {
        hal.local().core_cr3.store(isolated, Ordering::Relaxed);
        hal.load_core_root();
        // SAFETY: no `Context` of this vCPU exists yet.
        unsafe { (*hal.fast()).isolate() };
    }
    let first = hal.id() == 0;
    if first && !CLAIMED.swap(true, Ordering::SeqCst) {
        VM.call_once(|| {
            let page = hal.vm_page();
            // SAFETY: CLAIMED makes this the only call in this VM.
            let (gfns, pool) = unsafe { hal.metadata(page.pool_limit) };
            let mmu = Mmu::new(gfns, pool, page.hole, page.la57 != 0, page.nr_vcpus);
            Vm::new(
                page.boot,
                page.nr_frames,
                page.nr_vcpus,
                mmu,
                &PORTS,
                &VCPUS,
            )
        });
    }
    set_syscall_msrs(&hal);
    if hal.inside_kvm() {
        kvm::start(&hal);
    }
    hal.switch().deadline.store(NEVER, Ordering::SeqCst);
    let begins = |vm: &Vm| {
        let me = hal.id();
        first
            || vm.resumed.load(Ordering::SeqCst) & 1 << me != 0
            // One that goes on is up before its state is there to take.
            || !resumes(vm) && vm.states[me as usize].get() == State::UP
    };
    let vm = loop {
        if let Some(vm) = VM.get()
            && begins(vm)
        {
            break vm;
        }
        hal.switch().pending.store(0, Ordering::SeqCst);
        if let Some(vm) = VM.get()
            && begins(vm)
        {
            break vm;
        }
        // vCPU 0 writes down for those that have not begun.
        let paused = hal.vm_page().pause.load(Ordering::SeqCst) != pause::NONE;
        hal.exit(if paused { exit::PAUSED } else { exit::IDLE }, [0; 4]);
    };
    // SAFETY: this vCPU has not run yet.
    unsafe {
        with_context(&hal, vm, |c| {
            // The world was entered with some other root than the guest's.
            c.arrive();
            vm.epochs.enter(c.v.id);
            c.fast.trap = trap_entry(false);
            c.follow_trace();
            c.reset_cpu();
            if first && resumes(vm) {
                c.resume_vm();
            }
            if vm.resumed.load(Ordering::SeqCst) & 1 << c.v.id != 0 {
                c.resume_vcpu();
            } else if first {
                c.boot();
            } else {
                c.start();
            }
            c.prepare_return();
        });
    }
}

/// Whether the VM goes on from a state that another core has written down.
fn resumes(vm: &Vm) -> bool {
    vm.boot.flags & boot_flags::RESTORE != 0
}

fn set_syscall_msrs(hal: &Hal) {
    use blanket_abi::layout::sel;
    use blanket_core::vcpu::rflags;
    // STAR: ring-0 code and data for the entry, ring-3 selectors for the return
    // (AMD APM vol. 2, 6.1.1).
    let star = u64::from(sel::CORE_CS) << 32 | u64::from(sel::GUEST_CS32) << 48;
    let mask =
        rflags::TF | rflags::IF | rflags::DF | rflags::NT | rflags::AC | rflags::IOPL | rflags::RF;
    let msrs = [
        star,
        hal.entry_alias(&raw const entry::blanket_syscall64),
        hal.entry_alias(&raw const entry::blanket_syscall32),
        mask,
    ];
    hal.set_syscall_msrs(msrs);
    // The module loads them at each entry from now on; this first time we do.
    for (nr, val) in [0xc000_0081u32, 0xc000_0082, 0xc000_0083, 0xc000_0084]
        .into_iter()
        .zip(msrs)
    {
        cpu::wrmsr(nr, val);
    }
}

/// An address of the entry section as it is in the image, whichever of its
/// mappings `rip` is in, and what to add to come back.
pub fn canonical_rip(rip: u64) -> (u64, u64) {
    let (start, end) = (
        &raw const entry::blanket_entry_start as u64,
        &raw const entry::blanket_entry_end as u64,
    );
    if rip < VCPU || rip >= VCPU + u64::from(MAX_VCPUS) * VCPU_STRIDE {
        return (rip, 0);
    }
    let offset = (rip - VCPU) & (VCPU_STRIDE - 1);
    if offset >= end - start {
        return (rip, 0);
    }
    let image = start + offset;
    (image, rip.wrapping_sub(image))
}

/// A fault in ring 0. Returns 0 to go on at the (changed) RIP of the frame, or a
/// trap frame to handle.
#[unsafe(no_mangle)]
extern "C" fn blanket_core_fault(f: *mut TrapFrame) -> u64 {
    // SAFETY: the entry code passes the frame that it has just built.
    let frame = unsafe { &mut *f };
    if frame.vector >= FIRST_INTERRUPT {
        // Only inside KVM and while idle: under the module interrupts are off.
        // SAFETY: `f` lies in the area of the vCPU that runs on this CPU.
        let hal = unsafe { Hal::containing(f as u64) };
        kvm::interrupt(&hal, (frame.vector & 0xff) as u8);
        return 0;
    }
    let (rip, back) = canonical_rip(frame.rip);
    let irets = [
        &raw const entry::blanket_iret_fast as u64,
        &raw const entry::blanket_iret_slow as u64,
    ];
    if irets.contains(&rip) {
        // The guest's general registers are those of this frame; RIP to SS of its
        // return frame are already where a trap frame from the guest has them.
        let saved = *frame;
        // SAFETY: `f` lies in the area of the vCPU that runs on this CPU.
        let top = unsafe { Hal::containing(f as u64) }.frame();
        // SAFETY: the top frame is this vCPU's; its last five words stay.
        unsafe {
            let old = *top;
            *top = TrapFrame {
                vector: reason::IRET_FAULT,
                error: saved.error,
                rip: old.rip,
                cs: old.cs,
                rflags: old.rflags,
                rsp: old.rsp,
                ss: old.ss,
                ..saved
            };
        }
        return top as u64;
    }
    if let Some(to) = find_fixup(rip) {
        frame.rip = if back != 0 { to.wrapping_add(back) } else { to };
        return 0;
    }
    // SAFETY: as above.
    let hal = unsafe { Hal::containing(f as u64) };
    die(
        &hal,
        format_args!(
            "fault {} (error {:#x}) in the core",
            frame.vector, frame.error
        ),
        &At::Frame(frame),
    )
}

/// A fault in ring 0 while the stack was not ours: between `syscall` and the first
/// look at the vCPU, or right before `sysret`. Nothing may fault there.
#[unsafe(no_mangle)]
extern "C" fn blanket_wrong_stack(f: *const TrapFrame, area: u64) -> ! {
    // SAFETY: the entry code built the frame where the CPU had just pushed to, and
    // found the area by the GDT that is loaded.
    let (frame, hal) = unsafe { (*f, Hal::containing(area)) };
    die(
        &hal,
        format_args!(
            "vector {} (error {:#x}) in the core, on the guest's stack",
            frame.vector, frame.error
        ),
        &At::Frame(&frame),
    )
}

fn find_fixup(rip: u64) -> Option<u64> {
    // SAFETY: the linker script bounds the table, an array of pairs.
    let table = unsafe {
        let first = &raw const entry::blanket_extable;
        let end = &raw const entry::blanket_extable_end as u64;
        core::slice::from_raw_parts(first, (end - first as u64) as usize / 16)
    };
    table.iter().find(|e| e[0] == rip).map(|e| e[1])
}

/// #DB, NMI, #DF or #MC in ring 0; `at` points at RIP of the interrupted code. Returns
/// 1 if NMIs may come again at once.
#[unsafe(no_mangle)]
extern "C" fn blanket_core_ist(vector: u64, at: *const u64) -> u64 {
    // Under the core's IDT the TSS is the core's too, so this is its stack.
    // SAFETY: the stack lies in the area of the vCPU that runs here.
    let hal = unsafe { Hal::containing(at as u64) };
    match vector {
        // The module gives them to the host at the next exit, which is before the
        // guest runs on (`prepare_return`).
        2 => match hal.switch().watch.swap(0, Ordering::SeqCst) {
            0 => {
                hal.switch()
                    .pending
                    .fetch_or(pending::NMI, Ordering::SeqCst);
            }
            // Of the module's watchdog: this CPU runs, and has not left the core.
            n if n < WATCH_LIMIT => return 1,
            _ => {
                // The host's handler lets NMIs in again.
                hal.switch()
                    .pending
                    .fetch_or(pending::NMI, Ordering::SeqCst);
                die(
                    &hal,
                    format_args!("the core is in a loop that does not end"),
                    &At::Pushed(at),
                )
            }
        },
        18 => {
            hal.switch()
                .pending
                .fetch_or(pending::MCE, Ordering::SeqCst);
        }
        // A debug exception in ring 0 comes from a MOV SS of the guest right
        // before its entry (CVE-2018-8897): the guest loses it.
        1 => cpu::set_dr(6, 0xffff_0ff0),
        _ => die(
            &hal,
            format_args!("vector {vector} in the core"),
            &At::Pushed(at),
        ),
    }
    0
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    let here = 0u8;
    // SAFETY: the core runs on a stack in the area of its vCPU.
    let hal = unsafe { Hal::containing(&raw const here as u64) };
    die(
        &hal,
        format_args!("panic in the core: {info}"),
        &At::Here(&raw const here as u64),
    )
}

const _: () = assert!(area::HW.is_power_of_two() && IMAGE < VCPU);
