//! `bench --io`: what disks and networks cost, natively in an instance and in VMs on it,
//! by exact instruction count.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Write;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::build;
use crate::guestware;
use crate::initramfs;
use crate::kernels::{self, Flavour};
use crate::lab::Payload;
use crate::project::Project;
use crate::qemu::{self, End, Hardware, Machine};

/// What the page's section begins with.
pub const TITLE: &str = "\n## Disks and networks\n";
/// With SVM, so that VMs run inside KVM as well.
const CPU: &str = "max";
const SCRIPT: &str = include_str!("../../tests/lab-scripts/io-cost.sh");
/// Nanoseconds of real time that a request of the instance's disk takes: so long that who
/// waits for it sleeps.
const LATENCY: u32 = 100_000;

/// What a VM runs.
const IN_VM: &str = r#"until [ -b /dev/xvdf ] && [ -e /sys/class/net/eth1 ]; do sleep 0.1; done
ip addr add 10.99.0.2/24 dev eth0
ip link set eth0 up
ip addr add 10.77.0.1/24 dev eth1
ip link set eth1 up
{
    $IO_COST disk 10.99.0.1 disk /dev/xvda disk-persistent /dev/xvdb raw /dev/xvdc \
        raw-persistent /dev/xvdd qcow2 /dev/xvde qcow2-persistent /dev/xvdf &&
    $IO_COST net 10.99.0.1 tap && $IO_COST net 10.77.0.254 user tcp-receive
} >rows
code=$?
cat rows
exit $code
"#;

/// What is measured, as the program calls it and as the page does.
const DISK_ROWS: &[(&str, &str)] = &[
    ("read-128k", "read 128 KiB, one after the other"),
    ("write-128k", "write 128 KiB, one after the other"),
    ("read-4k", "read 4 KiB anywhere"),
    ("write-4k", "write 4 KiB anywhere"),
    ("write-4k-flush", "write 4 KiB anywhere, and flush"),
    ("read-4k-16", "read 4 KiB anywhere, 16 at once"),
    ("write-4k-16", "write 4 KiB anywhere, 16 at once"),
];
const NET_ROWS: &[(&str, &str)] = &[
    ("tcp-send", "TCP stream to the instance"),
    ("tcp-receive", "TCP stream from the instance"),
    ("tcp-round-trip", "TCP, a byte there and back"),
    ("udp-round-trip", "UDP, 64 bytes there and back"),
    (
        "udp-send",
        "UDP packet of 64 bytes to the instance, 32 at once",
    ),
    (
        "udp-receive",
        "UDP packet of 64 bytes from the instance, 32 at once",
    ),
];

/// What is not measured: in user mode the stream from the instance stood still at times.
const LEFT_OUT: (&str, &str) = ("user", "tcp-receive");

/// Runs it, prints the section of the page, and writes it there. With `only`, no more than
/// the rows whose names (`DEVICE/ROW`) begin so, which are printed.
pub fn run(project: &Project, scale: f64, reps: u32, kvm: bool, only: &[String]) -> Result<()> {
    let kernel = kernels::fetch(project, Flavour::Cloud)?;
    let mut program = format!("IO_COST='io-cost --scale {scale} --reps {reps}");
    for only in only {
        let named = |c: char| c.is_ascii_alphanumeric() || "/-".contains(c);
        ensure!(only.chars().all(named), "{only} is no beginning of a row");
        let _ = write!(program, " --only {only}");
    }
    program.push_str("'\n");
    let files = guestware::io_cost(project)?;
    let mut payload = Payload::new(project, &kernel, Hardware::Virtio, CPU)?;
    payload.more_modules(project, &kernel, &["loop", "tun", "veth"])?;
    payload.module(&build::module_for(project, &kernel)?);
    payload.program(&build::command(project)?)?;
    payload.archive.add(&files);
    payload.network_tools(&guestware::network_tools(project)?);
    payload.guest_kernel(&kernel);
    let mut guest = initramfs::guest(project, Some(&format!("{program}{IN_VM}")), &files)?;
    guest.modules(project, &kernel, &["xen_blkfront", "xen_netfront"])?;
    payload.guest_initrd(&guest)?;
    let hosts = if kvm { "module kvm" } else { "module" };
    payload.command(&format!("{program}HOSTS='{hosts}'\n{SCRIPT}"));
    let mut machine = Machine {
        smp: 1,
        icount: true,
        ..Machine::new(CPU, kernel.clone(), "3G")
    };
    for name in ["b", "c", "d"] {
        let node = format!(
            "driver=null-co,node-name=null-{name},size=67108864,read-zeroes=on,latency-ns={LATENCY}"
        );
        let device = format!("virtio-blk-pci,drive=null-{name}");
        let options = ["-blockdev", &node, "-device", &device];
        machine.extra.extend(options.map(str::to_owned));
    }
    let mut reader = Reader::default();
    let timeout = Duration::from_secs(3600);
    let outcome = qemu::run(project, &[machine], &payload.archive, timeout, &mut reader)?;
    if outcome.end != End::Exit(0) {
        eprint!("{}", outcome.console_tail(100));
        bail!("the instance ended with {:?}", outcome.end);
    }
    outcome.discard();
    if !only.is_empty() {
        print!("{}", some(&reader.costs));
        return Ok(());
    }
    let command = format!(
        "--io --scale {scale} --reps {reps}{}",
        if kvm { "" } else { " --no-kvm" }
    );
    let text = section(&reader.costs, &kernel.release, &command, reps)?;
    println!("{text}");
    crate::page::write_section(project, TITLE, &text)
}

