use std::io::Read as _;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;

use blanket_abi::xen::hypercall::sched;
use blanket_abi::xen::io::{console as console_page, xenstore as store_page};
use blanket_xenstore::wire::{HEADER, Header, Kind};
use vm_memory::{Bytes as _, GuestAddress};

use super::*;
use crate::builder::Layout;
use crate::hypervisor::{Crash, CrashKind, Exit};
use crate::ring::{Place, Ring};
use crate::testing::{Fake, Guest, Program, Synthetic, bzimage};

fn kernel_file() -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(file.path(), bzimage(&Synthetic::default().elf())).expect("written");
    file
}

fn spec(kernel: &std::path::Path) -> Spec {
    Spec {
        name: "test".into(),
        kernel: Some(kernel.to_owned()),
        memory: 64 << 20,
        ..Spec::default()
    }
}

fn run(
    programs: impl Fn(u32, u32) -> Program + Send + Sync + 'static,
    vcpus: u32,
) -> (Arc<Instance>, End) {
    let kernel = kernel_file();
    let console = Console::new().expect("a console");
    let spec = Spec {
        vcpus,
        ..spec(kernel.path())
    };
    let instance = Instance::new(spec, Fake::new(programs), console).expect("an instance");
    let vm = instance.boot().expect("boots");
    let end = instance.run(vm).expect("no failure");
    (instance, end)
}

/// The guest's end of its rings.
struct Rings {
    console_out: Ring,
    console_in: Ring,
    requests: Ring,
    replies: Ring,
}

impl Rings {
    fn new(guest: &Guest) -> Self {
        // Where the builder puts them: behind start_info.
        let start_info = guest.boot.start_info - 0xffff_ffff_8000_0000;
        let store = blanket_abi::Gfn::containing(start_info + 4096);
        let console = blanket_abi::Gfn::containing(start_info + 8192);
        let ring = |frame, data, size, producer, consumer| {
            Ring::new(
                Arc::clone(&guest.memory),
                frame,
                Place {
                    data,
                    size,
                    producer,
                    consumer,
                },
                0,
            )
        };
        use console_page as c;
        use store_page as s;
        Self {
            console_out: ring(console, c::OUT, c::OUT_SIZE, c::OUT_PROD, c::OUT_CONS),
            console_in: ring(console, c::IN, c::IN_SIZE, c::IN_PROD, c::IN_CONS),
            requests: ring(store, s::REQ, s::RING_SIZE, s::REQ_PROD, s::REQ_CONS),
            replies: ring(store, s::RSP, s::RING_SIZE, s::RSP_PROD, s::RSP_CONS),
        }
    }
}

#[test]
fn a_guest_that_prints_and_powers_off() {
    let (instance, end) = run(
        |_, _| {
            let mut step = 0;
            Box::new(move |guest| {
                step += 1;
                Ok(match step {
                    1 => Exit::Console(b"early\r\n".to_vec()),
                    2 => {
                        Rings::new(guest)
                            .console_out
                            .produce(b"late\r\n")
                            .expect("room");
                        Exit::Send(CONSOLE_PORT)
                    }
                    3 => Exit::Send(77),
                    4 => Exit::Interrupted,
                    _ => Exit::Shutdown(0),
                })
            })
        },
        1,
    );
    assert!(matches!(end, End::Poweroff), "{end:?}");
    assert_eq!(instance.console().history(), b"early\r\nlate\r\n");
    assert_eq!(
        instance.stats().expect("fake").expect("kept").vm.guest_ns,
        5
    );
    assert!(matches!(
        instance.stop(Duration::ZERO),
        Err(StopError::Ended)
    ));
}

#[test]
fn output_of_the_last_moment_is_not_lost() {
    let (instance, _) = run(
        |_, _| {
            Box::new(|guest| {
                Rings::new(guest)
                    .console_out
                    .produce(b"unsignalled")
                    .expect("room");
                Ok(Exit::Shutdown(0))
            })
        },
        1,
    );
    assert_eq!(instance.console().history(), b"unsignalled");
}

