//! Images, operations, events, figures.

use std::path::Path;
use std::process::ExitCode;

use http_body_util::BodyExt as _;
use hyper::Method;
use serde_json::Value;
use supercloud_api::{AddImage, Code, Error, Event, Image, Kind, Operation, openapi as document};
use supercloud_node::client;

use crate::args::{ImageCommand, OperationCommand};
use crate::ask::To;
use crate::exit::{output, show, table};

/// `supercloud image`.
pub async fn image(to: &To, command: ImageCommand, json: bool) -> Result<ExitCode, Error> {
    match command {
        ImageCommand::Add { file, name } => {
            let path = if to.node.is_some() {
                file.clone()
            } else {
                let absolute = std::path::absolute(&file);
                let absolute = absolute.map_err(|error| {
                    Error::new(Code::BadRequest, format!("{file}: {error}"), "")
                })?;
                absolute.display().to_string()
            };
            let name = name.unwrap_or_else(|| {
                let stem = Path::new(&file).file_stem();
                stem.map_or_else(String::new, |stem| stem.to_string_lossy().into_owned())
            });
            supercloud_api::name("an image", &name)?;
            let wanted = AddImage { path };
            let path = format!("/v1/images/{name}");
            let image: Image = to.ask(Method::PUT, &path, Some(&wanted)).await?;
            show(&image, json, |it| format!("{name} is {}\n", it.hash))?;
        }
        ImageCommand::List => {
            let images: Vec<Image> = to.get("/v1/images").await?;
            show(&images[..], json, listing)?;
        }
        ImageCommand::Rm { name } => {
            supercloud_api::name("an image", &name)?;
            let path = format!("/v1/images/{name}");
            let gone: Value = to.ask(Method::DELETE, &path, None::<&()>).await?;
            show(&gone, json, |_| format!("{name} was removed\n"))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn listing(images: &[Image]) -> String {
    let header = ["NAME", "FORMAT", "SIZE", "FILE", "HASH"];
    let mut rows = vec![header.map(str::to_owned)];
    rows.extend(images.iter().map(|image| {
        [
            image.names.join(", "),
            format!("{:?}", image.format).to_lowercase(),
            format!("{}M", image.size >> 20),
            format!("{}M", image.bytes.div_ceil(1 << 20)),
            image.hash.get(..16).unwrap_or_default().to_owned(),
        ]
    }));
    table(&rows)
}

/// `supercloud operation`.
pub async fn operation(to: &To, command: OperationCommand, json: bool) -> Result<ExitCode, Error> {
    match command {
        OperationCommand::List => {
            let all: Vec<Operation> = to.get("/v1/operations").await?;
            show(&all[..], json, |all| {
                let header = ["ID", "KIND", "VM", "TO", "STATE", "STEP", "ERROR"];
                let mut rows = vec![header.map(str::to_owned)];
                rows.extend(all.iter().map(row));
                table(&rows)
            })?;
        }
        OperationCommand::Show { id } => {
            supercloud_api::name("an operation", &id)?;
            let it: Operation = to.get(&format!("/v1/operations/{id}")).await?;
            show(&it, json, |it| table(&[row(it)]))?;
        }
        OperationCommand::Cancel { id } => {
            supercloud_api::name("an operation", &id)?;
            let path = format!("/v1/operations/{id}/cancel");
            let it: Operation = to.ask(Method::POST, &path, None::<&()>).await?;
            show(&it, json, |it| table(&[row(it)]))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn row(it: &Operation) -> [String; 7] {
    let kind = match it.kind {
        Kind::Migrate => "migrate",
        Kind::Drain => "drain",
    };
    [
        it.id.clone(),
        kind.into(),
        it.vm.clone().unwrap_or_default(),
        it.to.clone().unwrap_or_default(),
        format!("{:?}", it.state).to_lowercase(),
        format!("{:?}", it.step).to_lowercase(),
        it.error
            .as_ref()
            .map_or_else(String::new, |it| it.message.clone()),
    ]
}

/// `supercloud events`.
pub async fn events(to: &To, json: bool) -> Result<ExitCode, Error> {
    let mut agent = to.agent().await?;
    let asked = client::request(Method::GET, "/v1/events", None::<&()>)?;
    let response = agent.send(asked, client::ANSWER).await?;
    let status = response.status();
    if !status.is_success() {
        let bytes = client::read(response).await.map_err(Error::failed)?;
        return client::understood::<Value>("the agent", status, &bytes).map(|_| ExitCode::FAILURE);
    }
    let mut body = response.into_body();
    let mut rest = Vec::new();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| {
            Error::new(
                Code::Unreachable,
                format!("the agent has ended: {error}"),
                "",
            )
        })?;
        rest.extend_from_slice(frame.data_ref().map_or(&[][..], |bytes| bytes));
        while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = rest.drain(..=end).collect();
            let line = String::from_utf8_lossy(&line);
            let Some(data) = line.strip_prefix("data: ").or(line.strip_prefix("data:")) else {
                continue;
            };
            if let Ok(event) = serde_json::from_str::<Event>(data.trim()) {
                if json {
                    output(&format!("{}\n", data.trim()))?;
                } else {
                    output(&format!(
                        "{} {} {}: {}\n",
                        event.node, event.kind, event.about, event.text
                    ))?;
                }
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// `supercloud metrics`.
pub async fn metrics(to: &To) -> Result<ExitCode, Error> {
    let mut agent = to.agent().await?;
    let asked = client::request(Method::GET, "/v1/metrics", None::<&()>)?;
    let response = agent.send(asked, client::ANSWER).await?;
    let status = response.status();
    let bytes = client::read(response).await.map_err(Error::failed)?;
    if !status.is_success() {
        client::understood::<Value>("the agent", status, &bytes)?;
    }
    output(&String::from_utf8_lossy(&bytes))?;
    Ok(ExitCode::SUCCESS)
}

/// `supercloud openapi`.
pub fn openapi() -> Result<ExitCode, Error> {
    show(&document::document(), true, |_| String::new())?;
    Ok(ExitCode::SUCCESS)
}
