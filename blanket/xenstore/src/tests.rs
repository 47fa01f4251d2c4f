mod model;
mod protocol;
mod state;
mod twin;

use std::collections::BTreeMap;

use proptest::prelude::*;

use crate::wire::{Header, Kind};
use crate::*;

const GUEST: DomId = 1;

fn path(text: &str) -> Path {
    Path::parse(text, 0).expect("a valid path")
}

fn spec() -> DomainSpec {
    DomainSpec {
        domain: GUEST,
        name: "test".into(),
        uuid: "00000000-0000-4000-8000-000000000001".into(),
        generation: "1:2".into(),
        memory_kib: 262_144,
        max_memory_kib: 262_144,
        vcpus: 2,
        store_ring: (100, 1),
        console_ring: (101, 2),
    }
}

/// A store with a domain, the host's client and the guest's stream.
fn domain() -> (Store, ConnId, Connection) {
    let mut store = Store::default();
    let host = store.connect(0);
    store.introduce(host, &spec()).expect("introduced");
    let guest = Connection::new(&mut store, GUEST);
    (store, host, guest)
}

fn message(kind: Kind, tx: u32, payload: &[u8]) -> Vec<u8> {
    let length = payload.len() as u32;
    let mut bytes = Header {
        kind: kind as u32,
        request: 7,
        transaction: tx,
        length,
    }
    .encode()
    .to_vec();
    bytes.extend_from_slice(payload);
    bytes
}

/// Reads all output as (kind, payload).
fn replies(conn: &mut Connection) -> Vec<(Kind, Vec<u8>)> {
    let mut all = Vec::new();
    while !conn.output().is_empty() {
        let n = conn.output().len();
        all.extend_from_slice(conn.output());
        conn.sent(n);
    }
    let mut found = Vec::new();
    let mut rest = &all[..];
    while let Some((head, tail)) = rest.split_first_chunk::<16>() {
        let header = Header::decode(*head);
        let (payload, next) = tail.split_at(header.length as usize);
        found.push((
            Kind::from_number(header.kind).expect("known"),
            payload.to_vec(),
        ));
        rest = next;
    }
    assert!(rest.is_empty());
    found
}

fn ask(
    store: &mut Store,
    guest: &mut Connection,
    kind: Kind,
    tx: u32,
    payload: &[u8],
) -> Vec<(Kind, Vec<u8>)> {
    let bytes = message(kind, tx, payload);
    assert_eq!(guest.receive(store, &bytes), Ok(bytes.len()));
    replies(guest)
}

fn error(name: &str) -> Vec<(Kind, Vec<u8>)> {
    vec![(Kind::Error, format!("{name}\0").into_bytes())]
}

fn done(kind: Kind) -> Vec<(Kind, Vec<u8>)> {
    vec![(kind, b"OK\0".to_vec())]
}

#[test]
fn what_linux_asks_at_boot() {
    let (mut store, _, mut guest) = domain();
    let s = &mut store;
    let g = &mut guest;
    assert_eq!(
        ask(s, g, Kind::Read, 0, b"domid\0"),
        [(Kind::Read, b"1".to_vec())]
    );
    assert_eq!(
        ask(s, g, Kind::Read, 0, b"memory/target\0"),
        [(Kind::Read, b"262144".to_vec())]
    );
    assert_eq!(
        ask(s, g, Kind::Read, 0, b"cpu/1/availability\0"),
        [(Kind::Read, b"online".to_vec())]
    );
    assert_eq!(
        ask(s, g, Kind::Read, 0, b"cpu/2/availability\0"),
        error("ENOENT")
    );
    assert_eq!(
        ask(s, g, Kind::Directory, 0, b"device\0"),
        [(Kind::Directory, vec![])]
    );
    // Below a directory that is not there, and backends, which a guest has none of.
    assert_eq!(
        ask(s, g, Kind::Directory, 0, b"device/vbd\0"),
        error("ENOENT")
    );
    assert_eq!(ask(s, g, Kind::Directory, 0, b"backend\0"), error("ENOENT"));
    // A watch is answered, then fires at once, relative as it was asked.
    assert_eq!(
        ask(s, g, Kind::Watch, 0, b"control/shutdown\0ffff1234\0"),
        [
            (Kind::Watch, b"OK\0".to_vec()),
            (Kind::WatchEvent, b"control/shutdown\0ffff1234\0".to_vec())
        ]
    );
    let [(Kind::TransactionStart, id)] = &ask(s, g, Kind::TransactionStart, 0, b"\0")[..] else {
        panic!("no transaction")
    };
    let id: u32 = String::from_utf8_lossy(&id[..id.len() - 1])
        .parse()
        .expect("a number");
    assert_eq!(
        ask(s, g, Kind::Write, id, b"control/feature-poweroff\x001"),
        done(Kind::Write)
    );
    assert_eq!(
        ask(s, g, Kind::TransactionEnd, id, b"T\0"),
        done(Kind::TransactionEnd)
    );
    assert_eq!(
        ask(s, g, Kind::Read, 0, b"control/feature-poweroff\0"),
        [(Kind::Read, b"1".to_vec())]
    );
    assert_eq!(
        ask(s, g, Kind::GetDomainPath, 0, b"1\0"),
        [(Kind::GetDomainPath, b"/local/domain/1\0".to_vec())]
    );
    assert_eq!(
        ask(s, g, Kind::IsDomainIntroduced, 0, b"1\0"),
        [(Kind::IsDomainIntroduced, b"T\0".to_vec())]
    );
}

