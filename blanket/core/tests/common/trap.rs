//! A guest that takes traps: registers, stacks and frames.

use super::guest::{Guest, TEXT, USER};
use super::{ARGS, ARGS_SIZE, Setup, World};
use blanket_abi::xen::shared::vcpu_info;
use blanket_core::vcpu::rflags;
use std::sync::atomic::Ordering::SeqCst;

/// Kernel stack that `stack_switch` has set.
pub const KERNEL_SP: u64 = ARGS + ARGS_SIZE;
/// Stack in use, for entries from kernel mode; not aligned.
pub const SP: u64 = ARGS + ARGS_SIZE / 2 + 8;
pub const CS_KERNEL: u64 = 0xe033;
pub const SS: u64 = 0xe02b;

pub fn world() -> (World, Guest) {
    let (mut w, g) = World::booted(Setup::default());
    set_masked(&w, false);
    let f = &mut w.regs[0];
    (f.rip, f.cs, f.ss, f.rsp) = (TEXT, CS_KERNEL, SS, SP);
    f.rflags = rflags::IF | rflags::ONE | 0x40;
    (f.rcx, f.r11) = (0xcccc, 0x1111);
    (w, g)
}

/// To user mode, as the iret hypercall does it.
pub fn user(w: &mut World) {
    w.cpu0(|c| c.to_user_mode());
    let f = &mut w.regs[0];
    (f.rip, f.cs, f.ss, f.rsp) = (USER + 0x10, 0x33, 0x2b, 0x7fff_0000_0ff8);
}

pub fn info(w: &World, field: u64) -> u64 {
    w.m.words(w.setup.shared_info())[field as usize / 8].load(SeqCst)
}

pub fn masked(w: &World) -> bool {
    info(w, vcpu_info::MASK) >> 8 & 0xff != 0
}

pub fn set_masked(w: &World, mask: bool) {
    w.m.bytes(w.setup.shared_info())[vcpu_info::MASK as usize].store(u8::from(mask), SeqCst);
}

pub fn code(w: &World, gfn: u64, at: u64, bytes: &[u8]) {
    for (i, &b) in bytes.iter().enumerate() {
        w.m.bytes(gfn)[at as usize + i].store(b, SeqCst);
    }
}

pub fn enter(w: &mut World, vector: u64, error: u64) {
    w.cpu0(|c| {
        (c.f.vector, c.f.error) = (vector, error);
        c.enter();
    });
}

/// The words of the frame on top of the stack.
pub fn frame<const N: usize>(w: &World) -> [u64; N] {
    w.m.words_at(w.regs[0].rsp, N).try_into().expect("N words")
}
