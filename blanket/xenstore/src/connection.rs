//! The protocol's state machine for one client: bytes in, bytes out, no I/O.

use std::collections::VecDeque;

use crate::node::Perm;
use crate::path::Path;
use crate::wire::{FEATURES, HEADER, Header, Kind, PAYLOAD_MAX};
use crate::{ConnId, DomId, Errno, Store, TxId};

/// Unread output at which no further request is taken in: the client must read
/// its replies first.
pub(crate) const OUTPUT_LIMIT: usize = 32 << 10;

/// "Myself", as a domain may call itself (`public/xen.h`).
const DOMID_SELF: DomId = 0x7ff0;

/// A message that cannot be followed by another one: the stream is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the client announced a payload of {0} bytes, at most {PAYLOAD_MAX} are allowed")]
pub struct ProtocolError(pub u32);

/// One client's stream.
///
/// Bytes may arrive in pieces of any size; each is taken in at once (Linux sends a
/// header and does not signal again for the payload).
#[derive(Debug)]
pub struct Connection {
    pub(crate) conn: ConnId,
    /// A message of which more is to come.
    pub(crate) input: Vec<u8>,
    pub(crate) output: VecDeque<u8>,
}

impl Connection {
    /// Connects a domain to the store.
    #[must_use]
    pub fn new(store: &mut Store, domain: DomId) -> Self {
        Self {
            conn: store.connect(domain),
            input: Vec::new(),
            output: VecDeque::new(),
        }
    }

    /// The client's identity in the store.
    #[must_use]
    pub fn id(&self) -> ConnId {
        self.conn
    }

    /// Whether input is taken. If not, the client must read output first.
    #[must_use]
    pub fn ready(&self) -> bool {
        self.output.len() < OUTPUT_LIMIT
    }

    /// Takes in bytes and carries out the requests that they complete. Returns how
    /// many bytes were taken: all, unless the client has too much output to read.
    ///
    /// # Errors
    /// A payload that is too long; nothing further can be understood.
    pub fn receive(&mut self, store: &mut Store, bytes: &[u8]) -> Result<usize, ProtocolError> {
        let mut taken = 0;
        while taken < bytes.len() && self.ready() {
            let wanted = self.missing()?;
            let piece = wanted.min(bytes.len() - taken);
            self.input.extend_from_slice(&bytes[taken..taken + piece]);
            taken += piece;
            if self.missing()? == 0 {
                self.carry_out(store);
            }
        }
        self.collect_events(store);
        Ok(taken)
    }

    /// Moves the store's events for this client to its output, as space allows.
    pub fn collect_events(&mut self, store: &mut Store) {
        while self.ready()
            && let Some(event) = store.next_event(self.conn)
        {
            let mut payload = event.path.into_bytes();
            payload.push(0);
            payload.extend_from_slice(&event.token);
            payload.push(0);
            self.emit(Kind::WatchEvent as u32, 0, 0, &payload);
        }
    }

    /// The first part of the bytes that wait for the client; empty if there are none.
    #[must_use]
    pub fn output(&self) -> &[u8] {
        self.output.as_slices().0
    }

    /// Says that the client got the first `count` bytes of the output.
    pub fn sent(&mut self, count: usize) {
        self.output.drain(..count.min(self.output.len()));
    }

    /// Bytes until the message is complete. Never 0 for an unfinished header.
    fn missing(&self) -> Result<usize, ProtocolError> {
        let Some(header) = self.header() else {
            return Ok(HEADER - self.input.len());
        };
        match usize::try_from(header.length) {
            Ok(length) if length <= PAYLOAD_MAX => Ok(HEADER + length - self.input.len()),
            _ => Err(ProtocolError(header.length)),
        }
    }

    fn header(&self) -> Option<Header> {
        self.input
            .first_chunk::<HEADER>()
            .map(|bytes| Header::decode(*bytes))
    }

    fn carry_out(&mut self, store: &mut Store) {
        let Some(header) = self.header() else { return };
        let message = std::mem::take(&mut self.input);
        let reply = answer(store, self.conn, header, &message[HEADER..]);
        let (kind, payload) = match reply {
            Ok(payload) if payload.len() <= PAYLOAD_MAX => (header.kind, payload),
            Ok(_) => (Kind::Error as u32, nul(Errno::TooBig.name())),
            Err(errno) => (Kind::Error as u32, nul(errno.name())),
        };
        self.emit(kind, header.request, header.transaction, &payload);
    }

