//! Any file as a saved VM: what must hold whatever is in it. Run by unit tests with bytes at
//! random, and by a fuzz target.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write as _;
use std::sync::{Arc, OnceLock};

use blanket_abi::device::Boot;
use blanket_abi::layout::{MAX_FRAMES, MAX_VCPUS};
use blanket_abi::xen::domid;
use blanket_abi::{PAGE_SIZE, state};
use blanket_disk::Reader;
use blanket_migration::pages::Pages;
use blanket_snapshot::{Kind, PAGE, Writer};
use blanket_xenstore::DomainSpec;
use blanket_xenstore::testing::damaged;
use serde_json::Value;
use vm_memory::{Bytes as _, GuestAddress};

use super::machine::words;
use super::{Machine, Moving, ResumeError, State, Stored, read};
use crate::builder::{self, Domain};
use crate::cpu::{Cpu, Profile};
use crate::devices::Devices;
use crate::hypervisor::{self, Hypervisor as _, Isolation};
use crate::migration::{Bases, Dirty, Images};
use crate::testing::{Fake, Guest};
use crate::xenstore::Xenstore;

/// Frames of the sample's RAM.
const RAM: u64 = 1024;
/// How long the sample was away, ns.
const AWAY: u64 = 1_000_000;

/// A machine that can be.
pub(super) fn sample() -> Machine {
    of_size(RAM, RAM, RAM)
}

/// Of a VM with `ram` frame numbers, of which it starts with `start` and may have `most`.
pub(super) fn of_size(start: u64, most: u64, ram: u64) -> Machine {
    let grants = 32;
    let base = ram + 1 + grants;
    let boot = Boot {
        ram_frames: ram,
        start_frames: start,
        shared_info: ram,
        grant_base: ram + 1,
        grant_frames: grants,
        state_base: base,
        state_frames: state::frames(1, ram),
        ..Boot::default()
    };
    let named = |(name, word): (&str, u64)| (name.to_owned(), word);
    Machine {
        name: "web".into(),
        uuid: "00000000-0000-4000-8000-000000000000".into(),
        memory: start * PAGE_SIZE,
        max_memory: most * PAGE_SIZE,
        vcpus: 1,
        kernel: "6.1".into(),
        devices: vec![("vbd".into(), 0)],
        disks: vec![(0, 1 << 20)],
        content: Vec::new(),
        bases: vec![],
        macs: vec![],
        cpu: Cpu::default(),
        lesser: false,
        xcr0_mask: 7,
        core: state::VERSION,
        boot: BTreeMap::from(words(&boot).map(named)),
        rings: [1, 2],
    }
}

/// A domain that is all zero.
#[cfg(test)]
pub(crate) fn domain() -> Domain {
    sample().domain(false).expect("it fits")
}

/// A machine without vCPUs that run.
fn machine_of(domain: &Domain) -> Arc<dyn hypervisor::Machine> {
    let fake = Fake::new(|_, _| Box::new(|_: &Guest| unreachable!("no vCPU runs")));
    let cpu = Profile::default();
    fake.create(domain, 0, 0, Isolation::Off, &cpu)
        .expect("a fake")
}

/// Machine and state of a VM that has a store and one vCPU, as text.
fn texts() -> [Value; 2] {
    static TEXTS: OnceLock<[Value; 2]> = OnceLock::new();
    let made = || {
        let machine = sample();
        let domain = machine.domain(false).expect("it fits");
        let spec = DomainSpec {
            domain: domid::GUEST,
            name: machine.name.clone(),
            uuid: machine.uuid.clone(),
            generation: "0:0".into(),
            memory_kib: machine.memory >> 10,
            max_memory_kib: machine.max_memory >> 10,
            vcpus: 1,
            store_ring: (machine.rings[0], builder::STORE_PORT),
            console_ring: (machine.rings[1], builder::CONSOLE_PORT),
        };
        let store = Xenstore::new(&domain, &spec, machine_of(&domain)).expect("a store");
        let state = store
            .standing_still(|store| State::read(&domain, 1, store, [3, 4], machine.memory, 0))
            .expect("memory");
        [
            serde_json::to_value(&machine).expect("plain data"),
            serde_json::to_value(&state).expect("plain data"),
        ]
    };
    TEXTS.get_or_init(made).clone()
}

