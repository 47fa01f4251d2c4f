//! Nodes, their users, and VMs that move between them.

mod common;

use std::fs;
use std::io::{BufRead as _, BufReader};

use common::{Lab, Node, until};
use serde_json::{Value, json};

#[test]
fn a_node_joins_by_a_token_that_is_good_once() {
    let lab = Lab::new();
    let a = lab.first("a");
    let token = a.token();
    let mut b = lab.host("b");
    b.start(&["--join", &token], &[]);
    let names = |node: &common::Node| {
        let nodes = node.run(&["node", "list", "--json"]).json();
        let all = nodes.as_array().expect("a list").iter();
        all.map(|it| it["name"].as_str().expect("a name").to_owned())
            .collect::<Vec<_>>()
    };
    assert_eq!(names(&a), ["a", "b"]);
    assert_eq!(names(&b), ["a", "b"]);

    let mut c = lab.host("c");
    c.spawn(&["--join", &token], &[]);
    until("c is refused", || c.has_died());
    assert!(c.log().contains("used up"), "{}", c.log());
    let unknown = format!("{}{}", "0".repeat(32), &token[32..]);
    c.spawn(&["--join", &unknown], &[]);
    until("c is refused", || c.has_died());
    assert!(c.log().contains("unknown here"), "{}", c.log());
    // Another CA than the token's: it tells it nothing.
    let other_ca = format!("{}.{}@{}", &token[..32], "0".repeat(64), a.address());
    c.spawn(&["--join", &other_ca], &[]);
    until("c refuses", || c.has_died());
    assert!(c.log().contains("not who it should be"), "{}", c.log());

    // A name that is taken, and a node that has a cluster of its own and is alone in it.
    let second = a.token();
    let mut twin = lab.host("b2");
    twin.name = "b".into();
    twin.spawn(&["--join", &second], &[]);
    until("the twin is refused", || twin.has_died());
    assert!(
        twin.log().contains("there is a node b already"),
        "{}",
        twin.log()
    );
    c.start(&[], &[]);
    c.run(&["node", "join", "nonsense"])
        .fails(2, "no join token");
    c.run(&["node", "join", &second]).ok();
    assert_eq!(names(&c), ["a", "b", "c"]);
    until("b hears of it", || names(&b) == ["a", "b", "c"]);
    c.run(&["node", "join", &a.token()]).fails(4, "already");
    // Only one node has the CA's key; it is asked by its name.
    b.run(&["node", "token"]).fails(7, "CA");
    b.run(&["node", "token", "--node", "a"]).ok();

    // What belongs to the cluster is kept.
    c.restart();
    assert_eq!(names(&c), ["a", "b", "c"]);
    until("it is reachable", || {
        let nodes = a.run(&["node", "list", "--json"]).json();
        nodes
            .as_array()
            .expect("a list")
            .iter()
            .all(|it| it["reachable"] == true)
    });
    a.run(&["node", "doctor"]).ok();

    a.run(&["node", "remove", "c"]).ok();
    until("c is not let in", || {
        c.run(&["vm", "list", "--node", "a"]).code == 5
            && c.run(&["vm", "list", "--node", "b"]).code == 5
    });
    assert_eq!(names(&a), ["a", "b"]);
    a.run(&["node", "remove", "a"]).fails(4, "CA's key");
    a.run(&["vm", "list", "--node", "c"]).fails(3, "no node c");
}

