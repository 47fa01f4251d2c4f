//! Event channel ports against a simple model, case by case, and under threads.

#![allow(
    clippy::cast_possible_truncation,
    reason = "numbers of vCPUs are small"
)]

use blanket_abi::xen::domid::{BACKEND, GUEST, SELF};
use blanket_abi::xen::errno::{EEXIST, EINVAL, ENOENT, ENOSPC, EPERM, ESRCH};
use blanket_abi::xen::event::{PORTS, status, virq};
use blanket_core::evtchn::{Binding, Outcome, Port, Ports, SharedBits};
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Condvar, Mutex};
use std::time::Duration;

const VCPUS: usize = 4;
const CONSOLE: u32 = 2; // a global VIRQ

/// shared_info and vcpu_info.
struct Bits {
    pending: [AtomicU64; 64],
    mask: [AtomicU64; 64],
    selector: [AtomicU64; VCPUS],
    upcall: [AtomicBool; VCPUS],
}

impl Bits {
    fn new(masked: bool) -> Self {
        Self {
            pending: [const { AtomicU64::new(0) }; 64],
            mask: std::array::from_fn(|_| AtomicU64::new(if masked { u64::MAX } else { 0 })),
            selector: [const { AtomicU64::new(0) }; VCPUS],
            upcall: [const { AtomicBool::new(false) }; VCPUS],
        }
    }
}

fn bit(port: u32) -> (usize, u64) {
    assert!(port > 0 && port < PORTS, "port {port}");
    (port as usize / 64, 1 << (port % 64))
}

impl SharedBits for Bits {
    fn test_and_set_pending(&self, port: u32) -> bool {
        let (w, b) = bit(port);
        self.pending[w].fetch_or(b, SeqCst) & b != 0
    }
    fn is_pending(&self, port: u32) -> bool {
        let (w, b) = bit(port);
        self.pending[w].load(SeqCst) & b != 0
    }
    fn clear_pending(&self, port: u32) {
        let (w, b) = bit(port);
        self.pending[w].fetch_and(!b, SeqCst);
    }
    fn is_masked(&self, port: u32) -> bool {
        let (w, b) = bit(port);
        self.mask[w].load(SeqCst) & b != 0
    }
    fn set_mask(&self, port: u32) {
        let (w, b) = bit(port);
        self.mask[w].fetch_or(b, SeqCst);
    }
    fn clear_mask(&self, port: u32) {
        let (w, b) = bit(port);
        self.mask[w].fetch_and(!b, SeqCst);
    }
    fn test_and_set_selector(&self, vcpu: u32, word: u32) -> bool {
        let b = 1 << word;
        let was = self.selector[vcpu as usize].fetch_or(b, SeqCst) & b != 0;
        if !was {
            self.upcall[vcpu as usize].store(true, SeqCst);
        }
        was
    }
}

fn domain() -> (Ports, Bits) {
    let ports = Ports::new();
    ports.set_vcpus(VCPUS as u32);
    (ports, Bits::new(false))
}

#[test]
fn the_rings_ports_are_there_before_the_domain_starts() {
    let (p, b) = domain();
    p.reserve_static(1, BACKEND).unwrap();
    p.reserve_static(2, BACKEND).unwrap();
    assert_eq!(p.reserve_static(2, BACKEND), Err(EEXIST));
    assert_eq!(p.reserve_static(0, BACKEND), Err(EINVAL));
    assert_eq!(p.reserve_static(PORTS, BACKEND), Err(EINVAL));
    assert_eq!(p.send(1, &b), Ok(Outcome::Backend(1)));
    assert_eq!(p.raise_from_backend(2, &b), Some(0));
    assert_eq!(p.raise_from_backend(2, &b), None, "pending already");
    assert_eq!(
        p.status(SELF, 1),
        Ok([status::INTERDOMAIN, 0, u32::from(BACKEND), 1])
    );
    assert_eq!(p.bind_ipi(0, &b), Ok(3), "the lowest free port");
}

