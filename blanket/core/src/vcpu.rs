//! The state of a vCPU.

use blanket_abi::Gfn;
use core::sync::atomic::{AtomicU8, Ordering};

/// RFLAGS bits.
pub mod rflags {
    /// Trap flag.
    pub const TF: u64 = 1 << 8;
    /// Interrupt flag.
    pub const IF: u64 = 1 << 9;
    /// Direction flag.
    pub const DF: u64 = 1 << 10;
    /// I/O privilege level.
    pub const IOPL: u64 = 3 << 12;
    /// Nested task.
    pub const NT: u64 = 1 << 14;
    /// Resume flag.
    pub const RF: u64 = 1 << 16;
    /// Virtual-8086 mode.
    pub const VM: u64 = 1 << 17;
    /// Alignment check.
    pub const AC: u64 = 1 << 18;
    /// Bits that only the hypervisor decides: IOPL, VM, VIF, VIP.
    pub const HYPERVISOR: u64 = IOPL | VM | 1 << 19 | 1 << 20;
    /// Always one.
    pub const ONE: u64 = 1 << 1;
}

/// What the entry code saves; the guest's general registers. The order is that
/// of the pushes, lowest address first.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[allow(missing_docs, reason = "register names")]
pub struct TrapFrame {
    pub r15: u64,
    pub r14: u64,
    pub r13: u64,
    pub r12: u64,
    pub rbp: u64,
    pub rbx: u64,
    pub r11: u64,
    pub r10: u64,
    pub r9: u64,
    pub r8: u64,
    pub rax: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rsi: u64,
    pub rdi: u64,
    /// Vector, or one of [`entry`].
    pub vector: u64,
    pub error: u64,
    pub rip: u64,
    pub cs: u64,
    pub rflags: u64,
    pub rsp: u64,
    pub ss: u64,
}

/// Reasons for entering the core that are not vectors.
pub mod entry {
    /// `syscall` from 64-bit code.
    pub const SYSCALL: u64 = 256;
    /// `syscall` from 32-bit code.
    pub const SYSCALL32: u64 = 257;
    /// The return to the guest faulted.
    pub const IRET_FAULT: u64 = 258;
}

impl TrapFrame {
    /// General registers in encoding order (rax, rcx, rdx, rbx, rsp, ...).
    #[must_use]
    pub fn gprs(&self) -> [u64; 16] {
        [
            self.rax, self.rcx, self.rdx, self.rbx, self.rsp, self.rbp, self.rsi, self.rdi,
            self.r8, self.r9, self.r10, self.r11, self.r12, self.r13, self.r14, self.r15,
        ]
    }
    /// One general register by its number in the encoding.
    #[inline]
    #[must_use]
    pub fn gpr(&self, num: u8) -> u64 {
        match num & 15 {
            0 => self.rax,
            1 => self.rcx,
            2 => self.rdx,
            3 => self.rbx,
            4 => self.rsp,
            5 => self.rbp,
            6 => self.rsi,
            7 => self.rdi,
            8 => self.r8,
            9 => self.r9,
            10 => self.r10,
            11 => self.r11,
            12 => self.r12,
            13 => self.r13,
            14 => self.r14,
            _ => self.r15,
        }
    }
    /// Sets one general register by its number in the encoding.
    #[inline]
    pub fn set_gpr(&mut self, num: u8, val: u64) {
        let reg = match num & 15 {
            0 => &mut self.rax,
            1 => &mut self.rcx,
            2 => &mut self.rdx,
            3 => &mut self.rbx,
            4 => &mut self.rsp,
            5 => &mut self.rbp,
            6 => &mut self.rsi,
            7 => &mut self.rdi,
            8 => &mut self.r8,
            9 => &mut self.r9,
            10 => &mut self.r10,
            11 => &mut self.r11,
            12 => &mut self.r12,
            13 => &mut self.r13,
            14 => &mut self.r14,
            _ => &mut self.r15,
        };
        *reg = val;
    }
    /// Sets the general registers from encoding order.
    pub fn set_gprs(&mut self, r: &[u64; 16]) {
        [
            self.rax, self.rcx, self.rdx, self.rbx, self.rsp, self.rbp, self.rsi, self.rdi,
            self.r8, self.r9, self.r10, self.r11, self.r12, self.r13, self.r14, self.r15,
        ] = *r;
    }
}

