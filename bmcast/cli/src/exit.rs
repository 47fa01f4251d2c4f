//! Exit codes, and how errors are told.

use std::io::Write as _;
use std::process::ExitCode;

use serde::Serialize;

/// The table for `--help`.
pub const TABLE: &str = "\
Exit codes:
  0  done
  1  it failed
  2  wrong arguments
  3  there is no such file or machine
  5  the server cannot be reached, or is none";

/// Which kind of error it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Code {
    /// The host or a file failed.
    Failed,
    /// The arguments are wrong.
    BadRequest,
    /// There is no such file or machine.
    NotFound,
    /// The server cannot be reached.
    Unreachable,
}

impl Code {
    fn exit(self) -> u8 {
        match self {
            Self::Failed => 1,
            Self::BadRequest => 2,
            Self::NotFound => 3,
            Self::Unreachable => 5,
        }
    }
}

/// What went wrong, and what to do.
#[derive(Clone, Debug, Serialize, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    /// Its kind.
    pub code: Code,
    /// What went wrong, on which object.
    pub message: String,
    /// What to do; empty if there is nothing to say.
    pub hint: String,
}

impl Error {
    /// An error with what to do about it.
    pub fn new(code: Code, message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            hint: hint.into(),
        }
    }

    /// Something failed that nobody can mend by asking otherwise.
    pub fn failed(message: impl Into<String>) -> Self {
        Self::new(Code::Failed, message, "")
    }

    /// A file failed.
    pub fn file(path: &std::path::Path, error: &std::io::Error) -> Self {
        let code = match error.kind() {
            std::io::ErrorKind::NotFound => Code::NotFound,
            _ => Code::Failed,
        };
        Self::new(code, format!("{}: {error}", path.display()), "")
    }
}

/// Tells an error and what to do about it.
pub fn report(error: &Error, json: bool) -> ExitCode {
    if json && let Ok(text) = serde_json::to_string(error) {
        eprintln!("{text}");
    } else {
        eprintln!("bmcast: {}", error.message);
        if !error.hint.is_empty() {
            eprintln!("  {}", error.hint);
        }
    }
    ExitCode::from(error.code.exit())
}

/// Writes what was found: as JSON, or as `text` has it for people.
pub fn show<T: Serialize + ?Sized>(
    found: &T,
    json: bool,
    text: impl FnOnce(&T) -> String,
) -> Result<(), Error> {
    if json {
        let text = serde_json::to_string_pretty(found);
        output(&format!(
            "{}\n",
            text.map_err(|error| Error::failed(error.to_string()))?
        ))
    } else {
        output(&text(found))
    }
}

/// Writes a command's result to standard output. A reader that has seen enough is no error.
pub fn output(text: &str) -> Result<(), Error> {
    let mut stdout = std::io::stdout().lock();
    match stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush())
    {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Error::failed(format!("standard output: {error}")))
        }
        _ => Ok(()),
    }
}

/// Rows in columns.
pub fn table<const N: usize>(rows: &[[String; N]]) -> String {
    let mut widths = [0; N];
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (width, cell) in widths.iter().zip(row) {
            line.push_str(&format!("{cell:<width$}  "));
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_code_is_in_the_table() {
        for code in [
            Code::Failed,
            Code::BadRequest,
            Code::NotFound,
            Code::Unreachable,
        ] {
            let exit = code.exit();
            assert!(TABLE.contains(&format!("\n  {exit}  ")), "{code:?}");
        }
    }

    #[test]
    fn tables_are_aligned() {
        let rows = [["A", "LONG"], ["wide", "b"]].map(|row| row.map(str::to_owned));
        assert_eq!(table(&rows), "A     LONG\nwide  b\n");
    }
}
