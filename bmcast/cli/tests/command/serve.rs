//! `bmcast serve`, by clients that know HTTP only.

use crate::client::Client;
use crate::command::{Serve, bmcast, content, text};
use bmcast_image::{Hash, Manifest};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

#[tokio::test]
async fn a_machine_finds_all_that_it_needs() {
    let directory = tempfile::tempdir().expect("a directory");
    let image = directory.path().join("a.raw");
    let bytes = content(700 * 512);
    std::fs::write(&image, &bytes).expect("written");
    let server = Serve::start(&image, &["--chunk", "16K"]);
    let mut client = Client::new(server.address).await;

    let (status, _, body) = client.ask("GET", "/manifest", &[], "").await;
    assert_eq!(status, 200);
    let manifest = Manifest::parse(body.to_vec()).expect("a manifest");
    assert_eq!(manifest.id().to_string(), server.id);
    let chunks = manifest.chunks();
    assert_eq!((chunks.image_bytes(), chunks.count()), (700 * 512, 22));
    for chunk in 0..chunks.count() {
        let (start, length) = (chunks.offset(chunk), u64::from(chunks.length(chunk)));
        let range = format!("bytes={start}-{}", start + length - 1);
        let (status, headers, body) = client.ask("GET", "/image", &[("range", &range)], "").await;
        assert_eq!(status, 206);
        let expected = format!("bytes {start}-{}/{}", start + length - 1, bytes.len());
        assert_eq!(headers["content-range"], *expected);
        assert_eq!(headers["content-length"], *length.to_string());
        assert!(manifest.verify(chunk, &body));
    }
    assert!(manifest.is_zero(4) && !manifest.is_zero(0));

    let tag = format!("\"{}\"", server.id);
    let (status, headers, body) = client.ask("HEAD", "/image", &[], "").await;
    assert_eq!((status.as_u16(), body.len()), (200, 0));
    assert_eq!(headers["etag"], *tag);
    assert_eq!(headers["accept-ranges"], "bytes");
    assert_eq!(headers["content-length"], *bytes.len().to_string());
    let (_, headers, body) = client.ask("GET", "/image", &[], "").await;
    assert_eq!(headers["content-length"], *bytes.len().to_string());
    assert_eq!(body, bytes);

    let range = ("range", "bytes=512-1023");
    let (status, _, body) = client
        .ask("GET", "/image", &[range, ("if-range", &tag)], "")
        .await;
    assert_eq!((status.as_u16(), &body[..]), (206, &bytes[512..1024]));
    let old = client
        .ask("GET", "/image", &[range, ("if-range", "\"old\"")], "")
        .await;
    assert_eq!((old.0.as_u16(), old.2.len()), (200, bytes.len()));
    let (status, headers, _) = client
        .ask("GET", "/image", &[("range", "bytes=358400-")], "")
        .await;
    assert_eq!(status, 416);
    assert_eq!(headers["content-range"], "bytes */358400");
    let (status, ..) = client
        .ask("GET", "/image", &[("if-none-match", &tag)], "")
        .await;
    assert_eq!(status, 304);
    assert_eq!(client.ask("GET", "/other", &[], "").await.0, 404);
    assert_eq!(client.ask("DELETE", "/image", &[], "").await.0, 405);
}

#[tokio::test]
async fn requests_may_follow_each_other_unanswered() {
    let directory = tempfile::tempdir().expect("a directory");
    let image = directory.path().join("a.raw");
    let bytes = content(64 << 10);
    std::fs::write(&image, &bytes).expect("written");
    let server = Serve::start(&image, &[]);
    let mut stream = tokio::net::TcpStream::connect(server.address)
        .await
        .expect("it listens");
    let mut all = String::new();
    for n in 0..16 {
        let close = if n == 15 { "Connection: close\r\n" } else { "" };
        all += &format!(
            "GET /image HTTP/1.1\r\nHost: a\r\n{close}Range: bytes={}-{}\r\n\r\n",
            n * 4096,
            n * 4096 + 4095
        );
    }
    stream.write_all(all.as_bytes()).await.expect("sent");
    let mut answers = Vec::new();
    stream.read_to_end(&mut answers).await.expect("answers");
    let mut rest = &answers[..];
    for n in 0..16 {
        let head = rest
            .windows(4)
            .position(|four| four == b"\r\n\r\n")
            .expect("a head")
            + 4;
        assert!(rest.starts_with(b"HTTP/1.1 206 "), "{n}");
        let body = &rest[head..head + 4096];
        assert_eq!(body, &bytes[n * 4096..][..4096], "{n}");
        rest = &rest[head + 4096..];
    }
    assert!(rest.is_empty());
}

