//! Whether `blanket.h` and `blanket_abi` are the same contract.
//!
//! Both sides are taken whole, so nothing can be forgotten in a list: every
//! `#[repr(C)]` structure of `device.rs` and every constant of it must be in the
//! header, and every `BLANKET_` number of the header must be in the Rust crate.
//! Two generated programs print sizes, offsets and values; the prints must agree.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use xshell::cmd;

use crate::project::{Project, write_if_changed};

/// A structure of `device.rs`.
#[derive(Debug, PartialEq)]
struct Structure {
    name: String,
    fields: Vec<String>,
}

/// What a Rust source file declares, by text: the files are regular enough, and
/// what is missed here is missed in the comparison, which then fails.
#[derive(Debug, Default, PartialEq)]
struct Declared {
    structures: Vec<Structure>,
    /// Constants with their module inside the file (`exit::INTR`).
    constants: Vec<String>,
}

fn declared(source: &str) -> Declared {
    let mut found = Declared::default();
    let mut module = None;
    let mut repr_c = false;
    let mut inside = false;
    for line in source.lines() {
        let word = line.trim();
        if let Some(name) = word
            .strip_prefix("pub mod ")
            .and_then(|rest| rest.strip_suffix(" {"))
        {
            module = Some(name.to_owned());
        } else if line == "}" {
            module = None;
            inside = false;
        } else if word.starts_with("#[repr(C") {
            repr_c = true;
        } else if let Some(rest) = word.strip_prefix("pub struct ") {
            let name = rest
                .split([' ', '(', '{', '<'])
                .next()
                .unwrap_or_default()
                .to_owned();
            inside = repr_c && rest.ends_with('{');
            if inside {
                found.structures.push(Structure {
                    name,
                    fields: Vec::new(),
                });
            }
            repr_c = false;
        } else if let Some(rest) = word.strip_prefix("pub const ")
            && !rest.starts_with("fn ")
        {
            let name = rest.split(':').next().unwrap_or_default();
            found.constants.push(match &module {
                Some(module) => format!("{module}::{name}"),
                None => name.to_owned(),
            });
        } else if inside
            && let Some(rest) = word.strip_prefix("pub ")
            && let Some((field, _)) = rest.split_once(':')
            && let Some(structure) = found.structures.last_mut()
        {
            structure.fields.push(field.to_owned());
        }
    }
    found
}

/// `CreateVm` is `create_vm` in C.
fn snake(name: &str) -> String {
    let mut out = String::new();
    for letter in name.chars() {
        if letter.is_uppercase() && !out.is_empty() {
            out.push('_');
        }
        out.extend(letter.to_lowercase());
    }
    out
}

/// `exit::INTR` is `BLANKET_EXIT_INTR` in C.
fn macro_name(constant: &str) -> String {
    let (module, name) = constant.split_once("::").unwrap_or(("", constant));
    let prefix = match module {
        "features" => "FEATURE_",
        "boot_flags" => "BOOT_",
        "" | "sel" => "",
        module => return format!("BLANKET_{}_{name}", module.to_uppercase()),
    };
    format!("BLANKET_{prefix}{name}")
}

/// Numbers of the header that have no constant in the Rust crate, and why that
/// is no gap.
const HEADER_ONLY: &[&str] = &[
    // Part of each ioctl number, which are compared.
    "BLANKET_IOC",
    // Lengths of fields, whose sizes are compared.
    "BLANKET_RAISED_WORDS",
    "BLANKET_PORT_VCPUS",
    "BLANKET_REVOKED_WORDS",
    "BLANKET_HIDDEN_WORDS",
    // The Xen ABI's flag in pvclock.
    "BLANKET_TIME_STABLE",
    // Size of the core's own records: an array whose type says it.
    "BLANKET_POOL_GFNS_SIZE",
];

/// Modules of `device.rs` whose constants only the core and the VMM use.
const RUST_ONLY: &[&str] = &["counter::", "inject::"];

