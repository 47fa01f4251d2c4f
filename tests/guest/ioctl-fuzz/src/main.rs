//! A VMM that the module must not trust.
//!
//! `ioctl-fuzz random SEED STEPS [UID]` makes STEPS random calls on /dev/blanket in each
//! of four threads: opens, ioctls good and bad, mappings, memory that goes away, forks,
//! descriptors that are closed while another thread runs them. `ioctl-fuzz checks UID`
//! tries one by one what must be refused. Either becomes user UID first, if it is given.
//!
//! The module's part is judged from outside: the instance's kernel log must stay silent,
//! and a VM beside it must not notice.
#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_possible_wrap,
    reason = "random numbers are cut to what is wanted"
)]

mod checks;
mod device;
mod random;

use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    let number = |at: usize| arguments.get(at).and_then(|text| text.parse::<u64>().ok());
    match (arguments.get(1).map(String::as_str), number(2), number(3)) {
        (Some("random"), Some(seed), Some(steps)) => {
            become_user(number(4));
            random::run(seed, steps);
            ExitCode::SUCCESS
        }
        (Some("checks"), uid, None) => {
            become_user(uid);
            checks::run()
        }
        _ => {
            eprintln!("usage: ioctl-fuzz random SEED STEPS [UID] | ioctl-fuzz checks [UID]");
            ExitCode::from(2)
        }
    }
}

fn become_user(uid: Option<u64>) {
    let Some(uid) = uid else { return };
    let uid = uid as libc::uid_t;
    // SAFETY: plain numbers; no thread has been started.
    let done = unsafe { libc::setgid(uid) == 0 && libc::setuid(uid) == 0 };
    if !done {
        eprintln!("ioctl-fuzz: cannot become user {uid}");
        std::process::exit(1);
    }
}
