//! What must hold of a store whatever it is given. Run by unit tests with bytes at
//! random, and by a fuzz target.

use std::collections::HashMap;

use serde_json::Value;

use crate::quota::Usage;
use crate::state::{ConnectionState, StoreState};
use crate::wire::Header;
use crate::{Access, Connection, DomId, Path, Perm, Quotas, Store};

/// Quotas that a few requests reach.
pub const SMALL: Quotas = Quotas {
    nodes: 30,
    bytes: 1500,
    value: 40,
    perms: 3,
    watches: 4,
    transactions: 3,
    transaction_nodes: 14,
    transaction_changes: 10,
    events: 6,
};

/// A store with two guests' homes and a directory that everyone may write, and a
/// client of domain 0, one of domain 1 and one of domain 2.
///
/// # Panics
/// Never, unless the store is wrong.
#[must_use]
pub fn three_clients(quotas: Quotas) -> (Store, [Connection; 3]) {
    let mut store = Store::new(quotas);
    let ends = [0, 1, 2].map(|domain| Connection::new(&mut store, domain));
    let host = ends[0].id();
    for (text, owner, access) in [
        ("/local", 0, Access::READ),
        ("/local/domain", 0, Access::READ),
        ("/local/domain/1", 1, Access::NONE),
        ("/local/domain/2", 2, Access::READ),
        ("/pub", 0, Access::BOTH),
    ] {
        let path = Path::parse(text, 0).expect("a path");
        store.mkdir(host, None, &path).expect("domain 0");
        let perms = [Perm::new(owner, access)];
        store
            .set_perms(host, None, &path, &perms)
            .expect("domain 0");
    }
    (store, ends)
}

/// Checks that the tree holds together and that the accounts are right.
///
/// # Panics
/// If they do not.
pub fn check(store: &Store) {
    let mut usage: HashMap<DomId, Usage> = HashMap::new();
    for (path, node) in &store.tree.nodes {
        assert!(!node.perms.is_empty(), "{path} belongs to nobody");
        assert!(node.generation <= store.tree.generation, "{path}");
        if let Some(parent) = path.parent() {
            let above = store.tree.get(&parent);
            let listed = above.is_some_and(|above| above.children.contains(path.name()));
            assert!(listed, "{path} is not in its directory");
        }
        for name in &node.children {
            let child = store.tree.get(&path.child(name));
            assert!(child.is_some(), "{path} lists {name}");
        }
        let bytes = node.charge(path.as_str().len());
        *usage.entry(node.owner()).or_default() += Usage {
            nodes: 1,
            bytes: bytes.cast_signed(),
        };
    }
    assert!(store.tree.get(&Path::root()).is_some(), "no root");
    for (domain, counted) in store.tree.usages() {
        let real = usage.remove(&domain).unwrap_or_default();
        assert_eq!(counted, real, "domain {domain}");
    }
    assert!(usage.is_empty(), "somebody was not charged");
}

/// Takes numbers from the front of some bytes; zeros when they are used up.
struct Take<'a>(&'a [u8]);

impl Take<'_> {
    fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else {
            return 0;
        };
        self.0 = rest;
        *first
    }
    fn below(&mut self, n: usize) -> usize {
        usize::from(self.byte()) % n.max(1)
    }
    fn pick<'t>(&mut self, words: &[&'t str]) -> &'t str {
        words[self.below(words.len())]
    }
}

/// A message that mostly makes sense.
fn message(take: &mut Take<'_>) -> Vec<u8> {
    let path = take.pick(&[
        "a",
        "a/b",
        "a/b/a",
        "b",
        "/pub",
        "/pub/a",
        "/pub/a/b",
        "/local/domain/1/a",
        "/local/domain/2/a",
        "/local/domain/1",
        "/",
        "@releaseDomain",
    ]);
    let rest = take.pick(&[
        "x", "", "x\0", "T\0", "n1\0b2\0", "b2\0", "0\0", "x\x001\0", "n0\0",
    ]);
    let kinds = [
        1, 2, 3, 4, 5, 6, 6, 7, 7, 7, 11, 11, 11, 12, 13, 13, 14, 21, 22, 23,
    ];
    let kind = kinds[take.below(kinds.len())];
    let payload = match kind {
        6 => "\0".to_owned(),
        7 => take.pick(&["T\0", "T\0", "F\0", "\0"]).to_owned(),
        1..=3 | 12 | 13 => format!("{path}\0"),
        _ => format!("{path}\0{rest}"),
    };
    let header = Header {
        kind,
        request: 7,
        transaction: take.below(4).try_into().unwrap_or(0),
        length: payload.len().try_into().unwrap_or(0),
    };
    let mut bytes = header.encode().to_vec();
    bytes.extend_from_slice(payload.as_bytes());
    bytes
}

