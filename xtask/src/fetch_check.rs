//! Whether `bmcast-net` drives a network card under a real firmware: a UEFI application fetches a
//! file from a server here.

use std::fmt::Write as _;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use xshell::cmd;

use crate::apt::{Apt, NEWEST};
use crate::project::{Project, copy_if_changed};
use crate::qemu;
use crate::setup::on_path;

const TARGET: &str = "x86_64-unknown-uefi";
/// Bytes of the file.
const LENGTH: usize = 8 << 20;
const TIMEOUT: Duration = Duration::from_secs(300);
/// How QEMU ends if the application was content: `isa-debug-exit` makes an odd number of it.
const CONTENT: i32 = 33;

/// A card, and whether the firmware's boot services are left before it is used.
const RUNS: &[(&str, bool)] = &[
    ("virtio-net-pci", false),
    ("virtio-net-pci,disable-legacy=on,rx_queue_size=1024", true),
    ("e1000e", false),
    ("e1000e", true),
];

/// Fetches with each card; how many of them held.
pub fn run(project: &Project) -> Result<u32> {
    let application = application(project)?;
    let firmware = firmware(project)?;
    let mut passed = 0;
    for (card, leaves) in RUNS {
        fetch(project, &application, &firmware, card, *leaves)
            .with_context(|| format!("{card}, boot services left: {leaves}"))?;
        passed += 1;
    }
    Ok(passed)
}

fn fetch(
    project: &Project,
    application: &Path,
    firmware: &Path,
    card: &str,
    leaves: bool,
) -> Result<()> {
    let server = Server::start()?;
    let dir = qemu::run_dir(project)?;
    let boot = dir.join("esp/EFI/BOOT");
    fs::create_dir_all(&boot)?;
    copy_if_changed(application, &boot.join("BOOTX64.EFI"))?;
    let (port, exit) = (server.port, u8::from(leaves));
    let task = format!("server=http://10.0.2.2:{port}/files\nimage=image\nexit={exit}\n");
    fs::write(dir.join("esp/fetch.txt"), task)?;
    let variables = dir.join("variables.fd");
    fs::copy(firmware.join("OVMF_VARS_4M.fd"), &variables)?;

    let code = firmware.join("OVMF_CODE_4M.fd");
    let flash =
        |path: &Path, more: &str| format!("if=pflash,format=raw,file={}{more}", path.display());
    let mut child = qemu::command(project, true)?
        .args([
            "-machine",
            "q35",
            "-accel",
            "tcg",
            "-cpu",
            "EPYC,-smap",
            "-m",
            "256M",
        ])
        .args([
            "-nodefaults",
            "-display",
            "none",
            "-serial",
            "stdio",
            "-no-reboot",
        ])
        .args(["-drive", &flash(&code, ",readonly=on")])
        .args(["-drive", &flash(&variables, "")])
        .args([
            "-drive",
            &format!("format=raw,file=fat:rw:{}", dir.join("esp").display()),
        ])
        .args([
            "-netdev",
            "user,id=net",
            "-device",
            &format!("{card},netdev=net"),
        ])
        .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=4"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .context("cannot start QEMU")?;
    let mut output = child.stdout.take().context("QEMU has no output")?;
    let (ended, end) = channel();
    let reader = thread::spawn(move || {
        let mut bytes = Vec::new();
        let read = output.read_to_end(&mut bytes);
        let _ = ended.send(());
        read.map(|_| bytes)
    });
    let late = end.recv_timeout(TIMEOUT) == Err(RecvTimeoutError::Timeout);
    if late {
        child.kill()?;
    }
    let status = child.wait()?;
    let Ok(output) = reader.join() else {
        bail!("QEMU's output cannot be read");
    };
    let output = String::from_utf8_lossy(&output?).into_owned();
    fs::write(dir.join("console.log"), &output)?;
    let said = output.lines().filter_map(|line| line.split_once("FETCH "));
    let said: Vec<&str> = said.map(|(_, said)| said.trim_end()).collect();
    ensure!(
        !late && status.code() == Some(CONTENT),
        "QEMU ended with {status}{}; it said:\n{}",
        if late { " after too long" } else { "" },
        said.join("\n")
    );
    let reports = server.reports.load(Ordering::Relaxed);
    ensure!(reports > 0, "the server got no report");
    let rate = said.iter().find(|said| said.contains("KiB/s")).copied();
    println!("  {card}: {}", rate.unwrap_or("no rate"));
    Ok(())
}

