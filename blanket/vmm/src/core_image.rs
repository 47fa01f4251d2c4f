//! The core image that this program was built with: which it is, and what is where in it.

use std::fmt::Write as _;

/// The image; empty if this program was built without one.
pub(crate) static BYTES: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/blanket-core.bin"));

/// SHA-256 of the image: its build id. The module tells that of its own in
/// `GET_INFO`, and both come from the same file.
pub const BUILD_ID: [u8; 32] = *include_bytes!(concat!(env!("OUT_DIR"), "/blanket-core.id"));

/// [`BUILD_ID`] in hexadecimal digits.
pub const BUILD_ID_TEXT: &str = env!("BLANKET_CORE_ID");

/// Lines of `address type name`, by address.
static SYMBOLS: &str = include_str!(concat!(env!("OUT_DIR"), "/blanket-core.sym"));

/// Whether this program has an image.
#[must_use]
pub fn is_present() -> bool {
    !BYTES.is_empty()
}

/// The digits of a build id.
#[must_use]
pub fn digits(id: &[u8; 32]) -> String {
    id.iter().fold(String::new(), |mut text, byte| {
        // Writing to a string cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Names the places of a report of the core: behind each `core+0x1234` comes the
/// function that it lies in. Right only for a report of the core with [`BUILD_ID`].
#[must_use]
pub fn name_places(report: &str) -> String {
    name_places_by(SYMBOLS, report)
}

fn name_places_by(symbols: &str, report: &str) -> String {
    const MARK: &str = "core+0x";
    let mut named = String::new();
    let mut rest = report;
    while let Some(at) = rest.find(MARK) {
        let digits_at = at + MARK.len();
        let digits = rest[digits_at..]
            .find(|c: char| !c.is_ascii_hexdigit())
            .map_or(rest.len(), |len| digits_at + len);
        named.push_str(&rest[..digits]);
        if let Ok(offset) = u64::from_str_radix(&rest[digits_at..digits], 16)
            && let Some((name, inside)) = lookup(symbols, offset)
        {
            let _ = write!(named, " <{name}+{inside:#x}>");
        }
        rest = &rest[digits..];
    }
    named.push_str(rest);
    named
}

/// The last symbol that begins at or before an offset in the image.
fn lookup(symbols: &str, offset: u64) -> Option<(&str, u64)> {
    let address = blanket_abi::layout::IMAGE.checked_add(offset)?;
    symbols
        .lines()
        .filter_map(|line| {
            let (value, rest) = line.split_once(' ')?;
            let (_, name) = rest.split_once(' ')?;
            Some((u64::from_str_radix(value, 16).ok()?, name))
        })
        .take_while(|(value, _)| *value <= address)
        .last()
        .map(|(value, name)| (name, address - value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_get_the_names_of_the_functions_around_them() {
        let symbols = "ffff808000001000 t first\nffff808000002000 T <a as b>::second\n";
        assert_eq!(
            name_places_by(
                symbols,
                "core at core+0x1010 rsp\ncalls: core+0x2000 core+0x10\n"
            ),
            "core at core+0x1010 <first+0x10> rsp\n\
             calls: core+0x2000 <<a as b>::second+0x0> core+0x10\n"
        );
        assert_eq!(name_places_by(symbols, "core+0x"), "core+0x");
        assert_eq!(
            name_places_by(symbols, "core+0xffffffffffffffffff"),
            "core+0xffffffffffffffffff"
        );
    }

    #[test]
    fn the_build_id_is_the_images() {
        assert_eq!(digits(&BUILD_ID), BUILD_ID_TEXT);
        assert_eq!(BUILD_ID_TEXT.len(), 64);
    }
}
