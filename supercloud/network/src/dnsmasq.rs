//! DHCP and names: Debian's dnsmasq, one for each network on a node, started by us. It outlives us, and is found again by
//! its process number's file. All leases are ours to give, so they are the same on every node.

use std::fmt::Write as _;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::process::Command;

use crate::error::Error;
use crate::names;
use crate::wanted::{Network, Wanted};

/// The files of one network's.
struct Files {
    config: PathBuf,
    hosts: PathBuf,
    leases: PathBuf,
    /// What its process has read of the three, as far as we know: whoever writes them may be killed
    /// before he has told it.
    read: PathBuf,
    pid: PathBuf,
}

impl Files {
    fn of(dir: &Path, vni: &str) -> Self {
        let file = |end| dir.join(format!("dnsmasq-{vni}.{end}"));
        Self {
            config: file("conf"),
            hosts: file("hosts"),
            leases: file("leases"),
            read: file("read"),
            pid: file("pid"),
        }
    }
}

/// Between files that are written as one: a line that none of them has.
const END: &str = "#\n";

/// Makes each network on this node have its dnsmasq, and no other have one. What was done.
pub async fn apply(dir: &Path, wanted: &Wanted) -> Result<Vec<String>, Error> {
    let mut done = Vec::new();
    let here: Vec<&Network> = wanted
        .networks
        .iter()
        .filter(|network| network.is_on(wanted.node))
        .collect();
    let vnis: Vec<String> = here.iter().map(|network| network.vni.to_string()).collect();
    done.extend(keep_only(dir, &vnis).await?);
    for network in here {
        let files = Files::of(dir, &network.vni.to_string());
        let config = config(wanted, network, &files);
        let (hosts, leases) = (hosts(network), leases(network));
        let all = format!("{config}{END}{hosts}{END}{leases}");
        let read = std::fs::read_to_string(&files.read).unwrap_or_default();
        let same_config = read
            .split_once(END)
            .is_some_and(|(before, _)| before == config);
        let running = running(&files);
        if running.is_some() && read == all {
            continue;
        }
        write(&files.hosts, &hosts)?;
        write(&files.leases, &leases)?;
        match running {
            Some(pid) if same_config => {
                signal(pid, rustix::process::Signal::HUP);
                done.push(format!("tell DHCP and names of {} its VMs", network.name));
            }
            _ => {
                write(&files.config, &config)?;
                stop_process(&files).await;
                start(&files).await?;
                done.push(format!("start DHCP and names of {}", network.name));
            }
        }
        write(&files.read, &all)?;
    }
    Ok(done)
}

/// Ends all of them. What was done.
pub async fn clear(dir: &Path) -> Result<Vec<String>, Error> {
    keep_only(dir, &[]).await
}

async fn keep_only(dir: &Path, vnis: &[String]) -> Result<Vec<String>, Error> {
    let mut done = Vec::new();
    for vni in known(dir)? {
        if !vnis.contains(&vni) {
            stop(&Files::of(dir, &vni)).await?;
            done.push(format!("end DHCP and names of network {vni}"));
        }
    }
    Ok(done)
}

fn config(wanted: &Wanted, network: &Network, files: &Files) -> String {
    let (subnet, gateway) = (network.subnet, network.gateway());
    let mut text = String::from("# Made by supercloud; changes are lost.\n");
    let domain = network.domain();
    let lines = [
        format!("interface={}", names::bridge(network.vni)),
        "except-interface=lo".into(),
        "bind-dynamic".into(),
        "user=nobody".into(),
        format!("pid-file={}", files.pid.display()),
        // Names: ours, and what this machine's own resolvers know of others.
        "no-hosts".into(),
        format!("addn-hosts={}", files.hosts.display()),
        format!("local=/{domain}/"),
        "local=/internal/".into(),
        "domain-needed".into(),
        "bogus-priv".into(),
        "cache-size=1000".into(),
        "dns-forward-max=100".into(),
        // Leases: those of our records, and no others.
        format!(
            "dhcp-range={},static,{},1h",
            subnet.network(),
            subnet.netmask()
        ),
        format!("dhcp-hostsfile={}", files.leases.display()),
        "dhcp-authoritative".into(),
        "leasefile-ro".into(),
        "no-ping".into(),
        "quiet-dhcp".into(),
        format!("domain={domain}"),
        format!("dhcp-option=option:router,{gateway}"),
        format!("dhcp-option=option:dns-server,{gateway}"),
        format!("dhcp-option=option:domain-search,{domain}"),
        format!("dhcp-option=option:mtu,{}", wanted.guest_mtu()),
    ];
    for line in lines {
        let _ = writeln!(text, "{line}");
    }
    text
}

