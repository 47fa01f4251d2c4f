//! Time: pvclock, wall clock, timers, run-state (`public/xen.h` vcpu_time_info,
//! `public/vcpu.h`).

use crate::context::Context;
use crate::machine::Machine;
use crate::vcpu::{NEVER, Place};
use blanket_abi::device::{VmPage, exit};
use blanket_abi::xen::event::virq;
use blanket_abi::xen::shared::{runstate, shared_info, vcpu_info};
use blanket_abi::{Gfn, Va};
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};

/// One consistent reading of the host's time parameters (`public/xen.h`
/// vcpu_time_info; KVM's `pvclock_vcpu_time_info` is the same).
#[derive(Clone, Copy, Debug, Default)]
pub struct Clock {
    /// Version, even.
    pub version: u32,
    /// TSC at `system_time`.
    pub tsc_timestamp: u64,
    /// Guest system time, ns.
    pub system_time: u64,
    /// Multiplier.
    pub mul: u32,
    /// Shift.
    pub shift: i8,
    /// Bit 0: stable.
    pub flags: u8,
}

impl Clock {
    /// Reads `from` until it was not changed meanwhile: `version` gives the version,
    /// which is odd during a change, `fields` all other fields.
    pub fn consistent(version: impl Fn() -> u32, fields: impl Fn() -> Self) -> Self {
        let mut c = Self::default();
        // The writer is the host, between two entries: it is never long away.
        for _ in 0..1000 {
            let before = version();
            core::sync::atomic::fence(Acquire);
            c = Self {
                version: before,
                ..fields()
            };
            core::sync::atomic::fence(Acquire);
            if before & 1 == 0 && version() == before {
                break;
            }
            core::hint::spin_loop();
        }
        c
    }

    /// The parameters that the module keeps in the page that it shares.
    #[must_use]
    pub fn of_page(p: &VmPage) -> Self {
        Self::consistent(
            || p.time_version.load(Relaxed),
            || Self {
                version: 0,
                tsc_timestamp: p.tsc_timestamp.load(Relaxed),
                system_time: p.system_time.load(Relaxed),
                mul: p.tsc_mul.load(Relaxed),
                shift: p.tsc_shift.load(Relaxed),
                flags: p.time_flags.load(Relaxed),
            },
        )
    }

    /// The TSC value at which system time is `ns`, at least `now`.
    #[must_use]
    #[allow(
        clippy::cast_possible_truncation,
        reason = "saturated before it is cut"
    )]
    pub fn tsc_at(&self, ns: u64, now: u64) -> u64 {
        let delta = u128::from(ns.saturating_sub(self.system_time)) << 32;
        let ticks = delta.div_ceil(u128::from(self.mul.max(1)));
        let ticks = if self.shift >= 0 {
            ticks >> (self.shift.unsigned_abs() & 31)
        } else {
            ticks << (self.shift.unsigned_abs() & 31)
        };
        // One more: rounding must not make the time come early.
        let ticks = ticks.min(u128::from(u64::MAX >> 1)) as u64 + 1;
        self.tsc_timestamp.saturating_add(ticks).max(now)
    }

    /// System time at `tsc`, ns.
    #[must_use]
    #[allow(
        clippy::cast_possible_truncation,
        reason = "64 bits of ns last 584 years"
    )]
    pub fn at(&self, tsc: u64) -> u64 {
        let delta = tsc.wrapping_sub(self.tsc_timestamp);
        // A TSC that is slightly behind the timestamp (another CPU's) counts as equal.
        let delta = if delta >> 63 != 0 { 0 } else { delta };
        let delta = if self.shift >= 0 {
            delta << (self.shift.unsigned_abs() & 31)
        } else {
            delta >> (self.shift.unsigned_abs() & 31)
        };
        self.system_time
            .wrapping_add(((u128::from(delta) * u128::from(self.mul)) >> 32) as u64)
    }
}

