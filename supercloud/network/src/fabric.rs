//! All of it together.

use std::path::PathBuf;

use crate::dnsmasq;
use crate::error::Error;
use crate::firewall;
use crate::kernel::Kernel;
use crate::key::PrivateKey;
use crate::plan;
use crate::state::State;
use crate::target::target;
use crate::wanted::{Mac, NodeNumber, Wanted};

/// What a [`Fabric`] is opened with.
#[derive(Clone, Debug)]
pub struct Options {
    /// This node's secret, which the caller keeps.
    pub key: PrivateKey,
    /// A directory for files of this boot, such as `/run/supercloud/network`; made if it is not there.
    pub dir: PathBuf,
}

/// The networks of this machine, or of the network namespace of the thread that opened it.
pub struct Fabric {
    options: Options,
    kernel: Kernel,
    /// The rules that were loaded last, and what nft listed of them then.
    loaded: Option<(String, String)>,
}

/// How often it is looked whether all is as wanted. Who changes it at the same time is met at the next call.
const ROUNDS: usize = 3;

/// What was done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// In words, in its order. Empty if all was as wanted.
    pub done: Vec<String>,
}

impl Fabric {
    /// Connects to the kernel. Must be called on a tokio runtime.
    ///
    /// # Errors
    /// No netlink, or the directory cannot be made.
    pub fn open(options: Options) -> Result<Self, Error> {
        std::fs::create_dir_all(&options.dir).map_err(|source| Error::File {
            what: "make",
            path: options.dir.clone(),
            source,
        })?;
        Ok(Self {
            kernel: Kernel::connect()?,
            options,
            loaded: None,
        })
    }

    /// Makes this machine be as wanted. What it has of ours and is not wanted is removed.
    ///
    /// # Errors
    /// What is wanted cannot be; or what the kernel or a program says. What was done until then stays,
    /// and the next call goes on from there.
    pub async fn apply(&mut self, wanted: &Wanted) -> Result<Report, Error> {
        wanted.check()?;
        let mut report = Report::default();
        let router_before = self.router_before()?;
        // The rules first, so that nothing passes unseen.
        let rules = firewall::rules(wanted, router_before);
        self.load(&rules, &mut report).await?;
        let target = target(wanted, self.options.key.public());
        self.reach(&target, &mut report).await?;
        report
            .done
            .extend(dnsmasq::apply(&self.options.dir, wanted).await?);
        Ok(report)
    }

    /// A VM runs on another node now: the forwarding entries of this node, at once and nothing else. The
    /// record is changed with it. [`Fabric::apply`] afterwards does the rest.
    ///
    /// # Errors
    /// A MAC that no network has; what the kernel says.
    pub async fn moved(
        &mut self,
        wanted: &mut Wanted,
        mac: Mac,
        to: NodeNumber,
    ) -> Result<(), Error> {
        if !wanted.moved(mac, to) {
            return Err(Error::UnknownMac(mac));
        }
        for network in &wanted.networks {
            for step in plan::moved(wanted, network, mac) {
                self.kernel.step(&step, &self.options.key).await?;
            }
        }
        Ok(())
    }

    /// Removes all that is ours.
    ///
    /// # Errors
    /// What the kernel or a program says.
    pub async fn clear(&mut self) -> Result<Report, Error> {
        let mut report = Report::default();
        self.reach(&State::default(), &mut report).await?;
        report.done.extend(dnsmasq::clear(&self.options.dir).await?);
        if !firewall::listing().await?.is_empty() {
            firewall::load(&firewall::nothing()).await?;
            report.done.push("remove the rules of the networks".into());
        }
        self.loaded = None;
        Ok(report)
    }

    async fn reach(&mut self, target: &State, report: &mut Report) -> Result<(), Error> {
        // What is removed may take more with it than was foreseen; then it is made again.
        for _ in 0..ROUNDS {
            let is = self.kernel.read(target).await?;
            let steps = plan::plan(&is, target);
            if steps.is_empty() {
                return Ok(());
            }
            for step in steps {
                self.kernel.step(&step, &self.options.key).await?;
                report.done.push(step.to_string());
            }
        }
        Ok(())
    }

    async fn load(&mut self, rules: &str, report: &mut Report) -> Result<(), Error> {
        let listing = firewall::listing().await?;
        let loaded = (rules.to_owned(), listing);
        if self.loaded.as_ref() == Some(&loaded) {
            return Ok(());
        }
        firewall::load(rules).await?;
        report.done.push("load the rules of the networks".into());
        self.loaded = Some((loaded.0, firewall::listing().await?));
        Ok(())
    }

    /// Whether this machine forwarded packets before it had networks.
    fn router_before(&self) -> Result<bool, Error> {
        let path = self.options.dir.join("no-router-before");
        if path.exists() {
            return Ok(false);
        }
        let now = std::fs::read_to_string("/proc/sys/net/ipv4/ip_forward");
        if now.is_ok_and(|now| now.trim() != "0") {
            return Ok(true);
        }
        std::fs::write(&path, "").map_err(|source| Error::File {
            what: "write",
            path,
            source,
        })?;
        Ok(false)
    }
}