#[test]
fn a_port_for_the_backend() {
    let (p, b) = domain();
    let port = p.alloc_unbound(SELF, BACKEND, &b).unwrap();
    assert_eq!(
        p.status(GUEST, port),
        Ok([status::INTERDOMAIN, 0, u32::from(BACKEND), port]),
        "it is there at once"
    );
    assert_eq!(p.send(port, &b), Ok(Outcome::Backend(port)));
    p.bind_vcpu(port, 3).unwrap();
    assert_eq!(p.raise_from_backend(port, &b), Some(3));
    let closed = p.close(port, &b).unwrap();
    assert_eq!(
        closed,
        Port {
            binding: Binding::Interdomain {
                remote: BACKEND,
                port
            },
            vcpu: 3
        }
    );
    assert_eq!(p.raise_from_backend(port, &b), None, "no longer");
    assert!(!b.is_pending(port), "a closed port is clean");
}

#[test]
fn a_loop_inside_the_domain() {
    let (p, b) = domain();
    let a = p.alloc_unbound(SELF, SELF, &b).unwrap();
    p.bind_vcpu(a, 1).unwrap();
    let (c, kick) = p.bind_interdomain(SELF, a, &b).unwrap();
    assert_eq!(kick, Some(0), "pending at once");
    assert_eq!(p.bind_interdomain(SELF, a, &b), Err(EINVAL), "taken");
    assert_eq!(p.send(c, &b), Ok(Outcome::Kick(1)));
    assert_eq!(p.send(c, &b), Ok(Outcome::Done));
    assert_eq!(p.raise_from_backend(c, &b), None, "not the backend's");
    p.close(c, &b).unwrap();
    assert_eq!(
        p.status(SELF, a),
        Ok([status::UNBOUND, 1, u32::from(GUEST), 0])
    );
    assert_eq!(p.send(a, &b), Ok(Outcome::Done));
    assert_eq!(p.send(c, &b), Err(EINVAL));
}

#[test]
fn what_xen_refuses() {
    let (p, b) = domain();
    assert_eq!(p.bind_virq(virq::COUNT, 0, &b), Err(EINVAL));
    assert_eq!(p.bind_virq(u32::MAX, 0, &b), Err(EINVAL));
    assert_eq!(
        p.bind_virq(CONSOLE, 1, &b),
        Err(EINVAL),
        "global VIRQs start on vCPU 0"
    );
    assert_eq!(p.bind_virq(virq::TIMER, 4, &b), Err(ENOENT));
    assert_eq!(p.bind_ipi(4, &b), Err(ENOENT));
    assert_eq!(p.bind_ipi(u32::MAX, &b), Err(ENOENT));
    assert_eq!(p.alloc_unbound(BACKEND, SELF, &b), Err(EPERM));
    assert_eq!(p.alloc_unbound(7, SELF, &b), Err(ESRCH));
    assert_eq!(p.bind_interdomain(7, 1, &b), Err(ESRCH));
    assert_eq!(
        p.bind_interdomain(BACKEND, 1, &b),
        Err(EINVAL),
        "it has no port that waits"
    );
    assert_eq!(p.bind_interdomain(SELF, PORTS, &b), Err(EINVAL));
    let timer = p.bind_virq(virq::TIMER, 1, &b).unwrap();
    assert_eq!(p.bind_virq(virq::TIMER, 1, &b), Err(EEXIST));
    assert_eq!(p.bind_vcpu(timer, 0), Err(EINVAL), "bound for good");
    assert_eq!(p.send(timer, &b), Err(EINVAL), "the guest cannot raise it");
    let ipi = p.bind_ipi(1, &b).unwrap();
    assert_eq!(p.bind_vcpu(ipi, 0), Err(EINVAL));
    let global = p.bind_virq(CONSOLE, 0, &b).unwrap();
    assert_eq!(p.bind_vcpu(global, 4), Err(ENOENT));
    p.bind_vcpu(global, 2).unwrap();
    assert_eq!(p.raise_virq(CONSOLE, 0, &b), Some(2));
    p.close(global, &b).unwrap();
    assert_eq!(p.raise_virq(CONSOLE, 0, &b), None);
    for port in [0, 9, PORTS, u32::MAX] {
        assert_eq!(p.close(port, &b), Err(EINVAL));
        assert_eq!(p.send(port, &b), Err(EINVAL));
        assert_eq!(p.bind_vcpu(port, 0), Err(EINVAL));
        assert_eq!(p.raise_from_backend(port, &b), None);
    }
    assert_eq!(p.unmask(0, &b), Err(EINVAL));
    assert_eq!(p.unmask(PORTS, &b), Err(EINVAL));
    assert_eq!(p.status(SELF, PORTS), Err(EINVAL));
    assert_eq!(p.status(9, 1), Err(ESRCH));
    assert_eq!(p.reset(BACKEND, &b), Err(EPERM));
    assert_eq!(p.raise_virq(u32::MAX, u32::MAX, &b), None);
}