impl<M: Machine> Context<'_, M> {
    /// The time parameters as the guest has them.
    pub(crate) fn clock(&self) -> Clock {
        let clock = self.m.clock();
        let offset = self.vm.time_offset.load(Relaxed);
        Clock {
            system_time: clock.system_time.wrapping_add(offset),
            ..clock
        }
    }

    /// System time now, ns.
    #[must_use]
    pub fn now(&self) -> u64 {
        self.clock().at(self.m.tsc())
    }

    /// Writes the time parameters to the guest if they changed.
    pub fn publish_time(&mut self) {
        if self.m.clock().version != self.v.time_seen {
            self.publish_time_now();
            if self.v.id == 0 {
                self.publish_wall_clock();
            }
        }
    }

    /// Writes the time parameters to the guest.
    pub fn publish_time_now(&mut self) {
        let clock = self.clock();
        self.v.time_seen = clock.version;
        if let Some(Place { gfn, offset }) = self.v.info {
            self.write_time(gfn, offset + vcpu_info::TIME, &clock);
        }
        if let Some(Place { gfn, offset }) = self.v.time_area {
            self.write_time(gfn, offset, &clock);
        }
    }

    fn write_time(&self, gfn: Gfn, offset: u64, c: &Clock) {
        let word = |i: u64| self.word(gfn, offset + 8 * i);
        let (Some(version), Some(tsc), Some(time), Some(scale)) =
            (word(0), word(1), word(2), word(3))
        else {
            return;
        };
        // Odd while it changes; the guest rereads (public/xen.h, vcpu_time_info).
        let odd = version.load(Relaxed) & 0xffff_ffff | 1;
        version.store(odd, SeqCst);
        tsc.store(c.tsc_timestamp, Release);
        time.store(c.system_time, Release);
        let shift = u64::from(c.shift.cast_unsigned());
        scale.store(
            u64::from(c.mul) | shift << 32 | u64::from(c.flags) << 40,
            Release,
        );
        version.store((odd + 1) & 0xffff_ffff, SeqCst);
    }

    /// Writes the wall clock to shared info.
    pub fn publish_wall_clock(&mut self) {
        let shared = Gfn(self.vm.boot.shared_info);
        if self.need_frame(shared).is_err() {
            return;
        }
        // The wall clock when the guest's system time was 0.
        let (sec, nsec) = self.m.wall_clock();
        let offset = self.vm.time_offset.load(Relaxed).cast_signed();
        let host = i128::from(sec) * 1_000_000_000 + i128::from(nsec);
        let at_zero = u128::try_from(host - i128::from(offset)).unwrap_or(0);
        let part = |ns: u128| u64::try_from(ns).unwrap_or(0);
        let (sec, nsec) = (part(at_zero / 1_000_000_000), part(at_zero % 1_000_000_000));
        // Words: {wc_version, wc_sec}, {wc_nsec, wc_sec_hi}.
        let (Some(a), Some(b)) = (
            self.word(shared, shared_info::WC_VERSION),
            self.word(shared, shared_info::WC_NSEC),
        ) else {
            return;
        };
        let odd = a.load(Relaxed) & 0xffff_ffff | 1;
        a.store(odd | sec << 32, SeqCst);
        b.store(nsec | sec >> 32 << 32, SeqCst);
        a.store((odd + 1) & 0xffff_ffff | sec << 32, SeqCst);
    }

    /// Raises the timers that are due and tells the host when to come back.
    pub fn run_timers(&mut self) {
        let first = self.next_deadline();
        if first != NEVER {
            let now = self.now();
            let mut due = false;
            if self.v.singleshot <= now {
                self.v.singleshot = NEVER;
                due = true;
            }
            if self.v.periodic <= now {
                self.v.periodic = now.saturating_add(self.v.period);
                due = true;
            }
            if due {
                self.raise_own_virq(virq::TIMER);
            }
            self.release_self_ipi(now);
        }
        self.arm();
    }

    /// The next time at which this vCPU has something to do; [`NEVER`] if none.
    fn next_deadline(&self) -> u64 {
        self.v
            .singleshot
            .min(self.v.periodic)
            .min(self.v.poll_until)
            .min(self.v.held_ipi.map_or(NEVER, |(_, at)| at))
    }

    /// Gives the host this vCPU's next deadline. The module arms its timer at each
    /// entry, so the world is left only for a deadline earlier than the armed one.
    pub fn arm(&mut self) {
        let sw = self.m.switch();
        let offset = self.vm.time_offset.load(Relaxed);
        // The host counts in its own time.
        let first = match self.next_deadline() {
            NEVER => NEVER,
            first if offset.cast_signed() < 0 => first.saturating_add(offset.wrapping_neg()),
            first => first.saturating_sub(offset),
        };
        sw.deadline.store(first, Release);
        if first == NEVER {
            return;
        }
        let armed = sw.armed.load(Acquire);
        // An armed time that has passed has fired: it arms nothing any more.
        if first < armed || armed <= self.m.clock().at(self.m.tsc()) {
            self.exit(exit::DEADLINE, [0; 4]);
        }
    }

    // ---- run-state ----

    /// Enters a run-state and publishes it.
    pub fn set_runstate(&mut self, state: u32) {
        let now = self.now();
        let old = self.v.runstate as usize & 3;
        self.v.runstate_time[old] += now.saturating_sub(self.v.runstate_since);
        self.v.runstate = state;
        self.v.runstate_since = now;
        self.publish_runstate();
    }

    /// Writes the run-state area, marking the update for guests that asked for it.
    pub fn publish_runstate(&mut self) {
        let Some((Place { gfn, offset }, next)) = self.v.runstate_area else {
            return;
        };
        let words = self.runstate_words();
        let mark = self.vm.runstate_flag.load(Relaxed);
        let word = |i: u64| {
            let at = offset + 8 * i;
            self.word(if at < 4096 { gfn } else { next }, at & 0xfff)
        };
        let Some(since) = word(1) else { return };
        if mark {
            since.store(words[1] | runstate::UPDATE, SeqCst);
        }
        for (i, w) in [
            (0, words[0]),
            (2, words[2]),
            (3, words[3]),
            (4, words[4]),
            (5, words[5]),
        ] {
            if let Some(cell) = word(i) {
                cell.store(w, Release);
            }
        }
        since.store(words[1], SeqCst);
    }

    /// `struct vcpu_runstate_info` as words.
    #[must_use]
    pub fn runstate_words(&self) -> [u64; 6] {
        let t = self.v.runstate_time;
        [
            u64::from(self.v.runstate),
            self.v.runstate_since,
            t[0],
            t[1],
            t[2],
            t[3],
        ]
    }

    /// Where a run-state area at `va` is.
    ///
    /// # Errors
    /// EINVAL, EFAULT.
    pub fn runstate_place(&mut self, va: Va) -> Result<(Place, Gfn), i64> {
        let first = self.place(va, 8)?;
        let last = self.place(Va(va.0.wrapping_add(runstate::SIZE - 8)), 8)?;
        Ok((first, last.gfn))
    }
}
