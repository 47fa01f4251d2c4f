//! A store that is saved and restored again and again, beside one that never is:
//! nobody can tell them apart.

use proptest::prelude::*;

use crate::state::{ConnectionState, StoreState};
use crate::testing::{SMALL, check, three_clients};
use crate::wire::Header;
use crate::*;

struct Machine {
    store: Store,
    ends: [Connection; 3],
}

impl Machine {
    fn new() -> Self {
        let (store, ends) = three_clients(SMALL);
        Self { store, ends }
    }

    /// Through text, and into a store that knows nothing of the first.
    fn restored(&self) -> Self {
        let text = serde_json::to_string(&self.store.save()).expect("plain data");
        let state: StoreState = serde_json::from_str(&text).expect("what was written");
        let store = Store::restore(state, SMALL).expect("saved by a store");
        check(&store);
        let ends = self.ends.each_ref().map(|end| {
            let text = serde_json::to_string(&end.save()).expect("plain data");
            let state: ConnectionState = serde_json::from_str(&text).expect("what was written");
            Connection::restore(state, &store).expect("saved with its store")
        });
        Self { store, ends }
    }
}

#[derive(Clone, Debug)]
enum Step {
    /// A client has something to say: kind, which of its open transactions, payload.
    Say(usize, u32, usize, Vec<u8>),
    /// So many bytes of what it says arrive.
    Arrive(usize, usize),
    /// The client reads so many bytes.
    Read(usize, usize),
    /// The one that carries bytes comes by.
    Collect(usize),
    /// The host does something by a call.
    Host(u8),
    /// All is moved to another store.
    Move,
}

fn payload() -> impl Strategy<Value = Vec<u8>> {
    let path = "(a|b|/pub|/local/domain/[12])(/[ab]){0,2}";
    prop_oneof![
        8 => path.prop_map(|path| format!("{path}\0")),
        8 => (path, "[a-z]{0,12}").prop_map(|(path, value)| format!("{path}\0{value}")),
        3 => (path, "[xy]\0([012]\0)?").prop_map(|(path, rest)| format!("{path}\0{rest}")),
        3 => (path, "([nrwb][012]\0){1,3}").prop_map(|(path, perms)| format!("{path}\0{perms}")),
        2 => "@(introduce|release)Domain(/7)?\0[xy]\0(1\0)?",
        1 => "[TF0-9/]{0,2}\0".prop_map(|text| text),
    ]
    .prop_map(String::into_bytes)
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let end = prop_oneof![Just(b"T\0".to_vec()), Just(b"F\0".to_vec())];
    let kind = prop_oneof![
        5 => Just(11u32),
        2 => 1u32..6,
        3 => 11u32..15,
        1 => 0u32..28,
    ];
    let who = || 0usize..3;
    // 0 is no transaction, and 4 mostly one that is not open.
    let slot = || prop_oneof![2 => Just(0usize), 3 => 1usize..5];
    let step = prop_oneof![
        2 => who().prop_map(|who| Step::Say(who, 6, 0, b"\0".to_vec())),
        2 => (who(), slot(), end).prop_map(|(who, slot, end)| Step::Say(who, 7, slot, end)),
        12 => (who(), kind, slot(), payload())
            .prop_map(|(who, kind, slot, payload)| Step::Say(who, kind, slot, payload)),
        12 => (who(), 1usize..120).prop_map(|(who, n)| Step::Arrive(who, n)),
        2 => (who(), 1usize..200).prop_map(|(who, n)| Step::Read(who, n)),
        1 => who().prop_map(|who| Step::Read(who, 1 << 20)),
        2 => who().prop_map(Step::Collect),
        1 => any::<u8>().prop_map(Step::Host),
        3 => Just(Step::Move),
    ];
    proptest::collection::vec(step, 1..200)
}

/// The message, with the transaction that it means as things are now.
fn message(store: &Store, conn: ConnId, kind: u32, slot: usize, payload: &[u8]) -> Vec<u8> {
    let mut open = store.clients[&conn].transactions.keys();
    let number = |n: usize| open.nth(n).map_or(99, |tx| tx.0);
    let header = Header {
        kind,
        request: 3,
        transaction: slot.checked_sub(1).map_or(0, number),
        length: payload.len() as u32,
    };
    [&header.encode()[..], payload].concat()
}

/// What can be seen of a step from outside.
fn run(machine: &mut Machine, backlog: &mut [Vec<u8>; 3], step: &Step) -> String {
    let Machine { store, ends } = machine;
    match step {
        Step::Arrive(who, most) => {
            let most = backlog[*who].len().min(*most);
            let result = ends[*who].receive(store, &backlog[*who][..most]);
            if let Ok(taken) = result {
                backlog[*who].drain(..taken);
            }
            format!("{result:?}")
        }
        Step::Read(who, most) => {
            let mut read = Vec::new();
            while read.len() < *most && !ends[*who].output().is_empty() {
                let count = ends[*who].output().len().min(*most - read.len());
                read.extend_from_slice(&ends[*who].output()[..count]);
                ends[*who].sent(count);
            }
            format!("{read:?}")
        }
        Step::Collect(who) => {
            ends[*who].collect_events(store);
            format!("{}", ends[*who].ready())
        }
        Step::Host(what) => {
            let host = ends[0].id();
            let spec = crate::tests::spec();
            let done = match what % 4 {
                0 => store.introduce(host, &DomainSpec { domain: 7, ..spec }),
                1 => store.release(host, 7),
                2 => {
                    let path = Path::parse("/local/domain/2/big", 0).expect("a path");
                    store.write(host, None, &path, &vec![*what; usize::from(*what) * 8])
                }
                _ => store.watch(host, "/pub", &[*what]),
            };
            format!("{done:?} {}", store.is_introduced(7))
        }
        Step::Say(..) | Step::Move => unreachable!("done by the caller"),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn a_move_is_not_noticed(steps in steps()) {
        let mut stays = Machine::new();
        let mut moves = Machine::new();
        let mut backlog: [[Vec<u8>; 3]; 2] = Default::default();
        // What is left is said, done and read in the end.
        let last = (0..3).flat_map(|who| {
            let end = |slot| Step::Say(who, 7, slot, b"T\0".to_vec());
            let through = [Step::Read(who, 1 << 20), Step::Arrive(who, 1 << 20)];
            let ends = [end(1), end(2), end(3)];
            [&through[..], &ends, &through, &through].concat()
        });
        for step in steps.into_iter().chain(last) {
            match &step {
                Step::Move => moves = moves.restored(),
                Step::Say(who, kind, slot, payload) => {
                    let conn = stays.ends[*who].id();
                    let bytes = message(&stays.store, conn, *kind, *slot, payload);
                    for backlog in &mut backlog {
                        backlog[*who].extend_from_slice(&bytes);
                    }
                }
                _ => {
                    let [first, second] = &mut backlog;
                    let seen = run(&mut stays, first, &step);
                    prop_assert_eq!(&seen, &run(&mut moves, second, &step), "{:?}", step);
                }
            }
        }
        check(&stays.store);
        prop_assert_eq!(stays.store.save(), moves.store.save());
        for (one, other) in stays.ends.iter().zip(&moves.ends) {
            prop_assert_eq!(one.save(), other.save());
        }
    }
}
