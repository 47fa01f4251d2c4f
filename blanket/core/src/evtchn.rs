//! The domain's event channel ports, 2-level ABI (`public/event_channel.h`,
//! `xen/common/event_channel.c`, `xen/common/event_2l.c`).
//!
//! One atomic word per port says what it is bound to, so notifying takes no lock:
//! [`Ports::send`], the `raise` functions and [`Ports::unmask`] may run on any vCPU
//! at any time. Everything that changes a binding is serialised by the caller. The
//! pending and mask bits live in memory that the guest shares and are reached
//! through [`SharedBits`].
//!
//! A sender that read a port just before it was closed may still set its pending
//! bit. Allocating a port clears the bit, so the new owner sees a stray event only
//! if the sender lost its CPU for that whole time; guests must bear stray events
//! in any case.

use blanket_abi::layout::MAX_VCPUS;
use blanket_abi::xen::errno::{EEXIST, EINVAL, ENOENT, ENOSPC, EPERM, ESRCH};
use blanket_abi::xen::event::{PORTS, status, virq};
use blanket_abi::xen::{domid, event};
use core::fmt;
use core::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};

/// The bits in shared_info and vcpu_info.
///
/// The guest changes them at the same time with locked instructions, and no
/// notification is lost only if each function here is one sequentially
/// consistent atomic operation (on x86 a locked one, or a plain load). Ports are
/// 1 to 4095, words 0 to 63, and vCPUs below the domain's number.
pub trait SharedBits {
    /// Sets the port's bit in `evtchn_pending`; whether it was set before.
    fn test_and_set_pending(&self, port: u32) -> bool;
    /// The port's bit in `evtchn_pending`.
    fn is_pending(&self, port: u32) -> bool;
    /// Clears the port's bit in `evtchn_pending`.
    fn clear_pending(&self, port: u32);
    /// The port's bit in `evtchn_mask`.
    fn is_masked(&self, port: u32) -> bool;
    /// Sets the port's bit in `evtchn_mask`.
    fn set_mask(&self, port: u32);
    /// Clears the port's bit in `evtchn_mask`.
    fn clear_mask(&self, port: u32);
    /// Sets bit `word` of the vCPU's `evtchn_pending_sel` and then its
    /// `evtchn_upcall_pending`; whether the selector bit was set before.
    fn test_and_set_selector(&self, vcpu: u32, word: u32) -> bool;
}

/// What a port is bound to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Binding {
    /// Free.
    Closed,
    /// Waits for a domain to connect.
    Unbound {
        /// The domain that may.
        remote: u16,
    },
    /// Connected: to the backend ([`domid::BACKEND`]) or to another port of the
    /// domain itself ([`domid::GUEST`]).
    Interdomain {
        /// The other domain.
        remote: u16,
        /// The other end's port. A backend's port has the number of the guest's.
        port: u32,
    },
    /// A virtual interrupt.
    Virq(u32),
    /// Between vCPUs.
    Ipi,
}

/// A port: its binding and the vCPU that its events go to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Port {
    /// What it is bound to.
    pub binding: Binding,
    /// The vCPU that is notified.
    pub vcpu: u32,
}

impl Port {
    const CLOSED: Self = Self {
        binding: Binding::Closed,
        vcpu: 0,
    };

    /// Bits 0 to 7 status (`EVTCHNSTAT_*`), 8 to 15 vCPU, 16 to 31 remote domain,
    /// 32 to 63 remote port or VIRQ. A free port is 0.
    #[inline]
    const fn encode(self) -> u64 {
        let (status, dom, data) = match self.binding {
            Binding::Closed => return 0,
            Binding::Unbound { remote } => (status::UNBOUND, remote, 0),
            Binding::Interdomain { remote, port } => (status::INTERDOMAIN, remote, port),
            Binding::Virq(n) => (status::VIRQ, 0, n),
            Binding::Ipi => (status::IPI, 0, 0),
        };
        status as u64 | (self.vcpu as u64 & 0xff) << 8 | (dom as u64) << 16 | (data as u64) << 32
    }

    #[inline]
    #[allow(
        clippy::cast_possible_truncation,
        reason = "fields are cut out of the word"
    )]
    const fn decode(word: u64) -> Self {
        let remote = (word >> 16) as u16;
        let data = (word >> 32) as u32;
        let binding = match (word & 0xff) as u32 {
            status::UNBOUND => Binding::Unbound { remote },
            status::INTERDOMAIN => Binding::Interdomain { remote, port: data },
            status::VIRQ => Binding::Virq(data),
            status::IPI => Binding::Ipi,
            _ => return Self::CLOSED,
        };
        Self {
            binding,
            vcpu: (word >> 8 & 0xff) as u32,
        }
    }
}