#[test]
fn the_host_stops_a_guest_through_its_watch() {
    let (mut store, host, mut guest) = domain();
    ask(
        &mut store,
        &mut guest,
        Kind::Watch,
        0,
        b"control/shutdown\0t\0",
    );
    store
        .write(
            host,
            None,
            &path("/local/domain/1/control/shutdown"),
            b"poweroff",
        )
        .expect("host");
    guest.collect_events(&mut store);
    assert_eq!(
        replies(&mut guest),
        [(Kind::WatchEvent, b"control/shutdown\0t\0".to_vec())]
    );
    let (s, g) = (&mut store, &mut guest);
    assert_eq!(
        ask(s, g, Kind::Read, 0, b"control/shutdown\0"),
        [(Kind::Read, b"poweroff".to_vec())]
    );
    // The guest acknowledges by writing the empty string, and hears of it.
    let acknowledged = ask(s, g, Kind::Write, 0, b"control/shutdown\0");
    assert_eq!(acknowledged[0], (Kind::Write, b"OK\0".to_vec()));
    assert_eq!(acknowledged.len(), 2);
}

#[test]
fn a_guest_may_not_touch_what_is_not_its_own() {
    let (mut store, host, mut guest) = domain();
    let other = path("/local/domain/2");
    store.mkdir(host, None, &other).expect("host");
    store
        .set_perms(host, None, &other, &[Perm::new(2, Access::NONE)])
        .expect("host");
    store
        .mkdir(host, None, &path("/local/domain/2/secret"))
        .expect("host");
    let (s, g) = (&mut store, &mut guest);
    for (kind, payload, errno) in [
        (Kind::Write, &b"name\0evil"[..], "EACCES"),
        (Kind::Write, b"/new\0x", "EACCES"),
        (Kind::Mkdir, b"device/vbd\0", "EACCES"),
        (Kind::Rm, b"/local/domain/1\0", "EACCES"),
        (Kind::Rm, b"memory/target\0", "EACCES"),
        (Kind::Rm, b"/\0", "EINVAL"),
        (Kind::Read, b"/local/domain/2/secret\0", "EACCES"),
        (Kind::Read, b"/local/domain/2/guess\0", "EACCES"),
        (Kind::SetPerms, b"memory/target\0b1\0", "EACCES"),
        (Kind::SetPerms, b"data\0b0\0", "EPERM"),
        (Kind::SetPerms, b"data\0x1\0", "EINVAL"),
        (Kind::SetPerms, b"data\0", "EINVAL"),
        (Kind::Introduce, b"2\x001\x001\0", "EACCES"),
        (Kind::Control, b"help\0", "EACCES"),
        (Kind::GetQuota, b"\0", "EACCES"),
        (Kind::Error, b"\0", "ENOSYS"),
        (Kind::Read, b"no nul", "EINVAL"),
        (Kind::Read, b"a b\0", "EINVAL"),
        (Kind::Read, b"data/\0", "EINVAL"),
        (Kind::Read, b"data//x\0", "EINVAL"),
        (Kind::Read, b"\xff\xfe\0", "EINVAL"),
        (Kind::TransactionEnd, b"T\0", "ENOENT"),
    ] {
        assert_eq!(
            ask(s, g, kind, 0, payload),
            error(errno),
            "{kind:?} {payload:?}"
        );
    }
    assert_eq!(ask(s, g, Kind::Read, 99, b"name\0"), error("ENOENT"));
    // What it owns it may shape, and others are kept out.
    assert_eq!(ask(s, g, Kind::Write, 0, b"data/a/b\0v"), done(Kind::Write));
    assert_eq!(
        ask(s, g, Kind::GetPerms, 0, b"data/a/b\0"),
        [(Kind::GetPerms, b"n1\0".to_vec())]
    );
    assert_eq!(
        ask(s, g, Kind::SetPerms, 0, b"data/a\0n1\0r2\0"),
        done(Kind::SetPerms)
    );
    let other = store.connect(2);
    assert!(
        store
            .directory(other, None, &path("/local/domain/1/data/a"))
            .is_ok()
    );
    assert_eq!(
        store.read(other, None, &path("/local/domain/1/data/a/b")),
        Err(Errno::Acces)
    );
}

