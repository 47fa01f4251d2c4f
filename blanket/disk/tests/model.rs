//! Random requests of several queues at once, against a vector of bytes.

mod common;

use std::fs;
use std::path::Path;

use blanket_disk::{
    Backing, DataPath, Disk, Failure, Format, Image, Operation, Options, Queue, create, open,
};
use common::{Memory, SECTOR, contents, drain, pattern, qemu_img, read, request, simple};
use proptest::prelude::*;

/// Runs of the disk that one batch uses at most once each. They begin within clusters, so
/// neighbours meet in one cluster.
const LANES: usize = 4;
const LANE: usize = 517;
const QUEUES: usize = 3;

#[derive(Clone, Debug)]
enum Act {
    Read,
    Write(u8),
    Discard,
    Flush,
}

#[derive(Clone, Debug)]
struct Step {
    /// For each lane: what, from where on, and how many sectors.
    acts: Vec<(Act, usize, usize)>,
    pieces: Vec<usize>,
    /// Sectors that the disk gets larger by, after the acts.
    grow: Option<usize>,
    reopen: bool,
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        3 => Just(Act::Read),
        4 => any::<u8>().prop_map(Act::Write),
        2 => Just(Act::Discard),
        1 => Just(Act::Flush),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let acts = prop::collection::vec((act(), 0..LANE, 1..LANE), LANES);
    let pieces = prop::collection::vec(1usize..40, 1..6);
    let grow = prop::option::weighted(0.1, 1usize..300);
    (acts, pieces, grow, prop::bool::weighted(0.1)).prop_map(|(acts, pieces, grow, reopen)| Step {
        acts,
        pieces,
        grow,
        reopen,
    })
}

/// Opens the image again and again, and compares it with the model.
struct Run<'a> {
    path: &'a Path,
    options: Options,
    disk: Option<(Image, Vec<Box<dyn Queue>>)>,
    model: Vec<u8>,
}

impl<'a> Run<'a> {
    fn new(path: &'a Path, options: Options, model: Vec<u8>) -> Self {
        let mut run = Self {
            path,
            options,
            disk: None,
            model,
        };
        run.open();
        run
    }

    fn open(&mut self) {
        self.disk = None;
        let image = open(self.path, &self.options).unwrap();
        assert_eq!(image.size(), self.model.len() as u64);
        let queues = (0..QUEUES).map(|_| image.queue(2).unwrap()).collect();
        self.disk = Some((image, queues));
    }

    fn step(&mut self, step: &Step) {
        let (image, queues) = self.disk.as_mut().unwrap();
        let mut expected = Vec::new();
        for (lane, (act, from, sectors)) in step.acts.iter().enumerate() {
            let start = (lane * LANE + from) * SECTOR;
            let end = ((lane * LANE + (from + sectors).min(LANE)) * SECTOR).min(self.model.len());
            let range = start.min(end)..end;
            let length = range.len();
            let (operation, bytes) = match act {
                Act::Read => (Operation::Read, vec![0xee; length]),
                Act::Write(seed) => (Operation::Write, pattern(length, u64::from(*seed))),
                Act::Discard => {
                    let length = length as u64;
                    (Operation::Discard { length }, Vec::new())
                }
                Act::Flush => (Operation::Flush, Vec::new()),
            };
            let memory = Memory::new(&bytes);
            let offset = if operation == Operation::Flush {
                0
            } else {
                range.start as u64
            };
            queues[lane % QUEUES].submit(request(
                lane as u64,
                operation,
                offset,
                &memory,
                &step.pieces,
            ));
            if let Act::Write(_) = act {
                self.model[range.clone()].copy_from_slice(&bytes);
            }
            expected.push((operation, range, memory));
        }
        let mut seen = Vec::new();
        for queue in queues.iter_mut() {
            for completion in drain(queue.as_mut()) {
                completion.result.unwrap();
                seen.push(completion.token);
            }
            assert_eq!(queue.in_flight(), 0);
        }
        seen.sort_unstable();
        assert_eq!(seen, (0..LANES as u64).collect::<Vec<_>>());
        for (operation, range, memory) in expected {
            match operation {
                Operation::Read => assert!(memory.bytes() == self.model[range], "read"),
                Operation::Discard { .. } => {
                    let now = read(queues[0].as_mut(), range.start as u64, range.len()).unwrap();
                    let old = &mut self.model[range];
                    let kept = now
                        .iter()
                        .zip(&*old)
                        .all(|(now, old)| now == old || *now == 0);
                    assert!(kept, "discarded");
                    old.copy_from_slice(&now);
                }
                Operation::Write | Operation::Flush => {}
            }
        }
        if let Some(sectors) = step.grow {
            let size = self.model.len() + sectors * SECTOR;
            image.resize(size as u64).unwrap();
            self.model.resize(size, 0);
            assert_eq!(image.size(), size as u64);
        }
        if step.reopen {
            self.open();
        }
    }

