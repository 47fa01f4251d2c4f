//! What a core writes down of a VM that stands still, and takes up again.
//!
//! The VMM asks for it by [`crate::device::VmPage::pause`]; the core answers in frames
//! that lie above the VM's RAM ([`crate::device::Boot::state_base`]). The same frames
//! are what a core reads that is told to go on where another one stopped
//! ([`crate::device::boot_flags::RESTORE`]). It trusts nothing that it reads there.
//!
//! | frames, from the first on | what |
//! |---|---|
//! | 0 | a [`VmState`] |
//! | 1 to 8 | the ports, one word for each: [`PORTS_AT`] |
//! | 9 + 2 *i* | vCPU *i*'s [`VcpuState`] |
//! | 10 + 2 *i* | its FPU, as FXSAVE or XSAVE (not compacted) write it |
//! | from 9 + 2 *n* on | a byte for each frame of RAM: [`mark`] |
//! | the last ones ([`log_at`]) | a bit for each frame of RAM: the dirty log |
//!
//! The dirty log is no part of the state: the core writes it when it is asked for it
//! ([`crate::device::pause::LOG`]).
//!
//! Both records consist of words with names, so that who stores them need not know
//! what they mean: see [`VmState::FIELDS`].

use crate::xen::event::PORTS;

/// Version of all of it. A core takes up only what a core of the same version wrote.
pub const VERSION: u64 = 2;

/// First frame of the ports.
pub const PORTS_AT: u64 = 1;
/// First frame of the vCPUs.
pub const VCPUS_AT: u64 = PORTS_AT + PORTS as u64 / 512;

/// Frames that a VM needs for its state.
#[must_use]
pub const fn frames(nr_vcpus: u32, ram_frames: u64) -> u64 {
    log_at(nr_vcpus, ram_frames) + ram_frames.div_ceil(LOG_PER_FRAME)
}

/// Frame of a vCPU's [`VcpuState`]; its FPU is in the next one.
#[must_use]
pub const fn vcpu_at(id: u32) -> u64 {
    VCPUS_AT + 2 * id as u64
}

/// First frame of the marks.
#[must_use]
pub const fn marks_at(nr_vcpus: u32) -> u64 {
    vcpu_at(nr_vcpus)
}

/// Frames of RAM that a frame of the dirty log has a bit for.
pub const LOG_PER_FRAME: u64 = 8 * crate::PAGE_SIZE;

/// First frame of the dirty log: bit *g* % 64 of word *g* / 64 is set if frame *g* of RAM
/// was written.
#[must_use]
pub const fn log_at(nr_vcpus: u32, ram_frames: u64) -> u64 {
    marks_at(nr_vcpus) + ram_frames.div_ceil(4096)
}

/// What the byte of a frame of RAM says.
pub mod mark {
    /// Bit `level - 1` is set while the frame is a page table of that level.
    pub const LEVELS: u8 = 0xf;
    /// The guest has given the frame up.
    pub const OUT: u8 = 0x80;
}

/// Something that is kept as words.
trait Words: Sized {
    const COUNT: usize;
    fn put(&self, to: &mut [u64]);
    fn take(from: &[u64]) -> Self;
}

impl Words for u64 {
    const COUNT: usize = 1;
    fn put(&self, to: &mut [u64]) {
        to.copy_from_slice(&[*self]);
    }
    fn take(from: &[u64]) -> Self {
        from.first().copied().unwrap_or(0)
    }
}

impl<const N: usize> Words for [u64; N] {
    const COUNT: usize = N;
    fn put(&self, to: &mut [u64]) {
        to.copy_from_slice(self);
    }
    fn take(from: &[u64]) -> Self {
        from.try_into().unwrap_or([0; N])
    }
}

