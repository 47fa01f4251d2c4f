//! Networks: `blanket run --net`, and `blanket net`.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::ExitCode;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use blanket_devices::bus::Device as _;
use blanket_devices::net::link::tap::Tap;
use blanket_devices::net::link::user::{self, Forward, User};
use blanket_devices::net::{CLASS, Config, Direction, Link, LinkState, Mac, Vif};
use blanket_sandbox::cgroup;
use blanket_vmm::devices::AnyDevice;
use blanket_vmm::instance::Instance;
use clap::Subcommand;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::args::{seconds, size};
use crate::control::{Answer, Info, Request, ask_vm, ask_vm_with};
use crate::disk::{mib, state_word, with_reasons};
use crate::exit::{output, show};
use crate::table::table;

/// What `--net` is.
pub const HELP: &str = "\
Adds a network: `user` gives the guest the connections of this machine's programs, with DHCP and DNS, and \
needs no privilege (package passt); `tap=NAME` connects it to a tap device that exists. Options follow with \
commas: `mac=ADDRESS` (otherwise made of the machine's and the VM's name, and kept over restarts), `queues=N`, `mtu=N`, `filter` \
(drop what the guest sends under another address), `bps-in=SIZE`, `bps-out=SIZE`, `pps-in=N`, `pps-out=N` \
(limits to and from the guest for each second); for `user` also `tcp=[ADDRESS/]PORT:GUESTPORT` and `udp=...` \
(ports of this machine that lead to the guest), each any number of times. The guest's kernel calls them eth0, \
eth1, ... in their order, and its systemd enX0, enX1, ...";

/// Where a network leads.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Kind {
    User,
    Tap(String),
}

/// A network as the user describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetSpec {
    kind: Kind,
    text: String,
    mac: Option<Mac>,
    queues: Option<u32>,
    mtu: Option<u16>,
    filter: bool,
    forwards: Vec<Forward>,
    limits: [blanket_devices::Limits; 2],
}

impl FromStr for NetSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = text.split(',');
        let kind = match parts
            .next()
            .map(|first| first.split_once('=').unwrap_or((first, "")))
        {
            Some(("user", "")) => Kind::User,
            Some(("tap", name)) if !name.is_empty() => Kind::Tap(name.to_owned()),
            _ => return Err("a network begins with `user` or `tap=NAME`".into()),
        };
        let mut spec = Self {
            kind,
            text: text.to_owned(),
            mac: None,
            queues: None,
            mtu: None,
            filter: false,
            forwards: Vec::new(),
            limits: Default::default(),
        };
        for part in parts {
            let (key, value) = part.split_once('=').unwrap_or((part, ""));
            spec.option(key, value)?;
        }
        Ok(spec)
    }
}

impl NetSpec {
    fn option(&mut self, key: &str, value: &str) -> Result<(), String> {
        fn number<T: FromStr>(key: &str, value: &str) -> Result<T, String> {
            let number = value.parse();
            number.map_err(|_| format!("{key}={value} is no number that is possible there"))
        }
        let rate = |value: &str| match size(value)? {
            0 => Err("a limit of 0 would let nothing through".to_owned()),
            bytes => Ok(Some(bytes)),
        };
        let [to_guest, from_guest] = &mut self.limits;
        match (key, &self.kind) {
            ("mac", _) => self.mac = Some(value.parse::<Mac>().map_err(|e| e.to_string())?),
            ("queues", _) => self.queues = Some(number(key, value)?),
            ("mtu", _) => self.mtu = Some(number(key, value)?),
            ("filter", _) if value.is_empty() => self.filter = true,
            ("bps-in", _) => to_guest.bytes = rate(value)?,
            ("bps-out", _) => from_guest.bytes = rate(value)?,
            ("pps-in", _) => to_guest.operations = Some(number(key, value)?),
            ("pps-out", _) => from_guest.operations = Some(number(key, value)?),
            ("tcp" | "udp", Kind::User) => {
                let forward = format!("{key}:{value}").parse::<Forward>();
                self.forwards
                    .push(forward.map_err(|error| error.to_string())?);
            }
            ("tcp" | "udp", Kind::Tap(_)) => {
                return Err(
                    "ports are forwarded with `user` only; a tap is a network of yours".into(),
                );
            }
            _ => {
                return Err(format!(
                    "{key} is no option of a network; there are mac=, queues=, mtu=, filter, \
                     bps-in=, bps-out=, pps-in=, pps-out=, and for user tcp= and udp="
                ));
            }
        }
        Ok(())
    }

