//! Prints the table of hypercalls in `docs/guest-abi.md` from
//! `blanket_core::hypercall::coverage`; with `--write`, puts it into that file.

use blanket_abi::xen::hypercall;
use blanket_core::hypercall::coverage::{Status, TABLE_ROWS};
use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

/// The file that holds the table.
pub fn file() -> PathBuf {
    PathBuf::from(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../docs/guest-abi.md"
    ))
}

/// The table as Markdown, a final newline included.
pub fn table() -> String {
    let mut text =
        String::from("| call | command | status | what is missing, or why | shown by |\n");
    text.push_str("|---|---|---|---|---|\n");
    for row in TABLE_ROWS {
        let call = hypercall::name(row.call).unwrap_or("?").to_lowercase();
        let command = match row.sub {
            Some(number) => format!("{} ({number})", row.name),
            None => String::new(),
        };
        let status = match row.status {
            Status::Full => "full",
            Status::Partial => "partial",
            Status::Refused => "refused",
        };
        // Writing to a String cannot fail.
        let _ = writeln!(
            text,
            "| {call} ({}) | {command} | {status} | {} | {} |",
            row.call, row.why, row.test
        );
    }
    let count = |status| TABLE_ROWS.iter().filter(|row| row.status == status).count();
    let _ = writeln!(
        text,
        "\n{} entries: {} full, {} partial, {} refused.",
        TABLE_ROWS.len(),
        count(Status::Full),
        count(Status::Partial),
        count(Status::Refused)
    );
    text
}

/// The text before the table, the table, and the text behind it.
pub fn split(text: &str) -> Option<(&str, &str, &str)> {
    let (before, rest) = text.split_once(BEGIN)?;
    let (old, after) = rest.split_once(END)?;
    Some((before, old, after))
}

/// What stands before the table in the file.
pub const BEGIN: &str = "<!-- coverage: begin -->\n\n";
/// What stands behind it.
pub const END: &str = "\n<!-- coverage: end -->";

fn main() -> ExitCode {
    match std::env::args().nth(1).as_deref() {
        None => {
            print!("{}", table());
            ExitCode::SUCCESS
        }
        Some("--write") => match write() {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("coverage: {}: {error}", file().display());
                ExitCode::FAILURE
            }
        },
        Some(_) => {
            eprintln!("usage: coverage [--write]");
            ExitCode::from(2)
        }
    }
}

fn write() -> Result<(), String> {
    let text = std::fs::read_to_string(file()).map_err(|e| e.to_string())?;
    let (before, _, after) = split(&text).ok_or("the markers are missing")?;
    let new = format!("{before}{BEGIN}{}{END}{after}", table());
    std::fs::write(file(), new).map_err(|e| e.to_string())
}
