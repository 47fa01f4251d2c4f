//! Order of versions (UAPI Group, "Version Format Specification"), which rpm's nearly is.

use std::cmp::Ordering;

/// Whether `a` is older or newer than `b`.
pub fn compare(a: &str, b: &str) -> Ordering {
    let (mut a, mut b) = (a.as_bytes(), b.as_bytes());
    loop {
        a = valid(a);
        b = valid(b);
        let (first, other) = (a.first(), b.first());
        // In this order: what begins with one of these is older than what does not.
        if let Some(order) = separator(b'~', &mut a, &mut b) {
            match order {
                Ordering::Equal => continue,
                order => return order,
            }
        }
        match (first, other) {
            (None, None) => return Ordering::Equal,
            (None, Some(_)) => return Ordering::Less,
            (Some(_), None) => return Ordering::Greater,
            _ => {}
        }
        let mut separated = false;
        for mark in *b"-^." {
            match separator(mark, &mut a, &mut b) {
                Some(Ordering::Equal) => {
                    separated = true;
                    break;
                }
                Some(order) => return order,
                None => {}
            }
        }
        if separated {
            continue;
        }
        let digits = |text: &[u8]| text.first().is_some_and(u8::is_ascii_digit);
        let numbers = digits(a) || digits(b);
        let (left, rest_a) = prefix(a, numbers);
        let (right, rest_b) = prefix(b, numbers);
        let order = if numbers {
            let (left, right) = (without_zeros(left), without_zeros(right));
            left.len().cmp(&right.len()).then_with(|| left.cmp(right))
        } else {
            left.cmp(right)
        };
        if order != Ordering::Equal {
            return order;
        }
        (a, b) = (rest_a, rest_b);
    }
}

/// From the first byte on that counts.
fn valid(text: &[u8]) -> &[u8] {
    let counts = |byte: &u8| byte.is_ascii_alphanumeric() || b"-.~^".contains(byte);
    let at = text.iter().position(counts).unwrap_or(text.len());
    &text[at..]
}

/// Equal, and past the mark, if both begin with it; none if neither does.
fn separator(mark: u8, a: &mut &[u8], b: &mut &[u8]) -> Option<Ordering> {
    match (a.first() == Some(&mark), b.first() == Some(&mark)) {
        (true, true) => {
            (*a, *b) = (&a[1..], &b[1..]);
            Some(Ordering::Equal)
        }
        (true, false) => Some(Ordering::Less),
        (false, true) => Some(Ordering::Greater),
        (false, false) => None,
    }
}

fn prefix(text: &[u8], digits: bool) -> (&[u8], &[u8]) {
    let belongs = |byte: &u8| {
        if digits {
            byte.is_ascii_digit()
        } else {
            byte.is_ascii_alphabetic()
        }
    };
    let end = text
        .iter()
        .position(|byte| !belongs(byte))
        .unwrap_or(text.len());
    text.split_at(end)
}

fn without_zeros(text: &[u8]) -> &[u8] {
    let at = text.iter().position(|byte| *byte != b'0');
    &text[at.unwrap_or(text.len())..]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_specification_s_order() {
        // Each is older than the next.
        let sorted = [
            "~1",
            "",
            "ab",
            "abb",
            "abc",
            "0001",
            "002",
            "12",
            "122",
            "122.9",
            "123~rc1",
            "123",
            "123-a",
            "123-a.1",
            "123-a1",
            "123-a1.1",
            "123-3",
            "123-3.1",
            "123^patch1",
            "123^1",
            "123.a-1",
            "123.1-1",
            "123a-1",
            "124",
        ];
        for pair in sorted.windows(2) {
            assert_eq!(compare(pair[0], pair[1]), Ordering::Less, "{pair:?}");
            assert_eq!(compare(pair[1], pair[0]), Ordering::Greater, "{pair:?}");
        }
    }

    #[test]
    fn kernels() {
        let newer = |a: &str, b: &str| assert_eq!(compare(a, b), Ordering::Greater);
        newer("5.14.0-10.el9", "5.14.0-9.el9");
        newer("6.10.0-1", "6.9.12-1");
        newer("id-6.1.0", "id-0-rescue");
        newer("6.1.0", "6.1.0~rc1");
    }

    proptest! {
        #[test]
        fn it_is_an_order(a in "[a-c0-2~^.-]{0,8}", b in "[a-c0-2~^.-]{0,8}", c in "[a-c0-2~^.-]{0,8}") {
            prop_assert_eq!(compare(&a, &b), compare(&b, &a).reverse());
            prop_assert_eq!(compare(&a, &a), Ordering::Equal);
            if compare(&a, &b).is_le() && compare(&b, &c).is_le() {
                prop_assert!(compare(&a, &c).is_le());
            }
        }

        #[test]
        fn any_text_ends(a in ".{0,40}", b in ".{0,40}") {
            let _ = compare(&a, &b);
        }
    }
}
