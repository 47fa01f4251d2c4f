//! What a kernel must have: entry, notes, hypercalls, traps, a way out.

use core::arch::{asm, global_asm};
use core::fmt::Write;
use core::mem::offset_of;
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use blanket_abi::device::inject;
use blanket_abi::xen::event;
use blanket_abi::xen::hypercall::{self as nr, callback, mmuext, sched, vcpu};
use blanket_abi::xen::shared::shared_info;

use crate::rng::Rng;
use crate::{descriptors, events, hypercalls, instructions, tables};

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
static PAGES: Pages<{ SCRATCH as usize }> =
    Pages([const { [const { AtomicU64::new(0) }; 512] }; SCRATCH as usize]);
const STACK_PAGES: usize = 8;
#[unsafe(no_mangle)]
static hostile_stack: Pages<STACK_PAGES> =
    Pages([const { [const { AtomicU64::new(0) }; 512] }; STACK_PAGES]);
static SHARED: Pages<1> = Pages([const { [const { AtomicU64::new(0) }; 512] }; 1]);
static KERNEL_STACK: Pages<2> = Pages([const { [const { AtomicU64::new(0) }; 512] }; 2]);

/// Where [`attempt`] goes on after a fault; 0 = no attempt runs.
#[unsafe(no_mangle)]
static hostile_recover: AtomicU64 = AtomicU64::new(0);
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

    .text
    # hostile_attempt(function: rdi, argument: rsi) -> 0, or 1 if it faulted.
    .global hostile_attempt
hostile_attempt:
    push rbp
    push rbx
    push r12
    push r13
    push r14
    push r15
    push qword ptr [rip + hostile_recover]
    mov [rip + hostile_recover], rsp
    mov rax, rdi
    mov rdi, rsi
    call rax
    xor eax, eax
1:  pop qword ptr [rip + hostile_recover]
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbx
    pop rbp
    ret

    # Every exception, callback and system call ends here, in kernel mode.
    .global hostile_trap
hostile_trap:
    cmp qword ptr [rip + hostile_recover], 0
    je 2f
    mov rsp, [rip + hostile_recover]
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
// `hostile_trap` is only ever named, never called.
unsafe extern "C" {
    fn hostile_attempt(function: unsafe extern "C" fn(*mut u8), argument: *mut u8) -> u64;
    pub fn hostile_trap();
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
pub struct Kernel {
    /// Frames of RAM.
    pub nr_pages: u64,
    /// The root that the builder made.
    pub root: u64,
    /// gfn of shared info.
    pub shared_info: u64,
}

impl Kernel {
    /// Address of scratch page `n`.
    pub fn scratch(&self, n: u64) -> u64 {
        (&raw const PAGES) as u64 + n % SCRATCH * 4096
    }
    /// Its frame.
    pub fn scratch_gfn(&self, n: u64) -> u64 {
        (self.scratch(n) - VIRT_BASE) >> 12
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
pub fn attempt<F: FnMut()>(mut f: F) -> bool {
    unsafe extern "C" fn run<F: FnMut()>(f: *mut u8) {
        // SAFETY: `attempt` passes its own closure.
        unsafe { (*f.cast::<F>())() }
    }
    // SAFETY: a fault leaves `f` half done and unwinds nothing: closures here own
    // nothing.
    let faulted = unsafe { hostile_attempt(run::<F>, (&raw mut f).cast()) } != 0;
    FAULTS.fetch_add(u64::from(faulted), Relaxed);
    !faulted
}

struct Console;
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

/// Handlers for everything, all of them [`hostile_trap`], and a stack for them.
pub fn install_handlers() {
    let trap = hostile_trap as *const () as u64;
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
    let top = (&raw const KERNEL_STACK) as u64 + 8192;
    hypercall(nr::STACK_SWITCH, [KERNEL_SS, top, 0, 0, 0]);
}

/// Maps shared info, for good.
fn map_shared_info(k: &Kernel) {
    let entry = k.shared_info << 12 | 0x67;
    let at = (&raw const SHARED) as u64;
    hypercall(nr::UPDATE_VA_MAPPING, [at, entry, 2, 0, 0]);
}

/// A timer event every 20 ms, so that an attack that ends in a loop ends. Whatever
/// attacks have pending or masked is forgotten.
fn rearm() {
    for word in &SHARED.0[0] {
        // All but the clock at the end: vcpu_infos, pending and mask bits.
        if (&raw const *word) as u64 & 0xfff < shared_info::WC_VERSION {
            word.store(0, Relaxed);
        }
    }
    let bind = 0u64;
    let virq = (&raw const bind) as u64;
    hypercall(nr::EVENT_CHANNEL_OP, [event::op::BIND_VIRQ, virq, 0, 0, 0]);
    let period = 20_000_000u64;
    let at = (&raw const period) as u64;
    hypercall(nr::VCPU_OP, [vcpu::SET_PERIODIC_TIMER, 0, at, 0, 0]);
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
    let k = Kernel {
        nr_pages: info.nr_pages,
        root: (info.pt_base - VIRT_BASE) >> 12,
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
    for _ in 0..steps {
        install_handlers();
        hypercall(
            nr::MMUEXT_OP,
            [
                [u64::from(mmuext::NEW_BASEPTR), k.root, 0].as_ptr() as u64,
                1,
                0,
                0x7ff0,
                0,
            ],
        );
        rearm();
        let family = rng.below(16);
        let rng = &mut rng;
        attempt(|| match family {
            0..5 => hypercalls::attack(&k, rng),
            5..9 => tables::attack(&k, rng),
            9..11 => descriptors::attack(&k, rng),
            11..14 => instructions::attack(&k, rng),
            _ => events::attack(&k, rng),
        });
    }
    let _ = writeln!(
        Console,
        "HOSTILE seed={seed} steps={steps} hypercalls={} faults={}",
        HYPERCALLS.load(Relaxed),
        FAULTS.load(Relaxed)
    );
    end(sched::SHUTDOWN_POWEROFF)
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    let _ = writeln!(Console, "hostile: {info}");
    end(sched::SHUTDOWN_CRASH)
}