/// Takes numbers from the front of some bytes; zeros when they are used up.
fn byte(data: &mut &[u8]) -> u8 {
    let Some((first, rest)) = data.split_first() else {
        return 0;
    };
    *data = rest;
    *first
}

fn word(data: &mut &[u8]) -> u64 {
    u64::from_le_bytes(std::array::from_fn(|_| byte(data)))
}

/// A file whose sums are right, whatever else is.
fn written(data: &mut &[u8]) -> Vec<u8> {
    let [mut machine, mut state] = texts();
    for _ in 0..byte(data) % 3 {
        damaged(&mut machine, data);
    }
    for _ in 0..byte(data) % 4 {
        damaged(&mut state, data);
    }
    let mut writer = Writer::new(Vec::new()).expect("memory");
    writer.text(Kind::Machine, &machine).expect("memory");
    for _ in 0..byte(data) % 4 {
        let how = byte(data);
        let first = match how % 4 {
            0 => word(data),
            _ => u64::from(byte(data)),
        };
        if how & 192 == 192 {
            // Right or wrong, of a disk that is there or not.
            let (number, block) = (u32::from(byte(data) / 128), u64::from(byte(data) % 10));
            let bytes = vec![byte(data) % 3; PAGE * (usize::from(how % 3) + 1)];
            // Beyond the last page there is nothing to name.
            let _ = writer.base(number, first, block, &bytes);
        } else if how & 64 == 0 {
            let count = usize::from(how / 4 % 4) + 1;
            writer
                .pages(first, &vec![how; count * PAGE])
                .expect("memory");
        } else {
            let length = usize::from(how % 64).min(data.len());
            let (bytes, rest) = data.split_at(length);
            *data = rest;
            let kind = [
                Kind::Pages,
                Kind::Disk,
                Kind::State,
                Kind::End,
                Kind::Missing,
                Kind::Base,
            ][usize::from(byte(data) % 6)];
            writer.chunk(kind, bytes).expect("memory");
        }
    }
    writer.text(Kind::State, &state).expect("memory");
    writer.finish().expect("memory").0
}

/// A file without a name that has these bytes.
pub(crate) fn unnamed(bytes: &[u8]) -> File {
    let file = rustix::fs::memfd_create("saved", rustix::fs::MemfdFlags::CLOEXEC);
    let mut file = File::from(file.expect("memory"));
    file.write_all(bytes).expect("memory");
    file
}

/// What disk 0 stands on: a block of zeros and seven of ones.
fn bases() -> Bases {
    let bytes = [vec![0; PAGE], vec![1; 7 * PAGE]].concat();
    let below = Reader::from_file(unnamed(&bytes)).expect("a file");
    Bases::on(0, below)
}

/// What comes of a file that is a VM that moves here.
fn moves(file: &[u8]) -> Result<(Domain, Option<Pages>), ResumeError> {
    let mut images = Images::of(&Devices::default(), |_| true)?;
    let mut missing = None;
    let moving = Moving {
        images: &mut images,
        bases: Some(&bases()),
        answers: &mut |_: &mut &[u8]| Ok(()),
        may_follow: true,
        missing: &mut missing,
    };
    let (domain, ..) = read(file, false, Some(moving), None, |_| Ok(None))?;
    Ok((domain, missing))
}

/// As much of a VM's memory as the sample has.
fn ram(domain: &Domain) -> Vec<u8> {
    let length = domain.frames.min(RAM) * PAGE_SIZE;
    let mut bytes = vec![0; usize::try_from(length).expect("little")];
    let read = domain.memory.read_slice(&mut bytes, GuestAddress(0));
    read.expect("inside");
    bytes
}

/// The same memory comes of a file whose pages stay in it until they are needed.
fn stays(file: &[u8], whole: &Domain) {
    let mut stored = Stored::new(unnamed(file));
    let read = read(file, false, None, Some(&mut stored), |_| Ok(None));
    let (domain, ..) = read.expect("it was read as a whole");
    let missing = stored.lay_standing(&domain).expect("its frames");
    let same = |page: u64| {
        let content = |domain: &Domain| {
            let mut bytes = [0; PAGE];
            let at = GuestAddress(page * PAGE_SIZE);
            domain.memory.read_slice(&mut bytes, at).expect("inside");
            bytes
        };
        assert!(content(&domain) == content(whole), "page {page}");
    };
    for (page, _) in missing.runs(1) {
        let run = stored.run_with(page).expect("as it was");
        for (page, content) in run.pages().filter(|(page, _)| missing.has(*page)) {
            let at = GuestAddress(page * PAGE_SIZE);
            domain.memory.write_slice(content, at).expect("inside");
        }
    }
    missing.runs(1).for_each(|(page, _)| same(page));
    let mut standing = Dirty::none(&domain);
    standing.add_standing(&domain);
    standing.runs(1).for_each(|(page, _)| same(page));
}

