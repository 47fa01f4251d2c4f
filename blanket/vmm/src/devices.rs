//! The devices of a VM, kept over its reboots, attached and detached while it runs.

use std::io;
use std::path::PathBuf;
use std::sync::{Arc, MutexGuard};
use std::time::Duration;

use blanket_devices::block::{self, Vbd};
use blanket_devices::bus::{self, Bus, Device, Report};
use blanket_devices::net::Vif;
use blanket_disk::Reader;

use crate::instance::Instance;
use crate::sync::lock;

/// The image of a disk.
#[derive(Clone, Debug)]
pub struct DiskFile {
    /// Where it is.
    pub path: PathBuf,
    /// What the guest sees in it.
    pub reader: Reader,
    /// Which content it stands on, by any name that tells it. Where the same is, that part of
    /// it need not be moved to.
    pub base: Option<String>,
}

/// A device of any class.
#[derive(Clone)]
pub enum AnyDevice {
    /// A disk, and the file that it is in.
    Disk(Arc<Vbd>, DiskFile),
    /// A network.
    Net(Arc<Vif>),
}

impl AnyDevice {
    /// As the bus knows it.
    pub(crate) fn as_device(&self) -> Arc<dyn Device> {
        match self {
            Self::Disk(disk, _) => Arc::clone(disk) as _,
            Self::Net(net) => Arc::clone(net) as _,
        }
    }

    fn is(&self, class: &str, number: u32) -> bool {
        let device = self.as_device();
        device.class() == class && device.number() == number
    }
}

/// The devices that a VM has, kept over its reboots.
#[derive(Default)]
pub(crate) struct Devices(Vec<Slot>);

struct Slot {
    device: AnyDevice,
    /// It was asked for. The guest may hold it for long.
    leaving: bool,
}

impl Devices {
    /// Forgets those that the guest has let go of, or that one that reboots lets go of.
    pub(crate) fn prune(&mut self, bus: Option<&Bus>) {
        self.0.retain(|slot| {
            let device = slot.device.as_device();
            let there = |bus: &Bus| bus.report(device.class(), device.number()).is_some();
            !slot.leaving || bus.is_some_and(there)
        });
    }

    /// Class and number of each.
    pub(crate) fn numbers(&self) -> Vec<(String, u32)> {
        let each = |device: &AnyDevice| {
            let device = device.as_device();
            (device.class().to_owned(), device.number())
        };
        self.iter().map(each).collect()
    }

    /// Number of each disk that stands on content that is known, and its name.
    pub(crate) fn bases(&self) -> Vec<(u32, String)> {
        let known = self.iter().filter_map(|device| match device {
            AnyDevice::Disk(disk, DiskFile { base, .. }) => Some((disk.number(), base.clone()?)),
            AnyDevice::Net(_) => None,
        });
        known.collect()
    }

    /// Number and size, bytes, of each disk.
    pub(crate) fn sizes(&self) -> Vec<(u32, u64)> {
        self.iter()
            .filter_map(|device| match device {
                AnyDevice::Disk(disk, _) => Some((disk.number(), disk.disk().size())),
                AnyDevice::Net(_) => None,
            })
            .collect()
    }

    /// Number and MAC of each network.
    pub(crate) fn macs(&self) -> Vec<(u32, String)> {
        self.iter()
            .filter_map(|device| match device {
                AnyDevice::Net(net) => Some((net.number(), net.mac().to_string())),
                AnyDevice::Disk(..) => None,
            })
            .collect()
    }

    /// All of them, in the order in which they were added.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &AnyDevice> {
        self.0.iter().map(|slot| &slot.device)
    }
}

/// Why a device of a VM could not be changed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The bus.
    #[error(transparent)]
    Bus(#[from] bus::Error),
    /// The image.
    #[error("{device}: its size cannot be changed: {source}")]
    Resize {
        /// The device, by the guest's name.
        device: String,
        /// The cause.
        source: io::Error,
    },
}

impl Instance {
    /// Adds a device. A guest that runs finds it at once.
    ///
    /// # Errors
    /// The VM has one with its number.
    pub fn attach(&self, device: AnyDevice) -> Result<(), Error> {
        let mut devices = self.present();
        let new = device.as_device();
        let (class, number) = (new.class(), new.number());
        if devices.iter().any(|other| other.is(class, number)) {
            return Err(bus::Error::Exists { class, number }.into());
        }
        if let Some(bus) = self.running_bus() {
            bus.attach(new)?;
        }
        devices.0.push(Slot {
            device,
            leaving: false,
        });
        Ok(())
    }

    /// Takes a device away, once its guest lets go of it; at the latest when it reboots.
    ///
    /// # Errors
    /// There is none; the guest uses it for longer than `timeout`.
    pub fn detach(&self, class: &'static str, number: u32, timeout: Duration) -> Result<(), Error> {
        let mut devices = self.present();
        let mut slots = devices.0.iter_mut();
        let slot = slots.find(|slot| slot.device.is(class, number));
        slot.ok_or(bus::Error::Missing { class, number })?.leaving = true;
        let bus = self.running_bus();
        drop(devices);
        let gone = bus.map_or(Ok(()), |bus| bus.detach(class, number, timeout));
        drop(self.present());
        match gone {
            // It went by itself meanwhile, with the guest's reboot for instance.
            Err(bus::Error::Missing { .. }) => Ok(()),
            other => Ok(other?),
        }
    }

    /// The devices that the VM has now.
    fn present(&self) -> MutexGuard<'_, Devices> {
        let mut devices = lock(&self.devices);
        devices.prune(self.running_bus().as_deref());
        devices
    }

    /// The disks, in the order in which they were added.
    #[must_use]
    pub fn disks(&self) -> Vec<(Arc<Vbd>, PathBuf)> {
        self.present()
            .iter()
            .filter_map(|device| match device {
                AnyDevice::Disk(disk, file) => Some((Arc::clone(disk), file.path.clone())),
                AnyDevice::Net(_) => None,
            })
            .collect()
    }

    /// The networks, in the order in which they were added.
    #[must_use]
    pub fn networks(&self) -> Vec<Arc<Vif>> {
        self.present()
            .iter()
            .filter_map(|device| match device {
                AnyDevice::Net(net) => Some(Arc::clone(net)),
                AnyDevice::Disk(..) => None,
            })
            .collect()
    }

    /// The image of the first disk.
    pub(crate) fn first_disk(&self) -> Option<DiskFile> {
        self.present().iter().find_map(|device| match device {
            AnyDevice::Disk(_, file) => Some(file.clone()),
            AnyDevice::Net(_) => None,
        })
    }

    /// Gives a disk another size, in its image and in the guest.
    ///
    /// # Errors
    /// There is none; the image cannot have that size.
    pub fn resize(&self, number: u32, size: u64) -> Result<(), Error> {
        let class = block::CLASS;
        let disk = self
            .disks()
            .into_iter()
            .map(|(disk, _)| disk)
            .find(|disk| disk.number() == number)
            .ok_or(bus::Error::Missing { class, number })?;
        disk.disk().resize(size).map_err(|source| Error::Resize {
            device: block::device_name(disk.config().index),
            source,
        })?;
        if let Some(bus) = self.running_bus() {
            bus.refresh(class, number, &disk.size_nodes())?;
        }
        Ok(())
    }

    /// What a device is doing; `None` if the VM does not run.
    #[must_use]
    pub fn device_report(&self, class: &'static str, number: u32) -> Option<Report> {
        self.running_bus()?.report(class, number)
    }
}

#[cfg(test)]
mod tests;
