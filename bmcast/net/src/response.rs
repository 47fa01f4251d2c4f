//! The head of an HTTP response.

use alloc::string::String;

/// Most bytes of a head.
pub const MOST_HEAD: usize = 8 << 10;
/// Most fields of it.
const MOST_FIELDS: usize = 64;

/// What it says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Head {
    /// Bytes of the head itself.
    pub bytes: usize,
    /// Its status.
    pub status: u16,
    /// Bytes of the body.
    pub length: u64,
    /// First byte of the range that the body is.
    pub range: Option<u64>,
    /// The server closes the connection after it.
    pub closes: bool,
}

/// It cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the server's answer: {0}")]
pub struct BadHead(pub String);

/// Reads a head; nothing if there is more to come.
pub fn parse(bytes: &[u8]) -> Result<Option<Head>, BadHead> {
    let bad = |text: &str| BadHead(text.into());
    let mut fields = [httparse::EMPTY_HEADER; MOST_FIELDS];
    let mut response = httparse::Response::new(&mut fields);
    let parsed = response
        .parse(bytes)
        .map_err(|error| BadHead(alloc::format!("{error}")))?;
    let httparse::Status::Complete(length) = parsed else {
        return match bytes.len() >= MOST_HEAD {
            true => Err(bad("its head has no end")),
            false => Ok(None),
        };
    };
    let mut head = Head {
        bytes: length,
        status: response.code.unwrap_or(0),
        length: 0,
        range: None,
        closes: response.version == Some(0),
    };
    let mut has_length = false;
    for field in response.headers {
        let value = core::str::from_utf8(field.value).unwrap_or("").trim();
        if field.name.eq_ignore_ascii_case("content-length") {
            let length = value.parse().map_err(|_| bad("its length is no number"))?;
            if has_length && length != head.length {
                return Err(bad("it has two lengths"));
            }
            (head.length, has_length) = (length, true);
        } else if field.name.eq_ignore_ascii_case("content-range") {
            let start = value
                .strip_prefix("bytes ")
                .and_then(|range| range.split('-').next());
            let start = start.and_then(|start| start.parse().ok());
            head.range = Some(start.ok_or_else(|| bad("its range is none"))?);
        } else if field.name.eq_ignore_ascii_case("connection") {
            head.closes |= value.eq_ignore_ascii_case("close");
        } else if field.name.eq_ignore_ascii_case("transfer-encoding") {
            return Err(bad(
                "it is encoded for the transfer, which is not understood",
            ));
        }
    }
    let has_no_body = matches!(head.status, 100..=199 | 204 | 304);
    if !has_length && !has_no_body {
        return Err(bad("it has no length"));
    }
    if has_no_body {
        head.length = 0;
    }
    Ok(Some(head))
}

#[cfg(test)]
mod tests {
    extern crate std;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_range() {
        let bytes = b"HTTP/1.1 206 Partial Content\r\ncontent-length: 4\r\ncontent-range: bytes 8-11/100\r\n\r\nabcd";
        let head = parse(bytes).unwrap().unwrap();
        assert_eq!((head.status, head.length, head.range), (206, 4, Some(8)));
        assert_eq!(&bytes[head.bytes..], b"abcd");
        for end in 0..head.bytes {
            assert_eq!(parse(&bytes[..end]), Ok(None));
        }
    }

    #[test]
    fn what_is_not_understood() {
        for wrong in [
            "HTTP/1.1 200 OK\r\n\r\n",
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n",
            "HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n",
            "HTTP/1.1 200 OK\r\ncontent-length: -1\r\n\r\n",
            "SSH-2.0-x\r\n\r\n",
        ] {
            assert!(parse(wrong.as_bytes()).is_err(), "{wrong}");
        }
        let endless = std::format!("HTTP/1.1 200 OK\r\nx: {}", "y".repeat(MOST_HEAD));
        assert!(parse(endless.as_bytes()).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            if let Ok(Some(head)) = parse(&bytes) {
                prop_assert!(head.bytes <= bytes.len());
            }
        }
    }
}
