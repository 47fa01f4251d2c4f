//! Judging the facts. Each check is a pure function, and says what mends it.

use std::fmt;
use std::path::Path;

use blanket_vmm::kernel::{Error as KernelError, Kernel};
use serde::Serialize;

use super::facts::{DeviceFact, Facts, KvmFact};

/// Kernel versions on which the module was built and run.
const TRIED: [(u32, u32); 2] = [(6, 1), (6, 12)];
/// Memory below which not even a small VM fits, KiB.
const MEMORY_LEAST: u64 = 128 << 10;
/// Memory below which only small VMs fit, KiB.
const MEMORY_FEW: u64 = 384 << 10;

/// How a check came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Good.
    Ok,
    /// VMs run, and something is worth knowing.
    Warn,
    /// VMs cannot run.
    Fail,
}

/// The outcome of a check.
#[derive(Clone, Debug, Serialize)]
pub struct Check {
    /// What was looked at.
    pub name: &'static str,
    /// How it came out.
    pub state: State,
    /// What was found.
    pub text: String,
    /// The command that mends it.
    pub mend: Option<String>,
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = match self.state {
            State::Ok => "ok",
            State::Warn => "warn",
            State::Fail => "FAIL",
        };
        write!(f, "{state:<5} {:<13} {}", self.name, self.text)?;
        if let Some(mend) = &self.mend {
            write!(f, "\n      {:<13} -> {mend}", "")?;
        }
        Ok(())
    }
}

fn check(name: &'static str, state: State, text: impl Into<String>) -> Check {
    Check {
        name,
        state,
        text: text.into(),
        mend: None,
    }
}

impl Check {
    fn mend(mut self, command: impl Into<String>) -> Self {
        self.mend = Some(command.into());
        self
    }
}

/// All checks, in the order in which failures must be mended.
pub fn all(facts: &Facts, force: bool) -> Vec<Check> {
    let mut checks = vec![cpu(facts)];
    if facts.machine != "x86_64" {
        return checks;
    }
    let mut module = vec![
        fred(facts),
        confidential(facts),
        paging(facts),
        kernel(facts, force),
        container(facts),
        signatures(facts),
        headers(facts),
        module(facts),
        device(facts),
    ];
    // One of the two hosts is enough.
    if matches!(facts.kvm, KvmFact::Works { .. }) {
        for check in &mut module {
            if check.state == State::Fail {
                check.state = State::Warn;
                check.text.push_str(" (matters only without KVM)");
            }
        }
    }
    checks.extend(module);
    checks.extend([
        memory(facts),
        limits(facts),
        clock(facts),
        cpuid(facts),
        isolation(facts),
        kvm(facts),
    ]);
    checks
}

/// Whether the device works, which answers every question about loading.
fn works(facts: &Facts) -> bool {
    matches!(facts.device, DeviceFact::Opened { .. })
}

fn cpu(facts: &Facts) -> Check {
    const NAME: &str = "cpu";
    if facts.machine != "x86_64" {
        return check(
            NAME,
            State::Fail,
            format!("{} is not x86-64", facts.machine),
        )
        .mend("use an instance type with Intel or AMD CPUs");
    }
    let missing: Vec<_> = ["lm", "nx", "syscall", "fxsr", "sse2", "tsc", "cx16"]
        .into_iter()
        .filter(|flag| !facts.has(flag))
        .collect();
    if missing.is_empty() {
        check(NAME, State::Ok, facts.cpu.clone())
    } else {
        check(
            NAME,
            State::Fail,
            format!("{} lacks {}", facts.cpu, missing.join(", ")),
        )
        .mend("use another instance type")
    }
}

fn fred(facts: &Facts) -> Check {
    const NAME: &str = "fred";
    if facts.has("fred") {
        check(
            NAME,
            State::Fail,
            "the kernel uses FRED event delivery, which the world switch does not know",
        )
        .mend("add fred=off to the kernel command line and reboot")
    } else {
        check(NAME, State::Ok, "not in use")
    }
}

fn confidential(facts: &Facts) -> Check {
    const NAME: &str = "confidential";
    match &facts.confidential {
        Some(kind) => check(
            NAME,
            State::Fail,
            format!("this is a confidential guest ({kind}), which is not supported"),
        )
        .mend("use an instance type without confidential computing"),
        None => check(NAME, State::Ok, "not a confidential guest"),
    }
}