    /// Connects it, as network `index` of the VM `name`.
    pub fn open(&self, index: u32, name: &str, vcpus: u32) -> Result<AnyDevice> {
        let mac = self.mac.unwrap_or_else(|| own_mac(name, index));
        let link: Box<dyn Link> = match &self.kind {
            Kind::Tap(tap) => Box::new(Tap::open(tap, self.queues.unwrap_or(vcpus))?),
            Kind::User => Box::new(User::start(self.user(), mac)?),
        };
        Ok(self.device(link, index, mac, vcpus))
    }

    /// As [`NetSpec::open`], of the descriptors of an [`Outside`].
    fn adopt(
        &self,
        mut handed: Vec<OwnedFd>,
        index: u32,
        name: &str,
        vcpus: u32,
    ) -> Result<AnyDevice> {
        let mac = self.mac.unwrap_or_else(|| own_mac(name, index));
        let link: Box<dyn Link> = match &self.kind {
            Kind::Tap(tap) => Box::new(Tap::adopt(tap, handed)?),
            Kind::User => match (handed.pop(), handed.pop()) {
                (Some(said), Some(socket)) if handed.is_empty() => {
                    Box::new(User::adopt(self.user(), socket, said)?)
                }
                _ => bail!("a user-mode network comes with two descriptors"),
            },
        };
        Ok(self.device(link, index, mac, vcpus))
    }

    /// Connects it outside of the box of the VM that it is for.
    fn outside(&self, index: u32, name: &str, vcpus: u32) -> Result<Outside> {
        let mac = self.mac.unwrap_or_else(|| own_mac(name, index));
        Ok(match &self.kind {
            Kind::Tap(tap) => Outside::Tap(Tap::descriptors(tap, self.queues.unwrap_or(vcpus))?),
            Kind::User => Outside::User(user::Outside::start(&self.user(), mac)?),
        })
    }

    fn user(&self) -> user::Config {
        user::Config {
            forwards: self.forwards.clone(),
            mtu: self.mtu,
        }
    }

    fn device(&self, link: Box<dyn Link>, index: u32, mac: Mac, vcpus: u32) -> AnyDevice {
        let config = Config {
            queues: self.queues,
            mtu: self.mtu,
            filter: self.filter,
            to_guest: self.limits[0],
            from_guest: self.limits[1],
            ..Config::new(index, mac)
        };
        AnyDevice::Net(Arc::new(Vif::new(link, config, vcpus)))
    }
}

/// A link that was made outside of the box of the VM that it is for, which is handed its
/// descriptors.
enum Outside {
    Tap(Vec<OwnedFd>),
    User(user::Outside),
}

impl Outside {
    fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        match self {
            Self::Tap(queues) => queues.iter().map(AsFd::as_fd).collect(),
            Self::User(passt) => passt.descriptors().to_vec(),
        }
    }

    /// Moves its process, if it has one, into the VM's control group, where that may be.
    fn limit(&self, vm: &Info) {
        if let (Self::User(passt), Some(group)) = (self, &vm.confinement.limits.cgroup)
            && let Some(process) = passt.process()
            && let Err(error) = cgroup::add(group, process)
        {
            tracing::info!("passt is not limited as {} is: {error}", vm.name);
        }
    }
}

/// The address of a VM's network on this machine: the same each time, and another one on
/// each machine.
fn own_mac(name: &str, index: u32) -> Mac {
    let machine = std::fs::read("/etc/machine-id").unwrap_or_default();
    let mut digest = Sha256::new();
    for part in [
        &machine[..],
        b"/",
        name.as_bytes(),
        b"/",
        &index.to_le_bytes(),
    ] {
        digest.update(part);
    }
    let [a, b, c, ..] = <[u8; 32]>::from(digest.finalize());
    // XenSource's range, as Xen's users take it.
    Mac::new([0x00, 0x16, 0x3e, a, b, c])
}

