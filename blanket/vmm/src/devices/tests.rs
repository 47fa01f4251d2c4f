use std::io::Write as _;

use blanket_disk::{Format, Options};

use super::*;
use crate::console::Console;
use crate::hypervisor::Exit;
use crate::instance::Spec;
use crate::testing::{Fake, Guest, Program, Synthetic};
use crate::vm::End;

/// A VM of a kernel file, or of its first disk.
fn instance(kernel: Option<PathBuf>) -> Arc<Instance> {
    let spec = Spec {
        name: "test".into(),
        kernel,
        memory: 64 << 20,
        ..Spec::default()
    };
    // It reboots once, and then runs until it is killed.
    let fake = Fake::new(|boot, _| {
        Box::new(move |guest: &Guest| {
            if boot == 0 {
                return Ok(Exit::Shutdown(1));
            }
            while guest.wait().is_some() {}
            Ok(Exit::Interrupted)
        }) as Program
    });
    Instance::new(spec, fake, Console::new().expect("a console")).expect("an instance")
}

fn kernel() -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().expect("a file");
    file.write_all(&Synthetic::default().elf())
        .expect("written");
    file
}

/// A raw image of zeroes as disk `index`.
fn disk(index: u32) -> (tempfile::NamedTempFile, AnyDevice) {
    let file = tempfile::NamedTempFile::new().expect("a file");
    file.as_file().set_len(1 << 20).expect("large");
    let options = Options {
        format: Some(Format::Raw),
        ..Options::default()
    };
    let image = blanket_disk::open(file.path(), &options).expect("an image");
    let of = DiskFile {
        path: file.path().to_owned(),
        reader: image.reader(),
        base: None,
    };
    let config = block::Config {
        index,
        ..block::Config::default()
    };
    let vbd = Vbd::new(Arc::new(image), config, 1);
    (file, AnyDevice::Disk(Arc::new(vbd), of))
}

#[test]
fn devices_are_there_after_a_reboot_and_come_and_go_between() {
    let kernel = kernel();
    let vm = instance(Some(kernel.path().to_owned()));
    let (_a, first) = disk(0);
    vm.attach(first.clone()).expect("attached before it runs");
    assert!(matches!(
        vm.attach(first),
        Err(Error::Bus(bus::Error::Exists { .. }))
    ));
    let number = block::device_number(0);
    assert_eq!(vm.device_report(block::CLASS, number), None, "not running");
    let running = vm.boot().expect("boots");
    let thread = {
        let vm = Arc::clone(&vm);
        std::thread::spawn(move || vm.run(running).expect("no failure"))
    };
    while vm.boots() < 2 || vm.device_report(block::CLASS, number).is_none() {
        std::thread::yield_now();
    }
    let (_b, second) = disk(1);
    vm.attach(second).expect("attached while it runs");
    assert_eq!(vm.disks().len(), 2);
    // No driver has taken it: it goes at once.
    let second = block::device_number(1);
    vm.detach(block::CLASS, second, Duration::from_secs(20))
        .expect("gone");
    let again = vm.detach(block::CLASS, second, Duration::ZERO);
    assert!(matches!(again, Err(Error::Bus(bus::Error::Missing { .. }))));
    vm.resize(number, 2 << 20).expect("larger");
    assert_eq!(vm.disks()[0].0.disk().size(), 2 << 20);
    assert!(vm.resize(number, 512).is_err(), "no data is cut off");
    vm.kill();
    assert!(matches!(thread.join().expect("no panic"), End::Killed));
    assert_eq!(vm.device_report(block::CLASS, number), None);
}

/// A guest that holds on to a disk has it until it lets go, and not again after its reboot.
#[test]
fn a_disk_that_the_guest_lets_go_of_late_is_gone_then() {
    let kernel = kernel();
    let vm = instance(Some(kernel.path().to_owned()));
    let (_file, held) = disk(0);
    vm.attach(held).expect("attached");
    let running = vm.boot().expect("boots");
    let thread = {
        let vm = Arc::clone(&vm);
        std::thread::spawn(move || vm.run(running).expect("no failure"))
    };
    let number = block::device_number(0);
    while vm.boots() < 2 || vm.device_report(block::CLASS, number).is_none() {
        std::thread::yield_now();
    }
    let state = |state: &str| {
        let node = format!("device/{}/{number}/state", block::CLASS);
        let store = vm.running_store().expect("it runs");
        store.write(&node, state.as_bytes()).expect("written");
    };
    // As a driver that is at work, though nothing that it says is right.
    state("3");
    while vm
        .device_report(block::CLASS, number)
        .is_none_or(|r| r.fault.is_none())
    {
        std::thread::yield_now();
    }
    let busy = vm.detach(block::CLASS, number, Duration::from_millis(20));
    assert!(
        matches!(busy, Err(Error::Bus(bus::Error::Busy { .. }))),
        "{busy:?}"
    );
    assert_eq!(vm.disks().len(), 1, "it is still there");
    state("6");
    while !vm.disks().is_empty() {
        std::thread::yield_now();
    }
    vm.kill();
    assert!(matches!(thread.join().expect("no panic"), End::Killed));
}

#[test]
fn what_cannot_be_booted_is_said() {
    let vm = instance(None);
    let text = |vm: &Instance| vm.boot().err().expect("nothing to boot").to_string();
    assert!(text(&vm).contains("--kernel"), "{}", text(&vm));
    let (file, empty) = disk(0);
    vm.attach(empty).expect("attached");
    let said = text(&vm);
    assert!(said.contains(&file.path().display().to_string()), "{said}");
    assert!(said.contains("no file system"), "{said}");
}