fn paging(facts: &Facts) -> Check {
    let levels = if facts.has("la57") { 5 } else { 4 };
    let isolation = if facts.has("pti") { "with" } else { "without" };
    check(
        "paging",
        State::Ok,
        format!("{levels}-level, {isolation} page-table isolation (all of these are supported)"),
    )
}

fn kernel(facts: &Facts, force: bool) -> Check {
    const NAME: &str = "kernel";
    let mut numbers = facts
        .release
        .split(|c: char| !c.is_ascii_digit())
        .map(str::parse);
    let version = match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => Some((major, minor)),
        _ => None,
    };
    if version.is_some_and(|version| TRIED.contains(&version)) {
        return check(NAME, State::Ok, facts.release.clone());
    }
    let tried: Vec<_> = TRIED.iter().map(|(a, b)| format!("{a}.{b}")).collect();
    let text = format!(
        "{} was never tried; {} were",
        facts.release,
        tried.join(" and ")
    );
    if force || works(facts) {
        check(NAME, State::Warn, text)
    } else {
        check(NAME, State::Fail, text)
            .mend("boot a kernel of one of these versions, or try: blanket doctor --force")
    }
}

fn container(facts: &Facts) -> Check {
    const NAME: &str = "container";
    match &facts.container {
        None => check(NAME, State::Ok, "not a container"),
        Some(kind) if works(facts) => {
            check(NAME, State::Ok, format!("a {kind} container with access to the device"))
        }
        Some(kind) if facts.module_loaded => {
            check(NAME, State::Fail, format!("a {kind} container that was not given the device"))
                .mend("start the container with: --device /dev/blanket")
        }
        Some(kind) => check(
            NAME,
            State::Fail,
            format!("a {kind} container: a kernel module must be loaded on its host"),
        )
        .mend("on the host: sudo modprobe blanket; then start the container with --device /dev/blanket"),
    }
}

fn signatures(facts: &Facts) -> Check {
    const NAME: &str = "signatures";
    if facts.module_loaded {
        return check(NAME, State::Ok, "the module was accepted");
    }
    let locked = facts.lockdown.as_deref().is_some_and(|mode| mode != "none");
    let secure = facts.secure_boot == Some(true);
    if !locked && !facts.signed_only {
        let text = if secure {
            "Secure Boot is on, and the kernel accepts unsigned modules all the same"
        } else {
            "the kernel accepts unsigned modules"
        };
        return check(NAME, State::Ok, text);
    }
    let mut reasons = Vec::new();
    if secure {
        reasons.push("Secure Boot is on".to_owned());
    }
    if let Some(mode) = facts.lockdown.as_deref().filter(|_| locked) {
        reasons.push(format!("the kernel is locked down ({mode})"));
    }
    if facts.signed_only {
        reasons.push("only signed modules may be loaded".to_owned());
    }
    let text = reasons.join(", ");
    if facts.module_file.is_some() && secure {
        // DKMS signs with a key of this machine; whether it is enrolled only a
        // try will tell.
        return check(NAME, State::Warn, text)
            .mend("if modprobe is refused: sudo mokutil --import /var/lib/dkms/mok.pub, then reboot and enrol the key");
    }
    check(NAME, State::Fail, text).mend(if secure {
        "sudo mokutil --import /var/lib/dkms/mok.pub, then reboot and enrol the key; \
         or switch Secure Boot off in the instance's settings"
    } else {
        "remove lockdown= and module.sig_enforce from the kernel command line and reboot"
    })
}

fn headers(facts: &Facts) -> Check {
    const NAME: &str = "headers";
    if facts.module_file.is_some() || facts.module_loaded {
        return check(NAME, State::Ok, "the module is built already");
    }
    if facts.headers {
        check(
            NAME,
            State::Ok,
            "the module can be built for the running kernel",
        )
    } else {
        check(
            NAME,
            State::Fail,
            "the headers of the running kernel are missing, so the module cannot be built",
        )
        .mend(format!("sudo apt install linux-headers-{}", facts.release))
    }
}

