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

/// One of a VM's disks, which is a text.
fn disk(node: &Node, vm: &str, file: &str) -> std::path::PathBuf {
    node.data().join("vms").join(vm).join(file)
}

/// Its guest writes to its disk.
fn write(node: &Node, vm: &str, text: &str) {
    let path = disk(node, vm, "disk0.qcow2");
    let mut image: Value =
        serde_json::from_slice(&fs::read(&path).expect("there")).expect("an image");
    image["text"] = text.into();
    fs::write(path, image.to_string()).expect("written");
}

fn reads(node: &Node, vm: &str) -> String {
    let image = fs::read(disk(node, vm, "disk0.qcow2")).expect("there");
    let image: Value = serde_json::from_slice(&image).expect("an image");
    image["text"].as_str().unwrap_or_default().to_owned()
}

fn is_stopped(node: &Node, vm: &str) -> bool {
    node.phase(vm).is_none() && node.vm(vm).expect("there")["life"] == "stopped"
}

#[test]
fn a_vm_that_is_stopped_is_its_disks() {
    let lab = Lab::new();
    let a = lab.first("a");
    let b = lab.joined("b", &a);
    let image = lab.image("base.raw", 1 << 20).display().to_string();
    a.run(&["image", "add", &image]).ok();
    // A disk that is no image of the node's.
    let raw = lab.path().join("more.raw");
    fs::write(&raw, "more".repeat(128)).expect("written");
    let more = raw.display().to_string();
    let run = [
        "vm", "run", "base", "--name", "web", "--memory", "16M", "--cpus", "2", "--net", "user",
    ];
    a.run(&[&run[..], &["--disk", &more]].concat()).ok();
    let before = a.vm("web").expect("there");
    write(&a, "web", "one");
    a.run(&["vm", "stop", "web"]).ok();
    let said = b.run(&["vm", "snapshot", "web", "--as", "one"]).ok().out;
    assert!(said.contains("of its disks: it is stopped"), "{said}");
    assert!(is_stopped(&a, "web"));
    let listed = b.run(&["snapshot", "list"]).ok().out;
    assert!(listed.contains("stopped"), "{listed}");
    let json = b.run(&["snapshot", "list", "--json"]).json();
    assert_eq!(
        (&json[0]["kind"], &json[0]["stood_ms"]),
        (&"stopped".into(), &0.into())
    );
    // The same once more is the same file.
    let files = images(&a);
    a.run(&["vm", "snapshot", "web", "--as", "two"]).ok();
    assert_eq!(images(&a), files);
    a.run(&["snapshot", "rm", "two"]).ok();

    // What comes after it is not in it.
    a.run(&["vm", "start", "web"]).ok();
    write(&a, "web", "two");
    a.run(&["vm", "snapshot", "web", "--as", "runs"]).ok();
    let listed = a.run(&["snapshot", "list"]).ok().out;
    assert!(listed.contains("running"), "{listed}");
    a.run(&["snapshot", "rm", "runs"]).ok();
    a.run(&["vm", "stop", "web"]).ok();
    b.run(&["vm", "restore", "one"])
        .fails(4, "another VM web on a");
    a.run(&["vm", "rm", "web"]).ok();
    fs::remove_file(&raw).expect("the user's own");
    a.run(&["image", "rm", "base"]).fails(4, "the snapshot one");
    b.run(&["vm", "restore", "one", "--lazy"])
        .fails(2, "no memory");
    assert!(b.vm("web").is_none());

    // The same VM boots at the other node.
    let said = b.run(&["vm", "restore", "one"]).ok().out;
    assert!(said.contains("web runs on b"), "{said}");
    assert!(!b.vms().join("web.was").exists(), "it boots");
    assert_eq!(reads(&b, "web"), "one");
    let second = fs::read_to_string(disk(&b, "web", "disk1.raw")).expect("there");
    assert_eq!(second, "more".repeat(128));
    let after = b.vm("web").expect("there");
    assert_eq!(
        (&after["uuid"], &after["ports"], &after["spec"]),
        (&before["uuid"], &before["ports"], &before["spec"])
    );
    // What it was made of is needed no more.
    b.run(&["vm", "stop", "web"]).ok();
    a.run(&["snapshot", "rm", "one"]).ok();
    a.run(&["image", "rm", "base"]).ok();
    assert_eq!(images(&a), 0);
    assert_eq!(images(&b), 1, "the base");
    b.run(&["vm", "start", "web"]).ok();
    assert_eq!(reads(&b, "web"), "one");

    // One that has ended by itself is stopped, whether that was noted or not.
    b.kill_vm("web");
    let said = b.run(&["vm", "snapshot", "web", "--as", "ended"]).ok().out;
    assert!(said.contains("of its disks"), "{said}");
    // A disk that is gone is not an empty one.
    fs::remove_file(disk(&b, "web", "disk0.qcow2")).expect("there");
    b.run(&["vm", "snapshot", "web", "--as", "gone"])
        .fails(1, "disk0.qcow2");
    assert_eq!(snapshots(&b).len(), 1);
    assert_eq!(images(&b), 2, "the base and what has ended");
}

