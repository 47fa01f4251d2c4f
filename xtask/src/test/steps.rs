//! The steps of `test` that are no cases of the lab: style, unit tests, packages, machines of metal.

use std::time::Instant;

use anyhow::{Result, ensure};
use xshell::cmd;

use crate::abi_check;
use crate::audit_check;
use crate::bench;
use crate::boot_check;
use crate::build;
use crate::fetch_check;
use crate::metal;
use crate::package;
use crate::project::Project;
use crate::setup::{self, on_path};

/// How many checks held and how many did not.
#[derive(Clone, Copy, Default)]
pub struct Tally {
    pub passed: u32,
    pub failed: u32,
}

impl Tally {
    pub fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
    }
}

/// A check that is no whole-system case.
pub struct Step {
    pub name: &'static str,
    /// Only with `--long`, or when asked for by its full name.
    pub long: bool,
    run: fn(&Project) -> Result<Tally>,
}

/// Steps of which each is a machine of its own, so that they may run side by side, have names that begin so.
pub const METAL: &str = "metal";

impl Step {
    /// Does it, and says how it went.
    pub fn done(&self, project: &Project) -> Tally {
        let start = Instant::now();
        let tally = (self.run)(project).unwrap_or_else(|error| {
            println!("{}: {error:#}", self.name);
            Tally {
                passed: 0,
                failed: 1,
            }
        });
        let verdict = if tally.failed == 0 { "PASS" } else { "FAIL" };
        let seconds = start.elapsed().as_secs_f64();
        println!("{verdict} {} ({seconds:.1} s)", self.name);
        tally
    }
}

pub const STEPS: &[Step] = &[
    Step {
        name: "format",
        long: false,
        run: format,
    },
    Step {
        name: "clippy",
        long: false,
        run: clippy,
    },
    Step {
        name: "unit",
        long: false,
        run: unit,
    },
    Step {
        name: "module-abi",
        long: false,
        run: module_abi,
    },
    Step {
        name: "bench-guard",
        long: false,
        run: bench_guard,
    },
    Step {
        name: "bench-guard-long",
        long: true,
        run: bench_guard_long,
    },
    Step {
        name: "module-audit",
        long: false,
        run: module_audit,
    },
    Step {
        name: "module-compiles",
        long: true,
        run: module_compiles,
    },
    Step {
        name: "bmcast-fetch",
        long: false,
        run: bmcast_fetch,
    },
    Step {
        name: "boot-from-image",
        long: true,
        run: boot_from_image,
    },
    Step {
        name: "package",
        long: true,
        run: packages,
    },
    Step {
        name: "metal",
        long: false,
        run: |project| passed(metal::check(project, metal::streams)?),
    },
    Step {
        name: "metal-nvme",
        long: false,
        run: |project| passed(metal::check(project, metal::streams_to_nvme)?),
    },
    Step {
        name: "metal-server-gone",
        long: false,
        run: |project| passed(metal::check(project, metal::server_gone)?),
    },
    Step {
        name: "metal-power-cuts",
        long: false,
        run: |project| passed(metal::check(project, metal::power_cuts)?),
    },
    Step {
        name: "metal-power-cuts-nvme",
        long: true,
        run: |project| passed(metal::check(project, metal::power_cuts_nvme)?),
    },
    Step {
        name: "metal-faults",
        long: false,
        run: |project| passed(metal::check(project, metal::faults)?),
    },
    Step {
        name: "metal-faults-nvme",
        long: true,
        run: |project| passed(metal::check(project, metal::faults_nvme)?),
    },
    Step {
        name: "metal-next-kernel",
        long: false,
        run: |project| passed(metal::check(project, metal::next_kernel)?),
    },
    Step {
        name: "metal-too-small",
        long: false,
        run: |project| passed(metal::check(project, metal::too_small)?),
    },
    Step {
        name: "metal-debian",
        long: false,
        run: |project| passed(metal::check(project, metal::debian)?),
    },
    Step {
        name: "metal-debian-one-cpu",
        long: true,
        run: |project| passed(metal::check(project, metal::debian_one_cpu)?),
    },
    Step {
        name: "metal-debian-nvme",
        long: true,
        run: |project| passed(metal::check(project, metal::debian_nvme)?),
    },
    Step {
        name: "metal-power-cuts-long",
        long: true,
        run: |project| passed(metal::check(project, metal::power_cuts_long)?),
    },
];