#[test]
fn reboots_start_again_and_all_ends_are_told_apart() {
    let (instance, end) = run(
        |boot, _| Box::new(move |_| Ok(Exit::Shutdown(if boot < 2 { 1 } else { 3 }))),
        1,
    );
    assert!(matches!(end, End::Panic), "{end:?}");
    assert_eq!(instance.boots(), 3);

    let (_, end) = run(|_, _| Box::new(|_| Ok(Exit::Shutdown(4))), 1);
    assert!(matches!(end, End::Watchdog), "{end:?}");
    let (_, end) = run(|_, _| Box::new(|_| Ok(Exit::Shutdown(2))), 1);
    assert!(matches!(end, End::Unsupported(2)), "{end:?}");
    let crash = Crash {
        kind: CrashKind::Guest,
        report: "bad frame".into(),
    };
    let (_, end) = run(
        move |_, _| {
            let crash = crash.clone();
            Box::new(move |_| Ok(Exit::Crash(crash.clone())))
        },
        1,
    );
    assert!(
        matches!(
            end,
            End::Crash(Crash {
                kind: CrashKind::Guest,
                ..
            })
        ),
        "{end:?}"
    );
    let (_, end) = run(
        |_, _| {
            Box::new(|_| {
                Err(device::Error::UnknownExit {
                    vcpu: 0,
                    reason: 99,
                })
            })
        },
        1,
    );
    let End::Failed(failure) = end else {
        panic!("{end:?}")
    };
    assert!(failure.to_string().contains("99"));
}

#[test]
fn one_vcpu_ends_all_of_them() {
    let (_, end) = run(
        |_, id| {
            Box::new(move |guest| {
                if id == 3 {
                    return Ok(Exit::Shutdown(0));
                }
                while guest.wait().is_some() {}
                Ok(Exit::Interrupted)
            })
        },
        4,
    );
    assert!(matches!(end, End::Poweroff), "{end:?}");
}

#[test]
fn the_report_of_a_crash_wins_over_those_who_only_see_the_vm_dead() {
    let (_, end) = run(
        |_, id| {
            Box::new(move |guest| {
                if id > 0 {
                    // Tells vCPU 0 to go on, so that death is seen first.
                    let raised = guest.memory.store(1u8, GuestAddress(0), Ordering::SeqCst);
                    raised.expect("inside");
                    return Ok(Exit::Dead);
                }
                while guest
                    .memory
                    .load::<u8>(GuestAddress(0), Ordering::SeqCst)
                    .expect("inside")
                    == 0
                {
                    std::thread::yield_now();
                }
                let report = "why".to_owned();
                Ok(Exit::Crash(Crash {
                    kind: CrashKind::Core,
                    report,
                }))
            })
        },
        3,
    );
    assert!(
        matches!(
            end,
            End::Crash(Crash {
                kind: CrashKind::Core,
                ..
            })
        ),
        "{end:?}"
    );
}

#[test]
fn a_panicking_thread_ends_the_vm_and_is_named() {
    let (_, end) = run(
        |_, id| {
            Box::new(move |guest| {
                assert!(id != 1, "on purpose");
                guest.wait();
                Ok(Exit::Interrupted)
            })
        },
        2,
    );
    assert!(
        matches!(end, End::Failed(vm::Failure::Panicked(1))),
        "{end:?}"
    );
}

#[test]
fn a_restart_is_not_made_when_the_user_wants_none() {
    let kernel = kernel_file();
    let spec = Spec {
        on_reboot: OnReboot::Exit,
        ..spec(kernel.path())
    };
    let fake = Fake::new(|_, _| Box::new(|_: &Guest| Ok(Exit::Shutdown(1))) as Program);
    let instance = Instance::new(spec, fake, Console::new().expect("console")).expect("instance");
    let vm = instance.boot().expect("boots");
    assert!(matches!(instance.run(vm), Ok(End::Reboot)));
    assert_eq!(instance.boots(), 1);
}

