//! `blanket cpu`: what VMs find in the CPU of this host.

use std::collections::BTreeMap;
use std::process::ExitCode;

use anyhow::Result;
use blanket_abi::device::features;
use blanket_vmm::cpu::{Names, components};
use serde::Serialize;

use crate::args::Host;
use crate::{exit, host};

/// What VMs find.
#[derive(Debug, Serialize)]
struct Report {
    /// What they run on: `module` or `kvm`.
    host: &'static str,
    /// The CPU's vendor.
    vendor: String,
    /// What it has of what guests may have, by Linux' names.
    features: Names,
    /// All of it can be taken away from a VM.
    hides_all: bool,
    /// What can be in any case, with what goes with it.
    components: BTreeMap<String, Names>,
}

/// `blanket cpu`.
pub fn command(choice: Host, json: bool) -> Result<ExitCode> {
    let hypervisor = host::open(choice)?;
    let cpu = hypervisor.profile(None).cpu;
    let report = Report {
        host: hypervisor.name(),
        vendor: cpu.vendor,
        features: cpu.features,
        hides_all: hypervisor.info().features & features::CPUID_PROFILE != 0,
        components: components(|only| hypervisor.profile(only)),
    };
    exit::show(&report, json, text)?;
    Ok(ExitCode::SUCCESS)
}

fn text(report: &Report) -> String {
    let names = |names: &Names| {
        names
            .iter()
            .map(String::as_str)
            .collect::<Vec<_>>()
            .join(" ")
    };
    let mut text = format!(
        "{}, as VMs {} find it: {}\n",
        report.vendor,
        host::sentence(report.host),
        names(&report.features)
    );
    if report.hides_all {
        text.push_str(
            "blanket run --cpu can take all of it away that a 64-bit kernel does not need\n",
        );
    } else {
        text.push_str("blanket run --cpu can take away:\n");
        for (name, with) in &report.components {
            text.push_str(&format!("  {name}: {}\n", names(with)));
        }
    }
    text
}