#[test]
fn a_vm_is_run_stopped_started_and_removed() {
    let lab = Lab::new();
    let a = lab.first("a");
    let b = lab.joined("b", &a);
    a.run_vm(&lab, "web");
    let vm = a.vm("web").expect("there");
    assert_eq!(vm["life"], "running");
    let mac = vm["ports"][0]["mac"]
        .as_str()
        .expect("an address")
        .to_owned();
    assert!(mac.starts_with("02:"), "{mac}");

    // Twice is as once; another one is another one, wherever it is.
    a.run_vm(&lab, "web");
    assert_eq!(a.vm("web").expect("there")["uuid"], vm["uuid"]);
    let other = ["vm", "run", "base", "--name", "web", "--memory", "32M"];
    a.run(&other).fails(4, "another VM web");
    b.run(&other).fails(4, "another VM web on a");
    a.run(&["vm", "run", "base", "--name", "big", "--memory", "900T"])
        .fails(6, "memory available");
    a.run(&["vm", "run", "none", "--name", "x"])
        .fails(3, "no image none");
    a.run(&["vm", "run", "--name", "x"])
        .fails(2, "nothing to boot");
    a.run(&["vm", "run", "base", "--name", "a/b"])
        .fails(2, "no name of a VM");
    a.run(&["vm", "run", "base", "--name", "x", "--net", "nowhere"])
        .fails(2, "no network");
    a.run(&["vm", "show", "x"]).fails(3, "no VM x");
    // What cannot be started leaves nothing.
    fs::write(a.vms().join("refuse"), "").expect("written");
    a.run(&["vm", "run", "base", "--name", "x", "--memory", "16M"])
        .fails(1, "try something else");
    assert!(a.vm("x").is_none() && !a.data().join("vms/x").exists());
    fs::remove_file(a.vms().join("refuse")).expect("removed");

    // Its kernel goes when nothing needs it any more.
    let kernel = lab.image("kernel", 4096).display().to_string();
    let images = || {
        fs::read_dir(a.data().join("images"))
            .expect("there")
            .count()
    };
    let before = images();
    a.run(&[
        "vm", "run", "--name", "k", "--memory", "16M", "--kernel", &kernel,
    ])
    .ok();
    assert_eq!(images(), before + 1);
    a.run(&["vm", "stop", "k"]).ok();
    a.run(&["vm", "rm", "k"]).ok();
    assert_eq!(images(), before);

    // From the other node, by name.
    assert_eq!(b.listed("web"), [("a".to_owned(), "running".to_owned())]);
    assert!(b.run(&["vm", "logs", "web"]).ok().out.contains("boots"));
    b.run(&["vm", "rm", "web"]).fails(4, "stop it first");
    b.run(&["vm", "stop", "web"]).ok();
    assert_eq!(
        (
            a.phase("web"),
            &*a.vm("web").expect("there")["life"].to_string()
        ),
        (None, "\"stopped\"")
    );
    b.run(&["vm", "migrate", "web", "--to", "b"])
        .fails(4, "does not run");
    b.run(&["vm", "start", "web"]).ok();
    assert_eq!(a.vm("web").expect("there")["ports"][0]["mac"], mac.as_str());
    let mut console = b.begin(&["vm", "console", "web"]);
    let mut said = BufReader::new(console.stdout.take().expect("piped"));
    let mut line = String::new();
    said.read_line(&mut line).expect("read");
    assert_eq!(line, "console of web\n");
    console.kill().expect("killed");
    console.wait().expect("ended");

    // It ends by itself.
    a.kill_vm("web");
    until("it is seen", || {
        a.vm("web").expect("there")["life"] == "stopped"
    });
    assert!(a.vm("web").expect("there")["trouble"].is_string());
    a.run(&["image", "rm", "base"]).fails(4, "stands on it");
    b.run(&["vm", "rm", "web"]).ok();
    assert!(a.vm("web").is_none() && !a.data().join("vms/web").exists());
    a.run(&["image", "rm", "base"]).ok();
    assert_eq!(
        fs::read_dir(a.data().join("images"))
            .expect("there")
            .count(),
        0
    );
}

