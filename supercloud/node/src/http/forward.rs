//! A request for another node: this one asks it, with its own certificate.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::State;
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::header::{CONNECTION, CONTENT_TYPE, UPGRADE};
use hyper::{Request, StatusCode};
use hyper_util::rt::TokioIo;
use supercloud_api::{Code, Door, Error, NODE_HEADER, ROUTES};

use super::{Fault, Peer};
use crate::agent::Agent;
use crate::client;

/// Longest body that is passed on.
const MOST: usize = 4 << 20;

/// Whether somebody may ask that at all, and whom it is for.
pub async fn doors(
    State(agent): State<Arc<Agent>>,
    request: Request<Body>,
    next: Next,
) -> Response {
    // Who is not known is a stranger.
    let peer = request.extensions().get::<Peer>().cloned();
    let peer = peer.unwrap_or(Peer::Stranger);
    let door = door_of(&request);
    let allowed = match peer {
        Peer::Local => true,
        // Its connection may be older than its removal.
        Peer::Member(ref sum) => door != Door::Local && !agent.removed.has(sum),
        Peer::Stranger => door == Door::Anyone,
    };
    if !allowed {
        return Fault(Error::new(
            Code::NotAllowed,
            "that is not for everybody",
            "nodes have a certificate of their cluster: supercloud node join TOKEN",
        ))
        .into_response();
    }
    let node = request.headers().get(NODE_HEADER).map(|value| {
        // A name is ASCII.
        value.to_str().unwrap_or_default().to_owned()
    });
    match node {
        Some(node) if node != agent.name() => {
            if peer != Peer::Local || door == Door::Local {
                return Fault(Error::new(
                    Code::NotAllowed,
                    "a request is passed on once, and not for everything",
                    "",
                ))
                .into_response();
            }
            passed(&agent, &node, request)
                .await
                .unwrap_or_else(|error| Fault(error).into_response())
        }
        _ => next.run(request).await,
    }
}

/// Who may ask that. What is not listed is for members, who are told that it is not there.
fn door_of(request: &Request<Body>) -> Door {
    // Those that are not for members have no names in their paths.
    let found = ROUTES.iter().find(|route| {
        route.path == request.uri().path() && route.method.word() == request.method().as_str()
    });
    found.map_or(Door::Member, |route| route.door)
}

async fn passed(agent: &Agent, node: &str, mut request: Request<Body>) -> Result<Response, Error> {
    let upgrade = request.headers().get(UPGRADE).cloned();
    let upgraded = upgrade.is_some().then(|| hyper::upgrade::on(&mut request));
    let (parts, body) = request.into_parts();
    let body = Limited::new(body, MOST)
        .collect()
        .await
        .map_err(|error| Error::new(Code::BadRequest, format!("the request: {error}"), ""))?;
    let path = parts.uri.path_and_query().map_or("/", |it| it.as_str());
    let mut asked = client::request(parts.method, path, None::<&()>)?;
    *asked.body_mut() = Full::<Bytes>::new(body.to_bytes());
    if let Some(upgrade) = upgrade {
        asked.headers_mut().insert(UPGRADE, upgrade);
        asked.headers_mut().insert(
            CONNECTION,
            hyper::header::HeaderValue::from_static("upgrade"),
        );
    }
    let mut there = agent.connect(node).await?;
    let mut answer = there.send(asked, client::LONG).await?;
    let status = answer.status();
    if let (StatusCode::SWITCHING_PROTOCOLS, Some(here)) = (status, upgraded) {
        let there_too = hyper::upgrade::on(&mut answer);
        tokio::spawn(async move {
            // Held until it is over: it is the connection.
            let _there = there;
            if let (Ok(here), Ok(far)) = tokio::join!(here, there_too) {
                let (mut here, mut far) = (TokioIo::new(here), TokioIo::new(far));
                let _ = tokio::io::copy_bidirectional(&mut here, &mut far).await;
            }
        });
        return Ok(super::console::switching());
    }
    let kind = answer.headers().get(CONTENT_TYPE).cloned();
    let mut response = Response::new(Body::new(Held {
        body: answer.into_body(),
        _agent: there,
    }));
    *response.status_mut() = status;
    if let Some(kind) = kind {
        response.headers_mut().insert(CONTENT_TYPE, kind);
    }
    Ok(response)
}

/// A body, and the connection that it comes over.
struct Held {
    body: hyper::body::Incoming,
    _agent: client::Agent,
}

impl hyper::body::Body for Held {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Result<hyper::body::Frame<Bytes>, hyper::Error>>> {
        std::pin::Pin::new(&mut self.body).poll_frame(context)
    }
}
