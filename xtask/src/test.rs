//! `test`: style, unit tests, the ABI check, then whole systems in the lab.

mod steps;

use std::collections::VecDeque;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::build;
use crate::cases::{self, Adapter, Case, Expect, Guest, Work};
use crate::debian;
use crate::everywhere;
use crate::guestware;
use crate::initramfs::{self, Files};
use crate::kernels;
use crate::lab::{Payload, find_command, find_module};
use crate::project::Project;
use crate::qemu::{self, End, Machine, Outcome};
use crate::setup::{self, Need};
use crate::system;

use steps::{METAL, STEPS, Step, Tally};

/// Arguments of `test`.
#[derive(clap::Args)]
pub struct Args {
    /// The whole matrix of kernels, CPU models and vCPUs, and the long cases.
    #[arg(long)]
    long: bool,
    /// Only what has this in its name; a full name is that one alone.
    #[arg(long, value_name = "PATTERN")]
    only: Option<String>,
    /// Name what would run, and stop.
    #[arg(long)]
    list: bool,
    /// Instances at a time.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=64))]
    jobs: u32,
    /// Show the output of cases that pass, too.
    #[arg(long)]
    verbose: bool,
}

/// The `test` verb. Its last line is `N passed, N failed`.
pub fn run(project: &Project, args: &Args) -> Result<()> {
    let all = cases::cases();
    let full = args.only.as_ref().is_some_and(|only| {
        STEPS.iter().any(|step| step.name == only) || all.iter().any(|case| case.name == *only)
    });
    let wanted = |name: &str| {
        args.only.as_ref().is_none_or(|only| {
            if full {
                name == only
            } else {
                name.contains(only.as_str())
            }
        })
    };
    let steps: Vec<&Step> = STEPS
        .iter()
        .filter(|step| args.long || !step.long || args.only.as_deref() == Some(step.name))
        .filter(|step| wanted(step.name))
        .collect();
    let cases: Vec<Case> = all
        .into_iter()
        // A case that is asked for by its full name runs, long or not.
        .filter(|case| args.long || !case.long || args.only.as_ref() == Some(&case.name))
        .filter(|case| wanted(&case.name))
        .collect();
    ensure!(
        !steps.is_empty() || !cases.is_empty(),
        "no test has that in its name; see --list"
    );
    if args.list {
        for step in steps {
            println!("{}", step.name);
        }
        for case in cases {
            println!("{}", case.name);
        }
        return Ok(());
    }
    setup::ensure(project, &[Need::Build, Need::Boot, Need::Images])?;
    let mut total = Tally::default();
    let (machines, alone): (Vec<&Step>, Vec<&Step>) = steps
        .into_iter()
        .partition(|step| step.name.starts_with(METAL));
    for step in alone {
        total.add(step.done(project));
    }
    let (machines, sum) = (Mutex::new(machines.into_iter()), Mutex::new(total));
    thread::scope(|scope| {
        for _ in 0..args.jobs.max(1) {
            scope.spawn(|| {
                let next = || machines.lock().expect("a step panicked").next();
                while let Some(step) = next() {
                    let tally = step.done(project);
                    sum.lock().expect("a step panicked").add(tally);
                }
            });
        }
    });
    let mut total = sum.into_inner().expect("a step panicked");
    if !cases.is_empty() {
        match Bench::prepare(project, &cases) {
            Ok(bench) => {
                total.add(bench.run(&cases, args));
            }
            Err(error) => {
                println!("nothing to boot: {error:#}");
                total.failed += u32::try_from(cases.len())?;
            }
        }
    }
    println!("{} passed, {} failed", total.passed, total.failed);
    if total.failed > 0 {
        bail!("{} checks failed", total.failed);
    }
    Ok(())
}