/// `blanket net`.
#[derive(Debug, Subcommand)]
pub enum NetCommand {
    /// List a VM's networks
    List {
        /// The VM
        name: String,
        /// Write JSON
        #[arg(long)]
        json: bool,
    },
    /// Give a running VM another network
    Attach {
        /// The VM
        name: String,
        /// The network, as for `run --net`
        net: NetSpec,
    },
    /// Take a network from a running VM
    Detach {
        /// The VM
        name: String,
        /// The guest's name for it, such as eth1, or its number
        net: String,
        /// Seconds that the guest has
        #[arg(long, default_value = "30", value_parser = seconds)]
        timeout: Duration,
    },
}

/// A VM's network, as it is told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetInfo {
    /// The guest's name for it, as Linux numbers them.
    pub name: String,
    /// Its address.
    pub mac: String,
    /// Where it leads.
    pub link: String,
    /// What it is doing: connected, waiting, closing, closed, down.
    pub state: String,
    /// Why it is closed or down, if it is.
    pub fault: Option<String>,
    /// To the guest.
    pub to_guest: Traffic,
    /// From it.
    pub from_guest: Traffic,
}

/// What went one way.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Traffic {
    /// Packets.
    pub packets: u64,
    /// Bytes.
    pub bytes: u64,
    /// Packets that found no room, or that nobody wanted.
    pub dropped: u64,
    /// Packets with an address that is not the guest's.
    pub filtered: u64,
    /// Packets that were wrong.
    pub errors: u64,
}

impl From<&Direction> for Traffic {
    fn from(direction: &Direction) -> Self {
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Self {
            packets: count(&direction.packets),
            bytes: count(&direction.bytes),
            dropped: count(&direction.dropped),
            filtered: count(&direction.filtered),
            errors: count(&direction.errors),
        }
    }
}

/// A VM's networks, for its control socket.
pub fn list(instance: &Instance) -> Vec<NetInfo> {
    let nets = instance.networks();
    nets.iter().map(|vif| info(instance, vif)).collect()
}

fn info(instance: &Instance, vif: &Vif) -> NetInfo {
    let report = instance.device_report(CLASS, vif.number());
    let (state, down) = match vif.link().state() {
        LinkState::Up => (state_word(report.as_ref()), None),
        LinkState::Down(why) => ("down", Some(why)),
    };
    NetInfo {
        name: format!("eth{}", vif.number()),
        mac: vif.config().mac.to_string(),
        link: vif.link().describe(),
        state: state.into(),
        fault: down.or_else(|| report.and_then(|report| report.fault)),
        to_guest: (&vif.counters().to_guest).into(),
        from_guest: (&vif.counters().from_guest).into(),
    }
}

/// Attaches a network to a VM, for its control socket, of the descriptors that came along;
/// the guest's name for it.
pub fn attach(instance: &Instance, spec: &str, handed: Vec<OwnedFd>) -> Result<String> {
    let spec: NetSpec = spec.parse().map_err(anyhow::Error::msg)?;
    let used: Vec<u32> = instance.networks().iter().map(|vif| vif.number()).collect();
    let index = free(&used);
    let vm = instance.spec();
    instance.attach(spec.adopt(handed, index, &vm.name, vm.vcpus)?)?;
    Ok(format!("eth{index}"))
}

/// The first number that is not used.
fn free(used: &[u32]) -> u32 {
    (0..).find(|index| !used.contains(index)).unwrap_or(0)
}

/// Connects a network for a running VM, and hands it to it; the guest's name for it.
fn attach_outside(name: &str, net: &NetSpec) -> Result<String> {
    let Answer::Info(vm) = ask_vm(name, &Request::Info)? else {
        bail!("{name} answered something else than what it is");
    };
    let Answer::Nets(nets) = ask_vm(name, &Request::Nets)? else {
        bail!("{name} answered something else than its networks");
    };
    let used = nets
        .iter()
        .filter_map(|net| net.name.strip_prefix("eth")?.parse().ok());
    let index = free(&used.collect::<Vec<u32>>());
    let outside = net.outside(index, name, vm.vcpus)?;
    outside.limit(&vm);
    // The address that passt was told, also if the number is another one by then.
    let spec = match net.mac {
        Some(_) => net.text.clone(),
        None => format!("{},mac={}", net.text, own_mac(name, index)),
    };
    let request = Request::AttachNet { spec };
    let Answer::Name(net) = ask_vm_with(name, &request, &outside.descriptors())? else {
        bail!("{name} answered something else");
    };
    if let Outside::User(passt) = outside {
        passt.let_go();
    }
    Ok(net)
}

