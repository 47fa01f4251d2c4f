//! Stands in for `blanket` in the tests of agents: the same commands and the same words, and
//! VMs that are files. `BLANKET_RUNTIME_DIR` has those of one host; `FAKE_WIRE` is a directory
//! that all hosts share, with a file for each token of a process that waits.
//!
//! A test holds a move at a step by a file `hold-STEP` in `FAKE_WIRE` (begun, copying, received,
//! committed, given, pulling), or disks that are saved or restored (saving, restoring), until it removes that; a file `cut` breaks the link once the VM is committed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// How long a step is held at most.
const HELD: Duration = Duration::from_secs(60);

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Fake {
    name: String,
    uuid: String,
    phase: String,
    incoming: Option<String>,
    token: Option<String>,
    token_file: Option<PathBuf>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Waits {
    directory: PathBuf,
    name: String,
}

type Done = Result<ExitCode, String>;

fn variable(name: &str) -> Result<PathBuf, String> {
    std::env::var_os(name)
        .map(PathBuf::from)
        .ok_or_else(|| format!("{name} is not set"))
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// One host.
struct Host(PathBuf);

impl Host {
    fn here() -> Result<Self, String> {
        let directory = variable("BLANKET_RUNTIME_DIR")?;
        fs::create_dir_all(&directory).map_err(text)?;
        Ok(Self(directory))
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.join(format!("{name}.vm"))
    }

    fn get(&self, name: &str) -> Option<Fake> {
        let bytes = fs::read(self.file(name)).ok()?;
        serde_json::from_slice(&bytes).ok()
    }

    fn need(&self, name: &str) -> Result<Fake, String> {
        self.get(name)
            .ok_or_else(|| format!("no VM named {name} is running"))
    }

    fn put(&self, vm: &Fake) -> Result<(), String> {
        let bytes = serde_json::to_vec(vm).map_err(text)?;
        let part = self
            .0
            .join(format!("{}.part{}", vm.name, std::process::id()));
        fs::write(&part, bytes).map_err(text)?;
        fs::rename(part, self.file(&vm.name)).map_err(text)
    }

    fn set(&self, name: &str, phase: &str) -> Result<(), String> {
        let vm = self.need(name)?;
        self.put(&Fake {
            phase: phase.into(),
            ..vm
        })
    }

    /// A VM is given to its process here.
    fn given(&self, name: &str) -> Result<(), String> {
        let file = self.need(name)?.token_file.ok_or("no token file")?;
        fs::write(file, "").map_err(text)
    }

    fn is(&self, name: &str, phase: &str) -> bool {
        self.get(name).is_some_and(|vm| vm.phase == phase)
    }

    fn end(&self, name: &str) {
        let _ = fs::remove_file(self.file(name));
    }
}

fn option<'a>(words: &'a [String], name: &str) -> Option<&'a str> {
    let at = words.iter().position(|word| word == name)?;
    words.get(at + 1).map(String::as_str)
}

fn has(words: &[String], name: &str) -> bool {
    words.iter().any(|word| word == name)
}