#[test]
fn a_vm_gets_the_cpu_that_its_nodes_have() {
    let lab = Lab::new();
    let a = lab.first("a");
    let b = lab.joined("b", &a);
    let cpu = |node: &Node, features: &[&str], hides_all| {
        let cpu = json!({
            "host": "fake", "vendor": "FakeFakeFake", "features": features,
            "hides_all": hides_all, "components": { "avx": ["avx"] },
        });
        fs::write(node.vms().join("cpu.json"), cpu.to_string()).expect("written");
    };
    cpu(&a, &["aes", "avx", "sse2"], false);
    cpu(&b, &["aes", "sha_ni", "sse2"], true);
    let image = lab.image("base.raw", 1 << 20);
    a.run(&["image", "add", &image.display().to_string()]).ok();
    let run = |name: &str, option: &str, of: &str| {
        a.run(&[
            "vm", "run", "base", "--name", name, "--memory", "16M", option, of,
        ])
    };
    run("web", "--cpu-for", "b").ok();
    assert_eq!(
        a.vm("web").expect("there")["spec"]["cpu"],
        "host,-avx,-sha_ni"
    );
    let told = |node: &Node, name: &str| fs::read_to_string(node.vms().join(name)).ok();
    assert_eq!(told(&a, "web.cpu").as_deref(), Some("host,-avx,-sha_ni"));
    // Where it comes from another node it has one already.
    a.run(&["vm", "migrate", "web", "--to", "b"]).ok();
    assert_eq!(told(&b, "web.cpu"), None);
    b.run(&["vm", "stop", "web"]).ok();
    b.run(&["vm", "start", "web"]).ok();
    assert_eq!(told(&b, "web.cpu").as_deref(), Some("host,-avx,-sha_ni"));

    run("one", "--cpu", "x86-64-v2").ok();
    assert_eq!(told(&a, "one.cpu").as_deref(), Some("x86-64-v2"));
    cpu(&b, &["avx", "sse2"], true);
    run("two", "--cpu-for", "b").fails(6, "cannot hide aes from");
    run("two", "--cpu-for", "c").fails(3, "no node c");
}

#[test]
fn a_vm_moves_there_and_back_with_what_it_stands_on() {
    let lab = Lab::new();
    let a = lab.first("a");
    let b = lab.joined("b", &a);
    a.run_vm(&lab, "web");
    let before = a.vm("web").expect("there");
    a.run(&["vm", "migrate", "web", "--to", "c"])
        .fails(3, "no node c");
    a.run(&["vm", "migrate", "web", "--to", "a"])
        .fails(4, "already");
    assert!(
        a.run(&["vm", "migrate", "web", "--to", "b", "--dry-run"])
            .ok()
            .out
            .contains("can move")
    );
    until("nothing of it is left", || b.vm("web").is_none());
    assert_eq!(b.phase("web"), None);

    let said = a
        .run(&["vm", "migrate", "web", "--to", "b", "--id", "first"])
        .ok();
    assert!(
        said.out.contains("runs on b") && said.out.contains("25 ms"),
        "{said:?}"
    );
    // The same operation again is the same operation, and not another move.
    assert_eq!(
        a.run(&[
            "vm", "migrate", "web", "--to", "b", "--id", "first", "--node", "a"
        ])
        .ok()
        .out,
        said.out
    );
    a.run(&[
        "vm", "migrate", "web", "--to", "c", "--id", "first", "--node", "a",
    ])
    .fails(4, "another one");
    assert_eq!(
        (a.phase("web"), b.phase("web").as_deref()),
        (None, Some("running"))
    );
    assert!(a.vm("web").is_none() && !a.data().join("vms/web").exists());
    let after = b.vm("web").expect("there");
    assert_eq!(
        (&after["uuid"], &after["ports"]),
        (&before["uuid"], &before["ports"])
    );
    assert_eq!(after["disks"][0]["base"], before["disks"][0]["base"]);
    assert_eq!(after["place"]["is"], "here");
    let hash = after["disks"][0]["base"]
        .as_str()
        .expect("a hash")
        .to_owned();
    let fetched = fs::metadata(b.data().join("images").join(&hash)).expect("fetched");

    // Back, and there again: nothing is fetched twice.
    a.run(&["vm", "migrate", "web", "--to", "a"]).ok();
    b.run(&["vm", "migrate", "web", "--to", "b"]).ok();
    let again = fs::metadata(b.data().join("images").join(&hash)).expect("there");
    assert_eq!(
        fetched.modified().expect("a time"),
        again.modified().expect("a time")
    );
    assert_eq!(a.listed("web"), [("b".to_owned(), "running".to_owned())]);
    assert_eq!(b.log().matches("image.fetched").count(), 1, "{}", b.log());

    // It is not cancelled afterwards.
    a.run(&["vm", "cancel", "web"]).fails(4, "not being moved");
}

