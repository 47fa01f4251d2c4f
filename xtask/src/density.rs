//! `bench --density N`: N small VMs at once on one instance, and what each costs beside
//! its memory.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::initramfs::Files;
use crate::kernels::{self, Flavour};
use crate::measured;
use crate::project::Project;
use crate::scripts::DENSITY;

/// What the page's section begins with.
pub const TITLE: &str = "\n## Density\n";

/// Runs it under the module, prints the section of the page, and writes it there.
pub fn run(project: &Project, guests: u32) -> Result<()> {
    let kernel = kernels::fetch(project, Flavour::Cloud)?;
    let script = format!("GUESTS={guests}\n{DENSITY}");
    let timeout = Duration::from_secs(120 + 120 * u64::from(guests));
    let output = measured::in_instance(project, &kernel, "6G", &script, &Files::new(), timeout)?;
    let text = section(&output, &kernel.release)?;
    println!("{text}");
    crate::page::write_section(project, TITLE, &text)
}

/// `DENSITY host=module guests=40 ...` as a section.
fn section(output: &str, release: &str) -> Result<String> {
    let line = output
        .lines()
        .find_map(|line| line.trim_end().strip_prefix("DENSITY "))
        .context("no figures came")?;
    let figures: BTreeMap<&str, &str> = line
        .split_whitespace()
        .filter_map(|word| word.split_once('='))
        .collect();
    let get = |name: &str| figures.get(name).copied().context("a figure is missing");
    let mib = |name: &str| -> Result<String> {
        let kib: f64 = get(name)?.parse()?;
        Ok(format!("{:.1}", kib / 1024.0))
    };
    let guests = get("guests")?;
    Ok(format!(
        "{TITLE}\n\
         Made by `cargo xtask bench --density {guests}`, which writes this section: {guests} VMs with one \
         vCPU and {} of memory each under the module, on an instance with 2 CPUs and 6 GiB, all \
         running the stock kernel {release} with a busybox. All answered on their consoles after the last had \
         started, were ballooned to {}, and answered again. The figures are means of one run under emulation; they count memory, which an emulator does \
         not change.\n\n\
         | of each VM | MiB |\n|---|---:|\n\
         | its memory that it has touched | {} |\n\
         | beside that: the VMM (proportional set size without the VM's memory) | {} |\n\
         | beside that: the kernel (core, tables, shadow pages, stacks; memory cgroup) | {} |\n\
         | of these, shadow pages | {} |\n\
         | **cost beside its memory** | **{}** |\n\
         | the VM that costs most | {} |\n\
         | the instance's available memory went down by, for all together | {} |\n",
        get("memory")?,
        get("target")?,
        mib("touched")?,
        mib("vmm")?,
        mib("kernel")?,
        mib("shadow")?,
        mib("cost")?,
        mib("worst")?,
        mib("taken")?,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_become_a_section() {
        let line = "all\nDENSITY host=module guests=8 memory=96M target=64M touched=61440 vmm=1024 kernel=2048 \
                    shadow=1536 cost=3072 worst=4096 taken=524288\r\nDENSITY-OK\n";
        let text = section(line, "6.1").expect("whole");
        assert!(text.starts_with(TITLE) && text.contains("--density 8"));
        assert!(
            text.contains("| **cost beside its memory** | **3.0** |"),
            "{text}"
        );
        assert!(text.contains("for all together | 512.0 |"), "{text}");
        assert!(section("DENSITY guests=8\n", "6.1").is_err());
        assert!(section("", "6.1").is_err());
    }
}
