//! States that no store has saved.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::{GUEST, ask, domain, message, path, replies};
use crate::state::*;
use crate::wire::Kind;
use crate::*;

/// A state with a bit of everything, and the connection that belongs to it.
fn rich() -> (StoreState, ConnectionState) {
    let (mut store, host, mut guest) = domain();
    let (s, g) = (&mut store, &mut guest);
    ask(s, g, Kind::Watch, 0, b"data\0token\0");
    ask(s, g, Kind::TransactionStart, 0, b"\0");
    ask(s, g, Kind::Write, 1, b"data/a/b\0v");
    ask(s, g, Kind::Rm, 1, b"attr\0");
    let home = path("/local/domain/1/data/host");
    store.write(host, None, &home, b"h").expect("domain 0");
    let half = message(Kind::Read, 0, b"name\0");
    guest.receive(&mut store, &half[..18]).expect("half");
    store.write(host, None, &home, b"i").expect("domain 0");
    (store.save(), guest.save())
}

fn restore(state: StoreState) -> Result<Store, RestoreError> {
    Store::restore(state, Quotas::default())
}

/// What is wrong with the state once it is changed.
fn wrong(change: impl FnOnce(&mut StoreState)) -> String {
    let (mut state, _) = rich();
    restore(state.clone()).expect("a good state");
    change(&mut state);
    let error = restore(state).expect_err("a bad state");
    error.to_string()
}

fn node<'a>(state: &'a mut StoreState, path: &str) -> &'a mut NodeState {
    let found = state.nodes.iter_mut().find(|node| node.path == path);
    found.expect("in the tree")
}

fn guest(state: &mut StoreState) -> &mut ClientState {
    let found = state.clients.iter_mut().find(|c| c.domain == GUEST);
    found.expect("connected")
}

const DATA: &str = "/local/domain/1/data";

#[test]
fn a_half_request_is_completed_after_a_move() {
    let (state, end) = rich();
    let mut store = restore(state).expect("saved by a store");
    let mut guest = Connection::restore(end, &store).expect("saved with it");
    // What the host did before is told first, as it would have been.
    let rest = &message(Kind::Read, 0, b"name\0")[18..];
    guest.receive(&mut store, rest).expect("the other half");
    assert_eq!(
        replies(&mut guest),
        [
            (Kind::WatchEvent, b"data/host\0token\0".to_vec()),
            (Kind::Read, b"test".to_vec()),
            (Kind::WatchEvent, b"data/host\0token\0".to_vec()),
        ]
    );
    // The transaction saw `data` before the host wrote there.
    assert_eq!(
        ask(&mut store, &mut guest, Kind::Read, 1, b"data/a/b\0"),
        [(Kind::Read, b"v".to_vec())]
    );
    assert_eq!(
        ask(&mut store, &mut guest, Kind::TransactionEnd, 1, b"T\0"),
        super::error("EAGAIN")
    );
    assert_eq!(
        ask(&mut store, &mut guest, Kind::TransactionStart, 0, b"\0"),
        [(Kind::TransactionStart, b"2\0".to_vec())]
    );
    let host = store.client_by_number(1).expect("the host's client");
    assert_eq!(store.domain(host), Some(0));
    assert!(store.is_introduced(GUEST));
}

#[test]
fn an_error_names_what_is_wrong() {
    let cases: [(String, &str); 17] = [
        (wrong(|s| s.version = 2), "version 2"),
        (wrong(|s| s.nodes.retain(|n| n.path != "/")), "no root"),
        (wrong(|s| s.nodes.retain(|n| n.path != DATA)), "data/host"),
        (
            wrong(|s| node(s, DATA).path.push('/')),
            "\"/local/domain/1/data/\"",
        ),
        (wrong(|s| node(s, DATA).path = "data".into()), "\"data\""),
        (wrong(|s| node(s, DATA).perms = vec!["x1".into()]), "\"x1\""),
        (
            wrong(|s| node(s, DATA).perms = vec!["r+1".into()]),
            "\"r+1\"",
        ),
        (wrong(|s| node(s, DATA).perms.clear()), DATA),
        (wrong(|s| node(s, DATA).generation = u64::MAX), DATA),
        (
            wrong(|s| node(s, DATA).value = vec![0; 1 << 20]),
            "domain 1",
        ),
        (wrong(|s| s.generation = u64::MAX), "generation"),
        (wrong(|s| s.next_client = 0), "next client"),
        (wrong(|s| guest(s).number = 1), "client 1"),
        (
            wrong(|s| guest(s).watches[0].token.push(0)),
            "watch of data",
        ),
        (
            wrong(|s| guest(s).events[0].path = "//".into()),
            "event of //",
        ),
        (
            wrong(|s| {
                let again = guest(s).watches[0].clone();
                guest(s).watches.push(WatchState {
                    depth: Some(1),
                    ..again
                });
            }),
            "twice",
        ),
        (
            wrong(|s| {
                let one = guest(s).watches[0].clone();
                let many = (0..200u8).map(|n| WatchState {
                    token: vec![n + 1],
                    ..one.clone()
                });
                guest(s).watches = many.collect();
            }),
            "200 watches",
        ),
    ];
    for (error, part) in cases {
        assert!(error.contains(part), "{error:?} does not name {part:?}");
    }
}

