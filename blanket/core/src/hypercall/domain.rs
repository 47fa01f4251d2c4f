//! Version, options, emergency console, physical devices.

use super::super::context::{Context, Hyper};
use crate::machine::Machine;
use blanket_abi::Va;
use blanket_abi::device::exit;
use blanket_abi::layout::M2P;
use blanket_abi::xen::cpuid;
use blanket_abi::xen::errno;
use blanket_abi::xen::hypercall::{assist, feature, version};
use core::sync::atomic::Ordering::Relaxed;

/// `CONSOLEIO_write` (`public/xen.h`).
const CONSOLE_WRITE: u64 = 0;
/// `CONSOLEIO_read`.
const CONSOLE_READ: u64 = 1;
/// `PHYSDEVOP_set_iopl` (`public/physdev.h`).
const SET_IOPL: u64 = 6;
/// `PHYSDEVOP_set_iobitmap`.
const SET_IOBITMAP: u64 = 7;

/// What the guest may rely on. Linux refuses to start without the last two.
const FEATURES: u32 = 1 << feature::PAE_PGDIR_ABOVE_4GB
    | 1 << feature::MMU_PT_UPDATE_PRESERVE_AD
    | 1 << feature::GNTTAB_MAP_AVAIL_BITS;

impl<M: Machine> Context<'_, M> {
    /// `xen_version(cmd, ptr)`. Command 0 is also how Linux has its events looked at.
    pub(super) fn xen_version(&mut self, cmd: u64, ptr: u64) -> Hyper {
        match cmd {
            version::VERSION => Ok(i64::from(cpuid::VERSION)),
            version::EXTRAVERSION => self.put_text::<16>(ptr, b".0-blanket"),
            version::COMPILE_INFO => {
                self.put_text::<64>(ptr, b"rustc")?;
                self.put_text::<16>(ptr.wrapping_add(64), b"supercloud")?;
                self.put_text::<32>(ptr.wrapping_add(80), b"blanket")?;
                self.put_text::<32>(ptr.wrapping_add(112), b"-")
            }
            version::CAPABILITIES => self.put_text::<64>(ptr, b"xen-3.0-x86_64 "),
            version::CHANGESET => self.put_text::<64>(ptr, b"blanket"),
            version::PLATFORM_PARAMETERS => self.write_words(ptr, [M2P]).map(|()| 0),
            version::GET_FEATURES => {
                let submap = self.read_u32(ptr)?;
                self.write_u32(ptr.wrapping_add(4), if submap == 0 { FEATURES } else { 0 })?;
                Ok(0)
            }
            version::PAGESIZE => Ok(4096),
            version::GUEST_HANDLE => self.write_words(ptr, [0, 0]).map(|()| 0),
            version::COMMANDLINE => self.put_text::<64>(ptr, b""),
            _ => Err(errno::ENOSYS),
        }
    }

    fn put_text<const N: usize>(&mut self, ptr: u64, text: &[u8]) -> Hyper {
        let mut buf = [0; N];
        let n = text.len().min(N - 1);
        buf[..n].copy_from_slice(&text[..n]);
        self.copy_out(Va(ptr), &buf)?;
        Ok(0)
    }

    /// `vm_assist(cmd, type)`.
    pub(super) fn vm_assist(&mut self, cmd: u64, kind: u64) -> Hyper {
        if cmd > 1 {
            return Err(errno::ENOSYS);
        }
        match kind {
            // Writes to page tables are always emulated; the others change
            // nothing for a 64-bit guest.
            0 | 1 | assist::WRITABLE_PAGETABLES | assist::PAE_EXTENDED_CR3 => Ok(0),
            assist::RUNSTATE_UPDATE_FLAG => {
                self.vm.runstate_flag.store(cmd == 0, Relaxed);
                Ok(0)
            }
            _ => Err(errno::EINVAL),
        }
    }

    /// `console_io(cmd, count, ptr)`.
    pub(super) fn console_io(&mut self, cmd: u64, count: u64, ptr: u64) -> Hyper {
        match cmd {
            CONSOLE_WRITE => {
                let mut done = 0;
                while done < count {
                    let mut buf = [0u8; 256];
                    let n = (count - done).min(256) as usize;
                    self.copy_in(Va(ptr.wrapping_add(done)), &mut buf[..n])?;
                    let len = self.m.set_data(&buf[..n]);
                    self.exit(exit::CONSOLE, [0, 0, 0, len as u64]);
                    done += n as u64;
                }
                Ok(0)
            }
            CONSOLE_READ => Ok(0),
            _ => Err(errno::ENOSYS),
        }
    }

    /// `physdev_op(cmd, ptr)`: a guest has no physical devices.
    pub(super) fn physdev_op(&mut self, cmd: u64, ptr: u64) -> Hyper {
        match cmd {
            SET_IOPL => {
                let iopl = self.read_u32(ptr)?;
                if iopl > 3 {
                    return Err(errno::EINVAL);
                }
                self.v.iopl = iopl.to_le_bytes()[0];
                Ok(0)
            }
            // No port answers, so which ones are allowed makes no difference.
            SET_IOBITMAP => Ok(0),
            _ => Err(errno::ENOSYS),
        }
    }
}
