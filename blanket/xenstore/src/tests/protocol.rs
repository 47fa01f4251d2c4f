//! The newer parts of the protocol, refusals, and limits of a transaction.

use super::{GUEST, ask, domain, done, error, path, replies};
use crate::testing::{SMALL, check, three_clients};
use crate::wire::Kind;
use crate::*;

#[test]
fn a_watch_may_have_a_depth() {
    let (mut store, host, mut guest) = domain();
    let (s, g) = (&mut store, &mut guest);
    for (token, depth) in [("node", "0"), ("children", "1"), ("all", "")] {
        let payload = format!("data\0{token}\0{depth}\0");
        assert_eq!(ask(s, g, Kind::Watch, 0, payload.as_bytes()).len(), 2);
    }
    let mut told = |at: &str| -> Vec<String> {
        let at = path(&format!("/local/domain/1/{at}"));
        store.write(host, None, &at, b"").expect("domain 0");
        guest.collect_events(&mut store);
        let tokens = replies(&mut guest).into_iter().map(|(_, payload)| {
            let text = String::from_utf8(payload).expect("text");
            text.split('\0').nth(1).expect("a token").to_owned()
        });
        tokens.collect()
    };
    assert_eq!(told("data"), ["node", "children", "all"]);
    assert_eq!(told("data/a"), ["children", "all"]);
    assert_eq!(told("data/a/b"), ["all"]);
    // What is removed above is told whatever the depth.
    let home = path("/local/domain/1/data");
    store.remove(host, None, &home).expect("domain 0");
    guest.collect_events(&mut store);
    assert_eq!(replies(&mut guest).len(), 3);
    let (s, g) = (&mut store, &mut guest);
    for (kind, payload, errno) in [
        (Kind::Watch, &b"data\0t\0-1\0"[..], "EINVAL"),
        (Kind::Watch, b"data\0t\0+1\0", "EINVAL"),
        (Kind::Watch, b"data\0t\x004294967296\0", "EINVAL"),
        (Kind::Watch, b"data\0t\x001\x001\0", "EINVAL"),
        (Kind::Watch, b"data\0", "EINVAL"),
        // The same watch, by whatever name and depth.
        (Kind::Watch, b"data\0all\x002\0", "EEXIST"),
        (Kind::Watch, b"/local/domain/1/data\0all\0", "EEXIST"),
        (Kind::Unwatch, b"data\0all\x001\0", "EINVAL"),
    ] {
        assert_eq!(ask(s, g, kind, 0, payload), error(errno), "{payload:?}");
    }
    let by_other_name = b"/local/domain/1/data\0all\0";
    assert_eq!(
        ask(s, g, Kind::Unwatch, 0, by_other_name),
        done(Kind::Unwatch)
    );
}

#[test]
fn privileged_requests_are_refused_and_the_host_has_calls() {
    let (mut store, _, mut guest) = domain();
    let mut tools = Connection::new(&mut store, 0);
    let s = &mut store;
    for kind in [
        Kind::Control,
        Kind::Introduce,
        Kind::Release,
        Kind::Resume,
        Kind::SetTarget,
        Kind::SetFeature,
        Kind::GetQuota,
        Kind::SetQuota,
    ] {
        assert_eq!(
            ask(s, &mut guest, kind, 0, b"1\0"),
            error("EACCES"),
            "{kind:?}"
        );
        assert_eq!(
            ask(s, &mut tools, kind, 0, b"1\0"),
            error("ENOSYS"),
            "{kind:?}"
        );
    }
    for payload in [&b""[..], b"\0"] {
        let reply = [(Kind::GetFeature, b"6\0".to_vec())];
        assert_eq!(ask(s, &mut guest, Kind::GetFeature, 0, payload), reply);
        assert_eq!(ask(s, &mut tools, Kind::GetFeature, 0, payload), reply);
    }
    let feature =
        |s: &mut Store, end: &mut Connection, payload| ask(s, end, Kind::GetFeature, 0, payload);
    assert_eq!(feature(s, &mut guest, b"1\0"), error("EACCES"));
    assert_eq!(
        feature(s, &mut tools, b"1\0"),
        [(Kind::GetFeature, b"6\0".to_vec())]
    );
    assert_eq!(feature(s, &mut tools, b"9\0"), error("ENOENT"));
    let g = &mut guest;
    let introduced = |t: &[u8]| [(Kind::IsDomainIntroduced, [t, b"\0"].concat())];
    assert_eq!(
        ask(s, g, Kind::IsDomainIntroduced, 0, b"32752\0"),
        introduced(b"T")
    );
    assert_eq!(
        ask(s, g, Kind::IsDomainIntroduced, 0, b"9\0"),
        introduced(b"F")
    );
    assert_eq!(ask(s, g, Kind::GetDomainPath, 0, b"+1\0"), error("EINVAL"));
    // A transaction that is not open matters even where no node is named, but not to
    // watches, which are outside of all.
    assert_eq!(ask(s, g, Kind::GetDomainPath, 5, b"1\0"), error("ENOENT"));
    assert_eq!(ask(s, g, Kind::Watch, 5, b"data\0t\0").len(), 2);
    assert_eq!(
        ask(s, g, Kind::Unwatch, 5, b"data\0t\0"),
        done(Kind::Unwatch)
    );
}

