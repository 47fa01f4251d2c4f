//! `build`: the freestanding core image, the kernel module, the static command.

use std::ffi::OsString;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use xshell::{Shell, cmd};

use crate::kernels::{self, Flavour, Kernel};
use crate::project::{Project, copy_if_changed, write_if_changed};
use crate::setup::{self, Need, on_path};

/// Compiler flags of the freestanding core; the linker script is added.
const CORE_RUSTFLAGS: &[&str] = &[
    // Everything relative to the instruction pointer: the image lies too low for
    // the kernel code model's 32-bit addresses.
    "-Crelocation-model=pic",
    "-Clink-arg=-no-pie",
    "-Cno-redzone=yes",
    "-Cforce-frame-pointers=no",
];

/// Compiler flags of a kernel of ours: it lies in the top 2 GiB.
const KERNEL_RUSTFLAGS: &[&str] = &[
    "-Crelocation-model=static",
    "-Ccode-model=kernel",
    "-Cno-redzone=yes",
];

const CORE_TARGET: &str = "x86_64-unknown-none";
const EFI_TARGET: &str = "x86_64-unknown-uefi";
const HOST_TARGET: &str = "x86_64-unknown-linux-gnu";

/// What to build.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// The freestanding core image.
    Core,
    /// The kernel module.
    Module,
    /// The static `blanket` command.
    Command,
    /// The static `supercloud` command.
    Supercloud,
    /// BMcast's VMM.
    Efi,
    /// The static programs that tests and benchmarks run in VMs.
    Programs,
}

/// Arguments of `build`.
#[derive(clap::Args)]
pub struct Args {
    /// Parts to build [default: all].
    parts: Vec<Part>,
    /// Stock kernels to build the module for.
    #[arg(long, default_value = "cloud")]
    kernel: Vec<Flavour>,
    /// Build the module against these kernel headers instead.
    #[arg(long, conflicts_with = "kernel")]
    headers: Option<PathBuf>,
    /// Build the module in this directory instead of Blanket's.
    #[arg(long, hide = true)]
    source: Option<PathBuf>,
    /// With a core that counts how often and for how long its lock is held; what is made
    /// lies beside the rest.
    #[arg(long)]
    measured: bool,
}

/// The `build` verb.
pub fn run(project: &Project, args: &Args) -> Result<()> {
    let wants = |part| args.parts.is_empty() || args.parts.contains(&part);
    let measured;
    let project = if args.measured {
        measured = project.measured();
        &measured
    } else {
        project
    };
    setup::ensure(project, &[Need::Build])?;
    if wants(Part::Core) {
        println!("{}", core(project)?.display());
    }
    if let Some(source) = &args.source {
        for flavour in &args.kernel {
            let headers = kernels::fetch(project, *flavour)?.headers(project)?;
            println!(
                "{}",
                module_from(project, source, None, &headers)?.display()
            );
        }
    } else if wants(Part::Module) {
        if let Some(headers) = &args.headers {
            let headers = fs::canonicalize(headers)
                .with_context(|| format!("no headers at {}", headers.display()))?;
            println!("{}", module(project, &headers)?.display());
        } else {
            for flavour in &args.kernel {
                let kernel = kernels::fetch(project, *flavour)?;
                println!("{}", module_for(project, &kernel)?.display());
            }
        }
    }
    if wants(Part::Command) {
        println!("{}", command(project)?.display());
    }
    if wants(Part::Supercloud) {
        println!("{}", supercloud(project)?.display());
    }
    if wants(Part::Efi) {
        println!("{}", efi(project)?.display());
    }
    if wants(Part::Programs) {
        for program in [
            guest_programs(project)?,
            instance_programs(project)?,
            io_cost(project)?,
            net_check(project)?,
        ]
        .concat()
        {
            println!("{}", program.display());
        }
    }
    Ok(())
}

/// Builds the core and answers with its flat binary.
pub fn core(project: &Project) -> Result<PathBuf> {
    let _lock = project.lock("core")?;
    let sh = project.shell()?;
    let elf = freestanding(
        project,
        "blanket-image",
        "blanket/image/link.ld",
        CORE_RUSTFLAGS,
        if project.measured {
            &["lock-stats"]
        } else {
            &[]
        },
    )?;
    let dir = project.out_dir(&project.output("core"))?;
    let (fresh, bin) = (dir.join("blanket-core.new"), dir.join("blanket-core.bin"));
    cmd!(sh, "objcopy -O binary {elf} {fresh}").quiet().run()?;
    copy_if_changed(&fresh, &bin)?;
    copy_if_changed(&elf, &dir.join("blanket-core.elf"))?;
    // The functions' names, for crash reports.
    let symbols = cmd!(sh, "nm --demangle --defined-only --numeric-sort {elf}")
        .quiet()
        .read()?;
    let functions: String = symbols
        .lines()
        .filter(|line| matches!(line.split(' ').nth(1), Some("t" | "T")))
        .flat_map(|line| [line, "\n"])
        .collect();
    write_if_changed(&dir.join("blanket-core.sym"), functions.as_bytes())?;
    Ok(bin)
}

