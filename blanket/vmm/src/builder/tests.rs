use std::path::Path;

use proptest::prelude::*;

use super::check::{check, check_grows};
use super::*;
use crate::kernel::{Error as KernelError, Kernel};
use crate::testing::{Synthetic, bzimage};
use vm_memory::GuestMemoryBackend as _;

const MIB: u64 = 1 << 20;

fn config(memory: u64, cmdline: &str) -> Config {
    Config {
        memory,
        max_memory: 0,
        cmdline: cmdline.to_owned(),
        verbose: false,
        vcpus: 1,
        mergeable: false,
        inject: false,
    }
}

fn built(kernel: &Kernel, initrd: &[u8], memory: u64, cmdline: &str) -> Domain {
    let domain = build(kernel, Some(initrd), &config(memory, cmdline)).expect("it fits");
    check(&domain, kernel, initrd, memory, cmdline);
    domain
}

#[test]
fn mergeable_memory_is_private_and_advised() {
    let kernel = test_kernel();
    let config = Config {
        vcpus: 1,
        mergeable: true,
        ..config(128 * MIB, "quiet")
    };
    let domain = match build(&kernel, Some(b"initrd"), &config) {
        Ok(domain) => domain,
        // This machine's kernel has no KSM: then there is a word about it.
        Err(error @ Error::NotMergeable(_)) => {
            assert!(error.to_string().contains("KSM"));
            return;
        }
        Err(error) => panic!("{error}"),
    };
    check(&domain, &kernel, b"initrd", 128 * MIB, "quiet");
    let region = domain.memory.iter().next().expect("a region");
    let start = format!("{:x}-", region.as_ptr() as usize);
    let maps = std::fs::read_to_string("/proc/self/smaps").expect("smaps");
    let (_, mine) = maps.split_once(&start).expect("the mapping");
    let (_, flags) = mine.split_once("VmFlags:").expect("its flags");
    let flags = flags.lines().next().unwrap_or_default();
    assert!(flags.split(' ').any(|flag| flag == "mg"), "{flags}");
    assert!(!flags.split(' ').any(|flag| flag == "sh"), "{flags}");
}

/// The kernel of `BLANKET_TEST_KERNEL`, or one made here.
fn test_kernel() -> Kernel {
    match std::env::var_os("BLANKET_TEST_KERNEL") {
        Some(path) => Kernel::load(Path::new(&path)).unwrap_or_else(|e: KernelError| panic!("{e}")),
        None => Kernel::parse(bzimage(&Synthetic::default().elf())).expect("a kernel"),
    }
}

#[test]
fn a_kernel_as_debian_ships_it() {
    let kernel = test_kernel();
    let initrd = b"0123456789!".repeat(300_000);
    for memory in [128, 256, 512] {
        built(&kernel, &initrd, memory * MIB, "console=hvc0 panic=-1");
    }
    built(&kernel, &[], 128 * MIB, "");
}

#[test]
fn an_older_kernel_gets_its_hypercall_page() {
    let kernel = Synthetic {
        hypercall_page: true,
        ..Synthetic::default()
    }
    .kernel();
    let domain = built(&kernel, b"initrd", 64 * MIB, "");
    let layout = plan(&kernel, Some(b"initrd"), &config(64 * MIB, "")).expect("it fits");
    let page = layout.hypercall_page.expect("asked for");
    let mut stub = [0; 5];
    domain
        .memory
        .read_slice(&mut stub, GuestAddress(page.base() + 17 * 32 + 3))
        .expect("inside");
    assert_eq!(stub, [0xb8, 17, 0, 0, 0]);
}

#[test]
fn a_kernel_that_wants_everything_mapped() {
    let kernel = Synthetic {
        mod_start_pfn: false,
        init_p2m: None,
        ..Synthetic::default()
    }
    .kernel();
    built(&kernel, &[7; 9000], 64 * MIB, "quiet");
}

#[test]
fn large_memory_needs_more_p2m_tables() {
    let kernel = Synthetic::default().kernel();
    // 2 GiB: 1024 frames of list, so two L1 tables.
    built(&kernel, &[], 2048 * MIB, "");
}

#[test]
fn too_little_memory_says_how_much_is_needed() {
    let kernel = Synthetic::default().kernel();
    let initrd = vec![1; 40 << 20];
    let Err(Error::TooLittleMemory { needed, .. }) =
        build(&kernel, Some(&initrd), &config(64 * MIB, ""))
    else {
        panic!("64 MiB cannot hold it");
    };
    let text = build(&kernel, Some(&initrd), &config(64 * MIB, ""))
        .expect_err("same")
        .to_string();
    assert!(
        text.contains("64 MiB") && text.contains("initrd of 40 MiB"),
        "{text}"
    );
    // What it says is true: with that much it works.
    built(&kernel, &initrd, needed.next_multiple_of(MIB), "");
}

fn ram(frames: u64) -> Ram {
    Ram {
        start: frames,
        most: frames,
    }
}

#[test]
fn what_may_come_later_lies_above() {
    let kernel = test_kernel();
    let (memory, most) = (128 * MIB, 1024 * MIB);
    let grows = Config {
        max_memory: most,
        ..config(memory, "quiet")
    };
    let domain = build(&kernel, Some(b"initrd"), &grows).expect("it fits");
    check_grows(&domain, &kernel, b"initrd", memory, most, "quiet");
    // Numbers for seven sections that the guest may add.
    assert_eq!(domain.boot.shared_info * PAGE_SIZE, most + 896 * MIB);
    // Beside that, and the numbers in start info, it is the domain without.
    let layout = |config| plan(&kernel, Some(b"initrd"), &config).expect("it fits");
    let (with, without) = (layout(grows), layout(config(memory, "quiet")));
    assert_eq!(with.p2m, without.p2m);
    assert_eq!(with.tables, without.tables);
}

