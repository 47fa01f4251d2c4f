//! The report of a core that cannot go on: what, where, and what the guest had asked
//! for. Written straight into the switch block, since the stack may be a small one.

use crate::entry;
use crate::machine::Hal;
use crate::start::canonical_rip;
use blanket_abi::device::{RUN_DATA, crash, exit};
use blanket_abi::layout::{IMAGE, vcpu as area};
use blanket_core::machine::{Cpu, Host};
use blanket_core::vcpu::TrapFrame;
use core::fmt::{self, Write};

/// Return addresses that are listed at most.
const CALLS: usize = 20;
/// Part of the report that the list of calls may not take from what follows.
const REST: usize = 600;

/// Where the core was.
pub enum At<'a> {
    /// In a function that called us: a panic.
    Here(u64),
    /// Interrupted, with all registers known.
    Frame(&'a TrapFrame),
    /// Interrupted on a stack of its own: what the CPU pushed (RIP, CS, RFLAGS, RSP,
    /// SS), below it error code and vector, and the registers that a call may change.
    Pushed(*const u64),
}

/// Appends to the text that the VMM gets; what does not fit is cut.
struct Report<'a> {
    hal: &'a Hal,
    len: usize,
}

impl Write for Report<'_> {
    fn write_str(&mut self, s: &str) -> fmt::Result {
        self.len += self.hal.put_data(self.len, s.as_bytes());
        Ok(())
    }
}

/// A place in the core as an offset in its image, which is what tools know.
struct Place(u64);

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (rip, _) = canonical_rip(self.0);
        if in_text(rip) {
            write!(f, "core+{:#x}", rip - IMAGE)
        } else {
            write!(f, "{:#x}", self.0)
        }
    }
}

fn in_text(rip: u64) -> bool {
    (IMAGE..&raw const entry::blanket_text_end as u64).contains(&rip)
}

/// Whether an instruction of the core's text that ends at `at` is a call: E8 with 32
/// bits, or FF /2 with an operand of up to five bytes.
fn follows_call(at: u64) -> bool {
    if !in_text(at) || !in_text(at - 8) {
        return false;
    }
    // SAFETY: the eight bytes before `at` are text, as was just checked.
    let code = unsafe { ((at - 8) as *const [u8; 8]).read() };
    code[3] == 0xe8
        || [2, 3, 4, 6, 7].into_iter().any(|len| {
            let at = 8 - len;
            code[at] == 0xff && code[at + 1] >> 3 & 7 == 2
        })
}

/// Ends the VM: the report goes to the VMM.
pub fn die(hal: &Hal, what: fmt::Arguments<'_>, at: &At<'_>) -> ! {
    let mut r = Report { hal, len: 0 };
    // Writing cannot fail.
    let _ = write(&mut r, what, at);
    let len = r.len;
    loop {
        hal.exit(exit::CRASH, [crash::CORE, 0, 0, len as u64]);
    }
}

fn write(r: &mut Report<'_>, what: fmt::Arguments<'_>, at: &At<'_>) -> fmt::Result {
    let hal = r.hal;
    writeln!(r, "vCPU {}: {what}", hal.id())?;
    let rsp = match at {
        At::Here(rsp) => *rsp,
        At::Frame(f) => {
            writeln!(
                r,
                "core at {} rflags {:#x} rsp {:#x} cr2 {:#x} cr3 {:#x}",
                Place(f.rip),
                f.rflags,
                f.rsp,
                hal.cr2(),
                crate::cpu::cr3()
            )?;
            registers(r, f)?;
            f.rsp
        }
        At::Pushed(at) => {
            // SAFETY: the entry code passes where it has just pushed all of it.
            let (cpu, regs) = unsafe { (*at.cast::<[u64; 5]>(), *at.sub(12).cast::<[u64; 10]>()) };
            let [rip, _, rflags, rsp, _] = cpu;
            let [rbp, r11, r10, r9, r8, rax, rcx, rdx, rsi, rdi] = regs;
            writeln!(
                r,
                "core at {} rflags {rflags:#x} rsp {rsp:#x} rax {rax:#x} rcx {rcx:#x} rdx {rdx:#x} \
                 rsi {rsi:#x} rdi {rdi:#x} rbp {rbp:#x} r8 {r8:#x} r9 {r9:#x} r10 {r10:#x} r11 {r11:#x}",
                Place(rip)
            )?;
            rsp
        }
    };
    calls(r, rsp)?;
    // SAFETY: the frame on top of this vCPU's main stack, mapped for the VM's life;
    // any words are a valid frame.
    let guest = unsafe { hal.frame().read_volatile() };
    // SAFETY: as above, for the fields of the fast paths.
    let kernel = unsafe { (&raw const (*hal.fast()).kernel_mode).read_volatile() } != 0;
    writeln!(
        r,
        "guest as it last entered the core by {} (error {:#x}): {} mode rip {:#x} cs {:#x} rflags {:#x} rsp {:#x} ss {:#x}",
        guest.vector,
        guest.error,
        if kernel { "kernel" } else { "user" },
        guest.rip,
        guest.cs,
        guest.rflags,
        guest.rsp,
        guest.ss
    )?;
    registers(r, &guest)
}

fn registers(r: &mut Report<'_>, f: &TrapFrame) -> fmt::Result {
    let names = [
        "rax", "rcx", "rdx", "rbx", "", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12",
        "r13", "r14", "r15",
    ];
    for (name, value) in names.into_iter().zip(f.gprs()) {
        if !name.is_empty() {
            write!(r, " {name} {value:#x}")?;
        }
    }
    writeln!(r)
}

/// What looks like return addresses, from `rsp` to the end of the stack that it is on.
fn calls(r: &mut Report<'_>, rsp: u64) -> fmt::Result {
    let base = r.hal.hw() - area::HW;
    let offset = rsp.wrapping_sub(base);
    let end = match offset {
        area::STACK..area::HW => base + area::HW,
        area::IST..area::GDT if offset & 0x1000 != 0 => (rsp | 0xfff) + 1,
        _ => return writeln!(r, "its stack is none of this vCPU's"),
    };
    write!(r, "calls:")?;
    let mut found = 0;
    let mut at = rsp.next_multiple_of(8);
    while at < end && found < CALLS && r.len < RUN_DATA - REST {
        // SAFETY: inside a mapped stack of this vCPU, aligned.
        let word = unsafe { (at as *const u64).read_volatile() };
        let (rip, _) = canonical_rip(word);
        if follows_call(rip) {
            write!(r, " {}", Place(word))?;
            found += 1;
        }
        at += 8;
    }
    writeln!(r)
}
