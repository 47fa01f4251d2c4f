//! The `blanket` command, which runs VMs. What it says of them is the truth; an agent only
//! remembers what they are to be.

mod disk;

use std::ffi::OsString;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use supercloud_api::{Code, Error, Finding, Level, NodeCpu, PostCopy, Progress};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, BufReader};
use tokio::process::Command;

/// How long a command may take that only looks.
const LOOK: Duration = Duration::from_secs(60);

/// How long a VM may take to be written to a file, with its disks.
const SAVE: Duration = Duration::from_secs(3600);

/// How often it is looked what a move says.
const TAIL: Duration = Duration::from_millis(200);
/// Most that a move says: a line of 200 bytes for each quarter of a second of some hours.
const SAID: u64 = 16 << 20;

/// `blanket migrate` does not know where the VM is.
const DOUBT: i32 = 9;

pub use disk::{DiskInfo, disk_option};

/// The command.
#[derive(Clone, Debug)]
pub struct Blanket {
    program: PathBuf,
}

/// A VM that has a process (`blanket ps --json`).
#[derive(Clone, Debug, Deserialize)]
pub struct Process {
    /// Its name.
    pub name: String,
    /// Its identity.
    pub uuid: String,
    /// The process.
    pub pid: u32,
    /// What it runs on.
    pub host: String,
    /// What its process does with it.
    pub phase: Phase,
    /// Where it may come from another host.
    pub incoming: Option<SocketAddr>,
    /// For how long there is a process.
    pub uptime_seconds: f64,
}

/// What a VM's process does with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// It is being started.
    Starting,
    /// It waits for a VM of another host.
    Waiting,
    /// It is coming.
    Receiving,
    /// All of it is here; its source has not given it.
    Received,
    /// It runs.
    Running,
    /// It runs, and is being sent.
    Sending,
    /// It stands still, on its way.
    Standing,
    /// It stands still, and may run elsewhere.
    Doubt,
    /// It runs elsewhere, and a part of its memory is still here.
    Serving,
    /// The same, without a link to there.
    Cut,
    /// It runs, and a part of its memory is still where it has come from.
    Pulling,
    /// A part of its memory is lost: it does nothing more.
    Lost,
    /// It has ended here.
    Ended,
}

impl Phase {
    /// All of them.
    pub const ALL: [Self; 13] = [
        Self::Starting,
        Self::Waiting,
        Self::Receiving,
        Self::Received,
        Self::Running,
        Self::Sending,
        Self::Standing,
        Self::Doubt,
        Self::Serving,
        Self::Cut,
        Self::Pulling,
        Self::Lost,
        Self::Ended,
    ];

    /// Its word.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Waiting => "waiting",
            Self::Receiving => "receiving",
            Self::Received => "received",
            Self::Running => "running",
            Self::Sending => "sending",
            Self::Standing => "standing",
            Self::Doubt => "doubt",
            Self::Serving => "serving",
            Self::Cut => "cut",
            Self::Pulling => "pulling",
            Self::Lost => "lost",
            Self::Ended => "ended",
        }
    }
}

/// A VM as `blanket run` is to have it.
#[derive(Clone, Debug, Default)]
pub struct Run {
    /// Its name.
    pub name: String,
    /// Its identity.
    pub uuid: String,
    /// Its memory, bytes.
    pub memory: u64,
    /// vCPUs.
    pub cpus: u32,
    /// Its CPU, if it boots and does not go on from elsewhere, where it had one.
    pub cpu: Option<String>,
    /// Kernel.
    pub kernel: Option<PathBuf>,
    /// Initrd.
    pub initrd: Option<PathBuf>,
    /// Kernel command line.
    pub cmdline: String,
    /// Disks, as for `--disk`.
    pub disks: Vec<String>,
    /// Networks, as for `--net`.
    pub nets: Vec<String>,
    /// `auto`, `module` or `kvm`.
    pub host: Option<String>,
    /// The file that its console is written to.
    pub console: PathBuf,
    /// What it goes on from, instead of a boot.
    pub restore: Option<PathBuf>,
    /// It goes on before its memory is unpacked.
    pub lazy: bool,
}

