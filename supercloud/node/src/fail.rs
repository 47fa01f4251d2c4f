//! Places at which tests end an agent as `kill -9` would. In a release build they are nothing.

/// Ends the agent here if `SUPERCLOUD_FAIL_AT` names this place.
#[inline]
pub fn point(place: &str) {
    #[cfg(debug_assertions)]
    if std::env::var_os("SUPERCLOUD_FAIL_AT").is_some_and(|at| at == place) {
        // No destructor, no buffer, no word.
        rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL)
            .ok();
    }
    #[cfg(not(debug_assertions))]
    let _ = place;
}