#[test]
fn watches_fire_for_below_and_for_removal_above_but_not_for_what_is_hidden() {
    let mut store = Store::default();
    let host = store.connect(0);
    let reader = store.connect(5);
    let events = |store: &mut Store| {
        std::iter::from_fn(|| store.next_event(reader))
            .map(|e| e.path)
            .collect::<Vec<_>>()
    };
    store
        .write(host, None, &path("/a/b/c"), b"1")
        .expect("host");
    store
        .set_perms(host, None, &path("/a/b"), &[Perm::new(0, Access::NONE)])
        .expect("host");
    store.watch(reader, "/a", b"top").expect("a watch");
    store.watch(reader, "/a/b/c", b"leaf").expect("a watch");
    assert_eq!(store.watch(reader, "/a", b"top"), Err(Errno::Exist));
    assert_eq!(events(&mut store), ["/a", "/a/b/c"]);

    store.write(host, None, &path("/a/x"), b"").expect("host");
    assert_eq!(events(&mut store), ["/a/x"]);
    store.write(host, None, &path("/ab"), b"").expect("host");
    assert_eq!(events(&mut store), [""; 0]);
    store
        .write(host, None, &path("/a/b/hidden"), b"")
        .expect("host");
    assert_eq!(
        events(&mut store),
        [""; 0],
        "made with the permissions of a hidden directory"
    );
    // Removing from above reports the watched node as gone.
    store.remove(host, None, &path("/a")).expect("host");
    assert_eq!(events(&mut store), ["/a", "/a/b/c"]);

    store.unwatch(reader, "/a", b"top").expect("there");
    assert_eq!(store.unwatch(reader, "/a", b"top"), Err(Errno::NoEnt));
    store.write(host, None, &path("/a"), b"").expect("host");
    assert_eq!(events(&mut store), [""; 0]);
}

#[test]
fn transactions_are_private_and_conflict() {
    let mut store = Store::default();
    let a = store.connect(0);
    let b = store.connect(0);
    store.watch(b, "/n", b"w").expect("a watch");
    assert!(store.next_event(b).is_some());

    let tx = store.begin(a).expect("begun");
    store
        .write(a, Some(tx), &path("/n"), b"1")
        .expect("in private");
    assert_eq!(store.read(a, Some(tx), &path("/n")), Ok(b"1".to_vec()));
    assert_eq!(store.read(b, None, &path("/n")), Err(Errno::NoEnt));
    assert!(!store.has_event(b));
    store.end(a, tx, true).expect("no conflict");
    assert_eq!(store.read(b, None, &path("/n")), Ok(b"1".to_vec()));
    assert!(store.has_event(b), "fires at commit");

    let tx = store.begin(a).expect("begun");
    assert_eq!(store.read(a, Some(tx), &path("/n")), Ok(b"1".to_vec()));
    store.write(b, None, &path("/n"), b"2").expect("outside");
    store
        .write(a, Some(tx), &path("/m"), b"from 1")
        .expect("in private");
    assert_eq!(store.end(a, tx, true), Err(Errno::Again));
    assert_eq!(store.read(b, None, &path("/m")), Err(Errno::NoEnt));
    assert_eq!(store.end(a, tx, true), Err(Errno::NoEnt), "it is gone");

    // A node that was removed and made again is not the same node.
    let tx = store.begin(a).expect("begun");
    assert_eq!(store.read(a, Some(tx), &path("/n")), Ok(b"2".to_vec()));
    store.remove(b, None, &path("/n")).expect("outside");
    store.write(b, None, &path("/n"), b"2").expect("outside");
    assert_eq!(store.end(a, tx, true), Err(Errno::Again));
}