/// Builds the core and answers with its ELF file, for its symbols.
pub fn core_elf(project: &Project) -> Result<PathBuf> {
    Ok(core(project)?.with_extension("elf"))
}

/// Builds the hostile kernel of the tests, an ELF file.
fn hostile_kernel(project: &Project) -> Result<PathBuf> {
    let _lock = project.lock("core")?;
    let elf = freestanding(
        project,
        "hostile",
        "tests/guest/hostile/link.ld",
        KERNEL_RUSTFLAGS,
        &[],
    )?;
    let to = project.out_dir("bin")?.join("hostile");
    copy_if_changed(&elf, &to)?;
    Ok(to)
}

/// Builds a package for no operating system, linked by `script`; the ELF file.
fn freestanding(
    project: &Project,
    package: &str,
    script: &str,
    rustflags: &[&str],
    features: &[&str],
) -> Result<PathBuf> {
    let sh = project.shell()?;
    let cargo = project.cargo();
    let script = project.root.join(script);
    let text = fs::read(&script).with_context(|| format!("cannot read {}", script.display()))?;
    let mut hash = DefaultHasher::new();
    text.hash(&mut hash);
    let mut flags: Vec<String> = rustflags.iter().map(|flag| (*flag).to_owned()).collect();
    flags.push(format!("-Clink-arg=-T{}", script.display()));
    // Cargo does not know that the linker reads this file.
    flags.push(format!("--cfg=linker_script=\"{:x}\"", hash.finish()));
    let mut build = cmd!(
        sh,
        "{cargo} build --quiet -p {package} --profile core --target {CORE_TARGET}"
    );
    if !features.is_empty() {
        build = build.arg("--features").arg(features.join(","));
    }
    if let CoreToolchain::BuildStd = CoreToolchain::find(project, &sh, CORE_TARGET)? {
        // Only core and alloc are built; Debian's compiler is a stable one, and
        // comes without the linker that the target asks for.
        build = build
            .arg("-Zbuild-std=core,alloc")
            .env("RUSTC_BOOTSTRAP", "1");
        flags.push("-Clinker=ld.lld".into());
    }
    build
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"))
        .quiet()
        .run()
        .with_context(|| format!("cannot build {package}"))?;
    Ok(project
        .cargo_target
        .join(CORE_TARGET)
        .join("core")
        .join(package))
}

/// Builds BMcast's VMM, a UEFI application.
pub fn efi(project: &Project) -> Result<PathBuf> {
    let _lock = project.lock("core")?;
    cargo_efi(project, "build", &["--profile", "efi"], &[])?;
    let built = project
        .cargo_target
        .join(EFI_TARGET)
        .join("efi/bmcast-efi.efi");
    let to = project.out_dir("bin")?.join("bmcast.efi");
    copy_if_changed(&built, &to)?;
    Ok(to)
}

/// Has clippy look at BMcast's VMM.
pub fn clippy_efi(project: &Project) -> Result<()> {
    let _lock = project.lock("core")?;
    cargo_efi(project, "clippy", &[], &["--", "-D", "warnings"])
}

/// Cargo on BMcast's VMM for its own target.
fn cargo_efi(project: &Project, verb: &str, options: &[&str], behind: &[&str]) -> Result<()> {
    let sh = project.shell()?;
    let cargo = project.cargo();
    let toolchain = CoreToolchain::find(project, &sh, EFI_TARGET)?;
    let mut command = cmd!(
        sh,
        "{cargo} {verb} --quiet -p bmcast-efi --target {EFI_TARGET} {options...}"
    );
    if let CoreToolchain::BuildStd = toolchain {
        // As for the core; for this target Debian's linker has another name.
        command = command
            .arg("-Zbuild-std=core,alloc")
            .env("RUSTC_BOOTSTRAP", "1")
            .env("CARGO_ENCODED_RUSTFLAGS", "-Clinker=lld-link");
    }
    command
        .args(behind)
        .quiet()
        .run()
        .with_context(|| format!("cannot {verb} bmcast-efi"))
}

