//! `supercloud vm console`: the terminal becomes a VM's console.

use std::process::ExitCode;

use hyper::header::{CONNECTION, HeaderValue, UPGRADE};
use hyper::{Method, StatusCode};
use rustix::termios::{self, OptionalActions, Termios};
use supercloud_api::Error;
use supercloud_node::client;
use supercloud_node::http::PROTOCOL;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::ask::To;

/// Ctrl-]: detaches.
const ESCAPE: u8 = 0x1d;

/// The terminal as it was.
struct Raw(Termios);

impl Raw {
    /// None if standard input is no terminal.
    fn new() -> Result<Option<Self>, Error> {
        let stdin = std::io::stdin();
        if !termios::isatty(&stdin) {
            return Ok(None);
        }
        let failed = |error: rustix::io::Errno| Error::failed(format!("the terminal: {error}"));
        let before = termios::tcgetattr(&stdin).map_err(failed)?;
        let mut raw = before.clone();
        raw.make_raw();
        termios::tcsetattr(&stdin, OptionalActions::Now, &raw).map_err(failed)?;
        Ok(Some(Self(before)))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // It is the user's last chance, and there is nobody to tell.
        let _ = termios::tcsetattr(std::io::stdin(), OptionalActions::Now, &self.0);
    }
}

/// Attaches until Ctrl-], or the VM or its agent ends.
pub async fn attach(of: &To, name: &str) -> Result<ExitCode, Error> {
    let mut agent = of.agent().await?;
    let path = format!("/v1/vms/{name}/console");
    let mut asked = client::request(Method::GET, &path, None::<&()>)?;
    let headers = asked.headers_mut();
    headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
    headers.insert(UPGRADE, HeaderValue::from_static(PROTOCOL));
    let mut response = agent.send(asked, client::ANSWER).await?;
    let status = response.status();
    if status != StatusCode::SWITCHING_PROTOCOLS {
        let bytes = client::read(response).await.map_err(Error::failed)?;
        client::understood::<serde_json::Value>(name, status, &bytes)?;
        return Err(Error::failed(format!("{name} gives no console")));
    }
    let upgraded = hyper::upgrade::on(&mut response).await;
    let upgraded = upgraded.map_err(|error| Error::failed(error.to_string()))?;
    let (mut from, mut to) = tokio::io::split(hyper_util::rt::TokioIo::new(upgraded));
    let raw = Raw::new()?;
    if raw.is_some() {
        eprint!("[attached to {name}; Ctrl-] detaches]\r\n");
    }
    let terminal = raw.is_some();
    let typing = async {
        let mut stdin = tokio::io::stdin();
        let mut bytes = [0; 1024];
        loop {
            let read = stdin.read(&mut bytes).await.unwrap_or(0);
            let typed = bytes.get(..read).unwrap_or_default();
            let end = typed.iter().position(|byte| terminal && *byte == ESCAPE);
            let wanted = typed.get(..end.unwrap_or(read)).unwrap_or_default();
            if to.write_all(wanted).await.is_err() || to.flush().await.is_err() {
                return;
            }
            if end.is_some() {
                return;
            }
            if read == 0 {
                // Nothing more is typed; what comes is shown on.
                std::future::pending::<()>().await;
            }
        }
    };
    let showing = async {
        let mut stdout = tokio::io::stdout();
        let _ = tokio::io::copy(&mut from, &mut stdout).await;
        let _ = stdout.flush().await;
    };
    let detached = tokio::select! {
        () = typing => true,
        () = showing => false,
    };
    drop(raw);
    let end = if detached { "detached" } else { "it has ended" };
    eprintln!("\n[{name}: {end}]");
    // Standard input is read by a thread that nobody can end.
    std::process::exit(0);
}
