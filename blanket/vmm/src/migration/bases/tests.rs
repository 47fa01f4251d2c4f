use blanket_abi::PAGE_SIZE;
use blanket_devices::block::{Config, Vbd, device_number};
use blanket_disk::{Options, Writer as DiskWriter};
use blanket_migration::pages::Pages;
use blanket_snapshot::{Kind, Part, Reader as Saved};
use tempfile::TempDir;
use vm_memory::{Bytes as _, GuestAddress};

use super::*;
use crate::builder::Domain;
use crate::console::Console;
use crate::instance::{Instance, Spec};
use crate::migration::{Dirty, Images, Moving as Disks};
use crate::saved::testing::domain;
use crate::saved::{Moving, memory};
use crate::sync::lock;
use crate::testing::{Fake, Guest};

const NAME: &str = "blake3:0123";
/// Blocks of a base.
const BLOCKS: u8 = 32;

fn block(number: u8) -> [u8; PAGE] {
    std::array::from_fn(|at| number.wrapping_add(u8::try_from(at % 251).unwrap_or(0)))
}

/// A base, whose third block is zero.
fn base() -> Vec<u8> {
    let mut base: Vec<u8> = (0..BLOCKS).flat_map(block).collect();
    base[3 * PAGE..4 * PAGE].fill(0);
    base
}

/// A host, with disks that stand on this.
struct Side {
    instance: Arc<Instance>,
    disks: Vec<Arc<Vbd>>,
    _directory: TempDir,
}

impl Side {
    fn new(bases: &[(&[u8], Option<&str>)]) -> Self {
        let directory = TempDir::new().expect("a directory");
        let fake = Fake::new(|_, _| Box::new(|_: &Guest| unreachable!("no vCPU runs")));
        let console = Console::new().expect("a console");
        let instance = Instance::new(Spec::default(), fake, console).expect("an instance");
        let mut disks = Vec::new();
        for (index, (bytes, name)) in (0..).zip(bases) {
            let path = |ending| directory.path().join(format!("{index}.{ending}"));
            std::fs::write(path("raw"), bytes).expect("written");
            blanket_disk::snapshot(path("raw"), None, path("qcow2")).expect("an overlay");
            let image = blanket_disk::open(path("qcow2"), &Options::default()).expect("it");
            let file = DiskFile {
                path: path("qcow2"),
                reader: image.reader(),
                base: name.map(str::to_owned),
            };
            let config = Config {
                index,
                origins: name.is_some(),
                ..Config::default()
            };
            let vbd = Arc::new(Vbd::new(Arc::new(image), config, 1));
            let device = AnyDevice::Disk(Arc::clone(&vbd), file);
            instance.attach(device).expect("attached");
            disks.push(vbd);
        }
        Self {
            instance,
            disks,
            _directory: directory,
        }
    }

    /// One that is as all are.
    fn one() -> Self {
        Self::new(&[(&base(), Some(NAME))])
    }

    fn bases(&self) -> Bases {
        Bases::of(&lock(&self.instance.devices))
    }

    fn origins(&self) -> &Origins {
        self.disks[0].origins().expect("it remembers")
    }

    /// What comes of a stream.
    fn receives(
        &self,
        bases: Option<&Bases>,
        write: impl FnOnce(&mut Writer<Vec<u8>>),
    ) -> Result<Domain, ResumeError> {
        let domain = domain();
        let mut images = Images::of(&Devices::default(), |_| true)?;
        let mut moving = Some(Moving {
            images: &mut images,
            bases,
            answers: &mut |_: &mut &[u8]| Ok(()),
            may_follow: true,
            missing: &mut None,
        });
        let stream = stream(write);
        memory::read(&mut Saved::new(&stream[..])?, &domain, &mut moving, None)?;
        Ok(domain)
    }
}

fn stream(write: impl FnOnce(&mut Writer<Vec<u8>>)) -> Vec<u8> {
    let mut writer = Writer::new(Vec::new()).expect("memory");
    write(&mut writer);
    writer.finish().expect("memory").0
}

fn put(domain: &Domain, gfn: u64, page: &[u8; PAGE]) {
    let at = GuestAddress(gfn * PAGE_SIZE);
    domain.memory.write_slice(page, at).expect("inside");
}

