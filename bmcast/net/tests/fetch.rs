//! The client against a server over a wire that is not kind, by a clock of its own.

mod world;

use std::cell::Cell;
use std::net::Ipv4Addr;
use std::rc::Rc;

use bmcast_net::{Address, FetchError, Need};
use world::{Asked, CLEAR, FIRST, Reply, SECOND, Then, Weather, World, bytes, fixed, proper};

#[test]
fn a_range_a_file_and_a_report() {
    let mut world = World::usual(CLEAR, |asked| {
        if asked.method == "PUT" {
            assert_eq!(
                (asked.path.as_str(), asked.body.as_slice()),
                ("/up", &b"well"[..])
            );
        }
        proper(asked)
    });
    let ticket = world.client.fetch(1000, 5000, Need::Guest).unwrap();
    assert_eq!(world.result(ticket, 100), Some(Ok(bytes(1000, 5000))));
    let ticket = world.client.get("manifest", 100).unwrap();
    assert_eq!(world.result(ticket, 100), Some(Ok(b"/i/manifest".to_vec())));
    let ticket = world.client.put("/up", b"well").unwrap();
    assert_eq!(world.result(ticket, 100), Some(Ok(Vec::new())));
    let status = world.client.status();
    assert_eq!((status.received, status.retries, status.open), (5011, 0, 0));
}

#[test]
fn what_is_not_taken() {
    let mut world = World::usual(CLEAR, proper);
    let client = &mut world.client;
    assert_eq!(client.fetch(0, 0, Need::Guest), None);
    assert_eq!(client.fetch(0, (4 << 20) + 1, Need::Guest), None);
    assert_eq!(client.fetch(u64::MAX, 2, Need::Guest), None);
    assert_eq!(client.get("two words", 1), None);
    assert_eq!(client.put("up", &[0; (64 << 10) + 1]), None);
    for need in [Need::Background, Need::Guest] {
        let mut count = 0;
        while client.room(need) {
            assert!(client.fetch(0, 1, need).is_some());
            count += 1;
        }
        assert!((4..=8).contains(&count));
        assert_eq!(client.fetch(0, 1, need), None);
    }
    // What was not taken out counts.
    world.run(100);
    assert!(!world.client.room(Need::Background));
    while world.client.take().is_some() {}
    assert!(world.client.room(Need::Background));
}

#[test]
fn an_address_by_dhcp_and_its_change() {
    let mut world = World::new(&["http://10.0.0.1/i"], Address::Dhcp, CLEAR, proper);
    let ticket = world.client.fetch(0, 100, Need::Guest).unwrap();
    world.run(5000);
    assert_eq!(world.client.status().address, None);
    world.lease = Some(Ipv4Addr::new(10, 0, 0, 9));
    assert_eq!(world.result(ticket, 30_000), Some(Ok(bytes(0, 100))));
    let address = world.client.status().address;
    assert_eq!(address, Some((Ipv4Addr::new(10, 0, 0, 9), 24)));
    // The lease is of 60 s; nobody prolongs it, and then there is another.
    world.lease = None;
    world.run(70_000);
    assert_eq!(world.client.status().address, None);
    world.lease = Some(Ipv4Addr::new(10, 0, 0, 10));
    let ticket = world.client.fetch(100, 100, Need::Guest).unwrap();
    assert_eq!(world.result(ticket, 60_000), Some(Ok(bytes(100, 100))));
    let address = world.client.status().address;
    assert_eq!(address, Some((Ipv4Addr::new(10, 0, 0, 10), 24)));
}

/// 1 Gbit/s, and 4 ms from end to end and back: 16 MiB take 134 ms of the wire.
#[test]
fn the_wire_is_full() {
    let weather = Weather {
        delay: 2,
        rate: 125_000,
        ..CLEAR
    };
    let mut world = World::usual(weather, proper);
    let ms = world.fetch(64, 256 << 10, 60_000);
    assert!(ms < 134 * 5 / 4, "{ms} ms");
    assert_eq!(world.client.status().retries, 0);
}

#[test]
fn frames_are_lost_late_and_out_of_order() {
    for (loss, jitter) in [(10, 0), (0, 5), (20, 3), (100, 10)] {
        let weather = Weather {
            loss,
            delay: 1,
            jitter,
            ..CLEAR
        };
        let mut world = World::usual(weather, proper);
        let ms = world.fetch(32, 64 << 10, 600_000);
        println!(
            "loss {loss}, jitter {jitter}: {ms} ms, {:?}",
            world.client.status()
        );
    }
}

