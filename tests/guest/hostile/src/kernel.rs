//! What a kernel must have: entry, notes, hypercalls, traps, a way out.

use core::arch::{asm, global_asm};
use core::cell::UnsafeCell;
use core::fmt::Write;
use core::mem::offset_of;
use core::sync::atomic::{
    AtomicU32, AtomicU64,
    Ordering::{Relaxed, SeqCst},
};

use blanket_abi::device::inject;
use blanket_abi::xen::event;
use blanket_abi::xen::hypercall::{self as nr, callback, mmuext, sched, vcpu, vgcf};
use blanket_abi::xen::shared::{guest_context as gc, shared_info, vcpu_info};

use crate::rng::Rng;
use crate::{
    descriptors, devices, events, grants, hypercalls, instructions, memory, preemption, races,
    shapes, storm, tables, user,
};

/// Where frame 0 is mapped.
pub const VIRT_BASE: u64 = 0xffff_ffff_8000_0000;
/// Frames that the domain builder maps at least.
pub const FRAMES: u64 = 512;
/// Pages for attacks.
pub const SCRATCH: u64 = 48;
/// Scratch pages that are page tables made by [`tables`], never plain memory.
pub const TABLES: u64 = 12;
/// Flat selectors of the ABI (`FLAT_KERNEL_*`, `public/arch-x86/xen-x86_64.h`).
pub const KERNEL_CS: u64 = 0xe033;
pub const KERNEL_SS: u64 = 0xe02b;

#[repr(C, align(4096))]
struct Pages<const N: usize>([[AtomicU64; 512]; N]);
/// One more than are attacked with: what crosses the end of the last one spoils nothing.
static PAGES: Pages<{ SCRATCH as usize + 1 }> =
    Pages([const { [const { AtomicU64::new(0) }; 512] }; SCRATCH as usize + 1]);
/// vCPUs that attack.
pub const VCPUS: usize = 2;
const STACK_PAGES: usize = 8;
#[unsafe(no_mangle)]
static hostile_stack: Pages<{ STACK_PAGES * VCPUS }> =
    Pages([const { [const { AtomicU64::new(0) }; 512] }; STACK_PAGES * VCPUS]);
static SHARED: Pages<1> = Pages([const { [const { AtomicU64::new(0) }; 512] }; 1]);
static KERNEL_STACK: Pages<{ 2 * VCPUS }> =
    Pages([const { [const { AtomicU64::new(0) }; 512] }; 2 * VCPUS]);
/// `struct vcpu_info` of each vCPU, in pages of their own: they can be moved only once,
/// and an attack that did it would leave events masked for good.
static INFO: Pages<VCPUS> = Pages([const { [const { AtomicU64::new(0) }; 512] }; VCPUS]);
/// `struct vcpu_guest_context` of the second vCPU.
static CONTEXT: Pages<2> = Pages([const { [const { AtomicU64::new(0) }; 512] }; 2]);

/// Where [`attempt`] goes on after a fault, for each vCPU; 0 = no attempt runs.
#[unsafe(no_mangle)]
static hostile_recover: [AtomicU64; VCPUS] = [const { AtomicU64::new(0) }; VCPUS];
static FAULTS: AtomicU64 = AtomicU64::new(0);
static HYPERCALLS: AtomicU64 = AtomicU64::new(0);