/// How a VM is to move.
#[derive(Clone, Debug)]
pub struct Wishes {
    /// How long it may stand still, milliseconds.
    pub max_downtime_ms: Option<u64>,
    /// Bytes for each second.
    pub bandwidth: Option<u64>,
    /// Connections at once.
    pub streams: Option<u8>,
    /// Only ask.
    pub dry_run: bool,
    /// Seconds to try to reach a destination that is lost when the VM changes hands.
    pub patience: u64,
    /// Whether a part of its memory may follow it.
    pub post_copy: PostCopy,
}

/// What came of a move.
#[derive(Clone, Debug)]
pub enum Outcome {
    /// It has moved; or it fits, if it was only asked.
    Done(Progress),
    /// It runs here.
    Kept(Error),
    /// Nobody knows.
    Doubt(Error),
    /// It runs there, and the rest of its memory cannot follow for want of a link.
    Cut(Error),
}

impl Blanket {
    /// The command at a path.
    #[must_use]
    pub fn new(program: PathBuf) -> Self {
        Self { program }
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command
            .args(words)
            .stdin(Stdio::null())
            // A Ctrl-C for the agent is not for it: what it begins outlives the agent.
            .process_group(0);
        command
    }

    async fn output(&self, mut command: Command, patience: Duration) -> Result<Output, Error> {
        let output = tokio::time::timeout(patience, command.output()).await;
        match output {
            Ok(Ok(output)) => Ok(output),
            Ok(Err(error)) => Err(self.missing(&error)),
            Err(_) => Err(Error::failed(format!(
                "{} takes longer than {} seconds",
                self.program.display(),
                patience.as_secs()
            ))),
        }
    }

    fn missing(&self, error: &std::io::Error) -> Error {
        Error::new(
            Code::Failed,
            format!("{}: {error}", self.program.display()),
            "install the package blanket, or set SUPERCLOUD_BLANKET to the command",
        )
    }

    async fn done(&self, command: Command, patience: Duration) -> Result<Output, Error> {
        let output = self.output(command, patience).await?;
        if output.status.success() {
            Ok(output)
        } else {
            Err(said(&output))
        }
    }

    async fn json<T: DeserializeOwned>(&self, words: &[&str]) -> Result<T, Error> {
        let output = self.done(self.command(words), LOOK).await?;
        self.read(&output.stdout)
    }

    fn read<T: DeserializeOwned>(&self, bytes: &[u8]) -> Result<T, Error> {
        serde_json::from_slice(bytes).map_err(|error| {
            Error::new(
                Code::Failed,
                format!(
                    "{} says what is not understood: {error}",
                    self.program.display()
                ),
                "blanket and supercloud are of one release: install both packages",
            )
        })
    }

    /// VMs that have a process.
    ///
    /// # Errors
    /// The command.
    pub async fn ps(&self) -> Result<Vec<Process>, Error> {
        self.json(&["ps", "--json"]).await
    }

    /// Starts a VM. Returns once it runs.
    ///
    /// # Errors
    /// The command's own.
    pub async fn run(&self, run: &Run, patience: Duration) -> Result<(), Error> {
        let mut command = self.command(&["run", "--detach", "--json"]);
        if run.restore.is_none()
            && let Some(cpu) = &run.cpu
        {
            command.args(["--cpu", cpu]);
        }
        options(&mut command, run);
        self.done(command, patience).await?;
        Ok(())
    }

    /// Starts the process that a VM of another host is to come to. Returns once it waits.
    ///
    /// # Errors
    /// The command's own.
    pub async fn run_incoming(&self, run: &Run, at: IpAddr, token: &Path) -> Result<(), Error> {
        let mut command = self.command(&["run", "--detach", "--json", "--incoming"]);
        command
            .arg(SocketAddr::new(at, 0).to_string())
            .arg("--token-file")
            .arg(token);
        options(&mut command, run);
        self.done(command, LOOK).await?;
        Ok(())
    }

    /// Writes a VM to a new file, with what is in its disks; it runs on. For how many milliseconds
    /// it stood still.
    ///
    /// # Errors
    /// The command's own.
    pub async fn save(&self, name: &str, to: &Path) -> Result<u64, Error> {
        #[derive(Deserialize)]
        struct Saved {
            stood_ms: u64,
        }
        let mut command = self.command(&["save", "--disks", "--keep-running", "--json", name]);
        command.arg(to);
        let output = self.done(command, SAVE).await?;
        self.read::<Saved>(&output.stdout).map(|it| it.stood_ms)
    }

