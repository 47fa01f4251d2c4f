//! NMIs and machine checks at every instruction of the world switch, in both
//! directions, and of the core's ways in and out: a debugger stops the instance's CPU
//! at each of them in turn, and QEMU injects one there. Each must reach the host's
//! handler.

use std::collections::HashMap;
use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use blanket_abi::layout::{VCPU, sel};
use elf::ElfBytes;
use elf::endian::LittleEndian;

use crate::gdb::Gdb;

/// What is injected.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// A non-maskable interrupt.
    Nmi,
    /// A machine check that Linux survives and that takes nothing from anybody.
    MachineCheck,
}

impl Event {
    /// As people say it.
    fn name(self) -> &'static str {
        match self {
            Self::Nmi => "an NMI",
            Self::MachineCheck => "a machine check",
        }
    }

    /// The command of QEMU's monitor.
    ///
    /// The machine check is "action optional" of a memory scrubber: status VAL, UC, EN, S
    /// and code 0xc0, MCG_STATUS RIPV and MCIP (Intel SDM, volume 3, 15.9.3; Linux'
    /// `arch/x86/kernel/cpu/mce/severity.c`). It names no address, so that no page of the
    /// instance is given up for it. A bank that no model's quirks touch.
    fn command(self) -> &'static str {
        match self {
            Self::Nmi => "nmi",
            Self::MachineCheck => "mce 0 8 0xb1000000000000c0 0x5 0x0 0x0",
        }
    }

    /// The host's handler.
    fn handler(self) -> &'static str {
        match self {
            Self::Nmi => "exc_nmi",
            Self::MachineCheck => "exc_machine_check",
        }
    }
}

/// A stretch of code: instruction by instruction from an address.
struct Sweep {
    /// Where it starts, and where the CPU comes by again and again.
    name: &'static str,
    /// In the module, not in the core.
    module: bool,
    /// Instructions one after the other.
    dense: u32,
    /// And on from there in larger steps, up to this many.
    end: u32,
    /// These.
    stride: u32,
    /// Whether the CPU comes by only with a guest that is isolated from its core, or only
    /// with one that is not.
    isolated: Option<bool>,
    /// Only when the CPU comes by with this SS: null behind a trap from the guest, the
    /// core's behind a system call.
    ss: Option<u64>,
}

/// So often a CPU may come by until it does so with the SS that is waited for.
const MOST_PASSES: u32 = 1000;

/// The ways in and out are walked instruction by instruction as long as tables of
/// both worlds are mixed or the stack is the guest's; what follows is sampled.
const SWEEPS: &[Sweep] = &[
    Sweep {
        name: "blanket_world_switch",
        module: true,
        dense: 48,
        end: 200,
        stride: 13,
        isolated: None,
        ss: None,
    },
    Sweep {
        name: "blanket_world_exit",
        module: true,
        dense: 52,
        end: 52,
        stride: 1,
        isolated: None,
        ss: Some(0),
    },
    Sweep {
        name: "blanket_world_exit",
        module: true,
        dense: 52,
        end: 52,
        stride: 1,
        isolated: None,
        ss: Some(sel::CORE_SS as u64),
    },
    Sweep {
        name: "blanket_leave",
        module: false,
        dense: 30,
        end: 30,
        stride: 1,
        isolated: None,
        ss: None,
    },
    Sweep {
        name: "blanket_syscall64",
        module: false,
        dense: 50,
        end: 150,
        stride: 13,
        isolated: None,
        ss: None,
    },
    Sweep {
        name: "blanket_iret_fast",
        module: false,
        dense: 12,
        end: 12,
        stride: 1,
        isolated: Some(false),
        ss: None,
    },
    Sweep {
        name: "trap_entry",
        module: false,
        dense: 30,
        end: 300,
        stride: 29,
        isolated: None,
        ss: None,
    },
    Sweep {
        name: "isolate_enter",
        module: false,
        dense: 6,
        end: 6,
        stride: 1,
        isolated: Some(true),
        ss: None,
    },
    Sweep {
        name: "isolate_leave",
        module: false,
        dense: 22,
        end: 22,
        stride: 1,
        isolated: Some(true),
        ss: None,
    },
];