#[test]
fn all_ports_and_no_more() {
    let (p, b) = domain();
    for port in 1..PORTS {
        assert_eq!(p.bind_ipi(0, &b), Ok(port));
    }
    assert_eq!(p.bind_ipi(0, &b), Err(ENOSPC));
    assert_eq!(p.bind_virq(virq::TIMER, 0, &b), Err(ENOSPC));
    p.close(77, &b).unwrap();
    p.close(5, &b).unwrap();
    assert_eq!(p.bind_virq(virq::TIMER, 0, &b), Ok(5));
    assert_eq!(p.bind_ipi(1, &b), Ok(77));
    p.reset(SELF, &b).unwrap();
    assert!((0..PORTS).all(|n| p.port(n).binding == Binding::Closed));
    assert_eq!(p.bind_virq(virq::TIMER, 0, &b), Ok(1));
}

#[test]
fn masked_events_wait_for_unmask() {
    let (p, b) = domain();
    let port = p.bind_ipi(2, &b).unwrap();
    b.set_mask(port);
    assert_eq!(p.send(port, &b), Ok(Outcome::Done));
    assert!(b.is_pending(port) && !b.upcall[2].load(SeqCst));
    assert_eq!(p.unmask(port, &b), Ok(Some(2)));
    assert!(b.upcall[2].load(SeqCst));
    assert_eq!(b.selector[2].load(SeqCst), 1 << (port / 64));
    assert_eq!(p.unmask(port, &b), Ok(None), "the selector bit is set");
}

// ---- against a model ----

#[derive(Clone, Copy, Debug)]
enum Op {
    BindVirq(u32, u32),
    BindIpi(u32),
    AllocUnbound(u16, u16),
    BindInterdomain(u16, u32),
    Close(u32),
    BindVcpu(u32, u32),
    Send(u32),
    Backend(u32),
    Virq(u32, u32),
    Mask(u32),
    Unmask(u32),
    Upcall(u32),
    Reset,
}

/// The same rules, written with maps and booleans.
#[derive(Default)]
struct Model {
    ports: BTreeMap<u32, (Binding, u32)>,
    pending: BTreeMap<u32, bool>,
    masked: BTreeMap<u32, bool>,
    selected: BTreeMap<(u32, u32), bool>,
}

impl Model {
    fn alloc(&mut self, b: Binding, vcpu: u32) -> u32 {
        let port = (1..).find(|n| !self.ports.contains_key(n)).unwrap();
        self.pending.remove(&port);
        self.ports.insert(port, (b, vcpu));
        port
    }
    fn notify(&mut self, port: u32) -> Option<u32> {
        let vcpu = self.ports[&port].1;
        if self.pending.insert(port, true) == Some(true) {
            return None;
        }
        if self.masked.get(&port) == Some(&true) {
            return None;
        }
        (self.selected.insert((vcpu, port / 64), true) != Some(true)).then_some(vcpu)
    }
    fn global(virq: u32) -> bool {
        ![virq::TIMER, virq::DEBUG, virq::XENOPROF, virq::XENPMU].contains(&virq)
    }
    fn find_virq(&self, virq: u32, vcpu: u32) -> Option<u32> {
        self.ports
            .iter()
            .find(|(_, (b, v))| *b == Binding::Virq(virq) && (Self::global(virq) || *v == vcpu))
            .map(|(p, _)| *p)
    }
    fn close(&mut self, port: u32) -> Result<(), i64> {
        let (b, _) = self.ports.remove(&port).ok_or(EINVAL)?;
        if let Binding::Interdomain {
            remote: GUEST,
            port: other,
        } = b
            && let Some(peer) = self.ports.get_mut(&other)
        {
            peer.0 = Binding::Unbound { remote: GUEST };
        }
        self.pending.remove(&port);
        Ok(())
    }
}

