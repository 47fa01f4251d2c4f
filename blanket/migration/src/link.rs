//! The connection between two hosts: TLS 1.3, whose two ends know each other by a token
//! that is made for one migration.
//!
//! The destination makes a key and a certificate of its own and gives its user a
//! [`Token`]: the certificate's fingerprint and a secret. The source, which was given the
//! token, talks to nobody who has another certificate, and proves by the secret that it
//! was told (`crate::message::Hello`). So neither side needs an authority, and nobody who
//! was not given the token gets a VM in or out.

use std::fmt;
use std::io::{self, BufReader, Read, Write};
use std::net::TcpStream;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{
    ClientConfig, ClientConnection, DigitallySignedStruct, ServerConfig, ServerConnection,
    SignatureScheme, StreamOwned,
};
use sha2::{Digest as _, Sha256};

/// How long one side waits for the other: longer than a destination takes to make a VM.
const PATIENCE: Duration = Duration::from_secs(60);

/// How long it waits for a piece of the greeting: others may connect, too, and wait.
const GREETING: Duration = Duration::from_secs(10);

/// The name that certificates are made for; nobody looks at it.
const NAME: &str = "blanket";

/// What the destination's user gives to the source's.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Token {
    /// SHA-256 of the destination's certificate.
    fingerprint: [u8; 32],
    /// Known to those who have the token.
    secret: [u8; 32],
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Not the secret: what is logged is read by others.
        f.write_str("Token")
    }
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut bytes = self.fingerprint.iter().chain(&self.secret);
        bytes.try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// It is no token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("this is no token: give the 128 digits that the destination has printed")]
pub struct NoToken;

impl FromStr for Token {
    type Err = NoToken;

    fn from_str(text: &str) -> Result<Self, NoToken> {
        let text = text.trim();
        if text.len() != 128 || !text.is_ascii() {
            return Err(NoToken);
        }
        let mut bytes = [0; 64];
        for (byte, at) in bytes.iter_mut().zip((0..).step_by(2)) {
            let digits = text.get(at..at + 2).ok_or(NoToken)?;
            *byte = u8::from_str_radix(digits, 16).map_err(|_| NoToken)?;
        }
        let (fingerprint, secret) = bytes.split_at(32);
        Ok(Self {
            fingerprint: fingerprint.try_into().map_err(|_| NoToken)?,
            secret: secret.try_into().map_err(|_| NoToken)?,
        })
    }
}

impl Token {
    /// What the source proves that it knows.
    #[must_use]
    pub fn secret(&self) -> [u8; 32] {
        self.secret
    }

    /// Whether somebody else's secret is this one, in the same time for any other.
    #[must_use]
    pub fn is_secret(&self, other: &[u8; 32]) -> bool {
        let pairs = self.secret.iter().zip(other);
        pairs.fold(0, |all, (a, b)| all | (a ^ b)) == 0
    }
}

/// Why there is no link.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The key or the certificate.
    #[error("cannot make a certificate: {0}")]
    Certificate(#[from] rcgen::Error),
    /// The host.
    #[error("the host gave no random bytes")]
    Random,
    /// The two sides do not understand each other.
    #[error("TLS: {0}")]
    Tls(#[from] rustls::Error),
    /// The network.
    #[error("the link broke: {0}")]
    Io(#[from] io::Error),
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

trait Stream: Read + Write + Send {}
impl<T: Read + Write + Send> Stream for T {}

/// A connection, both ends of which know who the other one is. What is read is buffered
/// here and nowhere above: words follow a VM on the same connection.
pub struct Link(BufReader<Box<dyn Stream>>);

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Link")
    }
}

impl Read for Link {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.0.read(into)
    }
}

impl Write for Link {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        self.0.get_mut().write(from)
    }
    fn flush(&mut self) -> io::Result<()> {
        self.0.get_mut().flush()
    }
}

fn patient(socket: &TcpStream) -> io::Result<()> {
    socket.set_nodelay(true)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.set_write_timeout(Some(PATIENCE))
}

impl Link {
    fn over(stream: impl Stream + 'static) -> Self {
        Self(BufReader::new(Box::new(stream)))
    }

    /// The source's end, over a connected socket.
    ///
    /// # Errors
    /// The other end is not the one that the token is of.
    pub fn to(socket: TcpStream, token: &Token) -> Result<Self, Error> {
        patient(&socket)?;
        let provider = provider();
        let pinned = Pinned {
            fingerprint: token.fingerprint,
            provider: Arc::clone(&provider),
        };
        let config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(pinned))
            .with_no_client_auth();
        let name = ServerName::try_from(NAME).map_err(|_| rustls::Error::General(NAME.into()))?;
        let mut stream = StreamOwned::new(ClientConnection::new(Arc::new(config), name)?, socket);
        while stream.conn.is_handshaking() {
            stream.conn.complete_io(&mut stream.sock)?;
        }
        Ok(Self::over(stream))
    }
}

