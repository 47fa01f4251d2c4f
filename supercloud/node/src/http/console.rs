//! A VM's console: the connection becomes it.

use axum::body::Body;
use axum::response::Response;
use hyper::header::{CONNECTION, HeaderValue, UPGRADE};
use hyper::{Request, StatusCode};
use hyper_util::rt::TokioIo;
use supercloud_api::{Code, Error};

use crate::agent::Agent;

/// What a connection becomes.
pub const PROTOCOL: &str = "supercloud-console";

/// The answer to who wants a connection to become a console.
pub fn switching() -> Response {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = response.headers_mut();
    headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
    headers.insert(UPGRADE, HeaderValue::from_static(PROTOCOL));
    response
}

/// Gives a connection a VM's console.
pub async fn attach(
    agent: &Agent,
    name: &str,
    mut request: Request<Body>,
) -> Result<Response, Error> {
    let wanted = request.headers().get(UPGRADE);
    if wanted.and_then(|value| value.to_str().ok()) != Some(PROTOCOL) {
        return Err(Error::new(
            Code::BadRequest,
            "a console is a connection of its own",
            format!("ask with Upgrade: {PROTOCOL}"),
        ));
    }
    let vm = agent.vm(name).await?;
    if vm.seen.pid.is_none() {
        return Err(Error::new(
            Code::Conflict,
            format!("{name} does not run"),
            format!("start it first: supercloud vm start {name}"),
        ));
    }
    let mut process = agent.blanket.console(name)?;
    let upgraded = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        let Ok(connection) = upgraded.await else {
            return;
        };
        let (mut from_user, mut to_user) = tokio::io::split(TokioIo::new(connection));
        let (Some(mut stdin), Some(mut stdout)) = (process.stdin.take(), process.stdout.take())
        else {
            return;
        };
        // Either end ends it; the process is ended with it.
        tokio::select! {
            _ = tokio::io::copy(&mut from_user, &mut stdin) => {}
            _ = tokio::io::copy(&mut stdout, &mut to_user) => {}
        }
        let _ = process.kill().await;
    });
    Ok(switching())
}
