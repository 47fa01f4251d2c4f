//! The store, as its clients see it over the wire, beside the simplest thing that
//! behaves like it: a map from paths to values and permissions, and a list of
//! watches. A transaction of the model is a list of requests with the replies that
//! the store gave, run again as a whole when it is committed.

use std::collections::BTreeMap;

use proptest::prelude::*;

use crate::testing::three_clients;
use crate::wire::{Header, Kind};
use crate::*;

/// A reply: the payload, or the name of an error.
type Reply = Result<Vec<u8>, String>;

#[derive(Clone, Debug)]
enum Req {
    Read(String),
    Directory(String),
    DirectoryPart(String, usize),
    GetPerms(String),
    Write(String, String),
    Mkdir(String),
    Rm(String),
    SetPerms(String, Vec<(char, DomId)>),
    Watch(String, char, Option<usize>),
    Unwatch(String, char),
    Reset,
    Start,
    End(bool),
}

impl Req {
    fn kind(&self) -> Kind {
        match self {
            Self::Read(_) => Kind::Read,
            Self::Directory(_) => Kind::Directory,
            Self::DirectoryPart(..) => Kind::DirectoryPart,
            Self::GetPerms(_) => Kind::GetPerms,
            Self::Write(..) => Kind::Write,
            Self::Mkdir(_) => Kind::Mkdir,
            Self::Rm(_) => Kind::Rm,
            Self::SetPerms(..) => Kind::SetPerms,
            Self::Watch(..) => Kind::Watch,
            Self::Unwatch(..) => Kind::Unwatch,
            Self::Reset => Kind::ResetWatches,
            Self::Start => Kind::TransactionStart,
            Self::End(_) => Kind::TransactionEnd,
        }
    }

    fn payload(&self) -> String {
        match self {
            Self::Read(p)
            | Self::Directory(p)
            | Self::GetPerms(p)
            | Self::Mkdir(p)
            | Self::Rm(p) => {
                format!("{p}\0")
            }
            Self::DirectoryPart(p, offset) => format!("{p}\0{offset}\0"),
            Self::Write(p, value) => format!("{p}\0{value}"),
            Self::SetPerms(p, perms) => format!("{p}\0{}", perm_text(perms)),
            Self::Watch(p, token, Some(depth)) => format!("{p}\0{token}\0{depth}\0"),
            Self::Watch(p, token, None) | Self::Unwatch(p, token) => format!("{p}\0{token}\0"),
            Self::Reset | Self::Start => "\0".to_owned(),
            Self::End(commit) => if *commit { "T\0" } else { "F\0" }.to_owned(),
        }
    }
}

fn perm_text(perms: &[(char, DomId)]) -> String {
    perms.iter().map(|(c, d)| format!("{c}{d}\0")).collect()
}

/// A node: its value, and its permissions.
type Node = (String, Vec<(char, DomId)>);

/// Whether a domain may read, and write.
fn may(perms: &[(char, DomId)], domain: DomId) -> (bool, bool) {
    if domain == 0 || perms[0].1 == domain {
        return (true, true);
    }
    let letter = perms[1..]
        .iter()
        .find(|p| p.1 == domain)
        .unwrap_or(&perms[0])
        .0;
    ("rb".contains(letter), "wb".contains(letter))
}

fn parent(path: &str) -> &str {
    match path.rsplit_once('/').expect("absolute").0 {
        "" => "/",
        parent => parent,
    }
}

/// The path below a directory, if it is there.
fn below<'a>(path: &'a str, top: &str) -> Option<&'a str> {
    if path == top {
        return Some("");
    }
    let prefix = if top == "/" {
        "/".to_owned()
    } else {
        format!("{top}/")
    };
    path.strip_prefix(&prefix)
}

struct Watch {
    path: String,
    relative: bool,
    token: char,
    depth: Option<usize>,
}

/// An open transaction: its number, what was done in it, and the model's version
/// when it began.
type Open = (u32, Vec<(Req, Reply)>, usize);

