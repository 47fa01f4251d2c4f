//! What is behind the doors.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Path, Query, State};
use axum::handler::Handler;
use axum::response::sse::{self, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodFilter, on};
use axum::{Json, Router, middleware};
use bytes::Bytes;
use futures_util::stream::{self, Stream};
use hyper::Request;
use hyper::header::{CONTENT_LENGTH, CONTENT_TYPE};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use supercloud_api::{
    AddImage, Arrival, CloneVm, Code, Drain, Error, ExportTo, Finding, Image, ImportFrom,
    JoinAnswer, JoinCluster, JoinRequest, Members, Method, Migrate, Net, NetMoved, NetNode, Nets,
    NewNet, NewNetAddress, NewToken, Node, NodeCpu, NodeStatus, Operation, Prepare, Prepared,
    Remove, Restore, Snapshot, Stop, TakeSnapshot, TokenText, Vm, VmSpec, openapi,
};
use tokio::io::AsyncReadExt as _;
use tokio::sync::broadcast::error::RecvError;

use super::{Fault, console, forward};
use crate::agent::Agent;
use crate::record::IMAGES;

type Answer<T> = Result<Json<T>, Fault>;
type At = State<Arc<Agent>>;

/// Bytes of a file that are sent at once.
const PIECE: usize = 1 << 18;
/// Most of a log that is shown.
const LOG: u64 = 1 << 20;

/// The router, and what it has.
struct Routes {
    router: Router<Arc<Agent>>,
    listed: BTreeSet<(Method, &'static str)>,
}

impl Routes {
    fn add<T: 'static>(
        mut self,
        method: Method,
        path: &'static str,
        handler: impl Handler<T, Arc<Agent>>,
    ) -> Self {
        let filter = match method {
            Method::Get => MethodFilter::GET,
            Method::Put => MethodFilter::PUT,
            Method::Post => MethodFilter::POST,
            Method::Delete => MethodFilter::DELETE,
        };
        self.router = self.router.route(path, on(filter, handler));
        self.listed.insert((method, path));
        self
    }
}

fn routes() -> Routes {
    use Method::{Delete, Get, Post, Put};
    let none = Routes {
        router: Router::new(),
        listed: BTreeSet::new(),
    };
    none.add(Get, "/v1/openapi.json", async || Json(openapi::document()))
        .add(Get, "/v1/node", node)
        .add(Get, "/v1/nodes", nodes)
        .add(Delete, "/v1/nodes/{name}", remove_node)
        .add(Get, "/v1/members", members)
        .add(Post, "/v1/tokens", token)
        .add(Post, "/v1/join", join)
        .add(Post, "/v1/cluster", join_another)
        .add(Get, "/v1/nets", nets)
        .add(Put, "/v1/nets/{name}", put_net)
        .add(Delete, "/v1/nets/{name}", remove_net)
        .add(Put, "/v1/nets/{name}/ports/{mac}", put_port)
        .add(Delete, "/v1/nets/{name}/ports/{mac}", remove_port)
        .add(Put, "/v1/net-nodes/{name}", put_net_node)
        .add(Post, "/v1/net-moves", net_moved)
        .add(Post, "/v1/drain", drain)
        .add(Get, "/v1/doctor", doctor)
        .add(Get, "/v1/cpu", cpu)
        .add(Get, "/v1/vms", vms)
        .add(Get, "/v1/vms/{name}", vm)
        .add(Put, "/v1/vms/{name}", put_vm)
        .add(Delete, "/v1/vms/{name}", remove_vm)
        .add(Post, "/v1/vms/{name}/start", start)
        .add(Post, "/v1/vms/{name}/stop", stop)
        .add(Post, "/v1/vms/{name}/migrate", migrate)
        .add(Post, "/v1/vms/{name}/keep", keep)
        .add(Get, "/v1/vms/{name}/log", log)
        .add(Get, "/v1/vms/{name}/console", attach)
        .add(Post, "/v1/vms/{name}/snapshot", take_snapshot)
        .add(Post, "/v1/vms/{name}/clone", clone_vm)
        .add(Get, "/v1/snapshots", snapshots)
        .add(Post, "/v1/snapshots", import)
        .add(Get, "/v1/snapshots/{name}", snapshot)
        .add(Delete, "/v1/snapshots/{name}", remove_snapshot)
        .add(Post, "/v1/snapshots/{name}/restore", restore)
        .add(Post, "/v1/snapshots/{name}/export", export)
        .add(Get, "/v1/operations", operations)
        .add(Get, "/v1/operations/{id}", operation)
        .add(Post, "/v1/operations/{id}/cancel", cancel)
        .add(Get, "/v1/images", images)
        .add(Put, "/v1/images/{name}", add_image)
        .add(Delete, "/v1/images/{name}", remove_image)
        .add(Get, "/v1/blobs/{hash}", blob)
        .add(Get, "/v1/events", events)
        .add(Get, "/v1/metrics", metrics)
        .add(Put, "/v1/arrivals/{operation}", prepare)
        .add(Get, "/v1/arrivals/{operation}", arrival)
        .add(Post, "/v1/arrivals/{operation}/claim", claim)
        .add(Post, "/v1/arrivals/{operation}/bereave", bereave)
        .add(Delete, "/v1/arrivals/{operation}", clear)
}