#[test]
fn a_lesser_cpu_is_kept_over_reboots_and_another_host_s_is_taken_on() {
    let all =
        |binds| move |only: Option<&Names>| Profile::new(0xe7, binds, only, |_, _| [u32::MAX; 4]);
    let kernel = kernel_file();
    let made = |cpu: &str, binds| {
        let fake = Fake::new(|boot, _| {
            let end = if boot < 1 { 1 } else { 0 };
            Box::new(move |_: &Guest| Ok(Exit::Shutdown(end))) as Program
        });
        let fake = fake.with_cpu(Box::new(all(binds)));
        let spec = Spec {
            cpu: cpu.parse().expect("a CPU"),
            ..spec(kernel.path())
        };
        let console = Console::new().expect("console");
        (Arc::clone(&fake), Instance::new(spec, fake, console))
    };
    let (fake, instance) = made("host,-avx", false);
    let instance = instance.expect("AVX can be hidden by any host");
    let vm = instance.boot().expect("boots");
    assert!(matches!(instance.run(vm), Ok(End::Poweroff)));
    let given = fake.given();
    assert_eq!(given.len(), 2, "it has rebooted");
    for cpu in &given {
        assert_eq!(cpu.xcr0_mask, 3);
        assert!(!cpu.cpu.features.contains("avx2") && cpu.cpu.features.contains("aes"));
    }

    let (_, refused) = made("host,-aes", false);
    let why = refused.err().expect("programs would find it").to_string();
    assert!(why.contains("aes cannot be taken away here"), "{why}");

    // What a VM had elsewhere counts, and not what its process was started with.
    let (fake, instance) = made("host", true);
    let instance = instance.expect("an instance");
    instance.has_only(Some(given[0].cpu.features.clone()));
    let vm = instance.boot().expect("boots");
    assert!(matches!(instance.run(vm), Ok(End::Poweroff)));
    let here = fake.given();
    assert!(here.iter().all(|cpu| cpu.cpu == given[0].cpu));
}

/// A guest that watches `control/shutdown` as Linux does and ends itself when told.
fn obedient(reason: u64) -> Program {
    let mut rings = None;
    let mut started = false;
    let mut stream = Vec::new();
    let mut outbox: Vec<u8> = Vec::new();
    Box::new(move |guest| {
        let rings = rings.get_or_insert_with(|| Rings::new(guest));
        if !started {
            started = true;
            let message = |kind: Kind, payload: &[u8]| {
                let length = payload.len() as u32;
                let header = Header {
                    kind: kind as u32,
                    request: 1,
                    transaction: 0,
                    length,
                };
                [&header.encode()[..], payload].concat()
            };
            let watch = message(Kind::Watch, b"control/shutdown\0t\0");
            outbox.extend(message(Kind::Write, b"control/feature-poweroff\x001"));
            outbox.extend(&watch[HEADER..]);
            // The header first, alone, as Linux does.
            rings.requests.produce(&watch[..HEADER]).expect("room");
            let (write, rest) = outbox.split_at(outbox.len() - (watch.len() - HEADER));
            let (write, rest) = (write.to_vec(), rest.to_vec());
            outbox = [rest, write].concat();
            return Ok(Exit::Send(STORE_PORT));
        }
        if !outbox.is_empty() {
            let sent = rings.requests.produce(&outbox).expect("room");
            outbox.drain(..sent);
            return Ok(Exit::Send(STORE_PORT));
        }
        loop {
            stream.extend(rings.replies.consume(1024).expect("sane"));
            let Some((head, tail)) = stream.split_first_chunk::<HEADER>() else {
                if guest.wait().is_none() {
                    return Ok(Exit::Interrupted);
                }
                continue;
            };
            let header = Header::decode(*head);
            let payload = tail[..header.length as usize].to_vec();
            stream.drain(..HEADER + payload.len());
            assert_ne!(header.kind, Kind::Error as u32, "{payload:?}");
            if header.kind == Kind::WatchEvent as u32 {
                assert_eq!(payload, b"control/shutdown\0t\0");
                let read = b"control/shutdown\0";
                let length = read.len() as u32;
                let header = Header {
                    kind: 2,
                    request: 2,
                    transaction: 0,
                    length,
                };
                rings
                    .requests
                    .produce(&[&header.encode()[..], read].concat())
                    .expect("room");
                return Ok(Exit::Send(STORE_PORT));
            }
            if header.kind == Kind::Read as u32 && payload == b"poweroff" {
                return Ok(Exit::Shutdown(reason));
            }
        }
    })
}

