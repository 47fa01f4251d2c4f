//! Any bytes as an answer, in any pieces.

mod world;

use bmcast_net::{Answer, Expect, FetchError, Need, Outcome};
use proptest::prelude::*;
use world::{CLEAR, Reply, Then, World, bytes, proper};

/// What comes of `input`, given in pieces that end at `cuts`: the outcome, and how much of it was its.
fn read(expect: Expect, input: &[u8], cuts: &[usize]) -> (Option<Outcome>, usize) {
    let mut answer = Answer::new(expect);
    let mut ends: Vec<usize> = cuts.iter().map(|cut| cut % (input.len() + 1)).collect();
    ends.push(input.len());
    ends.sort_unstable();
    let mut begin = 0;
    for end in ends {
        let (used, outcome) = answer.feed(&input[begin..end]);
        begin += used;
        if outcome.is_some() {
            // Nothing is taken once it is over.
            assert_eq!(answer.feed(&input[begin..]), (0, None));
            return (outcome, begin);
        }
        assert_eq!(begin, end, "all is taken while it is not over");
    }
    (None, begin)
}

fn expectation() -> impl Strategy<Value = Expect> {
    prop_oneof![
        (0..200_u64, 1..200_u32).prop_map(|(offset, len)| Expect::Range { offset, len }),
        (0..200_u64).prop_map(|limit| Expect::Whole { limit }),
        Just(Expect::Taken),
    ]
}

/// Heads that are nearly right.
fn answer() -> impl Strategy<Value = Vec<u8>> {
    let status = prop_oneof![
        Just("HTTP/1.1 206 Partial Content".to_string()),
        Just("HTTP/1.1 200 OK".to_string()),
        Just("HTTP/1.0 200 OK".to_string()),
        (0..1100_u32).prop_map(|status| format!("HTTP/1.1 {status} X")),
        "[ -~]{0,30}",
    ];
    let number = prop_oneof![
        (0..400_u64).prop_map(|number| number.to_string()),
        any::<u64>().prop_map(|number| number.to_string()),
        "[0-9a-fx +-]{0,25}",
    ];
    let field = prop_oneof![
        number
            .clone()
            .prop_map(|length| format!("Content-Length: {length}")),
        (number.clone(), number.clone(), number)
            .prop_map(|(first, last, all)| format!("Content-Range: bytes {first}-{last}/{all}")),
        Just("Transfer-Encoding: chunked".to_string()),
        Just("Connection: close".to_string()),
        Just("Content-Encoding: identity".to_string()),
        "[A-Za-z-]{1,12}: ?[ -~]{0,40}",
        "[ -~]{0,40}",
    ];
    let body = prop::collection::vec(any::<u8>(), 0..500);
    let fields = prop::collection::vec(field, 0..6);
    (status, fields, body).prop_map(|(status, fields, body)| {
        let mut all = format!("{status}\r\n").into_bytes();
        for field in fields {
            all.extend(format!("{field}\r\n").into_bytes());
        }
        all.extend(b"\r\n");
        all.extend(body);
        all
    })
}

fn hostile() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        prop::collection::vec(any::<u8>(), 0..600),
        answer(),
        // One that is right, with some bytes changed.
        (answer(), prop::collection::vec(any::<(usize, u8)>(), 0..4)).prop_map(
            |(mut all, changes)| {
                for (at, byte) in changes {
                    let at = at % all.len();
                    all[at] = byte;
                }
                all
            }
        ),
        // Without end.
        (1..20_000_usize)
            .prop_map(|len| [b"HTTP/1.1 200 OK\r\nX: ".to_vec(), vec![b'x'; len]].concat()),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// No panic; no body that is not exactly what was asked for; and the pieces do not matter.
    #[test]
    fn any_answer(
        expect in expectation(),
        input in hostile(),
        cuts in prop::collection::vec(any::<usize>(), 0..8),
    ) {
        let (whole, used) = read(expect, &input, &[]);
        let (pieces, _) = read(expect, &input, &cuts);
        prop_assert!(used <= input.len());
        if let (Some(whole), Some(pieces)) = (&whole, &pieces) {
            prop_assert_eq!(&whole.result, &pieces.result);
        }
        prop_assert_eq!(whole.is_some(), pieces.is_some());
        if let Some(Outcome { result: Ok(body), .. }) = whole {
            match expect {
                Expect::Range { len, .. } => prop_assert_eq!(body.len(), len as usize),
                Expect::Whole { limit } => prop_assert!(body.len() as u64 <= limit),
                Expect::Taken => prop_assert!(body.is_empty()),
            }
            prop_assert!(input.windows(body.len().max(1)).any(|part| part == body) || body.is_empty());
        }
    }

    /// What is right is taken as it is, and what is behind it is left.
    #[test]
    fn right_answers(
        offset in 0..u64::MAX / 2,
        body in prop::collection::vec(any::<u8>(), 1..3000),
        behind in prop::collection::vec(any::<u8>(), 0..100),
        interim in 0..4_usize,
        cuts in prop::collection::vec(any::<usize>(), 0..20),
    ) {
        let len = u32::try_from(body.len()).unwrap();
        let last = offset + u64::from(len) - 1;
        let mut input = b"HTTP/1.1 100 Continue\r\n\r\n".repeat(interim);
        input.extend(format!(
            "HTTP/1.1 206 Partial Content\r\nContent-Range: bytes {offset}-{last}/*\r\nContent-Length: {len}\r\n\r\n"
        ).into_bytes());
        input.extend(&body);
        let end = input.len();
        input.extend(&behind);
        let (outcome, used) = read(Expect::Range { offset, len }, &input, &cuts);
        prop_assert_eq!(outcome, Some(Outcome { result: Ok(body), reusable: true }));
        prop_assert_eq!(used, end);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    /// Whatever a server says, the client comes to an end with it and goes on with a better one.
    #[test]
    fn any_server(
        says in hostile(),
        then in prop_oneof![
            Just(Then::Keep), Just(Then::Close), Just(Then::Reset), Just(Then::Silent)
        ],
        file in any::<bool>(),
    ) {
        let say = says.clone();
        let mut world = World::usual(CLEAR, move |_| Reply { bytes: say.clone(), then });
        let ticket = if file {
            world.client.get("manifest", 100).unwrap()
        } else {
            world.client.fetch(100, 100, Need::Guest).unwrap()
        };
        let result = world.result(ticket, 10_000);
        prop_assert!(world.asked <= 60, "{} requests in 10 s", world.asked);
        match result {
            // It is asked for again and again.
            None => {
                world.behaviour = Box::new(proper);
                let right = if file { b"/i/manifest".to_vec() } else { bytes(100, 100) };
                prop_assert_eq!(world.result(ticket, 20_000), Some(Ok(right)));
            }
            Some(Ok(body)) => prop_assert!(body.len() <= 100),
            Some(Err(FetchError::Memory(_))) => prop_assert!(false, "memory for 100 bytes"),
            Some(Err(_)) => {}
        }
        world.behaviour = Box::new(proper);
        let ticket = world.client.fetch(100, 100, Need::Guest).unwrap();
        prop_assert_eq!(world.result(ticket, 20_000), Some(Ok(bytes(100, 100))));
    }
}
