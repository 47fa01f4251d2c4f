//! Queues: more than their depth, failures, ends in the middle, and who may write.

mod common;

use std::fs::{self, File};
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use blanket_disk::{
    Cache, DataPath, Disk, Failure, Format, Image, Operation, Options, create, open,
};
use common::{Memory, SECTOR, drain, one, pattern, read, request, simple, write};
use rustix::event::{EventfdFlags, eventfd};
use tempfile::TempDir;

const SIZE: usize = 1 << 20;

/// The same disk in every way that there is to reach one.
fn every_way(mut test: impl FnMut(&str, Image, &TempDir)) {
    let cached = Cache::Writeback;
    for (name, format, data_path, cache) in [
        ("io_uring.raw", Format::Raw, DataPath::IoUring, cached),
        ("direct.raw", Format::Raw, DataPath::IoUring, Cache::None),
        ("threads.raw", Format::Raw, DataPath::Threads, cached),
        (
            "direct-threads.raw",
            Format::Raw,
            DataPath::Threads,
            Cache::None,
        ),
        ("auto.raw", Format::Raw, DataPath::Auto, cached),
        ("disk.qcow2", Format::Qcow2, DataPath::Auto, cached),
    ] {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(name);
        create(&path, format, Some(SIZE as u64), None).unwrap();
        let options = Options {
            data_path,
            cache: Some(cache),
            ..Options::default()
        };
        test(name, open(&path, &options).unwrap(), &directory);
    }
}

#[test]
fn more_requests_than_the_queue_is_deep() {
    every_way(|name, image, _| {
        let bytes = pattern(SIZE, 1);
        let mut queue = image.queue(4).unwrap();
        for (token, piece) in bytes.chunks(SECTOR).enumerate() {
            let memory = Memory::new(piece);
            let offset = (token * SECTOR) as u64;
            queue.submit(request(
                token as u64,
                Operation::Write,
                offset,
                &memory,
                &[1],
            ));
        }
        assert_eq!(queue.in_flight(), SIZE / SECTOR, "{name}");
        let mut tokens: Vec<_> = drain(queue.as_mut())
            .into_iter()
            .map(|done| {
                done.result.unwrap();
                done.token
            })
            .collect();
        tokens.sort_unstable();
        assert!(tokens.into_iter().eq(0..(SIZE / SECTOR) as u64), "{name}");
        assert!(read(queue.as_mut(), 0, SIZE).unwrap() == bytes, "{name}");
    });
}

#[test]
fn one_request_of_more_buffers_than_the_kernel_takes() {
    every_way(|name, image, _| {
        let bytes = pattern(SIZE, 2);
        let mut queue = image.queue(1).unwrap();
        let memory = Memory::new(&bytes);
        one(
            queue.as_mut(),
            request(0, Operation::Write, 0, &memory, &[1]),
        )
        .unwrap();
        let memory = Memory::new(&vec![0; SIZE]);
        one(
            queue.as_mut(),
            request(0, Operation::Read, 0, &memory, &[1]),
        )
        .unwrap();
        assert!(memory.bytes() == bytes, "{name}");
    });
}

#[test]
fn what_does_not_fit_the_disk_fails_at_once() {
    every_way(|name, image, _| {
        let mut queue = image.queue(2).unwrap();
        let size = SIZE as u64;
        for (offset, sectors) in [(size, 1), (size - 512, 2), (u64::MAX - 511, 1)] {
            for operation in [Operation::Read, Operation::Write] {
                let memory = Memory::new(&vec![0; sectors * SECTOR]);
                let result = one(queue.as_mut(), request(0, operation, offset, &memory, &[9]));
                assert!(
                    matches!(result, Err(Failure::OutOfRange { .. })),
                    "{name} {result:?}"
                );
            }
        }
        let whole = Operation::Discard {
            length: u64::MAX - 511,
        };
        let result = simple(queue.as_mut(), whole, 512);
        assert!(
            matches!(result, Err(Failure::OutOfRange { .. })),
            "{name} {result:?}"
        );
        let result = simple(queue.as_mut(), Operation::Discard { length: 1 }, 0);
        assert!(matches!(result, Err(Failure::Host(_))), "{name} {result:?}");
        for operation in [
            Operation::Read,
            Operation::Write,
            Operation::Discard { length: 0 },
        ] {
            simple(queue.as_mut(), operation, 0).unwrap();
        }
        // A larger disk holds for queues that are there already.
        image.resize(size + 512).unwrap();
        write(queue.as_mut(), size, &[7; SECTOR]).unwrap();
        assert!(image.resize(size).is_err());
        assert!(image.resize(size + 513).is_err());
        assert_eq!(image.size(), size + 512);
    });
}

