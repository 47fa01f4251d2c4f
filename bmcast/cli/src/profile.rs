//! Profiles: the order in which a boot wanted the chunks of its image.

use std::path::Path;

use crate::args::ProfileArgs;
use crate::client;
use crate::exit::{Code, Error};
use crate::source;

/// Most bytes of a profile: 65536 numbers of chunks, each 4 bytes.
pub const MOST: usize = 4 << 16;

/// Carries out `profile`.
pub async fn command(arguments: ProfileArgs) -> Result<(), Error> {
    let ProfileArgs {
        machine,
        server,
        out,
    } = arguments;
    let found = client::get(&server, &format!("/machines/{machine}/profile"), MOST).await?;
    let Some(bytes) = found else {
        let text = format!("machine {machine} has told {server} no profile");
        return Err(Error::new(
            Code::NotFound,
            text,
            "it does so once its image is installed",
        ));
    };
    source::write(&out, &bytes, 0o644)
}

/// Reads a file of little-endian numbers.
pub fn read(file: &Path) -> Result<Vec<u32>, Error> {
    let failed = |error| Error::file(file, &error);
    let size = file.metadata().map_err(failed)?.len();
    if size > MOST as u64 || !size.is_multiple_of(4) {
        let text = format!("{}: it is no profile", file.display());
        return Err(Error::new(
            Code::BadRequest,
            text,
            "`bmcast profile` gets one",
        ));
    }
    let bytes = std::fs::read(file).map_err(failed)?;
    let words = bytes.chunks_exact(4);
    Ok(words
        .map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]]))
        .collect())
}
