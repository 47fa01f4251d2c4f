//! A machine without a VMM around it: what decides for one, a disk in memory, and real servers.

use std::convert::Infallible;

use crate::client::Client;
use crate::command::{Serve, bmcast, content, text};
use bmcast_image::{Key, MachineStatus, Manifest, Sectors};
use bmcast_install::{Boot, Fetched, Install, Options};
use bmcast_mediator::{Blocks as _, Verdict, Work};

struct Machine {
    install: Install,
    disk: Vec<u8>,
    /// The one that is asked is the first.
    servers: Vec<Client>,
    changes: usize,
}

fn range(sectors: Sectors) -> std::ops::Range<usize> {
    let at = |sector: u64| usize::try_from(sector * 512).expect("a small disk");
    at(sectors.start)..at(sectors.end())
}

fn open(disk: &[u8], manifest: Manifest) -> Install {
    let boot = Boot {
        random: [1; 16],
        key: Key::default(),
        may_begin: true,
    };
    let size = disk.len() as u64 / 512;
    let read = |at: Sectors, into: &mut [u8]| {
        into.copy_from_slice(&disk[range(at)]);
        Ok::<(), Infallible>(())
    };
    Install::open(size, manifest, boot, Options::default(), read).expect("there is room")
}

impl Machine {
    /// One chunk by the network and one command to the disk.
    async fn step(&mut self, quiet: bool) {
        if let Some(fetch) = self.install.next_fetch() {
            let last = fetch.offset + u64::from(fetch.length) - 1;
            let bytes = format!("bytes={}-{last}", fetch.offset);
            let (status, _, body) = self.servers[0]
                .ask("GET", "/image", &[("range", &bytes)], "")
                .await;
            assert_eq!(status, 206);
            if self.install.fetched(fetch.chunk, body.to_vec()) == Fetched::Wrong {
                self.servers.rotate_left(1);
                self.changes += 1;
            }
        }
        match self.install.next(quiet) {
            None => return,
            Some(Work::Flush) => {}
            Some(Work::Write { to, data }) => self.disk[range(to)].copy_from_slice(&data),
        }
        self.install.done(Ok(()));
    }

    async fn until(&mut self, mut passes: impl FnMut(&mut Install) -> Verdict) {
        while passes(&mut self.install) == Verdict::Hold {
            self.step(false).await;
        }
    }

    async fn report(&mut self, status: MachineStatus) {
        let path = format!("/machines/{}", status.machine);
        let body = status.to_string();
        assert_eq!(self.servers[0].ask("PUT", &path, &[], &body).await.0, 204);
    }
}

#[tokio::test]
async fn a_machine_boots_installs_changes_servers_and_is_shown() {
    let directory = tempfile::tempdir().expect("a directory");
    let (right, wrong) = (
        directory.path().join("a.raw"),
        directory.path().join("b.raw"),
    );
    let bytes = content(5000 * 512);
    std::fs::write(&right, &bytes).expect("written");
    std::fs::write(&wrong, vec![9; bytes.len()]).expect("written");
    let server = Serve::start(&right, &["--chunk", "16K"]);
    let liar = Serve::start(&wrong, &["--chunk", "16K"]);
    let mut servers = vec![
        Client::new(liar.address).await,
        Client::new(server.address).await,
    ];
    // The wrong server is found out by the pinned id, and later by each chunk.
    let (_, _, other) = servers[0].ask("GET", "/manifest", &[], "").await;
    let other = Manifest::parse(other.to_vec()).expect("a manifest");
    assert_ne!(other.id().to_string(), server.id);
    let (_, _, manifest) = servers[1].ask("GET", "/manifest", &[], "").await;
    let manifest = Manifest::parse(manifest.to_vec()).expect("a manifest");
    assert_eq!(manifest.id().to_string(), server.id);

    let disk = vec![0x5a; bytes.len() + (1 << 20)];
    let install = open(&disk, manifest.clone());
    let mut machine = Machine {
        install,
        disk,
        servers,
        changes: 0,
    };
    let read = Sectors {
        start: 4990,
        count: 10,
    };
    machine.until(|install| install.read(read)).await;
    assert_eq!(machine.disk[range(read)], bytes[range(read)]);
    assert_eq!(machine.changes, 1);
    let write = Sectors {
        start: 100,
        count: 3,
    };
    machine.until(|install| install.write(write, false)).await;
    machine.disk[range(write)].fill(0xee);
    machine.install.written(write);
    machine.until(|install| install.flush()).await;
    machine.report(machine.install.status("web-1", false)).await;
    let shown = bmcast(&["status", "--server", &server.url(), "web-1", "--json"]);
    let shown: serde_json::Value = serde_json::from_slice(&shown.stdout).expect("JSON");
    assert_eq!(
        (&shown["state"], &shown["wrong_chunks"]),
        (&"streaming".into(), &1.into())
    );
    let profile = machine.install.order_bytes();
    let to = "/machines/web-1/profile";
    let (status, ..) = machine.servers[0].put(to, profile).await;
    assert_eq!(status, 204);
    let out = directory.path().join("profile").display().to_string();
    let got = bmcast(&["profile", "web-1", "--server", &server.url(), "--out", &out]);
    assert!(got.status.success());
    let image = right.display().to_string();
    let made = bmcast(&["manifest", &image, "--chunk", "16K", "--profile", &out]);
    assert!(made.status.success());
    let next = std::fs::read(format!("{image}.manifest")).expect("it is there");
    let next = Manifest::parse(next).expect("a manifest");
    assert_eq!(next.profile(), machine.install.order());
    // The power goes.
    machine.install = open(&machine.disk, manifest);
    assert_eq!(machine.install.read(write), Verdict::Pass);
    while !machine.install.complete() {
        machine.step(true).await;
    }
    let mut expected = bytes;
    expected[range(write)].fill(0xee);
    assert_eq!(machine.disk[..expected.len()], expected);
    machine.report(machine.install.status("web-1", true)).await;
    let shown = bmcast(&["status", "--server", &server.url(), "--watch"]);
    let shown = text(&shown.stdout);
    assert!(shown.contains("de-virtualized  100%"), "{shown}");
}