/// A record: words with names, in the order in which they are kept.
macro_rules! record {
    ($(#[$meta:meta])* $name:ident { $($(#[$doc:meta])* $field:ident: $kind:ty),* $(,)? }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub struct $name {
            $($(#[$doc])* pub $field: $kind,)*
        }

        impl $name {
            /// Words of the record.
            pub const WORDS: usize = 0 $(+ <$kind as Words>::COUNT)*;
            /// Name and number of words of each field.
            pub const FIELDS: &[(&str, usize)] = &[
                $((stringify!($field), <$kind as Words>::COUNT),)*
            ];

            /// The record as words.
            #[must_use]
            pub fn to_words(&self) -> [u64; Self::WORDS] {
                let mut words = [0; Self::WORDS];
                let mut at = 0;
                $(
                    self.$field.put(&mut words[at..at + <$kind as Words>::COUNT]);
                    at += <$kind as Words>::COUNT;
                )*
                debug_assert!(at == Self::WORDS);
                words
            }

            /// The record that the words are.
            #[must_use]
            pub fn from_words(words: &[u64; Self::WORDS]) -> Self {
                let mut rest = &words[..];
                $(
                    let (head, tail) = rest.split_at(<$kind as Words>::COUNT);
                    let $field = <$kind as Words>::take(head);
                    rest = tail;
                )*
                debug_assert!(rest.is_empty());
                Self { $($field,)* }
            }
        }

        // Each has a frame of its own.
        const _: () = assert!($name::WORDS <= 512);
    };
}

record! {
    /// What all vCPUs share.
    VmState {
        /// [`VERSION`].
        version: u64,
        /// vCPUs.
        nr_vcpus: u64,
        /// Frames of RAM.
        ram_frames: u64,
        /// Guest system time at which the VM was stopped, ns.
        system_time: u64,
        /// What is added to the host's system time to get the guest's, ns, modulo 2^64.
        /// Whoever takes the VM up sets it.
        time_offset: u64,
        /// Frames of the grant table in use.
        grant_frames: u64,
        /// Shutdown reason given in advance, plus one.
        shutdown_code: u64,
        /// 1: run-state updates are marked.
        runstate_flag: u64,
        /// Bit per vCPU whose vcpu_info the guest has moved.
        infos_moved: u64,
        /// Bit per vCPU that has an NMI to take.
        nmi: u64,
        /// Frames that the guest has given up.
        out: u64,
    }
}

record! {
    /// A vCPU that stands where it would return to its guest.
    VcpuState {
        /// [`life`].
        life: u64,
        /// r15, r14, r13, r12, rbp, rbx, r11, r10, r9, r8, rax, rcx, rdx, rsi, rdi.
        general: [u64; 15],
        /// rip, cs, rflags, rsp, ss.
        frame: [u64; 5],
        /// 1 in kernel mode.
        kernel_mode: u64,
        /// FS base, active and inactive GS base.
        bases: [u64; 3],
        /// DS, ES, FS, GS.
        selectors: [u64; 4],
        /// Handlers of the virtual trap table; 0 = none.
        traps: [u64; 256],
        /// Their flags, a byte each.
        trap_flags: [u64; 32],
        /// Event, failsafe, syscall, 32-bit syscall, 32-bit sysenter callback; 0 = none.
        callbacks: [u64; 5],
        /// Bit per callback that masks events.
        callback_masks: u64,
        /// Stack for entries from user mode.
        kernel_ss: u64,
        /// Its pointer.
        kernel_sp: u64,
        /// gfn of the kernel root and of the user root; all ones = none.
        roots: [u64; 2],
        /// [`place`] of the vcpu_info.
        info: u64,
        /// [`place`] of the second copy of the time parameters.
        time_area: u64,
        /// [`place`] of the run-state area, and of its last word.
        runstate_area: [u64; 2],
        /// Run-state, when it was entered, ns in each.
        runstate: [u64; 6],
        /// GDT frames.
        gdt: [u64; 14],
        /// Entries of the GDT.
        gdt_entries: u64,
        /// Address of the LDT.
        ldt: u64,
        /// Its entries.
        ldt_entries: u64,
        /// CR4 as far as it is the guest's.
        cr4: u64,
        /// Virtual IOPL.
        iopl: u64,
        /// Debug registers 0 to 3, 6 and 7.
        debug: [u64; 6],
        /// XCR0; 0 without XSAVE.
        xcr0: u64,
        /// TSC_AUX.
        tsc_aux: u64,
        /// One-shot timer, absolute guest system time; all ones = off.
        singleshot: u64,
        /// Period of the periodic timer, ns; 0 = off.
        period: u64,
        /// Its next expiry.
        periodic: u64,
        /// 1: an NMI was delivered and not returned from.
        nmi_blocked: u64,
        /// A vCPU that was initialised and has not started: `struct cpu_user_regs`.
        start: [u64; 25],
        /// FS base, kernel and user GS base of such a vCPU.
        start_bases: [u64; 3],
        /// Bytes of the FPU's image.
        fpu: u64,
    }
}

/// Values of [`VcpuState::life`].
pub mod life {
    /// Never initialised: the rest of the record means nothing.
    pub const RAW: u64 = 0;
    /// Initialised, and has never run: it starts from [`super::VcpuState::start`].
    pub const INITIALISED: u64 = 1;
    /// It has run, and is down.
    pub const DOWN: u64 = 2;
    /// Up.
    pub const UP: u64 = 3;
}

/// A place in guest memory: `gfn << 12 | offset | 1`, 0 = none. Offsets are multiples
/// of 8.
pub mod place {
    /// Puts it together.
    #[must_use]
    pub const fn of(gfn: u64, offset: u64) -> u64 {
        gfn << 12 | offset & 0xff8 | 1
    }
    /// gfn and offset; `None` for no place.
    #[must_use]
    pub const fn split(word: u64) -> Option<(u64, u64)> {
        if word & 1 == 0 {
            return None;
        }
        Some((word >> 12, word & 0xff8))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_its_words() {
        let mut words = [0; VcpuState::WORDS];
        for (word, value) in words.iter_mut().zip(1u64..) {
            *word = value;
        }
        let record = VcpuState::from_words(&words);
        assert_eq!(record.life, 1);
        assert_eq!(record.general[0], 2);
        assert_eq!(record.fpu, VcpuState::WORDS as u64);
        assert_eq!(record.to_words(), words);
        let named: usize = VcpuState::FIELDS.iter().map(|(_, count)| count).sum();
        assert_eq!(named, VcpuState::WORDS);
    }

    #[test]
    fn places_survive() {
        assert_eq!(place::split(place::of(7, 0x48)), Some((7, 0x48)));
        assert_eq!(place::split(0), None);
        assert_eq!(place::split(place::of(0, 0)), Some((0, 0)));
    }
}