fn page(domain: &Domain, gfn: u64) -> [u8; PAGE] {
    let mut page = [0; PAGE];
    let at = GuestAddress(gfn * PAGE_SIZE);
    domain.memory.read_slice(&mut page, at).expect("inside");
    page
}

fn same(one: &Domain, other: &Domain) {
    for gfn in 0..one.boot.state_base {
        assert!(page(one, gfn) == page(other, gfn), "page {gfn}");
    }
}

/// The pages that are sent, and those that are named with their disk and block.
fn parts(stream: &[u8]) -> (Vec<u64>, Vec<(u64, u32, u64)>) {
    let mut reader = Saved::new(stream).expect("ours");
    let (mut sent, mut named) = (Vec::new(), Vec::new());
    while let Some(part) = reader.part().expect("ours") {
        match part {
            Part::Pages(run) => sent.extend((run.first..).take(run.bytes.len() / PAGE)),
            Part::Base(base) => named.extend(
                (base.first..)
                    .zip(base.block..)
                    .take(base.count as usize)
                    .map(|(gfn, block)| (gfn, base.number, block)),
            ),
            other => panic!("{other:?}"),
        }
    }
    (sent, named)
}

#[test]
fn what_the_base_has_is_named_and_what_changed_since_is_sent() {
    let (here, there) = (Side::one(), Side::one());
    let source = domain();
    let number = device_number(0);
    // As its guest reads them.
    for (gfn, block) in (10..).zip(base()[2 * PAGE..].as_chunks().0).take(8) {
        put(&source, gfn, block);
    }
    here.origins().note(10, 2 * PAGE_SIZE, 8);
    put(&source, 30, &block(9));
    here.origins().note(30, 9 * PAGE_SIZE, 1);
    // The base has it, and nobody knows.
    put(&source, 40, &block(5));
    // It was written to since, or read from behind the base's end.
    put(&source, 14, &[7; PAGE]);
    put(&source, 50, &block(31));
    here.origins().note(50, 33 * PAGE_SIZE, 1);
    // Its block was written to, which the overlay has: the base is as it was.
    let mut disk = DiskWriter::new(&**here.disks[0].disk(), PAGE).expect("a writer");
    disk.write(9 * PAGE_SIZE, &[8; PAGE]).expect("written");
    disk.write(8 * PAGE_SIZE, &[8; PAGE]).expect("written");
    put(&source, 16, &[8; PAGE]);

    let bases = here.bases();
    let first = stream(|writer| {
        let sent = memory::write(writer, &source, &bases).expect("written");
        assert_eq!(sent, 4);
    });
    let (sent, named) = parts(&first);
    assert_eq!(sent, [14, 16, 40, 50]);
    // The page of zeros is in no round.
    let whole = [(10, 2), (12, 4), (13, 5), (15, 7), (17, 9), (30, 9)];
    assert_eq!(named, whole.map(|(gfn, block)| (gfn, number, block)));
    assert_eq!(bases.found(), 6);
    assert_eq!(
        here.origins().of(14, 3),
        [None, Some(7), None],
        "it is not looked for there again"
    );

    // The next round.
    put(&source, 12, &[9; PAGE]);
    put(&source, 13, &[0; PAGE]);
    let mut dirty = Dirty::none(&source);
    for gfn in [10, 11, 12, 13, 15] {
        dirty.add(gfn);
    }
    let second = stream(|writer| {
        let sent = memory::write_dirty(writer, &source, &dirty, &bases).expect("written");
        assert_eq!(sent, 3);
    });
    let (sent, named) = parts(&second);
    assert_eq!(sent, [11, 12, 13]);
    assert_eq!(named, [(10, number, 2), (15, number, 7)]);

    let received = there
        .receives(Some(&there.bases()), |writer| {
            memory::write(writer, &source, &here.bases()).expect("written");
            memory::write_dirty(writer, &source, &dirty, &here.bases()).expect("written");
        })
        .expect("received");
    same(&source, &received);
    // It may move on.
    assert_eq!(there.origins().of(30, 1), [Some(9)]);
    assert_eq!(there.origins().of(40, 1), [None]);
}