/// Boots one VM as [`Work::Guest`] does: `guest SCRIPT [blanket run options]`.
const GUEST: &str = r#"#!/bin/sh
# Ends with 0 if the VM ran SCRIPT, its exit code was 0 and it powered off.
script=$1
shift
dir=$(mktemp -d)
lab-initrd "$script" >$dir/initrd
case " $* " in *" --kernel "*) ;; *) set -- --kernel /guest/vmlinuz "$@" ;; esac
case " $* " in *" --memory "*) ;; *) set -- --memory 256M "$@" ;; esac
case " $* " in *" --cmdline "*) ;; *) set -- --cmdline "console=hvc0 panic=-1 oops=panic" "$@" ;; esac
mkfifo $dir/pipe
tee $dir/log <$dir/pipe &
tee=$!
blanket run --on-reboot exit --initrd $dir/initrd "$@" </dev/null >$dir/pipe 2>&1
code=$?
wait $tee
ready=$(grep -c ^GUEST-READY $dir/log)
ended=$(tr -d '\r' <$dir/log | grep -cx 'GUEST-EXIT 0')
rm -r $dir
[ $code = 0 ] || { echo "guest: blanket run ended with $code"; exit 1; }
[ $ready = 1 ] || { echo "guest: the VM did not come up once"; exit 1; }
[ $ended = 1 ] || { echo "guest: the script did not end with 0"; exit 1; }
"#;

/// What all cases share, built once.
struct Bench<'a> {
    project: &'a Project,
    command: PathBuf,
    /// The `supercloud` command, if a case wants it.
    supercloud: Option<PathBuf>,
    /// What tests run in instances only.
    instance_files: Files,
    /// What they run in instances and VMs.
    files: Files,
    /// The same with stress-ng, if a case wants it.
    stressed: Files,
    /// Debian's fio, if a case wants it.
    fio: Files,
    /// Debian's ssh and what goes with it, if a case wants it.
    network_tools: Files,
    /// What compares what goes through networks, if a case wants it.
    net_check: Files,
    /// What makes virtual networks, if a case wants it.
    fabric: Files,
}

impl<'a> Bench<'a> {
    /// Builds and fetches all that `cases` need, so that their times are theirs.
    fn prepare(project: &'a Project, cases: &[Case]) -> Result<Self> {
        let command = find_command(project, false)?.context("the checkout has no command")?;
        let supercloud = if cases.iter().any(|case| case.supercloud) {
            Some(build::supercloud(project)?)
        } else {
            None
        };
        let instance_files = guestware::instance_programs(project)?;
        let mut files = guestware::programs(project)?;
        files.extend(guestware::scripts(project)?);
        let mut stressed = files.clone();
        if cases.iter().any(|case| case.stress_ng) {
            stressed.extend(guestware::stress_ng(project)?);
        }
        let wanted = |wants: fn(&Case) -> bool, files: fn(&Project) -> Result<Files>| {
            if cases.iter().any(wants) {
                files(project)
            } else {
                Ok(Files::new())
            }
        };
        let fio = wanted(|case| case.fio, guestware::fio)?;
        let network_tools = wanted(|case| case.network, guestware::network_tools)?;
        let net_check = wanted(|case| case.net_check, guestware::net_check)?;
        let fabric = wanted(|case| case.fabric, guestware::fabric)?;
        for case in cases {
            // An image that cannot be made fails its own cases only, which say why.
            if let Some(variant) = case.image
                && let Err(error) = debian::image(project, variant)
            {
                eprintln!("images: {error:#}");
            }
            let host = kernels::fetch(project, case.host)?;
            find_module(project, &host, false)?.context("the checkout has no module")?;
            for flavour in guests(case) {
                kernels::fetch(project, flavour)?;
            }
        }
        qemu::accelerator(project)?;
        Ok(Self {
            project,
            command,
            supercloud,
            instance_files,
            files,
            stressed,
            fio,
            network_tools,
            net_check,
            fabric,
        })
    }

