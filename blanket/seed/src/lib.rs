#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

use std::io::{self, Cursor, Write as _};

use fatfs::{FatType, FileSystem, FormatVolumeOptions, FsOptions};
use sha2::{Digest as _, Sha256};

/// Bytes of the image without what is in it.
const EMPTY: usize = 128 << 10;
/// Most bytes of a file; cloud-init's sources have 16 KiB to 1 MiB.
pub const MOST: usize = 1 << 20;
/// The label that cloud-init looks for.
const LABEL: [u8; 11] = *b"CIDATA     ";

/// What cloud-init is told.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seed {
    /// What the VM shall become.
    pub user_data: Vec<u8>,
    /// Who it is; made of its name if there is none.
    pub meta_data: Option<Vec<u8>>,
    /// Its network.
    pub network_config: Option<Vec<u8>>,
    /// Random bytes for its kernel, which no other VM gets.
    pub random: Option<[u8; 32]>,
}

/// Why a seed cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// cloud-init would ignore it without a word.
    #[error(
        "the user-data begins with {0:?}, which cloud-init does not know: its first line must be \
         `#cloud-config`, `#!` with an interpreter, or another of its headers \
         (https://cloudinit.readthedocs.io)"
    )]
    Header(String),
    /// A file is too large.
    #[error("{what} has {size} bytes; cloud-init takes at most {MOST}")]
    Size {
        /// Which.
        what: &'static str,
        /// Its bytes.
        size: usize,
    },
    /// The file system could not be made.
    #[error("cannot make the seed's file system: {0}")]
    Fat(#[from] io::Error),
}

/// First words of user-data that cloud-init acts on
/// (<https://cloudinit.readthedocs.io/en/latest/explanation/format.html>).
const HEADERS: &[&str] = &[
    "#cloud-config",
    "#!",
    "#include",
    "#cloud-boothook",
    "#part-handler",
    "## template: jinja",
    "Content-Type:",
    "MIME-Version:",
    "From ",
];

impl Seed {
    /// The image for the VM `name`: a whole number of sectors.
    ///
    /// # Errors
    /// A file that cloud-init would not take.
    pub fn image(&self, name: &str) -> Result<Vec<u8>, Error> {
        self.check()?;
        let made;
        let meta_data = match &self.meta_data {
            Some(given) => given,
            None => {
                made = self.made_meta_data(name).into_bytes();
                &made
            }
        };
        let mut files = vec![
            ("user-data", self.user_data.as_slice()),
            ("meta-data", meta_data),
        ];
        let random = self.random.map(|bytes| vendor_data(&bytes));
        if let Some(text) = &random {
            files.push(("vendor-data", text.as_bytes()));
        }
        if let Some(config) = &self.network_config {
            files.push(("network-config", config));
        }
        for (what, bytes) in &files {
            if bytes.len() > MOST {
                return Err(Error::Size {
                    what,
                    size: bytes.len(),
                });
            }
        }
        let content: usize = files.iter().map(|(_, bytes)| bytes.len()).sum();
        let mut image = vec![0; (EMPTY + content).next_multiple_of(4096)];
        let options = FormatVolumeOptions::new()
            .volume_label(LABEL)
            .fat_type(FatType::Fat12)
            // Of the content, so that the same seed is the same image.
            .volume_id(u32::from_le_bytes(first(&self.digest(name))));
        fatfs::format_volume(Cursor::new(&mut image), options)?;
        {
            let system = FileSystem::new(Cursor::new(&mut image), FsOptions::new())?;
            for (name, bytes) in files {
                let mut file = system.root_dir().create_file(name)?;
                file.write_all(bytes)?;
                file.flush()?;
            }
            system.unmount()?;
        }
        Ok(image)
    }

    fn check(&self) -> Result<(), Error> {
        // gzip is unpacked first.
        let gzip = self.user_data.starts_with(&[0x1f, 0x8b]);
        let known = |header: &&str| self.user_data.starts_with(header.as_bytes());
        if self.user_data.is_empty() || gzip || HEADERS.iter().any(known) {
            return Ok(());
        }
        let line = self.user_data.split(|byte| *byte == b'\n').next();
        let line = String::from_utf8_lossy(line.unwrap_or_default());
        Err(Error::Header(line.chars().take(60).collect()))
    }

    fn digest(&self, name: &str) -> [u8; 32] {
        let mut digest = Sha256::new();
        digest.update(name.as_bytes());
        digest.update([0]);
        digest.update(&self.user_data);
        digest.finalize().into()
    }

