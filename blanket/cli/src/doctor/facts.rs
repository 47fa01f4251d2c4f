//! What the machine says about itself. Only reading; all judging is in `checks`.

use std::fs;
use std::path::{Path, PathBuf};

use blanket_abi::device::{API_VERSION, features};
use blanket_vmm::core_image;
use blanket_vmm::device::{Device, Error};
use blanket_vmm::hypervisor::Hypervisor as _;
use blanket_vmm::kvm;
use serde::Serialize;

/// Everything that the checks look at.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Facts {
    /// Machine name of the running kernel, such as `x86_64`.
    pub machine: String,
    /// Release of the running kernel.
    pub release: String,
    /// The CPU's name.
    pub cpu: String,
    /// Flags of `/proc/cpuinfo`.
    pub flags: Vec<String>,
    /// CPU bugs of `/proc/cpuinfo`.
    pub bugs: Vec<String>,
    /// State of page-table isolation, from the kernel's report on Meltdown.
    pub meltdown: Option<String>,
    /// Signs of a confidential guest.
    pub confidential: Option<String>,
    /// Signs of a container.
    pub container: Option<String>,
    /// Whether this process may load modules.
    pub may_load_modules: bool,
    /// Whether this process runs as root.
    pub root: bool,
    /// Whether the module is loaded.
    pub module_loaded: bool,
    /// The module's file for the running kernel.
    pub module_file: Option<PathBuf>,
    /// Whether the module's source is registered with DKMS.
    pub dkms_source: bool,
    /// Whether modules can be built for the running kernel.
    pub headers: bool,
    /// The device.
    pub device: DeviceFact,
    /// UEFI Secure Boot; `None` without UEFI.
    pub secure_boot: Option<bool>,
    /// Lockdown mode: none, integrity, confidentiality.
    pub lockdown: Option<String>,
    /// Whether only signed modules may be loaded.
    pub signed_only: bool,
    /// Memory that programs can have, KiB.
    pub available_kib: u64,
    /// The kernel's clock source.
    pub clocksource: Option<String>,
    /// By what VMs have limits.
    pub limits: Option<String>,
    /// Why they have none.
    pub unlimited: Option<String>,
    /// KVM.
    pub kvm: KvmFact,
}

/// What `/dev/blanket` did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "state")]
pub enum DeviceFact {
    /// It is not there.
    #[default]
    Missing,
    /// It is there and not for us.
    NoPermission,
    /// It opened.
    Opened {
        /// Most vCPUs of a VM.
        max_vcpus: u32,
        /// Whether the module calls the TSC stable.
        stable_tsc: bool,
        /// Whether programs in VMs see the VM's CPUID.
        cpuid_profile: bool,
        /// Whether VMs are isolated from the core unless they are told otherwise.
        isolates: bool,
        /// Build id of the core inside the module.
        core: String,
    },
    /// The module is of another version.
    OtherVersion {
        /// The module's.
        module: u32,
        /// This program's.
        ours: u32,
    },
    /// Something else.
    Broken {
        /// What it said.
        error: String,
    },
}

/// What `/dev/kvm` did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "state")]
pub enum KvmFact {
    /// It is not there.
    #[default]
    Missing,
    /// A test guest ran in it.
    Works {
        /// What protects the core from the guest's pages there.
        protections: String,
        /// Whether VMs are isolated from the core unless they are told otherwise.
        isolates: bool,
    },
    /// It is there and of no use.
    Unfit {
        /// Why.
        error: String,
        /// What mends it.
        mend: Option<&'static str>,
    },
}