/// Whoever asks for much and reads it late costs no memory.
#[tokio::test]
async fn answers_are_not_kept_in_memory() {
    let directory = tempfile::tempdir().expect("a directory");
    let image = directory.path().join("a.raw");
    let file = std::fs::File::create(&image).expect("made");
    file.set_len(64 << 20).expect("long");
    let server = Serve::start(&image, &[]);
    let before = server.memory();
    let stream = tokio::net::TcpStream::connect(server.address)
        .await
        .expect("it listens");
    let (mut read, mut write) = stream.into_split();
    let requests = "GET /image HTTP/1.1\r\nHost: a\r\nRange: bytes=0-1048575\r\n\r\n".repeat(64);
    let sent = tokio::spawn(async move {
        write.write_all(requests.as_bytes()).await.expect("sent");
        write
    });
    let mut bytes = vec![0; 1 << 20];
    let mut left = 64 << 20;
    while left > 0 {
        let got = read.read(&mut bytes).await.expect("answers");
        assert_ne!(got, 0, "{left} bytes are missing");
        left -= got.min(left);
    }
    sent.await.expect("sent");
    let more = server.memory() - before;
    assert!(more < 16 << 10, "{more} KiB");
}

#[tokio::test]
async fn machines_report_and_are_shown() {
    let directory = tempfile::tempdir().expect("a directory");
    let image = directory.path().join("a.raw");
    std::fs::write(&image, content(512)).expect("written");
    let server = Serve::start(&image, &[]);
    let url = server.url();
    let status = bmcast_image::MachineStatus {
        machine: "web-1".into(),
        manifest: Hash([1; 32]),
        state: bmcast_image::MachineState::DeVirtualized,
        sectors: 100,
        sectors_left: 0,
        fetched_bytes: 5 << 20,
        written_bytes: 5 << 20,
        demand_chunks: 3,
        background_chunks: 4,
        wrong_chunks: 0,
        rate: 2048,
        error: None,
    };
    let none = bmcast(&["status", "--server", &url, "web-1"]);
    assert_eq!(none.status.code(), Some(3));
    let mut client = Client::new(server.address).await;
    let body = status.to_string();
    let (answer, ..) = client.ask("PUT", "/machines/web-1", &[], &body).await;
    assert_eq!(answer, 204);
    assert_eq!(
        client.ask("PUT", "/machines/web-2", &[], &body).await.0,
        400
    );
    assert_eq!(client.ask("GET", "/machines/web-2", &[], "").await.0, 404);
    let long = " ".repeat(5000);
    assert_eq!(
        client.ask("PUT", "/machines/web-1", &[], &long).await.0,
        413
    );
    // `--watch` ends as all are done.
    for more in [&["--watch"][..], &["web-1"]] {
        let shown = bmcast(&[&["status", "--server", &url], more].concat());
        assert!(shown.status.success());
        let shown = text(&shown.stdout);
        let line: Vec<&str> = shown
            .lines()
            .nth(1)
            .expect("a line")
            .split_whitespace()
            .collect();
        assert_eq!(
            line[..7],
            ["web-1", "de-virtualized", "100%", "5M", "2K/s", "3", "4"]
        );
    }
    let json = bmcast(&["status", "--server", &url, "--json"]);
    let json: serde_json::Value = serde_json::from_slice(&json.stdout).expect("JSON");
    assert_eq!(json[0]["state"], "de-virtualized");
    assert_eq!(json[0]["demand_chunks"], 3);
}

