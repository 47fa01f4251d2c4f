//! Who has written which sectors of a machine's disk, by the emulator's own trace of its controllers.
//!
//! A system writes where its file systems want it, so that nobody can say in advance what a disk is to hold. But QEMU
//! says of each command what it writes and where the command came from: the VMM's come from tables or a queue in the VMM's memory.

use std::fs::File;
use std::io::{BufRead as _, BufReader, Read};
use std::ops::Range;
use std::path::Path;

use anyhow::{Context as _, Result, bail, ensure};

/// Events that are looked at (`hw/ide/trace-events` and `hw/nvme/trace-events` of QEMU).
pub const EVENTS: &[&str] = &[
    "ahci_port_write",
    "ide_dma_cb",
    "execute_ncq_command_write",
    "pci_nvme_create_sq",
    "pci_nvme_io_cmd",
    "pci_nvme_write",
    "pci_nvme_dsm_deallocate",
];

/// Nobody has written the sector.
const NOBODY: u8 = 0;
/// The VMM has.
const VMM: u8 = 1;
/// The guest has.
const GUEST: u8 = 2;

/// Who has written what.
pub struct Written {
    /// The VMM's memory.
    own: Range<u64>,
    /// The last writer of each sector.
    by: Vec<u8>,
    /// The command that is looked at is the VMM's.
    owns_command: bool,
    /// NVMe: the VMM's queue.
    own_queue: Option<u64>,
    /// Sectors that the VMM wrote after the guest had.
    pub lost: Vec<usize>,
    /// The guest has discarded something by SATA, where the trace does not say what.
    pub discarded: bool,
}

impl Written {
    /// Nothing is written of `sectors` yet; the VMM's memory is `own`.
    pub fn new(sectors: usize, own: Range<u64>) -> Self {
        Self {
            own,
            by: vec![NOBODY; sectors],
            owns_command: false,
            own_queue: None,
            lost: Vec::new(),
            discarded: false,
        }
    }

    /// Reads the whole trace.
    pub fn read(mut self, trace: &Path) -> Result<Self> {
        let file = File::open(trace).with_context(|| format!("cannot read {}", trace.display()))?;
        for line in BufReader::new(file).lines() {
            let line = line?;
            self.line(&line)
                .with_context(|| format!("the emulator's trace says {line:?}"))?;
        }
        Ok(self)
    }

    /// One line of the trace.
    fn line(&mut self, line: &str) -> Result<()> {
        let (event, text) = line.split_once(' ').unwrap_or((line, ""));
        match event {
            // The command list of the mediated port: whose memory it is in says whose the commands are.
            "ahci_port_write" if text.contains(")[0]:") && text.contains("[reg:PxCLB]") => {
                let value = text.rsplit(' ').next().unwrap_or_default();
                self.owns_command = self.own.contains(&number(value)?);
            }
            "ide_dma_cb" if text.ends_with("cmd=DMA WRITE") => {
                let from = number(after(text, "sector_num=")?)?;
                self.wrote(from, number(after(text, " n=")?)?);
            }
            "ide_dma_cb" => self.discarded |= text.ends_with("cmd=DMA TRIM"),
            "execute_ncq_command_write" => {
                let from = number(after(text, "to LBA ")?)?;
                self.wrote(from, number(after(text, "NCQ writing ")?)?);
            }
            "pci_nvme_create_sq" => {
                let queue = number(after(text, "sqid=")?)?;
                if self.own.contains(&number(after(text, "addr=")?)?) {
                    self.own_queue = Some(queue);
                } else if self.own_queue == Some(queue) {
                    self.own_queue = None;
                }
            }
            "pci_nvme_io_cmd" => {
                self.owns_command = self.own_queue == Some(number(after(text, "sqid ")?)?);
            }
            "pci_nvme_write" => {
                let from = number(after(text, "lba ")?)?;
                self.wrote(from, number(after(text, "nlb ")?)?);
            }
            "pci_nvme_dsm_deallocate" => {
                self.owns_command = false;
                let from = number(after(text, "slba ")?)?;
                self.wrote(from, number(after(text, "nlb ")?)?);
            }
            _ => {}
        }
        Ok(())
    }

    fn wrote(&mut self, from: u64, count: u64) {
        for sector in from..from.saturating_add(count) {
            let Some((sector, by)) = usize::try_from(sector)
                .ok()
                .and_then(|sector| Some((sector, self.by.get_mut(sector)?)))
            else {
                return;
            };
            if !self.owns_command {
                *by = GUEST;
            } else if *by == GUEST {
                self.lost.push(sector);
            } else {
                *by = VMM;
            }
        }
    }

    /// Sectors that the guest has written, and that the VMM has and the guest has not.
    pub fn counts(&self) -> (usize, usize) {
        let count = |who| self.by.iter().filter(|by| **by == who).count();
        (count(GUEST), count(VMM))
    }