/// Builds the application.
fn application(project: &Project) -> Result<PathBuf> {
    let _lock = project.lock("uefi")?;
    let (sh, cargo) = (project.shell()?, project.cargo());
    if on_path("rustup") {
        cmd!(sh, "rustup target add {TARGET}")
            .quiet()
            .ignore_stderr()
            .run()
            .with_context(|| format!("there is no {TARGET} for this toolchain"))?;
    }
    cmd!(
        sh,
        "{cargo} build --quiet --release --target {TARGET} -p fetch-efi"
    )
    .quiet()
    .run()
    .context("cannot build fetch-efi")?;
    let built = project.cargo_target.join(TARGET).join("release");
    Ok(built.join("fetch-efi.efi"))
}

/// The directory of Debian's OVMF.
fn firmware(project: &Project) -> Result<PathBuf> {
    let _lock = project.lock("ovmf")?;
    let dir = project.out_dir("ovmf")?;
    let (root, mark) = (dir.join("root"), dir.join("unpacked"));
    if !mark.exists() {
        Apt::new(project)?.unpack(&["ovmf".to_owned()], NEWEST, &dir, &root)?;
        fs::write(mark, "")?;
    }
    Ok(root.join("usr/share/OVMF"))
}

/// A server of one file; it ends with the process.
struct Server {
    port: u16,
    /// Reports that came by PUT.
    reports: Arc<AtomicU32>,
}

impl Server {
    fn start() -> Result<Self> {
        let mut word = 1_u64;
        let file: Vec<u8> = (0..LENGTH)
            .map(|_| {
                word ^= word << 13;
                word ^= word >> 7;
                word ^= word << 17;
                word.to_le_bytes()[5]
            })
            .collect();
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let port = listener.local_addr()?.port();
        let sum = format!("{LENGTH} {}", blake3::hash(&file).to_hex());
        let (file, reports) = (Arc::new((file, sum)), Arc::new(AtomicU32::new(0)));
        let counted = reports.clone();
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (file, reports) = (file.clone(), counted.clone());
                // A connection that ends is the client's business.
                thread::spawn(move || serve(&stream, &file.0, &file.1, &reports).ok());
            }
        });
        Ok(Self { port, reports })
    }
}

/// Answers all requests of a connection.
fn serve(stream: &TcpStream, file: &[u8], sum: &str, reports: &AtomicU32) -> Result<()> {
    stream.set_nodelay(true)?;
    let mut lines = BufReader::new(stream);
    loop {
        let (mut first, mut range, mut length) = (String::new(), None, 0);
        if lines.read_line(&mut first)? == 0 {
            return Ok(());
        }
        loop {
            let mut line = String::new();
            lines.read_line(&mut line)?;
            match line.trim_end().split_once(": ") {
                Some(("Range", value)) => range = value.strip_prefix("bytes=").map(str::to_owned),
                Some(("Content-Length", value)) => length = value.parse()?,
                Some(_) => {}
                None => break,
            }
        }
        lines.read_exact(&mut vec![0; length])?;
        let mut words = first.split(' ');
        let (method, path) = (words.next(), words.next());
        let mut head = String::new();
        let body = match (method, path, range) {
            (Some("PUT"), Some("/status"), _) => {
                reports.fetch_add(1, Ordering::Relaxed);
                head.push_str("HTTP/1.1 204 No Content\r\n");
                &[]
            }
            (Some("GET"), Some("/files/image.sum"), None) => {
                head.push_str("HTTP/1.1 200 OK\r\n");
                sum.as_bytes()
            }
            (Some("GET"), Some("/files/image"), Some(range)) => {
                let (from, to) = range.split_once('-').context("a range")?;
                let (from, to): (usize, usize) = (from.parse()?, to.parse()?);
                head.push_str("HTTP/1.1 206 Partial Content\r\n");
                write!(head, "Content-Range: bytes {from}-{to}/{LENGTH}\r\n")?;
                file.get(from..=to).context("no such range")?
            }
            _ => {
                head.push_str("HTTP/1.1 404 Not Found\r\n");
                &[]
            }
        };
        write!(head, "Content-Length: {}\r\n\r\n", body.len())?;
        let mut stream = stream;
        stream.write_all(head.as_bytes())?;
        stream.write_all(body)?;
    }
}
