//! The box around a VM's process, and its limits.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use blanket_sandbox::{CapabilitySet, Policy, User};
use blanket_vmm::console::Sink;

use crate::args::{Isolate, Run};
use crate::registry::Registry;

/// What `--no-sandbox` is.
pub const HELP: &str = "\
Runs the VM's process outside its box. What is lost: a guest that breaks out of its VM then has the rights \
of the user who started it, to all files, programs and networks; inside the box it has the VM's own disks \
and networks, and nothing else (docs/confinement.md).";

/// Closes the box around this process, which has opened all that its VM needs.
///
/// With a `user` to become, it needs no file of the directory of VMs by its name.
pub fn enter(run: &Run, registry: &Registry, sink: &Sink, user: Option<User>) -> Result<()> {
    if run.no_sandbox {
        tracing::warn!("--no-sandbox: a guest that breaks out of its VM has your rights here");
        return Ok(());
    }
    let mut policy = Policy {
        // For the host's memory pressure, the threads' own times, KVM's parameters.
        read: [
            "/proc",
            "/sys/fs/cgroup",
            "/sys/module",
            "/sys/devices/system/cpu",
        ]
        .map(PathBuf::from)
        .to_vec(),
        write: ["/dev/null", "/dev/blanket", "/dev/kvm"]
            .map(PathBuf::from)
            .to_vec(),
        manage: match user {
            Some(_) => Vec::new(),
            None => vec![registry.directory().to_owned()],
        },
        sockets: Vec::new(),
        // The module's own limit on VMs of a user is not for root.
        keep: CapabilitySet::SYS_RESOURCE,
        keep_for_files: CapabilitySet::empty(),
        user,
    };
    if user.is_some() && !run.attach_from.is_empty() {
        // Disks there are who started it's, and not its user's.
        policy.keep_for_files = CapabilitySet::DAC_OVERRIDE;
    }
    if run.isolate == Isolate::Off {
        policy.keep |= CapabilitySet::SYS_ADMIN;
    }
    // Read again when the guest reboots; a package's new kernel is another file there.
    for file in run.kernel.iter().chain(&run.initrd) {
        policy.read.push(parent(file));
    }
    policy.write.extend(run.attach_from.iter().cloned());
    match sink {
        Sink::File(path) => {
            policy.write.push(path.clone());
        }
        Sink::Socket(path) => policy.sockets.push(parent(path)),
        Sink::Pty => policy
            .write
            .extend(["/dev/ptmx", "/dev/pts"].map(PathBuf::from)),
        Sink::Stdio | Sink::None => {}
    }
    for directory in &run.attach_from {
        std::fs::read_dir(directory)
            .with_context(|| format!("--attach-from {}", directory.display()))?;
    }
    let report = blanket_sandbox::enter(&policy)?;
    tracing::info!("confined by {}", report.layers.join(", "));
    for missing in report.missing {
        tracing::warn!("the VM's process is confined without one layer: {missing}");
    }
    Ok(())
}

fn parent(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => ".".into(),
    }
}
