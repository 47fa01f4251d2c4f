//! `net-check`: what goes through a network arrives as it was. `net-check serve` is the other
//! end; `net-check run` sends it streams and datagrams of many sizes, and has it send some.
//! Both ends know every byte that must come.

mod datagrams;
mod pattern;
mod streams;

use std::net::{Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::process::ExitCode;
use std::time::Duration;

const USAGE: &str = "usage: net-check serve PORT\n\
                     \x20      net-check [--stream BYTES] [--largest BYTES] run NAME ADDRESS:PORT\n\
                     \x20      net-check stop ADDRESS:PORT";

/// How long nothing may come: an emulator's time.
const PATIENCE: Duration = Duration::from_secs(60);

/// What goes wrong: in words.
type Result<T> = std::result::Result<T, String>;

/// Names the call that failed.
fn failed(what: &str) -> impl Fn(std::io::Error) -> String + '_ {
    move |error| format!("{what}: {error}")
}

/// Serves both IPs until it is told to stop.
fn serve(port: u16) -> Result<()> {
    let any = SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
    let socket = UdpSocket::bind(any).map_err(failed("bind"))?;
    let listener = TcpListener::bind(any).map_err(failed("listen"))?;
    std::thread::spawn(move || datagrams::answer(&socket));
    println!("NET-CHECK-SERVES");
    streams::serve(&listener)
}

fn run() -> Result<()> {
    let (mut stream, mut largest) = (4 << 20, 60_000);
    let mut words = Vec::new();
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || {
            let value = args.next().and_then(|text| text.parse().ok());
            value.ok_or(format!("{arg} wants a number\n{USAGE}"))
        };
        match arg.as_str() {
            "--stream" => stream = value()?,
            "--largest" => largest = value()?,
            _ => words.push(arg),
        }
    }
    let address = |text: &str| -> Result<SocketAddr> {
        let parsed = text.parse();
        parsed.map_err(|_| format!("{text} is no address with a port\n{USAGE}"))
    };
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match words[..] {
        ["serve", port] => serve(port.parse().map_err(|_| format!("{port} is no port"))?),
        ["run", name, to] => {
            let to = address(to)?;
            let said = |what: Result<String>| {
                what.map(|what| println!("NET-CHECK {name} {what}"))
                    .map_err(|error| format!("{name}: {error}"))
            };
            streams::wait(to)?;
            said(streams::check(to, stream))?;
            said(datagrams::check(to, largest))
        }
        ["stop", to] => streams::stop(address(to)?),
        _ => Err(USAGE.into()),
    }
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("net-check: {error}");
            ExitCode::FAILURE
        }
    }
}