fn run(words: &[String]) -> Done {
    let host = Host::here()?;
    let name = option(words, "--name").ok_or("no name")?;
    if host.get(name).is_some() {
        return Err(format!("a VM named {name} is running"));
    }
    if host.0.join("refuse").exists() {
        return Err("it cannot be started here\n  try something else".into());
    }
    if let Some(cpu) = option(words, "--cpu") {
        for other in ["--restore", "--incoming"] {
            if has(words, other) {
                return Err(format!(
                    "the argument '--cpu' cannot be used with '{other}'"
                ));
            }
        }
        fs::write(host.0.join(format!("{name}.cpu")), cpu).map_err(text)?;
    }
    for (at, word) in words.iter().enumerate() {
        if let ("--disk" | "--kernel" | "--initrd", Some(value)) =
            (word.as_str(), words.get(at + 1))
        {
            let path = value.split(',').next().unwrap_or_default();
            if !Path::new(path).exists() {
                return Err(format!("{path}: no such file"));
            }
            if word == "--disk" && fs::File::open(path).map_err(text)?.try_lock().is_err() {
                return Err(format!("the image {path} is in use"));
            }
        }
    }
    let mut vm = Fake {
        name: name.into(),
        uuid: option(words, "--uuid").ok_or("no uuid")?.into(),
        phase: "running".into(),
        incoming: None,
        token: None,
        token_file: None,
    };
    if let Some(saved) = option(words, "--restore") {
        // The disks are new, and what was in them comes with it.
        let bytes = fs::read(saved).map_err(text)?;
        let saved: Fake = serde_json::from_slice(&bytes).map_err(|_| "is no saved VM")?;
        fs::write(host.0.join(format!("{name}.was")), saved.uuid).map_err(text)?;
        if has(words, "--memory") {
            return Err("the argument '--memory' cannot be used with '--restore'".into());
        }
    }
    if let Some(file) = option(words, "--token-file") {
        let token = format!("{}-{}", vm.uuid, std::process::id());
        let waits = Waits {
            directory: host.0.clone(),
            name: name.into(),
        };
        let wire = variable("FAKE_WIRE")?.join(&token);
        fs::write(wire, serde_json::to_vec(&waits).map_err(text)?).map_err(text)?;
        fs::write(file, format!("{token}\n")).map_err(text)?;
        vm.phase = "waiting".into();
        vm.incoming = Some("127.0.0.1:7199".into());
        vm.token = Some(token);
        vm.token_file = Some(file.into());
    }
    host.put(&vm)?;
    if let Some(console) = option(words, "--console").and_then(|it| it.strip_prefix("file:")) {
        let mut log = fs::File::options()
            .create(true)
            .append(true)
            .open(console)
            .map_err(text)?;
        std::io::Write::write_all(&mut log, format!("{} boots\n", vm.phase).as_bytes())
            .map_err(text)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn ps() -> Done {
    let host = Host::here()?;
    let mut all: Vec<Value> = Vec::new();
    for entry in fs::read_dir(&host.0).map_err(text)?.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if let Some(vm) = name.strip_suffix(".vm").and_then(|name| host.get(name)) {
            all.push(json!({
                "name": vm.name, "uuid": vm.uuid, "pid": 1, "host": "module", "phase": vm.phase,
                "incoming": vm.incoming, "uptime_seconds": 1.5,
            }));
        }
    }
    println!("{}", Value::Array(all));
    Ok(ExitCode::SUCCESS)
}

fn save(words: &[String]) -> Done {
    let host = Host::here()?;
    let [.., name, file] = words else {
        return Err("no name and file".into());
    };
    let vm = host.need(name)?;
    if !has(words, "--disks") || !has(words, "--keep-running") || Path::new(file).exists() {
        return Err(format!("{file} is there already"));
    }
    fs::write(file, serde_json::to_vec(&vm).map_err(text)?).map_err(text)?;
    println!("{}", json!({ "bytes": 1, "pages": 1, "stood_ms": 12 }));
    Ok(ExitCode::SUCCESS)
}

/// Networks that were taken and given are noted.
fn net(words: &[String]) -> Done {
    let host = Host::here()?;
    let [does, name, what] = words else {
        return Err("no name and network".into());
    };
    host.need(name)?;
    let mut log = fs::File::options()
        .create(true)
        .append(true)
        .open(host.0.join(format!("{name}.nets")))
        .map_err(text)?;
    std::io::Write::write_all(&mut log, format!("{does} {what}\n").as_bytes()).map_err(text)?;
    Ok(ExitCode::SUCCESS)
}

fn kill(words: &[String]) -> Done {
    let host = Host::here()?;
    let name = words.last().ok_or("no name")?;
    let vm = host.need(name)?;
    let waits = matches!(vm.phase.as_str(), "waiting" | "receiving" | "received");
    if has(words, "--waiting") && !waits {
        return Err(format!("{name}: it runs, or is being started"));
    }
    host.end(name);
    Ok(ExitCode::SUCCESS)
}

/// Until a test lets it go on, or a while has passed.
fn hold(wire: &Path, step: &str) {
    let held = wire.join(format!("hold-{step}"));
    if !held.exists() {
        return;
    }
    let _ = fs::write(wire.join(format!("at-{step}")), "");
    let since = Instant::now();
    while held.exists() && since.elapsed() < HELD {
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn line(stage: &str, rounds: u32) {
    println!(
        "{}",
        json!({ "stage": stage, "rounds": rounds, "pages": 10, "bytes": 1 << 20, "dirty": 5, "share": 100 })
    );
}

fn moved() -> Done {
    println!(
        "{}",
        json!({
            "stage": "moved", "rounds": 3, "pages": 30, "bytes": 1 << 20, "dirty": 0,
            "share": 100, "took_ms": 1000, "downtime_ms": 25,
        })
    );
    Ok(ExitCode::SUCCESS)
}

/// The destination of a token, if its process waits or runs.
fn destination(wire: &Path, token: &str) -> Option<(Host, String)> {
    let bytes = fs::read(wire.join(token)).ok()?;
    let waits: Waits = serde_json::from_slice(&bytes).ok()?;
    let host = Host(waits.directory);
    let vm = host.get(&waits.name)?;
    (vm.token.as_deref() == Some(token)).then_some((host, waits.name))
}

fn cut(name: &str) -> Done {
    line("cut", 3);
    eprintln!("blanket: {name} runs there as far as it has its memory");
    Ok(ExitCode::from(9))
}

fn doubt(name: &str) -> Done {
    eprintln!("blanket: {name} stands still, and may run there");
    Ok(ExitCode::from(9))
}

fn migrate(words: &[String]) -> Done {
    let host = Host::here()?;
    let name = words.first().ok_or("no name")?.as_str();
    let vm = host.need(name)?;
    if has(words, "--cancel") {
        if vm.phase != "sending" {
            return Err(format!("{name}: it is not being moved"));
        }
        host.set(name, "running")?;
        return Ok(ExitCode::SUCCESS);
    }
    if has(words, "--keep") {
        if !matches!(vm.phase.as_str(), "doubt" | "received") {
            return Err(format!("{name}: there is no doubt where it is"));
        }
        if vm.phase == "received" {
            host.given(name)?;
        }
        host.set(name, "running")?;
        return Ok(ExitCode::SUCCESS);
    }
    if has(words, "--follow") {
        while ["sending", "standing", "serving"]
            .iter()
            .any(|it| host.is(name, it))
        {
            line("copying", 1);
            std::thread::sleep(Duration::from_millis(50));
        }
        host.need(name)?;
        line("kept", 1);
        return Ok(ExitCode::SUCCESS);
    }
    let wire = variable("FAKE_WIRE")?;
    let token = std::env::var("BLANKET_TOKEN").map_err(text)?;
    let there = destination(&wire, &token);
    if vm.phase == "cut" {
        return match there {
            Some((there, at)) if !wire.join("cut").exists() => {
                there.set(&at, "running")?;
                host.end(name);
                moved()
            }
            _ => cut(name),
        };
    }
    if vm.phase == "doubt" {
        // It asks again.
        return match there {
            Some((there, at)) if !wire.join("cut").exists() => {
                there.given(&at)?;
                there.set(&at, "running")?;
                host.end(name);
                moved()
            }
            _ => doubt(name),
        };
    }
    if vm.phase != "running" {
        return Err(format!("{name}: the VM is being moved already"));
    }
    let Some((there, at)) = there else {
        return Err("the destination: connection refused".into());
    };
    if there.need(&at)?.uuid != vm.uuid {
        return Err(format!(
            "{name}: the destination cannot have it: it waits for another VM"
        ));
    }
    if has(words, "--dry-run") {
        line("fits", 0);
        return Ok(ExitCode::SUCCESS);
    }
    hold(&wire, "begun");
    host.set(name, "sending")?;
    there.set(&at, "receiving")?;
    for round in 0..3 {
        line("copying", round);
        std::thread::sleep(Duration::from_millis(30));
    }
    hold(&wire, "copying");
    let gone = || destination(&wire, &token).is_none();
    if host.get(name).is_none() {
        // Its process was killed, and the destination's process sees it.
        there.end(&at);
        return Err(format!("{name} ended before it could answer"));
    }
    if !host.is(name, "sending") || gone() {
        let cancelled = !host.is(name, "sending");
        host.set(name, "running")?;
        there.end(&at);
        let why = if cancelled {
            "the migration was cancelled"
        } else {
            "the link broke"
        };
        return Err(format!("{name}: {why}"));
    }
    host.set(name, "standing")?;
    there.set(&at, "received")?;
    line("standing", 3);
    hold(&wire, "received");
    if host.get(name).is_none() {
        return Err(format!("{name} ended before it could answer"));
    }
    if gone() {
        host.set(name, "running")?;
        return Err(format!("{name}: the link broke"));
    }
    host.set(name, "doubt")?;
    hold(&wire, "committed");
    if wire.join("cut").exists() || gone() {
        return doubt(name);
    }
    there.given(&at)?;
    hold(&wire, "given");
    if gone() {
        return doubt(name);
    }
    if option(words, "--post-copy") == Some("now") {
        host.set(name, "serving")?;
        there.set(&at, "pulling")?;
        line("pulling", 3);
        hold(&wire, "pulling");
        if host.get(name).is_none() {
            // It has seen the process end, and tells.
            if !gone() {
                there.set(&at, "lost")?;
            }
            return Err(format!(
                "the process of {name} has ended while it was being moved"
            ));
        }
        if wire.join("cut").exists() || gone() {
            host.set(name, "cut")?;
            return cut(name);
        }
    }
    there.set(&at, "running")?;
    host.end(name);
    moved()
}

/// A disk that no VM uses: its path, and what it stands on.
fn at_rest(spec: &str) -> (&Path, Option<&str>) {
    let mut parts = spec.split(',');
    let path = parts.next().unwrap_or_default();
    (
        Path::new(path),
        parts.find_map(|it| it.strip_prefix("base=")),
    )
}

/// What is in disks, as `disk save` and `disk restore` have it in a file.
#[derive(Debug, Serialize, Deserialize)]
struct Disks {
    disks: Vec<(Option<String>, String)>,
}

fn save_disks(words: &[String]) -> Done {
    let [json, file, specs @ ..] = words else {
        return Err("no file".into());
    };
    let part = format!("{file}.part");
    if json != "--json" || Path::new(file).exists() || Path::new(&part).exists() {
        return Err(format!("{file} is there already"));
    }
    fs::write(&part, "").map_err(text)?;
    let (mut saved, mut sizes, mut locked) = (Vec::new(), Vec::new(), Vec::new());
    for (path, base) in specs.iter().map(|it| at_rest(it)) {
        let image = fs::File::open(path).map_err(|error| format!("{}: {error}", path.display()))?;
        image.try_lock_shared().map_err(text)?;
        let bytes = fs::read(path).map_err(text)?;
        let info: Value = serde_json::from_slice(&bytes).unwrap_or_default();
        sizes.push(info["size"].as_u64().unwrap_or(bytes.len() as u64));
        let content = String::from_utf8(bytes).map_err(text)?;
        saved.push((base.map(str::to_owned), content));
        locked.push(image);
    }
    hold(&variable("FAKE_WIRE")?, "saving");
    let saved = serde_json::to_vec(&Disks { disks: saved }).map_err(text)?;
    // Whoever wanted it may have removed it.
    fs::rename(&part, file).map_err(text)?;
    fs::write(file, saved).map_err(text)?;
    println!("{}", json!({ "bytes": 1, "sizes": sizes }));
    Ok(ExitCode::SUCCESS)
}

fn restore_disks(words: &[String]) -> Done {
    let [file, specs @ ..] = words else {
        return Err("no file".into());
    };
    let saved: Disks = serde_json::from_slice(&fs::read(file).map_err(text)?)
        .map_err(|error| format!("{file}: is damaged: {error}"))?;
    if saved.disks.len() != specs.len() {
        return Err(format!("{file}: there are other disks"));
    }
    hold(&variable("FAKE_WIRE")?, "restoring");
    for ((there, content), (path, here)) in
        saved.disks.iter().zip(specs.iter().map(|it| at_rest(it)))
    {
        if there.as_deref() != here || !path.exists() {
            return Err(format!("{} is another disk", path.display()));
        }
        fs::write(path, content).map_err(text)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn disk(words: &[String]) -> Done {
    match words.first().map(String::as_str) {
        Some("save") => return save_disks(&words[1..]),
        Some("restore") => return restore_disks(&words[1..]),
        _ => {}
    }
    let file = words.last().ok_or("no file")?;
    match words.first().map(String::as_str) {
        Some("create") => {
            let format = option(words, "--format").unwrap_or("qcow2");
            let size = option(words, "--size").and_then(|it| it.strip_suffix('K'));
            let size: u64 = size.ok_or("no size")?.parse().map_err(text)?;
            if let Some(backing) = option(words, "--backing")
                && !Path::new(backing).exists()
            {
                return Err(format!("{backing}: no such file"));
            }
            let image = json!({ "format": format, "size": size << 10 }).to_string();
            fs::write(file, image).map_err(text)?;
        }
        Some("seed") => {
            let cloud_init = option(words, "--cloud-init").ok_or("no cloud-init")?;
            let user = fs::read(cloud_init).map_err(|error| format!("{cloud_init}: {error}"))?;
            fs::write(file, user).map_err(text)?;
        }
        _ => {
            let bytes = fs::read(file).map_err(|error| format!("{file}: {error}"))?;
            let image: Value = serde_json::from_slice(&bytes)
                .unwrap_or_else(|_| json!({ "format": "raw", "size": bytes.len() }));
            println!("{}", json!([image]));
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// What is in the file `cpu.json` of the host, if there is one.
fn cpu() -> Done {
    let file = Host::here()?.0.join("cpu.json");
    let one = json!({
        "host": "fake", "vendor": "FakeFakeFake", "features": ["avx", "sse2"],
        "hides_all": true, "components": {},
    });
    println!(
        "{}",
        fs::read_to_string(&file).unwrap_or_else(|_| one.to_string())
    );
    Ok(ExitCode::SUCCESS)
}

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let rest = words.get(1..).unwrap_or_default();
    let done = match words.first().map(String::as_str) {
        Some("run") => run(rest),
        Some("ps") => ps(),
        Some("kill") => kill(rest),
        Some("save") => save(rest),
        Some("net") => net(rest),
        Some("stop") => kill(rest.get(..1).unwrap_or_default()),
        Some("migrate") => migrate(rest),
        Some("disk") => disk(rest),
        Some("doctor") => {
            let check = json!({ "name": "cpu", "state": "ok", "text": "is one", "mend": null });
            println!("{}", json!({ "ok": true, "checks": [check], "facts": {} }));
            Ok(ExitCode::SUCCESS)
        }
        Some("cpu") => cpu(),
        Some("console") => {
            println!(
                "console of {}",
                rest.first().map_or("nobody", String::as_str)
            );
            std::io::copy(&mut std::io::stdin(), &mut std::io::stdout())
                .map(|_| ExitCode::SUCCESS)
                .map_err(text)
        }
        other => Err(format!("{other:?} is nothing that the fake does")),
    };
    done.unwrap_or_else(|error| {
        eprintln!("blanket: {error}");
        ExitCode::FAILURE
    })
}
