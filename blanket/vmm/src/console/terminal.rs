//! Raw mode of the user's terminal, given back in every case.

use std::io;
use std::os::fd::AsFd;
use std::sync::{Mutex, Once};

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};

use crate::sync::lock;

/// What standard input was like before raw mode.
static BEFORE: Mutex<Option<Termios>> = Mutex::new(None);

/// Standard input in raw mode; dropping it restores the terminal.
#[derive(Debug)]
pub struct RawMode(());

impl RawMode {
    /// Switches standard input to raw mode, if it is a terminal and this process is
    /// in its foreground.
    /// Arranges that a panic of any thread restores it before its message.
    ///
    /// # Errors
    /// The terminal refused.
    pub fn enable() -> io::Result<Option<Self>> {
        static HOOK: Once = Once::new();
        let stdin = io::stdin();
        // A background job that changed its terminal would be stopped.
        let ours = rustix::termios::tcgetpgrp(&stdin)
            .is_ok_and(|foreground| foreground == rustix::process::getpgrp());
        if !ours {
            return Ok(None);
        }

        let before = tcgetattr(&stdin)?;
        let mut raw = before.clone();
        raw.make_raw();
        HOOK.call_once(|| {
            let report = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |info| {
                restore_terminal();
                report(info);
            }));
        });
        *lock(&BEFORE) = Some(before);
        tcsetattr(stdin.as_fd(), OptionalActions::Flush, &raw)?;
        Ok(Some(Self(())))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore_terminal();
    }
}

/// Gives the terminal back as it was, once. Does nothing if it was not changed.
pub fn restore_terminal() {
    if let Some(before) = lock(&BEFORE).take() {
        // There is nobody left to tell if this fails.
        let _ = tcsetattr(io::stdin(), OptionalActions::Drain, &before);
    }
}