/// A file: the bytes as they are, or a saved VM with other bytes in it, or one that is wrong and
/// has the right sums. It is refused, or what comes of it is a domain whose state can be laid,
/// and which can be saved and taken up again.
///
/// # Panics
/// If that does not hold.
pub fn saved(mut data: &[u8]) {
    let how = byte(&mut data);
    let file = match how % 8 {
        0 => data.to_vec(),
        1 => {
            let mut file = written(&mut &[][..]);
            let whole = file.clone();
            for _ in 0..=how / 64 {
                let at = usize::from(byte(&mut data)) << 8 | usize::from(byte(&mut data));
                let length = file.len();
                file[at % length] ^= byte(&mut data);
            }
            if file != whole {
                assert!(
                    read(&file[..], false, None, None, |_| Ok(None)).is_err(),
                    "not noticed"
                );
            }
            return;
        }
        _ => written(&mut data),
    };
    let moved = moves(&file);
    let Ok((domain, machine, state)) = read(&file[..], false, None, None, |_| Ok(None)) else {
        return;
    };
    let (moved, missing) = moved.expect("one that moves may bring more, and nothing less");
    assert!(missing.is_none() && ram(&moved) == ram(&domain));
    stays(&file, &domain);
    assert!(domain.frames <= MAX_FRAMES && (1..=MAX_VCPUS).contains(&machine.vcpus));
    assert!(
        domain.boot.state_base + state::frames(machine.vcpus, domain.boot.ram_frames)
            <= domain.frames
    );
    let _ = state.away();
    // A core, or the store, may refuse what this did not look at.
    let Ok(ram) = state.lay(&domain, 0, AWAY) else {
        return;
    };
    assert!(ram <= domain.boot.ram_frames);
    let target = state.target;
    let Ok((store, console)) = state.backends(&domain, &machine_of(&domain)) else {
        return;
    };
    let again = || {
        store
            .standing_still(|store| State::read(&domain, machine.vcpus, store, console, target, 0))
            .expect("memory")
    };
    let mut writer = Writer::new(Vec::new()).expect("memory");
    writer.text(Kind::Machine, &machine).expect("memory");
    let state = again();
    writer.text(Kind::State, &state).expect("memory");
    let file = writer.finish().expect("memory").0;
    let (other, same, read) =
        read(&file[..], false, None, None, |_| Ok(None)).expect("saved by us");
    assert_eq!((&same, &read), (&machine, &state));
    read.lay(&other, 0, AWAY).expect("it was laid before");
    read.backends(&other, &machine_of(&other))
        .expect("it was taken up before");
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    #[test]
    fn pages_that_are_named_come_with_a_vm_that_moves_only() {
        // No damage, and one chunk of two blocks of ones, of disk 0 from its second block on.
        let how = [0, 0, 1, 193, 40, 0, 1, 1];
        let file = super::written(&mut &how[..]);
        let (moved, _) = super::moves(&file).expect("it has the base");
        let all = super::ram(&moved);
        let (page, rest) = (40 * super::PAGE, 42 * super::PAGE);
        assert!(all[page..rest].iter().all(|byte| *byte == 1));
        assert!(
            all[..page]
                .iter()
                .chain(&all[rest..])
                .all(|byte| *byte == 0)
        );
        assert!(super::read(&file[..], false, None, None, |_| Ok(None)).is_err());
    }

    #[test]
    fn a_saved_vm_that_nobody_damaged() {
        let file = super::written(&mut &[][..]);
        let (domain, machine, state) =
            super::read(&file[..], false, None, None, |_| Ok(None)).expect("read");
        assert_eq!(machine, super::sample());
        state.lay(&domain, 0, 1).expect("laid");
        state
            .backends(&domain, &super::machine_of(&domain))
            .expect("taken up");
        super::saved(&[2]);
    }

    proptest! {
        #[test]
        fn any_file(data in proptest::collection::vec(any::<u8>(), 0..300)) {
            super::saved(&data);
        }
    }
}
