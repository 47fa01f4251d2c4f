//! Sections of `docs/benchmarks.md` that runs of their own write.

use std::fs;

use anyhow::{Context as _, Result};

use crate::project::{Project, write_if_changed};

/// The page that `cargo xtask bench` writes.
pub const PAGE: &str = "docs/benchmarks.md";

/// Puts a section into the page: in the place of the old one of that `title`
/// (`"\n## Title\n"`), or at the end.
pub fn write_section(project: &Project, title: &str, text: &str) -> Result<()> {
    let page = project.root.join(PAGE);
    let old = fs::read_to_string(&page).with_context(|| format!("cannot read {PAGE}"))?;
    write_if_changed(&page, with_section(&old, title, text).as_bytes())
}

/// A section as it is on the page, for who writes the rest anew.
pub fn section(project: &Project, title: &str) -> String {
    let page = fs::read_to_string(project.root.join(PAGE)).unwrap_or_default();
    split(&page, title).1.to_owned()
}

fn with_section(page: &str, title: &str, text: &str) -> String {
    let (above, _, below) = split(page, title);
    format!("{above}{text}{below}")
}

/// What is above a section, the section, and what is below; where there is none, all is above.
fn split<'a>(page: &'a str, title: &str) -> (&'a str, &'a str, &'a str) {
    let Some(begin) = page.find(title) else {
        return (page, "", "");
    };
    let (above, rest) = page.split_at(begin);
    let body = rest.get(title.len()..).unwrap_or_default();
    let end = body
        .find("\n## ")
        .map_or(rest.len(), |end| title.len() + end);
    let (section, below) = rest.split_at(end);
    (above, section, below)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_section_takes_the_place_of_the_old_one() {
        let page = "# Page\n\n## One\n\nold\n\n### Part\n\n## Two\n\nkept\n";
        let new = with_section(page, "\n## One\n", "\n## One\n\nnew\n");
        assert_eq!(new, "# Page\n\n## One\n\nnew\n\n## Two\n\nkept\n");
        let new = with_section(&new, "\n## Two\n", "\n## Two\n\nnew\n");
        assert_eq!(new, "# Page\n\n## One\n\nnew\n\n## Two\n\nnew\n");
        let new = with_section("# Page\n", "\n## One\n", "\n## One\n\nnew\n");
        assert_eq!(new, "# Page\n\n## One\n\nnew\n");
    }
}
