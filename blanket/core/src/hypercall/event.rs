//! event_channel_op and grant_table_op (`public/event_channel.h`,
//! `public/grant_table.h`).

use super::super::context::{Context, Hyper};
use crate::evtchn::{Binding, Outcome, SharedBits};
use crate::grant::{GrantTable, Refusal};
use crate::machine::Machine;
use crate::vm::Vm;
use blanket_abi::device::exit;
use blanket_abi::xen::errno;
use blanket_abi::xen::event::op;
use blanket_abi::xen::grant::op as grant;
use blanket_abi::xen::shared::{shared_info, vcpu_info};
use blanket_abi::{Gfn, Va};
use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::{Acquire, Relaxed, SeqCst};

/// IPIs of a vCPU to itself, while what they interrupt gets nowhere, after which
/// the next one is held back.
const SELF_IPI_ROW: u32 = 16;
/// A pause that ends a row, ns.
const SELF_IPI_PAUSE_NS: u64 = 10_000_000;
/// How long an IPI is held back, ns, and how often that is doubled while nothing
/// else runs: on a slow or busy host the handler alone may take longer.
const SELF_IPI_NS: u64 = 100_000;
const SELF_IPI_DOUBLINGS: u32 = 6;

/// Operands that one grant_table_op may have.
const OPERANDS_MAX: u64 = 512;

/// The event bits in shared info and in the vcpu_infos.
pub struct Bits<'a, M> {
    m: &'a M,
    vm: &'a Vm,
}

impl<M: Machine> Bits<'_, M> {
    fn shared(&self, array: u64, port: u32) -> Option<(&AtomicU64, u64)> {
        let words = self.m.frame(Gfn(self.vm.boot.shared_info))?;
        let word = words.get(crate::idx(array) / 8 + port as usize / 64)?;
        Some((word, 1 << (port % 64)))
    }
}

impl<M: Machine> SharedBits for Bits<'_, M> {
    fn test_and_set_pending(&self, port: u32) -> bool {
        self.shared(shared_info::EVTCHN_PENDING, port)
            .is_none_or(|(w, bit)| w.fetch_or(bit, SeqCst) & bit != 0)
    }
    fn is_pending(&self, port: u32) -> bool {
        self.shared(shared_info::EVTCHN_PENDING, port)
            .is_some_and(|(w, bit)| w.load(SeqCst) & bit != 0)
    }
    fn clear_pending(&self, port: u32) {
        if let Some((w, bit)) = self.shared(shared_info::EVTCHN_PENDING, port) {
            w.fetch_and(!bit, SeqCst);
        }
    }
    fn is_masked(&self, port: u32) -> bool {
        self.shared(shared_info::EVTCHN_MASK, port)
            .is_none_or(|(w, bit)| w.load(SeqCst) & bit != 0)
    }
    fn set_mask(&self, port: u32) {
        if let Some((w, bit)) = self.shared(shared_info::EVTCHN_MASK, port) {
            w.fetch_or(bit, SeqCst);
        }
    }
    fn clear_mask(&self, port: u32) {
        if let Some((w, bit)) = self.shared(shared_info::EVTCHN_MASK, port) {
            w.fetch_and(!bit, SeqCst);
        }
    }
    fn test_and_set_selector(&self, vcpu: u32, word: u32) -> bool {
        let Some(place) = self.vm.infos.get(vcpu as usize).map(|p| p.load(Acquire)) else {
            return true;
        };
        let (gfn, offset) = (Gfn::containing(place), place & 0xfff);
        let Some(words) = (place != 0 && gfn.0 < self.vm.nr_frames)
            .then(|| self.m.frame(gfn))
            .flatten()
        else {
            return true;
        };
        let at = |field: u64| words.get(crate::idx(offset + field) / 8);
        let (Some(sel), Some(pending)) = (at(vcpu_info::PENDING_SEL), at(vcpu_info::PENDING))
        else {
            return true;
        };
        let bit = 1 << (word % 64);
        let before = sel.fetch_or(bit, SeqCst) & bit != 0;
        pending.fetch_or(1, SeqCst);
        before
    }
}

