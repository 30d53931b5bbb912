//! The limit of open files. Shells often leave 256 or 1,024 where the system allows many more; connections
//! and model files need them.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::config::Config;

/// Files besides connections: weights of a load, configs, libraries, the log.
const OTHER_FILES: u64 = 128;

/// Listeners: the socket and the loopback port.
const LISTENERS: u64 = 2;

/// What macOS grants at most where it names no limit (OPEN_MAX of its `sys/syslimits.h`).
const UNNAMED_MAX: u64 = 10_240;

/// Raises the soft limit to the hard one, and says so if it may not do for the connections that are allowed.
pub(super) fn raise_limit(config: &Config) {
    let found = getrlimit(Resource::Nofile);
    let raise = |current| setrlimit(Resource::Nofile, Rlimit { current, ..found }).is_ok();
    if found.current != found.maximum && !raise(found.maximum) {
        let most = UNNAMED_MAX.min(found.maximum.unwrap_or(UNNAMED_MAX));
        if found.current.is_some_and(|current| current < most) {
            raise(Some(most));
        }
    }
    let limits = &config.limits;
    let connections = u64::from(limits.connections_max) + u64::from(limits.connections_unproven_max);
    let needed = connections * LISTENERS + OTHER_FILES;
    if let Some(open_files_max) = getrlimit(Resource::Nofile).current.filter(|limit| *limit < needed) {
        tracing::warn!(open_files_max, needed, "the system's limit of open files (ulimit -n) may be reached");
    }
}
