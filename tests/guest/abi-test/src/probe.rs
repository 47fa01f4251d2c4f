//! Runs a snippet of machine code and reports how it ended: with a value or
//! with a fault that the kernel turned into a signal.
//!
//! A fault's handler does not return into the snippet: it points the
//! interrupted context at `probe_resume`, which drops the snippet's stack and
//! returns to the caller of [`run`]. One probe at a time per process.

use crate::sys::Region;
use std::arch::{asm, global_asm};
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering::SeqCst};

global_asm!(
    r"
    .globl probe_enter
    .globl probe_resume
    // probe_enter(code, arg0, arg1, *mut u64 result) -> 0 returned, 1 faulted
    probe_enter:
        push rbx
        push rbp
        push r12
        push r13
        push r14
        push r15
        push rcx
        mov [rip + {rsp}], rsp
        mov rax, rdi
        mov rdi, rsi
        mov rsi, rdx
        call rax
        pop rcx
        mov [rcx], rax
        xor eax, eax
        jmp 2f
    probe_resume:
        mov rsp, [rip + {rsp}]
        pop rcx
        mov eax, 1
    2:
        pop r15
        pop r14
        pop r13
        pop r12
        pop rbp
        pop rbx
        cld
        ret
    ",
    rsp = sym PROBE_RSP,
);

unsafe extern "C" {
    fn probe_enter(code: u64, arg0: u64, arg1: u64, result: *mut u64) -> u32;
    fn probe_resume();
}

static PROBE_RSP: AtomicU64 = AtomicU64::new(0);
static FS_BASE: AtomicU64 = AtomicU64::new(0);
static SIG: AtomicI32 = AtomicI32::new(0);
static CODE: AtomicI32 = AtomicI32::new(0);
static ADDR: AtomicU64 = AtomicU64::new(0);
static REGS: [AtomicU64; 23] = [const { AtomicU64::new(0) }; 23];

/// Index of the word that holds cs, gs, fs and ss in the saved registers.
pub const CSGSFS: usize = libc::REG_CSGSFS as usize;
/// cs 0x33 and ss 0x2b: Linux's selectors for 64-bit user mode.
pub const USER_SELECTORS: u64 = 0x002b_0000_0000_0033;
/// Flags that a resumed probe must not carry: TF, DF, NT, AC.
const BAD_FLAGS: u64 = 1 << 8 | 1 << 10 | 1 << 14 | 1 << 18;

/// A signal that a snippet caused, with the context that the kernel saved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Signal number.
    pub sig: i32,
    /// `si_code`.
    pub code: i32,
    /// `si_addr`.
    pub addr: u64,
    /// x86 vector as Linux reports it in the signal frame.
    pub trapno: u64,
    /// Hardware error code as Linux reports it in the signal frame.
    pub err: u64,
    /// Faulting address register as saved in the signal frame.
    pub cr2: u64,
    /// Instruction pointer.
    pub rip: u64,
    /// Stack pointer.
    pub rsp: u64,
    /// Flags register.
    pub flags: u64,
    /// Low 16 bits: code selector; high 16 bits: stack selector.
    pub selectors: u64,
}

impl Fault {
    /// Short form for messages.
    pub fn brief(&self) -> String {
        format!(
            "signal {} code {} addr {:#x} trap {} err {:#x}",
            self.sig, self.code, self.addr, self.trapno, self.err
        )
    }
}

/// How a snippet ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ran {
    /// It returned this value in rax.
    Returned(u64),
    /// It faulted.
    Faulted(Fault),
}

impl Ran {
    /// The fault, or a message that there was none.
    pub fn fault(self) -> Result<Fault, String> {
        match self {
            Self::Faulted(fault) => Ok(fault),
            Self::Returned(value) => Err(format!("no fault; returned {value:#x}")),
        }
    }

    /// The value, or a message with the fault.
    pub fn value(self) -> Result<u64, String> {
        match self {
            Self::Returned(value) => Ok(value),
            Self::Faulted(fault) => Err(format!("unexpected {}", fault.brief())),
        }
    }

    /// "value N" or the fault's short form.
    pub fn brief(&self) -> String {
        match self {
            Self::Returned(value) => format!("value {value:#x}"),
            Self::Faulted(fault) => fault.brief(),
        }
    }
}

/// A handler for SA_SIGINFO.
pub type Handler = extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void);

/// The saved general registers of an interrupted context, `libc::REG_*` order.
///
/// # Safety
/// `context` must be the third argument of a running SA_SIGINFO handler.
pub unsafe fn saved_registers<'a>(context: *mut libc::c_void) -> &'a mut [i64; 23] {
    // SAFETY: the kernel passes a valid ucontext that nobody else uses.
    unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs }
}

/// Clears AC: the kernel starts handlers with the interrupted code's flag.
fn clear_alignment_check() {
    // SAFETY: changes one flag that compiled code expects to be clear.
    unsafe { asm!("pushfq", "and qword ptr [rsp], {mask}", "popfq", mask = const !(1_i32 << 18)) };
}

extern "C" fn on_fault(sig: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    clear_alignment_check();
    // A snippet may have changed the FS base, which Rust and libc need.
    set_fs_base_raw(FS_BASE.load(SeqCst));
    // SAFETY: arguments of a running handler.
    let regs = unsafe { saved_registers(context) };
    for (to, from) in REGS.iter().zip(regs.iter()) {
        to.store(*from as u64, SeqCst);
    }
    SIG.store(sig, SeqCst);
    // SAFETY: SA_SIGINFO handlers get a valid siginfo.
    unsafe {
        CODE.store((*info).si_code, SeqCst);
        ADDR.store((*info).si_addr() as u64, SeqCst);
    }
    regs[libc::REG_RIP as usize] = probe_resume as *const () as i64;
    regs[libc::REG_EFL as usize] &= !(BAD_FLAGS as i64);
    regs[CSGSFS] = USER_SELECTORS as i64;
}