/// What is left to do after a successful [`Ports::send`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Nothing: it was pending already, is masked, or nobody listens.
    Done,
    /// Make this vCPU look at its events.
    Kick(u32),
    /// Notify the backend of this port.
    Backend(u32),
}

/// Whether each vCPU has a VIRQ of its own with this number.
#[inline]
const fn per_vcpu(virq: u32) -> bool {
    matches!(
        virq,
        virq::TIMER | virq::DEBUG | virq::XENOPROF | virq::XENPMU
    )
}

const VCPUS: usize = MAX_VCPUS as usize;
const VIRQS: usize = virq::COUNT as usize;
// The vCPU field of a port has eight bits.
const _: () = assert!(VCPUS <= 256);

/// The port table of a domain. All zero is its initial state.
pub struct Ports {
    entries: [AtomicU64; PORTS as usize],
    /// Port of each VIRQ of each vCPU, 0 = not bound; global VIRQs under vCPU 0.
    virqs: [[AtomicU16; VIRQS]; VCPUS],
    /// No port below this one is free.
    first_free: AtomicU32,
    /// The domain's number of vCPUs, less one.
    last_vcpu: AtomicU32,
}

impl fmt::Debug for Ports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bound = (1..PORTS)
            .map(|n| (n, self.port(n)))
            .filter(|(_, port)| port.binding != Binding::Closed);
        f.debug_map().entries(bound).finish()
    }
}

impl Default for Ports {
    fn default() -> Self {
        Self::new()
    }
}

