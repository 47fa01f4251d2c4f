//! `serve`: an HTTP server of one image.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{DefaultBodyLimit, Path, State};
use axum::http::header::{
    ACCEPT_RANGES, CACHE_CONTROL, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, ETAG,
};
use axum::http::{HeaderMap, Method, StatusCode};
use axum::response::{IntoResponse as _, Json, Response};
use axum::routing::get;
use bytes::Bytes;
use futures_util::stream;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use serde::Serialize;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

use crate::args::ServeArgs;
use crate::exit::{Code, Error, show};
use crate::machines::{MOST_BYTES, Machines};
use crate::profile;
use crate::range::{Answer, asked};
use crate::source::Source;

/// Connections at once.
const MOST_CONNECTIONS: usize = 512;
/// How long a connection may be without a request.
const IDLE: Duration = Duration::from_secs(120);
/// Bytes that are read from the image at once.
const PIECE: u64 = 256 << 10;

struct Server {
    source: Source,
    manifest: Bytes,
    manifest_tag: String,
    image_tag: String,
    machines: Machines,
}

#[derive(Serialize)]
struct Serving {
    image: PathBuf,
    bytes: u64,
    id: String,
    url: String,
}

/// Carries out `serve`.
pub async fn command(arguments: ServeArgs, json: bool) -> Result<(), Error> {
    let image = arguments.image;
    let (path, chunk) = (image.clone(), arguments.cut.chunk);
    let source = tokio::task::spawn_blocking(move || Source::open(&path, chunk))
        .await
        .map_err(|error| Error::failed(error.to_string()))??;
    let listener = TcpListener::bind(arguments.listen).await.map_err(|error| {
        let hint = match error.kind() {
            io::ErrorKind::AddrInUse => "another program listens there: --listen ADDRESS:PORT",
            io::ErrorKind::PermissionDenied => "ports below 1024 are root's: --listen ADDRESS:PORT",
            _ => "",
        };
        Error::new(Code::Failed, format!("{}: {error}", arguments.listen), hint)
    })?;
    let address = listener
        .local_addr()
        .map_err(|error| Error::failed(error.to_string()))?;
    let id = source.manifest.id();
    let serving = Serving {
        image,
        bytes: source.manifest.chunks().image_bytes(),
        id: id.to_string(),
        url: format!("http://{address}"),
    };
    show(&serving, json, |serving| {
        let Serving { bytes, id, url, .. } = serving;
        let image = serving.image.display();
        format!("{image}: {bytes} bytes, id {id}, at {url}\n")
    })?;
    let server = Arc::new(Server {
        manifest: Bytes::copy_from_slice(source.manifest.as_bytes()),
        manifest_tag: format!("\"{}\"", bmcast_image::Hash::of(source.manifest.as_bytes())),
        image_tag: format!("\"{id}\""),
        source,
        machines: Machines::default(),
    });
    let ended = async {
        let mut terminate =
            tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
        tokio::select! {
            result = tokio::signal::ctrl_c() => result,
            _ = terminate.recv() => Ok(()),
        }
    };
    tokio::select! {
        () = accept(listener, router(server)) => Ok(()),
        result = ended => result.map_err(|error| Error::failed(format!("signals: {error}"))),
    }
}

fn router(server: Arc<Server>) -> Router {
    Router::new()
        .route("/manifest", get(manifest))
        .route("/image", get(image))
        .route("/machines", get(list))
        .route("/machines/{name}", get(machine).put(put))
        .layer(DefaultBodyLimit::max(MOST_BYTES))
        .route(
            "/machines/{name}/profile",
            get(show_profile)
                .put(put_profile)
                .layer(DefaultBodyLimit::max(profile::MOST)),
        )
        .with_state(server)
}

