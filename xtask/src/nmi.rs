//! NMIs at every instruction of the world switch, in both directions, and of the
//! core's ways in and out: a debugger stops the instance's CPU at each of them in
//! turn, and QEMU injects an NMI there. Each must reach the host's handler.

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
        ss: None,
    },
    Sweep {
        name: "blanket_world_exit",
        module: true,
        dense: 52,
        end: 52,
        stride: 1,
        ss: Some(0),
    },
    Sweep {
        name: "blanket_world_exit",
        module: true,
        dense: 52,
        end: 52,
        stride: 1,
        ss: Some(sel::CORE_SS as u64),
    },
    Sweep {
        name: "blanket_leave",
        module: false,
        dense: 30,
        end: 30,
        stride: 1,
        ss: None,
    },
    Sweep {
        name: "blanket_syscall64",
        module: false,
        dense: 50,
        end: 150,
        stride: 13,
        ss: None,
    },
    Sweep {
        name: "blanket_iret_fast",
        module: false,
        dense: 12,
        end: 12,
        stride: 1,
        ss: None,
    },
    Sweep {
        name: "trap_entry",
        module: false,
        dense: 30,
        end: 300,
        stride: 29,
        ss: None,
    },
];

/// What the instance's own script talks to, by its third serial line: it tells the
/// addresses of its kernel, waits, and is told how many NMIs there were.
///
/// `addresses` are those of [`core_addresses`].
pub fn everywhere(
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
    let find = |name: &str| {
        let address = addresses.get(name).copied();
        address.with_context(|| format!("no address of {name}"))
    };
    let handler = find("exc_nmi")?;
    let mut gdb = Gdb::connect(&dir.join("gdb"))?;
    let mut count = 0;
    for sweep in SWEEPS {
        match walk(&mut gdb, sweep, find(sweep.name)?, handler) {
            Ok(injected) => count += injected,
            Err(error) => {
                // Nothing more will come of this instance.
                let _ = gdb.monitor("quit");
                return Err(error);
            }
        }
    }
    gdb.detach()?;
    writeln!(&script, "done {count}")?;
    // QEMU forgets what it has not yet read of a line that was hung up.
    lines.for_each(drop);
    Ok(())
}

/// How many NMIs were injected.
fn walk(gdb: &mut Gdb, sweep: &Sweep, start: u64, handler: u64) -> Result<u32> {
    let sampled = (sweep.dense..sweep.end).step_by(sweep.stride as usize);
    let mut count = 0;
    for steps in (0..sweep.dense).chain(sampled) {
        let mut at = start;
        inject(gdb, sweep, start, steps, &mut at, handler).with_context(|| {
            format!(
                "an NMI {steps} instructions behind {}, at {at:#x}, SS there {:x?}",
                sweep.name, sweep.ss
            )
        })?;
        count += 1;
    }
    Ok(count)
}

fn inject(
    gdb: &mut Gdb,
    sweep: &Sweep,
    start: u64,
    steps: u32,
    at: &mut u64,
    handler: u64,
) -> Result<()> {
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
    gdb.monitor("nmi")?;
    gdb.run_to(handler)
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