    /// Gives a VM that runs another network.
    ///
    /// # Errors
    /// The command's own.
    pub async fn net_attach(&self, name: &str, spec: &str) -> Result<(), Error> {
        let command = self.command(&["net", "attach", name, spec]);
        self.done(command, LOOK).await.map(drop)
    }

    /// Takes a network from a VM that runs, by its number.
    ///
    /// # Errors
    /// The command's own.
    pub async fn net_detach(&self, name: &str, number: usize) -> Result<(), Error> {
        let command = self.command(&["net", "detach", name, &number.to_string()]);
        self.done(command, LOOK).await.map(drop)
    }

    /// Asks a VM's guest to power off, and waits until it has.
    ///
    /// # Errors
    /// It does not.
    pub async fn stop(&self, name: &str, seconds: u64) -> Result<(), Error> {
        let seconds_text = seconds.to_string();
        let command = self.command(&["stop", name, "--timeout", &seconds_text]);
        let patience = Duration::from_secs(seconds.saturating_add(60));
        self.done(command, patience).await.map(drop)
    }

    /// Ends a VM at once.
    ///
    /// # Errors
    /// The command's own.
    pub async fn kill(&self, name: &str) -> Result<(), Error> {
        self.done(self.command(&["kill", name]), LOOK)
            .await
            .map(drop)
    }

    /// Ends a process that waits for a VM, if the VM was not given to it.
    ///
    /// # Errors
    /// It was.
    pub async fn dismiss(&self, name: &str) -> Result<(), Error> {
        self.done(self.command(&["kill", "--waiting", name]), LOOK)
            .await
            .map(drop)
    }

    /// Moves a VM, or asks again what became of it. What it says on its way is written to the
    /// file `says`, by which another agent finds it if this one is killed. `heard` is told how
    /// far it is.
    pub async fn migrate(
        &self,
        name: &str,
        to: &str,
        token: &str,
        wishes: &Wishes,
        says: &Path,
        mut heard: impl FnMut(Progress) + Send,
    ) -> Outcome {
        let mut command = self.command(&["migrate", name, "--lines", "--to", to]);
        // Not among the arguments, which others can read.
        command.env("BLANKET_TOKEN", token);
        let patience = wishes.patience.to_string();
        command.args(["--patience", &patience]);
        if let Some(ms) = wishes.max_downtime_ms {
            command.args(["--max-downtime", &ms.to_string()]);
        }
        if let Some(bytes) = wishes.bandwidth {
            // `blanket` wants a unit.
            command.args(["--bandwidth", &format!("{}K", bytes.div_ceil(1024))]);
        }
        if let Some(streams) = wishes.streams {
            command.args(["--streams", &streams.to_string()]);
        }
        command.args(["--post-copy", wishes.post_copy.word()]);
        if wishes.dry_run {
            command.arg("--dry-run");
        }
        let failed = |error: std::io::Error| Error::failed(format!("{}: {error}", says.display()));
        let file = std::fs::File::options()
            .create(true)
            .append(true)
            .open(says)
            .map_err(failed);
        let (file, mut from) = match file.and_then(|file| {
            let length = file.metadata().map_err(failed)?.len();
            // It belongs to what is open: the process that is started has it to its end.
            flock(&file, FlockOperation::NonBlockingLockExclusive)
                .map_err(|error| failed(error.into()))?;
            Ok((file, length))
        }) {
            Ok(opened) => opened,
            Err(error) => return Outcome::Kept(error),
        };
        let spawned = command.stdout(file).stderr(Stdio::piped()).spawn();
        let mut child = match spawned {
            Ok(child) => child,
            Err(error) => return Outcome::Kept(self.missing(&error)),
        };
        let mut said_text = Vec::new();
        let stderr = child.stderr.take();
        let mut last = Progress::default();
        let mut tell = |from: &mut u64| {
            for progress in lines_after(says, from) {
                last = progress.clone();
                heard(progress);
            }
        };
        let looking = async {
            loop {
                tokio::time::sleep(TAIL).await;
                tell(&mut from);
            }
        };
        let ending = async {
            if let Some(mut stderr) = stderr {
                // What was read until it broke is all there is to say.
                let _ = stderr.read_to_end(&mut said_text).await;
            }
            child.wait().await.ok().and_then(|status| status.code())
        };
        let code = tokio::select! {
            code = ending => code,
            () = looking => None,
        };
        tell(&mut from);
        outcome(code, last, &said_text)
    }