fn check(ports: &Ports, bits: &Bits, m: &mut Model, op: Op) {
    let nr = VCPUS as u32;
    match op {
        Op::BindVirq(virq, vcpu) => {
            let want = if virq >= 24 || Model::global(virq) && vcpu != 0 {
                Err(EINVAL)
            } else if vcpu >= nr {
                Err(ENOENT)
            } else if m.find_virq(virq, vcpu).is_some() {
                Err(EEXIST)
            } else {
                Ok(m.alloc(Binding::Virq(virq), vcpu))
            };
            assert_eq!(ports.bind_virq(virq, vcpu, bits), want);
        }
        Op::BindIpi(vcpu) => {
            let want = if vcpu >= nr {
                Err(ENOENT)
            } else {
                Ok(m.alloc(Binding::Ipi, vcpu))
            };
            assert_eq!(ports.bind_ipi(vcpu, bits), want);
        }
        Op::AllocUnbound(dom, remote) => {
            let want = match dom {
                SELF | GUEST => {
                    let remote = if remote == SELF { GUEST } else { remote };
                    let port = m.alloc(Binding::Unbound { remote }, 0);
                    if remote == BACKEND {
                        m.ports.get_mut(&port).unwrap().0 = Binding::Interdomain { remote, port };
                    }
                    Ok(port)
                }
                BACKEND => Err(EPERM),
                _ => Err(ESRCH),
            };
            assert_eq!(ports.alloc_unbound(dom, remote, bits), want);
        }
        Op::BindInterdomain(dom, port) => {
            let waits = m
                .ports
                .get(&port)
                .is_some_and(|p| p.0 == Binding::Unbound { remote: GUEST });
            let want = match dom {
                SELF | GUEST if waits => {
                    let new = m.alloc(
                        Binding::Interdomain {
                            remote: GUEST,
                            port,
                        },
                        0,
                    );
                    m.ports.get_mut(&port).unwrap().0 = Binding::Interdomain {
                        remote: GUEST,
                        port: new,
                    };
                    Ok((new, m.notify(new)))
                }
                SELF | GUEST | BACKEND => Err(EINVAL),
                _ => Err(ESRCH),
            };
            assert_eq!(ports.bind_interdomain(dom, port, bits), want);
        }
        Op::Close(port) => {
            let want = m.close(port);
            assert_eq!(ports.close(port, bits).map(|_| ()), want);
        }
        Op::BindVcpu(port, vcpu) => {
            let want = if vcpu >= nr {
                Err(ENOENT)
            } else {
                match m.ports.get_mut(&port) {
                    None | Some((Binding::Ipi, _)) => Err(EINVAL),
                    Some((Binding::Virq(v), _)) if !Model::global(*v) => Err(EINVAL),
                    Some(p) => {
                        p.1 = vcpu;
                        Ok(())
                    }
                }
            };
            assert_eq!(ports.bind_vcpu(port, vcpu), want);
        }
        Op::Send(port) => {
            let want = match m.ports.get(&port).map(|p| p.0) {
                None | Some(Binding::Closed | Binding::Virq(_)) => Err(EINVAL),
                Some(Binding::Unbound { .. }) => Ok(Outcome::Done),
                Some(Binding::Ipi) => Ok(m.notify(port).map_or(Outcome::Done, Outcome::Kick)),
                Some(Binding::Interdomain {
                    remote: GUEST,
                    port: other,
                }) => Ok(m.notify(other).map_or(Outcome::Done, Outcome::Kick)),
                Some(Binding::Interdomain { port, .. }) => Ok(Outcome::Backend(port)),
            };
            assert_eq!(ports.send(port, bits), want);
        }
        Op::Backend(port) => {
            let want = match m.ports.get(&port) {
                Some((
                    Binding::Interdomain {
                        remote: BACKEND, ..
                    },
                    _,
                )) => m.notify(port),
                _ => None,
            };
            assert_eq!(ports.raise_from_backend(port, bits), want);
        }
        Op::Virq(virq, vcpu) => {
            let want = m.find_virq(virq, vcpu).and_then(|port| m.notify(port));
            assert_eq!(ports.raise_virq(virq, vcpu, bits), want);
        }
        Op::Mask(port) => {
            m.masked.insert(port, true);
            bits.set_mask(port);
        }
        Op::Unmask(port) => {
            m.masked.insert(port, false);
            let vcpu = m.ports.get(&port).map_or(0, |p| p.1);
            let want = (m.pending.get(&port) == Some(&true)
                && m.selected.insert((vcpu, port / 64), true) != Some(true))
            .then_some(vcpu);
            assert_eq!(ports.unmask(port, bits), Ok(want));
        }
        Op::Upcall(vcpu) => {
            // The guest takes all that is selected for this vCPU.
            bits.upcall[vcpu as usize].store(false, SeqCst);
            let selected = bits.selector[vcpu as usize].swap(0, SeqCst);
            for word in 0..64 {
                let was = m.selected.remove(&(vcpu, word)) == Some(true);
                assert_eq!(selected >> word & 1 != 0, was);
                if was {
                    let mask = bits.mask[word as usize].load(SeqCst);
                    bits.pending[word as usize].fetch_and(mask, SeqCst);
                    m.pending
                        .retain(|port, _| port / 64 != word || m.masked.get(port) == Some(&true));
                }
            }
        }
        Op::Reset => {
            let all: Vec<u32> = m.ports.keys().copied().collect();
            for port in all {
                m.close(port).unwrap();
            }
            assert_eq!(ports.reset(SELF, bits), Ok(()));
        }
    }
}