global_asm!(
    r#"
    .section .start, "ax"
    .global hostile_entry
hostile_entry:
    cld
    mov rdi, rsi
    # The builder's stack is one page.
    lea rsp, [rip + hostile_stack + {STACK}]
    xor ebp, ebp
    call hostile_main
    ud2

    .global hostile_second
hostile_second:
    call hostile_second_main
    ud2

    .text
    # For each vCPU, since a trap finds nothing else that tells it which one it is on:
    # hostile_attempt(function: rdi, argument: rsi) -> 0, or 1 if it faulted, and
    # hostile_trap, where every exception, callback and system call ends.
    .macro traps n
    .global hostile_attempt\n
hostile_attempt\n:
    push rbp
    push rbx
    push r12
    push r13
    push r14
    push r15
    push qword ptr [rip + hostile_recover + 8 * \n]
    mov [rip + hostile_recover + 8 * \n], rsp
    mov rax, rdi
    mov rdi, rsi
    call rax
    xor eax, eax
1:  pop qword ptr [rip + hostile_recover + 8 * \n]
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbx
    pop rbp
    ret

    .global hostile_trap\n
hostile_trap\n:
    cmp qword ptr [rip + hostile_recover + 8 * \n], 0
    je 2f
    mov rsp, [rip + hostile_recover + 8 * \n]
    cld
    mov eax, 1
    jmp 1b
    # An event outside of an attempt: back, by the iret hypercall.
2:  pop rcx
    pop r11
    push 0
    push rcx
    push r11
    push rax
    mov eax, 23
    syscall
    .endm
    traps 0
    traps 1

    # Elf notes (public/elfnote.h): operating system, version of the ABI, base,
    # offset, entry, features.
    .macro note type
    .balign 4
    .long 4, 2f - 1f, \type
    .asciz "Xen"
1:
    .endm
    .section .note.Xen, "a"
    note 6
    .asciz "linux"
2:  note 5
    .asciz "xen-3.0"
2:  note 3
    .quad {BASE}
2:  note 4
    .quad 0
2:  note 1
    .quad hostile_entry
2:  note 10
    .asciz "!writable_page_tables|pae_pgdir_above_4gb"
2:  note 8
    .asciz "generic"
2:  .balign 4
    .text
    "#,
    BASE = const VIRT_BASE,
    STACK = const STACK_PAGES * 4096,
);

// SAFETY: labels of the assembly above, functions with the signatures given;
// the traps are only ever named, never called.
unsafe extern "C" {
    fn hostile_attempt0(function: unsafe extern "C" fn(*mut u8), argument: *mut u8) -> u64;
    fn hostile_attempt1(function: unsafe extern "C" fn(*mut u8), argument: *mut u8) -> u64;
    fn hostile_trap0();
    fn hostile_trap1();
    fn hostile_second();
    static hostile_end: u8;
}

/// `struct start_info` (`public/xen.h`), as far as it is read.
#[repr(C)]
struct StartInfo {
    magic: [u8; 32],
    nr_pages: u64,
    shared_info: u64,
    flags: u32,
    store: [u64; 2],
    console: [u64; 2],
    pt_base: u64,
    nr_pt_frames: u64,
    mfn_list: u64,
    mod_start: u64,
    mod_len: u64,
    cmd_line: [u8; 1024],
}
const _: () =
    assert!(offset_of!(StartInfo, pt_base) == 88 && offset_of!(StartInfo, cmd_line) == 128);

/// What the attacks know of the machine.
#[derive(Clone, Copy)]
pub struct Kernel {
    /// The vCPU that this one is.
    pub cpu: usize,
    /// Whether attacks may also destroy this kernel itself.
    pub deadly: bool,
    /// First frame of the tables that the builder made, and how many there are.
    pub tables: (u64, u64),
    /// Frames of RAM.
    pub nr_pages: u64,
    /// The root that the builder made.
    pub root: u64,
    /// gfn of shared info.
    pub shared_info: u64,
}