/// What the destination answers connections with.
#[derive(Debug)]
pub struct Server {
    config: Arc<ServerConfig>,
    token: Token,
}

impl Server {
    /// Makes a key and a token.
    ///
    /// # Errors
    /// The host has no random bytes.
    pub fn new() -> Result<Self, Error> {
        let made = rcgen::generate_simple_self_signed([NAME.to_owned()])?;
        let certificate = made.cert.der().clone();
        let mut secret = [0; 32];
        let filled = provider().secure_random.fill(&mut secret);
        filled.map_err(|_| Error::Random)?;
        let token = Token {
            fingerprint: Sha256::digest(&certificate).into(),
            secret,
        };
        let key = PrivateKeyDer::Pkcs8(made.signing_key.serialize_der().into());
        let config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_no_client_auth()
            .with_single_cert(vec![certificate], key)?;
        Ok(Self {
            config: Arc::new(config),
            token,
        })
    }

    /// What the source needs.
    #[must_use]
    pub fn token(&self) -> &Token {
        &self.token
    }

    /// The destination's end. Who is at the other one is not known before its `Hello`.
    ///
    /// # Errors
    /// What connects speaks something else.
    pub fn answer(&self, socket: TcpStream) -> Result<Link, Error> {
        patient(&socket)?;
        socket.set_read_timeout(Some(GREETING))?;
        let connection = ServerConnection::new(Arc::clone(&self.config))?;
        let mut stream = StreamOwned::new(connection, socket);
        while stream.conn.is_handshaking() {
            stream.conn.complete_io(&mut stream.sock)?;
        }
        stream.sock.set_read_timeout(Some(PATIENCE))?;
        Ok(Link::over(stream))
    }
}

/// Accepts one certificate.
#[derive(Debug)]
struct Pinned {
    fingerprint: [u8; 32],
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let found: [u8; 32] = Sha256::digest(end_entity).into();
        if found == self.fingerprint {
            Ok(ServerCertVerified::assertion())
        } else {
            Err(rustls::Error::General(
                "the destination is not the one that the token is of".into(),
            ))
        }
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("only TLS 1.3 is spoken here".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let known = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signature, known)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    fn connect(server: &Server, token: &Token, with: impl FnOnce(Result<Link, Error>)) {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let at = listener.local_addr().expect("an address");
        std::thread::scope(|s| {
            s.spawn(|| {
                let (socket, _) = listener.accept().expect("a connection");
                // It fails where the source hangs up.
                if let Ok(mut link) = server.answer(socket) {
                    let mut said = [0; 5];
                    let heard = link.read_exact(&mut said);
                    if heard.is_ok() {
                        link.write_all(&said).expect("answered");
                        link.flush().expect("answered");
                    }
                }
            });
            with(Link::to(TcpStream::connect(at).expect("connected"), token));
        });
    }

    #[test]
    fn both_ends_talk() {
        let server = Server::new().expect("made");
        let token: Token = server.token().to_string().parse().expect("a token");
        connect(&server, &token, |link| {
            let mut link = link.expect("the right one");
            link.write_all(b"hello").expect("said");
            link.flush().expect("said");
            let mut answer = [0; 5];
            link.read_exact(&mut answer).expect("heard");
            assert_eq!(&answer, b"hello");
        });
    }

    #[test]
    fn another_destination_is_refused() {
        let (server, other) = (Server::new().expect("made"), Server::new().expect("made"));
        connect(&server, other.token(), |link| {
            let error = link.expect_err("another one").to_string();
            assert!(
                error.contains("is not the one that the token is of"),
                "{error}"
            );
        });
    }

    #[test]
    fn tokens_are_read_as_they_are_written() {
        let server = Server::new().expect("made");
        let token = *server.token();
        assert_eq!(format!("{token}\n").parse(), Ok(token));
        assert!(token.is_secret(&token.secret()));
        let mut other = token.secret();
        other[31] ^= 1;
        assert!(!token.is_secret(&other));
        for bad in [
            "",
            "00",
            &"0g".repeat(64),
            &"é".repeat(64),
            &"0".repeat(127),
        ] {
            assert_eq!(bad.parse::<Token>(), Err(NoToken), "{bad}");
        }
        assert!(!format!("{token:?}").contains(&token.to_string()[64..]));
    }
}