/// The fields that the entry code's fast paths use without calling Rust. A zero
/// in a field that they need sends them to the slow path.
#[repr(C)]
#[derive(Debug, Default)]
pub struct Fast {
    /// Guest stack pointer at entry by `syscall`.
    pub scratch_rsp: u64,
    /// Scratch.
    pub tmp: [u64; 3],
    /// CR3 of the kernel root.
    pub kernel_cr3: u64,
    /// CR3 of the user root; 0 = none.
    pub user_cr3: u64,
    /// Kernel stack, aligned to 16 and outside the hypervisor's range; 0 = none.
    pub kernel_sp: u64,
    /// System call handler, canonical; 0 = none or not for the fast path.
    pub syscall: u64,
    /// Address of the vcpu_info in the window; 0 = none.
    pub vcpu_info: u64,
    /// 1 while the guest is in kernel mode.
    pub kernel_mode: u8,
    /// Nonzero: iret hypercalls take the slow path.
    pub slow_iret: u8,
    /// Nonzero: the core runs on a root of its own, which has nothing of the guest's
    /// address space.
    pub isolated: u8,
    /// Padding.
    pub pad: [u8; 5],
    /// Fast system calls taken.
    pub fast_syscalls: u64,
    /// Fast irets taken.
    pub fast_irets: u64,
    /// Where entries from the guest go, [`crate::machine::Host::trap_entry`]: one of
    /// two functions, so that a trace that is off costs no test.
    pub trap: u64,
    /// The trace is on.
    pub traced: bool,
}

impl Fast {
    /// Bit of `slow_iret` that stays.
    const ISOLATED: u8 = 2;

    /// The core runs on a root of its own: the fast paths are off, because they reach
    /// for the guest's stack and its vcpu_info.
    pub fn isolate(&mut self) {
        self.isolated = 1;
        self.slow_iret |= Self::ISOLATED;
    }
}

/// An entry of the virtual trap table.
#[derive(Clone, Copy, Debug, Default)]
pub struct Gate {
    /// Handler; 0 = none.
    pub address: u64,
    /// Bits 0 and 1: lowest privilege for `int n`; bit 2: mask events.
    pub flags: u8,
}

/// A registered callback.
#[derive(Clone, Copy, Debug, Default)]
pub struct Callback {
    /// Handler; 0 = none.
    pub address: u64,
    /// Mask events on entry.
    pub mask: bool,
}

/// A place in guest memory, found once through the guest's tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Frame.
    pub gfn: Gfn,
    /// Byte offset in it.
    pub offset: u64,
}

/// No deadline.
pub const NEVER: u64 = u64::MAX;

/// The part of `VCPUOP_initialise` that is only needed at the start.
#[derive(Clone, Copy, Debug)]
pub struct Start {
    /// `struct cpu_user_regs` as words.
    pub regs: [u64; 25],
    /// FS base, kernel GS base, user GS base.
    pub bases: [u64; 3],
    /// Kernel root.
    pub kernel_root: Gfn,
    /// User root.
    pub user_root: Option<Gfn>,
}