impl Facts {
    /// Looks at this machine.
    pub fn gather() -> Self {
        let uname = rustix::system::uname();
        let release = uname.release().to_string_lossy().into_owned();
        let cpuinfo = read("/proc/cpuinfo").unwrap_or_default();
        let flags = cpu_line(&cpuinfo, "flags");
        let modules = Path::new("/lib/modules").join(&release);
        let limits = crate::group::outlook();
        Self {
            machine: uname.machine().to_string_lossy().into_owned(),
            cpu: cpu_text(&cpuinfo, "model name"),
            bugs: cpu_line(&cpuinfo, "bugs"),
            meltdown: read("/sys/devices/system/cpu/vulnerabilities/meltdown"),
            confidential: confidential(&flags, |path| Path::new(path).exists()),
            container: container(),
            may_load_modules: has_capability(&read("/proc/self/status").unwrap_or_default(), 16),
            root: rustix::process::geteuid().is_root(),
            module_loaded: Path::new("/sys/module/blanket").exists(),
            module_file: fs::read_to_string(modules.join("modules.dep"))
                .ok()
                .and_then(|list| module_file(&list))
                .map(|relative| modules.join(relative)),
            dkms_source: fs::read_dir("/var/lib/dkms/blanket").is_ok(),
            headers: modules.join("build/Makefile").exists(),
            device: device(),
            secure_boot: secure_boot(),
            lockdown: read("/sys/kernel/security/lockdown").and_then(|text| chosen(&text)),
            signed_only: read("/sys/module/module/parameters/sig_enforce").as_deref() == Some("Y"),
            available_kib: available_kib(&read("/proc/meminfo").unwrap_or_default()),
            clocksource: read("/sys/devices/system/clocksource/clocksource0/current_clocksource"),
            limits: limits.clone().ok(),
            unlimited: limits.err(),
            kvm: kvm(),
            flags,
            release,
        }
    }

    /// Whether the CPU, as the kernel reports it, has a flag.
    pub fn has(&self, flag: &str) -> bool {
        self.flags.iter().any(|found| found == flag)
    }
}

fn read(path: &str) -> Option<String> {
    fs::read_to_string(path)
        .ok()
        .map(|text| text.trim().to_owned())
}

fn kvm() -> KvmFact {
    match kvm::probe() {
        Ok(kvm) => KvmFact::Works {
            protections: kvm.protections(),
            isolates: kvm.info().features & features::ISOLATES != 0,
        },
        Err(kvm::Error::NoDevice) => KvmFact::Missing,
        Err(error) => KvmFact::Unfit {
            mend: kvm::mend(&error),
            error: error.to_string(),
        },
    }
}

fn device() -> DeviceFact {
    match Device::open() {
        Ok(device) => {
            let info = device.info();
            DeviceFact::Opened {
                max_vcpus: info.max_vcpus,
                stable_tsc: info.features & features::STABLE_TSC != 0,
                cpuid_profile: info.features & features::CPUID_PROFILE != 0,
                isolates: info.features & features::ISOLATES != 0,
                core: core_image::digits(&info.build_id),
            }
        }
        Err(Error::NoDevice(_)) => DeviceFact::Missing,
        Err(Error::Permission(_)) => DeviceFact::NoPermission,
        Err(Error::Version { module, .. }) => DeviceFact::OtherVersion {
            module,
            ours: API_VERSION,
        },
        Err(error) => DeviceFact::Broken {
            error: error.to_string(),
        },
    }
}

fn cpu_text(cpuinfo: &str, key: &str) -> String {
    cpuinfo
        .lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(name, _)| name.trim() == key)
        .map(|(_, value)| value.trim().to_owned())
        .unwrap_or_default()
}

fn cpu_line(cpuinfo: &str, key: &str) -> Vec<String> {
    cpu_text(cpuinfo, key)
        .split_ascii_whitespace()
        .map(str::to_owned)
        .collect()
}

/// Signs that memory or CPU state is kept from the provider: the page tables and
/// exits of such a guest follow other rules.
fn confidential(flags: &[String], exists: impl Fn(&str) -> bool) -> Option<String> {
    let has = |flag: &str| flags.iter().any(|found| found == flag);
    if has("tdx_guest") || exists("/dev/tdx_guest") {
        return Some("Intel TDX".into());
    }
    if exists("/dev/sev-guest") {
        return Some("AMD SEV-SNP".into());
    }
    // On bare metal the flags say what the CPU could do, in a guest what is on.
    if has("hypervisor") {
        for (flag, name) in [
            ("sev_snp", "AMD SEV-SNP"),
            ("sev_es", "AMD SEV-ES"),
            ("sev", "AMD SEV"),
        ] {
            if has(flag) {
                return Some(name.into());
            }
        }
    }
    None
}