    fn emit(&mut self, kind: u32, request: u32, transaction: u32, payload: &[u8]) {
        // At most PAYLOAD_MAX: longer replies became E2BIG, and longer events are
        // not made.
        let length = u32::try_from(payload.len()).unwrap_or(u32::MAX);
        self.output.extend(
            Header {
                kind,
                request,
                transaction,
                length,
            }
            .encode(),
        );
        self.output.extend(payload);
    }
}

fn nul(text: &str) -> Vec<u8> {
    let mut bytes = text.as_bytes().to_vec();
    bytes.push(0);
    bytes
}

fn ok() -> Vec<u8> {
    nul("OK")
}

/// Splits a payload into its NUL-terminated strings.
fn strings(payload: &[u8]) -> Result<Vec<&[u8]>, Errno> {
    let body = payload.strip_suffix(b"\0").ok_or(Errno::Inval)?;
    Ok(body.split(|&byte| byte == 0).collect())
}

fn text(bytes: &[u8]) -> Result<&str, Errno> {
    std::str::from_utf8(bytes).map_err(|_| Errno::Inval)
}

/// Carries out a request.
fn answer(
    store: &mut Store,
    conn: ConnId,
    header: Header,
    payload: &[u8],
) -> Result<Vec<u8>, Errno> {
    let domain = store.domain(conn).ok_or(Errno::Io)?;
    let kind = Kind::from_number(header.kind).ok_or(Errno::NoSys)?;
    if domain != 0 && is_privileged(kind) {
        return Err(Errno::Acces);
    }
    // Watches are not part of transactions, and the number is ignored.
    let outside = matches!(kind, Kind::Watch | Kind::Unwatch | Kind::Control);
    let tx = (header.transaction != 0 && !outside).then_some(TxId(header.transaction));
    if tx.is_some_and(|tx| !store.has_transaction(conn, tx)) {
        return Err(Errno::NoEnt);
    }
    let one_path = || -> Result<Path, Errno> {
        match strings(payload)?[..] {
            [path] => Path::parse(text(path)?, domain),
            _ => Err(Errno::Inval),
        }
    };
    match kind {
        Kind::Read => store.read(conn, tx, &one_path()?),
        Kind::Directory => {
            let (names, _) = store.directory(conn, tx, &one_path()?)?;
            Ok(names.iter().flat_map(|name| nul(name)).collect())
        }
        Kind::DirectoryPart => directory_part(store, conn, tx, domain, payload),
        Kind::GetPerms => {
            let perms = store.get_perms(conn, tx, &one_path()?)?;
            Ok(perms.iter().flat_map(|perm| nul(&perm.text())).collect())
        }
        Kind::SetPerms => {
            let parts = strings(payload)?;
            let (path, entries) = parts.split_first().ok_or(Errno::Inval)?;
            let path = Path::parse(text(path)?, domain)?;
            let perms: Vec<Perm> = entries
                .iter()
                .map(|entry| Perm::parse(text(entry)?))
                .collect::<Result<_, Errno>>()?;
            store.set_perms(conn, tx, &path, &perms).map(|()| ok())
        }
        Kind::Write => {
            // The value is the rest as it is: no NUL, any bytes.
            let end = payload
                .iter()
                .position(|&byte| byte == 0)
                .ok_or(Errno::Inval)?;
            let path = Path::parse(text(&payload[..end])?, domain)?;
            store
                .write(conn, tx, &path, &payload[end + 1..])
                .map(|()| ok())
        }
        Kind::Mkdir => store.mkdir(conn, tx, &one_path()?).map(|()| ok()),
        Kind::Rm => store.remove(conn, tx, &one_path()?).map(|()| ok()),
        Kind::Watch | Kind::Unwatch => {
            let parts = strings(payload)?;
            let (path, token, depth) = match (kind, &parts[..]) {
                (_, &[path, token]) => (path, token, None),
                (Kind::Watch, &[path, token, depth]) => (path, token, depth_of(depth)?),
                // A reserved word, which clients send empty if they send it.
                (Kind::Unwatch, &[path, token, b""]) => (path, token, None),
                _ => return Err(Errno::Inval),
            };
            let path = text(path)?;
            if kind == Kind::Watch {
                store.watch_levels(conn, path, token, depth).map(|()| ok())
            } else {
                store.unwatch(conn, path, token).map(|()| ok())
            }
        }
        Kind::ResetWatches => store.reset_watches(conn).map(|()| ok()),
        Kind::TransactionStart => {
            if tx.is_some() {
                return Err(Errno::Busy);
            }
            Ok(nul(&store.begin(conn)?.0.to_string()))
        }
        Kind::TransactionEnd => {
            let commit = match payload {
                b"T\0" => true,
                b"F\0" => false,
                _ => return Err(Errno::Inval),
            };
            store
                .end(conn, tx.ok_or(Errno::NoEnt)?, commit)
                .map(|()| ok())
        }
        Kind::GetDomainPath => match strings(payload)?[..] {
            [id] => Ok(nul(Path::home(number(id)?).as_str())),
            _ => Err(Errno::Inval),
        },
        Kind::IsDomainIntroduced => match strings(payload)?[..] {
            [id] => {
                let id = number(id)?;
                let known = id == DOMID_SELF || store.is_introduced(id);
                Ok(nul(if known { "T" } else { "F" }))
            }
            _ => Err(Errno::Inval),
        },
        Kind::GetFeature => get_feature(store, domain, payload),
        // The VMM does all this by calls, not by messages.
        Kind::Introduce
        | Kind::Release
        | Kind::Resume
        | Kind::SetTarget
        | Kind::Control
        | Kind::SetFeature
        | Kind::GetQuota
        | Kind::SetQuota
        // These only a store sends.
        | Kind::WatchEvent
        | Kind::Error => Err(Errno::NoSys),
    }
}

