//! An agent is killed at each step of what it does, and the next one goes on: exactly one
//! node has the VM afterwards, and both say the same.

#![cfg(debug_assertions)]

mod common;

use common::{Lab, Node, until};

/// One of the two runs it, and both know which.
fn one_has_it(a: &Node, b: &Node, at: &str) -> String {
    until(&format!("{at}: the operation is over"), || {
        // Killed before it was written down, there is none.
        a.operation("walk").is_none_or(|it| it["step"] == "over")
    });
    let runs = |node: &Node| node.phase("web").as_deref() == Some("running");
    let has = |node: &Node| node.vm("web").is_some();
    until(&format!("{at}: one has it"), || {
        runs(a) != runs(b) && has(a) == runs(a) && has(b) == runs(b)
    });
    let node = if runs(a) { a } else { b };
    assert_eq!(
        a.listed("web"),
        [(node.name.clone(), "running".to_owned())],
        "{at}"
    );
    let vm = node.vm("web").expect("there");
    assert_eq!(
        (&vm["place"]["is"], &vm["life"]),
        (&"here".into(), &"running".into()),
        "{at}"
    );
    node.name.clone()
}

/// A move, in which the agent of the source or the destination dies at a place.
fn walk(at: &str, source: bool, hold: Option<&str>) -> String {
    let lab = Lab::new();
    let mut a = lab.first("a");
    let mut b = lab.joined("b", &a);
    a.run_vm(&lab, "web");
    let dies = if source { &mut a } else { &mut b };
    dies.kill();
    dies.start(&[], &[("SUPERCLOUD_FAIL_AT", at)]);
    if !source {
        until("b is reachable", || a.run(&["node", "doctor"]).code == 0);
    }
    let mut moving = a.begin(&["vm", "migrate", "web", "--to", "b", "--id", "walk"]);
    if let Some(step) = hold {
        // Cancelled in the middle of it.
        lab.hold(step);
        lab.wait_held(step);
        a.run(&["vm", "cancel", "web"]).ok();
        lab.release(step);
    }
    let dies = if source { &mut a } else { &mut b };
    until(&format!("{at}: it dies"), || dies.has_died());
    dies.restart();
    let has = one_has_it(&a, &b, at);
    let _ = moving.kill();
    let _ = moving.wait();
    has
}

#[test]
fn the_source_dies_before_it_was_sent() {
    for at in ["move.recorded", "move.prepared", "move.prepared-recorded"] {
        assert_eq!(walk(at, true, None), "b", "{at}");
    }
    // Whether `blanket migrate` had begun nobody knows: it is not begun again.
    assert_eq!(walk("move.begun", true, None), "a");
}

#[test]
fn the_source_dies_when_it_was_sent() {
    for at in [
        "move.sent",
        "move.finishing",
        "vm.cleared",
        "move.forgotten",
    ] {
        assert_eq!(walk(at, true, None), "b", "{at}");
    }
}

#[test]
fn the_destination_dies() {
    for at in ["image.fetched", "arrival.recorded-first", "arrival.placed"] {
        // It is asked once; its source does not wait for it to be started again.
        assert_eq!(walk(at, false, None), "a", "{at}");
    }
    for at in ["arrival.seen", "arrival.recorded"] {
        assert_eq!(walk(at, false, None), "b", "{at}");
    }
}

#[test]
fn the_source_dies_while_it_is_sent() {
    // What it has begun goes on without it, and what that says is kept.
    let lab = Lab::new();
    let mut a = lab.first("a");
    let b = lab.joined("b", &a);
    a.run_vm(&lab, "web");
    for step in ["begun", "copying", "received", "committed"] {
        if a.phase("web").is_none() {
            a.run(&["vm", "migrate", "web", "--to", "a"]).ok();
        }
        lab.hold(step);
        let id = format!("walk-{step}");
        let moving = a.begin(&["vm", "migrate", "web", "--to", "b", "--id", &id]);
        lab.wait_held(step);
        a.kill();
        a.start(&[], &[]);
        lab.release(step);
        let ended = moving.wait_with_output().expect("ended");
        assert!(ended.status.success(), "{step}: {ended:?}");
        let said = String::from_utf8_lossy(&ended.stdout).into_owned();
        assert!(said.contains("stood still for 25 ms"), "{step}: {said}");
        assert_eq!(b.listed("web"), [("b".to_owned(), "running".to_owned())]);
    }
}

#[test]
fn either_dies_when_it_was_cancelled() {
    assert_eq!(walk("move.stays", true, Some("copying")), "a");
    for at in ["arrival.dismissed", "arrival.refused", "vm.cleared"] {
        assert_eq!(walk(at, false, Some("copying")), "a", "{at}");
    }
}

