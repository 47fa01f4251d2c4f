//! What the fuzz targets call: hostile bytes into every parser of this crate.

use std::sync::Arc;

use crate::grub::parse;
use crate::{Image, bls, extlinux, initrd, version};

/// A disk of `bytes`, its table, file systems and configuration.
pub fn disk(bytes: &[u8]) {
    if let Ok(mut image) = Image::open(Arc::new(bytes.to_vec()))
        && let Ok(menu) = image.menu()
    {
        for entry in &menu.entries {
            let _ = image.load(entry);
        }
    }
}

/// Texts of configurations.
pub fn texts(text: &str) {
    let _ = parse::parse(text);
    let _ = extlinux::parse(text);
    let entry = bls::parse(text, text);
    let _ = bls::matches(text, &entry.id);
    let _ = version::compare(text, &entry.title);
    let _ = crate::grub::env::parse(text.as_bytes());
    fake::run(text);
}

/// An initrd.
pub fn initrd(bytes: &[u8]) {
    let _ = initrd::driver(bytes, initrd::BLOCK_DRIVER);
}

mod fake {
    use std::io;

    use crate::fs::Kind;
    use crate::grub::eval::Interpreter;
    use crate::grub::{Place, Search, World};

    /// A disk whose every file is the text itself.
    struct Echo<'a>(&'a str);

    impl World for Echo<'_> {
        fn kind(&mut self, _: &Place) -> io::Result<Kind> {
            Ok(Kind::File(1))
        }

        fn read(&mut self, _: &Place, _: u64) -> io::Result<Vec<u8>> {
            Ok(self.0.as_bytes().to_vec())
        }

        fn list(&mut self, _: &Place) -> io::Result<Vec<String>> {
            Ok(vec!["a.conf".into(), "b-1+2-3.conf".into()])
        }

        fn search(&mut self, _: Search<'_>, _: bool) -> Option<String> {
            Some("hd0,gpt1".into())
        }

        fn describe(&mut self, _: &str) -> Option<(String, String, &'static str)> {
            Some(("uuid".into(), "label".into(), "ext2"))
        }
    }

    pub fn run(text: &str) {
        let place = Place {
            device: "hd0,gpt1".into(),
            path: "/boot/grub/grub.cfg".into(),
            relative: false,
        };
        let mut world = Echo(text);
        let mut grub = Interpreter::new(&mut world, &place);
        if grub.run_file(&place).is_ok() {
            grub.open_submenus();
            for item in std::mem::take(&mut grub.items) {
                let _ = grub.start(&item, &item.title);
            }
        }
    }
}
