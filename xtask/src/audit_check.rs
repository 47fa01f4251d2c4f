//! Whether the module's audit finds what is wrong: `blanket/kmod/audit.c` is compiled
//! into a program with as much of a kernel as it needs, which breaks one thing at a time.

use std::fs;

use anyhow::{Context, Result};
use xshell::cmd;

use crate::project::{Project, write_if_changed};

/// Builds the program and runs it; its last line.
pub fn run(project: &Project) -> Result<String> {
    let kmod = project.root.join("blanket/kmod");
    let out = project.out_dir("audit-check")?;
    // The kernel's headers that are included, empty: what they would declare is in
    // `test/kernel.h`.
    let headers = out.join("include");
    for source in ["audit.c", "internal.h"] {
        let path = kmod.join(source);
        let text =
            fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let included = text
            .lines()
            .filter_map(|line| line.strip_prefix("#include <")?.strip_suffix('>'))
            // The C library has this one, and the ABI's header wants it.
            .filter(|name| *name != "linux/types.h");
        for name in included {
            let header = headers.join(name);
            fs::create_dir_all(header.parent().context("a header without a directory")?)?;
            write_if_changed(&header, b"")?;
        }
    }
    let sh = project.shell()?;
    let (force, source, program) = (
        kmod.join("test/kernel.h"),
        kmod.join("test/audit.c"),
        out.join("audit"),
    );
    cmd!(
        sh,
        "gcc -Wall -Wno-unused -Werror -O1 -g -fsanitize=address,undefined
            -include {force} -I{headers} -I{kmod} -o {program} {source}"
    )
    .quiet()
    .run()
    .context("the program made from audit.c does not compile")?;
    let text = cmd!(sh, "{program}").quiet().read()?;
    Ok(text.lines().last().unwrap_or_default().to_owned())
}
