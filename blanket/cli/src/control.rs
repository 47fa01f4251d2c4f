//! The control socket: one request as a line of JSON, one answer as another. After
//! a `console` request the socket is the console.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};
use blanket_vmm::instance::Instance;
use serde::{Deserialize, Serialize};

use crate::stats::Stats;

/// Longest request or answer.
const LINE_MAX: u64 = 1 << 20;

/// What can be asked.
#[derive(Debug, Serialize, Deserialize, PartialEq)]
#[serde(rename_all = "kebab-case")]
pub enum Request {
    /// What the VM is.
    Info,
    /// Its counters.
    Stats,
    /// Ask its guest to power off.
    Stop {
        /// Milliseconds that it has.
        timeout_ms: u64,
    },
    /// End it.
    Kill,
    /// Attach to its console.
    Console,
}

/// What is answered.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// Done.
    Done,
    /// What the VM is.
    Info(Box<Info>),
    /// Its counters.
    Stats(Box<Stats>),
    /// Why not.
    Error(String),
}

/// What a VM is.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Info {
    /// Its name.
    pub name: String,
    /// Its identity.
    pub uuid: String,
    /// The process that runs it.
    pub pid: u32,
    /// vCPUs.
    pub vcpus: u32,
    /// Memory, bytes.
    pub memory: u64,
    /// Seconds since it was started.
    pub uptime_seconds: f64,
    /// How often it was booted.
    pub boots: u32,
    /// Kernel file.
    pub kernel: String,
    /// Initrd file.
    pub initrd: Option<String>,
    /// Kernel command line.
    pub cmdline: String,
    /// Where its console goes.
    pub console: String,
}

/// Serves a VM's socket for as long as the process lives.
pub fn serve(
    listener: UnixListener,
    instance: Arc<Instance>,
    name: String,
    console: String,
) -> Result<()> {
    std::thread::Builder::new()
        .name("control".into())
        .spawn(move || {
            for stream in listener.incoming() {
                let Ok(stream) = stream else { continue };
                let (instance, name, console) =
                    (Arc::clone(&instance), name.clone(), console.clone());
                let client = std::thread::Builder::new()
                    .name("control-client".into())
                    .spawn(move || {
                        if let Err(error) = answer(stream, &instance, &name, &console) {
                            tracing::debug!("a control client: {error:#}");
                        }
                    });
                if let Err(error) = client {
                    tracing::warn!(%error, "cannot serve a control client");
                }
            }
        })
        .context("cannot start the control thread")?;
    Ok(())
}

fn answer(stream: UnixStream, instance: &Instance, name: &str, console: &str) -> Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?).take(LINE_MAX);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    if line.is_empty() {
        // Somebody who only looked whether we are here.
        return Ok(());
    }
    let request = serde_json::from_str(&line);
    let answer = match &request {
        Ok(Request::Info) => {
            let spec = instance.spec();
            Answer::Info(Box::new(Info {
                name: name.to_owned(),
                uuid: instance.uuid().to_owned(),
                pid: std::process::id(),
                vcpus: spec.vcpus,
                memory: spec.memory,
                uptime_seconds: instance.uptime().as_secs_f64(),
                boots: instance.boots(),
                kernel: spec.kernel.display().to_string(),
                initrd: spec.initrd.as_ref().map(|path| path.display().to_string()),
                cmdline: spec.cmdline.clone(),
                console: console.to_owned(),
            }))
        }
        Ok(Request::Stats) => match instance.stats() {
            Ok(Some(stats)) => Answer::Stats(Box::new(Stats::from(&stats))),
            Ok(None) => Answer::Error("there are no counters yet".into()),
            Err(error) => Answer::Error(error.to_string()),
        },
        Ok(Request::Stop { timeout_ms }) => {
            match instance.stop(Duration::from_millis(*timeout_ms)) {
                Ok(()) => Answer::Done,
                Err(error) => Answer::Error(error.to_string()),
            }
        }
        Ok(Request::Kill) => {
            instance.kill();
            Answer::Done
        }
        Ok(Request::Console) => Answer::Done,
        Err(error) => Answer::Error(format!("not a request: {error}")),
    };
    send(&stream, &answer)?;
    if matches!(request, Ok(Request::Console)) {
        instance.console().attach(stream.into());
    }
    Ok(())
}

fn send(mut stream: &UnixStream, message: &impl Serialize) -> Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    stream.write_all(&line)?;
    Ok(())
}

/// Asks a VM something.
pub fn ask(stream: &UnixStream, request: &Request) -> Result<Answer> {
    send(stream, request).context("the VM does not listen")?;
    // Byte by byte, because what follows a console's answer is not ours to buffer.
    let mut line = Vec::new();
    let mut byte = [0];
    let mut reader = stream;
    while line.len() as u64 <= LINE_MAX && reader.read(&mut byte).context("no answer")? == 1 {
        if byte[0] == b'\n' {
            return match serde_json::from_slice(&line).context("an answer of another version")? {
                Answer::Error(text) => Err(anyhow!(text)),
                answer => Ok(answer),
            };
        }
        line.push(byte[0]);
    }
    Err(anyhow!("the VM ended before it answered"))
}
