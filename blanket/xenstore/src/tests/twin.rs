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
    /// Bytes arrive, and stay with their sender as far as they are not taken.
    Arrive(usize, Vec<u8>),
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

fn arrival() -> impl Strategy<Value = Vec<u8>> {
    let open = prop_oneof![
        Just((6u32, 0u32, b"\0".to_vec())),
        (1u32..5).prop_map(|tx| (7, tx, b"T\0".to_vec())),
        (1u32..5).prop_map(|tx| (7, tx, b"F\0".to_vec())),
    ];
    let kind = prop_oneof![
        4 => Just(11u32),
        2 => 1u32..6,
        3 => 11u32..15,
        1 => 0u32..28,
    ];
    prop_oneof![
        2 => open,
        8 => (kind, prop_oneof![Just(0u32), 0u32..5], payload()),
    ]
    .prop_map(|(kind, transaction, payload)| {
        let length = payload.len() as u32;
        let header = Header {
            kind,
            request: 3,
            transaction,
            length,
        };
        let mut bytes = header.encode().to_vec();
        bytes.extend(payload);
        bytes
    })
}

/// Messages of a client, cut where no message ends.
fn arrivals() -> impl Strategy<Value = Vec<Step>> {
    let messages = proptest::collection::vec(arrival(), 1..5);
    let cuts = proptest::collection::vec(1usize..60, 1..6);
    (0usize..3, messages, cuts).prop_map(|(who, messages, cuts)| {
        let bytes = messages.concat();
        let mut rest = &bytes[..];
        let mut steps = Vec::new();
        for cut in cuts.iter().cycle() {
            let (piece, later) = rest.split_at((*cut).min(rest.len()));
            steps.push(Step::Arrive(who, piece.to_vec()));
            rest = later;
            if rest.is_empty() {
                break;
            }
        }
        steps
    })
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let some = prop_oneof![
        6 => arrivals(),
        3 => (0usize..3, 1usize..200).prop_map(|(who, n)| vec![Step::Read(who, n)]),
        1 => (0usize..3).prop_map(|who| vec![Step::Read(who, 1 << 20)]),
        2 => (0usize..3).prop_map(|who| vec![Step::Collect(who)]),
        1 => any::<u8>().prop_map(|what| vec![Step::Host(what)]),
    ];
    // A move may come between any two pieces.
    proptest::collection::vec(some, 1..60).prop_flat_map(|parts| {
        let steps = parts.concat();
        let moves = proptest::collection::vec(proptest::bool::weighted(0.15), steps.len());
        moves.prop_map(move |moves| {
            let both = steps.iter().zip(moves);
            both.flat_map(|(step, moved)| {
                let mut out = vec![step.clone()];
                out.extend(moved.then_some(Step::Move));
                out
            })
            .collect()
        })
    })
}

/// What can be seen of a step from outside.
fn run(machine: &mut Machine, backlog: &mut [Vec<u8>; 3], step: &Step) -> String {
    let Machine { store, ends } = machine;
    match step {
        Step::Arrive(who, bytes) => {
            backlog[*who].extend_from_slice(bytes);
            let result = ends[*who].receive(store, &backlog[*who]);
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
        Step::Move => String::new(),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn a_move_is_not_noticed(steps in steps()) {
        let mut stays = Machine::new();
        let mut moves = Machine::new();
        let mut backlog: [[Vec<u8>; 3]; 2] = Default::default();
        for step in &steps {
            if matches!(step, Step::Move) {
                moves = moves.restored();
                continue;
            }
            let [first, second] = &mut backlog;
            let seen = run(&mut stays, first, step);
            prop_assert_eq!(&seen, &run(&mut moves, second, step), "{:?}", step);
        }
        for who in 0..3 {
            // Commits of what is still open, and all that was not read.
            for tx in 1..5 {
                let header = Header { kind: 7, request: 0, transaction: tx, length: 2 };
                let mut end = header.encode().to_vec();
                end.extend(b"T\0");
                for step in [Step::Read(who, 1 << 20), Step::Arrive(who, end), Step::Read(who, 1 << 20)] {
                    let [first, second] = &mut backlog;
                    let seen = run(&mut stays, first, &step);
                    prop_assert_eq!(&seen, &run(&mut moves, second, &step), "at the end: {:?}", step);
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
