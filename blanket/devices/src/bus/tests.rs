use std::sync::atomic::{AtomicU32, Ordering};

use proptest::prelude::*;

use super::*;
use crate::testing::FakeGuest;

/// A device that only counts.
#[derive(Default)]
struct Counting {
    made: Arc<AtomicU32>,
    open: Arc<AtomicU32>,
    refuse: bool,
}

struct Open(Arc<AtomicU32>);

impl Connection for Open {
    fn nodes(&self) -> Nodes {
        vec![("connected".into(), "1".into())]
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Device for Counting {
    fn class(&self) -> &'static str {
        "test"
    }

    fn number(&self) -> u32 {
        7
    }

    fn frontend_nodes(&self) -> Nodes {
        vec![("mine".into(), "front".into())]
    }

    fn backend_nodes(&self) -> Nodes {
        vec![("mine".into(), "back".into())]
    }

    fn connect(
        &self,
        _: &Arc<dyn Guest>,
        frontend: &Frontend<'_>,
        _: Fault,
    ) -> Result<Box<dyn Connection>, ConnectError> {
        frontend.optional("number")?;
        if self.refuse {
            frontend.number("missing")?;
        }
        self.made.fetch_add(1, Ordering::SeqCst);
        self.open.fetch_add(1, Ordering::SeqCst);
        Ok(Box::new(Open(Arc::clone(&self.open))))
    }
}

fn world(device: Counting) -> (Arc<FakeGuest>, Bus, Arc<Counting>) {
    let guest = FakeGuest::new(1);
    let bus = Bus::new(Arc::clone(&guest) as _).expect("a bus");
    guest.set_bus(bus.changed());
    let device = Arc::new(device);
    bus.attach(Arc::clone(&device) as _).expect("attached");
    (guest, bus, device)
}

const FRONT: &str = "device/test/7";
const BACK: &str = "/local/domain/0/backend/test/1/7";

#[test]
fn both_ends_find_each_other() {
    let (guest, bus, device) = world(Counting::default());
    assert_eq!(guest.get("device/test/7/mine").as_deref(), Some("front"));
    assert_eq!(
        guest.get(&format!("{FRONT}/backend")).as_deref(),
        Some(BACK)
    );
    guest.wait_for(&format!("{BACK}/state"), Some("2"));
    assert_eq!(guest.get(&format!("{BACK}/connected")), None);
    guest.put(&format!("{FRONT}/state"), "3");
    guest.wait_for(&format!("{BACK}/state"), Some("4"));
    assert_eq!(
        guest.get(&format!("{BACK}/connected")).as_deref(),
        Some("1")
    );
    guest.put(&format!("{FRONT}/state"), "4");
    bus.end();
    assert_eq!(device.open.load(Ordering::SeqCst), 0);
    assert_eq!(device.made.load(Ordering::SeqCst), 1);
}

#[test]
fn a_frontend_that_is_faster_than_its_backend_is_connected() {
    let guest = FakeGuest::new(1);
    let bus = Bus::new(Arc::clone(&guest) as _).expect("a bus");
    guest.set_bus(bus.changed());
    // Not looked at before the frontend is ready.
    bus.hold();
    bus.attach(Arc::new(Counting::default())).expect("attached");
    guest.put(&format!("{FRONT}/state"), "3");
    bus.go_on();
    guest.wait_for(&format!("{BACK}/state"), Some("4"));
}

#[test]
fn what_the_frontend_says_wrong_is_named() {
    let (guest, bus, _) = world(Counting {
        refuse: true,
        ..Counting::default()
    });
    guest.wait_for(&format!("{BACK}/state"), Some("2"));
    guest.put(&format!("{FRONT}/state"), "3");
    guest.wait_for(&format!("{BACK}/state"), Some("5"));
    let fault = bus
        .report("test", 7)
        .expect("there")
        .fault
        .expect("a fault");
    assert_eq!(fault, "the frontend's node missing is missing");
    // It may try again.
    guest.put(&format!("{FRONT}/state"), "1");
    guest.wait_for(&format!("{BACK}/state"), Some("2"));
    guest.put(&format!("{FRONT}/number"), "1x");
    guest.put(&format!("{FRONT}/state"), "4");
    guest.wait_for(&format!("{BACK}/state"), Some("5"));
    let fault = bus
        .report("test", 7)
        .expect("there")
        .fault
        .expect("a fault");
    assert_eq!(fault, "the frontend's node number is \"1x\"");
}

#[test]
fn a_frontend_that_is_removed_is_closed() {
    let (guest, bus, device) = world(Counting::default());
    guest.wait_for(&format!("{BACK}/state"), Some("2"));
    guest.put(&format!("{FRONT}/state"), "3");
    guest.wait_for(&format!("{BACK}/state"), Some("4"));
    guest.remove(FRONT);
    guest.wait_for(&format!("{BACK}/state"), Some("6"));
    assert_eq!(device.open.load(Ordering::SeqCst), 0);
    bus.detach("test", 7, Duration::from_secs(20))
        .expect("gone");
}

/// A Linux guest that finds another device of that number while it is still at the first one's end
/// takes it for that, and waits for ever.
#[test]
fn a_guest_has_let_go_when_it_has_come_to_what_is_behind() {
    let (guest, bus, _device) = world(Counting::default());
    let state = format!("{BACK}/state");
    guest.wait_for(&state, Some("2"));
    guest.watch("device");
    guest.put(&format!("{FRONT}/state"), "6");
    let detached = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|s| {
        let detaches = s.spawn(|| {
            bus.detach("test", 7, Duration::from_secs(20))
                .expect("gone");
            detached.store(true, Ordering::SeqCst);
        });
        guest.wait_for(&state, None);
        let told = loop {
            if let Some(path) = guest.told()
                && path.starts_with("device/gone/")
            {
                break path;
            }
            std::thread::yield_now();
        };
        std::thread::sleep(Duration::from_millis(50));
        assert!(!detached.load(Ordering::SeqCst), "the guest is still at it");
        assert!(!guest.looks_at(&told), "there is nothing");
        detaches.join().expect("no panic");
    });
    // One that never looks is not waited for in vain.
    bus.attach(Arc::new(Counting::default())).expect("attached");
    let since = Instant::now();
    bus.detach("test", 7, Duration::from_millis(300))
        .expect("gone");
    assert!(since.elapsed() < Duration::from_secs(4));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// Any states in any order: at most one connection, none while the frontend is closed,
    /// and a frontend that behaves afterwards is connected.
    #[test]
    fn any_states_lead_to_order(states in proptest::collection::vec("[0-9]{0,2}|x", 0..30)) {
        let (guest, bus, device) = world(Counting::default());
        guest.wait_for(&format!("{BACK}/state"), Some("2"));
        for state in states {
            guest.put(&format!("{FRONT}/state"), &state);
            prop_assert!(device.open.load(Ordering::SeqCst) <= 1);
        }
        guest.put(&format!("{FRONT}/state"), "6");
        guest.wait_for(&format!("{BACK}/state"), Some("6"));
        prop_assert_eq!(device.open.load(Ordering::SeqCst), 0);
        guest.put(&format!("{FRONT}/state"), "1");
        guest.wait_for(&format!("{BACK}/state"), Some("2"));
        guest.put(&format!("{FRONT}/state"), "4");
        guest.wait_for(&format!("{BACK}/state"), Some("4"));
        prop_assert_eq!(device.open.load(Ordering::SeqCst), 1);
        bus.end();
        prop_assert_eq!(device.open.load(Ordering::SeqCst), 0);
    }
}