impl Kernel {
    /// Whether this kernel dies if something happens to a frame: its image, but for the
    /// scratch pages, and its first page tables.
    pub fn vital(&self, gfn: u64) -> bool {
        let frame = |va: u64| (va - VIRT_BASE) >> 12;
        let image = 0x100..frame((&raw const hostile_end) as u64 + 4095);
        // The roots are changed by those only who know what a root must have: the
        // other vCPU may be on one.
        let scratch = self.scratch_gfn(0) + tables::ROOTS..self.scratch_gfn(0) + SCRATCH;
        let tables = self.tables.0..self.tables.0 + self.tables.1;
        !self.deadly && (tables.contains(&gfn) || image.contains(&gfn) && !scratch.contains(&gfn))
    }
    /// Whether a word names something vital: as a frame, a machine address, or an address.
    pub fn names_vital(&self, word: u64) -> bool {
        self.vital(word)
            || self.vital(word >> 12 & 0xff_ffff_ffff)
            || word >= VIRT_BASE && self.vital((word - VIRT_BASE) >> 12)
    }
    /// Where this vCPU's traps go.
    pub fn trap(&self) -> u64 {
        [
            hostile_trap0 as *const () as u64,
            hostile_trap1 as *const () as u64,
        ][self.cpu]
    }
    /// Address of scratch page `n`.
    pub fn scratch(&self, n: u64) -> u64 {
        (&raw const PAGES) as u64 + n % SCRATCH * 4096
    }
    /// Its frame.
    pub fn scratch_gfn(&self, n: u64) -> u64 {
        (self.scratch(n) - VIRT_BASE) >> 12
    }
    /// A word of a scratch page, by its address.
    pub fn word_at(&self, va: u64) -> &'static AtomicU64 {
        let offset = va.wrapping_sub(self.scratch(0));
        &PAGES.0[(offset >> 12) as usize % SCRATCH as usize][(offset >> 3 & 511) as usize]
    }
    /// Fills what `words` names of a scratch page that is no table, and returns its
    /// address.
    pub fn fill(&self, rng: &mut Rng, words: u64, mut f: impl FnMut(&mut Rng, u64) -> u64) -> u64 {
        let page = TABLES + rng.below(SCRATCH - TABLES);
        // Sometimes up to the very end of the page, or beyond.
        let first = match rng.below(4) {
            0 => 512u64.saturating_sub(words),
            1 => 512u64.saturating_sub(rng.below(words + 1)),
            _ => rng.below(512u64.saturating_sub(words) + 1),
        };
        for i in 0..words {
            if let Some(word) = PAGES.0[page as usize].get((first + i) as usize) {
                word.store(f(rng, i), Relaxed);
            }
        }
        self.scratch(page) + first * 8
    }
}

/// One hypercall; the registers that the ABI lets it change are all that changes.
pub fn hypercall(number: u64, args: [u64; 5]) -> i64 {
    HYPERCALLS.fetch_add(1, Relaxed);
    let ret: i64;
    // SAFETY: none. This program's purpose is to be wrong; what a call does to its
    // own memory it has to bear.
    unsafe {
        asm!("syscall", inlateout("rax") number => ret, in("rdi") args[0], in("rsi") args[1],
             in("rdx") args[2], in("r10") args[3], in("r8") args[4], out("rcx") _, out("r11") _);
    }
    ret
}

/// Runs `f`; false if a fault, a callback or a system call of user mode ended it.
pub fn attempt<F: FnMut()>(k: &Kernel, mut f: F) -> bool {
    unsafe extern "C" fn run<F: FnMut()>(f: *mut u8) {
        // SAFETY: `attempt` passes its own closure.
        unsafe { (*f.cast::<F>())() }
    }
    let attempts = [hostile_attempt0, hostile_attempt1];
    // SAFETY: a fault leaves `f` half done and unwinds nothing: closures here own
    // nothing.
    let faulted = unsafe { attempts[k.cpu](run::<F>, (&raw mut f).cast()) } != 0;
    FAULTS.fetch_add(u64::from(faulted), Relaxed);
    if faulted && !k.deadly {
        // It may have been an event, which masks others: the next attempt needs them.
        unmask(k);
    }
    !faulted
}

