//! The image's way into the machine: the VMM's card, what it asks the server for, what it tells it.

use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use bmcast_image::{BootConfig, Hash, Manifest, ManifestError, machine_name_of_mac};
use bmcast_install::{Fetched, Install};
use bmcast_net::{
    Client, Configuration, FetchError, Nameless, Options, Ticket, VIRTIO_NET, VirtioError,
    VirtioNet,
};

use super::pci::{Function, Region};
use super::{clock, cpu, firmware};
use crate::say;

/// Most bytes of a manifest: that of an image of 32 GiB in chunks of 64 KiB, and some. Larger images have larger chunks.
const MOST_MANIFEST: usize = 18 << 20;
/// Milliseconds that the manifest may take, from the card's reset on.
const PATIENCE: u64 = 60_000;
/// Milliseconds from one report to the next.
const REPORT: u64 = 1_000;
/// Milliseconds that the last report may take.
const LAST_REPORT: u64 = 2_000;

/// Why the image cannot come.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// No card.
    #[error("there is no network card for BMcast: it needs a virtio-net of its own")]
    NoCard,
    /// The card.
    #[error(transparent)]
    Card(#[from] VirtioError),
    /// The servers.
    #[error(transparent)]
    Nameless(#[from] Nameless),
    /// No address.
    #[error("the network gives no address (DHCP), for a minute now")]
    NoAddress,
    /// No server.
    #[error("{0} does not answer, for a minute now")]
    NoAnswer(String),
    /// The answer.
    #[error("{0}: {1}")]
    Refused(String, FetchError),
    /// The manifest.
    #[error("the manifest: {0}")]
    Manifest(#[from] ManifestError),
    /// It is another one.
    #[error("the server has image {0}, and bmcast.conf wants {1}")]
    Other(Hash, Hash),
}

/// What is on its way.
enum Asked {
    Chunk(u32),
    Report,
}

/// See the module.
pub struct Network {
    client: Client,
    function: Function,
    regions: Vec<Region>,
    asked: BTreeMap<Ticket, Asked>,
    machine: String,
    reported: u64,
    farewell: Option<u64>,
}

fn millis() -> u64 {
    clock::micros() / 1000
}

impl Network {
    /// Takes the first card that can be used.
    pub fn start(config: &BootConfig) -> Result<Self, NetworkError> {
        let function = Function::all()
            .find(|function| VIRTIO_NET.contains(&function.id()))
            .ok_or(NetworkError::NoCard)?;
        firmware::let_go(function);
        let regions = function.regions();
        function.enable();
        let configuration = Configuration {
            function: (function.bus, function.device, function.function),
            read: |of, register| Function::of(of).read(register),
            write: |of, register, value| Function::of(of).write(register, value),
        };
        // SAFETY: the VMM maps all physical memory to itself, as the firmware does; the firmware has let the card go, and it is
        // hidden from the OS.
        let card = unsafe { VirtioNet::new(configuration) }?;
        let options = Options {
            network: config.network.clone(),
            servers: config.servers.clone(),
            seed: cpu::tsc(),
        };
        let client = Client::new(Box::new(card), options, millis())?;
        let machine = config.machine.clone();
        Ok(Self {
            function,
            regions,
            asked: BTreeMap::new(),
            machine: machine.unwrap_or_else(|| machine_name_of_mac(client.mac())),
            reported: 0,
            farewell: None,
            client,
        })
    }

    /// The card, which the OS is not to see.
    pub fn function(&self) -> Function {
        self.function
    }

    /// What it answers to.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// The manifest of this id.
    pub fn manifest(&mut self, id: Hash) -> Result<Manifest, NetworkError> {
        let start = millis();
        let ticket = self.client.get("manifest", MOST_MANIFEST);
        loop {
            self.client.poll(millis());
            let server = || {
                self.client
                    .server()
                    .map_or(String::new(), ToString::to_string)
            };
            if millis() - start > PATIENCE {
                return Err(match self.client.address() {
                    None => NetworkError::NoAddress,
                    Some(_) => NetworkError::NoAnswer(server()),
                });
            }
            let Some((answered, result)) = self.client.take() else {
                continue;
            };
            if answered != ticket {
                continue;
            }
            let server = self
                .client
                .server()
                .map_or(String::new(), ToString::to_string);
            let bytes = result.map_err(|error| NetworkError::Refused(server, error))?;
            let manifest = Manifest::parse(bytes)?;
            if manifest.id() != id {
                return Err(NetworkError::Other(manifest.id(), id));
            }
            say!("image {id}, {} bytes", manifest.chunks().image_bytes());
            return Ok(manifest);
        }
    }

    /// Sixteen bytes that no other installation has: of the card, the time, and how long things took.
    pub fn random(&self, image: Hash) -> [u8; 16] {
        let mut bytes = Vec::from(self.client.mac());
        bytes.extend_from_slice(&cpu::tsc().to_le_bytes());
        bytes.extend_from_slice(format!("{image} {:?}", uefi::runtime::get_time()).as_bytes());
        let hash = Hash::of(&bytes);
        let mut out = [0; 16];
        out.copy_from_slice(&hash.0[..16]);
        out
    }

    /// Goes on.
    pub fn turn(&mut self, install: &mut Install) {
        let now = millis();
        self.client.poll(now);
        while let Some((ticket, result)) = self.client.take() {
            match (self.asked.remove(&ticket), result) {
                (Some(Asked::Chunk(chunk)), Ok(data)) => {
                    let taken = install.fetched(chunk, data);
                    if taken == Fetched::Wrong {
                        say!("chunk {chunk} is not what it should be: again");
                    }
                }
                (Some(Asked::Chunk(chunk)), Err(error)) => {
                    say!("chunk {chunk}: {error}");
                    install.fetch_failed(chunk);
                }
                _ => {}
            }
        }
        while self.client.room() {
            let Some(fetch) = install.next_fetch() else {
                break;
            };
            let ticket = match fetch.urgent {
                true => self.client.fetch_first(fetch.offset, fetch.length),
                false => self.client.fetch(fetch.offset, fetch.length),
            };
            self.asked.insert(ticket, Asked::Chunk(fetch.chunk));
        }
        if self.farewell.is_none() && now >= self.reported + REPORT {
            self.report(install, false);
        }
    }

    fn report(&mut self, install: &Install, gone: bool) {
        self.reported = millis();
        // One at a time: a server that is slow has the newest of them.
        if !gone
            && self
                .asked
                .values()
                .any(|asked| matches!(asked, Asked::Report))
        {
            return;
        }
        let status = install.status(&self.machine, gone);
        let name = format!("machines/{}", self.machine);
        let ticket = self.client.put(&name, status.to_string().into_bytes());
        self.asked.insert(ticket, Asked::Report);
    }

    /// Says that the VMM leaves, and gives the card back; whether that is done.
    pub fn farewell(&mut self, install: &Install) -> bool {
        let since = match self.farewell {
            Some(since) => since,
            None => {
                self.asked.clear();
                let order = install.order_bytes();
                let name = format!("machines/{}/profile", self.machine);
                let ticket = self.client.put(&name, order);
                self.asked.insert(ticket, Asked::Report);
                self.report(install, true);
                *self.farewell.insert(millis())
            }
        };
        // A server that does not answer is no reason to stay.
        let done = self.asked.is_empty() || millis() - since > LAST_REPORT;
        if done {
            self.stop();
        }
        done
    }

    /// Resets the card.
    pub fn stop(&mut self) {
        self.client.stop();
    }
}