/// Names of the header that have a value: object-like macros and enumerators.
fn header_macros(header: &str) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for line in header.lines().map(str::trim) {
        let name = if let Some(rest) = line.strip_prefix("#define ") {
            let mut words = rest.split_whitespace();
            let name = words.next().unwrap_or_default();
            let valued = words.next().is_some_and(|word| !word.starts_with("/*"));
            if valued { name } else { "" }
        } else {
            line.split_once(" = ").map_or("", |(name, _)| name)
        };
        let ours = ["BLANKET_", "SW_", "DTR_"]
            .iter()
            .any(|prefix| name.starts_with(prefix));
        if ours && !name.contains('(') {
            names.insert(name.to_owned());
        }
    }
    names
}

/// The Rust expression for an offset that the header names for the assembly
/// (`SW_HOST_RSP`, `DTR_LIMIT`).
fn offset_macro(name: &str) -> Option<String> {
    let (structure, field) = if let Some(field) = name.strip_prefix("SW_") {
        ("Switch", field)
    } else {
        ("Dtr", name.strip_prefix("DTR_")?)
    };
    Some(format!(
        "core::mem::offset_of!(device::{structure}, {})",
        field.to_lowercase()
    ))
}

/// Compares the header with the crate. The answer says how many facts agreed.
pub fn run(project: &Project) -> Result<String> {
    let abi = project.root.join("blanket/abi/src");
    let read = |path: &Path| {
        fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
    };
    let device = declared(&read(&abi.join("device.rs"))?);
    let layout = declared(&read(&abi.join("layout.rs"))?);
    let header_path = project.root.join("blanket/kmod/blanket.h");
    let macros = header_macros(&read(&header_path)?);
    ensure!(
        !device.structures.is_empty(),
        "found no structure in device.rs"
    );

    // The layout is the module's business only as far as its header names it.
    let mut constants: Vec<(String, String)> = device
        .constants
        .iter()
        .filter(|name| !RUST_ONLY.iter().any(|module| name.starts_with(module)))
        .map(|name| (format!("device::{name}"), macro_name(name)))
        .collect();
    constants.extend(
        layout
            .constants
            .iter()
            .map(|name| (format!("layout::{name}"), macro_name(name)))
            .filter(|(_, name)| macros.contains(name)),
    );
    constants.extend(
        macros
            .iter()
            .filter_map(|name| offset_macro(name).map(|rust| (rust, name.clone()))),
    );
    let known: BTreeSet<&str> = constants.iter().map(|(_, name)| name.as_str()).collect();
    let unknown: Vec<&String> = macros
        .iter()
        .filter(|name| !known.contains(name.as_str()) && !HEADER_ONLY.contains(&name.as_str()))
        .collect();
    ensure!(
        unknown.is_empty(),
        "blanket.h defines what the Rust crate does not have: {unknown:?}"
    );
    let absent: Vec<&&str> = known
        .iter()
        .filter(|name| !macros.contains(**name))
        .collect();
    ensure!(
        absent.is_empty(),
        "the Rust crate has what blanket.h does not define: {absent:?}"
    );

    let dir = project.out_dir("abi-check/src")?;
    let base = project.out.join("abi-check");
    write_if_changed(
        &base.join("check.c"),
        c_program(&device, &constants).as_bytes(),
    )?;
    write_if_changed(
        &dir.join("main.rs"),
        rust_program(&device, &constants).as_bytes(),
    )?;
    let manifest = format!(
        "[package]\nname = \"abi-check\"\nedition = \"2024\"\n[workspace]\n\
         [dependencies]\nblanket-abi = {{ path = \"{}\" }}\n",
        project.root.join("blanket/abi").display()
    );
    write_if_changed(&base.join("Cargo.toml"), manifest.as_bytes())?;

    let sh = project.shell()?;
    let kmod = project.root.join("blanket/kmod");
    let (source, program) = (base.join("check.c"), base.join("check"));
    cmd!(sh, "gcc -Wall -Werror -I{kmod} -o {program} {source}")
        .quiet()
        .run()
        .context("the program made from blanket.h does not compile")?;
    let c = cmd!(sh, "{program}").quiet().read()?;
    let cargo = project.cargo();
    let manifest = base.join("Cargo.toml");
    let target = project.cargo_target.join("abi-check");
    let rust = cmd!(sh, "{cargo} run --quiet --manifest-path {manifest}")
        .env("CARGO_TARGET_DIR", target)
        .quiet()
        .read()
        .context("the program made from device.rs does not run")?;

    let mut wrong = String::new();
    for (c, rust) in c.lines().zip(rust.lines()).filter(|(c, rust)| c != rust) {
        let _ = write!(wrong, "\n  blanket.h {c}, Rust {rust}");
    }
    let (c, rust) = (c.lines().count(), rust.lines().count());
    ensure!(
        wrong.is_empty(),
        "blanket.h and blanket_abi::device differ:{wrong}"
    );
    ensure!(c == rust && c > 0, "{c} facts from C, {rust} from Rust");
    Ok(format!("{c} sizes, offsets and numbers agree"))
}

