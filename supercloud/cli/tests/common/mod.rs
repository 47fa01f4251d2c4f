//! Agents as processes on loopback, with real TLS and a `blanket` whose VMs are files.
#![allow(dead_code, reason = "each test file uses a part of it")]

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// How long anything may take.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// All hosts of a test.
pub struct Lab {
    directory: tempfile::TempDir,
}

/// A host with an agent.
pub struct Node {
    pub name: String,
    root: PathBuf,
    wire: PathBuf,
    port: u16,
    agent: Option<Child>,
}

/// What a command said.
#[derive(Debug)]
pub struct Said {
    pub code: i32,
    pub out: String,
    pub err: String,
}

impl Said {
    pub fn json(&self) -> Value {
        assert_eq!(self.code, 0, "{self:?}");
        serde_json::from_str(&self.out).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    #[track_caller]
    pub fn ok(self) -> Self {
        assert_eq!(self.code, 0, "{self:?}");
        self
    }

    #[track_caller]
    pub fn fails(self, code: i32, word: &str) -> Self {
        assert_eq!(self.code, code, "{self:?}");
        assert!(self.err.contains(word), "{word}: {self:?}");
        self
    }
}

/// Waits until it holds.
#[track_caller]
pub fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let since = Instant::now();
    while !holds() {
        assert!(since.elapsed() < PATIENCE, "{what}");
        std::thread::sleep(Duration::from_millis(30));
    }
}

impl Lab {
    pub fn new() -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        fs::create_dir(directory.path().join("wire")).expect("made");
        Self { directory }
    }

    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// A file on the wire: `hold-STEP`, `at-STEP`, `cut`.
    pub fn wire(&self, name: &str) -> PathBuf {
        self.path().join("wire").join(name)
    }

    pub fn hold(&self, step: &str) {
        fs::write(self.wire(&format!("hold-{step}")), "").expect("written");
    }

    pub fn wait_held(&self, step: &str) {
        until(&format!("the step {step}"), || {
            self.wire(&format!("at-{step}")).exists()
        });
    }

    pub fn release(&self, step: &str) {
        let _ = fs::remove_file(self.wire(&format!("at-{step}")));
        fs::remove_file(self.wire(&format!("hold-{step}"))).expect("removed");
    }

    /// A host whose agent does not run yet.
    pub fn host(&self, name: &str) -> Node {
        let root = self.path().join(name);
        fs::create_dir(&root).expect("made");
        let probe = TcpListener::bind("127.0.0.1:0").expect("a port");
        Node {
            name: name.into(),
            wire: self.path().join("wire"),
            port: probe.local_addr().expect("bound").port(),
            root,
            agent: None,
        }
    }

    /// A node of a cluster of its own.
    pub fn first(&self, name: &str) -> Node {
        let mut node = self.host(name);
        node.start(&[], &[]);
        node
    }

    /// A node that joins another's cluster.
    pub fn joined(&self, name: &str, to: &Node) -> Node {
        let mut node = self.host(name);
        let token = to.token();
        node.start(&["--join", &token], &[]);
        until("they know each other", || {
            let nodes = to.run(&["node", "list", "--json"]).json();
            let all = nodes.as_array().expect("a list");
            all.iter()
                .any(|it| it["name"] == name && it["reachable"] == true)
        });
        node
    }

    /// A disk image.
    pub fn image(&self, name: &str, bytes: usize) -> PathBuf {
        let path = self.path().join(name);
        fs::write(&path, vec![7; bytes]).expect("written");
        path
    }
}