/// What the router has, for comparing.
#[must_use]
pub fn listed() -> BTreeSet<(Method, &'static str)> {
    routes().listed
}

/// The API.
pub fn router(agent: &Arc<Agent>) -> Router {
    routes()
        .router
        .fallback(async || {
            Fault(Error::not_found(
                "there is nothing of that name",
                "GET /v1/openapi.json lists what there is",
            ))
        })
        .layer(middleware::from_fn_with_state(
            Arc::clone(agent),
            forward::doors,
        ))
        .with_state(Arc::clone(agent))
}

/// What a body says; an empty one is as good as one that says nothing.
fn read<T: DeserializeOwned>(body: &Bytes) -> Result<T, Fault> {
    let bytes: &[u8] = if body.is_empty() { b"{}" } else { body };
    serde_json::from_slice(bytes).map_err(|error| {
        Fault(Error::new(
            Code::BadRequest,
            format!("the body: {error}"),
            "GET /v1/openapi.json says what it is to be",
        ))
    })
}

async fn node(State(agent): At) -> Answer<NodeStatus> {
    agent.observe().await?;
    Ok(Json(agent.status()?))
}

async fn nodes(State(agent): At) -> Answer<Vec<Node>> {
    Ok(Json(agent.nodes().await?))
}

async fn remove_node(State(agent): At, Path(name): Path<String>, body: Bytes) -> Answer<Members> {
    let wanted: Remove = read(&body)?;
    Ok(Json(agent.remove_node(&name, &wanted).await?))
}

async fn members(State(agent): At) -> Answer<Members> {
    Ok(Json(agent.members()?))
}

async fn token(State(agent): At, body: Bytes) -> Answer<TokenText> {
    let wanted: NewToken = read(&body)?;
    Ok(Json(agent.new_token(&wanted)?))
}

async fn join(State(agent): At, body: Bytes) -> Answer<JoinAnswer> {
    let asked: JoinRequest = read(&body)?;
    Ok(Json(agent.let_in(&asked)?))
}

async fn join_another(State(agent): At, body: Bytes) -> Answer<Members> {
    let wanted: JoinCluster = read(&body)?;
    Ok(Json(agent.join_another(&wanted.token).await?))
}

async fn nets(State(agent): At) -> Answer<Nets> {
    Ok(Json(agent.nets()?))
}

async fn put_net(State(agent): At, Path(name): Path<String>, body: Bytes) -> Answer<Net> {
    let wanted: NewNet = read(&body)?;
    Ok(Json(agent.put_net(&name, &wanted).await?))
}

async fn remove_net(State(agent): At, Path(name): Path<String>) -> Answer<Nets> {
    Ok(Json(agent.remove_net(&name).await?))
}

async fn put_port(
    State(agent): At,
    Path((name, mac)): Path<(String, String)>,
    body: Bytes,
) -> Answer<Net> {
    let wanted: NewNetAddress = read(&body)?;
    Ok(Json(agent.put_port(&name, &mac, &wanted).await?))
}

async fn remove_port(State(agent): At, Path((name, mac)): Path<(String, String)>) -> Answer<Nets> {
    Ok(Json(agent.remove_port(&name, &mac).await?))
}

async fn put_net_node(State(agent): At, Path(name): Path<String>, body: Bytes) -> Answer<Nets> {
    let wanted: NetNode = read(&body)?;
    if wanted.node != name {
        return Err(Fault(Error::new(
            Code::BadRequest,
            "two names of a node",
            "",
        )));
    }
    Ok(Json(agent.put_net_node(&wanted).await?))
}

async fn net_moved(State(agent): At, body: Bytes) -> Answer<Value> {
    let moved: NetMoved = read(&body)?;
    agent.net_moved(&moved).await?;
    Ok(Json(json!({})))
}

async fn drain(State(agent): At, body: Bytes) -> Answer<Operation> {
    let wanted: Drain = read(&body)?;
    Ok(Json(agent.drain(&wanted)?))
}

async fn doctor(State(agent): At) -> Answer<Vec<Finding>> {
    Ok(Json(agent.doctor().await?))
}

/// On which host.
#[derive(Deserialize)]
struct OnHost {
    #[serde(default)]
    host: Option<Host>,
}