/// What `console_io` writes.
pub struct Console;
impl Write for Console {
    fn write_str(&mut self, s: &str) -> core::fmt::Result {
        hypercall(nr::CONSOLE_IO, [0, s.len() as u64, s.as_ptr() as u64, 0, 0]);
        Ok(())
    }
}

fn end(reason: u64) -> ! {
    loop {
        let reason = reason as u32;
        hypercall(
            nr::SCHED_OP,
            [sched::SHUTDOWN, (&raw const reason) as u64, 0, 0, 0],
        );
    }
}

/// Handlers for everything, all of them the same, and a stack for them.
pub fn install_handlers(k: &Kernel) {
    let trap = k.trap();
    // `struct trap_info`: vector and flags (DPL 3), CS, address; the last is zero.
    let mut table = [[0u64; 2]; 257];
    for (vector, row) in table.iter_mut().enumerate().take(256) {
        *row = [vector as u64 | 3 << 8 | KERNEL_CS << 16, trap];
    }
    hypercall(nr::SET_TRAP_TABLE, [table.as_ptr() as u64, 0, 0, 0, 0]);
    for kind in [
        callback::EVENT,
        callback::FAILSAFE,
        callback::SYSCALL,
        callback::NMI,
        callback::SYSENTER,
        callback::SYSCALL32,
    ] {
        let register = [u64::from(kind), trap];
        hypercall(
            nr::CALLBACK_OP,
            [callback::REGISTER, register.as_ptr() as u64, 0, 0, 0],
        );
    }
    let top = (&raw const KERNEL_STACK) as u64 + 8192 * (k.cpu as u64 + 1);
    hypercall(nr::STACK_SWITCH, [KERNEL_SS, top, 0, 0, 0]);
}

/// Maps shared info, for good.
fn map_shared_info(k: &Kernel) {
    let entry = k.shared_info << 12 | 0x67;
    let at = (&raw const SHARED) as u64;
    hypercall(nr::UPDATE_VA_MAPPING, [at, entry, 2, 0, 0]);
}

/// A word of 32 bits of shared info, which [`map_shared_info`] has mapped.
fn shared_word(at: u64) -> &'static AtomicU32 {
    let base = (&raw const SHARED) as u64;
    // SAFETY: within the page, which is never unmapped.
    unsafe { AtomicU32::from_ptr((base + at) as *mut u32) }
}

/// No event interrupts this kernel from now on: it looks for them.
fn mask_events() {
    shared_word(vcpu_info::PENDING).store(0xff00, Relaxed);
}

/// Forgets that a port is pending.
pub fn clear_pending(port: u32) {
    let word = shared_word(shared_info::EVTCHN_PENDING + u64::from(port / 32 % 128) * 4);
    word.fetch_and(!(1 << (port % 32)), SeqCst);
}

/// ns since the VM was made (`struct vcpu_time_info` of vCPU 0).
pub fn system_time() -> u64 {
    let word = |at: u64| shared_word(vcpu_info::TIME + at).load(SeqCst);
    let long = |at: u64| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
    loop {
        let version = word(0);
        let (stamp, then, mul) = (long(8), long(16), word(24));
        let shift = word(28) as i8;
        // SAFETY: an instruction that any program may use.
        let ticks = unsafe { core::arch::x86_64::_rdtsc() }.wrapping_sub(stamp);
        let ticks = if shift < 0 {
            ticks >> -shift
        } else {
            ticks << shift
        };
        let passed = (u128::from(ticks) * u128::from(mul)) >> 32;
        if version.is_multiple_of(2) && version == word(0) {
            return then.wrapping_add(passed as u64);
        }
    }
}

/// Ends the VM, as it was asked to.
pub fn power_off() -> ! {
    end(sched::SHUTDOWN_POWEROFF)
}