/// A vCPU's private state. Its own thread holds the lock while it is up; another
/// vCPU may fill it in before that (`VCPUOP_initialise`).
#[derive(Debug)]
pub struct Vcpu {
    /// Id.
    pub id: u32,
    /// Virtual trap table.
    pub traps: [Gate; 256],
    /// Event callback.
    pub event: Callback,
    /// Callback for a failed return.
    pub failsafe: Callback,
    /// System call.
    pub syscall: Callback,
    /// 32-bit system call.
    pub syscall32: Callback,
    /// 32-bit sysenter.
    pub sysenter: Callback,
    /// Stack selector for entries from user mode.
    pub kernel_ss: u64,
    /// Stack pointer for entries from user mode.
    pub kernel_sp: u64,
    /// Shadow of the kernel root.
    pub kernel_root: u32,
    /// Shadow of the user root; 0 = none.
    pub user_root: u32,
    /// The tables that they shadow: kernel's, user's.
    pub root_gfns: [Gfn; 2],
    /// The vcpu_info.
    pub info: Option<Place>,
    /// How the vCPU starts, until it has.
    pub start: Option<Start>,
    /// Second copy of the time parameters.
    pub time_area: Option<Place>,
    /// Run-state area: where it begins, and the frame of its last word (the area
    /// may cross a page).
    pub runstate_area: Option<(Place, Gfn)>,
    /// Run-state.
    pub runstate: u32,
    /// When it was entered, ns.
    pub runstate_since: u64,
    /// ns in each state.
    pub runstate_time: [u64; 4],
    /// GDT frames of the guest.
    pub gdt: [Gfn; 14],
    /// Entries in the guest's GDT.
    pub gdt_entries: u32,
    /// Address of the guest's LDT.
    pub ldt: u64,
    /// Entries in it.
    pub ldt_entries: u32,
    /// CR4 as the guest sees it.
    pub cr4: u64,
    /// Virtual IOPL.
    pub iopl: u8,
    /// Debug registers 0 to 3.
    pub dr: [u64; 4],
    /// DR6.
    pub dr6: u64,
    /// DR7.
    pub dr7: u64,
    /// XCR0.
    pub xcr0: u64,
    /// TSC_AUX.
    pub tsc_aux: u64,
    /// One-shot timer, absolute ns.
    pub singleshot: u64,
    /// Period of the periodic timer, ns; 0 = off.
    pub period: u64,
    /// Its next expiry.
    pub periodic: u64,
    /// Time limit of a poll.
    pub poll_until: u64,
    /// When this vCPU last sent an IPI to itself, and how many it sent in a row.
    pub self_ipi: (u64, u32),
    /// RIP and RSP where the last upcall began.
    pub upcall_place: (u64, u64),
    /// An IPI to itself that is held back, and until when.
    pub held_ipi: Option<(u32, u64)>,
    /// An NMI was delivered and not returned from.
    pub nmi_blocked: bool,
    /// Version of the time parameters that were last published.
    pub time_seen: u32,
    /// Page-table writes by their code, see `decode_table_write`.
    pub decoded: [Option<(u64, crate::insn::PtWrite)>; 2],
    /// The world was left since timers were last looked at.
    pub check_timers: bool,
    /// The VMM wants the VM to stand still.
    pub pause_asked: bool,
    /// Steps of the present hypercall since the world was left.
    pub work: u32,
    /// What the host has taken back as far as this vCPU has followed it
    /// (`VmPage::revocations`).
    pub revocations: u64,
    /// Number of the trace's last record.
    pub trace_number: u64,
}

impl Vcpu {
    /// A vCPU that nobody has initialised.
    #[must_use]
    pub const fn new(id: u32) -> Self {
        const NONE: Callback = Callback {
            address: 0,
            mask: false,
        };
        Self {
            id,
            traps: [Gate {
                address: 0,
                flags: 0,
            }; 256],
            event: NONE,
            failsafe: NONE,
            syscall: NONE,
            syscall32: NONE,
            sysenter: NONE,
            kernel_ss: 0,
            kernel_sp: 0,
            kernel_root: 0,
            user_root: 0,
            root_gfns: [Gfn(u64::MAX); 2],
            info: None,
            start: None,
            time_area: None,
            runstate_area: None,
            runstate: blanket_abi::xen::shared::runstate::OFFLINE,
            runstate_since: 0,
            runstate_time: [0; 4],
            gdt: [Gfn(0); 14],
            gdt_entries: 0,
            ldt: 0,
            ldt_entries: 0,
            cr4: 0,
            iopl: 0,
            dr: [0; 4],
            dr6: 0xffff_0ff0,
            dr7: 0x400,
            xcr0: 1,
            tsc_aux: 0,
            singleshot: NEVER,
            period: 0,
            periodic: NEVER,
            poll_until: NEVER,
            self_ipi: (0, 0),
            upcall_place: (0, 0),
            held_ipi: None,
            nmi_blocked: false,
            // Odd: no version is.
            time_seen: 1,
            decoded: [None; 2],
            check_timers: true,
            pause_asked: false,
            work: 0,
            revocations: 0,
            trace_number: 0,
        }
    }
}

/// Life of a vCPU, as other vCPUs see it.
#[derive(Debug)]
pub struct State(AtomicU8);

impl State {
    /// Never initialised.
    pub const RAW: u8 = 0;
    /// Initialised, down.
    pub const DOWN: u8 = 1;
    /// Up.
    pub const UP: u8 = 2;

    /// Not initialised.
    #[must_use]
    pub const fn new() -> Self {
        Self(AtomicU8::new(Self::RAW))
    }
    /// The state.
    #[inline]
    #[must_use]
    pub fn get(&self) -> u8 {
        self.0.load(Ordering::Acquire)
    }
    /// Changes it.
    pub fn set(&self, to: u8) {
        self.0.store(to, Ordering::Release);
    }
}

impl Default for State {
    fn default() -> Self {
        Self::new()
    }
}