#[test]
fn an_agent_dies_when_a_vm_is_started_stopped_and_removed() {
    for at in ["image.copied", "vm.recorded", "vm.furnished", "vm.run"] {
        let lab = Lab::new();
        let mut a = lab.host("a");
        a.start(&[], &[("SUPERCLOUD_FAIL_AT", at)]);
        let image = lab.image("base.raw", 1 << 20).display().to_string();
        if a.run(&["image", "add", &image]).code == 0 {
            let _ = a.run(&["vm", "run", "base", "--name", "web", "--memory", "16M"]);
        }
        until(&format!("{at}: it dies"), || a.has_died());
        a.restart();
        a.run_vm_as(&lab, "web");
        assert_eq!(a.phase("web").as_deref(), Some("running"), "{at}");
        assert_eq!(a.vm("web").expect("there")["life"], "running", "{at}");
    }
    for (at, wanted, does) in [
        ("vm.starting", "running", "start"),
        ("vm.stopping", "stopped", "stop"),
        ("vm.removing", "", "rm"),
        ("vm.cleared", "", "rm"),
    ] {
        let lab = Lab::new();
        let mut a = lab.first("a");
        a.run_vm(&lab, "web");
        if does != "stop" {
            a.run(&["vm", "stop", "web"]).ok();
        }
        a.kill();
        a.start(&[], &[("SUPERCLOUD_FAIL_AT", at)]);
        let _ = a.run(&["vm", does, "web"]);
        until(&format!("{at}: it dies"), || a.has_died());
        a.restart();
        until(&format!("{at}: it is {wanted}"), || {
            let life = a
                .vm("web")
                .map(|vm| vm["life"].as_str().unwrap_or("").to_owned());
            life.unwrap_or_default() == wanted
                && (a.phase("web").is_some() == (wanted == "running"))
        });
    }
}

#[test]
fn an_agent_dies_when_a_snapshot_is_taken_and_restored() {
    for at in ["snapshot.written", "snapshot.named"] {
        let lab = Lab::new();
        let mut a = lab.first("a");
        a.run_vm(&lab, "web");
        a.kill();
        a.start(&[], &[("SUPERCLOUD_FAIL_AT", at)]);
        let _ = a.run(&["vm", "snapshot", "web", "--as", "one"]);
        until(&format!("{at}: it dies"), || a.has_died());
        a.restart();
        // There is none, and the next one is not in its way.
        a.run(&["vm", "restore", "one"]).fails(3, "no snapshot one");
        a.run(&["vm", "snapshot", "web", "--as", "one"]).ok();
        assert_eq!(a.phase("web").as_deref(), Some("running"), "{at}");
        let images = std::fs::read_dir(a.data().join("images")).expect("there");
        assert_eq!(images.count(), 2, "{at}: the base and the snapshot");
    }
    for at in ["restore.recorded", "vm.furnished", "vm.run", "vm.restored"] {
        let lab = Lab::new();
        let mut a = lab.first("a");
        a.run_vm(&lab, "web");
        a.run(&["vm", "snapshot", "web", "--as", "one"]).ok();
        a.kill();
        a.start(&[], &[("SUPERCLOUD_FAIL_AT", at)]);
        let _ = a.run(&["vm", "restore", "one", "--name", "two"]);
        until(&format!("{at}: it dies"), || a.has_died());
        a.restart();
        until(&format!("{at}: it goes on"), || {
            a.vm("two").is_some_and(|vm| vm["life"] == "running")
        });
        assert_eq!(a.phase("two").as_deref(), Some("running"), "{at}");
        let nets = std::fs::read_to_string(a.vms().join("two.nets")).unwrap_or_default();
        let mac = a.vm("two").expect("there")["ports"][0]["mac"].clone();
        let mac = mac.as_str().expect("a word");
        assert!(
            nets.ends_with(&format!("attach user,mac={mac}\n")),
            "{at}: {nets}"
        );
        // What it went on from is needed no more.
        a.run(&["snapshot", "rm", "one"]).ok();
        a.run(&["vm", "stop", "two"]).ok();
        a.run(&["vm", "start", "two"]).ok();
    }
}

