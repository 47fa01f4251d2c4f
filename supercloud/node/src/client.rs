//! Asks agents: this node's at its socket, others over TLS.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1::{self, SendRequest};
use hyper::header::{CONTENT_TYPE, HOST, HeaderName};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use serde::Serialize;
use serde::de::DeserializeOwned;
use supercloud_api::{Code, Error, NODE_HEADER};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use crate::pki;

/// How long a connection may take.
const CONNECT: Duration = Duration::from_secs(5);
/// How long an answer may take, of whom nothing is said.
pub const ANSWER: Duration = Duration::from_secs(30);
/// How long one may take that starts or stops a VM.
pub const LONG: Duration = Duration::from_secs(900);
/// Longest answer that is read as a whole.
const MOST: usize = 16 << 20;

/// A connection to an agent.
pub struct Agent {
    sender: SendRequest<Full<Bytes>>,
    who: String,
    node: Option<String>,
}

/// What an agent is asked.
pub type Asked = Request<Full<Bytes>>;

fn unreachable(who: &str, error: impl std::fmt::Display, hint: &str) -> Error {
    Error::new(Code::Unreachable, format!("{who}: {error}"), hint)
}

impl Agent {
    /// This node's agent.
    ///
    /// # Errors
    /// It does not run, or is another user's.
    pub async fn here(socket: &Path, node: Option<String>) -> Result<Self, Error> {
        let stream = UnixStream::connect(socket).await.map_err(|error| {
            let (what, hint) = match error.kind() {
                std::io::ErrorKind::NotFound | std::io::ErrorKind::ConnectionRefused => (
                    "the agent of this node does not run".to_owned(),
                    "start it: supercloud node start (or: systemctl start supercloud)",
                ),
                std::io::ErrorKind::PermissionDenied => (
                    format!("no permission for {}", socket.display()),
                    "run this as the user who runs the agent, such as root",
                ),
                _ => (format!("{}: {error}", socket.display()), ""),
            };
            Error::new(Code::Unreachable, what, hint)
        })?;
        let mut agent = Self::over(stream, "this node's agent").await?;
        agent.node = node;
        Ok(agent)
    }

    /// Another node's agent.
    ///
    /// # Errors
    /// It cannot be reached, or is another one.
    pub async fn there(
        name: &str,
        address: &str,
        config: Arc<ClientConfig>,
    ) -> Result<Self, Error> {
        Self::tls(name, &pki::server_name(name), address, config).await
    }

    /// The agent at an address that lets nodes in.
    ///
    /// # Errors
    /// It cannot be reached, or is another one.
    pub async fn of_ca(address: &str, config: Arc<ClientConfig>) -> Result<Self, Error> {
        Self::tls(address, pki::CA_NAME, address, config).await
    }

    async fn tls(
        who: &str,
        name: &str,
        address: &str,
        config: Arc<ClientConfig>,
    ) -> Result<Self, Error> {
        let hint =
            "is its agent running, and its port open to this node? `supercloud node doctor` looks";
        let connecting = timeout(CONNECT, TcpStream::connect(address));
        let stream = match connecting.await {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => return Err(unreachable(who, format!("{address}: {error}"), hint)),
            Err(_) => return Err(unreachable(who, format!("{address} does not answer"), hint)),
        };
        let _ = stream.set_nodelay(true);
        let name = ServerName::try_from(name.to_owned())
            .map_err(|error| Error::failed(error.to_string()))?;
        let greeting = timeout(CONNECT, TlsConnector::from(config).connect(name, stream));
        match greeting.await {
            Ok(Ok(stream)) => Self::over(stream, who).await,
            Ok(Err(error)) => Err(Error::new(
                Code::Unreachable,
                format!("{who}: {address} is not who it should be: {error}"),
                "it belongs to another cluster, was removed, or its clock is wrong by days",
            )),
            Err(_) => Err(unreachable(who, format!("{address} does not answer"), hint)),
        }
    }