    fn made_meta_data(&self, name: &str) -> String {
        let [a, b, c, d]: [u8; 4] = first(&self.digest(name));
        format!("instance-id: {name}-{a:02x}{b:02x}{c:02x}{d:02x}\nlocal-hostname: {name}\n")
    }
}

/// Has cloud-init's `seed_random` write the bytes to the guest's `/dev/urandom`, before
/// it makes keys
/// (<https://cloudinit.readthedocs.io/en/latest/reference/modules.html#seed-random>).
/// Vendor data and not meta-data: those are for everybody to read in the guest.
fn vendor_data(random: &[u8; 32]) -> String {
    let hex: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("#cloud-config\nrandom_seed:\n  data: \"{hex}\"\n")
}

fn first(digest: &[u8; 32]) -> [u8; 4] {
    let [a, b, c, d, ..] = *digest;
    [a, b, c, d]
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;

    fn read(image: &[u8], name: &str) -> Option<Vec<u8>> {
        let system = FileSystem::new(Cursor::new(image.to_vec()), FsOptions::new()).expect("FAT");
        assert_eq!(system.volume_label(), "CIDATA");
        let mut bytes = Vec::new();
        system
            .root_dir()
            .open_file(name)
            .ok()?
            .read_to_end(&mut bytes)
            .expect("read");
        Some(bytes)
    }

    fn seed(user_data: &[u8]) -> Seed {
        Seed {
            user_data: user_data.to_vec(),
            ..Seed::default()
        }
    }

    #[test]
    fn files_are_found_by_their_names() {
        let one = seed(b"#cloud-config\nhostname: a\n");
        let image = one.image("web").expect("a seed");
        assert_eq!(image.len() % 512, 0);
        assert_eq!(read(&image, "user-data").as_ref(), Some(&one.user_data));
        assert_eq!(read(&image, "network-config"), None);
        assert_eq!(read(&image, "vendor-data"), None);
        let meta = String::from_utf8(read(&image, "meta-data").expect("made")).expect("text");
        assert!(meta.contains("local-hostname: web\n"), "{meta}");
        assert_eq!(image, one.image("web").expect("again"), "the same");
        let id = |meta: &str| meta.lines().next().map(str::to_owned);
        let other = seed(b"#cloud-config\nhostname: b\n")
            .image("web")
            .expect("other");
        let other = String::from_utf8(read(&other, "meta-data").expect("made")).expect("text");
        assert_ne!(
            id(&meta),
            id(&other),
            "other user-data are another instance"
        );
        let all = Seed {
            meta_data: Some(b"instance-id: x\n".to_vec()),
            network_config: Some(vec![b'n'; MOST]),
            ..one
        };
        let image = all.image("web").expect("a seed");
        assert_eq!(read(&image, "meta-data"), all.meta_data);
        assert_eq!(read(&image, "network-config"), all.network_config);
    }

    #[test]
    fn random_bytes_change_nothing_else() {
        let without = seed(b"#cloud-config\n");
        let with = Seed {
            random: Some([0xa5; 32]),
            ..without.clone()
        };
        let [one, two] = [&without, &with].map(|seed| seed.image("web").expect("a seed"));
        for name in ["user-data", "meta-data"] {
            assert_eq!(read(&one, name), read(&two, name));
        }
        let text = String::from_utf8(read(&two, "vendor-data").expect("there")).expect("text");
        let want = format!(
            "#cloud-config\nrandom_seed:\n  data: \"{}\"\n",
            "a5".repeat(32)
        );
        assert_eq!(text, want);
    }

    #[test]
    fn what_cloud_init_would_ignore_is_refused() {
        for right in [
            &b""[..],
            b"#cloud-config\n",
            b"#!/bin/sh\n",
            b"\x1f\x8bx",
            b"## template: jinja\n#cloud-config\n",
        ] {
            seed(right).image("a").expect("known");
        }
        for wrong in ["hostname: a\n", " #cloud-config", "\u{feff}#cloud-config"] {
            let error = seed(wrong.as_bytes()).image("a").expect_err("ignored");
            assert!(error.to_string().contains("first line"), "{error}");
        }
        let large = seed(&[b"#!".as_slice(), &[0; MOST]].concat());
        assert!(matches!(large.image("a"), Err(Error::Size { .. })));
    }
}