#[test]
fn a_guest_is_stopped_through_its_xenstore() {
    let kernel = kernel_file();
    let console = Console::new().expect("a console");
    let instance = Instance::new(
        spec(kernel.path()),
        Fake::new(|_, _| obedient(sched::SHUTDOWN_POWEROFF)),
        console,
    )
    .expect("new");
    let vm = instance.boot().expect("boots");
    let stopper = {
        let instance = Arc::clone(&instance);
        std::thread::spawn(move || instance.stop(Duration::from_secs(20)))
    };
    assert!(matches!(instance.run(vm), Ok(End::Poweroff)));
    stopper.join().expect("no panic").expect("stopped");
}

#[test]
fn a_guest_that_reboots_when_it_is_to_stop_has_stopped() {
    let kernel = kernel_file();
    let fake = Fake::new(|_, _| obedient(sched::SHUTDOWN_REBOOT));
    let instance =
        Instance::new(spec(kernel.path()), fake, Console::new().expect("console")).expect("new");
    let vm = instance.boot().expect("boots");
    let stopper = {
        let instance = Arc::clone(&instance);
        std::thread::spawn(move || instance.stop(Duration::from_secs(20)))
    };
    assert!(matches!(instance.run(vm), Ok(End::Reboot)));
    stopper.join().expect("no panic").expect("stopped");
    assert_eq!(instance.boots(), 1);
}

#[test]
fn a_deaf_guest_is_reported_and_killed() {
    let kernel = kernel_file();
    let fake = Fake::new(|_, _| {
        Box::new(|guest: &Guest| {
            while guest.wait().is_some() {}
            Ok(Exit::Interrupted)
        }) as Program
    });
    let instance =
        Instance::new(spec(kernel.path()), fake, Console::new().expect("console")).expect("new");
    let vm = instance.boot().expect("boots");
    let killer = {
        let instance = Arc::clone(&instance);
        std::thread::spawn(move || {
            let stop = instance.stop(Duration::from_millis(50));
            instance.kill();
            stop
        })
    };
    assert!(matches!(instance.run(vm), Ok(End::Killed)));
    let error = killer.join().expect("no panic").expect_err("deaf");
    assert!(
        matches!(
            error,
            StopError::Timeout {
                listening: false,
                ..
            }
        ),
        "{error}"
    );
    // A kill that comes between two boots is not forgotten.
    let vm = instance.boot().expect("boots");
    assert!(matches!(instance.run(vm), Ok(End::Killed)));
}

/// A vCPU that asks the store, reads its answers and asks again for as long as it may,
/// and one that only notifies: the store is never without work.
fn insatiable(vcpu: u32) -> Program {
    Box::new(move |guest: &Guest| {
        if vcpu == 0 {
            return Ok(Exit::Send(STORE_PORT));
        }
        let mut rings = Rings::new(guest);
        let request = Header {
            kind: Kind::Directory as u32,
            request: 1,
            transaction: 0,
            length: 2,
        };
        let mut message = request.encode().to_vec();
        message.extend(b"/\0");
        let mut rest: Vec<u8> = Vec::new();
        while !guest.stops() {
            if rest.is_empty() {
                rest = message.repeat(40);
            }
            let sent = rings.requests.produce(&rest).expect("sane indices");
            rest.drain(..sent);
            rings.replies.consume(1024).expect("sane indices");
        }
        Ok(Exit::Interrupted)
    })
}