impl Ports {
    /// No port bound, one vCPU.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            entries: [const { AtomicU64::new(0) }; PORTS as usize],
            virqs: [const { [const { AtomicU16::new(0) }; VIRQS] }; VCPUS],
            first_free: AtomicU32::new(0),
            last_vcpu: AtomicU32::new(0),
        }
    }

    /// Sets the domain's number of vCPUs (1 to [`MAX_VCPUS`]), before it starts.
    pub fn set_vcpus(&self, count: u32) {
        self.last_vcpu
            .store(count.clamp(1, MAX_VCPUS) - 1, Ordering::Relaxed);
    }

    /// What a port is bound to; closed for a number that is no port.
    #[must_use]
    #[inline]
    pub fn port(&self, port: u32) -> Port {
        Port::decode(self.word(port))
    }

    #[inline]
    fn word(&self, port: u32) -> u64 {
        self.entries
            .get(port as usize)
            .map_or(0, |e| e.load(Ordering::Acquire))
    }

    #[inline]
    fn set(&self, port: u32, value: Port) {
        if let Some(entry) = self.entries.get(port as usize) {
            entry.store(value.encode(), Ordering::Release);
        }
    }

    #[inline]
    fn check_vcpu(&self, vcpu: u32) -> Result<(), i64> {
        if vcpu > self.last_vcpu.load(Ordering::Relaxed) {
            Err(ENOENT)
        } else {
            Ok(())
        }
    }

    /// Binds the lowest free port.
    fn allocate(&self, value: Port, bits: &impl SharedBits) -> Result<u32, i64> {
        let first = self.first_free.load(Ordering::Relaxed).max(1);
        for port in first..PORTS {
            if self.word(port) == 0 {
                // The port may carry a stray event for its last owner.
                bits.clear_pending(port);
                self.set(port, value);
                self.first_free.store(port + 1, Ordering::Relaxed);
                return Ok(port);
            }
        }
        self.first_free.store(PORTS, Ordering::Relaxed);
        Err(ENOSPC)
    }

    fn virq_slot(&self, virq: u32, vcpu: u32) -> Option<&AtomicU16> {
        let vcpu = if per_vcpu(virq) { vcpu } else { 0 };
        self.virqs.get(vcpu as usize)?.get(virq as usize)
    }

    /// `EVTCHNOP_bind_virq`. Like Xen, a global VIRQ is bound to vCPU 0 and can be
    /// moved afterwards.
    ///
    /// # Errors
    /// EINVAL for a number that is no VIRQ, and a global one not for vCPU 0; ENOENT
    /// without such a vCPU; EEXIST if it is bound; ENOSPC without a free port.
    pub fn bind_virq(&self, virq: u32, vcpu: u32, bits: &impl SharedBits) -> Result<u32, i64> {
        if virq >= virq::COUNT || !per_vcpu(virq) && vcpu != 0 {
            return Err(EINVAL);
        }
        self.check_vcpu(vcpu)?;
        let slot = self.virq_slot(virq, vcpu).ok_or(ENOENT)?;
        if slot.load(Ordering::Relaxed) != 0 {
            return Err(EEXIST);
        }
        let port = self.allocate(
            Port {
                binding: Binding::Virq(virq),
                vcpu,
            },
            bits,
        )?;
        slot.store(u16::try_from(port).map_err(|_| ENOSPC)?, Ordering::Release);
        Ok(port)
    }

    /// `EVTCHNOP_bind_ipi`.
    ///
    /// # Errors
    /// ENOENT without such a vCPU, ENOSPC without a free port.
    pub fn bind_ipi(&self, vcpu: u32, bits: &impl SharedBits) -> Result<u32, i64> {
        self.check_vcpu(vcpu)?;
        self.allocate(
            Port {
                binding: Binding::Ipi,
                vcpu,
            },
            bits,
        )
    }

    /// `EVTCHNOP_alloc_unbound`: a port of domain `dom` to which `remote` may
    /// connect. As in Xen, `remote` need not exist. The backend connects at once: it
    /// hears the guest from the first notification on, and needs no call of its own.
    ///
    /// # Errors
    /// EPERM if `dom` is the backend, ESRCH if it does not exist, ENOSPC without a
    /// free port.
    pub fn alloc_unbound(&self, dom: u16, remote: u16, bits: &impl SharedBits) -> Result<u32, i64> {
        own(dom)?;
        let remote = if remote == domid::SELF {
            domid::GUEST
        } else {
            remote
        };
        let unbound = Port {
            binding: Binding::Unbound { remote },
            vcpu: 0,
        };
        let port = self.allocate(unbound, bits)?;
        if remote == domid::BACKEND {
            let binding = Binding::Interdomain { remote, port };
            self.set(port, Port { binding, vcpu: 0 });
        }
        Ok(port)
    }

    /// `EVTCHNOP_bind_interdomain`: connects a new port to `remote_port` of
    /// `remote`, which must wait for this domain. Only ports of the domain itself
    /// can: the backend connects to the guest and never waits. The new port is
    /// pending at once, since the other may have been notified while it was
    /// unbound. Returns it and the vCPU to kick.
    ///
    /// # Errors
    /// ESRCH without such a domain, ENOSPC without a free port, EINVAL if the remote
    /// port does not wait for this domain.
    pub fn bind_interdomain(
        &self,
        remote: u16,
        remote_port: u32,
        bits: &impl SharedBits,
    ) -> Result<(u32, Option<u32>), i64> {
        match own(remote) {
            Ok(()) => {}
            Err(EPERM) => return Err(EINVAL),
            Err(e) => return Err(e),
        }
        let other = self.port(remote_port);
        if other.binding
            != (Binding::Unbound {
                remote: domid::GUEST,
            })
        {
            return Err(EINVAL);
        }
        let binding = Binding::Interdomain {
            remote: domid::GUEST,
            port: remote_port,
        };
        let port = self.allocate(Port { binding, vcpu: 0 }, bits)?;
        self.set(
            remote_port,
            Port {
                binding: Binding::Interdomain {
                    remote: domid::GUEST,
                    port,
                },
                ..other
            },
        );
        Ok((port, notify(port, 0, bits)))
    }

    /// Binds a given free port to `remote` before the domain starts, for the rings
    /// that start_info names.
    ///
    /// # Errors
    /// EINVAL for a number that is no port, EEXIST if the port is bound.
    pub fn reserve_static(&self, port: u32, remote: u16) -> Result<(), i64> {
        if port == 0 || port >= PORTS {
            return Err(EINVAL);
        }
        if self.word(port) != 0 {
            return Err(EEXIST);
        }
        self.set(
            port,
            Port {
                binding: Binding::Interdomain { remote, port },
                vcpu: 0,
            },
        );
        Ok(())
    }

    /// The word that says what a port is bound to, for [`Self::restore`].
    #[must_use]
    pub fn word_of(&self, port: u32) -> u64 {
        self.word(port)
    }

    /// Binds a port as a word of [`Self::word_of`] says. Whether ports of the domain
    /// that are connected to each other fit is for [`Self::is_paired`] to say, when all
    /// are bound.
    ///
    /// # Errors
    /// EINVAL for a word that no port has, ENOENT for a vCPU that the domain has not,
    /// EEXIST if the port, or its VIRQ, is bound.
    pub fn restore(&self, port: u32, word: u64) -> Result<(), i64> {
        let value = Port::decode(word);
        if port == 0 || port >= PORTS || value.encode() != word || word == 0 {
            return Err(EINVAL);
        }
        if self.word(port) != 0 {
            return Err(EEXIST);
        }
        self.check_vcpu(value.vcpu)?;
        match value.binding {
            Binding::Virq(virq) => {
                if virq >= virq::COUNT {
                    return Err(EINVAL);
                }
                let slot = self.virq_slot(virq, value.vcpu).ok_or(ENOENT)?;
                if slot.load(Ordering::Relaxed) != 0 {
                    return Err(EEXIST);
                }
                slot.store(u16::try_from(port).map_err(|_| EINVAL)?, Ordering::Release);
            }
            // A backend's port has the number of the guest's.
            Binding::Interdomain {
                remote,
                port: other,
            } if remote == domid::BACKEND && other != port => {
                return Err(EINVAL);
            }
            Binding::Interdomain { remote, .. }
                if remote != domid::BACKEND && remote != domid::GUEST =>
            {
                return Err(EINVAL);
            }
            _ => {}
        }
        self.set(port, value);
        Ok(())
    }

    /// Whether a port that is connected to another one of the domain is the one that
    /// this is connected to; true for all other ports.
    #[must_use]
    pub fn is_paired(&self, port: u32) -> bool {
        match self.port(port).binding {
            Binding::Interdomain {
                remote,
                port: other,
            } if remote == domid::GUEST => {
                self.port(other).binding == Binding::Interdomain { remote, port }
            }
            _ => true,
        }
    }

    /// `EVTCHNOP_close`. Returns what the port was bound to; if that was the
    /// backend, the backend's end is closed with it.
    ///
    /// # Errors
    /// EINVAL if the port is not bound.
    pub fn close(&self, port: u32, bits: &impl SharedBits) -> Result<Port, i64> {
        let old = self.port(port);
        match old.binding {
            Binding::Closed => return Err(EINVAL),
            Binding::Virq(virq) => {
                if let Some(slot) = self.virq_slot(virq, old.vcpu) {
                    slot.store(0, Ordering::Release);
                }
            }
            Binding::Interdomain {
                remote: domid::GUEST,
                port: other,
            } if other != port => {
                let peer = self.port(other);
                let unbound = Binding::Unbound {
                    remote: domid::GUEST,
                };
                self.set(
                    other,
                    Port {
                        binding: unbound,
                        ..peer
                    },
                );
            }
            _ => {}
        }
        self.set(port, Port::CLOSED);
        bits.clear_pending(port);
        self.first_free.fetch_min(port, Ordering::Relaxed);
        Ok(old)
    }

    /// `EVTCHNOP_reset`: closes every port of domain `dom`.
    ///
    /// # Errors
    /// EPERM or ESRCH if that is not this domain.
    pub fn reset(&self, dom: u16, bits: &impl SharedBits) -> Result<(), i64> {
        own(dom)?;
        for port in 1..PORTS {
            if self.word(port) != 0 {
                self.close(port, bits)?;
            }
        }
        Ok(())
    }

    /// `EVTCHNOP_send`.
    ///
    /// # Errors
    /// EINVAL for a port that cannot be sent on: closed, or bound to a VIRQ. An
    /// unbound port takes it in silence.
    #[inline]
    pub fn send(&self, port: u32, bits: &impl SharedBits) -> Result<Outcome, i64> {
        let from = self.port(port);
        let kick = match from.binding {
            Binding::Interdomain {
                remote: domid::GUEST,
                port: other,
            } => {
                let to = self.port(other);
                match to.binding {
                    Binding::Interdomain { port: back, .. } if back == port => {
                        notify(other, to.vcpu, bits)
                    }
                    // The other end is being closed.
                    _ => None,
                }
            }
            Binding::Interdomain { port, .. } => return Ok(Outcome::Backend(port)),
            Binding::Ipi => notify(port, from.vcpu, bits),
            Binding::Unbound { .. } => None,
            Binding::Closed | Binding::Virq(_) => return Err(EINVAL),
        };
        Ok(kick.map_or(Outcome::Done, Outcome::Kick))
    }

    /// The backend notifies a port. Returns the vCPU to kick; nothing happens unless
    /// the port is connected to the backend.
    #[inline]
    pub fn raise_from_backend(&self, port: u32, bits: &impl SharedBits) -> Option<u32> {
        let to = self.port(port);
        match to.binding {
            Binding::Interdomain {
                remote: domid::BACKEND,
                ..
            } => notify(port, to.vcpu, bits),
            _ => None,
        }
    }

    /// Raises a VIRQ; `vcpu` counts only for one that each vCPU has. Returns the
    /// vCPU to kick; nothing happens unless it is bound.
    #[inline]
    pub fn raise_virq(&self, virq: u32, vcpu: u32, bits: &impl SharedBits) -> Option<u32> {
        let port = u32::from(self.virq_slot(virq, vcpu)?.load(Ordering::Acquire));
        let to = self.port(port);
        // Not while the port is being closed or opened again.
        if to.binding == Binding::Virq(virq) {
            notify(port, to.vcpu, bits)
        } else {
            None
        }
    }

    /// `EVTCHNOP_unmask`. Returns the vCPU to kick if the port is pending.
    ///
    /// # Errors
    /// EINVAL for a number that is no port.
    #[inline]
    pub fn unmask(&self, port: u32, bits: &impl SharedBits) -> Result<Option<u32>, i64> {
        if port == 0 || port >= PORTS {
            return Err(EINVAL);
        }
        let vcpu = self.port(port).vcpu;
        bits.clear_mask(port);
        Ok((bits.is_pending(port) && !bits.test_and_set_selector(vcpu, port / 64)).then_some(vcpu))
    }

    /// `EVTCHNOP_bind_vcpu`: moves a port's events to another vCPU. What is already
    /// pending stays with the old one; the guest unmasks the port after the call to
    /// have it looked at again.
    ///
    /// # Errors
    /// ENOENT without such a vCPU, EINVAL for a port that is closed or bound to its
    /// vCPU for good (IPIs and per-vCPU VIRQs).
    pub fn bind_vcpu(&self, port: u32, vcpu: u32) -> Result<(), i64> {
        self.check_vcpu(vcpu)?;
        let old = self.port(port);
        match old.binding {
            Binding::Unbound { .. } | Binding::Interdomain { .. } => {}
            Binding::Virq(virq) if !per_vcpu(virq) => {}
            _ => return Err(EINVAL),
        }
        self.set(port, Port { vcpu, ..old });
        Ok(())
    }

    /// `EVTCHNOP_status`: the words at offsets 8, 12, 16 and 20 of
    /// `struct evtchn_status`: status, vCPU and two that depend on the status
    /// (unbound: domain; interdomain: domain, port; VIRQ: number).
    ///
    /// # Errors
    /// EPERM or ESRCH if `dom` is not this domain, EINVAL for a number that is no
    /// port.
    pub fn status(&self, dom: u16, port: u32) -> Result<[u32; 4], i64> {
        own(dom)?;
        if port >= event::PORTS {
            return Err(EINVAL);
        }
        let Port { binding, vcpu } = self.port(port);
        Ok(match binding {
            Binding::Closed => [status::CLOSED, vcpu, 0, 0],
            Binding::Unbound { remote } => [status::UNBOUND, vcpu, u32::from(remote), 0],
            Binding::Interdomain { remote, port } => {
                [status::INTERDOMAIN, vcpu, u32::from(remote), port]
            }
            Binding::Virq(virq) => [status::VIRQ, vcpu, virq, 0],
            Binding::Ipi => [status::IPI, vcpu, 0, 0],
        })
    }
}

/// Whether a domain id in an operand names the caller.
#[inline]
const fn own(dom: u16) -> Result<(), i64> {
    match dom {
        domid::SELF | domid::GUEST => Ok(()),
        domid::BACKEND => Err(EPERM),
        _ => Err(ESRCH),
    }
}

/// Makes a port pending: the pending bit; unless it is masked the selector bit;
/// with that the vCPU's upcall flag. Each step only if the one before was the
/// first of its kind. Returns the vCPU to kick.
#[inline]
fn notify(port: u32, vcpu: u32, bits: &impl SharedBits) -> Option<u32> {
    if bits.test_and_set_pending(port)
        || bits.is_masked(port)
        || bits.test_and_set_selector(vcpu, port / 64)
    {
        return None;
    }
    Some(vcpu)
}
