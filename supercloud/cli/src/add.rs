//! `supercloud node add`: an instance that is reached by ssh becomes a node.

use std::io::{BufRead as _, Write as _};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::str::FromStr;

use hyper::Method;
use supercloud_api::{Code, Error, NewToken, TokenText};

use crate::ask::To;
use crate::exit::output;

/// How long the token is good, seconds.
const VALID: u64 = 600;
/// What ssh ends with when it has not got there (ssh(1)).
const NOT_REACHED: i32 = 255;
/// What the scripts end with.
const NOT_INSTALLED: i32 = 66;
const NO_AGENT: i32 = 67;

/// Installs the packages that come as a tar archive.
const INSTALL: &str = "set -e; d=$(mktemp -d); trap 'rm -rf \"$d\"' EXIT; tar -xC \"$d\"; \
    apt-get install -y \"$d\"/*.deb";
/// Has the agent run, and join by the token that comes.
const JOIN: &str = "command -v supercloud >/dev/null || exit 66; \
    supercloud node list >/dev/null 2>&1 || systemctl enable --now supercloud || exit 67; \
    n=0; until supercloud node list >/dev/null 2>&1; do n=$((n + 1)); [ $n -lt 150 ] || exit 67; sleep 0.2; done; \
    exec supercloud node join -";

/// Where an instance is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// `user@host`, or `host`.
    host: String,
    port: Option<u16>,
}

impl FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("{text:?} is not of the form ssh://[USER@]HOST[:PORT]");
        let rest = text.strip_prefix("ssh://").ok_or_else(bad)?;
        let (host, port) = match rest.rsplit_once(':') {
            Some((host, port)) if !port.contains(']') => {
                (host, Some(port.parse().map_err(|_| bad())?))
            }
            _ => (rest, None),
        };
        let allowed = |c: char| c.is_ascii_alphanumeric() || "@._-:[]%".contains(c);
        // What begins with a dash would be an option of ssh.
        if host.is_empty() || host.starts_with('-') || !host.chars().all(allowed) {
            return Err(bad());
        }
        // ssh wants an IPv6 address without its brackets.
        let host = host.replace(['[', ']'], "");
        Ok(Self { host, port })
    }
}

impl Target {
    /// A command there, whose standard input is ours.
    fn command(&self, script: &str) -> Command {
        let program = std::env::var_os("SUPERCLOUD_SSH").unwrap_or_else(|| "ssh".into());
        let mut command = Command::new(program);
        if let Some(port) = self.port {
            command.args(["-p", &port.to_string()]);
        }
        command.arg(&self.host).arg("--").arg(script);
        command
    }
}

fn failed(what: &str) -> impl Fn(std::io::Error) -> Error + '_ {
    move |error| {
        Error::new(
            Code::Failed,
            format!("{what}: {error}"),
            "`node add` needs the programs ssh and tar",
        )
    }
}

/// `supercloud node add`.
pub async fn add(to: &To, target: &Target, packages: &[PathBuf]) -> Result<(), Error> {
    let host = &target.host;
    if !packages.is_empty() {
        let mut tar = Command::new("tar");
        tar.arg("-c");
        for package in packages {
            let (directory, name) = (package.parent(), package.file_name());
            let name = name.filter(|_| package.is_file()).ok_or_else(|| {
                Error::new(
                    Code::BadRequest,
                    format!("{} is no package", package.display()),
                    "give the files blanket_*.deb and supercloud_*.deb",
                )
            })?;
            if let Some(directory) = directory.filter(|it| !it.as_os_str().is_empty()) {
                tar.arg("-C")
                    .arg(std::path::absolute(directory).map_err(failed("tar"))?);
            }
            tar.arg(name);
        }
        let mut packed = tar.stdout(Stdio::piped()).spawn().map_err(failed("tar"))?;
        let from = packed.stdout.take().map_or(Stdio::null(), Stdio::from);
        let installed = target.command(INSTALL).stdin(from).status();
        let code = installed.map_err(failed("ssh"))?.code();
        let _ = packed.wait();
        ended(host, code, "the packages are not installed")?;
    }
    let wanted = NewToken {
        uses: 1,
        seconds: VALID,
    };
    let token: TokenText = to.ask(Method::POST, "/v1/tokens", Some(&wanted)).await?;
    let mut joins = target
        .command(JOIN)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(failed("ssh"))?;
    let said = hear(&mut joins, &token.token);
    let code = joins.wait().map_err(failed("ssh"))?.code();
    ended(host, code, "it has not joined")?;
    output(&said)
}

/// Gives a command its word, and hears what it says.
fn hear(child: &mut Child, word: &str) -> String {
    if let Some(mut stdin) = child.stdin.take() {
        // One that has ended says so.
        let _ = writeln!(stdin, "{word}");
    }
    let lines = child.stdout.take().map(std::io::BufReader::new);
    let lines = lines.into_iter().flat_map(|it| it.lines());
    lines
        .map_while(Result::ok)
        .map(|line| format!("{line}\n"))
        .collect()
}

fn ended(host: &str, code: Option<i32>, what: &str) -> Result<(), Error> {
    let (code, message, hint) = match code {
        Some(0) => return Ok(()),
        Some(NOT_REACHED) => (
            Code::Unreachable,
            format!("{host} is not reached by ssh"),
            format!("try: ssh {host} true"),
        ),
        Some(NOT_INSTALLED) => (
            Code::Failed,
            format!("supercloud is not installed on {host}"),
            "give its packages: --package blanket_*.deb --package supercloud_*.deb".to_owned(),
        ),
        Some(NO_AGENT) => (
            Code::Failed,
            format!("no agent answers on {host}"),
            format!("look why: ssh {host} journalctl -u supercloud"),
        ),
        _ => (
            Code::Failed,
            format!("{host}: {what}; it has said why"),
            String::new(),
        ),
    };
    Err(Error::new(code, message, hint))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets() {
        let target = |host: &str, port| Target {
            host: host.into(),
            port,
        };
        for (text, wanted) in [
            ("ssh://root@host", target("root@host", None)),
            ("ssh://host:2222", target("host", Some(2222))),
            ("ssh://root@[2001:db8::1]", target("root@2001:db8::1", None)),
            ("ssh://[2001:db8::1]:22", target("2001:db8::1", Some(22))),
        ] {
            assert_eq!(text.parse(), Ok(wanted), "{text}");
        }
        for wrong in [
            "host",
            "ssh://",
            "ssh://-oProxyCommand=x",
            "ssh://a b",
            "ssh://a;b",
            "ssh://host:x",
            "http://host",
        ] {
            assert!(wrong.parse::<Target>().is_err(), "{wrong}");
        }
    }
}