#[test]
fn a_read_only_disk_is_not_written() {
    every_way(|name, image, _| {
        let path = image.path().to_path_buf();
        drop(image);
        let image = open(&path, &Options::read_only()).unwrap();
        let mut queue = image.queue(2).unwrap();
        for operation in [Operation::Write, Operation::Discard { length: 512 }] {
            let result = simple(queue.as_mut(), operation, 0);
            assert!(
                matches!(result, Err(Failure::ReadOnly)),
                "{name} {result:?}"
            );
        }
        simple(queue.as_mut(), Operation::Flush, 0).unwrap();
        assert_eq!(image.discard_granularity(), 0);
        assert!(image.resize(2 * SIZE as u64).is_err());
    });
}

#[test]
fn a_discard_gives_space_back() {
    use std::os::unix::fs::MetadataExt;
    every_way(|name, image, _| {
        let mut queue = image.queue(2).unwrap();
        write(queue.as_mut(), 0, &vec![1; SIZE]).unwrap();
        simple(queue.as_mut(), Operation::Flush, 0).unwrap();
        let blocks = || fs::metadata(image.path()).unwrap().blocks();
        let before = blocks();
        assert!(image.discard_granularity() > 0, "{name}");
        let length = SIZE as u64 / 2;
        simple(queue.as_mut(), Operation::Discard { length }, 0).unwrap();
        simple(queue.as_mut(), Operation::Flush, 0).unwrap();
        if image.format() == Format::Raw {
            assert!(before - blocks() >= length / 512, "{name}");
        } else {
            // Its clusters are used again before the file grows.
            let file = fs::metadata(image.path()).unwrap().len();
            write(queue.as_mut(), 0, &vec![2; SIZE / 2]).unwrap();
            assert_eq!(fs::metadata(image.path()).unwrap().len(), file);
        }
    });
}

#[test]
fn a_queue_may_end_while_requests_are_in_flight() {
    every_way(|name, image, _| {
        let weak = {
            let mut queue = image.queue(8).unwrap();
            let memory = Memory::new(&vec![3; SIZE]);
            for token in 0..40 {
                queue.submit(request(token, Operation::Write, 0, &memory, &[1, 2]));
            }
            queue.flush_submissions();
            Arc::downgrade(&memory)
        };
        // Nobody reads or writes the memory any more.
        assert!(weak.upgrade().is_none(), "{name}");
        let mut queue = image.queue(1).unwrap();
        read(queue.as_mut(), 0, SIZE).unwrap();
    });
}