#[test]
fn quotas_stop_a_guest_and_only_the_guest() {
    let quotas = Quotas {
        nodes: 30,
        bytes: 4000,
        watches: 3,
        transactions: 2,
        ..Quotas::default()
    };
    let mut store = Store::new(quotas);
    let host = store.connect(0);
    store.introduce(host, &spec()).expect("introduced");
    let guest = store.connect(GUEST);
    let home = |rest: &str| Path::parse(rest, GUEST).expect("valid");

    let made = (0..100)
        .take_while(|n| {
            store
                .write(guest, None, &home(&format!("data/{n}")), b"")
                .is_ok()
        })
        .count();
    assert!((1..30).contains(&made), "{made}");
    assert_eq!(
        store.write(guest, None, &home("data/more/deep"), b""),
        Err(Errno::NoSpc)
    );
    // A request that fails leaves nothing behind.
    assert_eq!(
        store.read(guest, None, &home("data/more")),
        Err(Errno::NoEnt)
    );
    store
        .write(host, None, &path("/local/domain/1/device/new"), b"")
        .expect("the host may");
    store.remove(guest, None, &home("data/0")).expect("its own");
    store
        .write(guest, None, &home("data/again"), b"")
        .expect("room again");
    assert_eq!(
        store.write(guest, None, &home("data/again"), &[0; 3000]),
        Err(Errno::NoSpc)
    );
    assert_eq!(
        store
            .write(guest, None, &home("attr"), &[0; 2000])
            .and_then(|()| { store.write(guest, None, &home("data"), &[0; 2000]) }),
        Err(Errno::NoSpc),
        "bytes"
    );

    for n in 0..3 {
        store
            .watch(guest, "data", format!("{n}").as_bytes())
            .expect("within the quota");
    }
    assert_eq!(store.watch(guest, "data", b"3"), Err(Errno::TooBig));
    let first = store.begin(guest).expect("one");
    store.begin(guest).expect("two");
    assert_eq!(store.begin(guest), Err(Errno::NoSpc));
    store.end(guest, first, false).expect("dropped");
    store.begin(guest).expect("two again");
}

#[test]
fn long_listings_come_in_parts() {
    let (mut store, host, mut guest) = domain();
    for n in 0..600 {
        store
            .write(
                host,
                None,
                &path(&format!("/local/domain/1/device/number-{n}")),
                b"",
            )
            .expect("host");
    }
    let (s, g) = (&mut store, &mut guest);
    assert_eq!(ask(s, g, Kind::Directory, 0, b"device\0"), error("E2BIG"));
    let mut names = Vec::new();
    let mut offset = 0;
    loop {
        let [(Kind::DirectoryPart, part)] = &ask(
            s,
            g,
            Kind::DirectoryPart,
            0,
            format!("device\0{offset}\0").as_bytes(),
        )[..] else {
            panic!("no part")
        };
        let head = part.iter().position(|&b| b == 0).expect("a generation") + 1;
        let body = &part[head..];
        let complete = body.ends_with(b"\0\0") || body == b"\0";
        let body = if complete {
            &body[..body.len() - 1]
        } else {
            body
        };
        offset += body.len();
        names.extend(
            body.split(|&b| b == 0)
                .filter(|n| !n.is_empty())
                .map(<[u8]>::to_vec),
        );
        if complete {
            break;
        }
    }
    assert_eq!(names.len(), 600);
}

#[test]
fn a_client_that_does_not_read_is_not_served_further() {
    let (mut store, _, mut guest) = domain();
    let request = message(Kind::Read, 0, b"name\0");
    let flood: Vec<u8> = request
        .iter()
        .copied()
        .cycle()
        .take(request.len() * 5000)
        .collect();
    let taken = guest.receive(&mut store, &flood).expect("well-formed");
    assert!(taken < flood.len() && !guest.ready());
    assert_eq!(guest.receive(&mut store, &flood[taken..]), Ok(0));
    replies(&mut guest);
    assert!(
        guest
            .receive(&mut store, &flood[taken..])
            .expect("well-formed")
            > 0
    );
}

