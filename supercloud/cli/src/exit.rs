//! Exit codes, and how errors are told.

use std::io::Write as _;
use std::process::ExitCode;

use serde::Serialize;
use supercloud_api::Error;

/// The table for `--help`.
pub const TABLE: &str = "\
Exit codes:
  0  done
  1  it failed, or was cancelled; `doctor`: something is wrong
  2  wrong arguments
  3  there is no such node, VM, image or operation
  4  there is another one of that name, or it is in a state in which that cannot be
  5  a node cannot be reached, or its agent does not run
  6  the node has not the memory, or the VM cannot go on there
  7  the token or certificate is not accepted
  9  it is not known on which node a VM is; it is asked again";

/// Tells an error and what to do about it.
pub fn report(error: &Error, json: bool) -> ExitCode {
    if json && let Ok(text) = serde_json::to_string(error) {
        eprintln!("{text}");
    } else {
        eprintln!("supercloud: {}", error.message);
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
    use supercloud_api::Code;

    use super::*;

    #[test]
    fn each_code_is_in_the_table() {
        for code in Code::ALL {
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