/// What the instance's own script talks to, by its third serial line: it tells the
/// addresses of its kernel, waits, and is told how many events there were.
///
/// `addresses` are those of [`core_addresses`].
pub fn everywhere(
    event: Event,
    isolated: bool,
    dir: &Path,
    script: UnixStream,
    mut addresses: HashMap<String, u64>,
) -> Result<()> {
    let mut lines = BufReader::new(script.try_clone()?).lines();
    loop {
        let line = lines.next().context("the instance ended too early")??;
        match line.trim().split_once(' ') {
            None if line.trim() == "ready" => break,
            Some((name, address)) => {
                let address = u64::from_str_radix(address, 16)
                    .with_context(|| format!("the instance says {line:?}"))?;
                addresses.insert(name.to_owned(), address);
            }
            None => {}
        }
    }
    let injected = sweeps(event, isolated, dir, &addresses);
    match &injected {
        Ok(count) => writeln!(&script, "done {count}")?,
        // It may be stopped, or beyond hearing.
        Err(_) => drop(writeln!(&script, "failed")),
    }
    // QEMU forgets what it has not yet read of a line that was hung up.
    lines.for_each(drop);
    injected.map(drop)
}

/// All of them; how many events were injected.
fn sweeps(
    event: Event,
    isolated: bool,
    dir: &Path,
    addresses: &HashMap<String, u64>,
) -> Result<u32> {
    let find = |name: &str| {
        let address = addresses.get(name).copied();
        address.with_context(|| format!("no address of {name}"))
    };
    let handler = find(event.handler())?;
    let mut gdb = Gdb::connect(&dir.join("gdb"))?;
    let mut count = 0;
    let apply = |sweep: &&Sweep| sweep.isolated.is_none_or(|wanted| wanted == isolated);
    for sweep in SWEEPS.iter().filter(apply) {
        match walk(&mut gdb, event, sweep, find(sweep.name)?, handler) {
            Ok(injected) => count += injected,
            Err(error) => {
                // Nothing more will come of this instance.
                let _ = gdb.quit();
                return Err(error);
            }
        }
    }
    gdb.detach()?;
    Ok(count)
}

/// How many events were injected.
fn walk(gdb: &mut Gdb, event: Event, sweep: &Sweep, start: u64, handler: u64) -> Result<u32> {
    let sampled = (sweep.dense..sweep.end).step_by(sweep.stride as usize);
    let mut count = 0;
    for steps in (0..sweep.dense).chain(sampled) {
        let mut at = start;
        stop_at(gdb, sweep, start, steps, &mut at)
            .and_then(|()| gdb.monitor(event.command()))
            .and_then(|()| gdb.run_to(handler))
            .with_context(|| {
                format!(
                    "{} {steps} instructions behind {}, at {at:#x}, SS there {:x?}",
                    event.name(),
                    sweep.name,
                    sweep.ss
                )
            })?;
        count += 1;
    }
    Ok(count)
}

/// Stops the CPU so many steps into the sweep.
fn stop_at(gdb: &mut Gdb, sweep: &Sweep, start: u64, steps: u32, at: &mut u64) -> Result<()> {
    gdb.run_to(start)?;
    if let Some(ss) = sweep.ss {
        let mut passes = 0;
        while gdb.ss()? != ss {
            ensure!(
                passes < MOST_PASSES,
                "the CPU never comes by with SS {ss:#x}"
            );
            passes += 1;
            gdb.step()?;
            gdb.run_to(start)?;
        }
    }
    for _ in 0..steps {
        gdb.step()?;
    }
    *at = gdb.rip()?;
    Ok(())
}

/// Symbols of the core at the addresses where a CPU comes by: the entry section of
/// vCPU 0 for what LSTAR points to, the image for all else.
pub fn core_addresses(core: &Path) -> Result<HashMap<String, u64>> {
    let bytes = fs::read(core).with_context(|| format!("cannot read {}", core.display()))?;
    let file = ElfBytes::<LittleEndian>::minimal_parse(&bytes)?;
    let (symbols, names) = file.symbol_table()?.context("the core has no symbols")?;
    let mut all = HashMap::new();
    for symbol in symbols {
        all.insert(
            names.get(symbol.st_name as usize)?.to_owned(),
            symbol.st_value,
        );
    }
    let entry = *all
        .get("blanket_entry_start")
        .context("the core has no entry section")?;
    for name in ["blanket_syscall64", "blanket_iret_fast"] {
        let image = all.get_mut(name).with_context(|| format!("no {name}"))?;
        *image = *image - entry + VCPU;
    }
    for sweep in SWEEPS.iter().filter(|sweep| !sweep.module) {
        ensure!(
            all.contains_key(sweep.name),
            "the core has no {}",
            sweep.name
        );
    }
    Ok(all)
}