/// What one row cost.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Cost {
    operations: f64,
    bytes: f64,
    instructions: f64,
    /// The largest distance of a repetition from the median, as a part of that.
    spread: f64,
}

/// By place (`native`, `module`, `kvm`), device and row.
type Costs = BTreeMap<(String, String, String), Cost>;

/// Takes figures out of the output as it comes.
#[derive(Default)]
struct Reader {
    held: Vec<u8>,
    place: String,
    costs: Costs,
}

impl Reader {
    fn line(&mut self, line: &str) {
        println!("{line}");
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            ["IO-COST-PLACE", place] => place.clone_into(&mut self.place),
            ["IO-COST", device, row, ref figures @ ..] => {
                let figure = |name: &str| -> Option<f64> {
                    let mut found = figures.iter().filter_map(|word| word.split_once('='));
                    found.find(|(key, _)| *key == name)?.1.parse().ok()
                };
                let cost = || {
                    let instructions = figure("instructions")?;
                    let away =
                        (figure("most")? - instructions).max(instructions - figure("least")?);
                    Some(Cost {
                        operations: figure("operations")?,
                        bytes: figure("bytes")?,
                        instructions,
                        spread: away / instructions,
                    })
                };
                if let Some(cost) = cost() {
                    let key = (self.place.clone(), device.to_owned(), row.to_owned());
                    self.costs.insert(key, cost);
                }
            }
            _ => {}
        }
    }
}