fn module(facts: &Facts) -> Check {
    const NAME: &str = "module";
    if facts.module_loaded || works(facts) {
        return check(NAME, State::Ok, "loaded");
    }
    if let Some(file) = &facts.module_file {
        let mend = if facts.root && !facts.may_load_modules {
            "as a user with CAP_SYS_MODULE: modprobe blanket"
        } else {
            "sudo modprobe blanket"
        };
        return check(
            NAME,
            State::Fail,
            format!("installed ({}), not loaded", file.display()),
        )
        .mend(mend);
    }
    if facts.dkms_source {
        return check(
            NAME,
            State::Fail,
            "its source is installed, but it is not built for the running kernel",
        )
        .mend(format!(
            "sudo dkms autoinstall -k {0} && sudo modprobe blanket",
            facts.release
        ));
    }
    check(NAME, State::Fail, "not installed")
        .mend("sudo apt install ./blanket-dkms_*.deb && sudo modprobe blanket")
}

fn device(facts: &Facts) -> Check {
    const NAME: &str = "device";
    match &facts.device {
        DeviceFact::Opened { max_vcpus, core, .. } => check(
            NAME,
            State::Ok,
            format!("/dev/blanket, up to {max_vcpus} vCPUs for a VM, core {core:.16}"),
        ),
        DeviceFact::NoPermission => {
            check(NAME, State::Fail, "no permission to open /dev/blanket")
                .mend(super::PERMISSION)
        }
        DeviceFact::OtherVersion { module, ours } => check(
            NAME,
            State::Fail,
            format!("the loaded module has interface version {module}, this program {ours}"),
        )
        .mend("install both packages of one release, then: sudo rmmod blanket && sudo modprobe blanket"),
        DeviceFact::Broken { error } => check(NAME, State::Fail, error.clone())
            .mend("sudo dmesg | grep blanket says more"),
        DeviceFact::Missing if facts.module_loaded => {
            check(NAME, State::Fail, "the module is loaded, but /dev/blanket does not exist")
                .mend("sudo udevadm trigger --action=add /sys/class/misc/blanket")
        }
        DeviceFact::Missing => check(NAME, State::Fail, "/dev/blanket does not exist: see module"),
    }
}

fn memory(facts: &Facts) -> Check {
    const NAME: &str = "memory";
    let text = format!("{} MiB available", facts.available_kib >> 10);
    if facts.available_kib < MEMORY_LEAST {
        check(NAME, State::Fail, format!("{text}, too little for any VM"))
            .mend("end other programs, or use a larger instance")
    } else if facts.available_kib < MEMORY_FEW {
        check(
            NAME,
            State::Warn,
            format!("{text}, enough for small VMs only"),
        )
    } else {
        check(NAME, State::Ok, text)
    }
}

/// Whether VMs' processes get control groups of their own.
fn limits(facts: &Facts) -> Check {
    const NAME: &str = "limits";
    match (&facts.limits, &facts.unlimited) {
        (Some(how), _) => check(NAME, State::Ok, how),
        (None, why) => {
            let why = why.as_deref().unwrap_or("it is not known why");
            let found = check(NAME, State::Warn, format!("VMs run without limits: {why}"));
            if why.contains("are mounted") {
                found.mend(
                    "sudo mkdir -p /sys/fs/cgroup && sudo mount -t cgroup2 cgroup2 /sys/fs/cgroup",
                )
            } else if why.contains("has a bus") {
                found.mend("log in anew; if that is not it: sudo apt install dbus-user-session")
            } else {
                found.mend("blanket run --cgroup PATH, of a control group that is yours")
            }
        }
    }
}

fn clock(facts: &Facts) -> Check {
    const NAME: &str = "clock";
    let source = facts.clocksource.as_deref().unwrap_or("unknown");
    if matches!(
        facts.device,
        DeviceFact::Opened {
            stable_tsc: true,
            ..
        }
    ) {
        return check(
            NAME,
            State::Ok,
            format!("clock source {source}, TSC stable"),
        );
    }
    // Sources that the kernel prefers to, or uses instead of, a TSC it distrusts.
    match source {
        "tsc" | "kvm-clock" | "xen" | "hyperv_clocksource_tsc_page" => {
            check(NAME, State::Ok, format!("clock source {source}"))
        }
        _ => check(
            NAME,
            State::Warn,
            format!(
                "clock source {source}: the TSC is not trusted, so guests read the time slowly"
            ),
        ),
    }
}

