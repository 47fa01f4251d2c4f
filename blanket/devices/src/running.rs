//! The thread of a connected device's queue.

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;

use crate::bus::ConnectError;
use crate::{Guest, Kick, thread};

/// A thread that listens to ports of the guest. Dropping it ends it, and waits for that.
pub(crate) struct Running {
    guest: Arc<dyn Guest>,
    ports: Vec<u32>,
    kick: Arc<Kick>,
    thread: Option<JoinHandle<()>>,
}

impl Running {
    /// Starts `work` on a thread of its own, which `kick` wakes, also for what the guest
    /// notified before anybody listened.
    pub(crate) fn start(
        guest: &Arc<dyn Guest>,
        ports: &[u32],
        kick: Arc<Kick>,
        name: String,
        work: impl FnOnce() + Send + 'static,
    ) -> Result<Self, ConnectError> {
        let mut running = Self {
            guest: Arc::clone(guest),
            ports: ports.to_vec(),
            kick,
            thread: None,
        };
        for port in ports {
            guest.listen(*port, Some(Arc::clone(&running.kick) as _));
        }
        let thread = thread::named(name).spawn(work);
        running.thread = Some(thread.map_err(|source| ConnectError::Host {
            what: "a thread",
            source,
        })?);
        running.kick.kick();
        Ok(running)
    }

    /// Makes the thread's [`Kick`].
    pub(crate) fn kick() -> Result<Arc<Kick>, ConnectError> {
        let host = |source: io::Error| ConnectError::Host {
            what: "an eventfd",
            source,
        };
        Ok(Arc::new(Kick::new().map_err(host)?))
    }
}

/// Ends threads beside each other, where dropping them would end one after the other.
pub(crate) fn stop_all(queues: &[Running]) {
    for queue in queues {
        queue.kick.stop();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        for port in &self.ports {
            self.guest.listen(*port, None);
        }
        self.kick.stop();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread of a device's queue panicked");
        }
    }
}
