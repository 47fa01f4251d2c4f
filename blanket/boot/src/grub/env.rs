//! GRUB's environment block (`grubenv`): lines `name=value`, filled up with `#`.

/// Variables that are taken from one block.
const MAX_VARIABLES: usize = 256;

/// The variables of a block; none if it is no block.
pub fn parse(bytes: &[u8]) -> Vec<(String, String)> {
    let text = String::from_utf8_lossy(bytes);
    let Some(rest) = text.strip_prefix("# GRUB Environment Block\n") else {
        return Vec::new();
    };
    let mut variables = Vec::new();
    // A backslash at a line's end keeps the newline in the value.
    let mut lines = rest.split('\n');
    while let Some(line) = lines.next() {
        if line.starts_with('#') {
            continue;
        }
        let Some((name, first)) = line.split_once('=') else {
            continue;
        };
        let mut value = String::new();
        let mut line = first;
        loop {
            let mut escaped = false;
            for next in line.chars() {
                if next == '\\' && !escaped {
                    escaped = true;
                } else {
                    value.push(next);
                    escaped = false;
                }
            }
            if !escaped {
                break;
            }
            let Some(next) = lines.next() else {
                break;
            };
            value.push('\n');
            line = next;
        }
        variables.push((name.to_owned(), value));
        if variables.len() == MAX_VARIABLES {
            break;
        }
    }
    variables
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_and_filling() {
        let block =
            b"# GRUB Environment Block\nsaved_entry=a>b\nkernelopts=root=UUID=x ro \\\\ y\n\
                      long=one\\\ntwo\nempty=\n###########";
        let pairs = parse(block);
        let get = |name: &str| {
            pairs
                .iter()
                .find(|(known, _)| known == name)
                .map(|(_, value)| value.as_str())
        };
        assert_eq!(get("saved_entry"), Some("a>b"));
        assert_eq!(get("kernelopts"), Some("root=UUID=x ro \\ y"));
        assert_eq!(get("long"), Some("one\ntwo"));
        assert_eq!(get("empty"), Some(""));
        assert_eq!(pairs.len(), 4);
        assert!(parse(b"saved_entry=a").is_empty());
    }
}
