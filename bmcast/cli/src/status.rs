//! `status`: how far machines are.

use std::time::Duration;

use bmcast_image::Server;

use crate::args::StatusArgs;
use crate::client;
use crate::exit::{self, Code, Error};
use crate::machines::{Machine, State};

/// Most bytes of an answer.
const MOST: usize = 16 << 20;

/// Carries out `status`.
pub async fn command(arguments: StatusArgs, json: bool) -> Result<(), Error> {
    loop {
        let machines = ask(&arguments.server, arguments.machine.as_deref()).await?;
        match (&machines[..], &arguments.machine) {
            ([machine], Some(_)) => exit::show(machine, json, |machine| {
                listing(std::slice::from_ref(machine))
            })?,
            (machines, _) => exit::show(machines, json, listing)?,
        }
        let is_done = |machine: &Machine| machine.report.state == State::DeVirtualized;
        if !arguments.watch || !machines.is_empty() && machines.iter().all(is_done) {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

async fn ask(server: &Server, machine: Option<&str>) -> Result<Vec<Machine>, Error> {
    let path = match machine {
        Some(name) => format!("/machines/{name}"),
        None => "/machines".to_owned(),
    };
    let Some(bytes) = client::get(server, &path, MOST).await? else {
        let (what, hint) = match machine {
            Some(name) => (
                format!("machine {name} has not reported to {server}"),
                "`bmcast status` without a name shows those that have",
            ),
            None => (
                format!("{server} hears from no machines"),
                "is it the address of a `bmcast serve`?",
            ),
        };
        return Err(Error::new(Code::NotFound, what, hint));
    };
    let parsed = match machine {
        Some(_) => serde_json::from_slice(&bytes).map(|machine| vec![machine]),
        None => serde_json::from_slice(&bytes),
    };
    parsed.map_err(|error| {
        let text = format!("{server}{path}: {error}");
        Error::new(
            Code::Unreachable,
            text,
            "is it the address of a `bmcast serve`?",
        )
    })
}

fn listing(machines: &[Machine]) -> String {
    let header = [
        "MACHINE",
        "STATE",
        "ON DISK",
        "FETCHED",
        "RATE",
        "DEMAND",
        "BACKGROUND",
        "HEARD",
        "IMAGE",
    ];
    let mut rows = vec![header.map(str::to_owned)];
    rows.extend(machines.iter().map(|machine| {
        let report = &machine.report;
        [
            report.machine.clone(),
            report.state.name().to_owned(),
            percent(
                report.sectors.saturating_sub(report.sectors_left),
                report.sectors,
            ),
            format!("{}M", report.fetched_bytes >> 20),
            format!("{}K/s", report.rate >> 10),
            report.demand_chunks.to_string(),
            report.background_chunks.to_string(),
            format!("{}s ago", machine.seconds_ago),
            report.manifest.chars().take(12).collect(),
        ]
    }));
    let mut text = exit::table(&rows);
    for machine in machines {
        if let Some(error) = &machine.report.error {
            let error = error.escape_debug();
            text.push_str(&format!("{}: {error}\n", machine.report.machine));
        }
    }
    text
}

/// Not 100% before all is there.
fn percent(part: u64, all: u64) -> String {
    match u128::from(part) * 100 {
        _ if all == 0 => "-".into(),
        part => format!("{}%", part / u128::from(all)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machines::{Machines, tests};

    #[test]
    fn a_table_and_what_does_not_work() {
        let machines = Machines::default();
        let status = tests::status("web-1");
        machines
            .put("web-1", status.to_string().as_bytes())
            .unwrap();
        let text = listing(&machines.list());
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[1].starts_with("web-1    streaming  75%"), "{text}");
        assert_eq!(lines[2], "web-1: the disk \\\"fails\\\"\\n");
        assert_eq!(percent(999, 1000), "99%");
        assert_eq!(percent(u64::MAX, u64::MAX), "100%");
    }
}