/// What the programs of a VM find out about the CPU: it decides where the VM may move.
fn cpuid(facts: &Facts) -> Check {
    let hidden = matches!(
        facts.device,
        DeviceFact::Opened {
            cpuid_profile: true,
            ..
        }
    );
    let text = if matches!(facts.kvm, KvmFact::Works { .. }) || hidden {
        "programs in VMs see the VM's CPU profile"
    } else {
        "this CPU cannot make CPUID fault: programs in VMs under the module see the instance's \
         CPU (their kernels see the profile)"
    };
    check("cpuid", State::Ok, text)
}

/// What `--isolate auto` does on each host that VMs can run on.
fn isolation(facts: &Facts) -> Check {
    let module = match facts.device {
        DeviceFact::Opened { isolates, .. } => Some(("under the module", isolates)),
        _ => None,
    };
    let kvm = match facts.kvm {
        KvmFact::Works { isolates, .. } => Some(("inside KVM", isolates)),
        _ => None,
    };
    let told: Vec<String> = kvm
        .into_iter()
        .chain(module)
        .map(|(host, isolates)| {
            if isolates {
                format!("VMs {host} are isolated from their core, since the CPU has Meltdown")
            } else {
                format!("VMs {host} are not isolated from their core: no Meltdown; see --isolate")
            }
        })
        .collect();
    let text = if told.is_empty() {
        "told when VMs can run".to_owned()
    } else {
        told.join("; ")
    };
    check("isolation", State::Ok, text)
}

fn kvm(facts: &Facts) -> Check {
    const NAME: &str = "kvm";
    match &facts.kvm {
        KvmFact::Missing => check(NAME, State::Ok, "no /dev/kvm; not needed with the module"),
        KvmFact::Works { protections, .. } => check(
            NAME,
            State::Ok,
            format!("a test guest ran in it; VMs run inside KVM ({protections})"),
        ),
        KvmFact::Unfit { error, mend } => Check {
            mend: mend.map(str::to_owned),
            ..check(NAME, State::Warn, format!("not used: {error}"))
        },
    }
}

/// Whether a kernel can be run as a guest.
pub fn guest_kernel(path: &Path, loaded: Result<Kernel, KernelError>) -> Check {
    const NAME: &str = "guest kernel";
    match loaded {
        Ok(kernel) => {
            let packed = kernel.compression().map_or_else(
                || "not packed".to_owned(),
                |format| format!("packed with {format:?}"),
            );
            let mib = kernel.end().div_ceil(1 << 20);
            let text = format!("{}: a Xen PV kernel, {packed}, {mib} MiB", path.display());
            check(NAME, State::Ok, text)
        }
        Err(error) => check(NAME, State::Fail, error.to_string())
            .mend("use the vmlinuz of a Debian, Ubuntu, Fedora, Arch or SUSE kernel"),
    }
}

#[cfg(test)]
mod tests {
    use blanket_vmm::testing::Synthetic;

    use super::*;

    /// A machine on which everything is as it should be.
    fn good() -> Facts {
        Facts {
            machine: "x86_64".into(),
            release: "6.1.0-56-cloud-amd64".into(),
            cpu: "EPYC".into(),
            flags: "lm nx syscall fxsr sse2 tsc cx16 hypervisor"
                .split(' ')
                .map(str::to_owned)
                .collect(),
            may_load_modules: true,
            root: true,
            module_loaded: true,
            module_file: Some("/lib/modules/x/blanket.ko".into()),
            headers: true,
            device: DeviceFact::Opened {
                max_vcpus: 64,
                stable_tsc: true,
                cpuid_profile: false,
                isolates: false,
                core: "0".repeat(64),
            },
            available_kib: 1 << 20,
            clocksource: Some("tsc".into()),
            lockdown: Some("none".into()),
            limits: Some("VMs get scopes of systemd's".into()),
            ..Facts::default()
        }
    }

    fn failures(facts: &Facts) -> Vec<(&'static str, String)> {
        all(facts, false)
            .into_iter()
            .filter(|check| check.state == State::Fail)
            .map(|check| (check.name, check.mend.unwrap_or_default()))
            .collect()
    }