fn container() -> Option<String> {
    if let Some(kind) = read("/run/systemd/container").filter(|kind| !kind.is_empty()) {
        return Some(kind);
    }
    for (path, kind) in [("/.dockerenv", "docker"), ("/run/.containerenv", "podman")] {
        if Path::new(path).exists() {
            return Some(kind.into());
        }
    }
    container_of_cgroup(&read("/proc/1/cgroup").unwrap_or_default()).map(str::to_owned)
}

fn container_of_cgroup(cgroup: &str) -> Option<&'static str> {
    ["docker", "kubepods", "lxc", "containerd", "libpod"]
        .into_iter()
        .find(|word| cgroup.lines().any(|line| line.contains(word)))
}

/// Whether a capability is effective, by `/proc/self/status`.
fn has_capability(status: &str, number: u32) -> bool {
    status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .is_some_and(|mask| mask >> number & 1 == 1)
}

/// The module in the list of `modules.dep`.
fn module_file(list: &str) -> Option<PathBuf> {
    list.lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(path, _)| Path::new(path))
        .find(|path| {
            path.file_name()
                .and_then(|name| name.to_str())
                .is_some_and(|name| name == "blanket.ko" || name.starts_with("blanket.ko."))
        })
        .map(Path::to_path_buf)
}

/// The last byte of the variable is the state; four attribute bytes come first.
fn secure_boot() -> Option<bool> {
    const VARIABLE: &str =
        "/sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c";
    if !Path::new("/sys/firmware/efi").exists() {
        return None;
    }
    Some(fs::read(VARIABLE).is_ok_and(|bytes| bytes.len() == 5 && bytes[4] == 1))
}

/// The word in brackets: `none [integrity] confidentiality`.
fn chosen(text: &str) -> Option<String> {
    let (_, rest) = text.split_once('[')?;
    rest.split_once(']').map(|(word, _)| word.to_owned())
}

fn available_kib(meminfo: &str) -> u64 {
    meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))
        .and_then(|rest| rest.trim().trim_end_matches("kB").trim().parse().ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_read_as_linux_writes_them() {
        let cpuinfo =
            "processor\t: 0\nmodel name\t: Some CPU @ 2GHz\nflags\t\t: fpu lm nx\n\nflags : x";
        assert_eq!(cpu_text(cpuinfo, "model name"), "Some CPU @ 2GHz");
        assert_eq!(cpu_line(cpuinfo, "flags"), ["fpu", "lm", "nx"]);
        assert_eq!(
            available_kib("MemTotal: 9 kB\nMemAvailable:    1234 kB\n"),
            1234
        );
        assert_eq!(
            chosen("none [integrity] confidentiality").as_deref(),
            Some("integrity")
        );
        assert!(has_capability("Name:\tx\nCapEff:\t0000000000010000\n", 16));
        assert!(!has_capability("CapEff:\t000001fffffeffff\n", 16));
        let list = "kernel/fs/ext4/ext4.ko: kernel/lib/crc16.ko\nupdates/dkms/blanket.ko.xz:\n";
        assert_eq!(module_file(list), Some("updates/dkms/blanket.ko.xz".into()));
        assert_eq!(module_file("extra/notblanket.ko:\n"), None);
        assert_eq!(container_of_cgroup("0::/kubepods/pod1"), Some("kubepods"));
        assert_eq!(container_of_cgroup("0::/init.scope"), None);
    }

    #[test]
    fn confidential_guests_are_recognised_and_hosts_are_not() {
        let flags = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(confidential(&flags("lm sev sev_es"), |_| false), None);
        assert_eq!(
            confidential(&flags("lm hypervisor sev sev_es"), |_| false).as_deref(),
            Some("AMD SEV-ES")
        );
        assert_eq!(
            confidential(&flags("hypervisor tdx_guest"), |_| false).as_deref(),
            Some("Intel TDX")
        );
        assert_eq!(
            confidential(&flags("hypervisor"), |path| path == "/dev/sev-guest").as_deref(),
            Some("AMD SEV-SNP")
        );
    }

    #[test]
    fn this_machine_can_be_looked_at() {
        let facts = Facts::gather();
        assert_eq!(facts.machine, std::env::consts::ARCH);
        assert!(facts.available_kib > 0 && !facts.flags.is_empty());
    }
}