struct Client {
    domain: DomId,
    watches: Vec<Watch>,
    open: Vec<Open>,
}

/// A change: the node, its permissions before and after, what went with it.
type Change = (String, Vec<Vec<(char, DomId)>>, BTreeMap<String, Node>);

struct Model {
    nodes: BTreeMap<String, Node>,
    version: usize,
    changes: Vec<Change>,
}

impl Model {
    fn absolute(text: &str, domain: DomId) -> String {
        if text.starts_with('/') {
            text.to_owned()
        } else {
            format!("/local/domain/{domain}/{text}")
        }
    }

    /// The nearest node that exists, the path itself included.
    fn nearest<'a>(&self, path: &'a str) -> &'a str {
        let mut at = path;
        while !self.nodes.contains_key(at) {
            at = parent(at);
        }
        at
    }

    /// What is wrong with reading, or writing, a node.
    fn refusal(&self, path: &str, domain: DomId, write: bool) -> Option<&'static str> {
        let there = self.nearest(path);
        let (r, w) = may(&self.nodes[there].1, domain);
        let allowed = if write { w } else { r };
        match (there == path, allowed) {
            (true, true) => None,
            (true, false) => Some("EACCES"),
            (false, _) => Some(if allowed || r { "ENOENT" } else { "EACCES" }),
        }
    }

    fn make(&mut self, path: &str, domain: DomId) -> Result<(), &'static str> {
        let there = self.nearest(path).to_owned();
        let mut perms = self.nodes[&there].1.clone();
        if !may(&perms, domain).1 {
            return Err("EACCES");
        }
        if domain != 0 {
            perms[0].1 = domain;
        }
        let mut at = path;
        while at != there {
            self.nodes
                .insert(at.to_owned(), (String::new(), perms.clone()));
            at = parent(at);
        }
        Ok(())
    }

    fn names(&self, path: &str) -> Vec<u8> {
        let names = self.nodes.keys().filter_map(|at| below(at, path));
        names
            .filter(|name| !name.is_empty() && !name.contains('/'))
            .flat_map(|name| format!("{name}\0").into_bytes())
            .collect()
    }

    /// A request on the tree.
    fn run(&mut self, req: &Req, domain: DomId) -> Result<Vec<u8>, &'static str> {
        let (Req::Read(text)
        | Req::Directory(text)
        | Req::DirectoryPart(text, _)
        | Req::GetPerms(text)
        | Req::Write(text, _)
        | Req::Mkdir(text)
        | Req::Rm(text)
        | Req::SetPerms(text, _)) = req
        else {
            unreachable!("not on the tree")
        };
        let path = Self::absolute(text, domain);
        let there = self.nodes.get(&path).cloned();
        let readable = |model: &Self| model.refusal(&path, domain, false).map_or(Ok(()), Err);
        let done = |model: &mut Self, perms, removed| {
            model.version += 1;
            model.changes.push((path.clone(), perms, removed));
            Ok(b"OK\0".to_vec())
        };
        match req {
            Req::Read(_) => readable(self).map(|()| there.unwrap_or_default().0.into_bytes()),
            Req::GetPerms(_) => {
                readable(self).map(|()| perm_text(&there.unwrap_or_default().1).into_bytes())
            }
            Req::Directory(_) => readable(self).map(|()| self.names(&path)),
            Req::DirectoryPart(_, offset) => {
                readable(self)?;
                let names = self.names(&path);
                // Whole names only: from the first that begins at the offset or later.
                let begins = |&at: &usize| at >= *offset && (at == 0 || names[at - 1] == 0);
                let from = (0..names.len()).find(begins).unwrap_or(names.len());
                Ok([&names[from..], b"\0"].concat())
            }
            Req::Write(_, value) => {
                match &there {
                    Some(node) if !may(&node.1, domain).1 => return Err("EACCES"),
                    Some(_) => {}
                    None => self.make(&path, domain)?,
                }
                let node = self.nodes.get_mut(&path).expect("made");
                node.0.clone_from(value);
                let perms = vec![node.1.clone()];
                done(self, perms, BTreeMap::new())
            }
            Req::Mkdir(_) => match there {
                Some(node) if may(&node.1, domain).1 => Ok(b"OK\0".to_vec()),
                Some(_) => Err("EACCES"),
                None => {
                    self.make(&path, domain)?;
                    let perms = vec![self.nodes[&path].1.clone()];
                    done(self, perms, BTreeMap::new())
                }
            },
            Req::Rm(_) => {
                if path == "/" {
                    return Err("EINVAL");
                }
                match self.refusal(&path, domain, true) {
                    Some("ENOENT") => {
                        let above = self.refusal(parent(&path), domain, false);
                        return above.map_or(Ok(b"OK\0".to_vec()), Err);
                    }
                    Some(error) => return Err(error),
                    None => {}
                }
                let gone = |at: &String| below(at, &path).is_some();
                let (removed, kept) = std::mem::take(&mut self.nodes)
                    .into_iter()
                    .partition(|(at, _)| gone(at));
                self.nodes = kept;
                done(self, vec![there.expect("found").1], removed)
            }
            Req::SetPerms(_, perms) => {
                if let Some(error) = self.refusal(&path, domain, true) {
                    return Err(error);
                }
                let node = self.nodes.get_mut(&path).expect("found");
                if domain != 0 && node.1[0].1 != domain {
                    return Err("EACCES");
                }
                if domain != 0 && perms[0].1 != domain {
                    return Err("EPERM");
                }
                let before = std::mem::replace(&mut node.1, perms.clone());
                done(self, vec![before, perms.clone()], BTreeMap::new())
            }
            _ => unreachable!("matched above"),
        }
    }

    /// The events of what has changed, for one client.
    fn events(&self, client: &Client) -> Vec<String> {
        let mut events = Vec::new();
        for (path, perms, removed) in &self.changes {
            for watch in &client.watches {
                let readable = |lists: &[Vec<(char, DomId)>]| {
                    lists.iter().any(|list| may(list, client.domain).0)
                };
                let told = if let Some(rest) = below(path, &watch.path) {
                    let levels = rest.split('/').filter(|part| !part.is_empty()).count();
                    let near = watch.depth.is_none_or(|depth| levels <= depth);
                    (near && readable(perms)).then_some(path)
                } else if !removed.is_empty() && below(&watch.path, path).is_some() {
                    // Of a node that is gone, or was not there, as far as one may know.
                    let own = removed.get(&watch.path).map(|node| vec![node.1.clone()]);
                    readable(own.as_ref().unwrap_or(perms)).then_some(&watch.path)
                } else {
                    None
                };
                if let Some(told) = told {
                    let home = format!("/local/domain/{}/", client.domain);
                    let text = if watch.relative {
                        &told[home.len()..]
                    } else {
                        told
                    };
                    let event = format!("{text}\0{}\0", watch.token);
                    if !events.contains(&event) {
                        events.push(event);
                    }
                }
            }
        }
        events
    }
}