    async fn over<S>(stream: S, who: &str) -> Result<Self, Error>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let shaken = http1::handshake(TokioIo::new(stream)).await;
        let (sender, connection) = shaken.map_err(|error| unreachable(who, error, ""))?;
        let name = who.to_owned();
        tokio::spawn(async move {
            if let Err(error) = connection.with_upgrades().await {
                tracing::debug!("the connection to {name}: {error}");
            }
        });
        Ok(Self {
            sender,
            who: who.into(),
            node: None,
        })
    }

    /// Sends a request and gives the beginning of the answer.
    ///
    /// # Errors
    /// The connection, or it takes too long.
    pub async fn send(
        &mut self,
        mut request: Asked,
        patience: Duration,
    ) -> Result<Response<Incoming>, Error> {
        let headers = request.headers_mut();
        headers.insert(HOST, hyper::header::HeaderValue::from_static("node"));
        if let Some(node) = &self.node {
            let value = node.parse().map_err(|_| {
                Error::new(
                    Code::BadRequest,
                    format!("{node:?} is no name of a node"),
                    "",
                )
            })?;
            headers.insert(HeaderName::from_static(NODE_HEADER), value);
        }
        let sent = timeout(patience, self.sender.send_request(request));
        match sent.await {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(error)) => Err(unreachable(
                &self.who,
                error,
                "its agent has ended meanwhile; ask again",
            )),
            Err(_) => Err(unreachable(&self.who, "no answer in time", "")),
        }
    }

    /// Asks for something that is JSON.
    ///
    /// # Errors
    /// The agent's own error, or the connection.
    pub async fn ask<T: DeserializeOwned>(
        &mut self,
        method: Method,
        path: &str,
        body: Option<&(impl Serialize + Sync)>,
        patience: Duration,
    ) -> Result<T, Error> {
        let response = self.send(request(method, path, body)?, patience).await?;
        let status = response.status();
        let bytes = timeout(patience, read(response)).await;
        let bytes = bytes
            .map_err(|_| unreachable(&self.who, "no answer in time", ""))?
            .map_err(|error| unreachable(&self.who, error, ""))?;
        understood(&self.who, status, &bytes)
    }
}

/// What is sent.
///
/// # Errors
/// The path is none.
pub fn request(
    method: Method,
    path: &str,
    body: Option<&(impl Serialize + Sync)>,
) -> Result<Asked, Error> {
    let wrong = |error: &dyn std::fmt::Display| Error::failed(format!("a request: {error}"));
    let bytes = match body {
        None => Bytes::new(),
        Some(body) => serde_json::to_vec(body)
            .map_err(|error| wrong(&error))?
            .into(),
    };
    Request::builder()
        .method(method)
        .uri(path)
        .header(CONTENT_TYPE, "application/json")
        .body(Full::new(bytes))
        .map_err(|error| wrong(&error))
}

/// All of an answer that is not too long.
///
/// # Errors
/// The connection, or its length.
pub async fn read(response: Response<Incoming>) -> Result<Bytes, String> {
    let body = Limited::new(response.into_body(), MOST).collect().await;
    body.map(http_body_util::Collected::to_bytes)
        .map_err(|error| error.to_string())
}

/// The answer or the error that an agent gave.
///
/// # Errors
/// That error.
pub fn understood<T: DeserializeOwned>(
    who: &str,
    status: StatusCode,
    bytes: &[u8],
) -> Result<T, Error> {
    if status.is_success() {
        return serde_json::from_slice(bytes).map_err(|error| {
            Error::new(
                Code::Failed,
                format!("{who} gives an answer that is not understood: {error}"),
                "nodes of one cluster run one version of supercloud",
            )
        });
    }
    Err(serde_json::from_slice(bytes)
        .unwrap_or_else(|_| Error::failed(format!("{who} answers {status}"))))
}