impl Node {
    fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_supercloud"));
        command
            .env("SUPERCLOUD_RUNTIME_DIR", self.root.join("run"))
            .env("SUPERCLOUD_DATA_DIR", self.root.join("data"))
            .env("SUPERCLOUD_BLANKET", env!("CARGO_BIN_EXE_fake-blanket"))
            .env("BLANKET_RUNTIME_DIR", self.vms())
            .env("FAKE_WIRE", &self.wire)
            .env("SUPERCLOUD_LOG", "debug,hyper=info,rustls=info")
            .env_remove("SUPERCLOUD_NODE")
            .env_remove("SUPERCLOUD_FAIL_AT")
            .stdin(Stdio::null());
        command
    }

    /// Where the VMs of this host are.
    pub fn vms(&self) -> PathBuf {
        self.root.join("vms")
    }

    pub fn data(&self) -> PathBuf {
        self.root.join("data")
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// Starts its agent and waits until that answers.
    pub fn start(&mut self, words: &[&str], variables: &[(&str, &str)]) {
        self.spawn(words, variables);
        until("the agent answers", || {
            assert!(
                self.agent_lives(),
                "{} has ended: {}",
                self.name,
                self.log()
            );
            self.run(&["node", "list"]).code == 0
        });
    }

    fn agent_lives(&mut self) -> bool {
        let agent = self.agent.as_mut().expect("started");
        agent.try_wait().expect("asked").is_none()
    }

    pub fn spawn(&mut self, words: &[&str], variables: &[(&str, &str)]) {
        let log = fs::File::options()
            .create(true)
            .append(true)
            .open(self.root.join("agent.log"))
            .expect("a log");
        let mut command = self.command();
        command
            .args([
                "node",
                "start",
                "--name",
                &self.name,
                "--listen",
                &self.address(),
            ])
            .args(words)
            .envs(variables.iter().copied())
            .stdout(Stdio::null())
            .stderr(log);
        self.agent = Some(command.spawn().expect("started"));
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.root.join("agent.log")).unwrap_or_default()
    }

    /// `kill -9`.
    pub fn kill(&mut self) {
        if let Some(mut agent) = self.agent.take() {
            let _ = agent.kill();
            let _ = agent.wait();
        }
    }

    /// Whether its agent has ended by itself.
    pub fn has_died(&mut self) -> bool {
        let agent = self.agent.as_mut().expect("started");
        agent.try_wait().expect("asked").is_some()
    }

    pub fn restart(&mut self) {
        self.kill();
        self.start(&[], &[]);
    }

    /// What of the environment makes a command this host's, for a shell.
    pub fn environment(&self) -> String {
        let command = self.command();
        let variables = command
            .get_envs()
            .filter_map(|(name, value)| Some(format!("{}='{}'", name.display(), value?.display())));
        variables.collect::<Vec<_>>().join(" ")
    }

    /// Runs a command on this host, with variables.
    pub fn run_with(&self, words: &[&str], variables: &[(&str, &str)]) -> Said {
        let mut command = self.command();
        command.args(words).envs(variables.iter().copied());
        let output: Output = command.output().expect("run");
        Said {
            code: output.status.code().unwrap_or(-1),
            out: String::from_utf8_lossy(&output.stdout).into_owned(),
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// Runs a command on this host.
    pub fn run(&self, words: &[&str]) -> Said {
        self.run_with(words, &[])
    }

    /// Begins a command on this host.
    pub fn begin(&self, words: &[&str]) -> Child {
        self.command()
            .args(words)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("started")
    }

    pub fn token(&self) -> String {
        self.run(&["node", "token"]).ok().out.trim().to_owned()
    }

    /// A VM with a disk on a base image.
    pub fn run_vm(&self, lab: &Lab, name: &str) {
        let image = lab.path().join("base.raw");
        if !image.exists() {
            lab.image("base.raw", 1 << 20);
        }
        let image = image.display().to_string();
        self.run(&["image", "add", &image]).ok();
        self.run(&[
            "vm", "run", "base", "--name", name, "--memory", "16M", "--net", "user",
        ])
        .ok();
    }

    /// The same VM without a network, as a command would have it again.
    pub fn run_vm_as(&self, lab: &Lab, name: &str) {
        let image = lab.path().join("base.raw").display().to_string();
        self.run(&["image", "add", &image]).ok();
        self.run(&["vm", "run", "base", "--name", name, "--memory", "16M"])
            .ok();
    }

    /// What is seen of a VM's process on this host: its phase.
    pub fn phase(&self, vm: &str) -> Option<String> {
        let bytes = fs::read(self.vms().join(format!("{vm}.vm"))).ok()?;
        let vm: Value = serde_json::from_slice(&bytes).ok()?;
        Some(vm["phase"].as_str()?.to_owned())
    }

    /// `kill -9` of the commands that send VMs from here: they hold the files that they write to.
    pub fn kill_senders(&self) {
        for entry in fs::read_dir("/proc").expect("processes").flatten() {
            let file = |name: &str| fs::read(entry.path().join(name)).unwrap_or_default();
            let here = format!("BLANKET_RUNTIME_DIR={}", self.vms().display());
            let has = |bytes: &[u8], word: &str| {
                bytes
                    .split(|byte| *byte == 0)
                    .any(|it| it == word.as_bytes())
            };
            if has(&file("cmdline"), "--lines") && has(&file("environ"), &here) {
                let pid = entry.file_name().to_string_lossy().into_owned();
                let killed = Command::new("kill").args(["-KILL", &pid]).status();
                assert!(killed.expect("run").success());
            }
        }
    }

    /// Kills a VM's process.
    pub fn kill_vm(&self, vm: &str) {
        fs::remove_file(self.vms().join(format!("{vm}.vm"))).expect("it is there");
    }

    /// A VM as its own node has it.
    pub fn vm(&self, name: &str) -> Option<Value> {
        let said = self.run(&["vm", "show", name, "--node", &self.name, "--json"]);
        (said.code == 0).then(|| said.json())
    }

    pub fn operation(&self, id: &str) -> Option<Value> {
        let said = self.run(&["operation", "show", id, "--json"]);
        (said.code == 0).then(|| said.json())
    }

    /// Where a VM is, as this host lists it: its node and its phase.
    pub fn listed(&self, vm: &str) -> Vec<(String, String)> {
        let all = self.run(&["vm", "list", "--json"]).json();
        let all = all.as_array().expect("a list").iter();
        all.filter(|it| it["name"] == vm)
            .map(|it| {
                let word = |value: &Value| value.as_str().expect("a word").to_owned();
                (word(&it["node"]), word(&it["seen"]["phase"]))
            })
            .collect()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            let log = self.log();
            let from = log.len().saturating_sub(6000);
            let from = (from..log.len()).find(|at| log.is_char_boundary(*at));
            eprintln!("---- {}\n{}", self.name, &log[from.unwrap_or(0)..]);
        }
    }
}
