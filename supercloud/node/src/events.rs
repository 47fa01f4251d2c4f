//! What happens on this node, for whoever wants to hear.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use supercloud_api::Event;
use tokio::sync::broadcast;

/// How many events a slow listener may be behind before it misses some.
const BEHIND: usize = 256;

/// Milliseconds since 1970.
#[must_use]
pub fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| {
        u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
    })
}

/// All who listen.
#[derive(Debug)]
pub struct Events {
    to: broadcast::Sender<Event>,
    next: AtomicU64,
}

impl Default for Events {
    fn default() -> Self {
        Self {
            to: broadcast::channel(BEHIND).0,
            next: AtomicU64::new(1),
        }
    }
}

impl Events {
    /// Something has happened.
    pub fn say(&self, node: &str, kind: &str, about: &str, text: impl Into<String>) {
        let event = Event {
            number: self.next.fetch_add(1, Ordering::Relaxed),
            at_ms: now_ms(),
            node: node.into(),
            kind: kind.into(),
            about: about.into(),
            text: text.into(),
        };
        tracing::info!(kind, about, "{}", event.text);
        // Nobody listens: then nobody hears.
        let _ = self.to.send(event);
    }

    /// Hears what happens from now on.
    #[must_use]
    pub fn hear(&self) -> broadcast::Receiver<Event> {
        self.to.subscribe()
    }

    /// How many have happened.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.next.load(Ordering::Relaxed).saturating_sub(1)
    }
}