#[test]
fn a_guest_that_never_lets_the_store_rest_keeps_nobody_from_it() {
    let kernel = kernel_file();
    let spec = Spec {
        vcpus: 2,
        ..spec(kernel.path())
    };
    let fake = Fake::new(|_, vcpu| insatiable(vcpu));
    let instance = Instance::new(spec, fake, Console::new().expect("console")).expect("new");
    let vm = instance.boot().expect("boots");
    let (tell, told) = std::sync::mpsc::channel();
    let stopper = {
        let instance = Arc::clone(&instance);
        std::thread::spawn(move || {
            for _ in 0..20 {
                let stop = instance.stop(Duration::from_millis(20));
                assert!(matches!(stop, Err(StopError::Timeout { .. })));
            }
            tell.send(()).expect("somebody waits");
        })
    };
    let killer = {
        let instance = Arc::clone(&instance);
        std::thread::spawn(move || {
            let answered = told.recv_timeout(Duration::from_secs(60));
            instance.kill();
            answered
        })
    };
    assert!(matches!(instance.run(vm), Ok(End::Killed)));
    let answered = killer.join().expect("no panic");
    assert!(answered.is_ok(), "the store does not answer the host");
    stopper.join().expect("no panic");
}

#[test]
fn typing_reaches_the_guest_and_a_client_sees_the_answer() {
    let kernel = kernel_file();
    let console = Console::new().expect("a console");
    let io = crate::console::IoThread::start(
        Arc::clone(&console),
        &crate::console::Sink::None,
        Box::new(|| {}),
    )
    .expect("a thread");
    // An echo that ends at 'q', with more text than the rings hold.
    let fake = Fake::new(|_, _| {
        let mut rings = None;
        let mut answer: Vec<u8> = b"ready ".to_vec();
        let mut last = false;
        Box::new(move |guest: &Guest| {
            let rings = rings.get_or_insert_with(|| Rings::new(guest));
            loop {
                if !answer.is_empty() {
                    let sent = rings.console_out.produce(&answer).expect("sane");
                    answer.drain(..sent);
                    if sent > 0 {
                        return Ok(Exit::Send(CONSOLE_PORT));
                    }
                } else if last {
                    return Ok(Exit::Shutdown(0));
                }
                let typed = rings.console_in.consume(4096).expect("sane");
                last |= typed.contains(&b'q');
                answer.extend(&typed);
                if !typed.is_empty() {
                    return Ok(Exit::Send(CONSOLE_PORT));
                }
                if guest.wait().is_none() {
                    return Ok(Exit::Interrupted);
                }
            }
        }) as Program
    });
    let instance = Instance::new(spec(kernel.path()), fake, Arc::clone(&console)).expect("new");
    let vm = instance.boot().expect("boots");
    let (ours, theirs) = UnixStream::pair().expect("a pair");
    console.attach(theirs.into());
    let mut writer = ours.try_clone().expect("a clone");
    let text: Vec<u8> = (0..40_000u32).map(|n| b'a' + (n % 16) as u8).collect();
    let sent = [&text[..], b"q"].concat();
    let typist = std::thread::spawn(move || {
        std::io::Write::write_all(&mut writer, &sent).expect("taken");
    });
    let reader = std::thread::spawn(move || {
        let mut seen = Vec::new();
        let mut ours = ours;
        ours.read_to_end(&mut seen).expect("read");
        seen
    });
    assert!(matches!(instance.run(vm), Ok(End::Poweroff)));
    typist.join().expect("no panic");
    io.finish();
    let seen = reader.join().expect("no panic");
    assert_eq!(seen.len(), text.len() + 7);
    assert_eq!(seen, [b"ready ", &text[..], b"q"].concat());
}

#[test]
fn errors_name_the_file() {
    let kernel = kernel_file();
    let fake = || Fake::new(|_, _| obedient(sched::SHUTDOWN_POWEROFF));
    let fails = |spec: Spec| {
        let instance = Instance::new(spec, fake(), Console::new().expect("console")).expect("new");
        instance.boot().err().expect("refused").to_string()
    };
    let missing = Spec {
        kernel: Some("/no/kernel".into()),
        ..spec(kernel.path())
    };
    assert!(fails(missing).contains("/no/kernel"));
    let missing = Spec {
        initrd: Some("/no/initrd".into()),
        ..spec(kernel.path())
    };
    assert!(fails(missing).contains("/no/initrd"));
    let empty = Spec {
        initrd: Some("/dev/null".into()),
        ..spec(kernel.path())
    };
    assert!(fails(empty).contains("empty"));
    let little = Spec {
        memory: 1 << 20,
        ..spec(kernel.path())
    };
    assert!(fails(little).contains("too little"));
    let shrinks = Spec {
        max_memory: Some(32 << 20),
        ..spec(kernel.path())
    };
    let console = Console::new().expect("a console");
    let Err(error) = Instance::new(shrinks, fake(), console) else {
        panic!("it starts with more than it can have")
    };
    let text = error.to_string();
    assert!(text.contains("64 MiB") && text.contains("32 MiB"), "{text}");
    let vast = Spec {
        max_memory: Some(1 << 40),
        ..spec(kernel.path())
    };
    let text = fails(vast);
    assert!(
        text.contains("1048576 MiB of memory are too much"),
        "{text}"
    );
}