fn c_program(device: &Declared, constants: &[(String, String)]) -> String {
    let mut text = String::from(
        "#include <stddef.h>\n#include <stdio.h>\n#include <sys/ioctl.h>\n#include \"blanket.h\"\n\
         int main(void)\n{\n",
    );
    for structure in &device.structures {
        let c = snake(&structure.name);
        let _ = writeln!(
            text,
            "\tprintf(\"size {c} %llu\\n\", (unsigned long long)sizeof(struct blanket_{c}));"
        );
        for field in &structure.fields {
            let _ = writeln!(
                text,
                "\tprintf(\"offset {c}.{field} %llu size %llu\\n\", \
                 (unsigned long long)offsetof(struct blanket_{c}, {field}), \
                 (unsigned long long)sizeof(((struct blanket_{c} *)0)->{field}));"
            );
        }
    }
    for (_, name) in constants {
        let _ = writeln!(
            text,
            "\tprintf(\"{name} %llu\\n\", (unsigned long long)({name}));"
        );
    }
    text.push_str("\treturn 0;\n}\n");
    text
}

fn rust_program(device: &Declared, constants: &[(String, String)]) -> String {
    let mut text = String::from(
        "use blanket_abi::{device, layout};\n\
         fn size<T, F>(_: impl Fn(&T) -> &F) -> usize {\n    size_of::<F>()\n}\n\
         #[allow(unused_imports)]\nuse layout as _;\nfn main() {\n",
    );
    for structure in &device.structures {
        let (rust, c) = (&structure.name, snake(&structure.name));
        let _ = writeln!(
            text,
            "    println!(\"size {c} {{}}\", size_of::<device::{rust}>());"
        );
        for field in &structure.fields {
            let _ = writeln!(
                text,
                "    println!(\"offset {c}.{field} {{}} size {{}}\", \
                 core::mem::offset_of!(device::{rust}, {field}), \
                 size(|x: &device::{rust}| &x.{field}));"
            );
        }
    }
    for (path, name) in constants {
        let _ = writeln!(text, "    println!(\"{name} {{}}\", {path} as u64);");
    }
    text.push_str("}\n");
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn declarations() {
        let found = declared(
            "pub const A: u32 = 1;\nconst HIDDEN: u32 = 2;\n/// Doc.\n#[repr(C, align(16))]\n\
             pub struct CreateVm {\n    /// Doc.\n    pub one: u32,\n    pub two: [u8; 4],\n}\n\
             pub mod exit {\n    pub const INTR: u32 = 1;\n}\npub const B: u64 = 3;\n",
        );
        let structure = Structure {
            name: "CreateVm".into(),
            fields: vec!["one".into(), "two".into()],
        };
        let constants = vec!["A".into(), "exit::INTR".into(), "B".into()];
        assert_eq!(
            found,
            Declared {
                structures: vec![structure],
                constants
            }
        );
    }

    #[test]
    fn names_in_c() {
        assert_eq!(snake("CreateVm"), "create_vm");
        assert_eq!(macro_name("exit::INTR"), "BLANKET_EXIT_INTR");
        assert_eq!(macro_name("sel::CORE_CS"), "BLANKET_CORE_CS");
        assert_eq!(macro_name("RUN"), "BLANKET_RUN");
        let header = "#ifndef BLANKET_H
#define BLANKET_H
#define BLANKET_A 1
\
                      #define BLANKET_F(x) x
	BLANKET_EXIT_B = 2,
#define SW_HOST_RSP 8
";
        let names = ["BLANKET_A", "BLANKET_EXIT_B", "SW_HOST_RSP"].map(str::to_owned);
        assert_eq!(header_macros(header), BTreeSet::from(names));
    }
}