/// Requests that Xen takes from its tool stack only.
const fn is_privileged(kind: Kind) -> bool {
    matches!(
        kind,
        Kind::Introduce
            | Kind::Release
            | Kind::Resume
            | Kind::SetTarget
            | Kind::Control
            | Kind::SetFeature
            | Kind::GetQuota
            | Kind::SetQuota
    )
}

/// GET_FEATURE: a guest may ask for its own, domain 0 for those of any domain. All
/// have the same.
fn get_feature(store: &Store, domain: DomId, payload: &[u8]) -> Result<Vec<u8>, Errno> {
    // No word at all, or an empty one: the asking domain's own.
    if !payload.is_empty() && payload != b"\0" {
        if domain != 0 {
            return Err(Errno::Acces);
        }
        let [id] = strings(payload)?[..] else {
            return Err(Errno::Inval);
        };
        if !store.is_introduced(number(id)?) {
            return Err(Errno::NoEnt);
        }
    }
    Ok(nul(&FEATURES.to_string()))
}

/// The third word of WATCH: a depth, or nothing as of old.
fn depth_of(word: &[u8]) -> Result<Option<u32>, Errno> {
    if word.is_empty() {
        return Ok(None);
    }
    digits(word)?.parse().map(Some).map_err(|_| Errno::Inval)
}

fn number(bytes: &[u8]) -> Result<DomId, Errno> {
    digits(bytes)?.parse().map_err(|_| Errno::Inval)
}

/// A word of decimal digits; `parse` alone would also take a sign.
fn digits(bytes: &[u8]) -> Result<&str, Errno> {
    if bytes.iter().all(u8::is_ascii_digit) {
        text(bytes)
    } else {
        Err(Errno::Inval)
    }
}

/// DIRECTORY_PART: the listing from a byte offset on, headed by the directory's
/// generation so that the client sees when it changed between two parts.
fn directory_part(
    store: &mut Store,
    conn: ConnId,
    tx: Option<TxId>,
    domain: DomId,
    payload: &[u8],
) -> Result<Vec<u8>, Errno> {
    let parts = strings(payload)?;
    let [path, offset] = parts[..] else {
        return Err(Errno::Inval);
    };
    let path = Path::parse(text(path)?, domain)?;
    let offset: usize = digits(offset)?.parse().map_err(|_| Errno::Inval)?;
    let (names, generation) = store.directory(conn, tx, &path)?;
    let mut reply = nul(&generation.to_string());
    let mut at = 0;
    let mut complete = true;
    for name in &names {
        let size = name.len() + 1;
        if at >= offset {
            // One byte is kept for the empty name that ends the listing.
            if reply.len() + size + 1 > PAYLOAD_MAX {
                complete = false;
                break;
            }
            reply.extend(nul(name));
        }
        at += size;
    }
    if complete {
        reply.push(0);
    }
    Ok(reply)
}