fn set_fs_base_raw(base: u64) {
    // SAFETY: arch_prctl(ARCH_SET_FS) with the value it had at install time;
    // written without libc because errno lives behind that very base.
    unsafe {
        asm!("syscall", inlateout("rax") libc::SYS_arch_prctl => _, in("rdi") 0x1002, in("rsi") base,
             lateout("rcx") _, lateout("r11") _, options(nostack));
    }
}

/// Reads the FS or GS base: `which` is ARCH_GET_FS (0x1003) or ARCH_GET_GS (0x1004).
pub fn segment_base(which: u64) -> u64 {
    let mut base = 0_u64;
    // SAFETY: the kernel writes one word to `base`.
    unsafe { libc::syscall(libc::SYS_arch_prctl, which, &raw mut base) };
    base
}

/// Installs `handler` for one signal, on the alternate stack.
pub fn set_handler(sig: i32, handler: Handler, flags: i32) {
    // SAFETY: the handler has the SA_SIGINFO signature and stays in the program.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | flags;
        libc::sigaction(sig, &action, std::ptr::null_mut());
    }
}

/// Gives the calling thread an alternate signal stack that is never freed.
pub fn alternate_stack() {
    const SIZE: usize = 128 * 1024;
    let memory = Box::leak(vec![0_u8; SIZE].into_boxed_slice());
    let stack = libc::stack_t {
        ss_sp: memory.as_mut_ptr().cast(),
        ss_flags: 0,
        ss_size: SIZE,
    };
    // SAFETY: the memory is leaked, so the stack stays valid.
    unsafe { libc::sigaltstack(&stack, std::ptr::null_mut()) };
}

/// Prepares the calling process and thread for [`run`].
pub fn install() {
    FS_BASE.store(segment_base(0x1003), SeqCst);
    alternate_stack();
    for sig in [
        libc::SIGSEGV,
        libc::SIGBUS,
        libc::SIGILL,
        libc::SIGFPE,
        libc::SIGTRAP,
        libc::SIGSYS,
    ] {
        set_handler(sig, on_fault, libc::SA_NODEFER);
    }
}

/// Runs the code at `address` with two arguments in rdi and rsi.
///
/// [`install`] must have been called in this process. The code is one of this
/// program's own snippets or an address that is expected to fault.
pub fn run(address: u64, arg0: u64, arg1: u64) -> Ran {
    FS_BASE.store(segment_base(0x1003), SeqCst);
    run_keeping_fs(address, arg0, arg1)
}

fn run_keeping_fs(address: u64, arg0: u64, arg1: u64) -> Ran {
    let mut result = 0;
    // SAFETY: snippets follow the C calling convention or fault, and every
    // fault resumes behind the call with stack and registers restored.
    let faulted = unsafe { probe_enter(address, arg0, arg1, &mut result) };
    set_fs_base_raw(FS_BASE.load(SeqCst));
    if faulted == 0 {
        return Ran::Returned(result);
    }
    Ran::Faulted(last_fault())
}

fn last_fault() -> Fault {
    let reg = |i: i32| REGS[i as usize].load(SeqCst);
    Fault {
        sig: SIG.load(SeqCst),
        code: CODE.load(SeqCst),
        addr: ADDR.load(SeqCst),
        trapno: reg(libc::REG_TRAPNO),
        err: reg(libc::REG_ERR),
        cr2: reg(libc::REG_CR2),
        rip: reg(libc::REG_RIP),
        rsp: reg(libc::REG_RSP),
        flags: reg(libc::REG_EFL),
        selectors: reg(libc::REG_CSGSFS),
    }
}

/// Executable memory (below 4 GiB) with a snippet in it.
pub struct Code {
    region: Region,
}

impl Code {
    /// Copies the bytes into fresh executable memory.
    pub fn new(bytes: &[u8]) -> Result<Self, String> {
        let region = Region::low_code(bytes.len().next_multiple_of(4096) + 4096)?;
        region.fill(0, bytes);
        Ok(Self { region })
    }

    /// The same with a `ret` behind the bytes.
    pub fn with_ret(bytes: &[u8]) -> Result<Self, String> {
        let mut all = bytes.to_vec();
        all.push(0xc3);
        Self::new(&all)
    }

    /// Address of the first byte.
    pub fn addr(&self) -> u64 {
        self.region.addr()
    }

    /// Runs the snippet; see [`run`].
    pub fn run(&self, arg0: u64, arg1: u64) -> Ran {
        run(self.addr(), arg0, arg1)
    }
}

/// Runs `bytes` followed by `ret` with two arguments.
pub fn snippet(bytes: &[u8], arg0: u64, arg1: u64) -> Result<Ran, String> {
    Ok(Code::with_ret(bytes)?.run(arg0, arg1))
}

/// `mov rax,[rdi]`
pub const LOAD: &[u8] = &[0x48, 0x8b, 0x07];
/// `mov [rdi],rsi`
pub const STORE: &[u8] = &[0x48, 0x89, 0x37];

/// Loads a word from an address that may fault.
pub fn load(address: u64) -> Result<Ran, String> {
    snippet(LOAD, address, 0)
}

/// Stores a word to an address that may fault.
pub fn store(address: u64, value: u64) -> Result<Ran, String> {
    snippet(STORE, address, value)
}
