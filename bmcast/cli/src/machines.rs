//! What machines have said of themselves.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use bmcast_image::is_machine_name;
use bytes::Bytes;
use serde::{Deserialize, Serialize};

/// Machines that are remembered; a new one takes the place of the one that was silent for longest.
const MOST: usize = 4096;
/// Most bytes of what one says.
pub const MOST_BYTES: usize = 4096;
/// Profiles that are kept, the newest ones.
const MOST_PROFILES: usize = 16;
/// Most bytes of an error in it.
const MOST_ERROR: usize = 1024;

/// What a machine says, as `bmcast_image::MachineStatus` writes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Its name.
    pub machine: String,
    /// The image that it becomes.
    pub manifest: String,
    /// What it does.
    pub state: State,
    /// Sectors of the image.
    pub sectors: u64,
    /// Those that are not on the disk yet.
    pub sectors_left: u64,
    /// Bytes that were fetched.
    pub fetched_bytes: u64,
    /// Bytes of the image that were written.
    pub written_bytes: u64,
    /// Chunks that the guest waited for.
    pub demand_chunks: u64,
    /// Chunks that nobody waited for.
    pub background_chunks: u64,
    /// Chunks that were not what the manifest says.
    pub wrong_chunks: u64,
    /// Bytes per second that are fetched.
    pub rate: u64,
    /// What does not work, if something does not.
    pub error: Option<String>,
}

/// What a machine does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// Chunks are still to come.
    Streaming,
    /// All have come, and some are still to be written.
    Installing,
    /// The VMM is gone.
    DeVirtualized,
}

impl State {
    /// As it is written.
    pub fn name(self) -> &'static str {
        match self {
            Self::Streaming => "streaming",
            Self::Installing => "installing",
            Self::DeVirtualized => "de-virtualized",
        }
    }
}

/// What a machine has said, and when.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// What.
    #[serde(flatten)]
    pub report: Report,
    /// Seconds since then.
    pub seconds_ago: u64,
}

/// All machines that have said something.
#[derive(Debug, Default)]
pub struct Machines {
    known: Mutex<BTreeMap<String, (Report, Instant)>>,
    profiles: Mutex<VecDeque<(String, Bytes)>>,
}

impl Machines {
    /// A machine says something.
    pub fn put(&self, name: &str, body: &[u8]) -> Result<(), String> {
        let report: Report = serde_json::from_slice(body)
            .map_err(|error| format!("no report of a machine: {error}"))?;
        if !is_machine_name(name) || report.machine != name {
            return Err(format!(
                "{:?} is not the name {name:?}, or no name",
                report.machine
            ));
        }
        if report.manifest.parse::<bmcast_image::Hash>().is_err() {
            return Err("its manifest's id is none".into());
        }
        if report
            .error
            .as_ref()
            .is_some_and(|error| error.len() > MOST_ERROR)
        {
            return Err(format!("its error is longer than {MOST_ERROR} bytes"));
        }
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= MOST
            && !known.contains_key(name)
            && let Some(oldest) = known.iter().min_by_key(|(_, (_, when))| *when)
        {
            let oldest = oldest.0.clone();
            known.remove(&oldest);
        }
        known.insert(name.to_owned(), (report, Instant::now()));
        Ok(())
    }

    /// A machine that is known says in which order it wanted its image.
    pub fn put_profile(&self, name: &str, body: Bytes) -> Result<(), String> {
        if self.get(name).is_none() {
            return Err(format!("{name:?} has not reported"));
        }
        if !body.len().is_multiple_of(4) {
            return Err("a profile is numbers of 4 bytes".into());
        }
        let mut profiles = self.profiles.lock().unwrap_or_else(PoisonError::into_inner);
        profiles.retain(|(other, _)| other != name);
        profiles.truncate(MOST_PROFILES - 1);
        profiles.push_front((name.to_owned(), body));
        Ok(())
    }

    /// In which order a machine wanted its image.
    pub fn profile(&self, name: &str) -> Option<Bytes> {
        let profiles = self.profiles.lock().unwrap_or_else(PoisonError::into_inner);
        let found = profiles.iter().find(|(other, _)| other == name);
        found.map(|(_, profile)| profile.clone())
    }

    /// A machine.
    pub fn get(&self, name: &str) -> Option<Machine> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.get(name).map(machine)
    }

    /// All of them, by name.
    pub fn list(&self) -> Vec<Machine> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.values().map(machine).collect()
    }
}

fn machine((report, when): &(Report, Instant)) -> Machine {
    Machine {
        report: report.clone(),
        seconds_ago: when.elapsed().as_secs(),
    }
}

#[cfg(test)]
pub mod tests {
    use bmcast_image::{Hash, MachineState, MachineStatus};

    use super::*;

    /// What a VMM writes.
    pub fn status(name: &str) -> MachineStatus {
        MachineStatus {
            machine: name.into(),
            manifest: Hash([1; 32]),
            state: MachineState::Streaming,
            sectors: 1000,
            sectors_left: 250,
            fetched_bytes: 3,
            written_bytes: 4,
            demand_chunks: 5,
            background_chunks: 6,
            wrong_chunks: 7,
            rate: 8,
            error: Some("the disk \"fails\"\n".into()),
        }
    }

    #[test]
    fn what_a_vmm_writes_is_read() {
        for state in MachineState::ALL {
            let machines = Machines::default();
            let status = MachineStatus {
                state,
                ..status("a")
            };
            machines.put("a", status.to_string().as_bytes()).unwrap();
            let report = machines.get("a").unwrap().report;
            assert_eq!(report.state.name(), state.name());
            assert_eq!(report.error, status.error);
            let numbers = [
                (report.sectors, 1000),
                (report.sectors_left, 250),
                (report.fetched_bytes, 3),
                (report.written_bytes, 4),
                (report.demand_chunks, 5),
                (report.background_chunks, 6),
                (report.wrong_chunks, 7),
                (report.rate, 8),
            ];
            assert!(
                numbers.iter().all(|(is, should)| is == should),
                "{report:?}"
            );
        }
    }

    #[test]
    fn what_is_no_report_is_refused() {
        let machines = Machines::default();
        let right = status("a").to_string();
        for (name, body) in [
            ("b", right.clone()),
            ("a/b", status("a/b").to_string()),
            ("a", right.replace("0101", "xxxx")),
            ("a", right.replace("streaming", "dreaming")),
            ("a", right.replace("1000", "-1")),
            ("a", right.replace("the disk", &"e".repeat(2000))),
            ("a", "[]".into()),
            ("a", String::new()),
        ] {
            assert!(machines.put(name, body.as_bytes()).is_err(), "{body}");
        }
        assert!(machines.list().is_empty());
    }

    #[test]
    fn machines_are_bounded() {
        let machines = Machines::default();
        for n in 0..MOST + 2 {
            let name = format!("m{n}");
            machines
                .put(&name, status(&name).to_string().as_bytes())
                .unwrap();
        }
        assert_eq!(machines.list().len(), MOST);
        assert!(machines.get("m0").is_none() && machines.get("m2").is_some());
        for n in 10..30 {
            let profile = Bytes::from_static(&[1, 0, 0, 0]);
            machines.put_profile(&format!("m{n}"), profile).unwrap();
        }
        assert!(machines.profile("m13").is_none() && machines.profile("m14").is_some());
        let none = Bytes::new();
        assert!(machines.put_profile("m0", none).is_err());
        let odd = Bytes::from_static(&[1]);
        assert!(machines.put_profile("m2", odd).is_err());
    }
}
