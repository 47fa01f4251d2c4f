//! A VM whose memory follows it: until all has, whatever ends in between ends it, and its nodes say
//! so.

mod common;

use common::{Lab, Node, until};
use serde_json::Value;

const NOW: [&str; 7] = ["vm", "migrate", "web", "--to", "b", "--post-copy", "now"];

/// Two nodes, and a VM on its way whose memory has not all followed it.
fn following(lab: &Lab) -> (Node, Node, std::process::Child) {
    let a = lab.first("a");
    let b = lab.joined("b", &a);
    a.run_vm(lab, "web");
    lab.hold("pulling");
    let words = [&NOW[..], &["--id", "one", "--patience", "2"]].concat();
    let moving = a.begin(&words);
    lab.wait_held("pulling");
    (a, b, moving)
}

fn word<'a>(value: &'a Value, name: &str) -> &'a str {
    value[name].as_str().unwrap_or_default()
}

/// The move is over, and has failed; the VM is at its destination, stopped, and can be started.
fn was_ended(a: &Node, b: &Node) {
    until("the operation is over", || {
        a.operation("one").is_some_and(|it| it["step"] == "over")
    });
    let operation = a.operation("one").expect("there");
    assert_eq!(operation["state"], "failed", "{operation}");
    let text = word(&operation["error"], "message");
    assert!(text.contains("before all of its memory"), "{text}");
    assert_eq!((a.phase("web"), b.phase("web")), (None, None));
    assert!(a.vm("web").is_none());
    let vm = b.vm("web").expect("there");
    assert_eq!(
        (word(&vm, "life"), word(&vm["place"], "is")),
        ("stopped", "here")
    );
    assert!(word(&vm, "trouble").contains("memory"), "{vm}");
    a.run(&["vm", "start", "web"]).ok();
    assert_eq!(b.phase("web").as_deref(), Some("running"));
}

#[test]
fn it_runs_there_before_all_is_there() {
    let lab = Lab::new();
    let (a, b, moving) = following(&lab);
    assert_eq!(a.listed("web"), [("b".to_owned(), "pulling".to_owned())]);
    assert_eq!(a.phase("web").as_deref(), Some("serving"));
    // It is the other node's already, and can neither stay nor move on.
    until("its node has seen it", || {
        b.vm("web").is_some_and(|vm| vm["place"]["is"] == "here")
    });
    let listed = a.run(&["vm", "list"]).ok().out;
    assert!(listed.contains("running, its memory follows"), "{listed}");
    let listed = a.run(&["vm", "list", "--node", "a"]).ok().out;
    assert!(listed.contains("gone to b, its memory follows"), "{listed}");
    a.run(&["vm", "cancel", "web", "--node", "a"]).fails(4, "");
    a.run(&["vm", "keep", "web", "--node", "a"])
        .fails(4, "what it has done there is not here");
    b.run(&["vm", "migrate", "web", "--to", "a", "--node", "b"])
        .fails(4, "");
    lab.release("pulling");
    let ended = moving.wait_with_output().expect("ended");
    assert!(ended.status.success(), "{ended:?}");
    assert_eq!(a.listed("web"), [("b".to_owned(), "running".to_owned())]);
    assert!(a.vm("web").is_none());
    // Nothing follows one that comes whole.
    b.run(&["vm", "migrate", "web", "--to", "a", "--post-copy", "never"])
        .ok();
    a.run(&["vm", "migrate", "web", "--to", "b", "--post-copy", "soon"])
        .fails(2, "auto");
}

#[test]
fn its_source_ends_too_early() {
    let lab = Lab::new();
    let (a, b, moving) = following(&lab);
    a.kill_vm("web");
    // Whoever sends it has seen that, and told the destination.
    lab.release("pulling");
    let ended = moving.wait_with_output().expect("ended");
    assert_eq!(ended.status.code(), Some(1), "{ended:?}");
    was_ended(&a, &b);
}

#[test]
fn its_source_ends_and_nobody_has_seen_it() {
    let lab = Lab::new();
    let (mut a, b, mut moving) = following(&lab);
    a.kill();
    a.kill_senders();
    a.kill_vm("web");
    a.start(&[], &[]);
    was_ended(&a, &b);
    let _ = moving.kill();
    let _ = moving.wait();
}

#[test]
fn its_destination_ends_too_early() {
    let lab = Lab::new();
    let (a, b, moving) = following(&lab);
    until("its node has seen it", || {
        b.vm("web").is_some_and(|vm| vm["place"]["is"] == "here")
    });
    b.kill_vm("web");
    lab.release("pulling");
    // What the source still has is of no use to anybody.
    until("nothing is left at the source", || {
        a.phase("web").is_none() && a.vm("web").is_none()
    });
    let _ = moving.wait_with_output();
    let vm = b.vm("web").expect("there");
    assert_eq!(word(&vm, "life"), "stopped", "{vm}");
    a.run(&["vm", "start", "web"]).ok();
}

#[test]
fn the_link_breaks_while_it_follows() {
    let lab = Lab::new();
    let (a, b, moving) = following(&lab);
    std::fs::write(lab.wire("cut"), "").expect("written");
    lab.release("pulling");
    let ended = moving.wait_with_output().expect("ended");
    assert_eq!(ended.status.code(), Some(9), "{ended:?}");
    let text = String::from_utf8_lossy(&ended.stderr).into_owned();
    assert!(text.contains("as far as it has its memory"), "{text}");
    assert_eq!(a.phase("web").as_deref(), Some("cut"));
    std::fs::remove_file(lab.wire("cut")).expect("removed");
    until("it has moved", || {
        a.operation("one").is_some_and(|it| it["state"] == "done")
    });
    assert_eq!(b.listed("web"), [("b".to_owned(), "running".to_owned())]);
}