    /// All steps, then a look at the whole; the image is closed at the end.
    fn all(mut self, steps: &[Step]) -> Vec<u8> {
        for step in steps {
            self.step(step);
        }
        let (image, queues) = self.disk.as_mut().unwrap();
        assert!(contents(image) == self.model, "the whole");
        let mut beyond = |operation| {
            let result = simple(queues[0].as_mut(), operation, self.model.len() as u64);
            assert!(
                matches!(result, Err(Failure::OutOfRange { .. })),
                "{result:?}"
            );
        };
        beyond(Operation::Discard { length: 512 });
        simple(queues[0].as_mut(), Operation::Flush, 0).unwrap();
        self.disk = None;
        self.model
    }
}

fn raw(data_path: DataPath, steps: &[Step]) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.raw");
    let model = pattern(LANES * LANE * SECTOR - 512, 7);
    fs::write(&path, &model).unwrap();
    let options = Options {
        data_path,
        ..Options::default()
    };
    let model = Run::new(&path, options, model).all(steps);
    assert!(fs::read(&path).unwrap() == model, "the file");
}

fn qcow2(path: &Path, model: Vec<u8>, steps: &[Step]) {
    let model = Run::new(path, Options::default(), model).all(steps);
    let directory = path.parent().unwrap();
    qemu_img(directory, &["check", "-f", "qcow2", path.to_str().unwrap()]);
    let image = path.to_str().unwrap();
    qemu_img(
        directory,
        &["convert", "-f", "qcow2", "-O", "raw", image, "after.raw"],
    );
    assert!(
        fs::read(directory.join("after.raw")).unwrap() == model,
        "as QEMU sees it"
    );
}

/// Few cases by default, as many as `PROPTEST_CASES` says for a longer look.
fn config() -> ProptestConfig {
    let mut config = ProptestConfig::default();
    if std::env::var_os("PROPTEST_CASES").is_none() {
        config.cases = 12;
    }
    config.max_shrink_iters = 200;
    config
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn raw_through_io_uring(steps in prop::collection::vec(step(), 1..8)) {
        raw(DataPath::IoUring, &steps);
    }

    #[test]
    fn raw_through_threads(steps in prop::collection::vec(step(), 1..8)) {
        raw(DataPath::Threads, &steps);
    }

    #[test]
    fn qcow2_of_our_own(steps in prop::collection::vec(step(), 1..8)) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.qcow2");
        let size = LANES * LANE * SECTOR;
        create(&path, Format::Qcow2, Some(size as u64), None).unwrap();
        qcow2(&path, vec![0; size], &steps);
    }

    #[test]
    fn qcow2_on_a_raw_image(steps in prop::collection::vec(step(), 1..8), short in 0usize..1000) {
        let directory = tempfile::tempdir().unwrap();
        let base = directory.path().join("base.raw");
        let mut model = pattern(LANES * LANE * SECTOR - short * SECTOR, 3);
        fs::write(&base, &model).unwrap();
        let path = directory.path().join("disk.qcow2");
        let size = LANES * LANE * SECTOR;
        let backing = Backing { path: &base, format: None };
        create(&path, Format::Qcow2, Some(size as u64), Some(backing)).unwrap();
        let kept = model.clone();
        model.resize(size, 0);
        qcow2(&path, model, &steps);
        assert!(fs::read(&base).unwrap() == kept, "the base is as it was");
    }

    #[test]
    fn qcow2_of_qemu(steps in prop::collection::vec(step(), 1..8), bits in 9u32..16) {
        let directory = tempfile::tempdir().unwrap();
        let model = pattern(LANES * LANE * SECTOR, 5);
        fs::write(directory.path().join("from.raw"), &model).unwrap();
        let clusters = format!("cluster_size={}", 1u32 << bits);
        // Compressed clusters, which are written over.
        qemu_img(
            directory.path(),
            &["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", &clusters, "from.raw", "disk.qcow2"],
        );
        qcow2(&directory.path().join("disk.qcow2"), model, &steps);
    }
}