#[test]
fn records_of_what_may_come_later_must_fit_too() {
    let kernel = Synthetic::default().kernel();
    let needs = |most| match Layout::plan(&kernel, 0, Ram { start: 1, most }) {
        Err(Error::TooLittleMemory { needed, .. }) => needed,
        other => panic!("one frame is enough? {other:?}"),
    };
    // As much as Linux uses of it: ten times what it starts with.
    let (none, vast) = (needs(1), needs(1 << 20));
    let more = vast - none;
    assert!(
        (none / 8..none / 4).contains(&more),
        "{none:#x}, {more:#x} more"
    );
    let fits = |bytes| {
        let ram = Ram {
            start: bytes / PAGE_SIZE,
            most: 1 << 20,
        };
        Layout::plan(&kernel, 0, ram).is_ok()
    };
    assert!(fits(vast));
    assert!(!fits(none));
}

/// Also where the list of frames of the larger memory takes another page.
#[test]
fn what_is_said_to_be_needed_is_enough_and_not_too_much() {
    let kernel = Synthetic::default().kernel();
    for pages in 0..1200 {
        let initrd = pages * PAGE_SIZE;
        let Err(Error::TooLittleMemory { needed, .. }) = Layout::plan(&kernel, initrd, ram(1))
        else {
            panic!("one frame cannot hold it");
        };
        let frames = needed / PAGE_SIZE;
        assert!(
            Layout::plan(&kernel, initrd, ram(frames)).is_ok(),
            "{pages} pages of initrd"
        );
        assert!(
            Layout::plan(&kernel, initrd, ram(frames - 2)).is_err(),
            "{pages} pages of initrd"
        );
    }
}

#[test]
fn bad_requests_are_refused_with_the_reason() {
    let kernel = Synthetic::default().kernel();
    let text = |config: Config| {
        build(&kernel, None, &config)
            .expect_err("refused")
            .to_string()
    };
    assert!(text(config(0, "")).contains("memory size"));
    assert!(text(config(MIB + 1, "")).contains("multiple of 4096"));
    assert!(text(config(64 * MIB, &"x".repeat(1024))).contains("1024 bytes"));
    assert!(text(config(64 * MIB, "a\0b")).contains("NUL"));
    assert!(text(config(1 << 40, "")).contains("too much"));
    let most = |max_memory| Config {
        max_memory,
        ..config(64 * MIB, "")
    };
    assert!(text(most(64 * MIB + 1)).contains("multiple of 4096"));
    assert!(text(most(1 << 40)).contains("too much"));
}

#[test]
fn impossible_notes_are_refused() {
    for (kernel, word) in [
        (
            Synthetic {
                entry: 0xffff_ffff_9000_0000,
                ..Synthetic::default()
            },
            "entry",
        ),
        (
            Synthetic {
                virt_base: 0x1000,
                ..Synthetic::default()
            },
            "VIRT_BASE",
        ),
        (
            Synthetic {
                virt_base: 0xffff_8000_0000_0000,
                ..Synthetic::default()
            },
            "VIRT_BASE",
        ),
        (
            Synthetic {
                init_p2m: Some(0xffff_8000_0000_0000),
                ..Synthetic::default()
            },
            "INIT_P2M",
        ),
        (
            Synthetic {
                init_p2m: Some(0x80_0000_0008),
                ..Synthetic::default()
            },
            "INIT_P2M",
        ),
        (
            Synthetic {
                init_p2m: Some(0xffff_ff80_0000_0000),
                ..Synthetic::default()
            },
            "INIT_P2M",
        ),
    ] {
        let kernel = kernel.kernel();
        let error = build(&kernel, None, &config(64 * MIB, ""))
            .expect_err("refused")
            .to_string();
        assert!(error.contains(word), "{error}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn every_promise_holds_for_any_size(
        pages in 4096u64..65536,
        initrd in 0usize..(6 << 20),
        image in 1u64..(20 << 20),
        mapped in any::<bool>(),
        hypercall_page in any::<bool>(),
        cmdline in "[ -~]{0,200}",
    ) {
        let kernel = Synthetic {
            bss: image,
            mod_start_pfn: !mapped,
            init_p2m: (!mapped).then_some(0x80_0000_0000),
            hypercall_page,
            ..Synthetic::default()
        }
        .kernel();
        let mut bytes = b"not a multiple of a page ".repeat(initrd / 25 + 1);
bytes.truncate(initrd);
let initrd = bytes;
        let memory = pages * PAGE_SIZE;
        match build(&kernel, Some(&initrd), &config(memory, &cmdline)) {
            Ok(domain) => check(&domain, &kernel, &initrd, memory, &cmdline),
            Err(Error::TooLittleMemory { needed, .. }) => {
                prop_assert!(needed > memory);
                let domain = build(&kernel, Some(&initrd), &config(needed, &cmdline));
                check(&domain.expect("enough now"), &kernel, &initrd, needed, &cmdline);
            }
            Err(other) => prop_assert!(false, "{other}"),
        }
    }
}
