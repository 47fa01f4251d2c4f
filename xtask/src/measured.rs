//! What a script measures in an instance that has the module.

use std::io::Write;
use std::time::Duration;

use anyhow::{Result, bail};

use crate::build;
use crate::initramfs::{self, Files};
use crate::kernels::Kernel;
use crate::lab::Payload;
use crate::project::Project;
use crate::qemu::{self, End, Hardware, Machine};

/// An instance without virtualization.
pub const CPU: &str = "EPYC,-svm";

/// Runs a script in an instance with so much memory and these files; what it wrote, which is shown as it comes.
pub fn in_instance(
    project: &Project,
    kernel: &Kernel,
    memory: &str,
    script: &str,
    files: &Files,
    timeout: Duration,
) -> Result<String> {
    let mut payload = Payload::new(project, kernel, Hardware::Virtio, CPU)?;
    payload.module(&build::module_for(project, kernel)?);
    payload.program(&build::command(project)?)?;
    payload.guest_kernel(kernel);
    payload.guest_initrd(&initramfs::guest(project, None, &Files::new())?)?;
    payload.archive.add(files);
    payload.command(&format!("export BLANKET_HOST=module\n{script}"));
    let machine = Machine::new(CPU, kernel.clone(), memory);
    let mut output = Tee(Vec::new());
    let outcome = qemu::run(project, &[machine], &payload.archive, timeout, &mut output)?;
    if outcome.end != End::Exit(0) {
        eprint!("{}", outcome.console_tail(100));
        bail!("the instance ended with {:?}", outcome.end);
    }
    outcome.discard();
    Ok(String::from_utf8_lossy(&output.0).into_owned())
}

/// Shows what comes, and keeps it.
struct Tee(Vec<u8>);

impl Write for Tee {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.extend_from_slice(bytes);
        std::io::stdout().write(bytes)
    }
    fn flush(&mut self) -> std::io::Result<()> {
        std::io::stdout().flush()
    }
}