#[test]
fn one_waits_for_the_disk_for_a_descriptor_and_for_some_time() {
    const LONG: Option<Duration> = Some(Duration::from_secs(60));
    every_way(|name, image, _| {
        let mut queue = image.queue(1).unwrap();
        let wake = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
        let before = Instant::now();
        let short = Duration::from_millis(20);
        while before.elapsed() < short {
            // A signal of the host's may end it earlier.
            queue.wait(Some(wake.as_fd()), Some(short));
        }
        assert!(before.elapsed() < Duration::from_secs(30), "{name}");

        // Each time that it is written to ends a wait, before and in it.
        let write = |wake: &OwnedFd| {
            rustix::io::write(wake, &1u64.to_ne_bytes()).unwrap();
        };
        let again = wake.try_clone().unwrap();
        let mut writer = None;
        for round in 0..4 {
            if round % 2 == 0 {
                write(&wake);
            } else {
                let again = again.try_clone().unwrap();
                writer = Some(std::thread::spawn(move || {
                    std::thread::sleep(short);
                    write(&again);
                }));
            }
            if queue.wait(Some(wake.as_fd()), LONG) {
                rustix::io::read(&wake, &mut [0; 8]).unwrap();
            }
            if let Some(writer) = writer.take() {
                writer.join().unwrap();
            }
        }
        assert!(before.elapsed() < Duration::from_secs(40), "{name}");
        // And no more than that.
        let (since, mut waits) = (Instant::now(), 0);
        while since.elapsed() < short {
            if queue.wait(Some(wake.as_fd()), Some(short)) {
                rustix::io::read(&wake, &mut [0; 8]).unwrap();
            }
            waits += 1;
        }
        assert!(waits < 50, "{name}: {waits} waits");

        // Nothing but waiting begins what was submitted.
        let memory = Memory::new(&[0; SECTOR]);
        queue.submit(request(5, Operation::Read, 0, &memory, &[1]));
        let mut done = Vec::new();
        while done.is_empty() {
            queue.wait(Some(wake.as_fd()), LONG);
            queue.collect(&mut done);
        }
        // A failure is told the same way, and so is what came while nobody waited.
        queue.submit(request(6, Operation::Read, u64::MAX - 511, &memory, &[1]));
        assert_eq!(drain(queue.as_mut()).len(), 1);
        write(&wake);
        queue.wait(Some(wake.as_fd()), None);
        assert_eq!(queue.in_flight(), 0);
        assert!(before.elapsed() < Duration::from_secs(50), "{name}");
    });
}

#[test]
fn past_the_cache_any_memory_will_do() {
    for data_path in [DataPath::IoUring, DataPath::Threads] {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.raw");
        create(&path, Format::Raw, Some(SIZE as u64), None).unwrap();
        let options = Options {
            data_path,
            cache: Some(Cache::None),
            ..Options::default()
        };
        // On a file system without direct I/O it goes through the cache.
        let image = open(&path, &options).unwrap();
        let mut queue = image.queue(4).unwrap();
        let bytes = pattern(16 * SECTOR, 9);
        // In one piece, and in pieces beside each other; none begins at a sector of memory.
        for pieces in [&[16][..], &[1, 3]] {
            let memory = Memory::new(&[&[1][..], &bytes].concat());
            let buffers = memory.buffers_from(1, pieces);
            let offset = (3 * SECTOR) as u64;
            let mut go = |operation| {
                let mut request = request(1, operation, offset, &memory, pieces);
                request.buffers.clone_from(&buffers);
                one(queue.as_mut(), request).unwrap();
            };
            go(Operation::Write);
            memory.fill(0);
            go(Operation::Read);
            assert!(memory.bytes()[1..] == bytes, "{data_path:?} {pieces:?}");
            assert_eq!(memory.bytes()[0], 0);
        }
        let mut there = vec![0; 16 * SECTOR];
        image
            .reader()
            .read_exact_at(3 * SECTOR as u64, &mut there)
            .unwrap();
        assert!(there == bytes);
    }
}

#[test]
fn an_image_that_is_cut_off_fails_and_ends_nothing() {
    every_way(|name, image, _| {
        if image.format() != Format::Raw {
            return;
        }
        let mut queue = image.queue(1).unwrap();
        File::options()
            .write(true)
            .open(image.path())
            .unwrap()
            .set_len(SECTOR as u64)
            .unwrap();
        let result = read(queue.as_mut(), 0, 2 * SECTOR);
        assert!(matches!(result, Err(Failure::Host(_))), "{name} {result:?}");
        read(queue.as_mut(), 0, SECTOR).unwrap();
    });
}

#[test]
fn a_queue_that_came_from_another_thread_works() {
    every_way(|name, image, _| {
        let bytes = pattern(SIZE, 4);
        let mut queue = image.queue(4).unwrap();
        let memory = Memory::new(&bytes);
        // The thread ends while the kernel has its request.
        let mut queue = std::thread::spawn(move || {
            queue.submit(request(0, Operation::Write, 0, &memory, &[16]));
            queue.submit(request(1, Operation::Flush, 0, &Memory::new(&[]), &[1]));
            queue.flush_submissions();
            queue
        })
        .join()
        .unwrap();
        let done = drain(queue.as_mut());
        assert_eq!(done.len(), 2);
        for completion in done {
            completion.result.unwrap();
        }
        assert!(read(queue.as_mut(), 0, SIZE).unwrap() == bytes, "{name}");
    });
}