#[test]
fn a_copy_of_a_stopped_vm_boots() {
    let lab = Lab::new();
    let a = lab.first("a");
    a.run_vm(&lab, "web");
    write(&a, "web", "one");
    a.run(&["vm", "stop", "web"]).ok();
    a.run(&["vm", "clone", "web", "--name", "copy"]).ok();
    let (one, two) = (a.vm("web").expect("there"), a.vm("copy").expect("there"));
    assert!(is_stopped(&a, "web"));
    assert_eq!(a.phase("copy").as_deref(), Some("running"));
    assert_ne!(one["uuid"], two["uuid"]);
    assert_ne!(one["ports"][0]["mac"], two["ports"][0]["mac"]);
    assert_eq!(reads(&a, "copy"), "one");
    // It boots with its own networks.
    assert!(!a.vms().join("copy.was").exists() && !a.vms().join("copy.nets").exists());
    assert_eq!(snapshots(&a), []);
    assert_eq!(images(&a), 1, "the base");
    // It cannot be started: nothing of it stays.
    fs::write(a.vms().join("refuse"), "").expect("written");
    a.run(&["vm", "clone", "web", "--name", "third"])
        .fails(1, "cannot be started here");
    assert!(a.vm("third").is_none() && snapshots(&a).is_empty());
    assert_eq!(images(&a), 1);
    assert!(!a.data().join("vms/third").exists());
}

#[test]
fn a_start_waits_until_the_snapshot_is_taken() {
    let lab = Lab::new();
    let mut a = lab.first("a");
    a.run_vm(&lab, "web");
    a.run(&["vm", "stop", "web"]).ok();
    lab.hold("saving");
    let taking = a.begin(&["vm", "snapshot", "web", "--as", "one"]);
    lab.wait_held("saving");
    let mut starting = a.begin(&["vm", "start", "web"]);
    std::thread::sleep(std::time::Duration::from_millis(300));
    assert!(starting.try_wait().expect("asked").is_none());
    assert!(a.phase("web").is_none());
    lab.release("saving");
    assert!(taking.wait_with_output().expect("ended").status.success());
    assert!(starting.wait().expect("ended").success());
    assert_eq!(a.phase("web").as_deref(), Some("running"));

    // Whoever took it is gone, and what he began goes on: it is refused meanwhile.
    a.run(&["vm", "stop", "web"]).ok();
    a.run(&["snapshot", "rm", "one"]).ok();
    lab.hold("saving");
    let mut taking = a.begin(&["vm", "snapshot", "web", "--as", "one"]);
    lab.wait_held("saving");
    a.restart();
    a.run(&["vm", "start", "web"]).fails(1, "in use");
    assert!(a.vm("web").expect("there")["life"] == "stopped");
    lab.release("saving");
    let _ = taking.wait();
    until("it starts", || a.run(&["vm", "start", "web"]).code == 0);
    assert_eq!(snapshots(&a), []);
    assert_eq!(images(&a), 1, "the base");

    // Its user goes away: it is not taken, and the VM is free.
    a.run(&["vm", "stop", "web"]).ok();
    lab.hold("saving");
    let mut taking = a.begin(&["vm", "snapshot", "web", "--as", "one"]);
    lab.wait_held("saving");
    let _ = taking.kill();
    let _ = taking.wait();
    until("it starts", || a.run(&["vm", "start", "web"]).code == 0);
    lab.release("saving");
    assert_eq!(snapshots(&a), []);
    until("nothing is left of it", || images(&a) == 1);
}

#[test]
fn a_stopped_vm_is_carried_in_a_file() {
    let lab = Lab::new();
    let a = lab.first("a");
    a.run_vm(&lab, "web");
    write(&a, "web", "one");
    a.run(&["vm", "stop", "web"]).ok();
    a.run(&["vm", "snapshot", "web", "--as", "one"]).ok();
    let file = lab.path().join("one.tar.zst").display().to_string();
    a.run(&["vm", "export", "one", &file]).ok();
    let other = lab.first("other");
    let flipped = lab.path().join("flipped").display().to_string();
    let mut bytes = fs::read(&file).expect("there");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&flipped, bytes).expect("written");
    other.run(&["vm", "import", &flipped]).fails(2, "");
    assert_eq!(images(&other), 0);
    other.run(&["vm", "import", &file]).ok();
    let listed = other.run(&["snapshot", "list", "--json"]).json();
    assert_eq!(listed[0]["kind"], "stopped");
    // A file that is damaged where it is kept: it is not what it was, and nothing of a VM stays.
    let saved = listed[0]["saved"]["hash"].as_str().expect("a word");
    let kept = other.data().join("images").join(saved);
    let good = fs::read(&kept).expect("there");
    fs::remove_file(&kept).expect("removed");
    fs::write(&kept, &good[1..]).expect("written");
    other.run(&["vm", "restore", "one"]).fails(1, "is damaged");
    assert!(other.vm("web").is_none());
    assert!(!other.data().join("vms/web").exists());
    fs::write(&kept, &good).expect("written");
    other.run(&["vm", "restore", "one", "--name", "there"]).ok();
    assert_eq!(other.phase("there").as_deref(), Some("running"));
    assert_eq!(reads(&other, "there"), "one");
}
