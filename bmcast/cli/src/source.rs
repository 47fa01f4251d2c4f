//! An image that is served: its bytes and its manifest.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use blanket_disk::{Options, Reader};
use bmcast_image::{Chunks, Hash, MAX_MANIFEST, Manifest, ManifestError, SECTOR};
use serde::Serialize;

use crate::args::ManifestArgs;
use crate::exit::{self, Code, Error};
use crate::profile;

/// An image and its manifest.
#[derive(Debug)]
pub struct Source {
    /// Its bytes.
    pub reader: Reader,
    /// Its manifest.
    pub manifest: Manifest,
}

impl Source {
    /// Opens an image, with the manifest that lies beside it or, if that is older or of other chunks,
    /// a new one.
    pub fn open(image: &Path, chunk: Option<u32>) -> Result<Self, Error> {
        let (reader, newest) = open(image)?;
        let beside = beside(image);
        if let Some(manifest) = kept(&beside, newest)
            && manifest.chunks().image_bytes() == reader.size()
            && chunk.is_none_or(|chunk| chunk == manifest.chunks().chunk_bytes())
        {
            return Ok(Self { reader, manifest });
        }
        let manifest = make(
            image,
            &reader,
            chunk.unwrap_or(bmcast_image::DEFAULT_CHUNK),
            Vec::new(),
        )?;
        if let Err(error) = write(&beside, manifest.as_bytes(), 0o644) {
            tracing::warn!("the manifest is made again next time: {error}");
        }
        Ok(Self { reader, manifest })
    }
}

/// Opens an image; and when it, or what it stands on, was changed last.
fn open(image: &Path) -> Result<(Reader, Option<SystemTime>), Error> {
    let failed = |error: blanket_disk::Error| {
        let code = match image.exists() {
            true => Code::Failed,
            false => Code::NotFound,
        };
        Error::new(code, error.to_string(), "")
    };
    let options = Options::read_only();
    let opened = blanket_disk::open(image, &options).map_err(failed)?;
    let chain = blanket_disk::info(image, &options).map_err(failed)?;
    let changed = |path: &Path| path.metadata().and_then(|data| data.modified()).ok();
    let times: Option<Vec<SystemTime>> = chain.iter().map(|info| changed(&info.path)).collect();
    let newest = times.and_then(|times| times.into_iter().max());
    Ok((opened.reader(), newest))
}

fn beside(image: &Path) -> PathBuf {
    let mut name = image.as_os_str().to_owned();
    name.push(".manifest");
    name.into()
}

/// The manifest in a file that is newer than the image.
fn kept(file: &Path, image_changed: Option<SystemTime>) -> Option<Manifest> {
    let data = file.metadata().ok()?;
    let is_newer = data.modified().ok()? > image_changed?;
    if !is_newer || data.len() > MAX_MANIFEST as u64 {
        return None;
    }
    Manifest::parse(std::fs::read(file).ok()?).ok()
}

/// Sums all chunks.
fn make(image: &Path, reader: &Reader, chunk: u32, profile: Vec<u32>) -> Result<Manifest, Error> {
    tracing::info!("{}: its chunks are summed", image.display());
    let wrong = |error: ManifestError| {
        let hint = "larger chunks make room for larger images: --chunk 1M";
        Error::new(
            Code::BadRequest,
            format!("{}: {error}", image.display()),
            hint,
        )
    };
    let chunks = Chunks::new(reader.size(), chunk).map_err(wrong)?;
    let mut sums = Vec::with_capacity(usize::try_from(chunks.count()).unwrap_or(0));
    let mut data = Vec::new();
    for number in 0..chunks.count() {
        data.resize(usize::try_from(chunks.length(number)).unwrap_or(0), 0);
        reader
            .read_exact_at(chunks.offset(number), &mut data)
            .map_err(|error| Error::file(image, &error))?;
        sums.push(Hash::of(&data));
    }
    Manifest::new(chunks, &sums, profile).map_err(wrong)
}

/// Writes a file all at once, with these permissions, less the umask.
pub fn write(path: &Path, bytes: &[u8], permissions: u32) -> Result<(), Error> {
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let all = || {
        let mut builder = tempfile::Builder::new();
        let mut file = builder
            .permissions(mode(permissions))
            .tempfile_in(directory)?;
        file.write_all(bytes)?;
        file.as_file().sync_all()?;
        file.persist(path).map_err(|error| error.error)
    };
    all().map(drop).map_err(|error| Error::file(path, &error))
}

/// A file's mode, less the umask.
pub fn mode(mode: u32) -> std::fs::Permissions {
    std::os::unix::fs::PermissionsExt::from_mode(mode)
}

#[derive(Serialize)]
struct Made {
    manifest: PathBuf,
    id: String,
    image_bytes: u64,
    image_sectors: u64,
    chunk_bytes: u32,
    chunks: u32,
    chunks_of_zeros: usize,
}

/// Carries out `manifest`.
pub fn command(arguments: ManifestArgs, json: bool) -> Result<(), Error> {
    let profile = match &arguments.profile {
        Some(file) => profile::read(file)?,
        None => Vec::new(),
    };
    let (reader, _) = open(&arguments.image)?;
    let manifest = make(&arguments.image, &reader, arguments.cut.chunk(), profile)?;
    let file = arguments.out.unwrap_or_else(|| beside(&arguments.image));
    write(&file, manifest.as_bytes(), 0o644)?;
    let chunks = manifest.chunks();
    let made = Made {
        manifest: file,
        id: manifest.id().to_string(),
        image_bytes: chunks.image_bytes(),
        image_sectors: chunks.image_bytes() / SECTOR,
        chunk_bytes: chunks.chunk_bytes(),
        chunks: chunks.count(),
        chunks_of_zeros: (0..chunks.count()).filter(|n| manifest.is_zero(*n)).count(),
    };
    exit::show(&made, json, |made| format!("{}\n", made.id))
}

#[cfg(test)]
mod tests {
    use std::fs::{File, FileTimes};
    use std::time::Duration;

    use super::*;

    fn touch(path: &Path, seconds: u64) {
        let time = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        let file = File::options().write(true).open(path).unwrap();
        file.set_times(FileTimes::new().set_modified(time)).unwrap();
    }

    #[test]
    fn a_manifest_is_kept_while_it_is_newer() {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("a.raw");
        std::fs::write(&image, vec![1; 100 << 10]).unwrap();
        touch(&image, 1000);
        let first = Source::open(&image, None).unwrap();
        let kept = beside(&image);
        touch(&kept, 2000);
        // The same time, so that nobody sees that it has changed.
        std::fs::write(&image, vec![2; 100 << 10]).unwrap();
        touch(&image, 1000);
        let again = Source::open(&image, None).unwrap();
        assert_eq!(again.manifest, first.manifest);
        touch(&image, 2000);
        let other = Source::open(&image, None).unwrap();
        assert_ne!(other.manifest, first.manifest);
        touch(&kept, 3000);
        let cut = Source::open(&image, Some(16 << 10)).unwrap();
        assert_eq!(cut.manifest.chunks().count(), 7);
        // A damaged one is made again.
        std::fs::write(&kept, b"nothing").unwrap();
        assert_eq!(Source::open(&image, None).unwrap().manifest, other.manifest);
    }

    #[test]
    fn images_that_are_none() {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("a.raw");
        let error = Source::open(&image, None).unwrap_err();
        assert_eq!(error.code, Code::NotFound);
        std::fs::write(&image, b"odd").unwrap();
        let error = Source::open(&image, None).unwrap_err();
        assert!(error.message.contains("512"), "{error}");
    }
}