/// What VMs run on.
#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Host {
    Auto,
    Module,
    Kvm,
}

async fn cpu(State(agent): At, Query(on): Query<OnHost>) -> Answer<NodeCpu> {
    let host = on.host.map(|host| match host {
        Host::Auto => "auto",
        Host::Module => "module",
        Host::Kvm => "kvm",
    });
    Ok(Json(agent.blanket.cpu(host).await?))
}

/// Of all nodes, or of this one.
#[derive(Deserialize)]
struct All {
    #[serde(default)]
    all: bool,
}

async fn vms(State(agent): At, Query(of): Query<All>) -> Answer<Vec<Vm>> {
    Ok(Json(if of.all {
        agent.all_vms().await?
    } else {
        agent.vms().await?
    }))
}

async fn vm(State(agent): At, Path(name): Path<String>, Query(of): Query<All>) -> Answer<Vm> {
    Ok(Json(if of.all {
        agent.find_vm(&name).await?
    } else {
        agent.vm(&name).await?
    }))
}

async fn put_vm(State(agent): At, Path(name): Path<String>, body: Bytes) -> Answer<Vm> {
    let spec: VmSpec = read(&body)?;
    Ok(Json(agent.put_vm(&name, spec).await?))
}

async fn remove_vm(State(agent): At, Path(name): Path<String>) -> Answer<Value> {
    agent.remove_vm(&name).await?;
    Ok(Json(json!({})))
}

async fn start(State(agent): At, Path(name): Path<String>) -> Answer<Vm> {
    Ok(Json(agent.start_vm(&name).await?))
}

async fn stop(State(agent): At, Path(name): Path<String>, body: Bytes) -> Answer<Vm> {
    let wanted: Stop = read(&body)?;
    Ok(Json(agent.stop_vm(&name, &wanted).await?))
}

async fn migrate(State(agent): At, Path(name): Path<String>, body: Bytes) -> Answer<Operation> {
    let wanted: Migrate = read(&body)?;
    Ok(Json(agent.migrate(&name, &wanted).await?))
}

async fn keep(State(agent): At, Path(name): Path<String>) -> Answer<Vm> {
    Ok(Json(agent.keep_vm(&name).await?))
}

async fn take_snapshot(
    State(agent): At,
    Path(name): Path<String>,
    body: Bytes,
) -> Answer<Snapshot> {
    let wanted: TakeSnapshot = read(&body)?;
    Ok(Json(agent.take_snapshot(&name, &wanted).await?))
}

async fn clone_vm(State(agent): At, Path(name): Path<String>, body: Bytes) -> Answer<Vm> {
    let wanted: CloneVm = read(&body)?;
    Ok(Json(agent.clone_vm(&name, &wanted).await?))
}

async fn snapshots(State(agent): At, Query(of): Query<All>) -> Answer<Vec<Snapshot>> {
    Ok(Json(if of.all {
        agent.all_snapshots().await?
    } else {
        agent.snapshots()?
    }))
}

async fn snapshot(State(agent): At, Path(name): Path<String>) -> Answer<Snapshot> {
    Ok(Json(agent.find_snapshot(&name).await?))
}

async fn remove_snapshot(State(agent): At, Path(name): Path<String>) -> Answer<Value> {
    agent.remove_snapshot(&name)?;
    Ok(Json(json!({})))
}

async fn restore(State(agent): At, Path(name): Path<String>, body: Bytes) -> Answer<Vm> {
    let wanted: Restore = read(&body)?;
    Ok(Json(agent.restore(&name, &wanted).await?))
}

async fn export(State(agent): At, Path(name): Path<String>, body: Bytes) -> Answer<Snapshot> {
    let wanted: ExportTo = read(&body)?;
    Ok(Json(agent.export(&name, &wanted).await?))
}

async fn import(State(agent): At, body: Bytes) -> Answer<Snapshot> {
    let wanted: ImportFrom = read(&body)?;
    Ok(Json(agent.import(&wanted).await?))
}

fn text(kind: &'static str, body: impl Into<Body>) -> Response {
    ([(CONTENT_TYPE, kind)], body.into()).into_response()
}

async fn log(State(agent): At, Path(name): Path<String>) -> Result<Response, Fault> {
    agent.record(&name)?;
    let path = agent.config.vm(&name).join("console.log");
    let last = async {
        let mut file = tokio::fs::File::open(&path).await?;
        let length = file.metadata().await?.len();
        let from = std::io::SeekFrom::Start(length.saturating_sub(LOG));
        tokio::io::AsyncSeekExt::seek(&mut file, from).await?;
        let mut bytes = Vec::new();
        file.take(LOG).read_to_end(&mut bytes).await?;
        Ok(bytes)
    };
    match last.await {
        Ok(bytes) => Ok(text("text/plain; charset=utf-8", bytes)),
        Err::<_, std::io::Error>(error) if error.kind() == std::io::ErrorKind::NotFound => {
            Ok(text("text/plain; charset=utf-8", ""))
        }
        Err(error) => Err(Error::failed(format!("{}: {error}", path.display())).into()),
    }
}