fn ops() -> impl Strategy<Value = Op> {
    let port = || 1u32..10;
    let vcpu = || 0u32..6;
    let dom = || prop::sample::select(vec![SELF, GUEST, BACKEND, 5]);
    let virq = || prop::sample::select(vec![virq::TIMER, virq::DEBUG, CONSOLE, 23, 24]);
    prop_oneof![
        2 => (virq(), vcpu()).prop_map(|(a, b)| Op::BindVirq(a, b)),
        2 => vcpu().prop_map(Op::BindIpi),
        3 => (dom(), dom()).prop_map(|(a, b)| Op::AllocUnbound(a, b)),
        3 => (dom(), port()).prop_map(|(a, b)| Op::BindInterdomain(a, b)),
        3 => port().prop_map(Op::Close),
        2 => (port(), vcpu()).prop_map(|(a, b)| Op::BindVcpu(a, b)),
        6 => port().prop_map(Op::Send),
        3 => port().prop_map(Op::Backend),
        3 => (virq(), 0u32..4).prop_map(|(a, b)| Op::Virq(a, b)),
        2 => port().prop_map(Op::Mask),
        2 => port().prop_map(Op::Unmask),
        4 => (0u32..4).prop_map(Op::Upcall),
        1 => Just(Op::Reset),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 500, failure_persistence: None, ..ProptestConfig::default()
    })]

    #[test]
    fn does_what_the_model_does(list in prop::collection::vec(ops(), 1..120)) {
        let (ports, bits) = domain();
        let mut model = Model::default();
        for op in list {
            check(&ports, &bits, &mut model, op);
            for n in 1..16 {
                let want = model.ports.get(&n).map_or(
                    Port { binding: Binding::Closed, vcpu: 0 },
                    |p| Port { binding: p.0, vcpu: p.1 },
                );
                prop_assert_eq!(ports.port(n), want);
                prop_assert_eq!(bits.is_pending(n), model.pending.get(&n) == Some(&true));
            }
        }
    }
}

// ---- under threads ----

/// What makes a sleeping vCPU run again: only a kick that the ports asked for.
#[derive(Default)]
struct Waker {
    kicked: Mutex<bool>,
    changed: Condvar,
}

impl Waker {
    fn kick(&self) {
        *self.kicked.lock().unwrap() = true;
        self.changed.notify_one();
    }
    /// `false` if nobody kicked for a long time: the notification was lost.
    fn wait(&self) -> bool {
        let guard = self.kicked.lock().unwrap();
        let (mut guard, timeout) = self
            .changed
            .wait_timeout_while(guard, Duration::from_secs(20), |kicked| !*kicked)
            .unwrap();
        *guard = false;
        !timeout.timed_out()
    }
}

