//! `supercloud net`.

use std::process::ExitCode;

use hyper::Method;
use supercloud_api::{Error, Net, Nets, NewNet};

use crate::args::NetCommand;
use crate::ask::To;
use crate::exit::{show, table};

/// `supercloud net`.
pub async fn command(to: &To, command: NetCommand, json: bool) -> Result<ExitCode, Error> {
    match command {
        NetCommand::Create { name, subnet } => {
            supercloud_api::name("a network", &name)?;
            let path = format!("/v1/nets/{name}");
            let wanted = NewNet { subnet };
            let net: Net = to.ask(Method::PUT, &path, Some(&wanted)).await?;
            show(&net, json, |net| format!("{name} has {}\n", net.subnet))?;
        }
        NetCommand::List => {
            let nets: Nets = to.get("/v1/nets").await?;
            show(&nets, json, listing)?;
        }
        NetCommand::Rm { name } => {
            supercloud_api::name("a network", &name)?;
            let path = format!("/v1/nets/{name}");
            let left: Nets = to.ask(Method::DELETE, &path, None::<&()>).await?;
            show(&left, json, |_| format!("{name} was removed\n"))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn listing(nets: &Nets) -> String {
    let header = [
        "NETWORK",
        "ADDRESSES",
        "VM",
        "ADDRESS",
        "MAC",
        "NODE",
        "PORTS",
    ];
    let mut rows = vec![header.map(str::to_owned)];
    for net in &nets.nets {
        let of_net = |vm: [String; 5]| {
            let [name, address, mac, node, ports] = vm;
            [
                net.name.clone(),
                net.subnet.clone(),
                name,
                address,
                mac,
                node,
                ports,
            ]
        };
        if net.ports.is_empty() {
            rows.push(of_net(["-"; 5].map(str::to_owned)));
        }
        rows.extend(net.ports.iter().map(|port| {
            of_net([
                port.vm.clone(),
                port.address.clone(),
                port.mac.clone(),
                port.node.clone(),
                port.publish.join(", "),
            ])
        }));
    }
    table(&rows)
}