#[test]
fn an_endless_payload_ends_the_stream() {
    let (mut store, _, mut guest) = domain();
    let header = Header {
        kind: 2,
        request: 0,
        transaction: 0,
        length: 4097,
    }
    .encode();
    assert_eq!(guest.receive(&mut store, &header), Err(ProtocolError(4097)));
}

/// The simplest thing that behaves like the tree does for domain 0.
#[derive(Clone, Default, Debug, PartialEq)]
struct Model(BTreeMap<String, Vec<u8>>);

#[derive(Clone, Debug)]
enum Op {
    Read(String),
    Write(String, u8),
    Mkdir(String),
    Remove(String),
    Directory(String),
}

type Seen = Result<Vec<Vec<u8>>, Errno>;

impl Model {
    fn has(&self, at: &str) -> bool {
        at == "/" || self.0.contains_key(at)
    }
    fn make(&mut self, at: &str) {
        let mut end = 0;
        while let Some(next) = at[end + 1..].find('/') {
            end += 1 + next;
            self.0.entry(at[..end].to_owned()).or_default();
        }
        self.0.entry(at.to_owned()).or_default();
    }
    fn run(&mut self, op: &Op) -> Seen {
        match op {
            Op::Read(at) => self.0.get(at).map(|v| vec![v.clone()]).ok_or(Errno::NoEnt),
            Op::Write(at, value) => {
                self.make(at);
                self.0.insert(at.clone(), vec![*value]);
                Ok(vec![])
            }
            Op::Mkdir(at) => {
                self.make(at);
                Ok(vec![])
            }
            Op::Remove(at) => {
                let parent = at.rsplit_once('/').map_or("", |(parent, _)| parent);
                if !self.has(at) && !self.has(if parent.is_empty() { "/" } else { parent }) {
                    return Err(Errno::NoEnt);
                }
                let below = format!("{at}/");
                self.0
                    .retain(|path, _| path != at && !path.starts_with(&below));
                Ok(vec![])
            }
            Op::Directory(at) => {
                if !self.has(at) {
                    return Err(Errno::NoEnt);
                }
                let below = format!("{at}/");
                Ok(self
                    .0
                    .keys()
                    .filter_map(|path| path.strip_prefix(&below))
                    .filter(|rest| !rest.contains('/'))
                    .map(|rest| rest.as_bytes().to_vec())
                    .collect())
            }
        }
    }
}

/// A transaction, what was seen in it, and the model's version when it began.
type Open = (TxId, Vec<(Op, Seen)>, i32);

fn run_store(store: &mut Store, conn: ConnId, tx: Option<TxId>, op: &Op) -> Seen {
    match op {
        Op::Read(at) => store.read(conn, tx, &path(at)).map(|v| vec![v]),
        Op::Write(at, value) => store.write(conn, tx, &path(at), &[*value]).map(|()| vec![]),
        Op::Mkdir(at) => store.mkdir(conn, tx, &path(at)).map(|()| vec![]),
        Op::Remove(at) => store.remove(conn, tx, &path(at)).map(|()| vec![]),
        Op::Directory(at) => store
            .directory(conn, tx, &path(at))
            .map(|(names, _)| names.iter().map(|n| n.as_bytes().to_vec()).collect()),
    }
}

#[derive(Clone, Debug)]
enum Step {
    Plain(Op),
    In(usize, Op),
    End(usize, bool),
}

fn op() -> impl Strategy<Value = Op> {
    let path = "(/[abc]){1,3}";
    prop_oneof![
        path.prop_map(Op::Read),
        (path, any::<u8>()).prop_map(|(p, v)| Op::Write(p, v)),
        path.prop_map(Op::Mkdir),
        path.prop_map(Op::Remove),
        path.prop_map(Op::Directory),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        2 => op().prop_map(Step::Plain),
        6 => (0usize..3, op()).prop_map(|(n, op)| Step::In(n, op)),
        1 => (0usize..3, any::<bool>()).prop_map(|(n, commit)| Step::End(n, commit)),
    ]
}