/// Senders give each port a growing number and then notify; vCPUs sleep until they
/// are kicked and read the number of every pending port, as Linux does. At the end
/// each vCPU must have seen the last number of each of its ports. Meanwhile one
/// thread opens and closes other ports, and vCPUs mask and unmask theirs.
#[test]
fn no_notification_is_lost() {
    const PER_VCPU: usize = 3;
    const SENDS: u64 = 200_000;
    let ports = Ports::new();
    ports.set_vcpus(VCPUS as u32);
    let bits = Bits::new(false);
    let wakers: [Waker; VCPUS] = Default::default();

    // On each vCPU: an IPI, a port of the backend in another word, its timer.
    let mut mine = [[0u32; PER_VCPU]; VCPUS];
    for (vcpu, list) in mine.iter_mut().enumerate() {
        list[0] = ports.bind_ipi(vcpu as u32, &bits).unwrap();
        list[1] = ports.bind_virq(virq::TIMER, vcpu as u32, &bits).unwrap();
        list[2] = 64 * (vcpu as u32 + 1) + vcpu as u32;
        ports.reserve_static(list[2], BACKEND).unwrap();
        ports.bind_vcpu(list[2], vcpu as u32).unwrap();
    }
    let sent: [AtomicU64; VCPUS * PER_VCPU] = [const { AtomicU64::new(0) }; _];
    let finished = AtomicU64::new(0);
    let stop = AtomicBool::new(false);

    std::thread::scope(|s| {
        for (vcpu, list) in mine.iter().enumerate() {
            // A vCPU.
            let (ports, bits, wakers, sent) = (&ports, &bits, &wakers, &sent);
            s.spawn(move || {
                let mut seen = [0u64; PER_VCPU];
                while seen != [SENDS; PER_VCPU] {
                    assert!(
                        wakers[vcpu].wait(),
                        "vCPU {vcpu} slept for ever, saw {seen:?}"
                    );
                    while bits.upcall[vcpu].swap(false, SeqCst) {
                        let mut selected = bits.selector[vcpu].swap(0, SeqCst);
                        while selected != 0 {
                            let word = selected.trailing_zeros() as usize;
                            selected &= selected - 1;
                            for (i, &port) in list.iter().enumerate() {
                                let (w, b) = bit(port);
                                let active =
                                    bits.pending[word].load(SeqCst) & !bits.mask[word].load(SeqCst);
                                if w != word || active & b == 0 {
                                    continue;
                                }
                                // Every other time as a level-triggered handler:
                                // masked while it runs, unmasked by hypercall.
                                let masks = seen[i] & 1 == 0;
                                if masks {
                                    bits.set_mask(port);
                                }
                                bits.clear_pending(port);
                                let now = sent[vcpu * PER_VCPU + i].load(SeqCst);
                                assert!(now >= seen[i]);
                                seen[i] = now;
                                if masks && let Some(v) = ports.unmask(port, bits).unwrap() {
                                    wakers[v as usize].kick();
                                }
                            }
                        }
                    }
                }
            });
        }
        for vcpu in 0..VCPUS {
            // One sender for all ports of a vCPU.
            let (ports, bits, wakers, sent, finished, list) =
                (&ports, &bits, &wakers, &sent, &finished, &mine[vcpu]);
            s.spawn(move || {
                for n in 1..=SENDS {
                    for (i, &port) in list.iter().enumerate() {
                        sent[vcpu * PER_VCPU + i].store(n, SeqCst);
                        let kick = match i {
                            0 => match ports.send(port, bits).unwrap() {
                                Outcome::Kick(v) => Some(v),
                                Outcome::Done => None,
                                Outcome::Backend(_) => panic!("an IPI"),
                            },
                            1 => ports.raise_virq(virq::TIMER, vcpu as u32, bits),
                            _ => ports.raise_from_backend(port, bits),
                        };
                        if let Some(v) = kick {
                            assert_eq!(v as usize, vcpu);
                            wakers[v as usize].kick();
                        }
                    }
                    if n % 64 == 0 {
                        std::thread::yield_now();
                    }
                }
                finished.fetch_add(1, SeqCst);
            });
        }
        let (ports, bits, stop, finished) = (&ports, &bits, &stop, &finished);
        s.spawn(move || {
            // The only thread that changes bindings, so it needs no lock.
            let first = ports.bind_ipi(0, bits).unwrap();
            ports.close(first, bits).unwrap();
            while finished.load(SeqCst) < VCPUS as u64 {
                let a = ports.alloc_unbound(SELF, SELF, bits).unwrap();
                bits.set_mask(a);
                let b = ports.bind_ipi(1, bits).unwrap();
                bits.set_mask(b);
                assert_eq!((a, b), (first, first + 1));
                ports.close(a, bits).unwrap();
                ports.close(b, bits).unwrap();
                std::thread::yield_now();
            }
            stop.store(true, SeqCst);
        });
    });
    assert!(stop.load(SeqCst));
    assert!(sent.iter().all(|n| n.load(SeqCst) == SENDS));
}