    /// Follows a move that was begun before.
    pub async fn follow(&self, name: &str, heard: impl FnMut(Progress) + Send) -> Outcome {
        let command = self.command(&["migrate", name, "--follow", "--lines"]);
        self.moved(command, heard).await
    }

    async fn moved(&self, mut command: Command, mut heard: impl FnMut(Progress) + Send) -> Outcome {
        let spawned = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn();
        let mut child = match spawned {
            Ok(child) => child,
            Err(error) => return Outcome::Kept(self.missing(&error)),
        };
        let mut last = Progress::default();
        let mut said_text = Vec::new();
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let lines = async {
            let Some(stdout) = stdout else { return };
            let mut lines = BufReader::new(stdout).lines();
            while let Ok(Some(line)) = lines.next_line().await {
                if let Ok(progress) = serde_json::from_str::<Progress>(&line) {
                    last = progress.clone();
                    heard(progress);
                }
            }
        };
        let errors = async {
            if let Some(mut stderr) = stderr {
                // What was read until it broke is all there is to say.
                let _ = stderr.read_to_end(&mut said_text).await;
            }
        };
        tokio::join!(lines, errors);
        let code = child.wait().await.ok().and_then(|status| status.code());
        outcome(code, last, &said_text)
    }

    /// Leaves a VM that is being sent where it is, if it is not too late.
    ///
    /// # Errors
    /// It is.
    pub async fn cancel(&self, name: &str) -> Result<(), Error> {
        let command = self.command(&["migrate", name, "--cancel"]);
        self.done(command, LOOK).await.map(drop)
    }

    /// A VM whose place is in doubt goes on here.
    ///
    /// # Errors
    /// There is no doubt.
    pub async fn keep(&self, name: &str) -> Result<(), Error> {
        let command = self.command(&["migrate", name, "--keep"]);
        self.done(command, LOOK).await.map(drop)
    }

    /// What VMs find in the CPU, on `module` or `kvm` if that is said.
    ///
    /// # Errors
    /// The command's own: VMs do not run on that here.
    pub async fn cpu(&self, host: Option<&str>) -> Result<NodeCpu, Error> {
        let words = ["cpu", "--json"].into_iter();
        let host = host.into_iter().flat_map(|host| ["--host", host]);
        let words: Vec<&str> = words.chain(host).collect();
        self.json(&words).await
    }

    /// What `blanket doctor` finds.
    ///
    /// # Errors
    /// There is no such command.
    pub async fn doctor(&self) -> Result<Vec<Finding>, Error> {
        #[derive(Deserialize)]
        struct Report {
            checks: Vec<Check>,
        }
        #[derive(Deserialize)]
        struct Check {
            name: String,
            state: String,
            text: String,
            mend: Option<String>,
        }
        let output = self
            .output(self.command(&["doctor", "--json"]), LOOK)
            .await?;
        let report: Report = self.read(&output.stdout)?;
        let finding = |check: Check| Finding {
            check: format!("blanket {}", check.name),
            level: match check.state.as_str() {
                "ok" => Level::Ok,
                "warn" => Level::Warn,
                _ => Level::Fail,
            },
            text: check.text,
            mend: check.mend,
        };
        Ok(report.checks.into_iter().map(finding).collect())
    }

    /// Attaches to a VM's console: a process whose standard input and output are it.
    ///
    /// # Errors
    /// There is no such command.
    pub fn console(&self, name: &str) -> Result<tokio::process::Child, Error> {
        self.command(&["console", name])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .map_err(|error| self.missing(&error))
    }
}

fn outcome(code: Option<i32>, last: Progress, said: &[u8]) -> Outcome {
    match code {
        Some(0) if matches!(last.stage.as_str(), "moved" | "fits") => Outcome::Done(last),
        Some(0) => Outcome::Kept(Error::new(Code::Cancelled, "it was cancelled", "")),
        Some(DOUBT) if last.stage == "cut" => Outcome::Cut(words(said)),
        Some(DOUBT) => Outcome::Doubt(words(said)),
        _ => Outcome::Kept(words(said)),
    }
}

