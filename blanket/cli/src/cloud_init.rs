//! `--cloud-init`: the disk by which the guest learns what it shall become.

use std::fs;
use std::io::Write as _;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context as _, Result};
use blanket_seed::Seed;
use blanket_vmm::devices::AnyDevice;
use blanket_vmm::entropy;
use rustix::fs::{MemfdFlags, memfd_create};

use crate::disk::DiskSpec;

/// What `--cloud-init` is.
pub const HELP: &str = "\
Gives the guest's cloud-init its user-data on a further disk, made in memory: FILE[,meta=FILE][,network=FILE]. \
Without `meta`, the host name is the VM's name, and an unchanged VM is the same instance at its next start. \
The disk also has random bytes, others at each start, which cloud-init gives to the guest's kernel \
when an instance starts for the first time.";

/// Files for cloud-init.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CloudInit {
    user_data: PathBuf,
    meta_data: Option<PathBuf>,
    network_config: Option<PathBuf>,
}

impl FromStr for CloudInit {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = text.split(',');
        let user_data = parts.next().filter(|path| !path.is_empty());
        let mut this = Self {
            user_data: user_data.ok_or("the user-data file is missing")?.into(),
            meta_data: None,
            network_config: None,
        };
        for part in parts {
            match part.split_once('=') {
                Some(("meta", path)) if !path.is_empty() => this.meta_data = Some(path.into()),
                Some(("network", path)) if !path.is_empty() => {
                    this.network_config = Some(path.into());
                }
                _ => {
                    return Err(format!(
                        "{part} is unknown; there are meta=FILE and network=FILE"
                    ));
                }
            }
        }
        Ok(this)
    }
}

impl CloudInit {
    /// The seed of the VM `name`, as an image.
    fn image(&self, name: &str) -> Result<Vec<u8>> {
        let seed = Seed {
            user_data: read(&self.user_data)?,
            meta_data: self.meta_data.as_deref().map(read).transpose()?,
            network_config: self.network_config.as_deref().map(read).transpose()?,
            random: Some(entropy::bytes().context("the host gave no random bytes")?),
        };
        seed.image(name)
            .with_context(|| self.user_data.display().to_string())
    }

    /// Writes the seed of the VM `name` to a new file, which its owner alone may read.
    pub fn write(&self, to: &Path, name: &str) -> Result<()> {
        let image = self.image(name)?;
        let file = fs::File::options()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(to);
        let written =
            file.and_then(|mut file| file.write_all(&image).and_then(|()| file.sync_all()));
        written.with_context(|| to.display().to_string())
    }

    /// The disk, as number `index` of the VM `name`.
    pub fn disk(&self, index: u32, name: &str, vcpus: u32) -> Result<AnyDevice> {
        let image = self.image(name)?;
        let file =
            memfd_create("cloud-init", MemfdFlags::CLOEXEC).context("no memory for the seed")?;
        fs::write(descriptor(file.as_raw_fd()), image).context("cannot write the seed")?;
        // Opened again, it outlives this descriptor.
        let path = descriptor(file.as_raw_fd());
        let spec = format!("{},format=raw,ro,lock=off", path.display());
        let spec: DiskSpec = spec.parse().map_err(anyhow::Error::msg)?;
        spec.open_as("cloud-init seed".into(), index, vcpus)
    }
}

fn descriptor(fd: i32) -> PathBuf {
    format!("/proc/self/fd/{fd}").into()
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("--cloud-init: cannot read {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_for_cloud_init() {
        let all: CloudInit = "u.yaml,meta=m,network=n".parse().expect("right");
        assert_eq!(all.network_config.as_deref(), Some(Path::new("n")));
        for wrong in ["", ",meta=m", "u,meta=", "u,vendor=v", "u,"] {
            assert!(wrong.parse::<CloudInit>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_seed_is_a_disk() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("user-data");
        fs::write(&path, "#cloud-config\n").expect("written");
        let cloud_init: CloudInit = path.display().to_string().parse().expect("right");
        let AnyDevice::Disk(vbd, file) = cloud_init.disk(1, "web", 1).expect("a disk") else {
            panic!("no disk")
        };
        assert!(vbd.disk().read_only() && vbd.disk().size() > 100 << 10);
        let mut sector = [0; 512];
        file.reader.read_exact_at(0, &mut sector).expect("read");
        assert_eq!(sector[510..], [0x55, 0xaa]);
        // The same as a file, which is not overwritten.
        let image = directory.path().join("seed");
        cloud_init.write(&image, "web").expect("written");
        assert_eq!(
            fs::metadata(&image).expect("there").len(),
            vbd.disk().size()
        );
        assert!(cloud_init.write(&image, "web").is_err());
        fs::write(&path, "hello\n").expect("written");
        assert!(cloud_init.disk(1, "web", 1).is_err());
    }
}