#[test]
fn an_agent_dies_when_a_snapshot_of_a_stopped_vm_is_taken_and_restored() {
    let disk = |node: &Node, vm: &str| node.data().join("vms").join(vm).join("disk0.qcow2");
    let stopped = |a: &Node, lab: &Lab| {
        a.run_vm(lab, "web");
        a.run(&["vm", "stop", "web"]).ok();
        let path = disk(a, "web");
        let image = std::fs::read_to_string(&path).expect("there");
        // White space is something, too.
        std::fs::write(path, format!("{image}  ")).expect("written");
    };
    for at in ["snapshot.written", "snapshot.named"] {
        let lab = Lab::new();
        let mut a = lab.first("a");
        stopped(&a, &lab);
        a.kill();
        a.start(&[], &[("SUPERCLOUD_FAIL_AT", at)]);
        let _ = a.run(&["vm", "snapshot", "web", "--as", "one"]);
        until(&format!("{at}: it dies"), || a.has_died());
        a.restart();
        a.run(&["vm", "restore", "one"]).fails(3, "no snapshot one");
        a.run(&["vm", "snapshot", "web", "--as", "one"]).ok();
        assert!(a.phase("web").is_none(), "{at}");
        let images = std::fs::read_dir(a.data().join("images")).expect("there");
        assert_eq!(images.count(), 2, "{at}: the base and the snapshot");
    }
    for at in [
        "restore.recorded",
        "disks.filled",
        "disks.named",
        "vm.furnished",
        "vm.run",
        "vm.restored",
    ] {
        let lab = Lab::new();
        let mut a = lab.first("a");
        stopped(&a, &lab);
        a.run(&["vm", "snapshot", "web", "--as", "one"]).ok();
        a.kill();
        a.start(&[], &[("SUPERCLOUD_FAIL_AT", at)]);
        let _ = a.run(&["vm", "restore", "one", "--name", "two"]);
        until(&format!("{at}: it dies"), || a.has_died());
        a.restart();
        until(&format!("{at}: it runs"), || {
            a.vm("two").is_some_and(|vm| vm["life"] == "running")
        });
        assert_eq!(a.phase("two").as_deref(), Some("running"), "{at}");
        assert!(!a.vms().join("two.nets").exists(), "{at}: it boots");
        let bytes = |vm: &str| std::fs::read(disk(&a, vm)).expect("there");
        assert_eq!(bytes("two"), bytes("web"), "{at}");
        assert!(!a.data().join("vms/two/filling").exists(), "{at}");
        a.run(&["snapshot", "rm", "one"]).ok();
        a.run(&["vm", "stop", "two"]).ok();
        a.run(&["vm", "start", "two"]).ok();
    }
}

#[test]
fn an_agent_dies_when_a_copy_is_made() {
    for (at, made) in [
        ("snapshot.named", false),
        ("clone.taken", false),
        ("restore.recorded", true),
    ] {
        let lab = Lab::new();
        let mut a = lab.first("a");
        a.run_vm(&lab, "web");
        a.kill();
        a.start(&[], &[("SUPERCLOUD_FAIL_AT", at)]);
        let _ = a.run(&["vm", "clone", "web", "--name", "copy"]);
        until(&format!("{at}: it dies"), || a.has_died());
        a.restart();
        let listed = a.run(&["snapshot", "list", "--json"]).json();
        assert_eq!(listed, serde_json::json!([]), "{at}: its snapshot goes");
        until(&format!("{at}: it goes on, if it was noted"), || {
            a.phase("copy").is_some() == made && a.vm("copy").is_some() == made
        });
        until(&format!("{at}: it is settled"), || {
            a.vm("copy").is_none_or(|vm| vm["life"] == "running")
        });
        // Nothing needs the saved VM any more.
        a.restart();
        let images = std::fs::read_dir(a.data().join("images")).expect("there");
        assert_eq!(images.count(), 1, "{at}: the base");
    }
}

#[test]
fn a_node_dies_when_it_joins() {
    for (at, first_dies) in [
        ("join.begun", false),
        ("join.answered", false),
        ("join.recorded", true),
    ] {
        let lab = Lab::new();
        let mut a = lab.first("a");
        let token = a.token();
        let mut b = lab.host("b");
        if first_dies {
            a.kill();
            a.start(&[], &[("SUPERCLOUD_FAIL_AT", at)]);
            b.spawn(&["--join", &token], &[]);
            until(&format!("{at}: a dies"), || a.has_died());
            a.restart();
            until(&format!("{at}: b ends"), || b.has_died());
        } else {
            b.spawn(&["--join", &token], &[("SUPERCLOUD_FAIL_AT", at)]);
            until(&format!("{at}: b dies"), || b.has_died());
        }
        // The token is used, by this very node: it comes in with it again.
        b.start(&["--join", &token], &[]);
        until(&format!("{at}: they know each other"), || {
            let nodes = a.run(&["node", "list", "--json"]).json();
            let all = nodes.as_array().expect("a list");
            all.len() == 2 && all.iter().all(|it| it["reachable"] == true)
        });
    }
}