#[test]
fn a_move_is_cancelled_or_refused() {
    let lab = Lab::new();
    let a = lab.first("a");
    let b = lab.joined("b", &a);
    a.run_vm(&lab, "web");
    lab.hold("copying");
    let moving = a.begin(&["vm", "migrate", "web", "--to", "b"]);
    lab.wait_held("copying");
    // Meanwhile it is nobody's to change.
    a.run(&["vm", "stop", "web"]).fails(4, "on its way");
    a.run(&["vm", "migrate", "web", "--to", "b"])
        .fails(4, "on its way");
    assert_eq!(b.listed("web"), [("a".to_owned(), "sending".to_owned())]);
    a.run(&["vm", "cancel", "web"]).ok();
    lab.release("copying");
    let ended = moving.wait_with_output().expect("ended");
    assert_eq!(ended.status.code(), Some(1), "{ended:?}");
    until("it is as before", || {
        b.vm("web").is_none() && b.phase("web").is_none()
    });
    assert_eq!(a.vm("web").expect("there")["place"]["is"], "here");

    // The destination has another one by that name, or cannot start a process.
    fs::write(b.vms().join("refuse"), "").expect("written");
    a.run(&["vm", "migrate", "web", "--to", "b"])
        .fails(6, "cannot be started here");
    fs::remove_file(b.vms().join("refuse")).expect("removed");
    assert_eq!(a.phase("web").as_deref(), Some("running"));
    until("it is cleared away", || b.vm("web").is_none());
    a.run(&["vm", "migrate", "web", "--to", "b"]).ok();
}

#[test]
fn a_vm_in_doubt_is_asked_for_until_its_user_knows_better() {
    let lab = Lab::new();
    let a = lab.first("a");
    let b = lab.joined("b", &a);
    a.run_vm(&lab, "web");
    // The link breaks when it changes hands, and is whole again later.
    fs::write(lab.wire("cut"), "").expect("written");
    a.run(&[
        "vm",
        "migrate",
        "web",
        "--to",
        "b",
        "--id",
        "one",
        "--patience",
        "2",
    ])
    .fails(9, "stands still");
    a.run(&["node", "doctor"]).fails(1, "");
    assert_eq!(a.listed("web"), [("a".to_owned(), "doubt".to_owned())]);
    fs::remove_file(lab.wire("cut")).expect("removed");
    until("it has moved", || {
        a.operation("one").is_some_and(|it| it["state"] == "done")
    });
    assert_eq!(b.listed("web"), [("b".to_owned(), "running".to_owned())]);

    // The destination's process is killed before it has heard that it is to run the VM: its
    // agent knows that it never did.
    lab.hold("committed");
    let moving = b.begin(&["vm", "migrate", "web", "--to", "a", "--id", "none"]);
    lab.wait_held("committed");
    a.kill_vm("web");
    lab.release("committed");
    let ended = moving.wait_with_output().expect("ended");
    assert_eq!(ended.status.code(), Some(1), "{ended:?}");
    assert_eq!(a.listed("web"), [("b".to_owned(), "running".to_owned())]);
    until("nothing is left there", || a.vm("web").is_none());

    // It is killed when it has: nobody but the user can tell.
    lab.hold("given");
    let moving = b.begin(&[
        "vm",
        "migrate",
        "web",
        "--to",
        "a",
        "--id",
        "two",
        "--patience",
        "2",
    ]);
    lab.wait_held("given");
    a.kill_vm("web");
    lab.release("given");
    let ended = moving.wait_with_output().expect("ended");
    assert_eq!(ended.status.code(), Some(9), "{ended:?}");
    b.run(&["vm", "keep", "web"]).ok();
    until("it goes on", || {
        b.operation("two").is_some_and(|it| it["step"] == "over")
    });
    assert_eq!(a.listed("web"), [("b".to_owned(), "running".to_owned())]);
    until("nothing is left there", || a.vm("web").is_none());
    b.run(&["vm", "keep", "web"]).fails(4, "no doubt");
}

