//! What a guest should not do with the xenstore, and what comes of it.

use core::sync::atomic::Ordering::SeqCst;

use blanket_abi::xen::io::xenstore as page;

use super::guest::{PATIENCE, claim, notify, sleep};
use super::xenstore::{HEADER, Refused, Store, kind};
use crate::rng::Rng;
use crate::text;

/// Requests that are none, with any payload: each is answered, and none changes anything.
pub fn nonsense(store: &mut Store, rng: &mut Rng) {
    for _ in 0..24 {
        let mut payload = [0u8; 64];
        for byte in &mut payload {
            *byte = match rng.below(4) {
                0 => 0,
                1 => b'/',
                2 => b'a' + rng.below(26) as u8,
                _ => rng.next() as u8,
            };
        }
        let length = rng.below(64) as usize;
        let kind = match rng.below(4) {
            // The store's own words, and the tool stack's.
            0 => rng.pick(&[kind::WATCH_EVENT, kind::ERROR, 0, 8, 9, 18, 19, 24, 25, 26]),
            1 => rng.next() as u32,
            2 => 27 + rng.below(100) as u32,
            _ => rng.pick(&[20, 1 << 31, u32::MAX]),
        };
        let transaction = rng.pick(&[0, 0, 1, 99, u32::MAX]);
        let asked = store.ask(kind, transaction, &[&payload[..length]]);
        claim(asked == Err(Refused::Error), "nonsense is refused");
    }
    // Requests that there are, with payloads that are none.
    for kind in [kind::READ, kind::WRITE, kind::MKDIR, kind::RM, kind::WATCH] {
        for payload in [
            &b""[..],
            b"no end",
            b"//\0",
            b"a//b\0",
            b"/local/domain/\0",
            b"\xff\xfe\0x\0",
            b"@nothing\0t\0",
            b"a\nb\0",
        ] {
            let asked = store.ask(kind, 0, &[payload]);
            claim(asked != Err(Refused::Silent), "a bad payload is answered");
        }
    }
    // A path as long as a message can be.
    let long = [b'a'; page::PAYLOAD_MAX - 1];
    let asked = store.ask(kind::WRITE, 0, &[&long, b"\0"]);
    claim(asked == Err(Refused::Error), "a path that is too long");
    let _ = store.ask(kind::RESET_WATCHES, 0, &[b"\0"]);
}

/// Messages in pieces, with the other things that a guest does between them.
pub fn halves(store: &mut Store, rng: &mut Rng) {
    for _ in 0..6 {
        let (path, value) = (b"data/h/half\0", [b'v'; 300]);
        let length = path.len() + value.len();
        let mut message = [0u8; HEADER + 12 + 300];
        message[..HEADER].copy_from_slice(&store.header(kind::WRITE, 0, length as u32));
        message[HEADER..HEADER + 12].copy_from_slice(path);
        message[HEADER + 12..].copy_from_slice(&value);
        let cut = 1 + rng.below(message.len() as u64 - 2) as usize;
        claim(store.send(&message[..cut]), "a piece is taken");
        for _ in 0..4 {
            notify(store.port);
        }
        let answered = store.answer(20_000_000);
        claim(
            answered == Err(Refused::Silent),
            "half a message has no answer",
        );
        claim(store.send(&message[cut..]), "the rest is taken");
        claim(store.answer(PATIENCE) == Ok(()), "a whole one has");
    }
    claim(
        store.read("data/h/half").map(<[u8]>::len) == Ok(300),
        "it is what was written",
    );
    claim(
        store.ask(kind::RM, 0, &[b"data/h/half\0"]).is_ok(),
        "own nodes can go",
    );
}

/// Transactions that are begun and not ended, large ones, and ends of none.
pub fn transactions(store: &mut Store, rng: &mut Rng) {
    let mut open = [0u32; 64];
    let mut count = 0;
    let last = loop {
        let asked = store.ask(kind::TRANSACTION_START, 0, &[b"\0"]);
        if asked.is_err() || count == open.len() {
            break asked;
        }
        open[count] = store
            .reply()
            .iter()
            .take_while(|byte| byte.is_ascii_digit())
            .fold(0, |n, byte| n * 10 + u32::from(byte - b'0'));
        count += 1;
    };
    claim(last == Err(Refused::Error), "transactions have a limit");
    for (n, id) in open[..count].iter().enumerate() {
        for _ in 0..rng.below(20) {
            let path = text!("data/h/tx{}", rng.below(40));
            let _ = store.ask(kind::WRITE, *id, &[path.bytes(), b"\0", b"x"]);
        }
        if n % 2 == 0 {
            let state = text!("device/vbd/51712/tx{n}");
            let _ = store.ask(kind::WRITE, *id, &[state.bytes(), b"\0", b"1"]);
        }
    }
    let none = store.ask(kind::TRANSACTION_END, 0xdead, &[b"T\0"]);
    claim(none == Err(Refused::Error), "the end of none");
    let nested = store.ask(kind::TRANSACTION_START, open[0], &[b"\0"]);
    claim(nested == Err(Refused::Error), "none inside another");
    // Half of them would be enough to keep others out, if they could.
    claim(store.write("data/h/out", b"1").is_ok(), "outside of them");
    for id in &open[..count] {
        let how: &[u8] = rng.pick(&[b"T\0", b"F\0"]);
        let _ = store.ask(kind::TRANSACTION_END, *id, &[how]);
    }
    let _ = store.ask(kind::RM, 0, &[b"data/h\0"]);
    for n in 0..count {
        let _ = store.ask(
            kind::RM,
            0,
            &[text!("device/vbd/51712/tx{n}").bytes(), b"\0"],
        );
    }
}

