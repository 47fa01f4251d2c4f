//! `supercloud vm snapshot`, `restore`, `clone`, `export` and `import`; `supercloud snapshot`.

use std::process::ExitCode;

use hyper::Method;
use serde_json::Value;
use supercloud_api::{
    CloneVm, Error, ExportTo, ImportFrom, Restore, Snapshot, SnapshotKind, TakeSnapshot, Vm,
};

use crate::args::SnapshotCommand;
use crate::ask::To;
use crate::exit::{show, table};
use crate::vm::absolute;

/// `supercloud vm snapshot`.
pub async fn take(to: &To, vm: &str, name: Option<String>, json: bool) -> Result<(), Error> {
    let of = to.of_vm(vm).await?;
    let path = format!("/v1/vms/{vm}/snapshot");
    let it: Snapshot = of
        .ask(Method::POST, &path, Some(&TakeSnapshot { name }))
        .await?;
    show(&it, json, |it| {
        let how = match it.kind {
            SnapshotKind::Running => format!("it stood still for {} ms", it.stood_ms),
            SnapshotKind::Stopped => "of its disks: it is stopped".into(),
        };
        let mib = it.saved.bytes.div_ceil(1 << 20);
        format!(
            "{} is a snapshot of {vm}, {mib} MiB on {}; {how}\n",
            it.name, it.node
        )
    })
}

/// `supercloud vm restore`.
pub async fn restore(to: &To, snapshot: &str, wanted: &Restore, json: bool) -> Result<(), Error> {
    supercloud_api::name("a snapshot", snapshot)?;
    let path = format!("/v1/snapshots/{snapshot}/restore");
    let vm: Vm = to.ask(Method::POST, &path, Some(wanted)).await?;
    show(&vm, json, runs)
}

/// `supercloud vm clone`.
pub async fn copy(to: &To, vm: &str, name: String, json: bool) -> Result<(), Error> {
    let of = to.of_vm(vm).await?;
    let path = format!("/v1/vms/{vm}/clone");
    let vm: Vm = of.ask(Method::POST, &path, Some(&CloneVm { name })).await?;
    show(&vm, json, runs)
}

fn runs(vm: &Vm) -> String {
    format!("{} runs on {}\n", vm.name, vm.node)
}

/// `supercloud vm export`.
pub async fn export(to: &To, snapshot: &str, file: &str, json: bool) -> Result<(), Error> {
    supercloud_api::name("a snapshot", snapshot)?;
    let wanted = ExportTo {
        path: absolute(file, to.node.is_none())?,
    };
    let path = format!("/v1/snapshots/{snapshot}/export");
    let it: Snapshot = to.ask(Method::POST, &path, Some(&wanted)).await?;
    show(&it, json, |it| {
        format!("{} is in {}\n", it.name, wanted.path)
    })
}

/// `supercloud vm import`.
pub async fn import(to: &To, file: &str, name: Option<String>, json: bool) -> Result<(), Error> {
    let wanted = ImportFrom {
        path: absolute(file, to.node.is_none())?,
        name,
    };
    let it: Snapshot = to.ask(Method::POST, "/v1/snapshots", Some(&wanted)).await?;
    show(&it, json, |it| {
        let named = &it.name;
        format!(
            "{named} is a snapshot of {}: supercloud vm restore {named}\n",
            it.vm
        )
    })
}

/// `supercloud snapshot`.
pub async fn command(to: &To, command: SnapshotCommand, json: bool) -> Result<ExitCode, Error> {
    match command {
        SnapshotCommand::List => {
            let path = if to.node.is_some() {
                "/v1/snapshots"
            } else {
                "/v1/snapshots?all=true"
            };
            let all: Vec<Snapshot> = to.get(path).await?;
            show(&all[..], json, listing)?;
        }
        SnapshotCommand::Rm { name } => {
            supercloud_api::name("a snapshot", &name)?;
            let node = match &to.node {
                Some(node) => node.clone(),
                None => {
                    let it: Snapshot = to.get(&format!("/v1/snapshots/{name}")).await?;
                    it.node
                }
            };
            let of = To { node: Some(node) };
            let path = format!("/v1/snapshots/{name}");
            let gone: Value = of.ask(Method::DELETE, &path, None::<&()>).await?;
            show(&gone, json, |_| format!("{name} was removed\n"))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn listing(all: &[Snapshot]) -> String {
    let header = ["NAME", "VM", "KIND", "NODE", "SIZE", "TAKEN"];
    let mut rows = vec![header.map(str::to_owned)];
    rows.extend(all.iter().map(|it| {
        [
            it.name.clone(),
            it.vm.clone(),
            it.kind.word().to_owned(),
            it.node.clone(),
            format!("{}M", it.saved.bytes.div_ceil(1 << 20)),
            taken(it.taken_ms),
        ]
    }));
    table(&rows)
}

/// A time as UTC, to the second.
fn taken(ms: u64) -> String {
    let seconds = i64::try_from(ms / 1000).unwrap_or(0);
    let Ok(at) = time::OffsetDateTime::from_unix_timestamp(seconds) else {
        return "-".into();
    };
    let (date, time) = (at.date(), at.time());
    format!(
        "{date} {:02}:{:02}:{:02} UTC",
        time.hour(),
        time.minute(),
        time.second()
    )
}

#[cfg(test)]
mod tests {
    #[test]
    fn times() {
        assert_eq!(super::taken(0), "1970-01-01 00:00:00 UTC");
        assert_eq!(super::taken(1_796_043_985_999), "2026-11-30 13:06:25 UTC");
    }
}