proptest! {
    /// Whatever is committed is as if it had run as a whole at its commit, what it
    /// read included; and only a change by another makes a commit fail.
    #[test]
    fn commits_are_serial(steps in proptest::collection::vec(step(), 1..120)) {
        let mut store = Store::default();
        let conn = store.connect(0);
        let mut model = Model::default();
        let mut version = 0;
        let mut open: [Option<Open>; 3] = [None, None, None];
        for step in steps {
            match step {
                Step::Plain(op) => {
                    let before = model.clone();
                    prop_assert_eq!(run_store(&mut store, conn, None, &op), model.run(&op), "{:?}", op);
                    if model != before || matches!(op, Op::Write(..)) {
                        version += 1;
                    }
                }
                Step::In(slot, op) => {
                    if open[slot].is_none() {
                        open[slot] = Some((store.begin(conn).expect("domain 0"), vec![], version));
                    }
                    let (tx, log, _) = open[slot].as_mut().expect("opened above");
                    let seen = run_store(&mut store, conn, Some(*tx), &op);
                    log.push((op, seen));
                }
                Step::End(slot, commit) => {
                    let Some((tx, log, begun)) = open[slot].take() else { continue };
                    match store.end(conn, tx, commit) {
                        Ok(()) if commit => {
                            for (op, seen) in &log {
                                prop_assert_eq!(&model.run(op), seen, "replay of {:?}", op);
                            }
                            if log.iter().any(|(op, _)| !matches!(op, Op::Read(_) | Op::Directory(_))) {
                                version += 1;
                            }
                        }
                        Ok(()) => {}
                        Err(Errno::Again) => prop_assert!(commit && version != begun, "no reason"),
                        Err(other) => prop_assert!(false, "{other}"),
                    }
                }
            }
        }
        let tree: BTreeMap<String, Vec<u8>> = store
            .tree()
            .nodes
            .iter()
            .filter(|(path, _)| path.as_str() != "/")
            .map(|(path, node)| (path.to_string(), node.value.clone()))
            .collect();
        prop_assert_eq!(tree, model.0);
    }

    /// Pieces do not matter, nothing panics, and quotas are kept to the byte.
    #[test]
    fn any_bytes_in_any_pieces(
        requests in proptest::collection::vec(
            (0u32..28, 0u32..4, prop_oneof![
                proptest::collection::vec(any::<u8>(), 0..64),
                "(data|attr|control|/|name|@x)(/[ab]){0,3}\0[a-z0-9]{0,3}\0?".prop_map(String::into_bytes),
                "[TF0-9]{1,2}\0".prop_map(String::into_bytes),
            ]),
            1..60,
        ),
        pieces in proptest::collection::vec(1usize..40, 1..200),
    ) {
        let mut stream = Vec::new();
        for (kind, tx, payload) in &requests {
            let length = payload.len() as u32;
            stream.extend(Header { kind: *kind, request: 1, transaction: *tx, length }.encode());
            stream.extend(payload);
        }
        let run = |cuts: &[usize]| {
            let quotas = Quotas { nodes: 40, ..Quotas::default() };
            let mut store = Store::new(quotas);
            let host = store.connect(0);
            store.introduce(host, &spec()).expect("introduced");
            let mut guest = Connection::new(&mut store, GUEST);
            let mut out = Vec::new();
            let mut cuts = cuts.iter().cycle();
            let mut rest = &stream[..];
            while !rest.is_empty() {
                let n = (*cuts.next().expect("endless")).min(rest.len());
                let taken = guest.receive(&mut store, &rest[..n]).expect("short payloads");
                rest = &rest[taken..];
                while !guest.output().is_empty() {
                    let n = guest.output().len();
                    out.extend_from_slice(guest.output());
                    guest.sent(n);
                }
            }
            (store, out)
        };
        let (store, whole) = run(&[usize::MAX]);
        let (_, parts) = run(&pieces);
        // Events may come earlier between pieces; the replies are the same ones.
        let strip = |out: &[u8]| {
            let mut rest = out;
            let mut kept = Vec::new();
            while let Some((head, tail)) = rest.split_first_chunk::<16>() {
                let header = Header::decode(*head);
                let (payload, next) = tail.split_at(header.length as usize);
                if header.kind != Kind::WatchEvent as u32 {
                    kept.push((header.kind, payload.to_vec()));
                }
                rest = next;
            }
            kept
        };
        prop_assert_eq!(strip(&whole), strip(&parts));
        prop_assert_eq!(strip(&whole).len(), requests.len());
        let owned: Vec<_> = store.tree().nodes.iter().filter(|(_, node)| node.owner() == GUEST).collect();
        prop_assert!(owned.len() <= 40);
        let bytes: usize = owned.iter().map(|(path, node)| node.charge(path.as_str().len())).sum();
        let usage = store.tree().usage(GUEST);
        prop_assert_eq!((usage.nodes as usize, usage.bytes as usize), (owned.len(), bytes));
    }
}