/// Watches until there may be no more, all of which then fire, and nobody reads.
pub fn watches(store: &mut Store, _: &mut Rng) {
    let mut refused = false;
    for n in 0..400 {
        let token = text!("token-{n}-with-some-more-letters");
        let asked = store.ask(kind::WATCH, 0, &[b"data/h\0", token.bytes(), b"\0"]);
        claim(asked != Err(Refused::Silent), "a watch is answered");
        if asked.is_err() {
            refused = true;
            break;
        }
    }
    claim(refused, "watches have a limit");
    for n in 0..12u32 {
        let payload = text!("data/h/{n}");
        let header = store.header(kind::WRITE, 0, payload.bytes().len() as u32 + 1);
        claim(
            store.send(&header) && store.send(payload.bytes()) && store.send(b"\0"),
            "a request is taken while nobody reads",
        );
    }
    // The ring is full of events now. All of them can be read.
    sleep(store.port, 20);
    claim(
        store.answer(PATIENCE) == Ok(()),
        "the answer comes behind them",
    );
    claim(
        store.ask(kind::RESET_WATCHES, 0, &[b"\0"]).is_ok(),
        "watches can go",
    );
    claim(
        store.ask(kind::RM, 0, &[b"data/h\0"]).is_ok(),
        "nodes can go",
    );
}

/// Nodes that are somebody else's.
pub fn foreign(store: &mut Store, _: &mut Rng) {
    for path in [
        "/local/domain/0/backend/vbd/1/51712/state",
        "/local/domain/0/backend/vbd/1/51712/sectors",
        "/local/domain/0/name",
        "/local/domain/1/domid",
        "/local/domain/1/name",
        "/local/domain/1/memory/target",
        "/local/domain/2/device/vbd/51712/state",
        "/tool/xenstored",
        "/vm/1",
        "/",
        "device/vbd/99999/state",
        "device/vbd/51712/backend-id",
    ] {
        let before = store.read(path).map(|value| {
            let mut sum = value.len() as u64;
            for byte in value {
                sum = sum.wrapping_mul(31).wrapping_add(u64::from(*byte));
            }
            sum
        });
        let written = store.write(path, b"6");
        let perms = store.ask(kind::SET_PERMS, 0, &[path.as_bytes(), b"\0n1\0"]);
        let gone = store.ask(kind::RM, 0, &[path.as_bytes(), b"\0"]);
        // What is the guest's own may be written; the rest is as it was. (To remove what
        // is not there is granted, as in Xen.)
        let own = path.starts_with("device/");
        if !own {
            let refused = Err(Refused::Error);
            assert!(
                written == refused && perms == refused && gone != Err(Refused::Silent),
                "does not hold: {path} is not the guest's: {written:?} {perms:?}"
            );
            let after = store.read(path).map(|value| {
                let mut sum = value.len() as u64;
                for byte in value {
                    sum = sum.wrapping_mul(31).wrapping_add(u64::from(*byte));
                }
                sum
            });
            assert!(before == after, "does not hold: {path} is as it was");
        }
    }
}

/// Nodes until there may be no more.
pub fn quota(store: &mut Store, rng: &mut Rng) {
    let value = [b'q'; 2048];
    let size = rng.pick(&[1, 100, 2048]);
    let mut refused = false;
    for n in 0..1200 {
        let path = text!("data/h/quota/{n}");
        let done = store.write(path.str(), &value[..size]);
        claim(done != Err(Refused::Silent), "a write is answered");
        if done.is_err() {
            refused = true;
            break;
        }
    }
    claim(refused, "nodes have a limit");
    let longer = store.ask(kind::WRITE, 0, &[b"data/h/quota/0\0", &value, b"q"]);
    claim(longer == Err(Refused::Error), "values have a limit");
    let listed = store.ask(kind::DIRECTORY, 0, &[b"data/h/quota\0"]);
    claim(
        listed != Err(Refused::Silent),
        "a long directory is answered",
    );
    claim(
        store.ask(kind::RM, 0, &[b"data/h\0"]).is_ok(),
        "nodes can go",
    );
}

/// The end of the ring: an index that cannot be, or a length that no message has.
pub fn break_ring(store: &mut Store, rng: &mut Rng, by_length: bool) {
    if by_length {
        let length = rng.pick(&[4097, 1 << 16, 1 << 31, u32::MAX]);
        let header = store.header(kind::READ, 0, length);
        store.send(&header);
    } else if rng.once_in(2) {
        let ours = store.index(page::REQ_PROD);
        let jump = rng.pick(&[1025, 1 << 16, 1 << 31, u32::MAX]);
        ours.store(ours.load(SeqCst).wrapping_add(jump), SeqCst);
        notify(store.port);
    } else {
        let ours = store.index(page::RSP_CONS);
        let jump = rng.pick(&[1, 1 << 16, 1 << 31, u32::MAX - 2000]);
        ours.store(ours.load(SeqCst).wrapping_add(jump), SeqCst);
        // It sees that when it has something to say.
        let header = store.header(kind::READ, 0, 8);
        store.send(&header);
        store.send(b"control\0");
    }
    let error = store.index(page::ERROR);
    let told = super::guest::wait_for(store.port, PATIENCE, || error.load(SeqCst) != 0);
    claim(told, "the store says that it gave the ring up");
}
