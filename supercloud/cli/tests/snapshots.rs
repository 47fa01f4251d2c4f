//! VMs as they were at a moment: taken, restored here and elsewhere, copied, carried in a file.

mod common;

use std::fs;

use common::{Lab, Node, until};
use serde_json::Value;

fn images(node: &Node) -> usize {
    fs::read_dir(node.data().join("images")).map_or(0, Iterator::count)
}

fn snapshots(node: &Node) -> Vec<(String, String)> {
    let all = node.run(&["snapshot", "list", "--json"]).json();
    let word = |it: &Value, name: &str| it[name].as_str().unwrap_or_default().to_owned();
    let all = all.as_array().expect("a list").iter();
    all.map(|it| (word(it, "name"), word(it, "node"))).collect()
}

/// Whose memory a VM on this host has gone on with: its identity then.
fn was(node: &Node, vm: &str) -> String {
    fs::read_to_string(node.vms().join(format!("{vm}.was"))).expect("it was restored")
}

#[test]
fn a_vm_goes_on_from_a_snapshot_on_either_node() {
    let lab = Lab::new();
    let a = lab.first("a");
    let b = lab.joined("b", &a);
    a.run_vm(&lab, "web");
    let before = a.vm("web").expect("there");
    let uuid = before["uuid"].as_str().expect("a word").to_owned();
    let said = b.run(&["vm", "snapshot", "web", "--as", "one"]).ok();
    assert!(said.out.contains("12 ms"), "{said:?}");
    assert_eq!(a.phase("web").as_deref(), Some("running"));
    b.run(&["vm", "snapshot", "web", "--as", "one"])
        .fails(4, "another snapshot one on a");
    b.run(&["vm", "snapshot", "web", "--as", "-x"]).fails(2, "");
    b.run(&["vm", "snapshot", "none"]).fails(3, "none");
    a.run(&["vm", "snapshot", "web"]).ok();
    assert_eq!(snapshots(&b).len(), 2);
    assert_eq!(snapshots(&b)[0], ("one".to_owned(), "a".to_owned()));
    let listed = b.run(&["snapshot", "list"]).ok().out;
    assert!(listed.contains("one") && listed.contains("UTC"), "{listed}");
    let second = snapshots(&b)[1].0.clone();
    b.run(&["snapshot", "rm", &second]).ok();

    // It cannot be twice.
    b.run(&["vm", "restore", "one"])
        .fails(4, "another VM web on a");
    b.run(&["vm", "restore", "two"]).fails(3, "no snapshot two");
    a.kill_vm("web");
    until("it is seen", || {
        a.vm("web").expect("there")["life"] == "stopped"
    });
    b.run(&["vm", "restore", "one"])
        .fails(4, "another VM web on a");
    b.run(&["vm", "rm", "web"]).ok();
    // The base is still needed.
    a.run(&["image", "rm", "base"]).fails(4, "the snapshot one");

    // Everything of it is gone, and it goes on at the other node.
    b.run(&["vm", "restore", "one"]).ok();
    assert_eq!(a.listed("web"), [("b".to_owned(), "running".to_owned())]);
    assert_eq!(was(&b, "web"), uuid);
    let after = b.vm("web").expect("there");
    assert_eq!(
        (&after["uuid"], &after["ports"]),
        (&before["uuid"], &before["ports"])
    );
    assert!(!b.vms().join("web.nets").exists(), "its own networks");
    assert!(b.data().join("vms/web/disk0.qcow2").exists());

    // What is stopped and started boots.
    fs::remove_file(b.vms().join("web.was")).expect("there");
    a.run(&["vm", "stop", "web"]).ok();
    a.run(&["vm", "snapshot", "web"]).fails(4, "does not run");
    a.run(&["vm", "start", "web"]).ok();
    assert!(!b.vms().join("web.was").exists());

    // All goes with the last one that needs it.
    a.run(&["snapshot", "rm", "one"]).ok();
    a.run(&["snapshot", "rm", "one"])
        .fails(3, "no snapshot one");
    a.run(&["image", "rm", "base"]).ok();
    assert_eq!(images(&a), 0);
    b.run(&["vm", "stop", "web"]).ok();
    b.run(&["vm", "rm", "web"]).ok();
    assert_eq!(images(&b), 0);
}

#[test]
fn a_copy_is_another_vm() {
    let lab = Lab::new();
    let a = lab.first("a");
    let b = lab.joined("b", &a);
    a.run_vm(&lab, "web");
    let one = a.vm("web").expect("there");
    b.run(&["vm", "clone", "web", "--name", "copy"]).ok();
    let two = a.vm("copy").expect("there");
    assert_ne!(one["uuid"], two["uuid"]);
    assert_ne!(one["ports"][0]["mac"], two["ports"][0]["mac"]);
    assert_eq!(was(&a, "copy"), one["uuid"].as_str().expect("a word"));
    // Its guest had the other's address.
    let nets = fs::read_to_string(a.vms().join("copy.nets")).expect("given");
    let mac = two["ports"][0]["mac"].as_str().expect("a word");
    assert_eq!(nets, format!("detach 0\nattach user,mac={mac}\n"));
    assert_eq!(snapshots(&a), [], "nothing is left of it");
    a.run(&["vm", "clone", "web", "--name", "copy"])
        .fails(4, "another VM copy on a");
    a.run(&["vm", "clone", "web", "--name", "web"])
        .fails(4, "another VM web on a");
    // It cannot be started: nothing of it stays.
    let files = images(&a);
    fs::write(a.vms().join("refuse"), "").expect("written");
    a.run(&["vm", "clone", "web", "--name", "third"])
        .fails(1, "cannot be started here");
    assert!(a.vm("third").is_none() && snapshots(&a).is_empty());
    assert_eq!(images(&a), files);
}

#[test]
fn a_snapshot_is_carried_in_a_file() {
    let lab = Lab::new();
    let a = lab.first("a");
    a.run_vm(&lab, "web");
    let uuid = a.vm("web").expect("there")["uuid"].clone();
    a.run(&["vm", "snapshot", "web", "--as", "one"]).ok();
    let file = lab.path().join("one.tar.zst").display().to_string();
    a.run(&["vm", "export", "one", &file]).ok();
    a.run(&["vm", "export", "one", &file])
        .fails(4, "is there already");
    a.run(&["vm", "import", &file])
        .fails(4, "another snapshot one");
    a.run(&["vm", "import", &file, "--as", "again"]).ok();

    // Another cluster.
    let other = lab.first("other");
    let text = lab.path().join("text").display().to_string();
    fs::write(&text, "a text").expect("written");
    other.run(&["vm", "import", &text]).fails(2, "give a file");
    other
        .run(&["vm", "import", "/nowhere"])
        .fails(2, "/nowhere");
    let mut bytes = fs::read(&file).expect("there");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&text, bytes).expect("written");
    other.run(&["vm", "import", &text]).fails(2, "");
    assert_eq!(images(&other), 0);
    other.run(&["vm", "import", &file]).ok();
    other.run(&["vm", "restore", "one", "--name", "there"]).ok();
    assert_eq!(other.phase("there").as_deref(), Some("running"));
    assert_eq!(was(&other, "there"), uuid.as_str().expect("a word"));
}