/// What `blanket migrate` has written to a file behind a place, as far as its lines are whole.
fn lines_after(file: &Path, from: &mut u64) -> Vec<Progress> {
    use std::io::{Read as _, Seek as _, SeekFrom};
    let read = || {
        let mut file = std::fs::File::open(file)?;
        file.seek(SeekFrom::Start(*from))?;
        let mut bytes = Vec::new();
        file.take(SAID).read_to_end(&mut bytes)?;
        Ok::<_, std::io::Error>(bytes)
    };
    let bytes = read().unwrap_or_default();
    let whole = bytes
        .iter()
        .rposition(|byte| *byte == b'\n')
        .map_or(0, |at| at + 1);
    *from += whole as u64;
    let lines = bytes
        .get(..whole)
        .unwrap_or_default()
        .split(|byte| *byte == b'\n');
    lines
        .filter_map(|line| serde_json::from_slice(line).ok())
        .collect()
}

/// Whether the process that writes this file has not ended.
#[must_use]
pub fn is_moving(file: &Path) -> bool {
    std::fs::File::open(file)
        .is_ok_and(|file| flock(&file, FlockOperation::NonBlockingLockShared).is_err())
}

/// How a move ended that another agent had begun, if it has moved and its file says so.
#[must_use]
pub fn said_moved(file: &Path) -> Option<Progress> {
    let last = lines_after(file, &mut 0).pop()?;
    (last.stage == "moved").then_some(last)
}

fn options(command: &mut Command, run: &Run) {
    command.args(["--name", &run.name, "--uuid", &run.uuid]);
    match &run.restore {
        // It has the memory and vCPUs that it had.
        Some(saved) => {
            command.arg("--restore").arg(saved);
            command.args(run.lazy.then_some("--lazy"))
        }
        None => {
            let size = format!("{}K", run.memory.div_ceil(1024));
            command.args(["--memory", &size, "--cpus", &run.cpus.to_string()])
        }
    };
    for (option, file) in [("--kernel", &run.kernel), ("--initrd", &run.initrd)] {
        if let Some(file) = file {
            command.arg(option).arg(file);
        }
    }
    if !run.cmdline.is_empty() {
        command.arg(format!("--cmdline={}", run.cmdline));
    }
    for disk in &run.disks {
        command.args(["--disk", disk]);
    }
    for net in &run.nets {
        command.args(["--net", net]);
    }
    if let Some(host) = &run.host {
        command.args(["--host", host]);
    }
    let mut console = OsString::from("file:");
    console.push(&run.console);
    command.arg("--console").arg(console);
}

/// What the command said when it failed: `blanket: MESSAGE`, and in a further line what to do.
fn said(output: &Output) -> Error {
    words(&output.stderr)
}

fn words(stderr: &[u8]) -> Error {
    let text = String::from_utf8_lossy(stderr);
    let lines: Vec<&str> = text
        .lines()
        .map(str::trim_end)
        .filter(|line| !line.is_empty())
        .collect();
    // Warnings come first; what it ends with is behind its own name.
    let at = lines
        .iter()
        .rposition(|line| line.starts_with("blanket: ") || line.starts_with("error: "));
    let (message, hint) = match at {
        Some(at) => {
            let message = lines.get(at).copied().unwrap_or_default();
            let hint: Vec<&str> = lines.iter().skip(at + 1).map(|line| line.trim()).collect();
            (message, hint.join(" "))
        }
        None => (lines.last().copied().unwrap_or_default(), String::new()),
    };
    let message = message
        .trim_start_matches("blanket: ")
        .trim_start_matches("error: ");
    if message.is_empty() {
        return Error::failed("blanket ended without a word");
    }
    Error::new(Code::Failed, message, hint)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_it_says_is_an_error_and_a_hint() {
        let error = words(b" WARN something\nblanket: web: no such thing\n  do this\n");
        assert_eq!(&*error.message, "web: no such thing");
        assert_eq!(&*error.hint, "do this");
        assert_eq!(words(b"").message, "blanket ended without a word");
        assert_eq!(words(b"Killed\n").message, "Killed");
    }
}
