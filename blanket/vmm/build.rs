//! Gives the crate the core image that it loads into KVM VMs: the file that
//! `BLANKET_CORE_IMAGE` names, or nothing. Beside it may lie the image's symbols, for
//! crash reports (`nm` output, ending in `.sym`).

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::{env, fs};

use sha2::{Digest as _, Sha256};

const VARIABLE: &str = "BLANKET_CORE_IMAGE";

fn main() {
    println!("cargo::rerun-if-env-changed={VARIABLE}");
    println!("cargo::rerun-if-changed=build.rs");
    let Some(out) = env::var_os("OUT_DIR").map(PathBuf::from) else {
        return;
    };
    let image = env::var_os(VARIABLE).map(PathBuf::from);
    let bytes = image.as_deref().map(read).unwrap_or_default();
    let symbols = image
        .map(|path| path.with_extension("sym"))
        .filter(|path| path.exists());
    write(&out.join("blanket-core.bin"), &bytes);
    write(
        &out.join("blanket-core.sym"),
        &symbols.as_deref().map(read).unwrap_or_default(),
    );
    let id = Sha256::digest(&bytes);
    let mut text = String::new();
    for byte in id {
        // Writing to a string cannot fail.
        let _ = write!(text, "{byte:02x}");
    }
    write(&out.join("blanket-core.id"), &id);
    println!("cargo::rustc-env=BLANKET_CORE_ID={text}");
}

fn read(path: &Path) -> Vec<u8> {
    println!("cargo::rerun-if-changed={}", path.display());
    fs::read(path).unwrap_or_else(|error| panic!("{VARIABLE}: {}: {error}", path.display()))
}

fn write(path: &Path, bytes: &[u8]) {
    fs::write(path, bytes).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
}