/// How to compile for a target without an operating system.
enum CoreToolchain {
    /// The target's library is installed.
    Target,
    /// The library is built from source.
    BuildStd,
}

impl CoreToolchain {
    fn find(project: &Project, sh: &Shell, for_target: &str) -> Result<Self> {
        let rustc = std::env::var("RUSTC").unwrap_or_else(|_| "rustc".into());
        let sysroot = PathBuf::from(cmd!(sh, "{rustc} --print sysroot").quiet().read()?);
        let target = sysroot.join("lib/rustlib").join(for_target).join("lib");
        if target.is_dir() {
            return Ok(Self::Target);
        }
        if on_path("rustup")
            && cmd!(sh, "rustup target add {for_target}")
                .quiet()
                .ignore_stderr()
                .run()
                .is_ok()
            && target.is_dir()
        {
            return Ok(Self::Target);
        }
        let source = sysroot.join("lib/rustlib/src/rust/library/core");
        if !source.is_dir() {
            if on_path("rustup") {
                cmd!(sh, "rustup component add rust-src").quiet().run()?;
            } else {
                setup::install(project, &["rust-web-src"])?;
            }
        }
        if !on_path("ld.lld") {
            setup::install(project, &["lld"])?;
        }
        ensure!(
            source.is_dir(),
            "no {for_target} target and no library source under {}: \
             install one with `rustup target add {for_target}` or Debian's rust-web-src",
            sysroot.display()
        );
        Ok(Self::BuildStd)
    }
}

/// Builds the module for a stock kernel.
pub fn module_for(project: &Project, kernel: &Kernel) -> Result<PathBuf> {
    module(project, &kernel.headers(project)?)
}

/// Builds the module, with the core image inside, against a kernel's headers.
pub fn module(project: &Project, headers: &Path) -> Result<PathBuf> {
    let core = core(project)?;
    module_from(
        project,
        &project.root.join("blanket/kmod"),
        Some(&core),
        headers,
    )
}

/// Builds the module in `source` out of tree. Its files are copied, since kbuild
/// leaves its objects beside them.
fn module_from(
    project: &Project,
    source: &Path,
    core: Option<&Path>,
    headers: &Path,
) -> Result<PathBuf> {
    let sh = project.shell()?;
    let release = release_of(headers)?;
    let _lock = project.lock(&format!("kmod-{release}"))?;
    let dir = project.out_dir(&format!("{}/{release}", project.output("kmod")))?;
    for entry in
        fs::read_dir(source).with_context(|| format!("cannot read {}", source.display()))?
    {
        let path = entry?.path();
        if let (true, Some(name)) = (path.is_file(), path.file_name()) {
            copy_if_changed(&path, &dir.join(name))?;
        }
    }
    if let Some(core) = core {
        copy_if_changed(core, &dir.join("blanket-core.bin"))?;
    }
    let m: OsString = [OsString::from("M="), dir.clone().into()]
        .into_iter()
        .collect();
    // BTF for modules wants pahole, and gives nothing that the module needs.
    let log = cmd!(
        sh,
        "make -s -C {headers} {m} CONFIG_DEBUG_INFO_BTF_MODULES= modules"
    )
    .quiet()
    .ignore_status()
    .output()?;
    let text = format!(
        "{}{}",
        String::from_utf8_lossy(&log.stdout),
        String::from_utf8_lossy(&log.stderr)
    );
    write_if_changed(&dir.join("build.log"), text.as_bytes())?;
    eprint!("{text}");
    ensure!(
        log.status.success(),
        "the module does not build for {release}"
    );
    let ko = dir.join("blanket.ko");
    ensure!(ko.exists(), "kbuild made no {}", ko.display());
    Ok(ko)
}

/// `uname -r` of the kernel that these headers belong to.
fn release_of(headers: &Path) -> Result<String> {
    let file = headers.join("include/generated/utsrelease.h");
    let text = fs::read_to_string(&file)
        .with_context(|| format!("{} are no kernel headers", headers.display()))?;
    text.split('"')
        .nth(1)
        .map(str::to_owned)
        .with_context(|| format!("{} names no release", file.display()))
}

/// Builds the static `blanket` command.
pub fn command(project: &Project) -> Result<PathBuf> {
    // The command carries the core as the module does, for KVM.
    let image = core(project)?;
    let built = static_binaries(
        project,
        &["--bin", "blanket"],
        &["blanket"],
        STATIC,
        Some(&image),
    )?;
    built.into_iter().next().context("no command was built")
}

/// Builds the static `supercloud` command.
pub fn supercloud(project: &Project) -> Result<PathBuf> {
    let (select, names) = (["--bin", "supercloud"], ["supercloud"]);
    let built = static_binaries(project, &select, &names, STATIC, None)?;
    built.into_iter().next().context("no command was built")
}