/// The number of the network that is called `name`.
pub fn number(instance: &Instance, name: &str) -> Result<u32> {
    let number = name.strip_prefix("eth").unwrap_or(name);
    let number = number.parse().ok();
    let nets = instance.networks();
    let found = nets
        .iter()
        .map(|vif| vif.number())
        .find(|n| Some(*n) == number);
    found.with_context(|| match nets.is_empty() {
        true => format!("there is no network {name}; the VM has none"),
        false => {
            let all: Vec<String> = nets
                .iter()
                .map(|vif| format!("eth{}", vif.number()))
                .collect();
            format!("there is no network {name}; there are {}", all.join(", "))
        }
    })
}

/// Carries out a command.
pub fn command(command: &NetCommand) -> Result<ExitCode> {
    match command {
        NetCommand::List { name, json } => {
            let Answer::Nets(nets) = ask_vm(name, &Request::Nets)? else {
                bail!("{name} answered something else than its networks");
            };
            show(&nets[..], *json, listing)?;
        }
        NetCommand::Attach { name, net } => {
            output(&format!("{}\n", attach_outside(name, net)?))?;
        }
        NetCommand::Detach { name, net, timeout } => {
            let request = Request::DetachNet {
                net: net.clone(),
                timeout_ms: u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX),
            };
            ask_vm(name, &request)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn listing(nets: &[NetInfo]) -> String {
    let header = [
        "NET", "MAC", "STATE", "IN", "OUT", "DROPPED", "ERRORS", "LINK",
    ];
    let mut rows = vec![header.map(str::to_owned)];
    rows.extend(nets.iter().map(|net| {
        let both =
            |get: fn(&Traffic) -> u64| (get(&net.to_guest) + get(&net.from_guest)).to_string();
        [
            net.name.clone(),
            net.mac.clone(),
            net.state.clone(),
            mib(net.to_guest.bytes),
            mib(net.from_guest.bytes),
            both(|traffic| traffic.dropped + traffic.filtered),
            both(|traffic| traffic.errors),
            net.link.clone(),
        ]
    }));
    let reasons = nets.iter().map(|net| (&net.name, &net.fault));
    table(&rows) + &with_reasons(reasons)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptions_of_networks() {
        let spec: NetSpec = "user,tcp=127.0.0.1/2222:22,udp=53:5353,bps-in=1M,pps-out=7,filter"
            .parse()
            .expect("right");
        assert_eq!(
            (spec.kind.clone(), spec.forwards.len(), spec.filter),
            (Kind::User, 2, true)
        );
        assert_eq!(spec.limits[0].bytes, Some(1 << 20));
        assert_eq!(spec.limits[1].operations, Some(7));
        let spec: NetSpec = "tap=vm0,mac=00:16:3e:00:00:01,queues=2,mtu=1400"
            .parse()
            .expect("right");
        assert_eq!(spec.kind, Kind::Tap("vm0".into()));
        for wrong in [
            "",
            "tap",
            "tap=",
            "bridge=br0",
            "user=x",
            "tap=a,tcp=1:2",
            "user,tcp=22",
            "user,tcp=0:22",
            "user,tcp=x/1:2",
            "user,mac=ff:ff:ff:ff:ff:ff",
            "user,queues=-1",
            "user,mtu=70000",
            "user,bps-in=0K",
            "user,speed=1",
        ] {
            assert!(wrong.parse::<NetSpec>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn addresses_are_kept_and_differ() {
        assert_eq!(own_mac("web", 0), own_mac("web", 0));
        assert_ne!(own_mac("web", 0), own_mac("web", 1));
        assert_ne!(own_mac("web", 0), own_mac("db", 0));
        assert!(!own_mac("web", 0).is_multicast());
    }
}