#[test]
fn only_the_host_learns_of_other_domains() {
    let (mut store, host, mut guest) = domain();
    ask(
        &mut store,
        &mut guest,
        Kind::Watch,
        0,
        b"@releaseDomain\0t\0",
    );
    for (name, token, depth) in [
        ("@releaseDomain", b"plain", None),
        ("@releaseDomain", b"which", Some(1)),
        ("@releaseDomain/8", b"eight", None),
    ] {
        store
            .watch_levels(host, name, token, depth)
            .expect("a name");
    }
    assert_eq!(
        store.watch(host, "@releaseDomain/08", b"t"),
        Err(Errno::Inval)
    );
    assert_eq!(store.watch(host, "@other", b"t"), Err(Errno::Inval));
    while store.next_event(host).is_some() {}
    for id in [7, 8] {
        store.mkdir(host, None, &Path::home(id)).expect("domain 0");
        store.release(host, id).expect("it is there");
    }
    let told: Vec<_> = std::iter::from_fn(|| store.next_event(host))
        .map(|event| format!("{} {}", event.path, String::from_utf8_lossy(&event.token)))
        .collect();
    // The second of the plain ones would say what the first says.
    assert_eq!(
        told,
        [
            "@releaseDomain plain",
            "@releaseDomain/7 which",
            "@releaseDomain/8 which",
            "@releaseDomain/8 eight"
        ]
    );
    guest.collect_events(&mut store);
    assert_eq!(replies(&mut guest), []);
}

#[test]
fn an_event_that_no_message_can_carry_is_not_sent() {
    let (mut store, host, mut guest) = domain();
    let token = vec![b't'; 2000];
    let (s, g) = (&mut store, &mut guest);
    let watch = [b"/local\0", &token[..], b"\0"].concat();
    assert_eq!(ask(s, g, Kind::Watch, 0, &watch).len(), 2);
    let deep = format!("/local/domain/1/data{}", "/abcdefg".repeat(300));
    store
        .write(host, None, &path(&deep), b"")
        .expect("domain 0");
    guest.collect_events(&mut store);
    assert_eq!(replies(&mut guest), []);
}

#[test]
fn a_request_over_a_transaction_s_limits_does_nothing() {
    let (mut store, ends) = three_clients(SMALL);
    let guest = ends[GUEST as usize].id();
    let at = |rest: &str| Path::parse(rest, GUEST).expect("a path");
    for n in 0..10 {
        let node = at(&format!("a/{n}"));
        store
            .write(guest, None, &node, b"")
            .expect("within the quota");
        store
            .write(guest, None, &at(&format!("b/{n}")), b"")
            .expect("too");
    }
    // Looks at as many nodes as fit, and then wants to remove more.
    let tx = store.begin(guest).expect("the first");
    for n in 0..5 {
        store
            .read(guest, Some(tx), &at(&format!("b/{n}")))
            .expect("there");
    }
    assert_eq!(store.remove(guest, Some(tx), &at("a")), Err(Errno::NoSpc));
    store.end(guest, tx, true).expect("nothing to do");
    check(&store);
    assert_eq!(
        store
            .directory(guest, None, &at("a"))
            .map(|(names, _)| names.len()),
        Ok(10)
    );
    // More changes than it may remember: ten nodes and their directory. Repeating
    // oneself is no new change.
    let tx = store.begin(guest).expect("again");
    for _ in 0..100 {
        store
            .write(guest, Some(tx), &at("b/1"), b"x")
            .expect("the same change");
    }
    assert_eq!(store.remove(guest, Some(tx), &at("a")), Err(Errno::NoSpc));
    store.end(guest, tx, true).expect("one write");
    check(&store);
    assert_eq!(store.read(guest, None, &at("b/1")), Ok(b"x".to_vec()));
    assert_eq!(store.read(guest, None, &at("a/1")), Ok(vec![]));
    // Nor are they forgotten in a move.
    let tx = store.begin(guest).expect("again");
    let write =
        |store: &mut Store, n: usize| store.write(guest, Some(tx), &at(&format!("b/{n}")), b"");
    for n in 0..8 {
        write(&mut store, n).expect("within the limit");
    }
    let mut store = Store::restore(store.save(), SMALL).expect("saved by a store");
    let more: Vec<_> = (8..10).map(|n| write(&mut store, n)).collect();
    assert_eq!(more, [Ok(()), Ok(())]);
    assert_eq!(store.mkdir(guest, Some(tx), &at("c")), Err(Errno::NoSpc));
    store.end(guest, tx, false).expect("dropped");
    // A look that does not fit is not half remembered: it can be saved.
    let tx = store.begin(guest).expect("again");
    for n in 0..10 {
        store
            .read(guest, Some(tx), &at(&format!("b/{n}")))
            .expect("there");
    }
    let deep = at("c/c/c/c/c/c/c/c");
    assert_eq!(store.read(guest, Some(tx), &deep), Err(Errno::NoSpc));
    Store::restore(store.save(), SMALL).expect("saved by a store");
}