    /// That each sector of `disk` that the guest has not written is the image's, and that the VMM wrote none that the
    /// guest had written.
    pub fn disk_is_right(&self, disk: &Path, image: &Path) -> Result<()> {
        ensure!(
            self.lost.is_empty(),
            "the VMM wrote {} sectors after the guest had, the first is {}",
            self.lost.len(),
            self.lost[0]
        );
        ensure!(
            !self.discarded,
            "the guest has discarded what the trace does not name"
        );
        self.same(File::open(disk)?, File::open(image)?)
    }

    /// That two disks have the same but for what the guest has written.
    fn same(&self, mut disk: impl Read, mut image: impl Read) -> Result<()> {
        let mut wrong = Vec::new();
        for (number, by) in self.by.chunks(2048).enumerate() {
            let mut found = vec![0; by.len() << 9];
            let mut wanted = found.clone();
            disk.read_exact(&mut found)?;
            image.read_exact(&mut wanted)?;
            if found != wanted {
                let sectors = found.chunks(512).zip(wanted.chunks(512)).zip(by);
                wrong.extend(
                    sectors
                        .enumerate()
                        .filter(|(_, ((found, wanted), by))| **by != GUEST && found != wanted)
                        .map(|(sector, _)| number * 2048 + sector),
                );
            }
        }
        if let Some(first) = wrong.first() {
            bail!(
                "{} sectors that the guest has not written are not the image's, the first is {first}",
                wrong.len()
            );
        }
        Ok(())
    }
}

/// What follows `name`.
fn after<'a>(text: &'a str, name: &str) -> Result<&'a str> {
    let (_, rest) = text
        .split_once(name)
        .with_context(|| format!("no {name:?} in it"))?;
    Ok(rest)
}

/// The number at the begin of a text.
fn number(text: &str) -> Result<u64> {
    let text = text
        .split(|character: char| !character.is_ascii_alphanumeric())
        .next()
        .unwrap_or_default();
    Ok(match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16)?,
        None => text.parse()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(lines: &[&str]) -> Written {
        let mut written = Written::new(32, 0x3000_0000..0x3400_0000);
        for line in lines {
            written.line(line).unwrap();
        }
        written
    }

    #[test]
    fn by_sata() {
        let clb = |to: &str| {
            format!("ahci_port_write ahci(0x5590)[0]: port write [reg:PxCLB] @ 0x0: {to}")
        };
        let written = of(&[
            &clb("0x0f000000"),
            "execute_ncq_command_write ahci(0x5590)[0][tag:3]: NCQ writing 2 sectors to LBA 8",
            &clb("0x30010000"),
            "ide_dma_cb IDEState 0x55; sector_num=0 n=8 cmd=DMA WRITE",
            "ide_dma_cb IDEState 0x55; sector_num=16 n=8 cmd=DMA READ",
            &clb("0x0f000000"),
            "ide_dma_cb IDEState 0x55; sector_num=1 n=1 cmd=DMA WRITE",
        ]);
        assert_eq!(written.counts(), (3, 7));
        assert!(written.lost.is_empty() && !written.discarded);
        let lost = of(&[
            "ide_dma_cb IDEState 0x55; sector_num=4 n=1 cmd=DMA WRITE",
            &clb("0x30010000"),
            "ide_dma_cb IDEState 0x55; sector_num=0 n=8 cmd=DMA WRITE",
        ]);
        assert_eq!(lost.lost, [4]);
    }

    #[test]
    fn by_nvme() {
        let written = of(&[
            "pci_nvme_create_sq create submission queue, addr=0x30020000, sqid=64, cqid=64, qsize=1, qflags=1",
            "pci_nvme_create_sq create submission queue, addr=0x1020000, sqid=1, cqid=1, qsize=1023, qflags=1",
            "pci_nvme_io_cmd cid 1 nsid 0x1 sqid 64 opc 0x1 opname 'NVME_NVM_CMD_WRITE'",
            "pci_nvme_write cid 1 opname 'NVME_NVM_CMD_WRITE' nsid 1 nlb 8 count 4096 lba 0x8",
            "pci_nvme_io_cmd cid 2 nsid 0x1 sqid 1 opc 0x1 opname 'NVME_NVM_CMD_WRITE'",
            "pci_nvme_write cid 2 opname 'NVME_NVM_CMD_WRITE' nsid 1 nlb 2 count 1024 lba 0x9",
            "pci_nvme_dsm_deallocate slba 12 nlb 1",
        ]);
        assert_eq!(written.counts(), (3, 5));
        assert!(written.lost.is_empty());
    }

    #[test]
    fn what_is_not_the_guests_is_compared() {
        let image = vec![7; 32 << 9];
        let mut disk = image.clone();
        disk[5 << 9] = 8;
        assert!(of(&[]).same(&*disk, &*image).is_err());
        let by_guest = of(&["ide_dma_cb IDEState 0x55; sector_num=5 n=1 cmd=DMA WRITE"]);
        by_guest.same(&*disk, &*image).unwrap();
    }
}
