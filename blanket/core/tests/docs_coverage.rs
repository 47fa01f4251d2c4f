//! The table in `docs/guest-abi.md` is the one that the code gives.

#[allow(dead_code, reason = "the example's main and its writing half")]
#[path = "../examples/coverage.rs"]
mod coverage;

#[test]
fn table_in_the_book_is_current() {
    let path = coverage::file();
    let text = std::fs::read_to_string(&path).expect("docs/guest-abi.md is readable");
    let (_, table, _) = coverage::split(&text).expect("docs/guest-abi.md has both markers");
    assert!(
        table == coverage::table(),
        "docs/guest-abi.md is not what the code says; run \
         `cargo run -p blanket-core --example coverage -- --write`"
    );
}

#[test]
fn every_call_of_the_abi_has_a_row() {
    use blanket_abi::xen::hypercall;
    use blanket_core::hypercall::coverage::TABLE_ROWS;
    for number in 0..hypercall::COUNT {
        let rows = TABLE_ROWS.iter().filter(|row| row.call == number).count();
        let named = hypercall::name(number).is_some();
        assert_eq!(rows > 0, named, "hypercall {number}");
    }
}

#[test]
fn rows_name_each_command_once_and_give_reasons() {
    use blanket_core::hypercall::coverage::{Status, TABLE_ROWS};
    let mut seen = std::collections::BTreeSet::new();
    for row in TABLE_ROWS {
        assert!(seen.insert((row.call, row.sub)), "twice: {row:?}");
        assert_eq!(row.status == Status::Full, row.why.is_empty(), "{row:?}");
        assert_eq!(row.sub.is_some(), !row.name.is_empty(), "{row:?}");
        assert!(!row.test.is_empty(), "{row:?}");
        // They end up in a Markdown table.
        assert!(
            ![row.why, row.name, row.test]
                .iter()
                .any(|s| s.contains(['|', '\n']))
        );
    }
}

/// Relative links of a Markdown text, without their anchors.
fn links(text: &str) -> impl Iterator<Item = &str> {
    text.split("](").skip(1).filter_map(|rest| {
        let (link, _) = rest.split_once(')')?;
        let (path, _) = link.split_once('#').unwrap_or((link, ""));
        let relative = !path.is_empty() && !path.contains(':') && !path.contains(' ');
        relative.then_some(path)
    })
}

#[test]
fn links_of_the_book_lead_somewhere() {
    let docs = coverage::file().with_file_name("");
    let mut files = vec![docs.join("../README.md"), docs.join("../CONTRIBUTING.md")];
    for dir in [docs.clone(), docs.join("decisions")] {
        for entry in std::fs::read_dir(dir).expect("the book is there") {
            files.push(entry.expect("readable").path());
        }
    }
    files.retain(|file| file.extension().is_some_and(|ext| ext == "md"));
    assert!(files.len() > 10, "the book has more pages: {files:?}");
    for file in files {
        let text = std::fs::read_to_string(&file).expect("a page is text");
        let dir = file.parent().expect("a page is in a directory");
        for link in links(&text) {
            assert!(dir.join(link).exists(), "{}: {link}", file.display());
        }
    }
}
