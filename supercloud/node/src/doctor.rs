//! What is wrong, and the command that mends it; and figures.

use std::fmt::Write as _;
use std::sync::Arc;

use supercloud_api::{Error, Finding, Level, Life, OperationState};

use crate::agent::Agent;

/// Clocks may differ by so much, milliseconds: what a guest's clock would step when it moves
/// has another source, but logs and tokens go by these.
const SKEW_WARN: i64 = 1_000;
/// By so much nothing can be told any more.
const SKEW_FAIL: i64 = 60_000;

fn finding(check: &str, level: Level, text: impl Into<String>, mend: Option<String>) -> Finding {
    Finding {
        check: check.into(),
        level,
        text: text.into(),
        mend,
    }
}

impl Agent {
    /// Looks at everything.
    ///
    /// # Errors
    /// The disk.
    pub async fn doctor(self: &Arc<Self>) -> Result<Vec<Finding>, Error> {
        let own = self.name();
        let mut all = vec![finding(
            "agent",
            Level::Ok,
            format!("the agent of {own} runs, {}", env!("CARGO_PKG_VERSION")),
            None,
        )];
        match self.blanket.doctor().await {
            Ok(found) => all.extend(found),
            Err(error) => all.push(finding(
                "blanket",
                Level::Fail,
                error.message,
                Some(error.hint),
            )),
        }
        for node in self.nodes().await? {
            if node.here {
                continue;
            }
            let name = node.name;
            let check = format!("node {name}");
            let Some(status) = node.status else {
                let why = node.error.unwrap_or_default();
                all.push(finding(
                    &check,
                    Level::Fail,
                    why,
                    Some(format!(
                        "start its agent, let this node reach {}; if it is gone for good: \
                         supercloud node remove {name} --force",
                        node.address
                    )),
                ));
                continue;
            };
            let ahead = node.clock_ahead_ms.unwrap_or(0);
            let level = match ahead.abs() {
                ..SKEW_WARN => Level::Ok,
                SKEW_WARN..SKEW_FAIL => Level::Warn,
                _ => Level::Fail,
            };
            let mend = (level != Level::Ok).then(|| "set the clocks of both, by NTP".to_owned());
            all.push(finding(
                &check,
                level,
                format!("answers; its clock differs by {ahead} ms"),
                mend,
            ));
            if status.release != env!("CARGO_PKG_VERSION") {
                all.push(finding(
                    &check,
                    Level::Warn,
                    format!(
                        "it runs {}, and this node {}",
                        status.release,
                        env!("CARGO_PKG_VERSION")
                    ),
                    Some("install the same release on both".into()),
                ));
            }
        }
        for operation in self.operations()? {
            if operation.state == OperationState::Doubt {
                let error = operation.error.unwrap_or_else(|| Error::failed("in doubt"));
                let check = format!("operation {}", operation.id);
                all.push(finding(
                    &check,
                    Level::Fail,
                    error.message,
                    Some(error.hint),
                ));
            }
        }
        for vm in self.vms().await? {
            if let (Some(trouble), Life::Stopped) = (vm.trouble, vm.life) {
                let mend = format!("supercloud vm logs {0}; supercloud vm start {0}", vm.name);
                all.push(finding(
                    &format!("vm {}", vm.name),
                    Level::Warn,
                    trouble,
                    Some(mend),
                ));
            }
        }
        Ok(all)
    }

    /// Figures in Prometheus' text format.
    ///
    /// # Errors
    /// The disk, `blanket`.
    pub async fn metrics(self: &Arc<Self>) -> Result<String, Error> {
        let vms = self.vms().await?;
        let status = self.status()?;
        let operations = self.operations()?;
        let mut text = String::new();
        let mut figure = |name: &str, kind: &str, help: &str, rows: &[(String, u64)]| {
            // A String takes all that is written.
            let _ = write!(
                text,
                "# HELP supercloud_{name} {help}\n# TYPE supercloud_{name} {kind}\n"
            );
            for (labels, value) in rows {
                let _ = writeln!(text, "supercloud_{name}{labels} {value}");
            }
        };
        let alone = |value: u64| vec![(String::new(), value)];
        figure(
            "memory_bytes",
            "gauge",
            "Memory of the node.",
            &alone(status.memory),
        );
        figure(
            "memory_available_bytes",
            "gauge",
            "Memory of the node that is available.",
            &alone(status.memory_available),
        );
        figure(
            "events_total",
            "counter",
            "Events since the agent was started.",
            &alone(self.events.count()),
        );
        let rows: Vec<(String, u64)> = vms
            .iter()
            .map(|vm| {
                let labels = format!("{{vm=\"{}\",phase=\"{}\"}}", vm.name, vm.seen.phase);
                (labels, u64::from(vm.seen.pid.is_some()))
            })
            .collect();
        figure(
            "vm_runs",
            "gauge",
            "Whether a VM has a process, and what that does.",
            &rows,
        );
        let states = [
            ("runs", OperationState::Runs),
            ("doubt", OperationState::Doubt),
            ("done", OperationState::Done),
            ("failed", OperationState::Failed),
        ];
        let rows: Vec<(String, u64)> = states
            .iter()
            .map(|(word, state)| {
                let count = operations.iter().filter(|it| it.state == *state).count();
                (format!("{{state=\"{word}\"}}"), count as u64)
            })
            .collect();
        figure(
            "operations",
            "gauge",
            "Operations that are remembered, by how they stand.",
            &rows,
        );
        let nodes = self.nodes().await?;
        let rows: Vec<(String, u64)> = nodes
            .iter()
            .map(|node| {
                (
                    format!("{{node=\"{}\"}}", node.name),
                    u64::from(node.reachable),
                )
            })
            .collect();
        figure("node_reachable", "gauge", "Whether a node answers.", &rows);
        Ok(text)
    }
}