    /// Changes one thing and expects exactly one failure, with a mending command.
    fn one_failure(change: impl Fn(&mut Facts), name: &str, mend: &str) {
        let mut facts = good();
        change(&mut facts);
        let found = failures(&facts);
        assert_eq!(found.len(), 1, "{found:?}");
        assert_eq!(found[0].0, name);
        assert!(found[0].1.contains(mend), "{found:?}");
    }

    fn unloaded(facts: &mut Facts) {
        facts.module_loaded = false;
        facts.device = DeviceFact::Missing;
    }

    #[test]
    fn a_good_machine_passes() {
        let checks = all(&good(), false);
        assert!(
            checks.iter().all(|check| check.state == State::Ok),
            "{checks:?}"
        );
    }

    #[test]
    fn each_cause_is_found_alone() {
        one_failure(|f| f.machine = "aarch64".into(), "cpu", "instance type");
        one_failure(|f| f.flags.retain(|flag| flag != "nx"), "cpu", "instance");
        one_failure(|f| f.flags.push("fred".into()), "fred", "fred=off");
        one_failure(
            |f| f.confidential = Some("AMD SEV".into()),
            "confidential",
            "confidential",
        );
        one_failure(|f| f.available_kib = 1000, "memory", "larger instance");
        one_failure(|f| f.device = DeviceFact::NoPermission, "device", "root");
        one_failure(
            |f| f.device = DeviceFact::OtherVersion { module: 9, ours: 1 },
            "device",
            "rmmod blanket",
        );
        one_failure(|f| f.device = DeviceFact::Missing, "device", "udevadm");
        one_failure(
            |f| {
                f.device = DeviceFact::Broken {
                    error: "odd".into(),
                }
            },
            "device",
            "dmesg",
        );
    }

    #[test]
    fn isolation_is_told_for_each_host() {
        let text = |change: fn(&mut Facts)| {
            let mut facts = good();
            change(&mut facts);
            isolation(&facts).text
        };
        let inside = |isolates| KvmFact::Works {
            protections: String::new(),
            isolates,
        };
        assert!(text(|_| {}).starts_with("VMs under the module are not isolated"));
        let affected = text(|facts| {
            if let DeviceFact::Opened { isolates, .. } = &mut facts.device {
                *isolates = true;
            }
        });
        assert!(affected.starts_with("VMs under the module are isolated"));
        let mut both = good();
        both.kvm = inside(true);
        let both = isolation(&both).text;
        assert!(both.starts_with("VMs inside KVM are isolated"), "{both}");
        assert!(both.contains("VMs under the module are not"), "{both}");
        let mut kvm = good();
        (kvm.device, kvm.kvm) = (DeviceFact::Missing, inside(false));
        assert!(isolation(&kvm).text.starts_with("VMs inside KVM are not"));
        assert_eq!(
            text(|f| f.device = DeviceFact::Missing),
            "told when VMs can run"
        );
    }

    /// Names of failed checks before the device, which fails with all of them.
    fn before_device(change: impl Fn(&mut Facts)) -> Vec<(&'static str, String)> {
        let mut facts = good();
        unloaded(&mut facts);
        change(&mut facts);
        let mut found = failures(&facts);
        assert_eq!(found.pop().map(|(name, _)| name), Some("device"));
        found
    }

    #[test]
    fn not_loaded_not_built_and_not_installed_are_told_apart() {
        let found = before_device(|_| {});
        assert_eq!(found, [("module", "sudo modprobe blanket".to_owned())]);
        let found = before_device(|f| {
            f.module_file = None;
            f.dkms_source = true;
        });
        assert!(
            found[0]
                .1
                .contains("dkms autoinstall -k 6.1.0-56-cloud-amd64")
        );
        let found = before_device(|f| f.module_file = None);
        assert!(found[0].1.contains("blanket-dkms"));
        let found = before_device(|f| {
            f.module_file = None;
            f.headers = false;
        });
        assert_eq!(found[0].0, "headers");
        assert!(found[0].1.ends_with("linux-headers-6.1.0-56-cloud-amd64"));
        let found = before_device(|f| f.container = Some("docker".into()));
        assert_eq!(found[0].0, "container");
        assert!(found[0].1.starts_with("on the host"));
    }

