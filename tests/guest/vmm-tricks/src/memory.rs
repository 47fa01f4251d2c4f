//! The VM's memory as this process has mapped it.

use crate::Result;

pub const PAGE: usize = 4096;

/// A range of addresses, all of it mapped by the VMM's library.
#[derive(Clone, Copy)]
pub struct Memory {
    pub start: usize,
    /// The guest's RAM and, behind it, what its hypervisor shows it.
    pub length: usize,
    ram: usize,
}

impl Memory {
    /// The mapping of the library's memory file, or the private one of that size.
    pub fn of_this_process(ram: u64, private: bool) -> Result<Self> {
        let maps = std::fs::read_to_string("/proc/self/maps").map_err(|e| e.to_string())?;
        let ram = usize::try_from(ram).map_err(|e| e.to_string())?;
        maps.lines()
            .filter_map(|line| {
                let (start, rest) = line.split_once('-')?;
                let (end, rest) = rest.split_once(' ')?;
                let start = usize::from_str_radix(start, 16).ok()?;
                let end = usize::from_str_radix(end, 16).ok()?;
                let ours = if private {
                    rest.starts_with("rw-p") && end - start < ram + (8 << 20)
                } else {
                    rest.contains("memfd:blanket-vm")
                };
                (ours && end - start >= ram).then_some(Self {
                    start,
                    length: end - start,
                    ram,
                })
            })
            .next()
            .ok_or_else(|| format!("the VM's memory is not among these:\n{maps}"))
    }

    /// The last third of RAM, which the VMM's own threads do not touch: kernel, initrd and
    /// rings are further down.
    pub fn upper(self) -> Self {
        Self {
            start: self.start + self.ram / 3 * 2,
            length: self.ram / 3,
            ram: self.ram / 3,
        }
    }

    pub fn pages(self) -> usize {
        self.length / PAGE
    }

    /// One page of it.
    pub fn only(self, number: usize) -> Self {
        assert!(number < self.pages());
        Self {
            start: self.start + number * PAGE,
            length: PAGE,
            ram: PAGE,
        }
    }

    /// A copy of a page.
    pub fn page(self, number: usize) -> [u8; PAGE] {
        assert!(number < self.pages());
        let mut copy = [0; PAGE];
        // SAFETY: the range is mapped readable, and nobody has a reference to it: the
        // guest writes there at any time.
        unsafe {
            let from = (self.start + number * PAGE) as *const u8;
            std::ptr::copy_nonoverlapping(from, copy.as_mut_ptr(), PAGE);
        }
        copy
    }

    /// A sum over all of it. Allocates nothing.
    pub fn sum(self) -> u64 {
        let mut sum = 0u64;
        for word in (self.start..self.start + self.length).step_by(8) {
            // SAFETY: as in `page`.
            let value = unsafe { (word as *const u64).read_volatile() };
            sum = sum.rotate_left(1) ^ value.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        }
        sum
    }

    pub fn protect(self, prot: i32) -> Result<()> {
        // SAFETY: takes rights that only the guest uses; the caller chose the range so.
        done("mprotect", unsafe {
            libc::mprotect(self.start as *mut _, self.length, prot)
        })
    }

    pub fn advise(self, advice: i32) -> Result<()> {
        // SAFETY: what is lost is the guest's, and the caller means to lose it.
        done("madvise", unsafe {
            libc::madvise(self.start as *mut _, self.length, advice)
        })
    }

    pub fn unmap(self) -> Result<()> {
        // SAFETY: only the guest uses the range, and the process ends without destructors.
        done("munmap", unsafe {
            libc::munmap(self.start as *mut _, self.length)
        })
    }

    /// Moves the pages to `to`, or to where the kernel likes.
    pub fn moved(self, to: Option<usize>) -> Result<Self> {
        let spot = match to {
            Some(to) => to,
            None => Self::reserve(self.length)?,
        };
        // SAFETY: only the guest uses the pages; the target is free or a reservation.
        let got = unsafe {
            libc::mremap(
                self.start as *mut _,
                self.length,
                self.length,
                libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED,
                spot as *mut libc::c_void,
            )
        };
        done("mremap", if got == libc::MAP_FAILED { -1 } else { 0 })?;
        Ok(Self {
            start: got as usize,
            ..self
        })
    }

    /// A place for so many bytes.
    fn reserve(length: usize) -> Result<usize> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping at an address that the kernel chooses.
        let got =
            unsafe { libc::mmap(std::ptr::null_mut(), length, libc::PROT_NONE, flags, -1, 0) };
        done("mmap", if got == libc::MAP_FAILED { -1 } else { 0 })?;
        Ok(got as usize)
    }
}

/// The host's answer to a call.
pub fn done(call: &str, answer: i32) -> Result<()> {
    if answer < 0 {
        return Err(format!("{call}: {}", std::io::Error::last_os_error()));
    }
    Ok(())
}