#[test]
fn the_source_ends_when_all_is_there() {
    let lab = Lab::new();
    let a = lab.first("a");
    let b = lab.joined("b", &a);
    a.run_vm(&lab, "web");
    // All of it is at the destination, which waits for a source that is gone for good: its
    // agent knows that, and has the VM go on there.
    lab.hold("received");
    let moving = a.begin(&["vm", "migrate", "web", "--to", "b", "--id", "one"]);
    lab.wait_held("received");
    a.kill_vm("web");
    lab.release("received");
    assert!(moving.wait_with_output().expect("ended").status.success());
    assert_eq!(a.listed("web"), [("b".to_owned(), "running".to_owned())]);
    // Not all of it was there: it has ended, and its node says so.
    lab.hold("copying");
    let moving = b.begin(&["vm", "migrate", "web", "--to", "a", "--id", "two"]);
    lab.wait_held("copying");
    b.kill_vm("web");
    lab.release("copying");
    assert!(!moving.wait_with_output().expect("ended").status.success());
    until("it has ended", || {
        b.vm("web").is_some_and(|vm| vm["life"] == "stopped")
    });
    until("nothing is left there", || a.vm("web").is_none());
    b.run(&["vm", "start", "web"]).ok();
}

#[test]
fn a_node_is_drained() {
    let lab = Lab::new();
    let a = lab.first("a");
    let b = lab.joined("b", &a);
    let c = lab.joined("c", &a);
    for name in ["one", "two", "three"] {
        a.run_vm(&lab, name);
    }
    a.run(&["node", "remove", "b", "--node", "b"])
        .fails(7, "CA");
    let said = b.run(&["node", "drain", "a", "--at-once", "2"]).ok();
    assert_eq!(
        said.out.matches("it stood still for 25 ms").count(),
        3,
        "{said:?}"
    );
    assert_eq!(
        a.run(&["vm", "list", "--node", "a", "--json"]).json(),
        Value::Array(Vec::new())
    );
    let here = |node: &common::Node| {
        let all = ["one", "two", "three"].into_iter();
        all.filter(|vm| node.phase(vm).as_deref() == Some("running"))
            .count()
    };
    assert_eq!((here(&a), here(&b) + here(&c)), (0, 3));
    let full = if here(&b) > 0 { "b" } else { "c" };
    a.run(&["node", "remove", full]).fails(4, "drain");
}

#[test]
fn a_drain_says_what_stays_and_is_cancelled() {
    let lab = Lab::new();
    let a = lab.first("a");
    let b = lab.joined("b", &a);
    a.run_vm(&lab, "one");
    a.run_vm(&lab, "two");
    a.run(&["vm", "stop", "two"]).ok();
    lab.hold("copying");
    let draining = b.begin(&["node", "drain", "a"]);
    lab.wait_held("copying");
    let all = b
        .run(&["operation", "list", "--node", "a", "--json"])
        .json();
    let drain = all.as_array().expect("a list").iter();
    let drain = drain.clone().find(|it| it["kind"] == "drain").expect("one");
    let id = drain["id"].as_str().expect("a word");
    b.run(&["operation", "cancel", id, "--node", "a"]).ok();
    until("the move is cancelled", || {
        a.phase("one").as_deref() == Some("running")
    });
    lab.release("copying");
    let ended = draining.wait_with_output().expect("ended");
    assert_eq!(ended.status.code(), Some(1), "{ended:?}");
    let said = String::from_utf8_lossy(&ended.stdout).into_owned();
    assert!(
        said.contains("one stays") && said.contains("two stays: two does not run"),
        "{said}"
    );
    until("nothing is left there", || b.vm("one").is_none());

    let said = b.run(&["node", "drain", "a"]).fails(1, "still here: two");
    assert!(said.out.contains("one runs on b"), "{said:?}");
    a.run(&["vm", "rm", "two"]).ok();
    b.run(&["node", "drain", "a"]).ok();
}

