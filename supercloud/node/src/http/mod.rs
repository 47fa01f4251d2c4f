//! The two doors: a socket for the node's own user, and a port for other nodes. Behind both
//! is the same API; who has no certificate of the cluster may only ask to join it.

mod console;
mod forward;
mod routes;

use std::fs::DirBuilder;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::response::{IntoResponse, Response};
use hyper::{Request, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use supercloud_api::{Code, Error};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio_rustls::TlsAcceptor;

use crate::agent::Agent;
use crate::config::Config;
use crate::nets::Virtual;
use crate::pki::sum;

pub use console::PROTOCOL;
pub use routes::{listed, router};

/// How long somebody may take to say who he is.
const GREETING: Duration = Duration::from_secs(10);

/// Who asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Peer {
    /// The node's own user.
    Local,
    /// A node with a certificate of the cluster, which has this SHA-256.
    Member(String),
    /// Somebody without one.
    Stranger,
}

/// An error on its way out.
#[derive(Debug)]
pub struct Fault(pub Error);

impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        Self(error)
    }
}

impl IntoResponse for Fault {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.0.code.status());
        let status = status.unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        (status, axum::Json(self.0)).into_response()
    }
}

/// An agent that runs.
pub struct Running {
    /// It.
    pub agent: Arc<Agent>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

impl Drop for Running {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

impl Running {
    /// Starts an agent.
    ///
    /// # Errors
    /// Its store, its port, its socket.
    pub async fn start(mut config: Config) -> Result<Self, Error> {
        let listener = TcpListener::bind(config.listen).await.map_err(|error| {
            Error::new(
                Code::Conflict,
                format!("{}: {error}", config.listen),
                "is another agent running? Choose another port with --listen",
            )
        })?;
        let at = listener.local_addr();
        config.listen = at.map_err(|error| Error::failed(error.to_string()))?;
        let networks = Arc::new(Virtual::default());
        let agent = Agent::open(config.clone(), networks.clone()).await?;
        networks.of(&agent);
        agent.clear_copying()?;
        agent.clear_strays()?;
        let moves = config.data.join("moves");
        std::fs::create_dir_all(&moves)
            .map_err(|error| Error::failed(format!("{}: {error}", moves.display())))?;
        agent.renew_address()?;
        let local = local(&config).await?;
        agent.go_on()?;
        let router = router(&agent);
        let tasks = vec![
            tokio::spawn(Arc::clone(&agent).watch()),
            tokio::spawn(Arc::clone(&agent).beat()),
            tokio::spawn(Arc::clone(&agent).watch_nets()),
            tokio::spawn(serve_local(local, router.clone())),
            tokio::spawn(serve_nodes(listener, Arc::clone(&agent), router)),
        ];
        Ok(Self { agent, tasks })
    }
}

/// The socket of the node's own user.
async fn local(config: &Config) -> Result<UnixListener, Error> {
    let failed =
        |error: std::io::Error| Error::failed(format!("{}: {error}", config.socket().display()));
    match DirBuilder::new().mode(0o700).create(&config.run) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
            return Err(failed(error));
        }
        _ => {}
    }
    let found = std::fs::symlink_metadata(&config.run).map_err(failed)?;
    let own = found.is_dir() && found.uid() == rustix::process::geteuid().as_raw();
    if !own || found.mode() & 0o077 != 0 {
        return Err(Error::new(
            Code::NotAllowed,
            format!(
                "{} is not a directory of this user alone",
                config.run.display()
            ),
            format!("chmod 700 {}, or choose another one", config.run.display()),
        ));
    }
    let socket = config.socket();
    if tokio::net::UnixStream::connect(&socket).await.is_ok() {
        return Err(Error::new(
            Code::Conflict,
            "an agent is running already",
            "`supercloud node list` asks it",
        ));
    }
    // Nobody listens there: it is of an agent that was killed.
    let _ = std::fs::remove_file(&socket);
    let listener = UnixListener::bind(&socket).map_err(failed)?;
    std::fs::set_permissions(&socket, std::fs::Permissions::from_mode(0o600)).map_err(failed)?;
    Ok(listener)
}

async fn serve_local(listener: UnixListener, router: Router) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                tokio::spawn(serve(stream, router.clone(), Peer::Local));
            }
            Err(error) => pause(&error).await,
        }
    }
}

async fn serve_nodes(listener: TcpListener, agent: Arc<Agent>, router: Router) {
    loop {
        match listener.accept().await {
            Ok((stream, from)) => {
                let _ = stream.set_nodelay(true);
                let acceptor = TlsAcceptor::from(Arc::clone(&agent.own().server));
                let router = router.clone();
                tokio::spawn(async move {
                    let greeting = tokio::time::timeout(GREETING, acceptor.accept(stream)).await;
                    match greeting {
                        Ok(Ok(stream)) => {
                            let known = stream.get_ref().1.peer_certificates();
                            let known = known.and_then(<[_]>::first);
                            let peer = known.map_or(Peer::Stranger, |it| Peer::Member(sum(it)));
                            serve(stream, router, peer).await;
                        }
                        Ok(Err(error)) => tracing::info!(%from, "a connection is refused: {error}"),
                        Err(_) => tracing::info!(%from, "a connection says nothing"),
                    }
                });
            }
            Err(error) => pause(&error).await,
        }
    }
}

/// Too many open files, and the like: it passes.
async fn pause(error: &std::io::Error) {
    tracing::warn!("cannot accept a connection: {error}");
    tokio::time::sleep(Duration::from_millis(100)).await;
}

async fn serve<S>(stream: S, router: Router, peer: Peer)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let service = tower_service_of(router, peer);
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(GREETING)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(service))
        .with_upgrades();
    if let Err(error) = connection.await {
        tracing::debug!("a connection: {error}");
    }
}

/// The router, which is told who asks.
fn tower_service_of(
    router: Router,
    peer: Peer,
) -> impl tower_service::Service<
    Request<hyper::body::Incoming>,
    Response = Response,
    Error = std::convert::Infallible,
    Future: Send,
> + Clone
+ Send {
    Told { router, peer }
}

#[derive(Clone)]
struct Told {
    router: Router,
    peer: Peer,
}

impl tower_service::Service<Request<hyper::body::Incoming>> for Told {
    type Response = Response;
    type Error = std::convert::Infallible;
    type Future = <Router as tower_service::Service<Request<Body>>>::Future;

    fn poll_ready(
        &mut self,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Result<(), Self::Error>> {
        tower_service::Service::<Request<Body>>::poll_ready(&mut self.router, context)
    }

    fn call(&mut self, request: Request<hyper::body::Incoming>) -> Self::Future {
        let mut request = request.map(Body::new);
        request.extensions_mut().insert(self.peer.clone());
        tower_service::Service::call(&mut self.router, request)
    }
}
