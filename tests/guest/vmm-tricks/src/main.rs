//! A VMM that does to its VM's memory what a VMM can, while two vCPUs run hot.
//!
//! `vmm-tricks TRICK KERNEL INITRD LOG` starts a VM whose console goes to LOG, waits until
//! its program has checked what it holds a few times (lines `TICK ...`), plays the trick,
//! and ends with 0 if all was as it must be: either the guest goes on with right data, or
//! the VM, and only it, ends with a word on its memory. `BLANKET_HOST=kvm` has it inside KVM.

mod faults;
mod memory;
mod tricks;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use blanket_vmm::console::{Console, IoThread, Sink};
use blanket_vmm::device::Device;
use blanket_vmm::hypervisor::{CrashKind, Hypervisor};
use blanket_vmm::instance::{Instance, OnReboot, Spec};
use blanket_vmm::kvm;
use blanket_vmm::vm::{End, Handle, Vm};

use memory::Memory;
use tricks::{Outcome, TRICKS, Trick};

/// RAM of the VM, bytes.
const RAM: u64 = 192 << 20;
/// Longest time for anything that the guest must do.
const PATIENCE: Duration = Duration::from_secs(240);

/// What went wrong.
pub type Result<T> = std::result::Result<T, String>;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, name, kernel, initrd, log] = arguments.as_slice() else {
        eprintln!("usage: vmm-tricks TRICK KERNEL INITRD LOG");
        return ExitCode::from(2);
    };
    let Some(trick) = TRICKS.iter().find(|trick| trick.name == name) else {
        let names: Vec<&str> = TRICKS.iter().map(|trick| trick.name).collect();
        eprintln!(
            "vmm-tricks: no trick {name}; there are {}",
            names.join(", ")
        );
        return ExitCode::from(2);
    };
    match play(trick, kernel.into(), initrd.into(), Path::new(log)) {
        Ok(text) => println!("ok: {name}: {text}"),
        Err(error) => {
            println!("FAILED: {name}: {error}");
            leave(1);
        }
    }
    leave(0)
}

/// Ends without destructors: what the VMM's library thinks it has mapped may not be there.
fn leave(code: i32) -> ! {
    // SAFETY: ends the process.
    unsafe { libc::_exit(code) }
}

fn play(trick: &Trick, kernel: PathBuf, initrd: PathBuf, log: &Path) -> Result<String> {
    let guest = Guest::start(trick, kernel, initrd, log)?;
    guest.ticking(3)?;
    let memory = Memory::of_this_process(RAM, trick.private)?;
    match (trick.play)(&guest, &memory)? {
        Outcome::GoesOn(text) => {
            guest.ticking(6)?;
            Ok(text)
        }
        Outcome::Ends => guest.ended(),
        Outcome::Anything if !guest.handle.wait_ended(Duration::ZERO) => {
            Ok("the VM runs on".into())
        }
        Outcome::Anything => match guest.vm.wait() {
            End::Crash(crash) if crash.kind == CrashKind::Core => Err(format!(
                "the core found its own state wrong: {}",
                crash.report
            )),
            _ => Ok("the VM ended".into()),
        },
    }
}

/// The VM.
pub struct Guest {
    vm: Vm,
    /// For what is done while it runs.
    pub handle: Handle,
    log: PathBuf,
    _instance: Arc<Instance>,
    _io: IoThread,
}

impl Guest {
    fn start(trick: &Trick, kernel: PathBuf, initrd: PathBuf, log: &Path) -> Result<Self> {
        let told = |error: &dyn std::error::Error| format!("the VM does not start: {error}");
        let hypervisor: Arc<dyn Hypervisor> =
            if std::env::var("BLANKET_HOST").as_deref() == Ok("kvm") {
                Arc::new(kvm::probe().map_err(|e| told(&e))?)
            } else {
                Arc::new(Device::open().map_err(|e| told(&e))?)
            };
        let spec = Spec {
            name: "tricked".into(),
            kernel: Some(kernel),
            initrd: Some(initrd),
            memory: RAM,
            vcpus: 2,
            cmdline: "console=hvc0 quiet panic=-1 oops=panic".into(),
            on_reboot: OnReboot::Exit,
            // Such memory is private, so that a fork shares it until it is written.
            mergeable: trick.private,
            ..Spec::default()
        };
        let console = Console::new().map_err(|e| told(&e))?;
        let sink = Sink::File(log.into());
        let io =
            IoThread::start(Arc::clone(&console), &sink, Box::new(|| {})).map_err(|e| told(&e))?;
        let instance = Instance::new(spec, hypervisor, console).map_err(|e| told(&e))?;
        let vm = instance.boot().map_err(|e| told(&e))?;
        Ok(Self {
            handle: vm.handle(),
            vm,
            log: log.into(),
            _instance: instance,
            _io: io,
        })
    }

    /// How often its program has found right what it holds.
    pub fn ticks(&self) -> Result<usize> {
        let text = std::fs::read(&self.log).map_err(|e| format!("no console: {e}"))?;
        let text = String::from_utf8_lossy(&text);
        if let Some(bad) = text.lines().find(|line| line.starts_with("BAD")) {
            return Err(format!("the guest has found wrong data: {bad}"));
        }
        Ok(text.lines().filter(|line| line.starts_with("TICK")).count())
    }

    /// Waits for so many more.
    pub fn ticking(&self, count: usize) -> Result<()> {
        let (from, begun) = (self.ticks()?, Instant::now());
        while self.ticks()? < from + count {
            if self.handle.wait_ended(Duration::from_millis(100)) {
                return Err("the VM has ended".into());
            }
            if begun.elapsed() > PATIENCE {
                return Err(format!("the guest stands still after {from} ticks"));
            }
        }
        Ok(())
    }

    /// Does it while no vCPU runs.
    pub fn paused<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        self.handle.paused(work).ok_or("the VM cannot be paused")?
    }

    /// Waits for the end of a VM that has lost memory; the word on it.
    fn ended(self) -> Result<String> {
        if !self.handle.wait_ended(PATIENCE) {
            return Err(format!("the VM runs on, after {} ticks", self.ticks()?));
        }
        match self.vm.wait() {
            End::Crash(crash) if crash.kind == CrashKind::Memory => Ok(format!(
                "the VM ended: {}",
                crash.report.lines().next().unwrap_or_default()
            )),
            End::Failed(failure) => Ok(format!("the VM ended: {failure}")),
            other => Err(format!("the VM ended as {other:?}")),
        }
    }
}