/// Forgets whatever events attacks have pending or masked, so that the next one comes.
fn unmask(k: &Kernel) {
    for word in &SHARED.0[0] {
        // All but the clock at the end: vcpu_infos, pending and mask bits.
        if (&raw const *word) as u64 & 0xfff < shared_info::WC_VERSION {
            word.store(0, Relaxed);
        }
    }
    // Pending, mask and selector.
    for word in &INFO.0[k.cpu][..2] {
        word.store(0, Relaxed);
    }
}

/// A timer event every 20 ms, so that an attack that ends in a loop ends.
fn rearm(k: &Kernel) {
    unmask(k);
    // `virq` 0 and the vCPU.
    let bind = (k.cpu as u64) << 32;
    let virq = (&raw const bind) as u64;
    hypercall(nr::EVENT_CHANNEL_OP, [event::op::BIND_VIRQ, virq, 0, 0, 0]);
    let period = 20_000_000u64;
    let at = (&raw const period) as u64;
    hypercall(
        nr::VCPU_OP,
        [vcpu::SET_PERIODIC_TIMER, k.cpu as u64, at, 0, 0],
    );
}

fn number(cmdline: &[u8], name: &[u8]) -> Option<u64> {
    let at = cmdline.windows(name.len()).position(|w| w == name)? + name.len();
    let digits = cmdline[at..].iter().take_while(|c| c.is_ascii_digit());
    Some(digits.fold(0u64, |n, c| {
        n.wrapping_mul(10).wrapping_add(u64::from(c - b'0'))
    }))
}

#[unsafe(no_mangle)]
extern "C" fn hostile_main(info: *const u8) -> ! {
    // SAFETY: the builder put start_info there and mapped it.
    let info = unsafe { &*info.cast::<StartInfo>() };
    let seed = number(&info.cmd_line, b"seed=").unwrap_or(1);
    let steps = number(&info.cmd_line, b"steps=").unwrap_or(1000);
    let root = (info.pt_base - VIRT_BASE) >> 12;
    let k = Kernel {
        cpu: 0,
        deadly: number(&info.cmd_line, b"deadly=") == Some(1),
        tables: (root, info.nr_pt_frames),
        nr_pages: info.nr_pages,
        root,
        shared_info: info.shared_info >> 12,
    };
    if let Some(kind) = number(&info.cmd_line, b"inject=") {
        let _ = writeln!(Console, "HOSTILE asks for fault {kind}");
        let ret = hypercall(inject::CALL, [kind, 0, 0, 0, 0]);
        let _ = writeln!(Console, "HOSTILE fault {kind} gave {ret}");
        end(sched::SHUTDOWN_POWEROFF)
    }
    let mut rng = Rng::new(seed);
    let _ = writeln!(Console, "HOSTILE begins: seed={seed} steps={steps}");
    map_shared_info(&k);
    tables::prepare(&k);
    if number(&info.cmd_line, b"devices=") == Some(1) {
        mask_events();
        let (page, port) = (info.store[0], info.store[1] as u32);
        devices::run(&k, (page, port), seed, steps)
    }
    if number(&info.cmd_line, b"alone=") != Some(1) {
        start_second(&k, seed, steps);
    }
    attack(&k, &mut rng, steps);
    // The other vCPU goes on meanwhile, so even this may fault.
    loop {
        attempt(&k, || {
            prepare(&k, 0);
            let _ = writeln!(
                Console,
                "\nHOSTILE seed={seed} steps={steps} hypercalls={} faults={}",
                HYPERCALLS.load(Relaxed),
                FAULTS.load(Relaxed)
            );
            end(sched::SHUTDOWN_POWEROFF)
        });
    }
}

/// Attack after attack.
fn attack(k: &Kernel, rng: &mut Rng, steps: u64) {
    if !k.deadly {
        let info = [((&raw const INFO.0[k.cpu]) as u64 - VIRT_BASE) >> 12, 0];
        let at = info.as_ptr() as u64;
        hypercall(
            nr::VCPU_OP,
            [vcpu::REGISTER_VCPU_INFO, k.cpu as u64, at, 0, 0],
        );
    }
    for step in 0..steps {
        // All of it: what the last attack left may make even this fault.
        attempt(k, || {
            prepare(k, step);
            one(k, rng);
        });
    }
}