fn passed(passed: u32) -> Result<Tally> {
    Ok(Tally { passed, failed: 0 })
}

/// The image is no program of this machine: it is checked for its own target.
const IMAGE: &str = "blanket-image";

fn format(project: &Project) -> Result<Tally> {
    let (sh, cargo) = (project.shell()?, project.cargo());
    if !on_path("rustfmt") && on_path("rustup") {
        cmd!(sh, "rustup component add rustfmt clippy")
            .quiet()
            .run()?;
    } else if !on_path("rustfmt") {
        setup::install(project, &["rustfmt-web", "rust-web-clippy"])?;
    }
    cmd!(sh, "{cargo} fmt --all --check").quiet().run()?;
    Ok(Tally {
        passed: 1,
        failed: 0,
    })
}

fn clippy(project: &Project) -> Result<Tally> {
    let (sh, cargo) = (project.shell()?, project.cargo());
    cmd!(
        sh,
        "{cargo} clippy --quiet --workspace --exclude {IMAGE} --all-targets -- -D warnings"
    )
    .quiet()
    .run()?;
    build::clippy_efi(project)?;
    Ok(Tally {
        passed: 1,
        failed: 0,
    })
}

fn unit(project: &Project) -> Result<Tally> {
    let (sh, cargo) = (project.shell()?, project.cargo());
    let output = cmd!(
        sh,
        "{cargo} test --quiet --workspace --exclude {IMAGE} --no-fail-fast"
    )
    .quiet()
    .ignore_status()
    .output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let mut tally = Tally::default();
    for line in text
        .lines()
        .filter_map(|line| line.strip_prefix("test result: "))
    {
        // "ok. 12 passed; 0 failed; ..."
        let mut words = line.split([' ', ';']);
        let mut last = 0;
        for word in words.by_ref() {
            match word {
                "passed" => tally.passed += last,
                "failed" => tally.failed += last,
                word => last = word.parse().unwrap_or(last),
            }
        }
    }
    if !output.status.success() {
        println!("{text}\n{}", String::from_utf8_lossy(&output.stderr));
        tally.failed = tally.failed.max(1);
    }
    ensure!(tally.passed + tally.failed > 0, "cargo test ran no test");
    Ok(tally)
}

/// A few rows of the benchmark, by instruction count, against the committed table.
fn bench_guard(project: &Project) -> Result<Tally> {
    bench::run(project, &bench::Args::short_guard())?;
    Ok(Tally {
        passed: 1,
        failed: 0,
    })
}

/// All rows, under the module and inside KVM.
fn bench_guard_long(project: &Project) -> Result<Tally> {
    bench::run(project, &bench::Args::long_guard())?;
    Ok(Tally {
        passed: 1,
        failed: 0,
    })
}

fn packages(project: &Project) -> Result<Tally> {
    package::run(project, &package::Args { test: true })?;
    Ok(Tally {
        passed: 1,
        failed: 0,
    })
}

/// One check for each kernel.
fn module_compiles(project: &Project) -> Result<Tally> {
    let mut tally = Tally::default();
    for release in crate::compile_check::run(project)? {
        println!("the module compiles for {release}");
        tally.passed += 1;
    }
    Ok(tally)
}

fn module_audit(project: &Project) -> Result<Tally> {
    println!("{}", audit_check::run(project)?);
    Ok(Tally {
        passed: 1,
        failed: 0,
    })
}

/// An image that Debian's own tools made, read as `blanket run` would.
fn boot_from_image(project: &Project) -> Result<Tally> {
    Ok(Tally {
        passed: boot_check::run(project)?,
        failed: 0,
    })
}

/// The VMM's network under a real firmware.
fn bmcast_fetch(project: &Project) -> Result<Tally> {
    Ok(Tally {
        passed: fetch_check::run(project)?,
        failed: 0,
    })
}

fn module_abi(project: &Project) -> Result<Tally> {
    println!("{}", abi_check::run(project)?);
    Ok(Tally {
        passed: 1,
        failed: 0,
    })
}
