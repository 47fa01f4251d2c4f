//! What has exited, and what is done about it.

use core::sync::atomic::{AtomicBool, Ordering};

use bmcast_svm::{Bus, Control, Intercepts1, IoExit, Mode, Segment, emulate, walk};

use super::cpu::{self, LMA, SVME};
use super::memory::pointer;
use super::vcpu::Cpu;
use super::windows::{self, Window, is_guests};
use super::{apic, clock, machine, pci};
use crate::say;

/// 8 bytes of guest memory; the VMM's are none.
fn guest_word(address: u64) -> Option<u64> {
    let address = address & !7;
    // SAFETY: aligned, mapped to itself as all physical memory is, and not the VMM's own. Others may write it at any time:
    // hence volatile.
    is_guests(address, 8).then(|| unsafe { pointer::<u64>(address).read_volatile() })
}

/// An access to what is not mapped for the guest.
pub fn nested_fault(cpu: &mut Cpu) {
    let address = cpu.vmcb.control.exit_info2;
    let save = &cpu.vmcb.save;
    let mode = Mode {
        cr0: save.cr0,
        cr3: save.cr3,
        cr4: save.cr4,
        efer: save.efer,
    };
    let bits = if save.efer & LMA != 0 && save.cs.attributes & Segment::LONG != 0 {
        64
    } else if save.cs.attributes & Segment::DEFAULT != 0 {
        32
    } else {
        16
    };
    let mut linear = save.cs.base.wrapping_add(save.rip);
    if bits != 64 {
        linear &= 0xffff_ffff;
    }
    let mut code = [0; 15];
    let mut fetched = 0;
    for byte in &mut code {
        let at = linear.wrapping_add(u64::try_from(fetched).unwrap_or(0));
        let Some(word) = walk(mode, at, guest_word).and_then(|physical| {
            Some((guest_word(physical)?, usize::try_from(physical & 7).ok()?))
        }) else {
            break;
        };
        *byte = word.0.to_le_bytes()[word.1];
        fetched += 1;
    }
    let mut bus = At { address };
    let mut flags = cpu.vmcb.save.rflags;
    match emulate(
        &code[..fetched],
        bits,
        &mut cpu.registers,
        &mut flags,
        &mut bus,
    ) {
        Ok(length) => {
            cpu.vmcb.save.rflags = flags;
            cpu.skip(u64::from(length));
        }
        Err(error) => {
            say!(
                "at {linear:#x}, to {address:#x}: {error} ({:x?})",
                &code[..fetched]
            );
            cpu.vmcb.control.event_injection = Control::INJECT_GP;
        }
    }
}

/// A physical address of a device, or of nothing.
struct At {
    address: u64,
}

impl Bus for At {
    fn load(&mut self, width: u8) -> u64 {
        match windows::at(self.address) {
            Some(Window::Apic(offset)) => u64::from(apic::read(offset)),
            Some(Window::Own) => 0,
            Some(Window::Hidden) => u64::MAX,
            Some(Window::Device(offset)) => machine::read(offset, width),
            Some(Window::Controller) | None => read_device(self.address, width),
        }
    }

    fn store(&mut self, width: u8, value: u64) {
        match windows::at(self.address) {
            Some(Window::Apic(offset)) => {
                let [value, _] = cpu::halves(value);
                apic::write(offset, value);
            }
            Some(Window::Own | Window::Hidden) => {}
            Some(Window::Device(offset)) => machine::write(offset, width, value),
            Some(Window::Controller) => {
                write_device(self.address, width, value);
                machine::follow();
            }
            None => write_device(self.address, width, value),
        }
    }
}

/// Reads a device's register.
pub fn read_device(address: u64, width: u8) -> u64 {
    // SAFETY: the guest itself reads there, with this width: the VMM does it for it.
    unsafe {
        match width {
            1 => u64::from(pointer::<u8>(address).read_volatile()),
            2 => u64::from(pointer::<u16>(address).read_unaligned()),
            4 => u64::from(pointer::<u32>(address & !3).read_volatile()),
            _ => pointer::<u64>(address & !7).read_volatile(),
        }
    }
}

/// Writes a device's register.
pub fn write_device(address: u64, width: u8, value: u64) {
    let [low, _] = cpu::halves(value);
    let [byte, second, ..] = low.to_le_bytes();
    // SAFETY: the guest itself writes there, with this width: the VMM does it for it.
    unsafe {
        match width {
            1 => pointer::<u8>(address).write_volatile(byte),
            2 => pointer::<u16>(address).write_unaligned(u16::from_le_bytes([byte, second])),
            4 => pointer::<u32>(address & !3).write_volatile(low),
            _ => pointer::<u64>(address & !7).write_volatile(value),
        }
    }
}

/// A CPU works while it has nothing else to do.
static WORKER: AtomicBool = AtomicBool::new(false);

/// HLT: time for work, until there is an interrupt. One CPU does it; the others halt as they would, until whatever
/// makes them exit next.
pub fn halted(cpu: &mut Cpu) {
    if WORKER.swap(true, Ordering::AcqRel) {
        cpu.vmcb.control.intercepts1 &= !Intercepts1::HLT;
        return;
    }
    cpu.skip(1);
    // At most a millisecond: what comes through the 8259, and NMIs, are not seen here. The guest's HLT ends then as if by
    // an interrupt that was for nothing, which every idle loop expects.
    let end = clock::micros() + 1000;
    while !apic::pending() && clock::micros() < end {
        machine::turn();
        core::hint::spin_loop();
    }
    WORKER.store(false, Ordering::Release);
}