#[test]
fn an_instance_becomes_a_node_by_ssh() {
    let lab = Lab::new();
    let a = lab.first("a");
    let mut b = lab.host("b");
    // What ssh would do there.
    let bin = lab.path().join("bin");
    fs::create_dir(&bin).expect("made");
    let script = |name: &str, text: String| {
        let path = bin.join(name);
        fs::write(&path, format!("#!/bin/sh\n{text}\n")).expect("written");
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        fs::set_permissions(&path, mode).expect("set");
        path.display().to_string()
    };
    let log = lab.path().join("ssh.log").display().to_string();
    let there = b.environment();
    let ssh = script(
        "ssh",
        format!(
            "echo \"$1 $2\" >>{log}; export {there} PATH={}:$PATH; exec sh -c \"$3\"",
            bin.display()
        ),
    );
    let add = |more: &[&str]| {
        let words = [&["node", "add", "ssh://root@b"], more].concat();
        a.run_with(&words, &[("SUPERCLOUD_SSH", &ssh)])
    };
    add(&[]).fails(1, "--package");
    script(
        "supercloud",
        format!("exec {} \"$@\"", env!("CARGO_BIN_EXE_supercloud")),
    );
    script("systemctl", "exit 1".into());
    add(&[]).fails(1, "journalctl");
    b.start(&[], &[]);
    let said = add(&[]).ok();
    assert!(said.out.contains("joined: a, b"), "{said:?}");
    assert_eq!(
        fs::read_to_string(&log).expect("called").lines().last(),
        Some("root@b --")
    );
    until("they know each other", || {
        a.run(&["node", "doctor"]).code == 0
    });
    // Its packages come first.
    let package = lab.path().join("x.deb");
    fs::write(&package, "a package").expect("written");
    script(
        "apt-get",
        format!("cp $3 {}/installed", lab.path().display()),
    );
    let name = package.display().to_string();
    let _ = add(&["--package", &name]);
    assert_eq!(
        fs::read_to_string(lab.path().join("installed")).expect("there"),
        "a package"
    );
    add(&["--package", "/nowhere.deb"]).fails(2, "no package");
    let gone = script("gone", "exit 255".into());
    a.run_with(&["node", "add", "ssh://b"], &[("SUPERCLOUD_SSH", &gone)])
        .fails(5, "ssh b true");
    a.run(&["node", "add", "b"]).fails(2, "ssh://");
}

#[test]
fn what_cloud_init_is_told_goes_with_the_vm() {
    let lab = Lab::new();
    let a = lab.first("a");
    let b = lab.joined("b", &a);
    let user = lab.path().join("user-data").display().to_string();
    let image = lab.image("base.raw", 1 << 20).display().to_string();
    a.run(&["image", "add", &image]).ok();
    let run = [
        "vm",
        "run",
        "base",
        "--name",
        "web",
        "--memory",
        "16M",
        "--cloud-init",
        &user,
    ];
    a.run(&run).fails(2, "user-data");
    assert!(a.vm("web").is_none());
    fs::write(&user, "#cloud-config\n").expect("written");
    a.run(&run).ok();
    a.run(&run).ok();
    let seed =
        |node: &common::Node| fs::read_to_string(node.data().join("vms/web/seed")).expect("there");
    assert_eq!(seed(&a), "#cloud-config\n");
    fs::write(&user, "#another\n").expect("written");
    b.run(&["vm", "migrate", "web", "--to", "b"]).ok();
    assert_eq!(seed(&b), "#cloud-config\n");
    b.run(&["vm", "stop", "web"]).ok();
    b.run(&["vm", "start", "web"]).ok();
    assert_eq!(seed(&b), "#cloud-config\n");
}

#[test]
fn ports_that_lead_to_the_nodes_are_not_published() {
    let lab = Lab::new();
    let a = lab.first("a");
    let own = format!("{}:80", a.port());
    for (port, code, word) in [
        ("22:22", 2, "2222:22"),
        (own.as_str(), 2, "the nodes themselves"),
        ("none", 2, "8080:80"),
    ] {
        a.run(&[
            "vm",
            "run",
            "--name",
            "web",
            "--kernel",
            "/k",
            "--net",
            "demo",
            "--publish",
            port,
        ])
        .fails(code, word);
    }
}

#[test]
fn commands_without_an_agent_say_so() {
    let lab = Lab::new();
    let a = lab.host("a");
    a.run(&["vm", "list"]).fails(5, "supercloud node start");
    let said = a.run(&["vm", "list", "--json"]);
    let error: Value = serde_json::from_str(&said.err).expect("JSON");
    assert_eq!(error["code"], "unreachable");
}