impl<M: Machine> Context<'_, M> {
    /// The event bits.
    #[must_use]
    pub fn bits(&self) -> Bits<'_, M> {
        Bits {
            m: self.m,
            vm: self.vm,
        }
    }

    /// Word `w` of the pending array.
    #[must_use]
    pub fn pending_ports(&self, w: usize) -> u64 {
        self.m
            .frame(Gfn(self.vm.boot.shared_info))
            .and_then(|words| words.get(crate::idx(shared_info::EVTCHN_PENDING) / 8 + w))
            .map_or(0, |w| w.load(SeqCst))
    }

    /// Raises a VIRQ of this vCPU.
    pub fn raise_own_virq(&mut self, virq: u32) {
        let _kick = self.vm.ports.raise_virq(virq, self.v.id, &self.bits());
    }

    /// Whether an IPI of this vCPU to itself is held back for a moment.
    ///
    /// An IPI through a real APIC arrives some instructions later; an event is
    /// there at once. Linux with PREEMPT_RT depends on the difference: its RCU
    /// sends itself an irq_work from the very upcall that handles the last one, and
    /// would never come to run anything else (mended in Linux 6.16, "rcu: Fix
    /// rcu_read_unlock() deadloop due to IRQ work"). After a row of such sends the
    /// next one is late. What makes a row is that nothing else runs in between, not
    /// how fast they follow each other: that is the host's load as well.
    fn hold_self_ipi(&mut self, port: u32) -> bool {
        let bound = self.vm.ports.port(port);
        if bound.binding != Binding::Ipi || bound.vcpu != self.v.id {
            return false;
        }
        if let Some((held, _)) = self.v.held_ipi {
            return held == port;
        }
        let now = self.now();
        let (last, row) = self.v.self_ipi;
        let row = if now.saturating_sub(last) < SELF_IPI_PAUSE_NS {
            row + 1
        } else {
            0
        };
        self.v.self_ipi = (now, row);
        let Some(over) = row.checked_sub(SELF_IPI_ROW) else {
            return false;
        };
        let wait = SELF_IPI_NS << over.min(SELF_IPI_DOUBLINGS);
        self.v.held_ipi = Some((port, now + wait));
        self.arm();
        true
    }

    /// An upcall begins: if it interrupts another place than the last one did, the
    /// vCPU has got on, and a row of its IPIs to itself counts less.
    pub(crate) fn note_upcall(&mut self) {
        let place = (self.f.rip, self.f.rsp);
        if place != self.v.upcall_place {
            self.v.upcall_place = place;
            self.v.self_ipi.1 /= 2;
        }
    }

    /// Sends the IPI that was held back, if its time has come.
    pub(crate) fn release_self_ipi(&mut self, now: u64) {
        if let Some((port, at)) = self.v.held_ipi
            && at <= now
        {
            self.v.held_ipi = None;
            // It was an IPI of our own when it was held; if it is closed now, the
            // guest does not want it any more.
            let _outcome = self.vm.ports.send(port, &self.bits());
        }
    }

    /// Tells the module which vCPU a port's notifications go to.
    pub(crate) fn publish_port(&self, port: u32) {
        if let Some(slot) = self.m.vm_page().port_vcpu.get(port as usize) {
            slot.store(self.vm.ports.port(port).vcpu.to_le_bytes()[0], Relaxed);
        }
    }

    /// Gives a new port to the guest at `to`. A port that the guest could not be
    /// told of is closed again: nothing else would ever close it.
    fn hand_out(&mut self, port: u32, to: u64) -> Hyper {
        self.publish_port(port);
        if let Err(error) = self.write_u32(to, port) {
            let _lock = self.vm.ports_lock.lock();
            self.vm.ports.close(port, &self.bits())?;
            return Err(error);
        }
        Ok(0)
    }

    fn notify(&mut self, vcpu: Option<u32>) {
        let polling = self.vm.polling.load(SeqCst);
        let mask = vcpu.map_or(0, |v| 1 << v) | polling;
        if mask != 0 {
            self.kick(mask);
        }
    }

    /// `event_channel_op(cmd, ptr)`.
    #[allow(
        clippy::cast_possible_truncation,
        reason = "fields are cut to their width"
    )]
    pub(super) fn event_channel_op(&mut self, cmd: u64, ptr: u64) -> Hyper {
        let vm = self.vm;
        let word = |c: &mut Self, i: u64| c.read_u32(ptr.wrapping_add(4 * i));
        match cmd {
            op::SEND => {
                let port = word(self, 0)?;
                if self.hold_self_ipi(port) {
                    return Ok(0);
                }
                match vm.ports.send(port, &self.bits())? {
                    Outcome::Done => self.notify(None),
                    Outcome::Kick(vcpu) => self.notify(Some(vcpu)),
                    Outcome::Backend(port) => {
                        self.exit(exit::SEND, [u64::from(port), 0, 0, 0]);
                    }
                }
                Ok(0)
            }
            op::UNMASK => {
                let port = word(self, 0)?;
                let kick = vm.ports.unmask(port, &self.bits())?;
                self.notify(kick);
                Ok(0)
            }
            op::BIND_VIRQ => {
                let (virq, vcpu) = (word(self, 0)?, word(self, 1)?);
                let port = {
                    let _lock = vm.ports_lock.lock();
                    vm.ports.bind_virq(virq, vcpu, &self.bits())?
                };
                self.hand_out(port, ptr.wrapping_add(8))
            }
            op::BIND_IPI => {
                let vcpu = word(self, 0)?;
                let port = {
                    let _lock = vm.ports_lock.lock();
                    vm.ports.bind_ipi(vcpu, &self.bits())?
                };
                self.hand_out(port, ptr.wrapping_add(4))
            }
            op::BIND_VCPU => {
                let (port, vcpu) = (word(self, 0)?, word(self, 1)?);
                {
                    let _lock = vm.ports_lock.lock();
                    vm.ports.bind_vcpu(port, vcpu)?;
                }
                self.publish_port(port);
                Ok(0)
            }
            op::ALLOC_UNBOUND => {
                let doms = word(self, 0)?;
                let port = {
                    let _lock = vm.ports_lock.lock();
                    vm.ports
                        .alloc_unbound(doms as u16, (doms >> 16) as u16, &self.bits())?
                };
                self.hand_out(port, ptr.wrapping_add(4))
            }
            op::BIND_INTERDOMAIN => {
                let (dom, remote) = (word(self, 0)?, word(self, 1)?);
                let (port, kick) = {
                    let _lock = vm.ports_lock.lock();
                    vm.ports
                        .bind_interdomain(dom as u16, remote, &self.bits())?
                };
                self.notify(kick);
                self.hand_out(port, ptr.wrapping_add(8))
            }
            op::CLOSE => {
                let port = word(self, 0)?;
                let _lock = vm.ports_lock.lock();
                vm.ports.close(port, &self.bits()).map(|_| 0)
            }
            op::RESET => {
                let dom = word(self, 0)?;
                let _lock = vm.ports_lock.lock();
                vm.ports.reset(dom as u16, &self.bits()).map(|()| 0)
            }
            op::STATUS => {
                let (dom, port) = (word(self, 0)?, word(self, 1)?);
                let out = vm.ports.status(dom as u16, port)?;
                for (i, w) in (2u64..).zip(out) {
                    self.write_u32(ptr.wrapping_add(4 * i), w)?;
                }
                Ok(0)
            }
            // BIND_PIRQ: a guest has no physical interrupts; the rest is the FIFO
            // ABI, whose absence makes Linux use this one.
            _ => Err(errno::ENOSYS),
        }
    }

    /// `grant_table_op(cmd, operands, count)`.
    #[allow(
        clippy::cast_possible_truncation,
        reason = "fields are cut to their width"
    )]
    pub(super) fn grant_table_op(&mut self, cmd: u64, list: u64, count: u64) -> Hyper {
        let vm = self.vm;
        // Linux passes one operand at a time; the bound is Xen's batch of maps.
        if count > OPERANDS_MAX {
            return Err(errno::EINVAL);
        }
        for i in 0..count {
            self.breathe(1);
            match cmd {
                grant::SETUP_TABLE => {
                    let at = list.wrapping_add(i * 24);
                    let [head, _, frames] = self.read_words::<3>(at)?;
                    let nr = (head >> 32) as u32;
                    let done = vm.grants.lock().setup(head as u16, nr);
                    if done.is_ok() {
                        for n in 0..nr {
                            self.breathe(1);
                            let gfn = vm.grants.lock().frame(n).ok_or(errno::EINVAL)?;
                            let to = frames.wrapping_add(u64::from(n) * 8);
                            self.write_words(to, [gfn.0])?;
                        }
                    }
                    self.put_status(at.wrapping_add(8), done.err())?;
                }
                grant::QUERY_SIZE => {
                    let at = list.wrapping_add(i * 16);
                    let dom = self.read_u32(at)? as u16;
                    let done = vm.grants.lock().query_size(dom);
                    if let Ok((now, max)) = done {
                        self.write_u32(at.wrapping_add(4), now)?;
                        self.write_u32(at.wrapping_add(8), max)?;
                    }
                    self.put_status(at.wrapping_add(12), done.err())?;
                }
                grant::SET_VERSION => {
                    let version = self.read_u32(list)?;
                    vm.grants.lock().set_version(version)?;
                    self.write_u32(list, crate::grant::VERSION)?;
                }
                grant::GET_VERSION => {
                    let dom = self.read_u32(list)? as u16;
                    let version = vm.grants.lock().get_version(dom)?;
                    self.write_u32(list.wrapping_add(4), version)?;
                }
                _ => match GrantTable::refuse(cmd) {
                    Refusal::Call(error) => return Err(error),
                    Refusal::Each {
                        size,
                        status_at,
                        status,
                    } => {
                        let at = list.wrapping_add(i * size).wrapping_add(status_at);
                        self.put_status(at, Some(status))?;
                    }
                },
            }
        }
        Ok(0)
    }

    fn put_status(&mut self, at: u64, status: Option<i16>) -> Result<(), i64> {
        let status = status.unwrap_or(blanket_abi::xen::grant::status::OKAY);
        self.copy_out(Va(at), &status.to_le_bytes())
    }
}
