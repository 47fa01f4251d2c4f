use std::collections::HashMap;
use std::io;

use proptest::prelude::*;

use super::eval::{Interpreter, Start};
use super::{Place, Search, World};
use crate::fs::Kind;

/// Files by path; all on one device.
#[derive(Default)]
struct Fake(HashMap<&'static str, String>);

impl World for Fake {
    fn kind(&mut self, place: &Place) -> io::Result<Kind> {
        let file = self.0.get(place.path.as_str());
        file.map(|text| Kind::File(text.len() as u64))
            .ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn read(&mut self, place: &Place, _: u64) -> io::Result<Vec<u8>> {
        let file = self.0.get(place.path.as_str());
        file.map(|text| text.clone().into_bytes())
            .ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn list(&mut self, _: &Place) -> io::Result<Vec<String>> {
        Err(io::ErrorKind::NotFound.into())
    }

    fn search(&mut self, what: Search<'_>, _: bool) -> Option<String> {
        match what {
            Search::Uuid("11-22") => Some("hd0,gpt3".into()),
            Search::Label("boot") => Some("hd0,gpt4".into()),
            Search::File(path) => self.0.contains_key(path).then(|| "hd0,gpt5".into()),
            _ => None,
        }
    }

    fn describe(&mut self, _: &str) -> Option<(String, String, &'static str)> {
        Some(("11-22".into(), "boot".into(), "ext2"))
    }
}

fn config() -> Place {
    Place {
        device: "hd0,gpt1".into(),
        path: "/boot/grub/grub.cfg".into(),
        relative: false,
    }
}

/// Runs `text` with other files, and gives the variables that are asked for.
fn run(text: &str, files: &[(&'static str, &str)], names: &[&str]) -> Vec<String> {
    let mut world = Fake::default();
    world.0.insert("/boot/grub/grub.cfg", text.to_owned());
    for (path, text) in files {
        world.0.insert(path, (*text).to_owned());
    }
    let mut grub = Interpreter::new(&mut world, &config());
    grub.run_file(&config()).unwrap();
    names.iter().map(|name| grub.get(name).to_owned()).collect()
}

/// What the first entry of `text` starts.
fn first(text: &str) -> Start {
    let mut world = Fake::default();
    world.0.insert("/boot/grub/grub.cfg", text.to_owned());
    let mut grub = Interpreter::new(&mut world, &config());
    grub.run_file(&config()).unwrap();
    let item = grub.items[0].clone();
    grub.start(&item, &item.title)
}

/// Whether a condition holds.
fn holds(condition: &str) -> bool {
    let text = format!("set empty=\nset n=5\nif {condition}; then set r=y; else set r=n; fi");
    run(&text, &[("/there", "x"), ("/nothing", "")], &["r"]) == ["y"]
}

#[test]
fn conditions() {
    for yes in [
        "true",
        "[ a = a ]",
        "[ x$empty = x ]",
        "[ -z \"$empty\" ]",
        "[ -z \"$empty\" -a -n x ]",
        "[ a = b -o $n -gt 4 ]",
        "[ ! -f /missing ]",
        "[ -s /there ]",
        "[ -f /nothing ]",
        "test 10 -ge 9",
        "[ ( a = b ) -o ( a != b ) ]",
        "[ -e (hd0,gpt1)/there ]",
        "search --no-floppy --fs-uuid --set=x 11-22",
    ] {
        assert!(holds(yes), "{yes}");
    }
    for no in [
        "false",
        "[ a = b ]",
        "[ \"$empty\" ]",
        "[ $empty ]",
        "[ -s /nothing ]",
        "[ -f /missing ]",
        "[ a = a -a -z x ]",
        "[ ]",
        "[ a = a",
        "no_such_command",
        "search --fs-uuid --set=x 99-99",
    ] {
        assert!(!holds(no), "{no}");
    }
}

#[test]
fn variables_and_functions() {
    let text = "a=1\nset b=\"$a two\"\nfunction f {\n set c=\"$2/$1\"\n return\n set c=no\n}\n\
                f $b\nfor x in p q; do set d=\"$d$x\"; done\nset e=${b}\nunset a\n\
                while [ \"$g\" != iii ]; do set g=i$g; done\n";
    assert_eq!(
        run(text, &[], &["a", "b", "c", "d", "e", "g", "x"]),
        ["", "1 two", "two/1", "pq", "1", "iii", "q"]
    );
}

#[test]
fn searching() {
    let text = "search --no-floppy --set=root --hint-bios=hd0,gpt1 --fs-uuid 11-22\nset a=$root\n\
                search.fs_label boot root\nset b=$root\nsearch --set -f /there\nset c=$root\n\
                search --label boot --set v\nsearch --fs-uuid --set w --hint hd0,gpt9 11-22\n\
                probe --set=u --fs-uuid $root\nprobe -s t -f ($root)\n";
    assert_eq!(
        run(
            text,
            &[("/there", "")],
            &["a", "b", "c", "v", "w", "u", "t"]
        ),
        [
            "hd0,gpt3", "hd0,gpt4", "hd0,gpt5", "hd0,gpt4", "hd0,gpt3", "11-22", "ext2"
        ]
    );
}

#[test]
fn other_files() {
    let env = "# GRUB Environment Block\none=1\ntwo=2\n####";
    let files = [
        ("/boot/grub/grubenv", env),
        ("/other", env),
        (
            "/more.cfg",
            "set m=${config_directory}\nsource /more.cfg\nset n=y",
        ),
        ("/last.cfg", "set l=y"),
    ];
    let text = "load_env two\nset b=$one$two\nload_env --file /other one\nset c=$one$two\n\
                source /more.cfg\nconfigfile /last.cfg\nset l=n\n";
    assert_eq!(
        run(text, &files, &["b", "c", "m", "n", "l"]),
        ["2", "12", "(hd0,gpt1)", "y", "y"]
    );
}

#[test]
fn what_an_entry_starts() {
    let start = first(
        "set root=hd0,gpt2\nmenuentry 'A b' --class x --id=i {\n set more='c  d'\n\
         linuxefi ($root)/vmlinuz root=/dev/x \"$more\" $more it\\'s\n\
         initrdefi /early.img ($root)/initrd\n}",
    );
    let kernel = start.kernel.unwrap();
    assert_eq!(
        (kernel.device.as_str(), kernel.path.as_str()),
        ("hd0,gpt2", "/vmlinuz")
    );
    assert_eq!(
        start.cmdline,
        "BOOT_IMAGE=(hd0,gpt2)/vmlinuz root=/dev/x \"c  d\" c d it\\'s"
    );
    let paths: Vec<&str> = start
        .initrds
        .iter()
        .map(|place| place.path.as_str())
        .collect();
    assert_eq!(paths, ["/early.img", "/initrd"]);
    assert!(first("menuentry a { chainloader /efi }").other.is_some());
    assert!(first("menuentry a { initrd newc:x:/y }").other.is_some());
    assert!(
        first("menuentry a { multiboot2 /xen.gz\n module2 /vmlinuz }")
            .other
            .is_some()
    );
    assert_eq!(
        first("menuentry 'T' x y { linux $1 $3 }").cmdline,
        "BOOT_IMAGE=T y"
    );
}

#[test]
fn ubuntu_s_second_try_is_the_first() {
    let start = first(
        "menuentry a {\nif [ \"${initrdfail}\" = 1 ]; then\nlinux /v root=x\ninitrd /i\n\
         else\nlinux /v root=x panic=-1\nfi\ninitrdfail\n}",
    );
    assert_eq!(
        (start.cmdline.as_str(), start.initrds.len()),
        ("BOOT_IMAGE=/v root=x", 1)
    );
}

#[test]
fn scripts_without_end_end() {
    for text in [
        "while true; do true; done",
        "while true; do\ndone",
        "function f { f\nf\n}\nf",
        "menuentry a { while true; do true; done\n}",
        "for a in 1 2 3 4 5 6 7 8 9; do for b in $a$a$a; do set c=$c$c$c$c$c$c$b; done; done",
    ] {
        let mut world = Fake::default();
        world.0.insert("/boot/grub/grub.cfg", text.to_owned());
        let mut grub = Interpreter::new(&mut world, &config());
        let _ = grub.run_file(&config());
        for item in std::mem::take(&mut grub.items) {
            assert!(grub.start(&item, "").other.is_some());
        }
    }
}

#[test]
fn large_words_end() {
    let words = " \"$b\"".repeat(4000);
    let text = format!(
        "set b={}\nwhile true; do set x$b=$b$b; true{words}; menuentry{words} {{ true\n}}; done",
        "b".repeat(60_000)
    );
    let mut world = Fake::default();
    world.0.insert("/boot/grub/grub.cfg", text);
    let mut grub = Interpreter::new(&mut world, &config());
    assert!(grub.run_file(&config()).is_err());
}

proptest! {
    #[test]
    fn any_script_ends(text in "(set a=\\$a\\$b;|function f|menuentry |submenu x |if |then|fi|while |do |done|f |\\{|\\}|\n|source /x|linux /k \\$a|initrd|search|a|'|\"| ){0,80}") {
        let mut world = Fake::default();
        world.0.insert("/boot/grub/grub.cfg", text);
        let mut grub = Interpreter::new(&mut world, &config());
        let _ = grub.run_file(&config());
        grub.open_submenus();
        for item in std::mem::take(&mut grub.items) {
            let _ = grub.start(&item, "");
        }
    }
}
