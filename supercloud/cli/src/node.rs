//! `supercloud node`.

use std::io::Read as _;
use std::process::ExitCode;
use std::time::Duration;

use hyper::Method;
use supercloud_api::{
    Drain, Error, Finding, JoinCluster, Level, Members, NewToken, Node, Operation, OperationState,
    Remove, TokenText,
};
use supercloud_node::config::{self, Config};
use supercloud_node::http::Running;
use tokio::signal::unix::{SignalKind, signal};

use crate::args::{NodeCommand, StartArgs};
use crate::ask::To;
use crate::exit::{output, show, table};

/// Most bytes of a token.
const TOKEN: u64 = 4096;
/// How often it is looked how far a drain is.
const LOOK: Duration = Duration::from_millis(500);

/// `supercloud node`.
pub async fn command(to: &To, command: NodeCommand, json: bool) -> Result<ExitCode, Error> {
    match command {
        NodeCommand::Start(args) => return start(*args).await,
        NodeCommand::Token { uses, valid } => {
            let wanted = NewToken {
                uses,
                seconds: valid.as_secs(),
            };
            let token: TokenText = to.ask(Method::POST, "/v1/tokens", Some(&wanted)).await?;
            show(&token, json, |it| format!("{}\n", it.token))?;
        }
        NodeCommand::Join { token } => {
            let token = if token == "-" {
                let read = std::io::read_to_string(std::io::stdin().take(TOKEN));
                read.map_err(|error| Error::failed(format!("standard input: {error}")))?
            } else {
                token
            };
            let token = token.trim().to_owned();
            let wanted = JoinCluster { token };
            let members: Members = to.ask(Method::POST, "/v1/cluster", Some(&wanted)).await?;
            show(&members, json, |it| {
                let names = it.members.iter().map(|it| it.name.as_str());
                format!("joined: {}\n", names.collect::<Vec<_>>().join(", "))
            })?;
        }
        NodeCommand::Add { target, packages } => crate::add::add(to, &target, &packages).await?,
        NodeCommand::List => {
            let nodes: Vec<Node> = to.get("/v1/nodes").await?;
            show(&nodes[..], json, listing)?;
        }
        NodeCommand::Remove { name, force } => {
            supercloud_api::name("a node", &name)?;
            let wanted = Remove { force };
            let path = format!("/v1/nodes/{name}");
            let members: Members = to.ask(Method::DELETE, &path, Some(&wanted)).await?;
            show(&members, json, |_| format!("{name} was removed\n"))?;
        }
        NodeCommand::Drain {
            name,
            at_once,
            quiet,
        } => {
            let of = To { node: Some(name) };
            return drain(&of, at_once, quiet, json).await;
        }
        NodeCommand::Doctor => return doctor(to, json).await,
    }
    Ok(ExitCode::SUCCESS)
}

async fn start(args: StartArgs) -> Result<ExitCode, Error> {
    let config = Config {
        data: match args.data {
            Some(data) => data,
            None => config::default_data()?,
        },
        run: config::default_run()?,
        listen: args.listen,
        advertise: args.advertise,
        name: args.name,
        join: args.join,
        blanket: args.blanket.unwrap_or_else(config::find_blanket),
    };
    let failed = |error: std::io::Error| Error::failed(format!("signals: {error}"));
    let mut terminated = signal(SignalKind::terminate()).map_err(failed)?;
    let mut interrupted = signal(SignalKind::interrupt()).map_err(failed)?;
    let running = Running::start(config).await?;
    let status = running.agent.status()?;
    eprintln!(
        "supercloud: the node {} is at {}",
        status.name, status.address
    );
    tokio::select! {
        _ = terminated.recv() => {}
        _ = interrupted.recv() => {}
    }
    eprintln!("supercloud: the agent ends; VMs go on");
    Ok(ExitCode::SUCCESS)
}

fn mib(bytes: u64) -> String {
    format!("{}M", bytes >> 20)
}

fn listing(nodes: &[Node]) -> String {
    let header = [
        "NAME", "ADDRESS", "STATE", "CPUS", "MEMORY", "FREE", "VMS", "",
    ];
    let mut rows = vec![header.map(str::to_owned)];
    for node in nodes {
        let state = match (node.here, node.reachable) {
            (true, _) => "here",
            (false, true) => "reachable",
            (false, false) => "unreachable",
        };
        let of = |figure: fn(&supercloud_api::NodeStatus) -> String| {
            node.status.as_ref().map_or_else(|| "-".to_owned(), figure)
        };
        rows.push([
            node.name.clone(),
            node.address.clone(),
            state.into(),
            of(|it| it.cpus.to_string()),
            of(|it| mib(it.memory)),
            of(|it| mib(it.memory_available)),
            of(|it| it.vms.to_string()),
            of(|it| {
                if it.has_ca {
                    "has the CA's key".into()
                } else {
                    String::new()
                }
            })
            .replace('-', ""),
        ]);
    }
    table(&rows)
}

async fn doctor(to: &To, json: bool) -> Result<ExitCode, Error> {
    let found: Vec<Finding> = to.get("/v1/doctor").await?;
    let ok = found.iter().all(|it| it.level != Level::Fail);
    show(&found[..], json, |all| {
        let mut text = String::new();
        for it in all {
            let level = match it.level {
                Level::Ok => "ok",
                Level::Warn => "warn",
                Level::Fail => "FAIL",
            };
            text.push_str(&format!("{level:<5} {:<20} {}\n", it.check, it.text));
            if let Some(mend) = it.mend.as_ref().filter(|mend| !mend.is_empty()) {
                text.push_str(&format!("      -> {mend}\n"));
            }
        }
        text
    })?;
    Ok(if ok {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

async fn drain(of: &To, at_once: u32, quiet: bool, json: bool) -> Result<ExitCode, Error> {
    let wanted = Drain {
        id: None,
        at_once: Some(at_once),
    };
    let mut operation: Operation = of.ask(Method::POST, "/v1/drain", Some(&wanted)).await?;
    let mut told = Vec::new();
    loop {
        for part in &operation.parts {
            let over = part.error.is_some() || part.downtime_ms.is_some();
            if over && !told.contains(&part.vm) {
                told.push(part.vm.clone());
                if !quiet && !json {
                    output(&match (&part.error, &part.to) {
                        (None, Some(to)) => format!(
                            "{} runs on {to}; it stood still for {} ms\n",
                            part.vm,
                            part.downtime_ms.unwrap_or(0)
                        ),
                        (Some(error), _) => format!("{} stays: {error}\n", part.vm),
                        (None, None) => String::new(),
                    })?;
                }
            }
        }
        if operation.is_over() {
            break;
        }
        tokio::time::sleep(LOOK).await;
        operation = of.get(&format!("/v1/operations/{}", operation.id)).await?;
    }
    if json {
        show(&operation, true, |_| String::new())?;
    }
    match (operation.state, operation.error) {
        (OperationState::Done, _) | (_, None) => Ok(ExitCode::SUCCESS),
        (_, Some(error)) => Err(error),
    }
}
