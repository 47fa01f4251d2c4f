//! What core and backends know of a saved VM: the last chunk.

use std::collections::BTreeMap;
use std::sync::Arc;

use blanket_abi::PAGE_SIZE;
use blanket_abi::state::{self, VcpuState, VmState};
use blanket_abi::xen::domid;
use blanket_abi::xen::event::PORTS;
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::{Machine, ResumeError, now_ns};
use crate::builder::Domain;
use crate::hypervisor;
use crate::xenstore::{self, Xenstore};

/// Bytes of an FPU's image.
const FPU: usize = 4096;

/// Words with names (`VmState::FIELDS`).
type Fields = BTreeMap<String, Vec<u64>>;

/// The state of a saved VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// What its vCPUs share.
    vm: Fields,
    /// Its vCPUs.
    vcpus: Vec<Vcpu>,
    /// Ports that are bound: number and word.
    ports: Vec<(u32, u64)>,
    /// Marks of its frames of RAM: so many, each with this byte.
    marks: Vec<(u64, u8)>,
    /// Its xenstore.
    xenstore: xenstore::State,
    /// The host's indices in the ring of its console.
    console: [u32; 2],
    /// What its guest is asked to have, bytes.
    pub(super) target: u64,
    /// When it was stopped, ns since 1970 by the clock of its host, or by that of the one which is to
    /// have it.
    stopped_at: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Vcpu {
    registers: Fields,
    /// Its FPU, without the zeros at the end.
    fpu: Vec<u8>,
}

fn named<const N: usize>(fields: &[(&str, usize)], words: &[u64; N]) -> Fields {
    let mut rest = &words[..];
    fields
        .iter()
        .map(|(name, count)| {
            let (head, tail) = rest.split_at(*count);
            rest = tail;
            ((*name).to_owned(), head.to_vec())
        })
        .collect()
}

/// The words that names stand for: all of them, and no others.
fn words<const N: usize>(
    what: &str,
    fields: &[(&str, usize)],
    from: &Fields,
) -> Result<[u64; N], ResumeError> {
    let bad = |name: &str, why| ResumeError::Impossible(format!("{what}: {name} {why}"));
    if let Some(name) = from
        .keys()
        .find(|name| !fields.iter().any(|(known, _)| known == name))
    {
        return Err(bad(name, "is not known"));
    }
    let mut all = Vec::with_capacity(N);
    for (name, count) in fields {
        let words = from.get(*name).ok_or_else(|| bad(name, "is missing"))?;
        if words.len() != *count {
            return Err(bad(name, "has another length"));
        }
        all.extend(words);
    }
    all.try_into()
        .map_err(|_| bad("a record", "has another length"))
}

fn at(domain: &Domain, frame: u64) -> GuestAddress {
    GuestAddress((domain.boot.state_base + frame) * PAGE_SIZE)
}

fn read_words<const N: usize>(domain: &Domain, frame: u64) -> Result<[u64; N], GuestMemoryError> {
    let mut bytes = [[0; 8]; N];
    domain
        .memory
        .read_slice(bytes.as_flattened_mut(), at(domain, frame))?;
    Ok(bytes.map(u64::from_le_bytes))
}

fn write_words(domain: &Domain, frame: u64, words: &[u64]) -> Result<(), GuestMemoryError> {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    domain.memory.write_slice(&bytes, at(domain, frame))
}

impl State {
    /// What the core has written down, and the store. `stopped_at`: when, ns since 1970, by the clock of
    /// the host that is to have it.
    pub(crate) fn read(
        domain: &Domain,
        vcpus: u32,
        xenstore: xenstore::State,
        console: [u32; 2],
        target: u64,
        stopped_at: u64,
    ) -> Result<Self, GuestMemoryError> {
        let vm = named(
            VmState::FIELDS,
            &read_words::<{ VmState::WORDS }>(domain, 0)?,
        );
        let vcpus_of = |id| -> Result<Vcpu, GuestMemoryError> {
            let frame = state::vcpu_at(id);
            let words = read_words::<{ VcpuState::WORDS }>(domain, frame)?;
            let mut fpu = vec![0; FPU];
            // One that never ran has none.
            if VcpuState::from_words(&words).fpu != 0 {
                domain.memory.read_slice(&mut fpu, at(domain, frame + 1))?;
            }
            let length = fpu.iter().rposition(|byte| *byte != 0).map_or(0, |n| n + 1);
            fpu.truncate(length);
            Ok(Vcpu {
                registers: named(VcpuState::FIELDS, &words),
                fpu,
            })
        };
        let mut ports = Vec::new();
        for first in (0..PORTS).step_by(512) {
            let frame = state::PORTS_AT + u64::from(first) / 512;
            let words = read_words::<512>(domain, frame)?;
            ports.extend((first..).zip(words).filter(|(_, word)| *word != 0));
        }
        let mut bytes = vec![0; usize::try_from(domain.boot.ram_frames).unwrap_or(0)];
        domain
            .memory
            .read_slice(&mut bytes, at(domain, state::marks_at(vcpus)))?;
        let marks = bytes
            .chunk_by(|a, b| a == b)
            .map(|run| (run.len() as u64, run[0]))
            .collect();
        Ok(Self {
            vm,
            vcpus: (0..vcpus).map(vcpus_of).collect::<Result<_, _>>()?,
            ports,
            marks,
            xenstore,
            console,
            target,
            stopped_at,
        })
    }

