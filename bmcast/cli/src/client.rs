//! Asks a server.

use std::time::Duration;

use bmcast_image::Server;
use bytes::Bytes;
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::header::HOST;
use hyper::{Request, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::exit::{Code, Error};

/// How long a connection may take.
const CONNECT: Duration = Duration::from_secs(5);
/// How long an answer may take.
const ANSWER: Duration = Duration::from_secs(60);

/// Gets what is at a path below the server's own, at most `most` bytes; none if there is nothing.
pub async fn get(server: &Server, path: &str, most: usize) -> Result<Option<Bytes>, Error> {
    let url = format!("{server}{path}");
    let failed = |error: &dyn std::fmt::Display, hint: &str| {
        Error::new(Code::Unreachable, format!("{url}: {error}"), hint)
    };
    let no_answer = "is `bmcast serve` running there?";
    let connect = TcpStream::connect((&*server.host, server.port));
    let stream = timeout(CONNECT, connect)
        .await
        .map_err(|_| failed(&"no connection within 5 seconds", no_answer))?
        .map_err(|error| failed(&error, no_answer))?;
    let ask = async {
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        let request = Request::get(format!("{}{path}", server.path))
            .header(HOST, format!("{}:{}", server.host, server.port))
            .body(Empty::<Bytes>::new())
            .map_err(|error| failed(&error, ""));
        let answer = match request {
            Ok(request) => sender.send_request(request).await?,
            Err(error) => return Ok(Err(error)),
        };
        let status = answer.status();
        let body = Limited::new(answer.into_body(), most).collect().await;
        Ok::<_, hyper::Error>(match (status, body) {
            (StatusCode::NOT_FOUND, _) => Ok(None),
            (StatusCode::OK, Ok(body)) => Ok(Some(body.to_bytes())),
            (StatusCode::OK, Err(error)) => Err(failed(&error, "")),
            (status, _) => Err(failed(&status, "is it the address of a `bmcast serve`?")),
        })
    };
    timeout(ANSWER, ask)
        .await
        .map_err(|_| failed(&"no answer within a minute", ""))?
        .map_err(|error| failed(&error, "is it an HTTP server?"))?
}
