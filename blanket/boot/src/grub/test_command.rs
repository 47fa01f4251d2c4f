//! GRUB's `test` and `[` (grub-core/commands/test.c).

use super::eval::Interpreter;
use crate::fs::Kind;

/// Parentheses within parentheses.
const MAX_DEPTH: u32 = 16;

impl Interpreter<'_> {
    /// Whether the expression holds.
    pub(super) fn test(&mut self, words: &[String]) -> bool {
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let mut rest = words.as_slice();
        self.any(&mut rest, 0)
    }

    /// `a -o b`.
    fn any(&mut self, rest: &mut &[&str], depth: u32) -> bool {
        let mut holds = self.all(rest, depth);
        while rest.first() == Some(&"-o") {
            *rest = &rest[1..];
            let right = self.all(rest, depth);
            holds |= right;
        }
        holds
    }

    /// `a -a b`, or one after the other.
    fn all(&mut self, rest: &mut &[&str], depth: u32) -> bool {
        let mut holds = self.one(rest, depth);
        while let Some(next) = rest.first() {
            match *next {
                "-a" => *rest = &rest[1..],
                "-o" | ")" => break,
                _ => {}
            }
            if rest.is_empty() {
                break;
            }
            let right = self.one(rest, depth);
            holds &= right;
        }
        holds
    }

    fn one(&mut self, rest: &mut &[&str], depth: u32) -> bool {
        let words = *rest;
        if let [left, operator, right, ..] = words
            && let Some(holds) = binary(left, operator, right)
        {
            *rest = &words[3..];
            return holds;
        }
        match words {
            ["!", _, ..] if depth < MAX_DEPTH => {
                *rest = &words[1..];
                !self.one(rest, depth + 1)
            }
            ["(", ..] if depth < MAX_DEPTH => {
                *rest = &words[1..];
                let holds = self.any(rest, depth + 1);
                if rest.first() == Some(&")") {
                    *rest = &rest[1..];
                }
                holds
            }
            ["-n", word, ..] => {
                *rest = &words[2..];
                !word.is_empty()
            }
            ["-z", word, ..] => {
                *rest = &words[2..];
                word.is_empty()
            }
            [operator @ ("-e" | "-f" | "-d" | "-s"), file, ..] => {
                *rest = &words[2..];
                let place = self.place(file);
                matches!(
                    (*operator, self.world.kind(&place)),
                    ("-e", Ok(_))
                        | ("-s", Ok(Kind::File(1..)))
                        | ("-f", Ok(Kind::File(_)))
                        | ("-d", Ok(Kind::Directory))
                )
            }
            [word, ..] => {
                *rest = &words[1..];
                !word.is_empty()
            }
            [] => false,
        }
    }
}

/// What `operator` says of two words; none if it is no operator.
fn binary(left: &str, operator: &str, right: &str) -> Option<bool> {
    let number = |text: &str| text.trim().parse::<i64>().unwrap_or(0);
    let (a, b) = (number(left), number(right));
    Some(match operator {
        "=" | "==" => left == right,
        "!=" => left != right,
        "<" => left < right,
        "<=" => left <= right,
        ">" => left > right,
        ">=" => left >= right,
        "-eq" => a == b,
        "-ne" => a != b,
        "-lt" => a < b,
        "-le" => a <= b,
        "-gt" => a > b,
        "-ge" => a >= b,
        _ => return None,
    })
}