    #[test]
    fn locked_kernels_say_how_to_get_a_module_in() {
        let found = before_device(|f| {
            f.lockdown = Some("integrity".into());
            f.secure_boot = Some(true);
            f.module_file = None;
        });
        assert_eq!(found[0].0, "signatures");
        assert!(found[0].1.contains("mokutil"));
        let found = before_device(|f| f.signed_only = true);
        assert!(found[0].1.contains("sig_enforce"));
        // A module of DKMS under Secure Boot may be signed well.
        let mut facts = good();
        unloaded(&mut facts);
        facts.secure_boot = Some(true);
        facts.lockdown = Some("integrity".into());
        let signatures = all(&facts, false)
            .into_iter()
            .find(|check| check.name == "signatures");
        assert_eq!(signatures.map(|check| check.state), Some(State::Warn));
    }

    #[test]
    fn untried_kernels_need_force() {
        let state = |release: &str, force, loaded: bool| {
            let mut facts = good();
            if !loaded {
                unloaded(&mut facts);
            }
            facts.release = release.into();
            let kernel = all(&facts, force)
                .into_iter()
                .find(|check| check.name == "kernel");
            kernel.expect("checked").state
        };
        assert_eq!(state("6.12.95+bpo-amd64", false, false), State::Ok);
        assert_eq!(state("6.1.0-56-rt-amd64", false, false), State::Ok);
        assert_eq!(state("6.18.44", false, false), State::Fail);
        assert_eq!(state("6.18.44", true, false), State::Warn);
        assert_eq!(
            state("6.10.1", false, false),
            State::Fail,
            "not a prefix of 6.1"
        );
        assert_eq!(state("garbage", false, false), State::Fail);
        assert_eq!(
            state("6.18.44", false, true),
            State::Warn,
            "it works already"
        );
    }

    #[test]
    fn a_guest_kernel_is_judged() {
        let path = Path::new("/some/vmlinuz");
        let plain = Kernel::parse(Synthetic::default().elf());
        let loaded = plain.map_err(|kind| KernelError {
            path: path.into(),
            kind,
        });
        let found = guest_kernel(path, loaded);
        assert!(
            found.state == State::Ok && found.text.contains("/some/vmlinuz"),
            "{found}"
        );
        let found = guest_kernel(path, Kernel::load(Path::new("/no/kernel")));
        assert!(
            found.state == State::Fail && found.text.contains("/no/kernel"),
            "{found}"
        );
    }

    #[test]
    fn a_working_kvm_is_enough() {
        let mut facts = good();
        unloaded(&mut facts);
        facts.module_file = None;
        facts.headers = false;
        facts.release = "6.18.44".into();
        facts.flags.push("fred".into());
        assert!(failures(&facts).len() > 3);
        facts.kvm = KvmFact::Works {
            isolates: false,
            protections: "NX".into(),
        };
        assert!(failures(&facts).is_empty(), "{:?}", failures(&facts));
        // What both hosts need is still needed.
        facts.available_kib = 1000;
        assert_eq!(failures(&facts)[0].0, "memory");
    }

    #[test]
    fn a_kvm_that_does_not_work_is_a_warning_and_the_module_decides() {
        let mut facts = good();
        facts.kvm = KvmFact::Unfit {
            error: "no permission to open /dev/kvm".into(),
            mend: Some("sudo usermod -aG kvm $USER"),
        };
        assert!(failures(&facts).is_empty());
        let found = all(&facts, false)
            .into_iter()
            .find(|check| check.name == "kvm")
            .expect("checked");
        assert_eq!(found.state, State::Warn);
        assert!(found.mend.is_some_and(|mend| mend.contains("usermod")));
        unloaded(&mut facts);
        assert!(!failures(&facts).is_empty());
    }

    #[test]
    fn a_distrusted_tsc_is_a_warning() {
        let mut facts = good();
        facts.device = DeviceFact::Opened {
            isolates: false,
            max_vcpus: 1,
            stable_tsc: false,
            cpuid_profile: true,
            core: "0".repeat(64),
        };
        facts.clocksource = Some("hpet".into());
        assert!(failures(&facts).is_empty());
        let clock = all(&facts, false)
            .into_iter()
            .find(|check| check.name == "clock");
        assert_eq!(clock.map(|check| check.state), Some(State::Warn));
    }
}
