//! Range requests (RFC 9110, section 14).

use axum::http::HeaderMap;
use axum::http::header::{IF_NONE_MATCH, IF_RANGE, RANGE};

/// What of a file an answer has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// All of it (200).
    All,
    /// These bytes (206).
    Part {
        /// The first.
        start: u64,
        /// How many, at least one.
        length: u64,
    },
    /// Nothing: none of the bytes are there (416).
    Beyond,
    /// Nothing: who asks has it (304).
    Same,
}

/// What a request asks of a file of `size` bytes with this entity tag, quotes and all.
pub fn asked(headers: &HeaderMap, tag: &str, size: u64) -> Answer {
    let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
    if let Some(list) = text(IF_NONE_MATCH)
        && list.split(',').map(str::trim).any(|one| is_tag(one, tag))
    {
        return Answer::Same;
    }
    // A part of what it was before is of no use; a date is never a strong validator here.
    if text(IF_RANGE).is_some_and(|condition| condition.trim() != tag) {
        return Answer::All;
    }
    text(RANGE).map_or(Answer::All, |range| parse(range, size))
}

fn is_tag(one: &str, tag: &str) -> bool {
    one == "*" || one.strip_prefix("W/").unwrap_or(one) == tag
}

/// A range that is no single range of bytes is as if it was not there, as section 14.2 allows.
fn parse(range: &str, size: u64) -> Answer {
    let Some((unit, set)) = range.split_once('=') else {
        return Answer::All;
    };
    let Some((first, last)) = set.trim().split_once('-') else {
        return Answer::All;
    };
    if !unit.trim().eq_ignore_ascii_case("bytes") {
        return Answer::All;
    }
    match (number(first), number(last)) {
        (Some(start), _) if start >= size && (last.is_empty() || number(last) >= Some(start)) => {
            Answer::Beyond
        }
        (Some(start), None) if last.is_empty() => Answer::Part {
            start,
            length: size - start,
        },
        (Some(start), Some(last)) if last >= start => Answer::Part {
            start,
            length: (last - start).min(size - 1 - start) + 1,
        },
        (None, Some(0)) if first.is_empty() => Answer::Beyond,
        (None, Some(length)) if first.is_empty() && size > 0 => Answer::Part {
            start: size - length.min(size),
            length: length.min(size),
        },
        _ => Answer::All,
    }
}

/// Digits only; a number that is too large counts as the largest.
fn number(text: &str) -> Option<u64> {
    let is_number = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    is_number.then(|| text.parse().unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use axum::http::{HeaderName, HeaderValue};

    use super::*;

    fn with(headers: &[(HeaderName, &str)]) -> Answer {
        let headers = headers
            .iter()
            .map(|(name, value)| (name.clone(), HeaderValue::from_str(value).unwrap()));
        asked(&headers.collect(), "\"tag\"", 1000)
    }

    #[test]
    fn ranges() {
        let part = |start, length| Answer::Part { start, length };
        for (range, expected) in [
            ("bytes=0-0", part(0, 1)),
            ("bytes=0-499", part(0, 500)),
            ("Bytes= 500-1999", part(500, 500)),
            ("bytes=999-", part(999, 1)),
            ("bytes=0-18446744073709551615", part(0, 1000)),
            ("bytes=0-99999999999999999999", part(0, 1000)),
            ("bytes=-1", part(999, 1)),
            ("bytes=-5000", part(0, 1000)),
            ("bytes=1000-", Answer::Beyond),
            ("bytes=1000-1000", Answer::Beyond),
            ("bytes=18446744073709551615-", Answer::Beyond),
            ("bytes=-0", Answer::Beyond),
            ("bytes=5-4", Answer::All),
            ("bytes=2000-1999", Answer::All),
            ("bytes=0-1,5-6", Answer::All),
            ("bytes=+1-2", Answer::All),
            ("bytes=-", Answer::All),
            ("bytes", Answer::All),
            ("chunks=0-1", Answer::All),
        ] {
            assert_eq!(with(&[(RANGE, range)]), expected, "{range}");
        }
        let mut none = HeaderMap::new();
        none.insert(RANGE, HeaderValue::from_static("bytes=-5"));
        assert_eq!(asked(&none, "\"tag\"", 0), Answer::All);
    }

    #[test]
    fn conditions() {
        let part = Answer::Part {
            start: 1,
            length: 2,
        };
        let range = (RANGE, "bytes=1-2");
        assert_eq!(with(&[range.clone(), (IF_RANGE, "\"tag\"")]), part);
        assert_eq!(with(&[range.clone(), (IF_RANGE, "\"old\"")]), Answer::All);
        assert_eq!(with(&[range.clone(), (IF_RANGE, "W/\"tag\"")]), Answer::All);
        assert_eq!(
            with(&[range.clone(), (IF_NONE_MATCH, "\"a\", \"tag\"")]),
            Answer::Same
        );
        assert_eq!(with(&[range, (IF_NONE_MATCH, "\"a\"")]), part);
    }
}
