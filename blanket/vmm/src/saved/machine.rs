//! What a saved VM is made of, and what of it a host must have.

use std::collections::BTreeMap;

use blanket_abi::device::{Boot, boot_flags};
use blanket_abi::layout::{MAX_FRAMES, MAX_VCPUS, added_later};
use blanket_abi::{Gfn, PAGE_SIZE, state};
use serde::{Deserialize, Serialize};

use super::ResumeError;
use crate::builder::{self, Domain};
use crate::cpu::Cpu;
use crate::devices::Devices;
use crate::instance::{Instance, Running};
use crate::sync::lock;

/// What a saved VM is made of: the first chunk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Machine {
    /// Its name when it was saved.
    pub name: String,
    /// Its identity.
    pub uuid: String,
    /// RAM at the start, bytes.
    pub memory: u64,
    /// RAM that it can have at most, bytes.
    pub max_memory: u64,
    /// vCPUs.
    pub vcpus: u32,
    /// Which kernel runs in it.
    pub kernel: String,
    /// Class and number of each of its devices, in the order in which they were added.
    pub devices: Vec<(String, u32)>,
    /// Number and size, bytes, of each of its disks.
    pub disks: Vec<(u32, u64)>,
    /// Numbers of those whose content comes with it.
    pub content: Vec<u32>,
    /// Number of each of its disks that stands on content that is known, and that one's name.
    pub bases: Vec<(u32, String)>,
    /// Number and MAC of each of its networks.
    pub macs: Vec<(u32, String)>,
    /// The CPU that it has found.
    pub cpu: Cpu,
    /// The components of XCR0 that it may have found.
    pub xcr0_mask: u64,
    /// Version of its core's state.
    pub core: u64,
    /// The boot record's words that its core and its backends still go by.
    pub boot: BTreeMap<String, u64>,
    /// Frames of its rings: the xenstore's, the console's.
    pub rings: [u64; 2],
}