/// Sends an INIT. The CPU that it is for is to hold nothing of the VMM's then: INIT waits for GIF by the manual (APM 15.17),
/// and the emulator of the tests does not have it wait.
pub fn while_nobody_works(send: impl FnOnce()) {
    machine::alone(send);
    // If it was the one that works, another one does now.
    WORKER.store(false, Ordering::Release);
}

/// RDMSR or WRMSR of one that is not the guest's as it is.
pub fn msr(cpu: &mut Cpu) {
    let write = cpu.vmcb.control.exit_info1 & 1 != 0;
    let [msr, _] = cpu::halves(cpu.registers[1]);
    let [low, _] = cpu::halves(cpu.registers[0]);
    let [high, _] = cpu::halves(cpu.registers[2]);
    let value = u64::from(high) << 32 | u64::from(low);
    let efer = cpu.vmcb.save.efer;
    let answer = match (msr, write) {
        (cpu::EFER, false) => Some(efer & !SVME),
        (cpu::EFER, true) if value & SVME == 0 => {
            cpu.vmcb.save.efer = value & !LMA | efer & LMA | SVME;
            Some(0)
        }
        // SVM is in use: as if the firmware had switched it off (SVMDIS), and locked that.
        (cpu::VM_CR, false) => Some(1 << 4 | 1 << 3),
        (cpu::VM_CR, true) => Some(0),
        (cpu::APIC_BASE, true) if apic::may_be(value) => {
            // SAFETY: the guest itself writes it, and leaves the APIC where it is.
            unsafe { cpu::wrmsr(msr, value) };
            Some(0)
        }
        (apic::X2APIC_ICR, true) => {
            apic::write_x2apic_icr(value);
            Some(0)
        }
        _ => None,
    };
    match answer {
        Some(answer) => {
            if !write {
                let [low, high] = cpu::halves(answer);
                cpu.registers[0] = u64::from(low);
                cpu.registers[2] = u64::from(high);
            }
            cpu.skip(2);
        }
        None => cpu.vmcb.control.event_injection = Control::INJECT_GP,
    }
}

/// IN or OUT of a port that is watched.
pub fn port(cpu: &mut Cpu) {
    let io = IoExit::new(cpu.vmcb.control.exit_info1);
    // EXITINFO2 is the next instruction (APM 15.10.2).
    cpu.vmcb.save.rip = cpu.vmcb.control.exit_info2;
    cpu.vmcb.control.interrupt_shadow = 0;
    if io.string {
        return;
    }
    let [value, _] = cpu::halves(cpu.registers[0]);
    // Nobody but the guest uses these ports now, so that the address is the one that it has written.
    // SAFETY: reading it has no effect.
    let named = unsafe { cpu::port_in(pci::ADDRESS, 4) };
    let is_data = (pci::DATA..pci::DATA + 4).contains(&io.port);
    let hidden = if is_data {
        machine::is_hidden(named)
    } else {
        // No other ports are watched.
        true
    };
    // SAFETY: the guest itself does it, with this width: the VMM does it for it.
    unsafe {
        if io.input {
            let read = if hidden {
                u32::MAX
            } else {
                cpu::port_in(io.port, io.width)
            };
            cpu.registers[0] = match io.width {
                1 => cpu.registers[0] & !0xff | u64::from(read & 0xff),
                2 => cpu.registers[0] & !0xffff | u64::from(read & 0xffff),
                _ => u64::from(read),
            };
        } else if !hidden {
            cpu::port_out(io.port, io.width, value);
        }
    }
    if is_data && !io.input && machine::is_controller(named) {
        machine::follow();
    }
}

/// CPUID, which exits only where a CPU has five levels of paging: a guest that used them could not be left.
pub fn cpuid(cpu: &mut Cpu) {
    let [leaf, _] = cpu::halves(cpu.registers[0]);
    let [subleaf, _] = cpu::halves(cpu.registers[1]);
    let mut found = cpu::cpuid_at(leaf, subleaf);
    let cr4 = cpu.vmcb.save.cr4;
    let mut follow = |register: usize, bit: u32, on: bool| {
        found[register] = found[register] & !(1 << bit) | u32::from(on) << bit;
    };
    match (leaf, subleaf) {
        // OSXSAVE and OSPKE are the guest's CR4; LA57 is not there.
        (1, _) => follow(2, 27, cr4 & 1 << 18 != 0),
        (7, 0) => {
            follow(2, 4, cr4 & 1 << 22 != 0);
            follow(2, 16, false);
        }
        _ => {}
    }
    let [eax, ebx, ecx, edx] = found.map(u64::from);
    for (register, value) in [(0, eax), (3, ebx), (1, ecx), (2, edx)] {
        cpu.registers[register] = value;
    }
    cpu.skip(2);
}

/// A triple fault of the guest: the machine starts again, as it would have.
pub fn reset() -> ! {
    say!("the guest has shut down: reset");
    // SAFETY: the reset control register of chipsets since the PIIX3: full reset.
    unsafe { cpu::outb(0xcf9, 0x0e) };
    cpu::stop()
}
