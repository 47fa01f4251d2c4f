//! What a saved VM is made of, and what of it a host must have.

use std::collections::BTreeMap;

use blanket_abi::device::{Boot, boot_flags};
use blanket_abi::layout::{MAX_FRAMES, MAX_VCPUS, added_later};
use blanket_abi::{Gfn, PAGE_SIZE, state};
use serde::{Deserialize, Serialize};

use super::ResumeError;
use crate::builder::{self, Domain};
use crate::cpu::{Cpu, HIDES, Names, Profile, listed};
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
    /// It was given less than its host's, and has nothing else wherever it goes. Programs that do
    /// not know of this refuse it.
    #[serde(default, skip_serializing_if = "is_false")]
    pub lesser: bool,
    /// The components of XCR0 that it may have found.
    pub xcr0_mask: u64,
    /// Version of its core's state.
    pub core: u64,
    /// The boot record's words that its core and its backends still go by.
    pub boot: BTreeMap<String, u64>,
    /// Frames of its rings: the xenstore's, the console's.
    pub rings: [u64; 2],
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "what serde asks for")]
fn is_false(it: &bool) -> bool {
    !it
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
        let only = instance.only();
        let profile = instance.profile_of(only.as_ref());
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
            cpu: profile.cpu,
            lesser: only.is_some(),
            xcr0_mask: profile.xcr0_mask,
            core: state::VERSION,
            boot: words(&domain.boot).map(named).into(),
            rings: [domain.store.0, domain.console.0],
        }
    }

    /// All that it has of its host's CPU, if it was given less.
    pub(super) fn only(&self) -> Option<&Names> {
        self.lesser.then_some(&self.cpu.features)
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
        self.finds_the_same(&instance.profile_of(self.only()))?;
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

    /// Whether its guest goes on with a CPU as it has found it: `here` is what this host gives it.
    fn finds_the_same(&self, here: &Profile) -> Result<(), ResumeError> {
        let impossible = |why: String| Err(ResumeError::Impossible(why));
        if let Some(why) = here.cpu.lacks(&self.cpu) {
            return impossible(why);
        }
        if self.xcr0_mask & !here.xcr0_mask != 0 || (self.xcr0_mask == 0) != (here.xcr0_mask == 0) {
            return impossible(format!(
                "its guest has found the CPU's XSAVE components {:#x}, and this host has {:#x}",
                self.xcr0_mask, here.xcr0_mask
            ));
        }
        if !here.bare.is_empty() {
            return impossible(format!(
                "it was given a CPU without {}, and its programs would find that here: {HIDES}",
                listed(&here.bare)
            ));
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
    use crate::console::Console;
    use crate::instance::Spec;
    use crate::testing::{Fake, Guest};

    /// A process that a VM like the sample may come to, on a host with everything, which hides from
    /// programs what their CPU has not if it `binds` them.
    fn host(binds: bool) -> std::sync::Arc<Instance> {
        let sample = machine();
        let spec = Spec {
            memory: sample.memory,
            max_memory: Some(sample.max_memory),
            ..Spec::default()
        };
        let fake = Fake::new(|_, _| Box::new(|_: &Guest| unreachable!("no vCPU runs")));
        let cpu = move |only: Option<&Names>| Profile::new(0xe7, binds, only, |_, _| [u32::MAX; 4]);
        let fake = fake.with_cpu(Box::new(cpu));
        Instance::new(spec, fake, Console::new().expect("a console")).expect("an instance")
    }

    /// The sample, with a CPU without these.
    fn without(names: &[&str]) -> Machine {
        let host = host(true);
        let mut only = host.profile_of(None).cpu.features;
        only.retain(|name| !names.contains(&name.as_str()));
        let given = host.profile_of(Some(&only));
        Machine {
            cpu: given.cpu,
            lesser: true,
            xcr0_mask: given.xcr0_mask,
            devices: Vec::new(),
            disks: Vec::new(),
            ..machine()
        }
    }

    #[test]
    fn a_lesser_cpu_goes_where_it_stays_one() {
        let fits = |machine: &Machine, binds| machine.fits(&host(binds)).map_err(|e| e.to_string());
        for gone in ["avx", "avx512f", "xsave"] {
            for binds in [false, true] {
                assert_eq!(fits(&without(&[gone]), binds), Ok(()), "{gone}, {binds}");
            }
        }
        let less = without(&["avx", "bmi1"]);
        assert_eq!(fits(&less, true), Ok(()));
        let why = fits(&less, false).expect_err("programs would find BMI1");
        assert!(why.contains("a CPU without bmi1, and"), "{why}");
        // One that was given all that there was may find more later.
        let whole = Machine {
            lesser: false,
            ..less.clone()
        };
        assert_eq!(fits(&whole, false), Ok(()));
        assert_eq!(less.only(), Some(&less.cpu.features));
        assert_eq!(whole.only(), None);
        // No host gives what it has not.
        let mut more = less;
        more.cpu.features.insert("avx10".into());
        let why = fits(&more, true).expect_err("it is not there");
        assert!(why.contains("has found avx10"), "{why}");
    }

    #[test]
    fn a_lesser_cpu_is_written_down_and_others_are_as_before() {
        let text = |machine: &Machine| serde_json::to_string(machine).expect("text");
        let (less, whole) = (without(&["avx"]), machine());
        assert!(!text(&whole).contains("lesser"), "older programs take it");
        assert!(text(&less).contains("\"lesser\":true"), "and refuse this");
        for machine in [less, whole] {
            let back: Machine = serde_json::from_str(&text(&machine)).expect("it is one");
            assert_eq!(back, machine);
        }
    }

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