fn hosts(network: &Network) -> String {
    let domain = network.domain();
    let lines = network.ports.iter();
    lines
        .map(|vm| format!("{} {}.{domain}\n", vm.address, vm.name))
        .collect()
}

fn leases(network: &Network) -> String {
    let lines = network.ports.iter();
    lines
        .map(|vm| format!("{},{},{}\n", vm.mac, vm.address, vm.name))
        .collect()
}

/// Networks that have files here.
fn known(dir: &Path) -> Result<Vec<String>, Error> {
    let file = |source| Error::File {
        what: "read",
        path: dir.into(),
        source,
    };
    let mut known = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(file)? {
        let name = entry.map_err(file)?.file_name();
        let vni = name
            .to_str()
            .and_then(|name| name.strip_prefix("dnsmasq-")?.strip_suffix(".conf"));
        known.extend(vni.map(str::to_owned));
    }
    known.sort();
    Ok(known)
}

async fn start(files: &Files) -> Result<(), Error> {
    let conf = format!("--conf-file={}", files.config.display());
    let output = Command::new("dnsmasq")
        .arg(conf)
        .kill_on_drop(true)
        .output()
        .await
        .map_err(|source| Error::Program {
            program: "dnsmasq",
            package: "dnsmasq-base",
            source,
        })?;
    if !output.status.success() {
        return Err(Error::Failed {
            program: "dnsmasq",
            what: format!("to start with {}", files.config.display()),
            status: output.status.to_string(),
            said: String::from_utf8_lossy(&output.stderr)
                .chars()
                .take(2000)
                .collect(),
        });
    }
    Ok(())
}

/// Its process, if it is alive and is that one.
fn running(files: &Files) -> Option<i32> {
    let pid: i32 = std::fs::read_to_string(&files.pid)
        .ok()?
        .trim()
        .parse()
        .ok()?;
    let line = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let conf = format!("--conf-file={}", files.config.display());
    line.split(|byte| *byte == 0)
        .any(|word| word == conf.as_bytes())
        .then_some(pid)
}

fn signal(pid: i32, signal: rustix::process::Signal) {
    if let Some(pid) = rustix::process::Pid::from_raw(pid) {
        // It may have ended meanwhile.
        let _ = rustix::process::kill_process(pid, signal);
    }
}

/// Ends its process, and waits until it has.
async fn stop_process(files: &Files) {
    for _ in 0..100 {
        let Some(pid) = running(files) else {
            return;
        };
        signal(pid, rustix::process::Signal::TERM);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    if let Some(pid) = running(files) {
        signal(pid, rustix::process::Signal::KILL);
    }
}

async fn stop(files: &Files) -> Result<(), Error> {
    stop_process(files).await;
    // The last one is by what it is known that there are any.
    for path in [
        &files.pid,
        &files.read,
        &files.hosts,
        &files.leases,
        &files.config,
    ] {
        match std::fs::remove_file(path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                return Err(Error::File {
                    what: "remove",
                    path: path.clone(),
                    source,
                });
            }
            _ => {}
        }
    }
    Ok(())
}

/// It is there whole or not at all.
fn write(path: &Path, text: &str) -> Result<(), Error> {
    use std::os::unix::fs::PermissionsExt as _;
    let file = |source| Error::File {
        what: "write",
        path: path.into(),
        source,
    };
    let fresh = path.with_extension("new");
    std::fs::write(&fresh, text).map_err(file)?;
    // dnsmasq reads them as nobody.
    std::fs::set_permissions(&fresh, std::fs::Permissions::from_mode(0o644)).map_err(file)?;
    std::fs::rename(&fresh, path).map_err(file)
}