async fn attach(
    State(agent): At,
    Path(name): Path<String>,
    request: Request<Body>,
) -> Result<Response, Fault> {
    Ok(console::attach(&agent, &name, request).await?)
}

async fn operations(State(agent): At) -> Answer<Vec<Operation>> {
    Ok(Json(agent.operations()?))
}

async fn operation(State(agent): At, Path(id): Path<String>) -> Answer<Operation> {
    Ok(Json(agent.operation(&id)?))
}

async fn cancel(State(agent): At, Path(id): Path<String>) -> Answer<Operation> {
    Ok(Json(agent.cancel(&id).await?))
}

async fn images(State(agent): At) -> Answer<Vec<Image>> {
    Ok(Json(agent.store.all(IMAGES)?))
}

async fn add_image(State(agent): At, Path(name): Path<String>, body: Bytes) -> Answer<Image> {
    let wanted: AddImage = read(&body)?;
    let added = agent.add_base(&wanted.path, &name).await?;
    Ok(Json(added))
}

async fn remove_image(State(agent): At, Path(name): Path<String>) -> Answer<Value> {
    agent.remove_image(&name).await?;
    Ok(Json(json!({})))
}

async fn blob(State(agent): At, Path(hash): Path<String>) -> Result<Response, Fault> {
    let image: Option<Image> = agent.store.get(IMAGES, &hash)?;
    let image = image.ok_or_else(|| {
        Error::not_found(
            format!("there is no image {hash} here"),
            "`supercloud image list`",
        )
    })?;
    let path = agent.image_path(&image.hash);
    let file = tokio::fs::File::open(&path).await;
    let file = file.map_err(|error| Error::failed(format!("{}: {error}", path.display())))?;
    let pieces = stream::try_unfold(file, async |mut file| {
        let mut bytes = vec![0; PIECE];
        let read = file.read(&mut bytes).await?;
        bytes.truncate(read);
        Ok::<_, std::io::Error>((read > 0).then(|| (Bytes::from(bytes), file)))
    });
    let mut response = text("application/octet-stream", Body::from_stream(pieces));
    response
        .headers_mut()
        .insert(CONTENT_LENGTH, image.bytes.into());
    Ok(response)
}

async fn events(State(agent): At) -> Sse<impl Stream<Item = Result<sse::Event, Infallible>>> {
    let heard = stream::unfold(agent.events.hear(), async |mut from| {
        let event = match from.recv().await {
            Ok(event) => {
                let line = serde_json::to_string(&event).unwrap_or_default();
                sse::Event::default()
                    .id(event.number.to_string())
                    .event(event.kind)
                    .data(line)
            }
            // Its reader was too slow.
            Err(RecvError::Lagged(missed)) => sse::Event::default()
                .event("missed")
                .data(missed.to_string()),
            Err(RecvError::Closed) => return None,
        };
        Some((Ok(event), from))
    });
    Sse::new(heard).keep_alive(KeepAlive::default())
}

async fn metrics(State(agent): At) -> Result<Response, Fault> {
    let figures = agent.metrics().await?;
    Ok(text("text/plain; version=0.0.4; charset=utf-8", figures))
}

async fn prepare(State(agent): At, Path(operation): Path<String>, body: Bytes) -> Answer<Prepared> {
    let asked: Prepare = read(&body)?;
    Ok(Json(agent.prepare(&operation, &asked).await?))
}

async fn arrival(State(agent): At, Path(operation): Path<String>) -> Answer<Arrival> {
    Ok(Json(agent.arrival(&operation).await?))
}

async fn bereave(State(agent): At, Path(operation): Path<String>) -> Answer<Arrival> {
    Ok(Json(agent.bereave_arrival(&operation).await?))
}

async fn claim(State(agent): At, Path(operation): Path<String>) -> Answer<Arrival> {
    Ok(Json(agent.claim(&operation).await?))
}

async fn clear(State(agent): At, Path(operation): Path<String>) -> Answer<Arrival> {
    Ok(Json(agent.clear_arrival(&operation).await?))
}

#[cfg(test)]
mod tests {
    use supercloud_api::ROUTES;

    use super::*;

    #[test]
    fn the_router_has_what_the_document_lists() {
        let documented: BTreeSet<(Method, &str)> = ROUTES
            .iter()
            .map(|route| (route.method, route.path))
            .collect();
        assert_eq!(listed(), documented);
    }
}
