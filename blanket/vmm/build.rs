//! Gives the crate the core image that it loads into KVM VMs: the file that
//! `BLANKET_CORE_IMAGE` names, or nothing.

use std::path::PathBuf;
use std::{env, fs};

const VARIABLE: &str = "BLANKET_CORE_IMAGE";

fn main() {
    println!("cargo::rerun-if-env-changed={VARIABLE}");
    println!("cargo::rerun-if-changed=build.rs");
    let Some(out) = env::var_os("OUT_DIR") else {
        return;
    };
    let image = env::var_os(VARIABLE).map_or_else(Vec::new, |path| {
        println!("cargo::rerun-if-changed={}", PathBuf::from(&path).display());
        fs::read(&path).unwrap_or_else(|error| {
            panic!("{VARIABLE}: {}: {error}", PathBuf::from(&path).display())
        })
    });
    let to = PathBuf::from(out).join("blanket-core.bin");
    fs::write(&to, image).unwrap_or_else(|error| panic!("{}: {error}", to.display()));
}
