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
