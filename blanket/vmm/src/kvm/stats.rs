//! KVM's own counters (`Documentation/virt/kvm/api.rst`, KVM_GET_STATS_FD): what a
//! vCPU left guest mode for, in the host's kernel.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsRawFd as _, FromRawFd as _};
use std::os::unix::fs::FileExt as _;
use std::sync::Mutex;

use kvm_ioctls::VcpuFd;

use crate::hypervisor::HostExits;
use crate::sync::lock;

/// `_IO(KVMIO, 0xce)`.
const KVM_GET_STATS_FD: libc::c_ulong = 0xaece;
/// More than any kernel has; a bound on what is read.
const MAX_COUNTERS: u32 = 1024;

/// What is shown, by KVM's names.
const SHOWN: [&str; 12] = [
    "exits",
    "io_exits",
    "mmio_exits",
    "signal_exits",
    "irq_window_exits",
    "nmi_window_exits",
    "halt_exits",
    "request_irq_exits",
    "irq_exits",
    "insn_emulation",
    "irq_injections",
    "tlb_flush",
];

/// The descriptors of a VM's vCPUs.
#[derive(Default)]
pub struct Stats(Mutex<BTreeMap<u32, File>>);

impl Stats {
    /// Adds a vCPU. A kernel before 5.14 has no such descriptor: nothing to show.
    pub fn add(&self, id: u32, vcpu: &VcpuFd) {
        // SAFETY: the request takes no argument and returns a new descriptor.
        let fd = unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_GET_STATS_FD, 0) };
        if fd >= 0 {
            // SAFETY: the kernel returned it, and nobody else owns it.
            let file = unsafe { File::from_raw_fd(fd) };
            lock(&self.0).insert(id, file);
        }
    }

    /// Sums over the vCPUs.
    pub fn read(&self) -> Vec<HostExits> {
        let mut sums: BTreeMap<String, u64> = BTreeMap::new();
        for file in lock(&self.0).values() {
            for (name, value) in counters(file).unwrap_or_default() {
                *sums.entry(name).or_default() += value;
            }
        }
        SHOWN
            .iter()
            .filter_map(|name| {
                sums.get(*name).map(|&count| HostExits {
                    name: (*name).to_owned(),
                    count,
                })
            })
            .collect()
    }
}

/// Reads one descriptor; `None` if it is not of the documented form.
fn counters(file: &File) -> Option<Vec<(String, u64)>> {
    let half = |at: u64| {
        let mut bytes = [0; 4];
        file.read_exact_at(&mut bytes, at).ok()?;
        Some(u32::from_le_bytes(bytes))
    };
    // struct kvm_stats_header: flags, name_size, num_desc, id, desc, data offsets.
    let (name_size, count) = (half(4)?, half(8)?.min(MAX_COUNTERS));
    let (descriptors, data) = (u64::from(half(16)?), u64::from(half(20)?));
    let mut all = Vec::new();
    for index in 0..u64::from(count) {
        // struct kvm_stats_desc: flags, exponent and size, offset, bucket, name.
        let at = descriptors + index * (16 + u64::from(name_size));
        let offset = half(at + 8)?;
        let mut name = vec![0; name_size.min(256) as usize];
        file.read_exact_at(&mut name, at + 16).ok()?;
        name.truncate(name.iter().position(|&byte| byte == 0)?);
        let mut value = [0; 8];
        file.read_exact_at(&mut value, data + u64::from(offset))
            .ok()?;
        all.push((String::from_utf8(name).ok()?, u64::from_le_bytes(value)));
    }
    Some(all)
}