/// The guest runs for 20 ms at a time: what comes meanwhile is in the card.
#[test]
fn the_guest_runs() {
    let weather = Weather {
        delay: 1,
        rate: 125_000,
        ..CLEAR
    };
    let mut world = World::usual(weather, proper);
    let mut over = 0;
    while over < 64 {
        while world.client.room(Need::Background) {
            world.client.fetch(0, 128 << 10, Need::Background).unwrap();
        }
        world.polled = world.now.is_multiple_of(20);
        world.step();
        while let Some((_, result)) = world.client.take() {
            assert_eq!(result.unwrap().len(), 128 << 10);
            over += 1;
        }
        assert!(world.now < 5000);
    }
    assert_eq!(world.wire.borrow().dropped, 0);
    assert_eq!(world.client.status().retries, 0);
}

#[test]
fn a_server_that_resets_and_closes() {
    let count = Cell::new(0);
    let mut world = World::usual(CLEAR, move |asked| {
        count.set(count.get() + 1);
        let mut reply = proper(asked);
        match count.get() % 5 {
            1 => {
                reply.bytes.truncate(reply.bytes.len() / 2);
                reply.then = Then::Reset;
            }
            2 => reply.then = Then::Close,
            3 => {
                reply.bytes.clear();
                reply.then = Then::Close;
            }
            _ => {}
        }
        reply
    });
    world.fetch(40, 10_000, 600_000);
    assert!(world.client.status().retries > 10);
}

/// It resets each connection at once: the client does not hurry.
#[test]
fn a_server_that_only_resets() {
    let mut world = World::usual(CLEAR, |_| Reply {
        bytes: Vec::new(),
        then: Then::Reset,
    });
    let ticket = world.client.fetch(0, 100, Need::Guest).unwrap();
    world.run(60_000);
    assert!(world.client.take().is_none());
    assert!(
        (5..60).contains(&world.asked),
        "{} requests in a minute",
        world.asked
    );
    assert!(world.client.status().failures > 5);
    world.behaviour = Box::new(proper);
    assert_eq!(world.result(ticket, 6000), Some(Ok(bytes(0, 100))));
    assert_eq!(world.client.status().failures, 0);
}

/// For a minute nobody answers, by silence and by refusal.
#[test]
fn a_server_that_is_gone() {
    for refuses in [false, true] {
        let mut world = World::usual(CLEAR, proper);
        world.fetch(8, 10_000, 1000);
        let gone = Weather {
            dead: vec![FIRST],
            ..CLEAR
        };
        if refuses {
            world.open = false;
        } else {
            world.weather(gone);
        }
        let ticket = world.client.fetch(0, 100, Need::Guest).unwrap();
        world.run(60_000);
        assert!(world.client.take().is_none());
        assert!(world.client.status().failures > 3);
        world.weather(CLEAR);
        world.open = true;
        assert_eq!(
            world.result(ticket, 12_000),
            Some(Ok(bytes(0, 100))),
            "{refuses}"
        );
    }
}

/// It takes what is asked, and says nothing.
#[test]
fn a_server_that_is_silent() {
    let quiet = Rc::new(Cell::new(true));
    let hush = quiet.clone();
    let mut world = World::usual(CLEAR, move |asked| {
        let mut reply = proper(asked);
        if hush.get() {
            reply.bytes.truncate(100);
            reply.then = Then::Silent;
        }
        reply
    });
    let ticket = world.client.fetch(0, 1000, Need::Guest).unwrap();
    world.run(15_000);
    quiet.set(false);
    assert_eq!(world.result(ticket, 12_000), Some(Ok(bytes(0, 1000))));
}

/// It takes longer for each answer than the client waits at first.
#[test]
fn a_server_that_is_slow() {
    let mut world = World::usual(CLEAR, proper);
    world.thinks = 20_000;
    let ticket = world.client.fetch(0, 1000, Need::Guest).unwrap();
    assert_eq!(world.result(ticket, 120_000), Some(Ok(bytes(0, 1000))));
}

/// The first server takes connections and requests, and is silent.
#[test]
fn to_the_next_server_from_a_silent_one() {
    let urls = ["http://10.0.0.1/i", "http://10.0.0.3/i"];
    let mut world = World::new(&urls, fixed(), CLEAR, |asked: &Asked| {
        if asked.server == FIRST {
            return Reply {
                bytes: Vec::new(),
                then: Then::Silent,
            };
        }
        proper(asked)
    });
    let ms = world.fetch(20, 1000, 30_000);
    assert!(ms < 8000, "{ms} ms");
    assert_eq!(world.client.status().server, 1);
}