#[tokio::test]
async fn what_one_boot_wanted_the_next_one_fetches_first() {
    let directory = tempfile::tempdir().expect("a directory");
    let at = |name: &str| directory.path().join(name).display().to_string();
    let image = directory.path().join("a.raw");
    std::fs::write(&image, content(700 * 512)).expect("written");
    let server = Serve::start(&image, &[]);
    let url = server.url();
    let mut client = Client::new(server.address).await;
    let ask = ["profile", "m", "--server", &url, "--out", &at("profile")];
    assert_eq!(bmcast(&ask).status.code(), Some(3));
    let profile = "\u{3}\0\0\0\u{1}\0\0\0";
    let to = "/machines/m/profile";
    assert_eq!(client.ask("PUT", to, &[], profile).await.0, 400);
    let report = format!(
        r#"{{"machine":"m","manifest":"{}","state":"installing","sectors":1,"sectors_left":1,"fetched_bytes":0,
        "written_bytes":0,"demand_chunks":0,"background_chunks":0,"wrong_chunks":0,"rate":0,"error":null}}"#,
        server.id
    );
    assert_eq!(client.ask("PUT", "/machines/m", &[], &report).await.0, 204);
    assert_eq!(client.ask("PUT", to, &[], profile).await.0, 204);
    assert_eq!(
        client.ask("PUT", to, &[], &"x".repeat(300_000)).await.0,
        413
    );
    assert!(bmcast(&ask).status.success());
    let image = image.display().to_string();
    let made = bmcast(&["manifest", &image, "--profile", &at("profile")]);
    assert_eq!(text(&made.stdout).trim_end(), server.id);
    // The next server has it from the file beside the image.
    let server = Serve::start(&directory.path().join("a.raw"), &[]);
    let mut client = Client::new(server.address).await;
    let (_, _, body) = client.ask("GET", "/manifest", &[], "").await;
    let manifest = Manifest::parse(body.to_vec()).expect("a manifest");
    assert_eq!(manifest.profile(), [3, 1]);
    let other = bmcast(&[
        "manifest",
        &image,
        "--profile",
        &at("profile"),
        "--chunk",
        "1M",
    ]);
    assert_eq!(other.status.code(), Some(2));
    assert!(text(&other.stderr).contains("--chunk"));
}

#[tokio::test]
async fn an_overlay_is_served_as_its_guest_would_see_it() {
    let directory = tempfile::tempdir().expect("a directory");
    let base = directory.path().join("base.raw");
    let overlay = directory.path().join("a.qcow2");
    let mut bytes = content(1 << 20);
    std::fs::write(&base, &bytes).expect("written");
    let backing = blanket_disk::Backing {
        path: &base,
        format: Some(blanket_disk::Format::Raw),
    };
    let format = blanket_disk::Format::Qcow2;
    blanket_disk::create(&overlay, format, Some(2 << 20), Some(backing)).expect("made");
    bytes.resize(2 << 20, 0);
    let server = Serve::start(&overlay, &["--chunk", "256K"]);
    let mut client = Client::new(server.address).await;
    let (_, headers, body) = client.ask("GET", "/image", &[], "").await;
    assert_eq!(headers["content-length"], "2097152");
    assert_eq!(body, bytes);
    let raw = directory.path().join("flat.raw");
    std::fs::write(&raw, &bytes).expect("written");
    let flat = bmcast(&["manifest", &raw.display().to_string(), "--chunk", "256K"]);
    assert_eq!(text(&flat.stdout).trim_end(), server.id);
}

#[test]
fn a_server_that_is_not_there_is_said() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let url = format!("http://{}", listener.local_addr().expect("an address"));
    drop(listener);
    let output = bmcast(&["status", "--server", &url]);
    assert_eq!(output.status.code(), Some(5));
    assert!(text(&output.stderr).contains("is `bmcast serve` running there?"));
    let missing = bmcast(&["serve", "/nonexistent.raw", "--json"]);
    assert_eq!(missing.status.code(), Some(3));
    let error: serde_json::Value = serde_json::from_slice(&missing.stderr).expect("JSON");
    assert_eq!(error["code"], "not-found");
    assert_eq!(
        bmcast(&["serve", "a.raw", "--chunk", "5K"]).status.code(),
        Some(2)
    );
}