impl Write for Reader {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        for line in qemu::whole_lines(&mut self.held, bytes) {
            self.line(&line);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// A column: its title, the place and the device.
type Column<'a> = (&'a str, &'a str, &'a str);

/// Rows one below the other, with what the same costs natively.
fn some(costs: &Costs) -> String {
    let mut text = String::from("\n| place | row | instructions for an operation | / native |\n");
    text.push_str("|---|---|---:|---:|\n");
    for ((place, device, row), cost) in costs {
        let native = match device.as_str() {
            "disk" | "disk-persistent" => "disk",
            "tap" | "user" | "veth" => "veth",
            _ => "raw",
        };
        let native = costs.get(&("native".to_owned(), native.to_owned(), row.clone()));
        let ratio = native.map_or("-".into(), |native| {
            format!("{:.2}", cost.instructions / native.instructions)
        });
        let each = cost.instructions / cost.operations;
        let _ = writeln!(text, "| {place} | {device}/{row} | {each:.0} | {ratio} |");
    }
    text
}

/// The figures as a section of the page.
fn section(costs: &Costs, release: &str, command: &str, reps: u32) -> Result<String> {
    ensure!(!costs.is_empty(), "no figures came");
    let widest = costs.values().map(|cost| cost.spread).fold(0.0, f64::max);
    let mut spreads: Vec<f64> = costs.values().map(|cost| cost.spread).collect();
    spreads.sort_by(f64::total_cmp);
    let mut text = format!(
        "{TITLE}\n\
         Made by `cargo xtask bench {command}`, which writes this section: instructions of the whole machine (kernel, \
         core, module or KVM, the VM's process, the other end of a connection), counted exactly under QEMU's translator \
         on an instance with one CPU. `tests/guest/io-cost` does the same operations natively and in a VM with one vCPU; \
         all run the stock kernel {release}. Waiting costs nothing here: whenever the CPU has nothing to do, a program \
         runs that counts its turns, and what it executed is taken away from the instructions between the beginning and \
         the end. Only its ticks of the timer are estimated, from their share while nothing else ran. The figures are \
         medians of {reps} repetitions; half of the rows stayed within {:.1} % of theirs, and all within {:.1} %. \
         They are CPU time on a CPU on which each instruction takes the same time, and say nothing of latency, of what \
         an exit costs on hardware, or of how fast a real disk is.\n\n\
         Disks are opened with `O_DIRECT`. A row of writes ends with one flush, which is counted; pages that the instance \
         holds of its disk are dropped before each row. *persistent*: with the option of that name. The mean is the geometric one. \
         What of it is the price of a guest's own kernel, of a second block layer or network stack, and ours, \
         is counted by function in [decision 28](decisions/0028-price-of-a-request.md).\n",
        spreads[spreads.len() / 2] * 100.0,
        widest * 100.0
    );
    let disks = [
        (
            "The instance's own disk (virtio, one that stores nothing and answers after 100 microseconds), natively and as a \
             VM's raw image, which goes past the instance's page cache (`cache=none`)",
            "disk",
            "disk",
        ),
        (
            "A raw image on the instance's tmpfs; natively, a loop device on such a file",
            "raw",
            "raw",
        ),
        (
            "A qcow2 image there, all of whose space is in use; natively as before",
            "raw",
            "qcow2",
        ),
    ];
    for (title, native, vm) in disks {
        let kept = format!("{vm}-persistent");
        let columns = [
            ("native", "native", native),
            ("VM", "module", vm),
            ("VM, persistent", "module", &kept),
            ("VM in KVM", "kvm", vm),
            ("VM in KVM, persistent", "kvm", &kept),
        ];
        let _ = write!(text, "\n{title}:\n\n");
        table(&mut text, costs, DISK_ROWS, &columns)?;
    }
    text.push_str(
        "\nNetworks: natively, two network namespaces of the instance (veth); a VM and its instance over a tap, and in user \
         mode (passt), where the stream from the instance is left out, since it stood still at times. Both ends are counted:\n\n",
    );
    let columns = [
        ("native", "native", "veth"),
        ("VM, tap", "module", "tap"),
        ("VM, user mode", "module", "user"),
        ("VM in KVM, tap", "kvm", "tap"),
        ("VM in KVM, user mode", "kvm", "user"),
    ];
    table(&mut text, costs, NET_ROWS, &columns)?;
    Ok(text)
}

/// One table: rows for each operation, and for each byte where there are many. Columns of
/// places that were left out are left out.
fn table(
    text: &mut String,
    costs: &Costs,
    rows: &[(&str, &str)],
    columns: &[Column<'_>],
) -> Result<()> {
    let columns: Vec<&Column<'_>> = columns
        .iter()
        .filter(|(_, place, _)| costs.keys().any(|(there, _, _)| there == place))
        .collect();
    ensure!(columns.len() > 1, "nothing came from a VM");
    text.push_str("| operation | instructions for each |");
    for (n, (title, _, _)) in columns.iter().enumerate() {
        let _ = write!(text, " {title} |");
        if n > 0 {
            text.push_str(" / native |");
        }
    }
    let _ = write!(
        text,
        "\n|---|---|---:|{}\n",
        "---:|---:|".repeat(columns.len() - 1)
    );
    let mut ratios = vec![Vec::new(); columns.len()];
    for (row, title) in rows {
        let mut found = Vec::new();
        for (_, place, device) in &columns {
            let key = ((*place).to_owned(), (*device).to_owned(), (*row).to_owned());
            let cost = costs.get(&key);
            ensure!(
                cost.is_some() || (*device, *row) == LEFT_OUT,
                "{place} {device} {row} is missing"
            );
            found.push(cost.copied());
        }
        let native = found[0].context("nothing to compare with")?;
        for (sum, cost) in ratios.iter_mut().zip(&found) {
            sum.extend(cost.map(|cost| cost.instructions / native.instructions));
        }
        let mut line = |unit: &str, figure: &dyn Fn(&Cost) -> String| {
            let _ = write!(text, "| {title} | {unit} |");
            for (n, cost) in found.iter().enumerate() {
                let cell = cost.as_ref().map_or("-".into(), figure);
                let _ = write!(text, " {cell} |");
                if n > 0 {
                    let ratio = cost.map(|cost| cost.instructions / native.instructions);
                    let ratio = ratio.map_or("-".into(), |ratio| format!("{ratio:.2}"));
                    let _ = write!(text, " {ratio} |");
                }
            }
            text.push('\n');
        };
        if native.operations > 1.0 {
            line("operation", &|cost| {
                format!("{:.0}", cost.instructions / cost.operations)
            });
        }
        if native.bytes / native.operations >= 65536.0 {
            line("byte", &|cost| {
                format!("{:.3}", cost.instructions / cost.bytes)
            });
        }
    }
    text.push_str("| **mean** | | |");
    for column in &ratios[1..] {
        let logs: f64 = column.iter().map(|ratio| ratio.ln()).sum();
        let _ = write!(text, " | **{:.2}** |", (logs / column.len() as f64).exp());
    }
    text.push('\n');
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Output of a whole run, in which each VM's operation costs twice or thrice the native.
    fn output() -> String {
        let mut text = String::new();
        for (place, times, disks, nets) in [
            ("native", 1, &["disk", "raw"][..], &["veth"][..]),
            (
                "module",
                2,
                &[
                    "disk",
                    "disk-persistent",
                    "raw",
                    "raw-persistent",
                    "qcow2",
                    "qcow2-persistent",
                ],
                &["tap", "user"],
            ),
        ] {
            let _ = writeln!(text, "IO-COST-PLACE {place}");
            let mut rows = |devices: &[&str], rows: &[(&str, &str)]| {
                for device in devices {
                    for (row, _) in rows.iter().filter(|(row, _)| (*device, *row) != LEFT_OUT) {
                        let (operations, bytes) = if row.starts_with("tcp-") {
                            (1, 1_000_000)
                        } else {
                            (10, 1_310_720)
                        };
                        let _ = writeln!(
                            text,
                            "IO-COST {device} {row} operations={operations} bytes={bytes} \
                             instructions={} least={} most={}\r",
                            times * 500_000,
                            times * 495_000,
                            times * 500_000
                        );
                    }
                }
            };
            rows(disks, DISK_ROWS);
            rows(nets, NET_ROWS);
        }
        text
    }

    fn read(output: &str) -> Costs {
        let mut reader = Reader::default();
        reader.write_all(output.as_bytes()).expect("memory");
        reader.costs
    }

    #[test]
    fn output_becomes_a_section() {
        let text = section(&read(&output()), "6.1", "--io", 3).expect("whole");
        assert!(text.starts_with(TITLE) && text.contains("within 1.0 % of theirs"));
        let wanted = "| read 128 KiB, one after the other | operation | 50000 | 100000 | 2.00 | 100000 | 2.00 |";
        assert!(text.contains(wanted), "{text}");
        let wanted = "| TCP stream from the instance | byte | 0.500 | 1.000 | 2.00 | - | - |";
        assert!(text.contains(wanted), "{text}");
        assert!(text.contains("| **mean** | | | | **2.00** | | **2.00** |"));
    }

    #[test]
    fn what_is_missing_is_noticed() {
        let whole = output();
        let less: String = whole
            .lines()
            .filter(|line| !line.contains("qcow2 write-4k "))
            .map(|line| format!("{line}\n"))
            .collect();
        let error = section(&read(&less), "6.1", "--io", 3).expect_err("a row less");
        assert!(error.to_string().contains("module qcow2 write-4k"));
        assert!(section(&Costs::new(), "6.1", "--io", 3).is_err());
    }
}
