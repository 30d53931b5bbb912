//! How a request takes part in the reuse of cached KV.

use sha2::{Digest, Sha256};

use crate::engine::{CacheUse, Salt};
use crate::error::Error;

/// Limit of a salt, in bytes.
const SALT_BYTES_MAX: usize = 128;

/// A request's wishes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CacheOptions {
    /// Nothing is looked up, and nothing left behind.
    pub off: bool,
    /// Separates those for whom a principal asks; empty takes the session's.
    pub salt: String,
}

impl CacheOptions {
    /// Refuses a salt beyond the limit.
    pub(super) fn check(&self) -> Result<(), Error> {
        check_salt("cache.salt", &self.salt)
    }

    /// Returns which caches the work of a request may use; `session` is the salt of its session, empty for
    /// none.
    pub(super) fn for_work(&self, session: &str) -> CacheUse {
        let Self { off, salt } = self;
        if *off {
            return CacheUse::Off;
        }
        CacheUse::Shared(hash(if salt.is_empty() { session } else { salt }))
    }
}

/// Refuses a salt beyond the limit.
pub(super) fn check_salt(path: &str, salt: &str) -> Result<(), Error> {
    let bytes = salt.len();
    if bytes <= SALT_BYTES_MAX {
        return Ok(());
    }
    Err(Error::field(path, format!("at most {SALT_BYTES_MAX} bytes, not {bytes}")))
}

/// Hashes a salt, so that none can be found that shares another's caches.
pub(super) fn hash(salt: &str) -> Salt {
    if salt.is_empty() { Salt::default() } else { Salt(Sha256::digest(salt).into()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn uses(off: bool, salt: &str, session: &str) -> CacheUse {
        CacheOptions { off, salt: salt.into() }.for_work(session)
    }

    #[test]
    fn a_request_has_its_own_salt_else_its_sessions_else_none() {
        assert_eq!(uses(false, "", ""), CacheUse::default());
        assert_eq!(uses(false, "a", "b"), uses(false, "a", ""));
        assert_eq!(uses(false, "", "b"), uses(false, "b", ""));
        let all = [uses(false, "", ""), uses(false, "a", ""), uses(false, "b", ""), uses(true, "a", "b")];
        for (index, one) in all.iter().enumerate() {
            assert!(all[index + 1..].iter().all(|other| other != one), "{all:?}");
        }
    }

    #[test]
    fn a_salt_has_a_limit() {
        let salt = |bytes: usize| CacheOptions { off: false, salt: "x".repeat(bytes) };
        assert_eq!(salt(128).check(), Ok(()));
        assert!(matches!(salt(129).check(), Err(Error::InvalidField { field, .. }) if field == "cache.salt"));
    }
}
