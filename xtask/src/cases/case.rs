//! What a case is.

use super::BASICS;
use crate::debian::Variant;
use crate::everywhere::Event;
use crate::kernels::Flavour;
use crate::qemu::Hardware;

/// One boot of an instance.
#[derive(Clone)]
pub struct Case {
    /// Shown in the report, matched by `--only`.
    pub name: String,
    /// Only with `--long`.
    pub long: bool,
    /// CPU model of the instance, as QEMU takes it.
    pub cpu: &'static str,
    /// Virtual hardware of the instance.
    pub hardware: Hardware,
    /// Kernel of the instance.
    pub host: Flavour,
    /// Added to the instance's kernel command line.
    pub append: &'static str,
    /// CPUs of the instance.
    pub smp: u32,
    /// Memory of the instance.
    pub memory: &'static str,
    /// Count instructions instead of following the clock.
    pub icount: bool,
    /// What VMs run on. The module is loaded for VMs under it, and only then.
    pub adapter: Adapter,
    /// Modules of the instance's kernel that it loads, where that has them.
    pub modules: &'static [&'static str],
    /// VMs are isolated from their core.
    pub isolate: bool,
    /// Whether instance and VM have stress-ng.
    pub stress_ng: bool,
    /// Whether the VM has fio.
    pub fio: bool,
    /// VMs have net-check instead of the other programs.
    pub net_check: bool,
    /// Modules of the VM's kernel that its initrd loads.
    pub drivers: &'static [&'static str],
    /// The instance has a disk of this image at /dev/vdb.
    pub image: Option<Variant>,
    /// The instance is that image's system, with systemd.
    pub whole_system: bool,
    /// The instance has Debian's ssh, passt and iperf3.
    pub network: bool,
    /// The instance has the `supercloud` command.
    pub supercloud: bool,
    /// The instance has what makes virtual networks: nft, dnsmasq, `fabric`.
    pub fabric: bool,
    /// Seconds until the case is a failure.
    pub timeout: u64,
    /// Other instances, each with a link to this one, whose shells the first one's work reaches
    /// (`/lab/companion`).
    pub companions: &'static [Companion],
    /// Somebody injects these into it ([`crate::everywhere`]).
    pub inject: Option<Event>,
    /// What runs in it.
    pub work: Work,
    /// What must hold for the output, beside exit code 0 and a silent kernel log.
    pub expect: Vec<Expect>,
}

/// An instance beside the one of a case: the same kernel on other hardware.
#[derive(Clone, Copy)]
pub struct Companion {
    /// CPU model, as QEMU takes it.
    pub cpu: &'static str,
    /// Virtual hardware.
    pub hardware: Hardware,
}

/// What VMs run on.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Adapter {
    /// Blanket's module, loaded before the work begins.
    Module,
    /// The instance's KVM; the module is not loaded.
    Kvm,
    /// What `blanket` chooses where the module is not loaded.
    None,
}

/// What an instance does.
#[derive(Clone)]
pub enum Work {
    /// Boots one VM, which runs the script, must exit with 0 and power off.
    Guest(Guest),
    /// Runs a shell script in the instance. `guests` are at
    /// `/guest/vmlinuz-NAME`, programs of `tests/guest` in `/bin`, and
    /// `guest SCRIPT [blanket run options]` boots one as [`Work::Guest`] does.
    Instance {
        /// The script.
        script: &'static str,
        /// Stock kernels that it boots.
        guests: Vec<Flavour>,
    },
}

/// A VM.
#[derive(Clone)]
pub struct Guest {
    /// Stock kernel of the VM.
    pub kernel: Flavour,
    /// vCPUs.
    pub vcpus: u32,
    /// Memory as `blanket run --memory` takes it.
    pub memory: &'static str,
    /// Added to the VM's kernel command line.
    pub append: &'static str,
    /// Runs in the VM by `sh`; programs of `tests/guest` are in `/bin`.
    pub script: &'static str,
}

/// A claim about the output.
#[derive(Clone, Debug)]
pub enum Expect {
    /// Some line contains this.
    Line(&'static str),
    /// No line contains this.
    NoLine(&'static str),
    /// The command exits with this code instead of 0.
    Exit(i32),
}

impl Default for Case {
    fn default() -> Self {
        Self {
            name: String::new(),
            long: false,
            cpu: "EPYC,-svm",
            hardware: Hardware::Virtio,
            host: Flavour::Cloud,
            append: "",
            smp: 2,
            memory: "2G",
            icount: false,
            adapter: Adapter::Module,
            modules: &[],
            isolate: false,
            stress_ng: false,
            fio: false,
            net_check: false,
            drivers: &[],
            image: None,
            whole_system: false,
            network: false,
            supercloud: false,
            fabric: false,
            timeout: 180,
            companions: &[],
            inject: None,
            work: Work::Guest(Guest::default()),
            expect: Vec::new(),
        }
    }
}

impl Default for Guest {
    fn default() -> Self {
        Self {
            kernel: Flavour::Cloud,
            vcpus: 1,
            memory: "256M",
            append: "",
            script: BASICS,
        }
    }
}