/// Builds the static `bmcast` command.
pub fn bmcast(project: &Project) -> Result<PathBuf> {
    let (select, names) = (["--bin", "bmcast"], ["bmcast"]);
    let built = static_binaries(project, &select, &names, STATIC, None)?;
    built.into_iter().next().context("no command was built")
}

/// Builds the static programs that run in VMs and, unchanged, in instances.
pub fn guest_programs(project: &Project) -> Result<Vec<PathBuf>> {
    static_binaries(
        project,
        &["-p", "abi-test", "-p", "micro", "-p", "storm"],
        &["abi-test", "micro", "hello", "storm"],
        LEAN,
        None,
    )
}

/// Builds what measures disks and networks.
pub fn io_cost(project: &Project) -> Result<Vec<PathBuf>> {
    static_binaries(project, &["-p", "io-cost"], &["io-cost"], LEAN, None)
}

/// Builds what compares what goes through networks.
pub fn net_check(project: &Project) -> Result<Vec<PathBuf>> {
    static_binaries(project, &["-p", "net-check"], &["net-check"], LEAN, None)
}

/// Builds what drives virtual networks.
pub fn fabric(project: &Project) -> Result<Vec<PathBuf>> {
    static_binaries(project, &["-p", "fabric"], &["fabric"], LEAN, None)
}

/// Builds what runs in instances only.
pub fn instance_programs(project: &Project) -> Result<Vec<PathBuf>> {
    let mut programs = static_binaries(
        project,
        &["-p", "ioctl-fuzz", "-p", "kexec", "-p", "held-link"],
        &["ioctl-fuzz", "kexec", "held-link"],
        LEAN,
        None,
    )?;
    programs.extend([hostile_kernel(project)?, vmm_tricks(project)?]);
    Ok(programs)
}

/// Builds the static VMM that plays tricks on its VM; it carries the core as the command
/// does.
fn vmm_tricks(project: &Project) -> Result<PathBuf> {
    let image = core(project)?;
    let (select, names) = (["-p", "vmm-tricks"], ["vmm-tricks"]);
    let built = static_binaries(project, &select, &names, STATIC, Some(&image))?;
    built.into_iter().next().context("no vmm-tricks was built")
}

/// A program that needs no shared library.
const STATIC: &str = "-Ctarget-feature=+crt-static";
/// As the reference figures were made: a program that can be anywhere, or can
/// unwind, costs more to start.
const LEAN: &str = "-Ctarget-feature=+crt-static\x1f-Crelocation-model=static\x1f-Cpanic=abort";

/// Builds release binaries that need no shared library; `select` are cargo's
/// options that choose packages, `names` the binaries to answer with.
fn static_binaries(
    project: &Project,
    select: &[&str],
    names: &[&str],
    flags: &str,
    image: Option<&Path>,
) -> Result<Vec<PathBuf>> {
    let _lock = project.lock("bin")?;
    let target = project
        .cargo_target
        .join(if flags == LEAN { "lean" } else { "static" });
    let sh = project.shell()?;
    let cargo = project.cargo();
    let mut build = cmd!(
        sh,
        "{cargo} build --quiet --release --target {HOST_TARGET} {select...}"
    );
    if let Some(image) = image {
        build = build.env("BLANKET_CORE_IMAGE", image);
    }
    build
        // A directory for each set of flags, or cargo would build all anew each time.
        .env("CARGO_TARGET_DIR", &target)
        .env("CARGO_ENCODED_RUSTFLAGS", flags)
        .quiet()
        .run()
        .with_context(|| format!("cannot build {}", names.join(", ")))?;
    let (built, kept) = (
        target.join(HOST_TARGET).join("release"),
        project.out_dir(&project.output("bin"))?,
    );
    let mut binaries = Vec::new();
    for name in names {
        let to = kept.join(name);
        let (from, fresh) = (built.join(name), kept.join(format!("{name}.new")));
        // Debug information makes nine tenths of the file and helps nobody there.
        cmd!(sh, "strip --strip-debug -o {fresh} {from}")
            .quiet()
            .run()?;
        cmd!(sh, "chmod 755 {fresh}").quiet().run()?;
        if fs::read(&to).is_ok_and(|old| fs::read(&fresh).is_ok_and(|new| old == new)) {
            fs::remove_file(fresh)?;
        } else {
            // Whoever runs the old one goes on with it.
            fs::rename(fresh, &to)?;
        }
        binaries.push(to);
    }
    Ok(binaries)
}