    fn run(&self, cases: &[Case], args: &Args) -> Tally {
        let queue: Mutex<VecDeque<&Case>> = Mutex::new(cases.iter().collect());
        let total = Mutex::new(Tally::default());
        std::thread::scope(|scope| {
            for _ in 0..args.jobs {
                scope.spawn(|| {
                    loop {
                        let next = queue.lock().ok().and_then(|mut queue| queue.pop_front());
                        let Some(case) = next else { break };
                        let report = self.report(case, args.verbose);
                        let Ok(mut total) = total.lock() else { break };
                        print!("{}", report.text);
                        if report.passed {
                            total.passed += 1;
                        } else {
                            total.failed += 1;
                        }
                    }
                });
            }
        });
        total
            .into_inner()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn report(&self, case: &Case, verbose: bool) -> Report {
        let first = self.report_once(case, verbose);
        let Some(fault) = &first.emulator_fault else {
            return first;
        };
        // A race between the emulator's own threads says nothing about the case.
        let again = self.report_once(case, verbose);
        let text = format!(
            "{}: the emulator fell over itself, and it was run once more: {fault}\n{}",
            case.name, again.text
        );
        Report { text, ..again }
    }

    fn report_once(&self, case: &Case, verbose: bool) -> Report {
        let start = Instant::now();
        let mut output = Vec::new();
        let result = self.boot(case, &mut output);
        let output = String::from_utf8_lossy(&output).replace('\r', "");
        let mut emulator_fault = None;
        let mut reasons = Vec::new();
        let mut console = String::new();
        match result {
            Err(error) => reasons.push(format!("{error:#}")),
            Ok(outcome) => {
                reasons = judge(case, &outcome, &output);
                if reasons.is_empty() {
                    outcome.discard();
                } else {
                    emulator_fault = outcome.emulator_fault();
                    console = format!(
                        "-- {}\n{}",
                        outcome.console().display(),
                        outcome.console_tail(100)
                    );
                }
            }
        }
        let seconds = start.elapsed().as_secs_f64();
        let passed = reasons.is_empty();
        let mut text = String::new();
        if !passed || verbose {
            text.push_str(&format!("-- output of {}\n{output}\n{console}", case.name));
        }
        for reason in &reasons {
            text.push_str(&format!("{}: {reason}\n", case.name));
        }
        let verdict = if passed { "PASS" } else { "FAIL" };
        text.push_str(&format!("{verdict} {} ({seconds:.1} s)\n", case.name));
        Report {
            passed,
            text,
            emulator_fault,
        }
    }

    /// What QEMU gives the case's instance besides.
    fn options(&self, case: &Case) -> Result<Vec<String>> {
        let mut options = Vec::new();
        if let Some(variant) = case.image {
            options.extend(debian::drive(self.project, variant)?);
        }
        if case.inject.is_some() {
            options.extend(INJECTOR_LINES.map(str::to_owned));
        }
        Ok(options)
    }

    fn boot(&self, case: &Case, output: &mut Vec<u8>) -> Result<Outcome> {
        let project = self.project;
        let kernel = kernels::fetch(project, case.host)?;
        let mut payload = Payload::new(project, &kernel, case.hardware, case.cpu)?;
        payload.more_modules(project, &kernel, case.modules)?;
        if case.adapter == Adapter::Module {
            let built = find_module(project, &kernel, true)?.context("the module is gone")?;
            payload.module(&built);
        } else if let Some(built) = find_module(project, &kernel, true)? {
            payload.archive.copy("root/blanket.ko", 0o644, &built);
        }
        for companion in case.companions {
            payload.more_modules(project, &kernel, companion.hardware.modules())?;
            if qemu::has_svm(companion.cpu) {
                payload.more_modules(project, &kernel, &["kvm_amd"])?;
            }
            payload.archive.text("lab/companion", 0o644, "");
        }
        payload.program(&self.command)?;
        if let (true, Some(program)) = (case.supercloud, &self.supercloud) {
            payload.program(program)?;
        }
        let files = match case {
            Case {
                net_check: true, ..
            } => &self.net_check,
            Case {
                stress_ng: true, ..
            } => &self.stressed,
            _ => &self.files,
        };
        payload.archive.add(files);
        payload.archive.add(&self.instance_files);
        if case.network {
            payload.network_tools(&self.network_tools);
        }
        if case.fabric {
            payload.archive.add(&self.fabric);
        }
        if case.whole_system {
            payload.hand_over(project, &kernel)?;
        }
        payload.archive.text("bin/guest", 0o755, GUEST);
        let mut guest_files = files.clone();
        if case.fio {
            guest_files.extend(self.fio.clone());
        }
        let mut guest = initramfs::guest(project, None, &guest_files)?;
        if !case.drivers.is_empty()
            && let Some(flavour) = guests(case).first()
        {
            let kernel = kernels::fetch(project, *flavour)?;
            guest.modules(project, &kernel, case.drivers)?;
        }
        payload.guest_initrd(&guest)?;
        for flavour in guests(case) {
            payload.guest_kernel(&kernels::fetch(project, flavour)?);
        }
        let adapter = match case.adapter {
            Adapter::Module => "export BLANKET_HOST=module\n",
            Adapter::Kvm => "export BLANKET_HOST=kvm\n",
            Adapter::None => "",
        };
        let isolate = if case.isolate {
            "export BLANKET_ISOLATE=on\n"
        } else {
            ""
        };
        let settings = format!("{adapter}{isolate}");
        match &case.work {
            Work::Guest(guest) => {
                payload.archive.text("root/script", 0o644, guest.script);
                payload.command(&format!("{settings}{}", guest_command(guest)));
            }
            Work::Instance { script, .. } => payload.command(&format!("{settings}{script}")),
        }
        let append = if case.whole_system {
            format!("{} {}", system::APPEND, case.append)
        } else {
            case.append.into()
        };
        let machine = Machine {
            cpu: case.cpu.into(),
            hardware: case.hardware,
            kernel,
            memory: case.memory.into(),
            smp: case.smp,
            icount: case.icount,
            append,
            node: 1,
            group: None,
            companions: u32::try_from(case.companions.len())?,
            extra: self.options(case)?,
        };
        let timeout = Duration::from_secs(case.timeout);
        let Some(event) = case.inject else {
            let mut machines = vec![machine.clone()];
            for (companion, node) in case.companions.iter().zip(2..) {
                machines.push(Machine {
                    cpu: companion.cpu.into(),
                    hardware: companion.hardware,
                    node,
                    ..machine.clone()
                });
            }
            return qemu::run(project, &machines, &payload.archive, timeout, output);
        };
        let dir = qemu::run_dir(project)?;
        let talk = UnixListener::bind(dir.join("script"))?;
        let addresses = everywhere::core_addresses(&build::core_elf(project)?)?;
        std::thread::scope(|scope| {
            let injector = scope.spawn(|| {
                let (script, _) = talk.accept()?;
                everywhere::everywhere(event, case.isolate, &dir, script, addresses)
            });
            let run = qemu::run_in(
                project,
                dir.clone(),
                &[machine],
                &payload.archive,
                timeout,
                output,
            );
            // In case QEMU has never called.
            let _ = UnixStream::connect(dir.join("script"));
            match injector.join() {
                Ok(injected) => injected.and(run),
                Err(_) => bail!("the injector panicked"),
            }
        })
    }
}

/// QEMU's options for [`everywhere::everywhere`]: a debugger's door, and a third serial
/// line that calls it, with an interrupt of its own.
const INJECTOR_LINES: [&str; 6] = [
    "-gdb",
    "unix:gdb,server=on,wait=off",
    "-chardev",
    "socket,id=script,path=script,server=off",
    "-device",
    "isa-serial,chardev=script,index=2,irq=5",
];

struct Report {
    passed: bool,
    text: String,
    /// See [`Outcome::emulator_fault`].
    emulator_fault: Option<String>,
}

fn guests(case: &Case) -> Vec<kernels::Flavour> {
    match &case.work {
        Work::Guest(guest) => vec![guest.kernel],
        Work::Instance { guests, .. } => guests.clone(),
    }
}

fn guest_command(guest: &Guest) -> String {
    format!(
        "guest /root/script --kernel /guest/vmlinuz-{} --cpus {} --memory {} \
         --cmdline 'console=hvc0 panic=-1 oops=panic {}'",
        guest.kernel, guest.vcpus, guest.memory, guest.append
    )
}

/// Why a case failed; empty when it did not.
fn judge(case: &Case, outcome: &Outcome, output: &str) -> Vec<String> {
    let mut reasons = Vec::new();
    let code = case
        .expect
        .iter()
        .find_map(|expect| {
            if let Expect::Exit(code) = expect {
                Some(*code)
            } else {
                None
            }
        })
        .unwrap_or(0);
    match outcome.end {
        End::Exit(got) if got == code => {}
        End::Exit(got) => reasons.push(format!("exit code {got} instead of {code}")),
        End::Died => reasons.push("the instance died".into()),
        End::TimedOut => reasons.push(format!("not done after {} s", case.timeout)),
    }
    if outcome.complaints > 0 {
        reasons.push(format!(
            "{} complaints in the instance's kernel log",
            outcome.complaints
        ));
    }
    for expect in &case.expect {
        let holds = match expect {
            Expect::Line(text) => output.lines().any(|line| line.contains(text)),
            Expect::NoLine(text) => !output.lines().any(|line| line.contains(text)),
            Expect::Exit(_) => true,
        };
        if !holds {
            reasons.push(format!("the output does not hold {expect:?}"));
        }
    }
    reasons
}
