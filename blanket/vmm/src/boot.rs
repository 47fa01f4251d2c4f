//! What a VM boots: files that the user names, or what its first disk says.

use std::fs::File;
use std::io::{self, Read as _};
use std::path::Path;
use std::sync::Arc;

use blanket_boot::{Image, Source, initrd};
use blanket_disk::Reader;

use crate::instance::{Error, Spec};
use crate::kernel::{self, Kernel};

/// Longest list of passed-over pieces of a boot configuration that goes to the log.
const NOTES: usize = 8;

/// A kernel and what it is started with.
pub(crate) struct Start {
    pub kernel: Kernel,
    pub initrd: Option<Vec<u8>>,
    pub cmdline: String,
    /// For people: which kernel it is.
    pub description: String,
}

/// Reads the files that the user named.
pub(crate) fn from_files(spec: &Spec, kernel: &Path) -> Result<Start, Error> {
    Ok(Start {
        kernel: Kernel::load_or(kernel, spec.opened.kernel.as_deref())?,
        initrd: match &spec.initrd {
            Some(path) => Some(read_initrd(path, spec.opened.initrd.as_deref())?),
            None => None,
        },
        cmdline: with_console("", &spec.cmdline),
        description: kernel.display().to_string(),
    })
}

/// Reads what the disk at `path` boots. It is a stranger's, and may change with each boot.
pub(crate) fn from_disk(spec: &Spec, path: &Path, reader: Reader) -> Result<Start, Error> {
    let failed = |source| Error::Boot {
        path: path.to_owned(),
        source,
    };
    let mut image = Image::open(Arc::new(Disk(reader))).map_err(failed)?;
    let menu = image.menu().map_err(failed)?;
    for note in menu.notes.iter().take(NOTES) {
        tracing::info!("{}: {note}", path.display());
    }
    let entry = menu.pick(spec.boot_entry.as_deref()).map_err(failed)?;
    let loaded = image.load(entry).map_err(failed)?;
    tracing::info!("{}: boots {}", path.display(), loaded.description);
    let kernel = Kernel::parse(loaded.kernel).map_err(|kind| kernel::Error {
        path: path.join(entry.kernel().trim_start_matches('/')),
        kind,
    })?;
    // No more than a warning: a kernel may have the driver built in, which an initrd need
    // not say.
    if let Err(problem) = initrd::driver(&loaded.initrd, initrd::BLOCK_DRIVER) {
        tracing::warn!("{}: {problem}", path.display());
    }
    Ok(Start {
        kernel,
        initrd: Some(loaded.initrd).filter(|initrd| !initrd.is_empty()),
        cmdline: with_console(&loaded.cmdline, &spec.cmdline),
        description: format!("{}: {}", path.display(), loaded.description),
    })
}

/// What an image offers to boot.
#[derive(Clone, Debug)]
pub struct Offer {
    /// Where its boot configuration is.
    pub config: String,
    /// Titles and kernels, in the menu's order.
    pub entries: Vec<(String, String)>,
    /// What was passed over in the configuration.
    pub notes: Vec<String>,
    /// The entry that would be booted: its files, and its whole command line.
    pub chosen: (String, String),
    /// Why a VM of it would not come up; empty if nothing is seen.
    pub problems: Vec<String>,
}

/// Looks what an image would boot as a VM, and whether it can.
///
/// # Errors
/// There is nothing to boot in it, or no such entry.
pub fn look(reader: Reader, entry: Option<&str>) -> Result<Offer, blanket_boot::Error> {
    let mut image = Image::open(Arc::new(Disk(reader)))?;
    let menu = image.menu()?;
    let chosen = menu.pick(entry)?;
    let loaded = image.load(chosen)?;
    let kernel = Kernel::parse(loaded.kernel).err();
    let driver = initrd::driver(&loaded.initrd, initrd::BLOCK_DRIVER).err();
    let problems = [
        kernel.map(|kind| format!("the kernel {} {kind}", chosen.kernel())),
        driver.map(|problem| problem.to_string()),
    ];
    let name = |entry: &blanket_boot::Entry| (entry.title.clone(), entry.kernel().to_owned());
    Ok(Offer {
        config: menu.config.clone(),
        entries: menu.entries.iter().map(name).collect(),
        notes: menu.notes.clone(),
        chosen: (loaded.description, with_console(&loaded.cmdline, "")),
        problems: problems.into_iter().flatten().collect(),
    })
}

/// The image's command line and the user's, with the console that Blanket gives as the
/// last one, which is the one that `/dev/console` is.
pub(crate) fn with_console(image: &str, user: &str) -> String {
    let mut words: Vec<&str> = [image, user]
        .into_iter()
        .flat_map(str::split_ascii_whitespace)
        .collect();
    let last = words.iter().rev().find(|word| word.starts_with("console="));
    let by_user = user.split_ascii_whitespace();
    let chosen = by_user.rev().find(|word| word.starts_with("console="));
    let has = last.is_some_and(|word| *word == "console=hvc0" || word.starts_with("console=hvc0,"));
    // A user who names another console last wants that one for /dev/console.
    let before = chosen.is_some() && !has;
    match (has, before) {
        (true, _) => {}
        (false, true) => words.insert(0, "console=hvc0"),
        (false, false) => words.push("console=hvc0"),
    }
    words.join(" ")
}

fn read_initrd(path: &Path, opened: Option<&File>) -> Result<Vec<u8>, Error> {
    let failed = |source| Error::Initrd {
        path: path.to_owned(),
        source,
    };
    let mut bytes = Vec::new();
    kernel::open(path, opened)
        .and_then(|mut file| file.read_to_end(&mut bytes))
        .map_err(failed)?;
    if bytes.is_empty() {
        return Err(failed(io::Error::new(
            io::ErrorKind::InvalidData,
            "the file is empty",
        )));
    }
    Ok(bytes)
}

/// An image for the crate that looks into it.
struct Disk(Reader);

impl Source for Disk {
    fn size(&self) -> u64 {
        self.0.size()
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read_exact_at(offset, buffer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_console_is_the_last_one_unless_the_user_says_otherwise() {
        for (image, user, all) in [
            ("", "", "console=hvc0"),
            ("", "quiet", "quiet console=hvc0"),
            ("", "a console=hvc0 b", "a console=hvc0 b"),
            ("", "console=ttyS0", "console=hvc0 console=ttyS0"),
            (
                "root=/dev/xvda1 ro console=ttyS0",
                "",
                "root=/dev/xvda1 ro console=ttyS0 console=hvc0",
            ),
            (
                "console=tty0 console=ttyS0,115200",
                "single",
                "console=tty0 console=ttyS0,115200 single console=hvc0",
            ),
        ] {
            assert_eq!(with_console(image, user), all);
        }
    }
}