/// Gives the ends some messages; every now and then one does not read its replies.
fn run(store: &mut Store, ends: &mut [Connection], take: &mut Take<'_>, most: usize) {
    for _ in 0..most {
        if take.0.is_empty() {
            return;
        }
        let at = take.below(ends.len());
        let Some(end) = ends.get_mut(at) else { return };
        let mut bytes = message(take);
        if take.byte() >= 240 {
            bytes.truncate(take.below(bytes.len()));
        }
        // A stream that is lost stays so; the others go on.
        if let Ok(taken) = end.receive(store, &bytes)
            && taken < bytes.len()
        {
            assert!(!end.ready(), "not taken although it was ready");
        }
        if take.byte() < 200 {
            end.sent(end.output().len());
        }
    }
}

/// How many values there are in this one, itself included.
fn size(value: &Value) -> usize {
    1 + match value {
        Value::Array(list) => list.iter().map(size).sum(),
        Value::Object(map) => map.values().map(size).sum::<usize>(),
        _ => 0,
    }
}

/// Changes one of the values in this one, by numbers from the front of `data`.
pub fn damaged(value: &mut Value, data: &mut &[u8]) {
    let mut take = Take(data);
    let place = take.below(256) * 256 + take.below(256);
    let mut at = place % size(value);
    damage(value, &mut at, &mut take);
    *data = take.0;
}

/// Changes the value with this number, counted as [`size`] does.
fn damage(value: &mut Value, at: &mut usize, take: &mut Take<'_>) {
    let here = *at == 0;
    *at = at.wrapping_sub(1);
    if here {
        let how = take.byte();
        match value {
            Value::Array(list) if how.is_multiple_of(4) => {
                list.pop();
            }
            Value::Array(list) if how % 4 == 1 => list.extend(list.last().cloned()),
            Value::Array(list) if how % 4 == 2 => list.reverse(),
            Value::Object(map) if how.is_multiple_of(8) => {
                map.insert("more".to_owned(), Value::Null);
            }
            Value::Number(number) if !how.is_multiple_of(4) => {
                let by = u64::from(take.byte() % 5);
                let number = number.as_u64().unwrap_or(0);
                *value = number.wrapping_add(by).wrapping_sub(2).into();
            }
            Value::String(text) if how.is_multiple_of(2) => {
                *value = match take.below(4) {
                    0 => format!("{text}/a"),
                    1 => text.rsplit_once('/').map_or("", |(up, _)| up).to_owned(),
                    2 => text.replace('a', "b"),
                    _ => text.replace('1', "2"),
                }
                .into();
            }
            _ => {
                *value = match how % 6 {
                    0 => Value::Null,
                    1 => u64::MAX.into(),
                    2 => take.byte().into(),
                    3 => "/a".into(),
                    4 => "".into(),
                    _ => Value::Array(Vec::new()),
                }
            }
        }
        return;
    }
    match value {
        Value::Array(list) => {
            for one in list {
                if *at == usize::MAX {
                    return;
                }
                damage(one, at, take);
            }
        }
        Value::Object(map) => {
            for one in map.values_mut() {
                if *at == usize::MAX {
                    return;
                }
                damage(one, at, take);
            }
        }
        _ => {}
    }
}

/// A state: the bytes themselves as JSON, or a real one that is damaged in some
/// places. It is refused, or what comes of it is a store like any other: it holds
/// together, answers, commits, and can be saved and restored again.
///
/// # Panics
/// If it does not.
pub fn state(data: &[u8]) {
    if let Ok(state) = serde_json::from_slice::<StoreState>(data)
        && let Ok(store) = Store::restore(state, SMALL)
    {
        check(&store);
    }
    let mut take = Take(data);
    let (mut store, mut ends) = three_clients(SMALL);
    let most = take.below(40);
    run(&mut store, &mut ends, &mut take, most);
    let json = |saved| serde_json::to_value(saved).expect("plain data");
    let mut saved = json(store.save());
    for _ in 0..take.below(3) {
        damaged(&mut saved, &mut take.0);
    }
    let Ok(state) = serde_json::from_value::<StoreState>(saved) else {
        return;
    };
    let Ok(mut store) = Store::restore(state, SMALL) else {
        return;
    };
    check(&store);
    let mut restored = Vec::new();
    for end in &ends {
        let mut saved = serde_json::to_value(end.save()).expect("plain data");
        if take.byte().is_multiple_of(4) {
            damaged(&mut saved, &mut take.0);
        }
        if let Ok(state) = serde_json::from_value::<ConnectionState>(saved)
            && let Ok(end) = Connection::restore(state, &store)
        {
            restored.push(end);
        }
    }
    run(&mut store, &mut restored, &mut take, usize::MAX);
    check(&store);
    let again = Store::restore(store.save(), SMALL).expect("saved by a store");
    assert_eq!(again.save(), store.save());
    let open: Vec<_> = store
        .clients
        .iter()
        .flat_map(|(id, client)| client.transactions.keys().map(|tx| (*id, *tx)))
        .collect();
    for (conn, tx) in open {
        // May fail as it likes, and may not break the tree.
        let _ = store.end(conn, tx, true);
        check(&store);
    }
}