async fn accept(listener: TcpListener, router: Router) {
    let room = Arc::new(Semaphore::new(MOST_CONNECTIONS));
    loop {
        let Ok(permit) = Arc::clone(&room).acquire_owned().await else {
            return;
        };
        match listener.accept().await {
            Ok((stream, _)) => {
                let router = router.clone();
                tokio::spawn(async move {
                    connection(stream, router).await;
                    drop(permit);
                });
            }
            Err(error) => {
                // Out of descriptors, most likely: others end.
                tracing::warn!("a connection could not be taken: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn connection(stream: TcpStream, router: Router) {
    let _ = stream.set_nodelay(true);
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(IDLE)
        // Not `pipeline_flush`: it keeps all answers in memory while there are requests to be read.
        .max_buf_size(16 << 10)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    if let Err(error) = connection.await {
        tracing::debug!("a connection ended: {error}");
    }
}

async fn manifest(
    State(server): State<Arc<Server>>,
    method: Method,
    headers: HeaderMap,
) -> Response {
    let bytes = server.manifest.clone();
    let size = bytes.len() as u64;
    answer(
        &method,
        &headers,
        &server.manifest_tag,
        size,
        |start, length| {
            let at = |n: u64| usize::try_from(n).unwrap_or(usize::MAX).min(bytes.len());
            Body::from(bytes.slice(at(start)..at(start + length)))
        },
    )
}

async fn image(State(server): State<Arc<Server>>, method: Method, headers: HeaderMap) -> Response {
    let size = server.source.reader.size();
    let tag = server.image_tag.clone();
    answer(&method, &headers, &tag, size, |start, length| {
        Body::from_stream(stream::try_unfold(start, move |at| {
            read(Arc::clone(&server), at, start + length)
        }))
    })
}

/// Reads the next piece of the image.
async fn read(server: Arc<Server>, at: u64, end: u64) -> io::Result<Option<(Bytes, u64)>> {
    if at >= end {
        return Ok(None);
    }
    let next = (at + PIECE).min(end);
    let read = tokio::task::spawn_blocking(move || {
        let mut data = vec![0; usize::try_from(next - at).unwrap_or(0)];
        server.source.reader.read_exact_at(at, &mut data)?;
        Ok(data)
    });
    let data: io::Result<Vec<u8>> = read.await.map_err(io::Error::other)?;
    match data {
        Ok(data) => Ok(Some((data.into(), next))),
        Err(error) => {
            tracing::error!("the image cannot be read at byte {at}: {error}");
            Err(error)
        }
    }
}

/// All or a part of a file, of which `body` makes so many bytes from one on.
fn answer(
    method: &Method,
    headers: &HeaderMap,
    tag: &str,
    size: u64,
    body: impl FnOnce(u64, u64) -> Body,
) -> Response {
    let asked = match *method {
        // Ranges are defined for GET only.
        Method::HEAD => Answer::All,
        _ => asked(headers, tag, size),
    };
    let common = [
        (ETAG, tag.to_owned()),
        (ACCEPT_RANGES, "bytes".to_owned()),
        (CACHE_CONTROL, "no-cache".to_owned()),
    ];
    let of = |start, length| {
        let head = [
            (CONTENT_TYPE, "application/octet-stream".to_owned()),
            (CONTENT_LENGTH, u64::to_string(&length)),
        ];
        (head, body(start, length))
    };
    match asked {
        Answer::All => (common, of(0, size)).into_response(),
        Answer::Part { start, length } => {
            let range = format!("bytes {start}-{}/{size}", start + length - 1);
            let status = StatusCode::PARTIAL_CONTENT;
            (status, common, [(CONTENT_RANGE, range)], of(start, length)).into_response()
        }
        Answer::Beyond => {
            let range = [(CONTENT_RANGE, format!("bytes */{size}"))];
            (StatusCode::RANGE_NOT_SATISFIABLE, common, range).into_response()
        }
        Answer::Same => (StatusCode::NOT_MODIFIED, common).into_response(),
    }
}

async fn list(State(server): State<Arc<Server>>) -> Response {
    Json(server.machines.list()).into_response()
}

async fn machine(State(server): State<Arc<Server>>, Path(name): Path<String>) -> Response {
    match server.machines.get(&name) {
        Some(machine) => Json(machine).into_response(),
        None => (StatusCode::NOT_FOUND, "no such machine\n").into_response(),
    }
}

async fn show_profile(State(server): State<Arc<Server>>, Path(name): Path<String>) -> Response {
    match server.machines.profile(&name) {
        Some(profile) => profile.into_response(),
        None => (StatusCode::NOT_FOUND, "no such profile\n").into_response(),
    }
}

async fn put_profile(
    State(server): State<Arc<Server>>,
    Path(name): Path<String>,
    body: Bytes,
) -> Response {
    done(server.machines.put_profile(&name, body))
}

async fn put(State(server): State<Arc<Server>>, Path(name): Path<String>, body: Bytes) -> Response {
    done(server.machines.put(&name, &body))
}

fn done(result: Result<(), String>) -> Response {
    match result {
        Ok(()) => StatusCode::NO_CONTENT.into_response(),
        Err(error) => (StatusCode::BAD_REQUEST, format!("{error}\n")).into_response(),
    }
}
