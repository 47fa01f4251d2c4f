//! Fetches a file and compares its sum.

use alloc::collections::{BTreeMap, VecDeque};
use alloc::string::String;
use alloc::vec::Vec;

use bmcast_net::{Address, Card, Client, Need, NetConfig, Server, Ticket, probe};

use crate::machine::{Bare, ticks};
use crate::{firmware, say};

/// Bytes of a range.
const RANGE: u32 = 256 << 10;
/// Polls with nothing to do, to see what one costs.
const POLLS: u64 = 10_000;
/// The whole of it may take so long, in milliseconds.
const MOST_MS: u64 = 240_000;

/// What `fetch.txt` says.
struct Task {
    servers: Vec<Server>,
    image: String,
    exit: bool,
    gap: u32,
}

impl Task {
    fn read() -> Self {
        let mut task = Self {
            servers: Vec::new(),
            image: String::new(),
            exit: false,
            gap: 0,
        };
        for line in firmware::read("\\fetch.txt").lines() {
            match line.trim().split_once('=') {
                Some(("server", url)) => task
                    .servers
                    .push(Server::parse(url).expect("a server's URL")),
                Some(("image", path)) => task.image = path.into(),
                Some(("exit", value)) => task.exit = value == "1",
                Some(("gap", value)) => task.gap = value.parse().expect("microseconds"),
                _ => {}
            }
        }
        task
    }
}

/// Whether all was right.
pub fn run() -> bool {
    let task = Task::read();
    let mut machine = Bare {
        ticks: firmware::clock().max(1),
    };
    let functions = firmware::functions();
    let found = functions
        .into_iter()
        .find_map(|(handle, function)| Some((handle, function, probe(&mut machine, function)?)));
    let Some((handle, function, model)) = found else {
        say!("FETCH no card");
        return false;
    };
    say!("FETCH {model:?} at {function:?}");
    let held = firmware::take(handle);
    if firmware::connect_again(handle) != 0 {
        say!("FETCH the card was taken back");
        return false;
    }
    let dma = firmware::dma();
    let held = if task.exit {
        // There is nobody left to give it back to.
        core::mem::forget(held);
        firmware::leave();
        say!("FETCH left boot services");
        None
    } else {
        Some(held)
    };
    let begin = machine.now();
    let card = match Card::new(machine, function, dma) {
        Ok(card) => card,
        Err(error) => {
            say!("FETCH {error}");
            return false;
        }
    };
    let config = NetConfig {
        mac: card.mac(),
        address: Address::Dhcp,
    };
    say!(
        "FETCH card started in {} ms, {:x?}",
        machine.now() - begin,
        config.mac
    );
    let client = Client::new(card, config, task.servers, ticks(), machine.now());
    let Some(client) = client else {
        say!("FETCH no server, or no address");
        return false;
    };
    let mut fetch = Fetch {
        client,
        machine,
        gap: task.gap,
        end: machine.now() + MOST_MS,
    };
    let right = fetch.all(&task.image);
    let status = fetch.client.status();
    say!("FETCH {status:?}");
    let card = fetch.client.stop(machine.now());
    let (_, _, stopped) = card.stop();
    let command = bmcast_net::Machine::config_read(&mut machine, function, 4) & 0xffff;
    say!("FETCH stopped: {stopped:?}, command {command:#x}");
    // A card that was given back is one that the firmware can use.
    let given_back = held.is_none_or(|held| {
        drop(held);
        firmware::connect_again(handle) > 0
    });
    let right = right && stopped.is_ok() && command & 4 == 0 && given_back;
    say!("FETCH {}", if right { "right" } else { "WRONG" });
    right
}

struct Fetch {
    client: Client<Card<Bare>>,
    machine: Bare,
    gap: u32,
    end: u64,
}

impl Fetch {
    fn poll(&mut self) -> Option<()> {
        // As a VMM does at an exit: not for ever.
        for _ in 0..16 {
            if !self.client.poll(self.machine.now()) {
                break;
            }
        }
        if self.gap > 0 {
            bmcast_net::Machine::wait(&mut self.machine, self.gap);
        }
        (self.machine.now() < self.end).then_some(())
    }

    fn result(&mut self, ticket: Ticket) -> Option<Vec<u8>> {
        loop {
            self.poll()?;
            if let Some((over, result)) = self.client.take() {
                assert_eq!(over, ticket);
                return result.inspect_err(|error| say!("FETCH {error}")).ok();
            }
        }
    }

    fn all(&mut self, image: &str) -> bool {
        self.whole(image).unwrap_or(false)
    }

    fn whole(&mut self, image: &str) -> Option<bool> {
        let begin = self.machine.now();
        let ticket = self.client.get(&alloc::format!("{image}.sum"), 4096)?;
        let sum = String::from_utf8(self.result(ticket)?).ok()?;
        let now = self.machine.now();
        say!(
            "FETCH address {:?} and sum after {} ms",
            self.client.status().address,
            now - begin
        );
        let (length, sum) = sum.trim().split_once(' ')?;
        let length: u64 = length.parse().ok()?;

        self.client.set_image(image).ok()?;
        let begin = self.machine.now();
        let mut hasher = blake3::Hasher::new();
        let (mut asked, mut hashed) = (0, 0);
        let mut order = VecDeque::new();
        let mut here = BTreeMap::new();
        let mut hashing = 0;
        while hashed < length {
            while asked < length && self.client.room(Need::Background) {
                let len = u64::from(RANGE).min(length - asked);
                let need = Need::Background;
                order.push_back(self.client.fetch(asked, u32::try_from(len).ok()?, need)?);
                asked += len;
            }
            self.poll()?;
            while let Some((ticket, result)) = self.client.take() {
                let bytes = result.inspect_err(|error| say!("FETCH {error}")).ok()?;
                here.insert(ticket, bytes);
            }
            while let Some(bytes) = order.front().and_then(|ticket| here.remove(ticket)) {
                order.pop_front();
                hashed += bytes.len() as u64;
                let before = ticks();
                hasher.update(&bytes);
                hashing += ticks() - before;
            }
        }
        let ms = (self.machine.now() - begin).max(1);
        let ours = hasher.finalize().to_hex();
        say!(
            "FETCH {length} bytes in {ms} ms ({} of them for the sum): {} KiB/s",
            hashing / self.machine.ticks / 1000,
            length * 1000 / 1024 / ms
        );
        let begin = ticks();
        for _ in 0..POLLS {
            self.client.poll(self.machine.now());
        }
        let idle = (ticks() - begin) * 1000 / self.machine.ticks / POLLS;
        say!("FETCH a poll with nothing to do: {idle} ns");
        let ticket = self.client.put("/status", b"fetched")?;
        self.result(ticket)?;
        Some(ours.as_str() == sum)
    }
}
