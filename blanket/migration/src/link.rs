//! The connection between two hosts: TLS 1.3, whose two ends know each other by a token
//! that is made for one migration.
//!
//! The destination makes a key and a certificate of its own and gives its user a
//! [`Token`]: the certificate's fingerprint and a secret. The source, which was given the
//! token, talks to nobody who has another certificate, and proves by the secret that it
//! was told (`crate::message::Hello`). So neither side needs an authority, and nobody who
//! was not given the token gets a VM in or out.

use std::fmt;
use std::io::{self, BufRead as _, BufReader, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd};
use std::str::FromStr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{
    ClientConfig, ClientConnection, Connection, DigitallySignedStruct, ServerConfig,
    ServerConnection, SignatureScheme,
};
use sha2::{Digest as _, Sha256};

/// How long one side waits for the other: longer than a destination takes to make a VM.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// How long it waits for a piece of the greeting: others may connect, too, and wait.
const GREETING: Duration = Duration::from_secs(10);

/// Bytes that wait to be sent, of a link that is split.
static UNSENT: libc::c_int = 128 << 10;

/// Bytes of TLS that are taken in at once.
const TLS_BUFFER: usize = 64 << 10;

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

/// A connection, both ends of which know who the other one is. What is read is buffered
/// here and nowhere above: words follow a VM on the same connection.
pub struct Link(BufReader<Box<Tls>>);

/// TLS over a socket.
struct Tls {
    connection: Connection,
    socket: TcpStream,
}

impl Tls {
    fn greets(&mut self) -> io::Result<()> {
        while self.connection.is_handshaking() {
            self.connection.complete_io(&mut self.socket)?;
        }
        Ok(())
    }
}

impl Read for Tls {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.connection.reader().read(into) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                done => return done,
            }
            if self.connection.complete_io(&mut self.socket)?.0 == 0 {
                // It hung up without a word: not a whole anything.
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }
}

impl Write for Tls {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        let taken = self.connection.writer().write(from)?;
        self.flush()?;
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        while self.connection.wants_write() {
            self.connection.write_tls(&mut self.socket)?;
        }
        Ok(())
    }
}

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

impl AsFd for Link {
    /// Readable when something has come, or the other end has hung up.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.get_ref().socket.as_fd()
    }
}

fn patient(socket: &TcpStream) -> io::Result<()> {
    socket.set_nodelay(true)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.set_write_timeout(Some(PATIENCE))
}

/// Lets what is not sent yet (`TCP_NOTSENT_LOWAT`, tcp(7)) be little.
fn hurries(socket: &TcpStream) -> io::Result<()> {
    let length = libc::socklen_t::try_from(size_of_val(&UNSENT)).map_err(io::Error::other)?;
    // SAFETY: the option takes a number of this length, which is read from there.
    let set = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_NOTSENT_LOWAT,
            (&raw const UNSENT).cast(),
            length,
        )
    };
    match set {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

impl Link {
    /// The other end has said the secret: it may be as slow as a network is.
    ///
    /// # Errors
    /// The socket's.
    pub fn trusted(&self) -> io::Result<()> {
        self.0.get_ref().socket.set_read_timeout(Some(PATIENCE))
    }

    /// Hangs up, from any thread.
    ///
    /// # Errors
    /// The host has no descriptor left.
    pub fn cutter(&self) -> io::Result<Cutter> {
        Ok(Cutter(self.0.get_ref().socket.try_clone()?))
    }

    fn over(connection: impl Into<Connection>, socket: TcpStream) -> io::Result<Self> {
        let mut tls = Tls {
            connection: connection.into(),
            socket,
        };
        tls.greets()?;
        Ok(Self(BufReader::new(Box::new(tls))))
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
        Ok(Self::over(
            ClientConnection::new(Arc::new(config), name)?,
            socket,
        )?)
    }

    /// The two ways of it, for two threads.
    ///
    /// # Errors
    /// The host has no descriptor left.
    pub fn split(mut self) -> io::Result<(Hears, Says)> {
        let before = self.0.buffer().to_vec();
        self.0.consume(before.len());
        let Tls { connection, socket } = *self.0.into_inner();
        let says = socket.try_clone()?;
        // What is wanted at once is not to wait behind what waits for the network.
        hurries(&socket)?;
        let connection = Arc::new(Mutex::new(connection));
        let hears = Hears {
            before: io::Cursor::new(before),
            connection: Arc::clone(&connection),
            socket,
            tls: vec![0; TLS_BUFFER],
            come: 0..0,
        };
        let says = Says {
            connection,
            socket: says,
        };
        Ok((hears, says))
    }
}

/// What is heard over a link. Neither way waits for the other: the lock of what both need is
/// not held while the network is waited for.
pub struct Hears {
    /// What was heard before there were two ways.
    before: io::Cursor<Vec<u8>>,
    connection: Arc<Mutex<Connection>>,
    socket: TcpStream,
    tls: Vec<u8>,
    /// What of it the connection has not taken yet.
    come: Range<usize>,
}

/// What is said over a link.
pub struct Says {
    connection: Arc<Mutex<Connection>>,
    socket: TcpStream,
}

fn lock(connection: &Mutex<Connection>) -> MutexGuard<'_, Connection> {
    connection.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Hears {
    /// Hangs up, from any thread: whoever hears or says something finds the link lost.
    ///
    /// # Errors
    /// The host has no descriptor left.
    pub fn cutter(&self) -> io::Result<Cutter> {
        Ok(Cutter(self.socket.try_clone()?))
    }
}

impl Read for Hears {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let before = self.before.read(into)?;
        if before > 0 || into.is_empty() {
            return Ok(before);
        }
        loop {
            match lock(&self.connection).reader().read(into) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                done => return done,
            }
            if self.come.is_empty() {
                let count = self.socket.read(&mut self.tls)?;
                if count == 0 {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                self.come = 0..count;
            }
            let mut come = self.tls.get(self.come.clone()).unwrap_or_default();
            let mut connection = lock(&self.connection);
            // No more than it can hold: what it gives is taken first.
            self.come.start += connection.read_tls(&mut come)?;
            let done = connection.process_new_packets();
            done.map_err(io::Error::other)?;
        }
    }
}

