//! The module compiled for kernels that it is not run on, by the compiler and with
//! the headers of the Debian release that has them.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use xshell::cmd;

use crate::apt;
use crate::build;
use crate::project::Project;
use crate::setup;

/// Debian releases, older and newer than the one whose kernels are run; of each
/// the suites, the first being its base. The last one's kernel is taken.
const RELEASES: &[&[&str]] = &[&["bullseye"], &["trixie", "trixie-backports"]];

/// Runs in a new Debian: builds the module and tells for which kernel.
const BUILD: &str = r#"set -e
for headers in /usr/src/linux-headers-*-cloud-amd64; do
    make -s -C $headers M=/kmod modules
    modinfo=$(strings /kmod/blanket.ko | sed -n 's/^vermagic=\([^ ]*\).*/\1/p')
    [ "$modinfo" = "${headers#/usr/src/linux-headers-}" ]
    echo "BUILT $modinfo"
done
"#;

/// Answers with the kernels that the module was compiled for. A warning is an error.
pub fn run(project: &Project) -> Result<Vec<String>> {
    setup::install_missing(project, &["mmdebstrap"])?;
    let core = build::core(project)?;
    let dir = project.out_dir("compile")?.join("kmod");
    let _ = fs::remove_dir_all(&dir);
    fs::create_dir_all(&dir)?;
    // A user of the new Debian may be another one.
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o755))?;
    let (sh, kmod) = (project.shell()?, "blanket/kmod");
    let files = cmd!(sh, "git ls-files {kmod}").quiet().read()?;
    for file in files.lines() {
        let name = file.trim_start_matches("blanket/kmod/");
        if !name.contains('/') {
            fs::copy(project.root.join(file), dir.join(name))
                .with_context(|| format!("cannot copy {file}"))?;
        }
    }
    fs::copy(core, dir.join("blanket-core.bin"))?;
    RELEASES
        .iter()
        .map(|suites| compile(project, suites, &dir))
        .collect()
}

/// Makes a small Debian of `suites`, which is thrown away, and builds in it.
fn compile(project: &Project, suites: &[&str], kmod: &Path) -> Result<String> {
    let sh = project.shell()?;
    let (Some(base), Some(newest)) = (suites.first(), suites.last()) else {
        anyhow::bail!("a release without suites");
    };
    eprintln!("module-compiles: making a Debian {newest} with its kernel's headers");
    let mirror = apt::mirror()?;
    let sources: Vec<String> = suites
        .iter()
        .map(|suite| {
            format!(
                "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] {mirror} {suite} main"
            )
        })
        .collect();
    let prefer = format!("--aptopt=APT::Default-Release \"{newest}\"");
    // An old release's lists are no longer renewed.
    let valid = "--aptopt=Acquire::Check-Valid-Until \"false\"";
    let copy = format!("--customize-hook=copy-in '{}' /", kmod.display());
    let script = kmod.join("build.sh");
    fs::write(&script, BUILD)?;
    let build = "--customize-hook=chroot \"$1\" sh /kmod/build.sh";
    let output = cmd!(
        sh,
        "mmdebstrap --quiet --variant=minbase {prefer} {valid}
         --include=linux-headers-cloud-amd64,make,binutils {copy} {build}
         {base} /dev/null {sources...}"
    )
    .quiet()
    .ignore_status()
    .output()?;
    let text = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    let built = text.lines().find_map(|line| line.strip_prefix("BUILT "));
    ensure!(
        output.status.success() && built.is_some() && !text.contains("warning:"),
        "the module does not compile with the headers of Debian {newest}:\n{text}"
    );
    built.map(str::to_owned).context("no kernel was named")
}