#[test]
fn the_layout_is_what_the_rings_of_this_test_assume() {
    let kernel = Synthetic::default().kernel();
    let config = builder::Config {
        memory: 64 << 20,
        vcpus: 1,
        max_memory: 0,
        cmdline: String::new(),
        verbose: false,
        mergeable: false,
        inject: false,
    };
    let Layout {
        start_info,
        store,
        console,
        ..
    } = builder::plan(&kernel, None, &config).expect("it fits");
    assert_eq!((store.0, console.0), (start_info.0 + 1, start_info.0 + 2));
}

#[test]
fn a_guest_is_asked_for_memory_and_waited_for_over_reboots() {
    let kernel = kernel_file();
    let spec = Spec {
        balloon: Some(48 << 20),
        max_memory: Some(96 << 20),
        ..spec(kernel.path())
    };
    // It gives up what it is told to, and reboots when it may have little.
    let fake = Fake::new(|boot, _| {
        let mut has = 64 << 8;
        Box::new(move |guest: &Guest| {
            let target = guest.target();
            if has != target {
                // One frame of the difference is named.
                let given_up = if has > target {
                    vec![0xff, 0x3f, 0, 0]
                } else {
                    vec![]
                };
                has = target;
                return Ok(Exit::Balloon {
                    given_up,
                    frames: has,
                });
            }
            if boot == 0 && target == 20 << 8 {
                return Ok(Exit::Shutdown(sched::SHUTDOWN_REBOOT));
            }
            Ok(match guest.wait() {
                Some(_) => Exit::Send(STORE_PORT),
                None => Exit::Interrupted,
            })
        }) as Program
    });
    let console = Console::new().expect("a console");
    let instance = Instance::new(spec, fake, console).expect("an instance");
    let wait = Duration::from_secs(60);
    assert!(matches!(
        instance.balloon(32 << 20, wait),
        Err(BalloonError::NotRunning)
    ));
    let vm = instance.boot().expect("boots");
    let node = |path: &str| {
        let store = instance.running_store().expect("it runs");
        String::from_utf8(store.read(path).expect("a node")).expect("text")
    };
    assert_eq!(node("memory/target"), (48 << 10).to_string());
    assert_eq!(node("memory/static-max"), (96 << 10).to_string());
    let generation = instance.generation().to_string();
    assert_eq!(node("platform/generation-id"), generation);
    let runs = Arc::clone(&instance);
    let thread = std::thread::spawn(move || runs.run(vm));
    for mib in [32, 96, 64, 40, 20] {
        let memory = instance.balloon((mib << 20) + 5, wait).expect("asked");
        assert_eq!(
            (memory.most, memory.target, memory.current),
            (96 << 20, mib << 20, mib << 20)
        );
    }
    while instance.boots() < 2 || instance.memory().current != 20 << 20 {
        std::thread::yield_now();
    }
    assert_eq!(instance.memory().target, 20 << 20);
    assert_eq!(node("platform/generation-id"), generation);
    for (wanted, clear) in [
        (
            97 << 20,
            "can have 96 MiB of memory at most, and not 97 MiB",
        ),
        (15 << 20, "less than 16 MiB"),
    ] {
        let error = instance.balloon(wanted, wait).expect_err("refused");
        assert!(error.to_string().contains(clear), "{error}");
    }
    instance.kill();
    assert!(matches!(thread.join(), Ok(Ok(End::Killed))));
}
