//! The configuration of EXTLINUX and its like (syslinux.org), which also U-Boot reads.

use crate::grub::eval::MAX_ENTRIES;

/// One `LABEL`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Label {
    /// Its name.
    pub name: String,
    /// `MENU LABEL`, or the name.
    pub title: String,
    /// `LINUX` or `KERNEL`.
    pub linux: String,
    /// `INITRD`, split at its commas.
    pub initrds: Vec<String>,
    /// `APPEND`, without `initrd=`.
    pub append: String,
}

/// All labels, and which is the default.
pub fn parse(text: &str) -> (Vec<Label>, usize) {
    let mut labels: Vec<Label> = Vec::new();
    let mut common = String::new();
    let mut default = String::new();
    let mut by_menu = None;
    for line in text.lines() {
        let line = line.trim();
        let (key, value) = line
            .split_once(char::is_whitespace)
            .map_or((line, ""), |(key, value)| (key, value.trim()));
        let key = key.to_ascii_lowercase();
        let count = labels.len();
        match (key.as_str(), labels.last_mut()) {
            ("default", _) => value.clone_into(&mut default),
            ("label", _) if count < MAX_ENTRIES => labels.push(Label {
                name: value.to_owned(),
                title: value.to_owned(),
                append: common.clone(),
                ..Label::default()
            }),
            ("append", None) => value.clone_into(&mut common),
            // A lone minus takes back what is common.
            ("append", Some(label)) if value == "-" => label.append.clear(),
            ("append", Some(label)) => value.clone_into(&mut label.append),
            ("linux" | "kernel", Some(label)) => value.clone_into(&mut label.linux),
            ("initrd", Some(label)) => {
                label.initrds = value
                    .split(',')
                    .map(|file| file.trim().to_owned())
                    .collect();
            }
            ("menu", Some(label)) => {
                let (key, value) = value
                    .split_once(char::is_whitespace)
                    .map_or((value, ""), |(key, value)| (key, value.trim()));
                match key.to_ascii_lowercase().as_str() {
                    // The caret marks a key.
                    "label" => label.title = value.replace('^', ""),
                    "default" => by_menu = Some(count - 1),
                    _ => {}
                }
            }
            _ => {}
        }
    }
    for label in &mut labels {
        let (initrds, rest): (Vec<&str>, Vec<&str>) = label
            .append
            .split_whitespace()
            .partition(|word| word.starts_with("initrd="));
        if let (Some(word), true) = (initrds.last(), label.initrds.is_empty()) {
            label.initrds = word["initrd=".len()..]
                .split(',')
                .map(str::to_owned)
                .collect();
        }
        label.append = rest.join(" ");
    }
    let named = labels.iter().position(|label| label.name == default);
    (labels, by_menu.or(named).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn labels() {
        let (labels, default) = parse(
            "DEFAULT virt\nPROMPT 0\nMENU TITLE x\nAPPEND quiet\nLABEL lts\n  MENU LABEL ^Linux lts\n\
             \tLINUX vmlinuz-lts\n  INITRD a.img, b.img\nlabel virt\n kernel /boot/vmlinuz\n\
             append root=/dev/vda initrd=/boot/i ro\n",
        );
        assert_eq!(default, 1);
        assert_eq!(labels[0].title, "Linux lts");
        assert_eq!(labels[0].initrds, ["a.img", "b.img"]);
        assert_eq!(labels[0].append, "quiet");
        assert_eq!(labels[1].append, "root=/dev/vda ro");
        assert_eq!(labels[1].initrds, ["/boot/i"]);
        let (_, default) = parse("LABEL a\nLABEL b\nMENU DEFAULT\n");
        assert_eq!(default, 1);
        assert_eq!(parse("MENU DEFAULT"), (Vec::new(), 0));
    }

    proptest! {
        #[test]
        fn any_text_is_read(text in "(label|menu default|append|[ a-z-]|\n){0,60}") {
            let (labels, default) = parse(&text);
            prop_assert!(labels.is_empty() || default < labels.len());
        }
    }
}