/// The boot record as names and numbers; how it started is of no use any more.
pub(super) fn words(boot: &Boot) -> [(&'static str, u64); 8] {
    [
        ("ram_frames", boot.ram_frames),
        ("start_frames", boot.start_frames),
        ("shared_info", boot.shared_info),
        ("grant_base", boot.grant_base),
        ("grant_frames", boot.grant_frames),
        ("state_base", boot.state_base),
        ("state_frames", boot.state_frames),
        ("flags", boot.flags),
    ]
}

impl Machine {
    pub(crate) fn of(instance: &Instance, running: &Running, devices: &Devices) -> Self {
        let spec = instance.spec();
        let domain = &running.domain;
        let named = |(name, word): (&str, u64)| (name.to_owned(), word);
        Self {
            name: spec.name.clone(),
            uuid: instance.uuid(),
            memory: spec.memory,
            max_memory: spec.most_memory(),
            vcpus: spec.vcpus,
            kernel: instance.booted(),
            devices: devices.numbers(),
            disks: devices.sizes(),
            content: Vec::new(),
            bases: devices.bases(),
            macs: devices.macs(),
            cpu: instance.cpu(),
            xcr0_mask: instance.xcr0_mask(),
            core: state::VERSION,
            boot: words(&domain.boot).map(named).into(),
            rings: [domain.store.0, domain.console.0],
        }
    }

    /// The same, with the content of these disks.
    pub(crate) fn with(self, content: &[u32]) -> Self {
        Self {
            content: content.to_vec(),
            ..self
        }
    }

    /// Whether it can go on as `instance`, on its host and with its devices.
    pub(super) fn fits(&self, instance: &Instance) -> Result<(), ResumeError> {
        let impossible = |why: String| Err(ResumeError::Impossible(why));
        let spec = instance.spec();
        if self.core != state::VERSION {
            return impossible(format!(
                "its core's state has version {}, and this program has version {}",
                self.core,
                state::VERSION
            ));
        }
        if (self.vcpus, self.memory, self.max_memory)
            != (spec.vcpus, spec.memory, spec.most_memory())
        {
            return impossible(format!(
                "it has {} vCPUs and {} MiB of memory ({} at most), and here it would have {} and {} \
                 ({}): give --cpus, --memory and --max-memory as at its start",
                self.vcpus,
                self.memory >> 20,
                self.max_memory >> 20,
                spec.vcpus,
                spec.memory >> 20,
                spec.most_memory() >> 20
            ));
        }
        if let Some(why) = instance.cpu().lacks(&self.cpu) {
            return impossible(why);
        }
        let here = instance.xcr0_mask();
        if self.xcr0_mask & !here != 0 || (self.xcr0_mask == 0) != (here == 0) {
            return impossible(format!(
                "its guest has found the CPU's XSAVE components {:#x}, and this host has {here:#x}",
                self.xcr0_mask
            ));
        }
        let (there, sizes) = {
            let devices = lock(&instance.devices);
            (devices.numbers(), devices.sizes())
        };
        let named = |(class, number): &(String, u32)| match class.as_str() {
            "vif" => format!("network {number} (--net)"),
            _ => format!("disk {number} (--disk)"),
        };
        if let Some(missing) = self.devices.iter().find(|it| !there.contains(it)) {
            return impossible(format!(
                "it had {}, which is to be given again, as at its start",
                named(missing)
            ));
        }
        for (number, size) in &self.disks {
            let here = sizes.iter().find(|(here, _)| here == number);
            if let Some((_, here)) = here.filter(|(_, here)| here != size) {
                return impossible(format!(
                    "its disk {number} has {size} bytes, and the one here {here}"
                ));
            }
        }
        self.stands_on_the_same(instance, &self.content)?;
        if let Some(more) = there.iter().find(|it| !self.devices.contains(it)) {
            return impossible(format!("it had no {}; add it when it runs", named(more)));
        }
        Ok(())
    }

    /// Whether it can go on as `instance` and be the same VM to others.
    pub(crate) fn moves_to(&self, instance: &Instance) -> Result<(), ResumeError> {
        self.fits(instance)?;
        let macs = lock(&instance.devices).macs();
        let numbers: Vec<u32> = self.disks.iter().map(|(number, _)| *number).collect();
        self.stands_on_the_same(instance, &numbers)?;
        for (number, mac) in &self.macs {
            let here = macs.iter().find(|(here, _)| here == number);
            if let Some((_, here)) = here.filter(|(_, here)| here != mac) {
                return Err(ResumeError::Impossible(format!(
                    "its network {number} has the MAC {mac}, and the one here {here}: give it \
                     mac={mac} (--net)"
                )));
            }
        }
        Ok(())
    }

    /// Whether these disks stand here on what they stood on there: only the rest of them comes.
    fn stands_on_the_same(&self, instance: &Instance, disks: &[u32]) -> Result<(), ResumeError> {
        let bases = lock(&instance.devices).bases();
        let base_of = |all: &[(u32, String)], number| {
            let mut of_it = all.iter().filter(|(it, _)| *it == number);
            of_it.next().map(|(_, base)| base.clone())
        };
        for number in disks {
            let (there, here) = (base_of(&self.bases, *number), base_of(&bases, *number));
            let named =
                |base: Option<String>| base.unwrap_or_else(|| "nothing that is named".into());
            if there != here {
                return Err(ResumeError::Impossible(format!(
                    "its disk {number} stands on {}, and the one here on {}: give both the same \
                     base=, or none",
                    named(there),
                    named(here)
                )));
            }
        }
        Ok(())
    }

    fn word(&self, name: &str) -> Result<u64, ResumeError> {
        let missing = || ResumeError::Impossible(format!("its boot record has no {name}"));
        self.boot.get(name).copied().ok_or_else(missing)
    }

    /// Its domain, with memory that is all zero.
    pub(super) fn domain(&self, mergeable: bool) -> Result<Domain, ResumeError> {
        let impossible = |why: &str| ResumeError::Impossible(why.to_owned());
        let flags = boot_flags::VERBOSE | boot_flags::INJECT | boot_flags::RESTORE;
        let boot = Boot {
            ram_frames: self.word("ram_frames")?,
            start_frames: self.word("start_frames")?,
            shared_info: self.word("shared_info")?,
            grant_base: self.word("grant_base")?,
            grant_frames: self.word("grant_frames")?,
            state_base: self.word("state_base")?,
            state_frames: self.word("state_frames")?,
            most_frames: self.max_memory / PAGE_SIZE,
            flags: self.word("flags")? & flags | boot_flags::RESTORE,
            store_port: builder::STORE_PORT,
            console_port: builder::CONSOLE_PORT,
            ..Boot::default()
        };
        if self.boot.len() != words(&boot).len() {
            return Err(impossible("its boot record has words that are not known"));
        }
        let end = boot.state_base.checked_add(boot.state_frames);
        let frames = end
            .filter(|end| *end <= MAX_FRAMES)
            .ok_or_else(|| impossible("it has more frames than there can be"))?;
        let grants = boot.grant_base.checked_add(boot.grant_frames);
        // Earlier releases had no numbers for what a guest adds.
        let (_, later) = added_later(boot.start_frames, boot.most_frames);
        let fits = (1..=MAX_VCPUS).contains(&self.vcpus)
            && boot.start_frames <= boot.most_frames
            && [boot.most_frames, later].contains(&boot.ram_frames)
            && (boot.ram_frames..boot.state_base).contains(&boot.shared_info)
            && boot.grant_base >= boot.ram_frames
            && grants.is_some_and(|end| end <= boot.state_base)
            && boot.state_frames >= state::frames(self.vcpus, boot.ram_frames)
            && self.rings.iter().all(|frame| *frame < boot.ram_frames);
        if !fits {
            return Err(impossible("its boot record is none"));
        }
        let memory = builder::allocate(frames * PAGE_SIZE, mergeable)?;
        Ok(Domain {
            memory: std::sync::Arc::new(memory),
            frames,
            boot,
            store: Gfn(self.rings[0]),
            console: Gfn(self.rings[1]),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{of_size, sample as machine};
    use super::*;
    #[test]
    fn a_domain_of_numbers_that_fit() {
        let domain = machine().domain(false).expect("it fits");
        assert_eq!(
            domain.frames,
            domain.boot.state_base + domain.boot.state_frames
        );
        assert_ne!(domain.boot.flags & boot_flags::RESTORE, 0);
    }

    #[test]
    fn a_domain_that_may_grow() {
        let (start, most) = (1024, 2048);
        let (_, later) = added_later(start, most);
        let domain = of_size(start, most, later).domain(false).expect("it fits");
        assert_eq!((domain.boot.ram_frames, domain.boot.most()), (later, most));
        // Saved before there were numbers for what a guest adds.
        assert!(of_size(start, most, most).domain(false).is_ok());
        assert!(of_size(start, most, later - 1).domain(false).is_err());
        assert!(of_size(most + 1, most, most).domain(false).is_err());
    }

    #[test]
    fn numbers_that_do_not_fit_are_refused() {
        let refused = |what: &str, change: &dyn Fn(&mut Machine)| {
            let mut machine = machine();
            change(&mut machine);
            assert!(machine.domain(false).is_err(), "{what}");
        };
        for (name, word) in [
            ("ram_frames", 1023),
            ("start_frames", 1025),
            ("shared_info", 1023),
            ("shared_info", u64::MAX),
            ("grant_base", 1023),
            ("grant_base", u64::MAX),
            ("grant_frames", 33),
            ("state_base", 1056),
            ("state_base", u64::MAX),
            ("state_frames", 1),
            ("state_frames", MAX_FRAMES),
        ] {
            refused(name, &|machine| {
                machine.boot.insert(name.into(), word);
            });
        }
        refused("a word too few", &|machine| {
            machine.boot.remove("flags");
        });
        refused("a word too many", &|machine| {
            machine.boot.insert("more".into(), 1);
        });
        refused("no vCPU", &|machine| machine.vcpus = 0);
        refused("too many vCPUs", &|machine| machine.vcpus = MAX_VCPUS + 1);
        refused("a ring beyond its RAM", &|machine| machine.rings[1] = 1024);
    }
}
