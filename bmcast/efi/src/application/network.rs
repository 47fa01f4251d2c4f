//! The image's way into the machine: the VMM's card, what it asks the servers for, what it tells them.

use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::{String, ToString as _};
use alloc::vec::Vec;
use core::ptr::NonNull;

use bmcast_image::{BootConfig, Hash, Manifest, ManifestError, machine_name_of_mac};
use bmcast_install::{Fetched, Install};
use bmcast_net::{
    Address, Card, CardError, Client, DMA_BYTES, Dma, FetchError, Need, NetConfig, Server, Ticket,
    UrlError, probe,
};

use super::exits::{read_device, write_device};
use super::memory::{self, PAGE};
use super::pci::{Function, Region};
use super::{clock, cpu, firmware};
use crate::say;

/// Most bytes of a manifest: that of an image of 32 GiB in chunks of 64 KiB, and some. Larger images have larger
/// chunks.
const MOST_MANIFEST: u64 = 18 << 20;
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
    #[error(
        "there is no network card for BMcast: it needs a virtio-net or an Intel 82574L of its own"
    )]
    NoCard,
    /// The card.
    #[error(transparent)]
    Card(#[from] CardError),
    /// Memory.
    #[error("the VMM's memory is used up")]
    Memory,
    /// The servers.
    #[error("server {0}: {1}")]
    Server(String, UrlError),
    /// The network.
    #[error("bmcast.conf: the card's address or the router's is none of a host")]
    Address,
    /// No address.
    #[error("the network gives no address (DHCP), for a minute now")]
    NoAddress,
    /// No server.
    #[error("no server answers, for a minute now")]
    NoAnswer,
    /// The answer.
    #[error("the servers' manifest: {0}")]
    Refused(FetchError),
    /// The manifest.
    #[error("the manifest: {0}")]
    Manifest(#[from] ManifestError),
    /// It is another one.
    #[error("the server has image {0}, and bmcast.conf wants {1}")]
    Other(Hash, Hash),
}

/// What the card's driver touches of the machine.
struct Hardware {
    /// Where PCI configuration is in memory. Its ports are the guest's once there is one.
    configuration: Option<u64>,
}

impl Hardware {
    fn place(&self, function: bmcast_net::Function, offset: u16) -> Option<u64> {
        let page = Function::of((function.bus, function.device, function.function));
        Some(page.page(self.configuration?) + u64::from(offset))
    }
}

impl bmcast_net::Machine for Hardware {
    fn config_read(&mut self, function: bmcast_net::Function, offset: u16) -> u32 {
        if let Some(place) = self.place(function, offset) {
            return word(read_device(place, 4));
        }
        let register = u8::try_from(offset);
        let of = Function::of((function.bus, function.device, function.function));
        register.map_or(u32::MAX, |register| of.read(register))
    }

    fn config_write(&mut self, function: bmcast_net::Function, offset: u16, value: u32) {
        if let Some(place) = self.place(function, offset) {
            write_device(place, 4, u64::from(value));
        } else if let Ok(register) = u8::try_from(offset) {
            Function::of((function.bus, function.device, function.function)).write(register, value);
        }
    }

    fn mmio_read(&mut self, address: u64, width: u8) -> u32 {
        word(read_device(address, width))
    }

    fn mmio_write(&mut self, address: u64, width: u8, value: u32) {
        write_device(address, width, u64::from(value));
    }

    fn wait(&mut self, micros: u32) {
        let end = clock::micros() + u64::from(micros);
        while clock::micros() < end {
            core::hint::spin_loop();
        }
    }
}

fn word(value: u64) -> u32 {
    let [low, _] = cpu::halves(value);
    low
}

/// What is on its way.
enum Asked {
    Chunk(u32),
    Report,
}

/// See the module.
pub struct Network {
    // Taken when the card is given back.
    client: Option<Client<Card<Hardware>>>,
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
        let mut hardware = Hardware {
            configuration: firmware::configuration(),
        };
        let name = |function: Function| bmcast_net::Function {
            segment: 0,
            bus: function.bus,
            device: function.device,
            function: function.function,
        };
        let function = Function::all()
            .find(|function| probe(&mut hardware, name(*function)).is_some())
            .ok_or(NetworkError::NoCard)?;
        firmware::let_go(function);
        let regions = function.regions();
        let memory = memory::pages(DMA_BYTES.div_ceil(PAGE)).ok_or(NetworkError::Memory)?;
        // SAFETY: pages of the heap, which is mapped to itself, that are nobody else's and never given back; the guest
        // does not have them.
        let dma = unsafe { Dma::new(memory, address(memory), DMA_BYTES) };
        let card = Card::new(hardware, name(function), dma)?;
        let servers = config.servers.iter().map(|server| {
            let url = server.to_string();
            Server::parse(&url).map_err(|error| NetworkError::Server(url, error))
        });
        let servers = servers.collect::<Result<_, _>>()?;
        let mac = card.mac();
        let network = NetConfig {
            mac,
            address: match config.network {
                bmcast_image::Network::Dhcp => Address::Dhcp,
                bmcast_image::Network::Static {
                    address,
                    prefix,
                    gateway,
                    ..
                } => Address::Static {
                    address,
                    prefix,
                    router: gateway,
                },
            },
        };
        let mut client = Client::new(card, network, servers, cpu::tsc(), millis())
            .ok_or(NetworkError::Address)?;
        client
            .set_image("image")
            .map_err(|error| NetworkError::Server("image".into(), error))?;
        let machine = config.machine.clone();
        Ok(Self {
            client: Some(client),
            function,
            regions,
            asked: BTreeMap::new(),
            machine: machine.unwrap_or_else(|| machine_name_of_mac(mac)),
            reported: 0,
            farewell: None,
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
        let client = self.client.as_mut().ok_or(NetworkError::NoCard)?;
        let start = millis();
        let mut ticket = client.get("manifest", MOST_MANIFEST);
        loop {
            client.poll(millis());
            if millis() - start > PATIENCE {
                return Err(match client.status().address {
                    None => NetworkError::NoAddress,
                    Some(_) => NetworkError::NoAnswer,
                });
            }
            let Some((answered, result)) = client.take() else {
                continue;
            };
            if Some(answered) != ticket {
                continue;
            }
            let manifest = Manifest::parse(result.map_err(NetworkError::Refused)?)?;
            if manifest.id() == id {
                say!("image {id}, {} bytes", manifest.chunks().image_bytes());
                return Ok(manifest);
            }
            if client.status().server + 1 >= client.servers().len() {
                return Err(NetworkError::Other(manifest.id(), id));
            }
            // Another server may have the right one.
            client.distrust();
            ticket = client.get("manifest", MOST_MANIFEST);
        }
    }

    /// Sixteen bytes that no other boot has: of the card, the time, and how long things took.
    pub fn random(&self, image: Hash) -> [u8; 16] {
        let mut bytes = Vec::from(cpu::tsc().to_le_bytes());
        let time = uefi::runtime::get_time();
        bytes.extend_from_slice(format!("{image} {} {time:?}", self.machine).as_bytes());
        let hash = Hash::of(&bytes);
        let mut out = [0; 16];
        out.copy_from_slice(&hash.0[..16]);
        out
    }

    /// Goes on.
    pub fn turn(&mut self, install: &mut Install) {
        let now = millis();
        let Some(client) = self.client.as_mut() else {
            return;
        };
        client.poll(now);
        while let Some((ticket, result)) = client.take() {
            match (self.asked.remove(&ticket), result) {
                (Some(Asked::Chunk(chunk)), Ok(data)) => {
                    let taken = install.fetched(chunk, data);
                    if taken == Fetched::Wrong {
                        say!("chunk {chunk} is not what it should be: from the next server");
                        client.distrust();
                    }
                }
                (Some(Asked::Chunk(chunk)), Err(error)) => {
                    say!("chunk {chunk}: {error}");
                    install.fetch_failed(chunk);
                }
                _ => {}
            }
        }
        while client.room(Need::Guest) && client.room(Need::Background) {
            let Some(fetch) = install.next_fetch() else {
                break;
            };
            let need = match fetch.urgent {
                true => Need::Guest,
                false => Need::Background,
            };
            match client.fetch(fetch.offset, fetch.length, need) {
                Some(ticket) => {
                    self.asked.insert(ticket, Asked::Chunk(fetch.chunk));
                }
                None => install.fetch_failed(fetch.chunk),
            }
        }
        if self.farewell.is_none() && now >= self.reported + REPORT {
            self.report(install, false);
        }
    }

    fn report(&mut self, install: &Install, gone: bool) {
        self.reported = millis();
        let status = install.status(&self.machine, gone).to_string();
        let name = format!("machines/{}", self.machine);
        // There is no room while the last one is on its way: the next one is newer.
        if let Some(client) = self.client.as_mut()
            && let Some(ticket) = client.put(&name, status.as_bytes())
        {
            self.asked.insert(ticket, Asked::Report);
        }
    }

    /// Says that the VMM leaves, and gives the card back; whether that is done.
    pub fn farewell(&mut self, install: &Install) -> bool {
        let since = match self.farewell {
            Some(since) => since,
            None => {
                // What is on its way is of no use any more.
                self.asked.clear();
                let order = install.order_bytes();
                let name = format!("machines/{}/profile", self.machine);
                let ticket = self
                    .client
                    .as_mut()
                    .and_then(|client| client.put(&name, &order));
                if let Some(ticket) = ticket {
                    self.asked.insert(ticket, Asked::Report);
                }
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
        if let Some(client) = self.client.take() {
            let (_, _, reset) = client.stop(millis()).stop();
            if let Err(error) = reset {
                say!("{error}");
            }
        }
    }
}

fn address(memory: NonNull<u8>) -> u64 {
    memory::address(memory.as_ptr())
}