#[derive(Clone, Debug)]
struct Step {
    who: usize,
    /// Which of the open transactions, if there are so many.
    inside: usize,
    req: Req,
    cut: usize,
}

fn req() -> impl Strategy<Value = Req> {
    let path = || "((a|b)(/[ab]){0,2}|/pub(/[ab]){0,2}|/local/domain/[12](/[ab]){0,2}|/)";
    let perm = || (proptest::sample::select(vec!['n', 'r', 'w', 'b']), 0u16..3);
    let token = || proptest::sample::select(vec!['x', 'y']);
    prop_oneof![
        4 => path().prop_map(Req::Read),
        2 => path().prop_map(Req::Directory),
        1 => (path(), 0usize..5).prop_map(|(p, n)| Req::DirectoryPart(p, n)),
        1 => path().prop_map(Req::GetPerms),
        8 => (path(), "[a-z]{0,3}").prop_map(|(p, v)| Req::Write(p, v)),
        3 => path().prop_map(Req::Mkdir),
        3 => path().prop_map(Req::Rm),
        3 => (path(), proptest::collection::vec(perm(), 1..4)).prop_map(|(p, l)| Req::SetPerms(p, l)),
        4 => (path(), token(), prop_oneof![2 => Just(None), 1 => (0usize..3).prop_map(Some)])
            .prop_map(|(p, t, d)| Req::Watch(p, t, d)),
        1 => (path(), token()).prop_map(|(p, t)| Req::Unwatch(p, t)),
        1 => Just(Req::Reset),
        3 => Just(Req::Start),
        5 => any::<bool>().prop_map(Req::End),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    (0usize..3, 0usize..3, req(), 1usize..30).prop_map(|(who, inside, req, cut)| Step {
        who,
        inside,
        req,
        cut,
    })
}

/// All messages of a client: kind and payload.
fn read(end: &mut Connection) -> Vec<(Kind, Vec<u8>)> {
    super::replies(end)
}

/// The parts of the test: the store with its ends, and the model with its clients.
struct Both {
    store: Store,
    ends: [Connection; 3],
    model: Model,
    clients: Vec<Client>,
}

impl Both {
    fn new() -> Self {
        // Quotas do not matter here.
        let (store, ends) = three_clients(Quotas {
            nodes: 10_000,
            watches: 10_000,
            transactions: 10_000,
            ..Quotas::default()
        });
        let node = |letter, owner| (String::new(), vec![(letter, owner)]);
        let nodes = BTreeMap::from([
            ("/".to_owned(), node('r', 0)),
            ("/local".to_owned(), node('r', 0)),
            ("/local/domain".to_owned(), node('r', 0)),
            ("/local/domain/1".to_owned(), node('n', 1)),
            ("/local/domain/2".to_owned(), node('r', 2)),
            ("/pub".to_owned(), node('b', 0)),
        ]);
        Self {
            store,
            ends,
            model: Model {
                nodes,
                version: 0,
                changes: Vec::new(),
            },
            clients: (0..3)
                .map(|domain| Client {
                    domain,
                    watches: Vec::new(),
                    open: Vec::new(),
                })
                .collect(),
        }
    }

    /// Sends a request in two pieces; gives the reply, and what everyone is told.
    fn ask(&mut self, step: &Step, transaction: u32) -> (Reply, [Vec<Vec<u8>>; 3]) {
        let payload = step.req.payload().into_bytes();
        let header = Header {
            kind: step.req.kind() as u32,
            request: 7,
            transaction,
            length: payload.len() as u32,
        };
        let bytes = [&header.encode()[..], &payload].concat();
        let (first, second) = bytes.split_at(step.cut.min(bytes.len() - 1));
        for piece in [first, second] {
            let taken = self.ends[step.who].receive(&mut self.store, piece);
            assert_eq!(taken, Ok(piece.len()));
        }
        let mut reply = None;
        let mut events: [Vec<Vec<u8>>; 3] = Default::default();
        for (n, end) in self.ends.iter_mut().enumerate() {
            end.collect_events(&mut self.store);
            for (kind, mut payload) in read(end) {
                if kind == Kind::WatchEvent {
                    events[n].push(payload);
                    continue;
                }
                assert!(n == step.who && reply.is_none(), "a reply too many");
                reply = Some(if kind == Kind::Error {
                    payload.pop();
                    Err(String::from_utf8(payload).expect("a name"))
                } else {
                    assert_eq!(kind, step.req.kind());
                    if kind == Kind::DirectoryPart {
                        // The model has no generations.
                        let head = payload.iter().position(|b| *b == 0).expect("a generation");
                        payload.drain(..=head);
                    }
                    Ok(payload)
                });
            }
        }
        (reply.expect("an answer"), events)
    }

    fn step(&mut self, step: &Step) -> Result<(), TestCaseError> {
        let open = &self.clients[step.who].open;
        let slot = step.inside.checked_sub(1).filter(|n| *n < open.len());
        let number = slot.map_or(0, |n| open[n].0);
        let (reply, told) = self.ask(step, number);
        let client = &mut self.clients[step.who];
        let domain = client.domain;
        let ok: Reply = Ok(b"OK\0".to_vec());
        let fail = |name: &str| -> Reply { Err(name.to_owned()) };
        let mut first_event = None;
        match (&step.req, slot) {
            (Req::Start, Some(_)) => prop_assert_eq!(&reply, &fail("EBUSY")),
            (Req::Start, None) => {
                let text = String::from_utf8(reply.clone().expect("begun")).expect("digits");
                let number = text.trim_end_matches('\0').parse().expect("a number");
                client.open.push((number, Vec::new(), self.model.version));
            }
            (Req::End(_), None) => prop_assert_eq!(&reply, &fail("ENOENT")),
            (Req::End(false), Some(n)) => {
                client.open.remove(n);
                prop_assert_eq!(&reply, &ok);
            }
            (Req::End(true), Some(n)) => {
                let (_, log, begun) = client.open.remove(n);
                if reply == fail("EAGAIN") {
                    prop_assert!(self.model.version != begun, "no reason for EAGAIN");
                } else {
                    prop_assert_eq!(&reply, &ok);
                    for (req, seen) in log {
                        let now = self.model.run(&req, domain).map_err(ToOwned::to_owned);
                        prop_assert_eq!(now, seen, "{:?} in a transaction", req);
                    }
                }
            }
            (Req::Reset, _) => {
                client.watches.clear();
                client.open.clear();
                prop_assert_eq!(&reply, &ok);
            }
            (Req::Watch(text, token, depth), _) => {
                let path = Model::absolute(text, domain);
                let same = |w: &Watch| w.path == path && w.token == *token;
                if client.watches.iter().any(same) {
                    prop_assert_eq!(&reply, &fail("EEXIST"));
                } else {
                    prop_assert_eq!(&reply, &ok);
                    client.watches.push(Watch {
                        path,
                        relative: !text.starts_with('/'),
                        token: *token,
                        depth: *depth,
                    });
                    first_event = Some(format!("{text}\0{token}\0"));
                }
            }
            (Req::Unwatch(text, token), _) => {
                let path = Model::absolute(text, domain);
                let before = client.watches.len();
                client
                    .watches
                    .retain(|w| w.path != path || w.token != *token);
                let found = client.watches.len() != before;
                prop_assert_eq!(&reply, &if found { ok } else { fail("ENOENT") });
            }
            (req, Some(n)) => client.open[n].1.push((req.clone(), reply)),
            (req, None) => {
                let now = self.model.run(req, domain).map_err(ToOwned::to_owned);
                prop_assert_eq!(&reply, &now);
            }
        }
        for (n, (client, told)) in self.clients.iter().zip(told).enumerate() {
            let mut events = self.model.events(client);
            events.extend(first_event.clone().filter(|_| n == step.who));
            let events: Vec<_> = events.into_iter().map(String::into_bytes).collect();
            prop_assert_eq!(told, events, "events of client {}", n);
        }
        self.model.changes.clear();
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    /// Three domains, all requests on the tree, permissions, watches, transactions.
    #[test]
    fn the_wire_is_as_the_model_says(steps in proptest::collection::vec(step(), 1..150)) {
        let mut both = Both::new();
        for (n, step) in steps.iter().enumerate() {
            both.step(step).map_err(|e| TestCaseError::fail(format!("step {n}, {step:?}: {e}")))?;
        }
        crate::testing::check(&both.store);
        let tree: Vec<_> = both.store.tree().nodes.iter().map(|(path, node)| {
            let perms: String = node.perms.iter().map(|perm| perm.text() + "\0").collect();
            (path.to_string(), node.value.clone(), perms)
        }).collect();
        let model: Vec<_> = both.model.nodes.iter().map(|(path, (value, perms))| {
            (path.clone(), value.clone().into_bytes(), perm_text(perms))
        }).collect();
        prop_assert_eq!(tree, model);
    }
}
