//! Ends a VM whose core is in a loop that does not end. Only where this program has to
//! look after that: inside KVM. The module does it itself.
//!
//! A vCPU that uses its CPU is asked for a sign of life every second of CPU time that
//! it has used; one that sleeps is left alone. A core that has used ten seconds more
//! without an answer is in a loop. It is CPU time that counts: a vCPU that the host
//! does not run cannot answer, and is not to blame.

use std::fs;
use std::sync::Arc;

use crate::hypervisor::Pulse;

/// Clock ticks of the host in a second, as /proc counts them (`USER_HZ`).
const SECOND: u64 = 100;
/// CPU time between two questions.
const ASK_EVERY: u64 = SECOND;
/// CPU time in which an answer must come.
const PATIENCE: u64 = 10 * SECOND;

/// One vCPU under watch.
pub struct Watched {
    pulse: Arc<dyn Pulse>,
    /// CPU time when it was last known to answer.
    good: u64,
    asked: bool,
}

impl Watched {
    /// Begins to watch a vCPU that has not run yet.
    pub fn new(pulse: Arc<dyn Pulse>) -> Self {
        Self {
            pulse,
            good: 0,
            asked: false,
        }
    }

    /// Looks at a vCPU that has used `cpu` ticks of CPU time in all. True if its core
    /// does not answer any more; the next run then ends with a report.
    pub fn look(&mut self, cpu: u64) -> bool {
        if self.asked && self.pulse.answered() {
            self.asked = false;
            self.good = cpu;
        }
        let since = cpu.saturating_sub(self.good);
        if self.asked {
            if since < PATIENCE {
                return false;
            }
            self.pulse.give_up();
            return true;
        }
        if since >= ASK_EVERY {
            self.asked = true;
            self.good = cpu;
            self.pulse.ask();
        }
        false
    }
}

/// CPU time of a thread of this process, in ticks; `None` if it is gone.
pub fn cpu_time(thread: i32) -> Option<u64> {
    parse(&fs::read_to_string(format!("/proc/self/task/{thread}/stat")).ok()?)
}

/// User and system time in `/proc/PID/stat` (proc(5)): fields 14 and 15. The second
/// field is a name in parentheses, which may have any characters.
fn parse(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_ascii_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    user.checked_add(system)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

    #[derive(Default)]
    struct Core {
        asked: AtomicU32,
        answers: AtomicBool,
        given_up: AtomicBool,
    }

    impl Pulse for Core {
        fn ask(&self) {
            self.asked.fetch_add(1, Ordering::SeqCst);
        }
        fn answered(&self) -> bool {
            self.answers.load(Ordering::SeqCst)
        }
        fn give_up(&self) {
            self.given_up.store(true, Ordering::SeqCst);
        }
    }

    #[test]
    fn only_a_core_that_uses_its_cpu_and_does_not_answer_is_given_up() {
        let core = Arc::new(Core::default());
        let mut watched = Watched::new(Arc::clone(&core) as Arc<dyn Pulse>);
        // Idle for however long: it is not even asked.
        assert!((0..1000).all(|_| !watched.look(SECOND / 2)));
        assert_eq!(core.asked.load(Ordering::SeqCst), 0);
        // Busy, and it answers.
        core.answers.store(true, Ordering::SeqCst);
        for second in 1..100 {
            assert!(!watched.look(second * SECOND));
        }
        assert!(core.asked.load(Ordering::SeqCst) > 40);
        // Asked, and then the host does not run it.
        let asked = core.asked.load(Ordering::SeqCst);
        let mut now = 100 * SECOND;
        while core.asked.load(Ordering::SeqCst) == asked {
            assert!(!watched.look(now));
            now += SECOND;
        }
        core.answers.store(false, Ordering::SeqCst);
        assert!((0..1000).all(|_| !watched.look(now)));
        assert!(!watched.look(now + PATIENCE / 2));
        assert!(watched.look(now + PATIENCE));
        assert!(core.given_up.load(Ordering::SeqCst));
    }

    #[test]
    fn cpu_times() {
        let stat = "7 (a ) b (c) S 1 7 7 0 -1 4194304 100 0 0 0 12 30 0 0 20 0 1 0 5 1 1";
        assert_eq!(parse(stat), Some(42));
        assert_eq!(parse("7 (x) S 1"), None);
        let own = rustix::thread::gettid().as_raw_nonzero().get();
        assert!(cpu_time(own).is_some());
    }
}