impl Write for Says {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        let mut tls = Vec::new();
        let taken = {
            let mut connection = lock(&self.connection);
            let taken = connection.writer().write(from)?;
            while connection.wants_write() {
                connection.write_tls(&mut tls)?;
            }
            taken
        };
        self.socket.write_all(&tls)?;
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl fmt::Debug for Hears {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Hears")
    }
}

impl fmt::Debug for Says {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Says")
    }
}

/// See [`Link::cutter`] and [`Hears::cutter`].
#[derive(Debug)]
pub struct Cutter(TcpStream);

impl Cutter {
    /// Hangs up.
    pub fn cut(&self) {
        // One that is not connected any more needs no cut.
        let _ = self.0.shutdown(Shutdown::Both);
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
        let link = Link::over(connection, socket)?;
        Ok(link)
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
    fn both_ways_at_once() {
        const MUCH: usize = 4 << 20;
        let server = Server::new().expect("made");
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let at = listener.local_addr().expect("an address");
        let talks = |link: Link| {
            let (mut hears, mut says) = link.split().expect("split");
            std::thread::scope(|s| {
                s.spawn(move || says.write_all(&vec![7; MUCH]).expect("said"));
                let mut all = vec![0; MUCH];
                hears.read_exact(&mut all).expect("heard");
                assert!(all.iter().all(|byte| *byte == 7));
            });
            hears
        };
        std::thread::scope(|s| {
            let other = s.spawn(|| {
                let (socket, _) = listener.accept().expect("a connection");
                let mut link = server.answer(socket).expect("TLS");
                // Some of what is said before it is split is heard behind it.
                let mut said = [0; 1];
                link.read_exact(&mut said).expect("heard");
                let (mut hears, says) = link.split().expect("split");
                let mut rest = [0; 4];
                hears.read_exact(&mut rest).expect("heard");
                assert_eq!((said, rest), (*b"h", *b"ello"));
                (hears, says)
            });
            let mut link = Link::to(TcpStream::connect(at).expect("connected"), server.token());
            let one = link.as_mut().expect("the right one");
            one.write_all(b"hello").expect("said");
            let (mut hears, mut says) = other.join().expect("no panic");
            s.spawn(move || {
                let mut all = vec![0; MUCH];
                hears.read_exact(&mut all).expect("heard");
                assert!(hears.read_exact(&mut [0]).is_err(), "it hangs up");
            });
            s.spawn(move || says.write_all(&vec![7; MUCH]).expect("said"));
            talks(link.expect("the right one"))
                .cutter()
                .expect("one")
                .cut();
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