/// Handlers, root, timer and scratch pages as they should be.
fn prepare(k: &Kernel, step: u64) {
    install_handlers(k);
    let op = [u64::from(mmuext::NEW_BASEPTR), k.root, 0];
    hypercall(nr::MMUEXT_OP, [op.as_ptr() as u64, 1, 0, 0x7ff0, 0]);
    rearm(k);
    if step.is_multiple_of(4) && !k.deadly {
        tables::restore_scratch(k);
    }
}

/// One attack.
fn one(k: &Kernel, rng: &mut Rng) {
    let family = rng.below(26);
    attempt(k, || match family {
        0..5 => hypercalls::attack(k, rng),
        5..9 => tables::attack(k, rng),
        9..11 => descriptors::attack(k, rng),
        11..14 => instructions::attack(k, rng),
        14..16 => events::attack(k, rng),
        16 | 17 => grants::attack(k, rng),
        18 => memory::attack(k, rng),
        19 => shapes::attack(k, rng),
        20 | 21 => races::attack(k, rng),
        22 => user::attack(k, rng),
        23 | 24 => storm::attack(k, rng),
        _ => preemption::attack(k, rng),
    });
}

/// What the second vCPU is to do: its kernel, seed and steps.
static SECOND: Second = Second(UnsafeCell::new(None));
struct Second(UnsafeCell<Option<(Kernel, u64, u64)>>);
// SAFETY: written before the second vCPU starts, read by it alone afterwards.
unsafe impl Sync for Second {}

/// The second vCPU, which attacks the same tables with another seed.
fn start_second(k: &Kernel, seed: u64, steps: u64) {
    // SAFETY: the second vCPU does not run yet.
    unsafe { *SECOND.0.get() = Some((Kernel { cpu: 1, ..*k }, seed ^ 0x5eed, steps)) };
    let put = |at: u64, value: u64| {
        CONTEXT.0[(at >> 12) as usize][(at >> 3 & 511) as usize].store(value, Relaxed);
    };
    let reg = |n: u64, value: u64| put(gc::USER_REGS + 8 * n, value);
    let stack = (&raw const hostile_stack) as u64 + (2 * STACK_PAGES as u64) * 4096;
    // rip, cs, rflags, rsp, ss of `struct cpu_user_regs`.
    reg(16, hostile_second as *const () as u64);
    reg(17, KERNEL_CS);
    reg(18, 0x202);
    reg(19, stack);
    reg(20, KERNEL_SS);
    put(gc::FLAGS, vgcf::IN_KERNEL);
    put(gc::KERNEL_SS, KERNEL_SS);
    put(gc::KERNEL_SP, (&raw const KERNEL_STACK) as u64 + 4 * 4096);
    put(gc::CTRLREG + 3 * 8, k.root << 12);
    let context = (&raw const CONTEXT) as u64;
    let made = hypercall(nr::VCPU_OP, [vcpu::INITIALISE, 1, context, 0, 0]);
    let up = hypercall(nr::VCPU_OP, [vcpu::UP, 1, 0, 0, 0]);
    let _ = writeln!(Console, "HOSTILE second vCPU: {made} {up}");
}

#[unsafe(no_mangle)]
extern "C" fn hostile_second_main() -> ! {
    // SAFETY: see SECOND.
    if let Some((k, seed, steps)) = unsafe { *SECOND.0.get() } {
        attack(&k, &mut Rng::new(seed), steps);
    }
    // The first one ends the VM.
    loop {
        hypercall(nr::SCHED_OP, [sched::BLOCK, 0, 0, 0, 0]);
    }
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    let _ = writeln!(Console, "hostile: {info}");
    end(sched::SHUTDOWN_CRASH)
}
