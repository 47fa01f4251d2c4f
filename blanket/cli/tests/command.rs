//! The command as a user runs it, as far as that needs no VM.

use std::path::Path;
use std::process::{Command, Output};

use blanket_vmm::testing::{Synthetic, bzimage};

fn blanket(runtime: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_blanket"))
        .args(arguments)
        .env("BLANKET_RUNTIME_DIR", runtime.join("run"))
        .output()
        .expect("the command runs")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn wrong_arguments_exit_with_2_and_help_lists_the_exit_codes() {
    let directory = tempfile::tempdir().expect("a directory");
    let wrong = blanket(directory.path(), &["run", "--kernel"]);
    assert_eq!(wrong.status.code(), Some(2));
    let help = blanket(directory.path(), &["run", "--help"]);
    assert!(help.status.success());
    let help = text(&help.stdout);
    for code in ["0 ", "3 ", "4 ", "5 ", "6 ", "7 ", "8 ", "128+n"] {
        assert!(help.contains(&format!("\n  {code}")), "{code} in {help}");
    }
}

#[test]
fn files_that_are_missing_are_named_before_anything_else() {
    let directory = tempfile::tempdir().expect("a directory");
    let missing = blanket(directory.path(), &["run", "--kernel", "/no/kernel"]);
    assert_eq!(missing.status.code(), Some(1));
    let error = text(&missing.stderr);
    assert!(
        error.contains("/no/kernel") && error.contains("--kernel"),
        "{error}"
    );
    let arguments = ["run", "--kernel", "/dev/null", "--initrd", "/no/initrd"];
    let missing = blanket(directory.path(), &arguments);
    assert!(text(&missing.stderr).contains("/no/initrd"));
    assert!(missing.stdout.is_empty());
}

#[test]
fn nothing_runs_and_nothing_is_found() {
    let directory = tempfile::tempdir().expect("a directory");
    let ps = blanket(directory.path(), &["ps", "--json"]);
    assert!(ps.status.success());
    assert_eq!(text(&ps.stdout).trim(), "[]");
    for command in [
        "stop", "kill", "stats", "audit", "trace", "upgrade", "console",
    ] {
        let output = blanket(directory.path(), &[command, "nobody"]);
        assert_eq!(output.status.code(), Some(1), "{command}");
        let error = text(&output.stderr);
        assert!(
            error.contains("no VM named nobody") && error.contains("blanket ps"),
            "{error}"
        );
    }
}

#[test]
fn doctor_judges_machine_and_guest_kernel_in_words_and_in_json() {
    let directory = tempfile::tempdir().expect("a directory");
    let kernel = directory.path().join("vmlinuz");
    std::fs::write(&kernel, bzimage(&Synthetic::default().elf())).expect("written");
    let kernel = kernel.to_str().expect("plain");
    let doctor = blanket(directory.path(), &["doctor", "--json", "--kernel", kernel]);
    let report: serde_json::Value = serde_json::from_slice(&doctor.stdout).expect("JSON");
    let checks = report["checks"].as_array().expect("a list");
    let failed = |check: &&serde_json::Value| check["state"] == "fail";
    assert_eq!(
        report["ok"].as_bool(),
        Some(checks.iter().filter(failed).count() == 0)
    );
    assert_eq!(doctor.status.success(), report["ok"] == true);
    assert!(
        checks
            .iter()
            .filter(failed)
            .all(|check| !check["text"].is_null())
    );
    let guest = checks
        .iter()
        .find(|check| check["name"] == "guest kernel")
        .expect("checked");
    assert_eq!(guest["state"], "ok");

    let no_pv = directory.path().join("no-pv");
    let elf = Synthetic {
        xen: false,
        ..Synthetic::default()
    }
    .elf();
    std::fs::write(&no_pv, bzimage(&elf)).expect("written");
    let doctor = blanket(
        directory.path(),
        &["doctor", "--kernel", no_pv.to_str().expect("plain")],
    );
    assert_eq!(doctor.status.code(), Some(1));
    assert!(text(&doctor.stdout).contains("CONFIG_XEN_PV"));
}

#[test]
fn without_the_module_the_next_step_is_named() {
    let directory = tempfile::tempdir().expect("a directory");
    let kernel = directory.path().join("vmlinuz");
    std::fs::write(&kernel, b"not a kernel").expect("written");
    let run = blanket(
        directory.path(),
        &["run", "--kernel", kernel.to_str().expect("plain")],
    );
    assert_eq!(run.status.code(), Some(1));
    let error = text(&run.stderr);
    if Path::new("/dev/blanket").exists() {
        assert!(
            error.contains("not a Linux kernel") || error.contains("  "),
            "{error}"
        );
    } else {
        assert!(error.contains("/dev/blanket does not exist"), "{error}");
        assert!(error.lines().count() >= 2, "a next step: {error}");
    }
    assert!(text(&blanket(directory.path(), &["ps", "--json"]).stdout).contains("[]"));
}

#[test]
fn packages_get_man_pages_and_completions() {
    let directory = tempfile::tempdir().expect("a directory");
    let man = directory.path().join("man");
    std::fs::create_dir(&man).expect("made");
    let made = blanket(
        directory.path(),
        &["generate", "man", man.to_str().expect("plain")],
    );
    assert!(made.status.success(), "{}", text(&made.stderr));
    let page = std::fs::read_to_string(man.join("blanket-run.1")).expect("a page for run");
    assert!(page.contains("kernel"));
    for shell in ["bash", "zsh", "fish"] {
        let made = blanket(directory.path(), &["generate", "completions", shell]);
        assert!(
            made.status.success() && text(&made.stdout).contains("blanket"),
            "{shell}"
        );
    }
}

#[test]
fn what_is_in_disks_is_saved_and_restored() {
    use blanket_disk::{Options, Writer, open};
    let directory = tempfile::tempdir().expect("a directory");
    let here = |name: &str| directory.path().join(name).display().to_string();
    let disk = |words: &[&str]| blanket(directory.path(), &[&["disk"], words].concat());
    let good = |words: &[&str]| {
        let output = disk(words);
        assert!(output.status.success(), "{}", text(&output.stderr));
        text(&output.stdout)
    };
    let bad = |words: &[&str], word: &str| {
        let output = disk(words);
        assert_eq!(output.status.code(), Some(1), "{word}");
        let error = text(&output.stderr);
        assert!(error.contains(word), "{word}: {error}");
    };
    std::fs::write(here("base.raw"), vec![7; 1 << 20]).expect("written");
    for name in ["a.qcow2", "b.qcow2"] {
        good(&["create", "--backing", &here("base.raw"), &here(name)]);
    }
    let spec = |name: &str| format!("{},base=blake3:00ff", here(name));
    let (a, b, file) = (spec("a.qcow2"), spec("b.qcow2"), here("a.disks"));

    // While somebody writes it, and the other way round, it is said who.
    let image = open(here("a.qcow2"), &Options::default()).expect("opened");
    bad(&["save", &file, &a], "in use");
    let mut writer = Writer::new(&image, 4096).expect("made");
    writer.write(8192, &[9; 4096]).expect("written");
    writer.flush().expect("flushed");
    drop((writer, image));
    bad(
        &["save", &file, &spec("base.raw")],
        "stands on no other image",
    );
    assert!(!Path::new(&file).exists() && !Path::new(&here("a.disks.part")).exists());

    let said = good(&["save", "--json", &file, &a]);
    assert!(said.contains("1048576"), "{said}");
    bad(&["save", &file, &a], "is there already");
    bad(&["restore", &file, &here("b.qcow2")], "give the same base=");
    good(&["restore", &file, &b]);
    let read = open(here("b.qcow2"), &Options::read_only()).expect("opened");
    let mut bytes = vec![0; 1 << 20];
    read.reader().read_exact_at(0, &mut bytes).expect("read");
    let mut wanted = vec![7; 1 << 20];
    wanted[8192..8192 + 4096].fill(9);
    assert!(bytes == wanted);
    drop(read);
    bad(&["restore", &file, &b], "blocks of its own already");

    good(&["create", "--backing", &here("base.raw"), &here("c.qcow2")]);
    let c = spec("c.qcow2");
    let mut bytes = std::fs::read(&file).expect("there");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(here("flipped"), bytes).expect("written");
    bad(&["restore", &here("flipped"), &c], "is damaged");
    bad(&["restore", &here("base.raw"), &c], "is no saved VM");
    // Neither is the one the other.
    let restored = blanket(directory.path(), &["run", "--restore", &file]);
    assert_eq!(restored.status.code(), Some(1));
    let error = text(&restored.stderr);
    assert!(error.contains("where there must be machine"), "{error}");
}