/// The first server is gone, the second has its turn; once the first is back, it is the first again.
#[test]
fn to_the_next_server_and_back() {
    let asked = Rc::new(Cell::new([0; 2]));
    let seen = asked.clone();
    let urls = ["http://10.0.0.1/i", "http://10.0.0.3/i"];
    let mut world = World::new(&urls, fixed(), CLEAR, move |asked: &Asked| {
        let mut counts = seen.get();
        counts[usize::from(asked.server == SECOND)] += 1;
        seen.set(counts);
        proper(asked)
    });
    world.fetch(10, 1000, 1000);
    assert_eq!(asked.get(), [10, 0]);
    world.weather(Weather {
        dead: vec![FIRST],
        ..CLEAR
    });
    let ms = world.fetch(10, 1000, 30_000);
    println!("the next server after {ms} ms");
    assert_eq!(world.client.status().server, 1);
    assert_eq!(asked.get()[1], 10);
    world.weather(CLEAR);
    for _ in 0..1400 {
        world.run(100);
        world.fetch(1, 1000, 10_000);
        if world.client.status().server == 0 {
            break;
        }
    }
    assert_eq!(world.client.status().server, 0);
    let before = asked.get();
    world.fetch(10, 1000, 10_000);
    assert_eq!(asked.get(), [before[0] + 10, before[1]]);
}

/// A server with the wrong answer has no more to say than any other.
#[test]
fn the_next_server_has_it() {
    let urls = ["http://10.0.0.1/i", "http://10.0.0.3/i"];
    let mut world = World::new(&urls, fixed(), CLEAR, |asked: &Asked| {
        if asked.server == FIRST {
            let bytes = b"HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\nno".to_vec();
            return Reply {
                bytes,
                then: Then::Keep,
            };
        }
        proper(asked)
    });
    // smoltcp asks for one neighbour's address in a second.
    world.fetch(10, 1000, 3000);
    assert_eq!(world.client.status().server, 1);
    world.client.distrust();
    assert_eq!(world.client.status().server, 0);
}

/// Each of these is told to the caller, after a few tries, and the client goes on.
#[test]
fn wrong_answers() {
    let range = "HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 100-199/1000\r\n";
    let body = "x".repeat(100);
    let long = "x".repeat(101);
    let many = format!("HTTP/1.1 200 OK\r\nX: {}", "x".repeat(9000));
    let huge = "9".repeat(40);
    let answers = [
        (
            "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n".into(),
            FetchError::Status(404),
        ),
        (
            "HTTP/1.1 500 Oh\r\nContent-Length: 3\r\n\r\nsad".into(),
            FetchError::Status(500),
        ),
        ("HTTP/1.1 503 Oh\r\n\r\nsad".into(), FetchError::Status(503)),
        (
            format!("HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{body}"),
            FetchError::Status(200),
        ),
        (
            "HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n".into(),
            FetchError::Status(200),
        ),
        (
            "HTTP/1.1 301 There\r\nLocation: /x\r\nContent-Length: 0\r\n\r\n".into(),
            FetchError::Status(301),
        ),
        (
            format!("HTTP/1.1 206 Some\r\nContent-Length: 100\r\n\r\n{body}"),
            FetchError::Range,
        ),
        (
            format!(
                "HTTP/1.1 206 Some\r\nContent-Range: bytes 0-99/1000\r\nContent-Length: 100\r\n\r\n{body}"
            ),
            FetchError::Range,
        ),
        (
            format!(
                "HTTP/1.1 206 Some\r\nContent-Range: bytes 100-199/150\r\nContent-Length: 100\r\n\r\n{body}"
            ),
            FetchError::Range,
        ),
        (
            format!("{range}Content-Length: 101\r\n\r\n{long}"),
            FetchError::Length,
        ),
        (
            format!("{range}Content-Length: 99\r\n\r\n{}", &body[..99]),
            FetchError::Length,
        ),
        (format!("{range}\r\n{body}"), FetchError::Length),
        (
            format!("{range}Content-Length: -1\r\n\r\n{body}"),
            FetchError::Malformed,
        ),
        (
            format!("{range}Content-Length: {huge}\r\n\r\n{body}"),
            FetchError::Malformed,
        ),
        (
            format!("{range}Content-Length: 100\r\nContent-Length: 99\r\n\r\n{body}"),
            FetchError::Malformed,
        ),
        (
            format!("{range}Transfer-Encoding: chunked\r\n\r\n64\r\n{body}\r\n0\r\n\r\n"),
            FetchError::Coding,
        ),
        (
            format!("{range}Content-Encoding: gzip\r\nContent-Length: 100\r\n\r\n{body}"),
            FetchError::Coding,
        ),
        (many, FetchError::Malformed),
        ("SSH-2.0-Server\r\n\r\n".into(), FetchError::Malformed),
        (
            "HTTP/1.1 101 Switching\r\n\r\n".into(),
            FetchError::Malformed,
        ),
        (
            "HTTP/1.1 100 Continue\r\n\r\n".repeat(9),
            FetchError::Malformed,
        ),
    ];
    for (answer, error) in answers {
        let say = answer.clone();
        let mut world = World::usual(CLEAR, move |_| Reply {
            bytes: say.clone().into_bytes(),
            then: Then::Keep,
        });
        let ticket = world.client.fetch(100, 100, Need::Guest).unwrap();
        assert_eq!(world.result(ticket, 20_000), Some(Err(error)), "{answer}");
        assert!(world.asked <= 3, "{} times: {answer}", world.asked);
        world.behaviour = Box::new(proper);
        let ticket = world.client.fetch(100, 100, Need::Guest).unwrap();
        assert_eq!(
            world.result(ticket, 20_000),
            Some(Ok(bytes(100, 100))),
            "{answer}"
        );
    }
}

