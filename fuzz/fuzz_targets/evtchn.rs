//! Arbitrary sequences of event channel operations; the table must stay consistent
//! after each.
#![no_main]

use blanket_abi::xen::domid::{BACKEND, GUEST, SELF};
use blanket_abi::xen::event::PORTS;
use blanket_core::evtchn::{Binding, Outcome, Ports, SharedBits};
use libfuzzer_sys::{arbitrary::Arbitrary, fuzz_target};
use std::cell::Cell;
use std::collections::HashMap;

const VCPUS: u32 = 4;

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Op {
    BindVirq(u8, u8),
    BindIpi(u8),
    AllocUnbound(Dom, Dom),
    BindInterdomain(Dom, P),
    Reserve(P, Dom),
    Close(P),
    BindVcpu(P, u8),
    Send(P),
    Backend(P),
    Virq(u8, u8),
    Mask(P),
    Unmask(P),
    Status(Dom, P),
    Take(u8),
    Reset(Dom),
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Dom {
    Own,
    Guest,
    Backend,
    Other(u16),
}

impl Dom {
    fn id(self) -> u16 {
        match self {
            Self::Own => SELF,
            Self::Guest => GUEST,
            Self::Backend => BACKEND,
            Self::Other(id) => id,
        }
    }
}

/// A port number: nearly always a small one.
#[derive(Arbitrary, Clone, Copy, Debug)]
enum P {
    Small(u8),
    Any(u32),
}

impl P {
    fn nr(self) -> u32 {
        match self {
            Self::Small(n) => u32::from(n % 24),
            Self::Any(n) => n,
        }
    }
}

struct Bits {
    pending: Vec<Cell<bool>>,
    mask: Vec<Cell<bool>>,
    selector: Vec<Cell<u64>>,
}

impl Bits {
    fn at(list: &[Cell<bool>], port: u32) -> &Cell<bool> {
        assert!(port > 0 && port < PORTS, "port {port}");
        &list[port as usize]
    }
}

impl SharedBits for Bits {
    fn test_and_set_pending(&self, port: u32) -> bool {
        Self::at(&self.pending, port).replace(true)
    }
    fn is_pending(&self, port: u32) -> bool {
        Self::at(&self.pending, port).get()
    }
    fn clear_pending(&self, port: u32) {
        Self::at(&self.pending, port).set(false);
    }
    fn is_masked(&self, port: u32) -> bool {
        Self::at(&self.mask, port).get()
    }
    fn set_mask(&self, port: u32) {
        Self::at(&self.mask, port).set(true);
    }
    fn clear_mask(&self, port: u32) {
        Self::at(&self.mask, port).set(false);
    }
    fn test_and_set_selector(&self, vcpu: u32, word: u32) -> bool {
        assert!(vcpu < VCPUS && word < 64);
        let cell = &self.selector[vcpu as usize];
        let old = cell.replace(cell.get() | 1 << word);
        old >> word & 1 != 0
    }
}

fn consistent(ports: &Ports) {
    let mut virqs = HashMap::new();
    for n in 1..PORTS {
        let p = ports.port(n);
        assert!(p.vcpu < VCPUS);
        match p.binding {
            Binding::Interdomain {
                remote: GUEST,
                port,
            } if port != n => {
                let back = Binding::Interdomain {
                    remote: GUEST,
                    port: n,
                };
                assert_eq!(ports.port(port).binding, back, "both ends know each other");
            }
            Binding::Virq(v) => {
                let per_vcpu = [0, 1, 7, 13].contains(&v);
                let key = (v, if per_vcpu { p.vcpu } else { 0 });
                assert_eq!(virqs.insert(key, n), None, "bound twice");
            }
            _ => {}
        }
    }
}

fuzz_target!(|ops: Vec<Op>| {
    let ports = Ports::new();
    ports.set_vcpus(VCPUS);
    let bits = Bits {
        pending: vec![Cell::new(false); PORTS as usize],
        mask: vec![Cell::new(false); PORTS as usize],
        selector: vec![Cell::new(0); VCPUS as usize],
    };
    let b = &bits;
    let vcpu = |v: u8| u32::from(v % 6);
    let virq = |v: u8| u32::from(v % 26);
    let mut kick = None;
    for op in ops.into_iter().take(64) {
        match op {
            Op::BindVirq(q, v) => {
                let r = ports.bind_virq(virq(q), vcpu(v), b);
                assert!(r.is_err() || ports.port(r.unwrap()).binding == Binding::Virq(virq(q)));
            }
            Op::BindIpi(v) => {
                let r = ports.bind_ipi(vcpu(v), b);
                assert_eq!(r.is_ok(), vcpu(v) < VCPUS);
            }
            Op::AllocUnbound(d, r) => {
                let port = ports.alloc_unbound(d.id(), r.id(), b);
                assert_eq!(port.is_ok(), matches!(d.id(), SELF | GUEST));
                assert!(port.is_err() || !bits.is_pending(port.unwrap()), "clean");
            }
            Op::BindInterdomain(d, p) => {
                if let Ok((port, k)) = ports.bind_interdomain(d.id(), p.nr(), b) {
                    assert!(bits.is_pending(port));
                    kick = k;
                }
            }
            // Only the backend's ports are reserved; another would have no peer.
            Op::Reserve(p, d) if d.id() == BACKEND => {
                let free = ports.port(p.nr()).binding == Binding::Closed;
                let valid = p.nr() > 0 && p.nr() < PORTS;
                assert_eq!(ports.reserve_static(p.nr(), BACKEND).is_ok(), free && valid);
            }
            Op::Reserve(..) => {}
            Op::Close(p) => {
                let open = ports.port(p.nr()).binding != Binding::Closed;
                assert_eq!(ports.close(p.nr(), b).is_ok(), open);
                assert!(!open || !bits.is_pending(p.nr()));
            }
            Op::BindVcpu(p, v) => {
                if ports.bind_vcpu(p.nr(), vcpu(v)).is_ok() {
                    assert_eq!(ports.port(p.nr()).vcpu, vcpu(v));
                }
            }
            Op::Send(p) => match ports.send(p.nr(), b) {
                Ok(Outcome::Kick(v)) => kick = Some(v),
                Ok(Outcome::Backend(n)) => assert_eq!(n, p.nr()),
                Ok(Outcome::Done) | Err(_) => {}
            },
            Op::Backend(p) => kick = ports.raise_from_backend(p.nr(), b),
            Op::Virq(q, v) => kick = ports.raise_virq(virq(q), vcpu(v), b),
            Op::Mask(p) if p.nr() > 0 && p.nr() < PORTS => bits.set_mask(p.nr()),
            Op::Mask(_) => {}
            Op::Unmask(p) => {
                if let Ok(k) = ports.unmask(p.nr(), b) {
                    kick = k;
                    assert!(!bits.is_masked(p.nr()));
                }
            }
            Op::Status(d, p) => {
                let status = ports.status(d.id(), p.nr());
                assert!(status.is_err() || status.unwrap()[0] <= 5);
            }
            Op::Take(v) => bits.selector[(v % 4) as usize].set(0),
            Op::Reset(d) => {
                if ports.reset(d.id(), b).is_ok() {
                    assert!((1..PORTS).all(|n| ports.port(n).binding == Binding::Closed));
                }
            }
        }
        if let Some(v) = kick.take() {
            assert!(bits.selector[v as usize].get() != 0, "a kick has a reason");
        }
    }
    consistent(&ports);
});