#[test]
fn a_transaction_that_would_break_the_tree_is_refused() {
    // As in `rich`, but nothing happened since, so that it can be committed.
    let (mut store, _, mut end) = domain();
    ask(&mut store, &mut end, Kind::TransactionStart, 0, b"\0");
    ask(&mut store, &mut end, Kind::Write, 1, b"data/a/b\0v");
    ask(&mut store, &mut end, Kind::Rm, 1, b"attr\0");
    let good = store.save();
    let mut committed = restore(good.clone()).expect("saved by a store");
    let conn = committed.client_by_number(2).expect("the guest's client");
    committed.end(conn, TxId(1), true).expect("no conflict");
    crate::testing::check(&committed);
    assert_eq!(
        committed.read(conn, None, &path("/local/domain/1/data/a/b")),
        Ok(b"v".to_vec())
    );

    type Damage<'a> = &'a dyn Fn(&mut TransactionState);
    let changes: [(Damage<'_>, &str); 6] = [
        (
            &|tx| tx.written.retain(|w| w.path != DATA),
            "directory does not list",
        ),
        (
            &|tx| tx.written.retain(|w| w.path != "/local/domain/1/data/a/b"),
            "child that is missing",
        ),
        (&|tx| tx.seen.retain(|s| s.path != DATA), "nobody looked"),
        (
            &|tx| tx.seen.retain(|s| s.path != "/local/domain/1/data/a"),
            "nobody looked",
        ),
        (
            &|tx| {
                let home = |w: &&mut WrittenState| w.path == "/local/domain/1";
                let home = tx.written.iter_mut().find(home).expect("written");
                home.node
                    .as_mut()
                    .expect("not removed")
                    .children
                    .push("attr".into());
            },
            "lists a child that is missing",
        ),
        (
            &|tx| {
                let home = |w: &&mut WrittenState| w.path == "/local/domain/1";
                let home = tx.written.iter_mut().find(home).expect("written");
                home.node
                    .as_mut()
                    .expect("not removed")
                    .children
                    .retain(|c| c != "name");
            },
            "does not list a child",
        ),
    ];
    for (change, part) in changes {
        let mut state = good.clone();
        change(&mut guest(&mut state).transactions[0]);
        let error = restore(state).expect_err("a bad state").to_string();
        assert!(error.contains("transaction 1 of client 2"), "{error:?}");
        assert!(error.contains(part), "{error:?} does not say {part:?}");
    }
}

#[test]
fn a_connection_is_checked_too() {
    let (state, end) = rich();
    let store = restore(state).expect("saved by a store");
    let bad = |change: &dyn Fn(&mut ConnectionState)| {
        let mut end = end.clone();
        change(&mut end);
        Connection::restore(end, &store).expect_err("a bad state")
    };
    assert_eq!(bad(&|end| end.version = 0), RestoreError::Version(0));
    assert_eq!(bad(&|end| end.client = 9), RestoreError::Client(9));
    let complete = message(Kind::Read, 0, b"name\0");
    assert!(matches!(
        bad(&|end| end.input = complete.clone()),
        RestoreError::Input {
            client: 2,
            length: 21
        }
    ));
    assert!(matches!(
        bad(&|end| end.output = vec![0; 1 << 20]),
        RestoreError::Output { client: 2, .. }
    ));
}

#[test]
fn a_lost_stream_stays_lost() {
    let (mut store, _, mut guest) = domain();
    let mut header = message(Kind::Read, 0, b"");
    header[12..16].copy_from_slice(&5000u32.to_le_bytes());
    let lost = Err(ProtocolError(5000));
    assert_eq!(guest.receive(&mut store, &header), lost);
    let mut guest = Connection::restore(guest.save(), &store).expect("as it was");
    assert_eq!(guest.receive(&mut store, b"x"), lost);
}

#[test]
fn numbers_may_wrap_around() {
    let (mut state, _) = rich();
    state.next_client = u32::MAX;
    guest(&mut state).next_transaction = u32::MAX;
    let mut store = restore(state).expect("numbers like any other");
    let conn = store.client_by_number(2).expect("the guest's client");
    assert_eq!(store.begin(conn), Ok(TxId(u32::MAX)));
    assert_eq!(store.begin(conn), Ok(TxId(2)), "1 is open");
    assert_eq!(store.connect(5).number(), u32::MAX);
    assert_eq!(store.connect(5).number(), 3, "1 and 2 are in use");
}

#[test]
fn unknown_fields_are_refused_everywhere() {
    fn objects(value: &Value, at: &mut Vec<String>, found: &mut Vec<String>) {
        match value {
            Value::Object(map) => {
                found.push(
                    format!("/{}", at.join("/"))
                        .trim_end_matches('/')
                        .to_owned(),
                );
                for (key, value) in map {
                    at.push(key.clone());
                    objects(value, at, found);
                    at.pop();
                }
            }
            Value::Array(list) => {
                for (n, value) in list.iter().enumerate() {
                    at.push(n.to_string());
                    objects(value, at, found);
                    at.pop();
                }
            }
            _ => {}
        }
    }
    let (state, end) = rich();
    let whole = json!({"store": state, "end": end});
    let mut found = Vec::new();
    objects(&whole, &mut Vec::new(), &mut found);
    // The outermost is this test's own.
    found.retain(|at| !at.is_empty());
    assert!(found.len() > 60, "{}", found.len());
    for at in found {
        let mut changed = whole.clone();
        let object = changed.pointer_mut(&at).and_then(Value::as_object_mut);
        object.expect("an object").insert("later".into(), json!(1));
        let store = serde_json::from_value::<StoreState>(changed["store"].clone());
        let end = serde_json::from_value::<ConnectionState>(changed["end"].clone());
        let error = store.map(drop).and(end.map(drop)).expect_err(&at);
        assert!(error.to_string().contains("later"), "{error}");
    }
}

proptest! {
    #[test]
    fn damaged_states_break_nothing(data in proptest::collection::vec(any::<u8>(), 0..600)) {
        crate::testing::state(&data);
    }
}