#[test]
fn each_disk_is_looked_at() {
    let other: Vec<u8> = (100..100 + BLOCKS).flat_map(block).collect();
    let of = || Side::new(&[(&base(), Some(NAME)), (&other, Some("blake3:4567"))]);
    let (here, there) = (of(), of());
    let source = domain();
    put(&source, 5, &block(101));
    put(&source, 6, &block(2));
    // From which one they were read last nobody knows.
    for disk in &here.disks {
        disk.origins().expect("it remembers").note(5, PAGE_SIZE, 2);
    }
    let bases = here.bases();
    let stream = stream(|writer| {
        memory::write(writer, &source, &bases).expect("written");
    });
    let named = vec![(5, device_number(1), 1), (6, device_number(0), 2)];
    assert_eq!(parts(&stream), (vec![], named));
    let received = there
        .receives(Some(&there.bases()), |writer| {
            memory::write(writer, &source, &here.bases()).expect("written");
        })
        .expect("received");
    same(&source, &received);
}

#[test]
fn nothing_is_named_where_there_is_no_base_nor_in_a_file() {
    let here = Side::new(&[(&base(), None)]);
    assert!(here.bases().bases.is_empty() && here.disks[0].origins().is_none());
    let here = Side::one();
    let devices = lock(&here.instance.devices);
    assert!(Disks::none().bases().bases.is_empty());
    assert!(Disks::begin(&devices).bases().bases.is_empty());
    let moving = Disks::begin(&devices).finding(&devices);
    assert!(!moving.bases().bases.is_empty());
}

#[test]
fn what_is_not_the_same_there_is_refused() {
    let number = device_number(0);
    let refused = |there: &Side, bases: Option<&Bases>, write: &dyn Fn(&mut Writer<Vec<u8>>)| {
        let refused = there.receives(bases, write).err();
        refused.expect("refused").to_string()
    };
    let names = |number, first, block_at, content: u8| {
        move |writer: &mut Writer<Vec<u8>>| {
            let bytes = block(content);
            let written = writer.base(number, first, block_at, &bytes);
            written.expect("written");
        }
    };
    let there = Side::one();
    let bases = there.bases();
    let good = names(number, 5, 4, 4);
    there.receives(Some(&bases), good).expect("the same");

    let other = "disk 51712: what it stands on is not what the source's stands on: give both the \
                 same base";
    assert_eq!(
        refused(&there, Some(&bases), &names(number, 5, 4, 6)),
        other
    );
    let mut changed = base();
    changed[5 * PAGE - 1] ^= 1;
    let elsewhere = Side::new(&[(&changed, Some(NAME))]);
    assert_eq!(refused(&elsewhere, Some(&elsewhere.bases()), &good), other);
    // Beyond its end, and as far as a number goes.
    for block in [BLOCKS.into(), (1 << 52) - 2] {
        let names = names(number, 5, block, 0);
        assert_eq!(refused(&there, Some(&bases), &names), other);
    }
    let shorter = Side::new(&[(&base()[..5 * PAGE - 512], Some(NAME))]);
    assert_eq!(refused(&shorter, Some(&shorter.bases()), &good), other);

    let unknown = refused(&there, Some(&bases), &names(51728, 5, 4, 4));
    assert!(unknown.starts_with("disk 51728: pages are"), "{unknown}");
    let nameless = Side::new(&[(&base(), None)]);
    let unknown = refused(&nameless, Some(&nameless.bases()), &good);
    assert!(unknown.contains("give it the base="), "{unknown}");
    let file = refused(&there, None, &good);
    assert!(file.contains("a saved VM brings all"), "{file}");

    let end = domain().boot.state_base;
    for first in [end, u64::MAX - 1] {
        refused(&there, Some(&bases), &names(number, first, 4, 4));
    }
    there
        .receives(Some(&bases), names(number, end - 1, 4, 4))
        .expect("the last one");
    refused(&there, Some(&bases), &|writer| {
        let packed = Pages::none(end).pack().expect("memory");
        writer.chunk(Kind::Missing, &packed).expect("memory");
        good(writer);
    });
}