#[test]
fn a_file_that_is_too_long() {
    let mut world = World::usual(CLEAR, |_| Reply {
        bytes: b"HTTP/1.1 200 OK\r\nContent-Length: 101\r\n\r\n".to_vec(),
        then: Then::Keep,
    });
    let ticket = world.client.get("manifest", 100).unwrap();
    let error = FetchError::TooLong {
        length: 101,
        limit: 100,
    };
    assert_eq!(world.result(ticket, 20_000), Some(Err(error)));
}

/// More than was asked for is no answer to the next request either.
#[test]
fn a_server_that_says_too_much() {
    let mut world = World::usual(CLEAR, |asked| {
        let mut reply = proper(asked);
        reply.bytes.extend(b"and another thing");
        reply
    });
    world.fetch(20, 1000, 60_000);
    assert!(world.client.status().retries < 100);
}

/// Interim answers, odd spacing, and a head in many pieces are HTTP.
#[test]
fn odd_but_right() {
    let mut world = World::usual(CLEAR, |_| {
        Reply {
        bytes: b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 206 \r\ncontent-range:bytes 0-2/*\r\nCONTENT-LENGTH:  3 \r\nConnection: x, Close\r\n\r\nabc"
            .to_vec(),
        then: Then::Keep,
    }
    });
    for _ in 0..5 {
        let ticket = world.client.fetch(0, 3, Need::Guest).unwrap();
        assert_eq!(world.result(ticket, 10_000), Some(Ok(b"abc".to_vec())));
    }
}

/// The connection that the guest's reads have is not behind what nobody waits for.
#[test]
fn the_guest_goes_first() {
    let weather = Weather {
        delay: 1,
        rate: 12_500,
        ..CLEAR
    };
    let mut world = World::usual(weather, proper);
    world.fetch(1, 1000, 1000);
    world.run(100);
    while world.client.room(Need::Background) {
        world.client.fetch(0, 1 << 20, Need::Background).unwrap();
    }
    world.run(50);
    let ticket = world.client.fetch(0, 4096, Need::Guest).unwrap();
    let begin = world.now;
    // Six MiB are 500 ms of the wire; three windows of them, 63 ms, are on it already.
    let result = world.result(ticket, 500).expect("before the others");
    assert_eq!(result.map(|bytes| bytes.len()), Ok(4096));
    println!("the guest waited for {} ms", world.now - begin);
    assert!(world.now - begin < 80);
}

/// Frames with any bytes in their heads, which no checksum catches: the client lives, and goes on afterwards.
#[test]
fn frames_are_damaged() {
    let damaged = Weather {
        damage: 100,
        delay: 1,
        ..CLEAR
    };
    let mut over = 0;
    for address in [fixed(), Address::Dhcp] {
        let mut world = World::new(&["http://10.0.0.1/i"], address, damaged.clone(), proper);
        world.lease = Some(Ipv4Addr::new(10, 0, 0, 9));
        for _ in 0..40_000 {
            if world.client.room(Need::Background) {
                world.client.fetch(0, 20_000, Need::Background).unwrap();
            }
            world.step();
            while let Some((_, result)) = world.client.take() {
                over += u32::from(result.is_ok_and(|bytes| bytes.len() == 20_000));
            }
        }
        world.weather(CLEAR);
        world.run(120_000);
        while world.client.take().is_some() {}
        world.fetch(4, 1000, 20_000);
    }
    println!("{over} ranges came through");
    assert!(over > 300, "{over}");
}

#[test]
fn it_stops() {
    let mut world = World::usual(CLEAR, proper);
    world.fetch(4, 1000, 1000);
    let end = world.client.stop(world.now);
    // Resets went out.
    assert!(std::rc::Rc::ptr_eq(&end.wire, &world.wire));
}