    fn vm(&self) -> Result<VmState, ResumeError> {
        let words = words::<{ VmState::WORDS }>("the VM's state", VmState::FIELDS, &self.vm)?;
        Ok(VmState::from_words(&words))
    }

    /// Whether it is the state of such a machine. The core looks closer.
    pub(super) fn check(&self, machine: &Machine) -> Result<(), ResumeError> {
        self.vm()?;
        let marked = self
            .marks
            .iter()
            .try_fold(0u64, |sum, (count, _)| sum.checked_add(*count));
        let whole = self.vcpus.len() as u64 == u64::from(machine.vcpus)
            && marked == machine.boot.get("ram_frames").copied()
            && self.vcpus.iter().all(|vcpu| vcpu.fpu.len() <= FPU)
            && self.target <= machine.max_memory
            && self.ports.iter().all(|(port, _)| *port < PORTS);
        whole
            .then_some(())
            .ok_or_else(|| ResumeError::Impossible("its state is not that of such a VM".into()))
    }

    /// How long ago it was stopped, ns: of a VM out of a file, by the clocks of both hosts.
    pub(crate) fn away(&self) -> u64 {
        now_ns().saturating_sub(self.stopped_at)
    }

    /// The store, and our indices in the console's ring.
    pub(crate) fn backends(
        self,
        domain: &Domain,
        machine: &Arc<dyn hypervisor::Machine>,
    ) -> Result<(Xenstore, [u32; 2]), ResumeError> {
        let machine = Arc::clone(machine);
        let store = Xenstore::restore(domain, domid::GUEST, self.xenstore, machine)?;
        Ok((store, self.console))
    }

    /// Lays it where a core takes it up. `system_time` is the host's, ns, and the guest's
    /// goes on as if `away` nanoseconds had passed. How many frames of RAM the guest has.
    pub(crate) fn lay(
        &self,
        domain: &Domain,
        system_time: u64,
        away: u64,
    ) -> Result<u64, ResumeError> {
        let mut vm = self.vm()?;
        vm.time_offset = vm.system_time.wrapping_add(away).wrapping_sub(system_time);
        let laid = |result: Result<(), GuestMemoryError>| {
            result.map_err(|error| ResumeError::Impossible(error.to_string()))
        };
        laid(write_words(domain, 0, &vm.to_words()))?;
        for (id, vcpu) in (0u32..).zip(&self.vcpus) {
            let name = format!("vCPU {id}");
            let words = words::<{ VcpuState::WORDS }>(&name, VcpuState::FIELDS, &vcpu.registers)?;
            let frame = state::vcpu_at(id);
            laid(write_words(domain, frame, &words))?;
            laid(domain.memory.write_slice(&vcpu.fpu, at(domain, frame + 1)))?;
        }
        for (port, word) in &self.ports {
            let address = at(domain, state::PORTS_AT).0 + u64::from(*port) * 8;
            laid(
                domain
                    .memory
                    .write_slice(&word.to_le_bytes(), GuestAddress(address)),
            )?;
        }
        let vcpus = u32::try_from(self.vcpus.len()).unwrap_or(0);
        let marks: Vec<u8> = self
            .marks
            .iter()
            .flat_map(|(count, byte)| {
                std::iter::repeat_n(*byte, usize::try_from(*count).unwrap_or(0))
            })
            .collect();
        laid(
            domain
                .memory
                .write_slice(&marks, at(domain, state::marks_at(vcpus))),
        )?;
        Ok(domain.boot.ram_frames.saturating_sub(vm.out))
    }
}
