//! `supercloud vm`.

use std::io::{IsTerminal as _, Write as _};
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use hyper::Method;
use serde_json::Value;
use supercloud_api::{
    Code, Error, Keep, Life, Migrate, Operation, OperationState, Place, Progress, Restore, Stop,
    Vm, VmSpec,
};
use supercloud_node::client;

use crate::args::{MigrateArgs, RunArgs, VmCommand};
use crate::ask::To;
use crate::cpu;
use crate::exit::{output, show, table};
use crate::snapshot;

/// How often it is looked how far a move is.
const LOOK: Duration = Duration::from_millis(250);
/// For how long an agent is asked again that has gone away meanwhile.
const RESTART: Duration = Duration::from_secs(60);

/// `supercloud vm`.
pub async fn command(to: &To, command: VmCommand, json: bool) -> Result<ExitCode, Error> {
    match command {
        VmCommand::Run(args) => {
            let name = args.name.clone();
            supercloud_api::name("a VM", &name)?;
            let mut args = *args;
            if !args.cpu_for.is_empty() {
                let host = args.host.as_deref();
                args.cpu = Some(cpu::for_nodes(to, host, &args.cpu_for).await?);
            }
            let spec = spec(args, to.node.is_none())?;
            let path = format!("/v1/vms/{name}");
            let vm: Vm = to.ask(Method::PUT, &path, Some(&spec)).await?;
            show(&vm, json, |vm| format!("{name} runs on {}\n", vm.node))?;
        }
        VmCommand::List => {
            let path = if to.node.is_some() {
                "/v1/vms"
            } else {
                "/v1/vms?all=true"
            };
            let vms: Vec<Vm> = to.get(path).await?;
            show(&vms[..], json, listing)?;
        }
        VmCommand::Show { name } => {
            let of = to.of_vm(&name).await?;
            let vm: Vm = of.get(&format!("/v1/vms/{name}")).await?;
            show(&vm, json, described)?;
        }
        VmCommand::Logs { name } => logs(&to.of_vm(&name).await?, &name).await?,
        VmCommand::Console { name } => {
            return crate::console::attach(&to.of_vm(&name).await?, &name).await;
        }
        VmCommand::Start { name } => {
            let of = to.of_vm(&name).await?;
            let path = format!("/v1/vms/{name}/start");
            let vm: Vm = of.ask(Method::POST, &path, None::<&()>).await?;
            show(&vm, json, |vm| format!("{name} runs on {}\n", vm.node))?;
        }
        VmCommand::Stop { name, now, timeout } => {
            let of = to.of_vm(&name).await?;
            let wanted = Stop {
                now,
                seconds: Some(timeout),
            };
            let path = format!("/v1/vms/{name}/stop");
            let vm: Vm = of.ask(Method::POST, &path, Some(&wanted)).await?;
            show(&vm, json, |_| format!("{name} has stopped\n"))?;
        }
        VmCommand::Rm { name } => {
            let of = to.of_vm(&name).await?;
            let path = format!("/v1/vms/{name}");
            let gone: Value = of.ask(Method::DELETE, &path, None::<&()>).await?;
            show(&gone, json, |_| format!("{name} was removed\n"))?;
        }
        VmCommand::Snapshot { name, called } => snapshot::take(to, &name, called, json).await?,
        VmCommand::Restore {
            snapshot,
            name,
            lazy,
        } => {
            snapshot::restore(to, &snapshot, &Restore { name, lazy }, json).await?;
        }
        VmCommand::Clone { name, other } => snapshot::copy(to, &name, other, json).await?,
        VmCommand::Export { snapshot, file } => {
            snapshot::export(to, &snapshot, &file, json).await?;
        }
        VmCommand::Import { file, called } => snapshot::import(to, &file, called, json).await?,
        VmCommand::Migrate(args) => return migrate(to, &args, json).await,
        VmCommand::Cancel { name } => {
            let of = to.of_vm(&name).await?;
            let vm: Vm = of.get(&format!("/v1/vms/{name}")).await?;
            let Place::Leaving { operation, .. } = &vm.place else {
                return Err(Error::new(
                    Code::Conflict,
                    format!("{name} is not being moved"),
                    "`supercloud vm show` tells how it is",
                ));
            };
            let path = format!("/v1/operations/{operation}/cancel");
            let it: Operation = of.ask(Method::POST, &path, None::<&()>).await?;
            show(&it, json, |it| match it.is_over() {
                true => format!("{name} stays on {}\n", vm.node),
                false => format!("{name} is asked to stay on {}\n", vm.node),
            })?;
        }
        VmCommand::Keep { name } => {
            let of = to.of_vm(&name).await?;
            let path = format!("/v1/vms/{name}/keep");
            let vm: Vm = of.ask(Method::POST, &path, Some(&Keep {})).await?;
            show(&vm, json, |vm| format!("{name} is on {}\n", vm.node))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// A path of the user's, as the agent finds it.
pub fn absolute(path: &str, here: bool) -> Result<String, Error> {
    if !here {
        if Path::new(path).is_absolute() {
            return Ok(path.to_owned());
        }
        return Err(Error::new(
            Code::BadRequest,
            format!("{path}: on another node a path is absolute"),
            "",
        ));
    }
    let absolute = std::path::absolute(path);
    let absolute =
        absolute.map_err(|error| Error::new(Code::BadRequest, format!("{path}: {error}"), ""))?;
    Ok(absolute.display().to_string())
}

/// Files for cloud-init, as the agent finds them.
fn cloud_init(text: &str, here: bool) -> Result<String, Error> {
    let part = |part: &str| match part.split_once('=') {
        Some((name, path)) => Ok(format!("{name}={}", absolute(path, here)?)),
        None => absolute(part, here),
    };
    let parts: Result<Vec<String>, Error> = text.split(',').map(part).collect();
    Ok(parts?.join(","))
}

fn spec(args: RunArgs, here: bool) -> Result<VmSpec, Error> {
    // What has no slash is the name of an image.
    let disk = |text: String| {
        if text.contains('/') {
            absolute(&text, here)
        } else {
            Ok(text)
        }
    };
    let file = |text: Option<String>| text.map(|text| absolute(&text, here)).transpose();
    Ok(VmSpec {
        image: args.image.map(disk).transpose()?,
        disks: args.disk.into_iter().map(disk).collect::<Result<_, _>>()?,
        kernel: file(args.kernel)?,
        initrd: file(args.initrd)?,
        cmdline: args.cmdline,
        cloud_init: args
            .cloud_init
            .map(|text| cloud_init(&text, here))
            .transpose()?,
        memory: args.memory,
        cpus: args.cpus,
        cpu: args.cpu,
        nets: args.net,
        publish: args.publish,
        host: args.host,
    })
}

/// How a VM is, in a word or two.
fn state(vm: &Vm) -> String {
    match (&vm.place, vm.life, vm.seen.phase.as_str()) {
        (Place::Leaving { to, .. }, _, "doubt") => format!("in doubt, here or on {to}"),
        (Place::Leaving { to, .. }, _, "none") => format!("gone to {to}"),
        (Place::Leaving { to, .. }, _, "serving" | "cut") => {
            format!("gone to {to}, its memory follows")
        }
        (Place::Leaving { to, .. }, _, _) => format!("moving to {to}"),
        (Place::Coming { from, .. }, _, "running" | "pulling") => format!("came from {from}"),
        (Place::Coming { from, .. }, _, _) => format!("expected from {from}"),
        (Place::Here, Life::Running, "pulling") => "running, its memory follows".into(),
        (Place::Here, Life::Running, _) => "running".into(),
        (Place::Here, Life::Starting, _) => "starting".into(),
        (Place::Here, Life::Stopping, _) => "stopping".into(),
        (Place::Here, Life::Removing, _) => "being removed".into(),
        (Place::Here, Life::Stopped, _) if vm.trouble.is_some() => "ended".into(),
        (Place::Here, Life::Stopped, _) => "stopped".into(),
    }
}

fn uptime(seconds: Option<u64>) -> String {
    match seconds.map(|all| (all / 3600, all / 60 % 60, all % 60)) {
        None => "-".into(),
        Some((0, 0, s)) => format!("{s}s"),
        Some((0, m, s)) => format!("{m}m{s:02}s"),
        Some((h, m, _)) => format!("{h}h{m:02}m"),
    }
}

fn listing(vms: &[Vm]) -> String {
    let header = ["NAME", "NODE", "STATE", "HOST", "CPUS", "MEMORY", "UPTIME"];
    let mut rows = vec![header.map(str::to_owned)];
    rows.extend(vms.iter().map(|vm| {
        [
            vm.name.clone(),
            vm.node.clone(),
            state(vm),
            vm.seen.host.clone().unwrap_or_else(|| "-".into()),
            vm.spec.cpus.to_string(),
            format!("{}M", vm.spec.memory >> 20),
            uptime(vm.seen.uptime_seconds),
        ]
    }));
    table(&rows)
}

fn described(vm: &Vm) -> String {
    let mut rows = vec![
        ["name".to_owned(), vm.name.clone()],
        ["uuid".to_owned(), vm.uuid.clone()],
        ["node".to_owned(), vm.node.clone()],
        ["state".to_owned(), state(vm)],
        ["process".to_owned(), vm.seen.phase.clone()],
        ["memory".to_owned(), format!("{}M", vm.spec.memory >> 20)],
        ["cpus".to_owned(), vm.spec.cpus.to_string()],
    ];
    if let Some(cpu) = &vm.spec.cpu {
        rows.push(["cpu".into(), cpu.clone()]);
    }
    if let Some(host) = &vm.seen.host {
        rows.push(["host".into(), host.clone()]);
    }
    for disk in &vm.disks {
        let size = disk.size >> 20;
        rows.push([
            "disk".into(),
            format!("{} ({}, {size}M)", disk.path, disk.format),
        ]);
        if let Some(base) = &disk.base {
            rows.push(["  stands on".into(), base.clone()]);
        }
    }
    for port in &vm.ports {
        rows.push(["net".into(), format!("{} ({})", port.net, port.mac)]);
    }
    if let Some(trouble) = &vm.trouble {
        rows.push(["trouble".into(), trouble.clone()]);
    }
    table(&rows)
}

async fn logs(of: &To, name: &str) -> Result<(), Error> {
    let mut agent = of.agent().await?;
    let asked = client::request(Method::GET, &format!("/v1/vms/{name}/log"), None::<&()>)?;
    let response = agent.send(asked, client::ANSWER).await?;
    let status = response.status();
    let bytes = client::read(response).await.map_err(Error::failed)?;
    if !status.is_success() {
        return client::understood::<()>(name, status, &bytes);
    }
    output(&String::from_utf8_lossy(&bytes))
}

/// How far a move is.
fn sentence(it: &Operation) -> String {
    let Some(now) = &it.progress else {
        return format!("{:?}", it.step).to_lowercase();
    };
    if matches!(now.stage.as_str(), "pulling" | "cut") {
        return format!(
            "{}: {} MiB of its memory follow it",
            now.stage,
            now.left >> 8
        );
    }
    let slow = match now.share {
        0 | 100.. => String::new(),
        share => format!(", the guest has {share} % of its time"),
    };
    format!(
        "{}: round {}, {} MiB sent, {} MiB left{slow}",
        now.stage,
        now.rounds + 1,
        now.bytes >> 20,
        now.dirty >> 8
    )
}

fn moved(name: &str, to: &str, it: &Progress) -> String {
    if it.stage == "fits" {
        return format!("{name} can move to {to}\n");
    }
    let took = Duration::from_millis(it.took_ms.unwrap_or(0)).as_secs_f64();
    let followed = it.pull_ms.map_or_else(String::new, |ms| {
        format!(", and its memory followed it for {ms} ms")
    });
    let found = match it.found {
        0 => String::new(),
        found => format!(" and {found} found there"),
    };
    format!(
        "{name} runs on {to}; {} pages{found} in {} rounds, {} MiB in {took:.1} s; it stood still for {} \
         ms{followed}\n",
        it.pages,
        it.rounds,
        it.bytes.div_ceil(1 << 20),
        it.downtime_ms.unwrap_or(0),
    )
}

async fn migrate(to: &To, args: &MigrateArgs, json: bool) -> Result<ExitCode, Error> {
    let name = &args.name;
    let of = to.of_vm(name).await?;
    let wanted = Migrate {
        id: args.id.clone(),
        to: args.to.clone(),
        max_downtime_ms: args
            .max_downtime
            .map(|time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX)),
        bandwidth: args.bandwidth,
        streams: args.streams,
        post_copy: args.post_copy,
        dry_run: args.dry_run,
    };
    let path = format!("/v1/vms/{name}/migrate");
    let begun: Operation = of.ask(Method::POST, &path, Some(&wanted)).await?;
    let it = wait(&of, begun, args, json).await?;
    if json {
        show(&it, true, |_| String::new())?;
    }
    match (it.state, &it.error) {
        (OperationState::Done, _) => {
            if !json {
                let progress = it.progress.unwrap_or_default();
                output(&moved(name, &args.to, &progress))?;
            }
            Ok(ExitCode::SUCCESS)
        }
        (_, Some(error)) => Err(error.clone()),
        (_, None) => Err(Error::failed(format!("{name} has not moved"))),
    }
}

/// Until it is over, or in doubt for too long. Ctrl-C cancels it.
async fn wait(
    of: &To,
    mut it: Operation,
    args: &MigrateArgs,
    json: bool,
) -> Result<Operation, Error> {
    let line = !args.quiet && !json && std::io::stderr().is_terminal();
    let path = format!("/v1/operations/{}", it.id);
    let mut doubt: Option<Instant> = None;
    let mut away: Option<Instant> = None;
    loop {
        if line {
            eprint!("\r\x1b[K");
        }
        if it.is_over() {
            return Ok(it);
        }
        if it.state == OperationState::Doubt {
            let since = *doubt.get_or_insert_with(Instant::now);
            if since.elapsed() >= Duration::from_secs(args.patience) {
                return Ok(it);
            }
        } else {
            doubt = None;
        }
        if line {
            eprint!("{}", sentence(&it));
            let _ = std::io::stderr().flush();
        }
        tokio::select! {
            () = tokio::time::sleep(LOOK) => {}
            _ = tokio::signal::ctrl_c() => {
                // What comes of it is seen next.
                let _: Result<Operation, Error> =
                    of.ask(Method::POST, &format!("{path}/cancel"), None::<&()>).await;
            }
        }
        match of.get(&path).await {
            Ok(now) => {
                it = now;
                away = None;
            }
            // Its agent may be started again.
            Err(error) if error.code == Code::Unreachable => {
                let since = *away.get_or_insert_with(Instant::now);
                if since.elapsed() >= RESTART {
                    return Err(Error {
                        hint: format!(
                            "the move goes on as far as it can; start the agent, then: \
                             supercloud operation show {}",
                            it.id
                        ),
                        ..error
                    });
                }
            }
            Err(error) => return Err(error),
        }
    }
}
