//! Checks of what a caller says about a session besides its content: its lifetime, and labels of it or of
//! those that are looked for. How many there may be is the session book's to say.

use std::time::{Duration, SystemTime};

use super::fields::{at_most, session_name, ttl};
use crate::error::Error;
use crate::limits::Limits;
use crate::session::{Labels, Lease, may_begin_name};

/// Bytes of a label's value.
const LABEL_BYTES_MAX: usize = 1024;

/// A session's lifetime as a caller gives it; at most one of the two.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lifetime {
    /// Time after the last use.
    pub ttl: Option<Duration>,
    /// Time at which it expires.
    pub expire_time: Option<SystemTime>,
}

impl Lifetime {
    /// Checks it at the wall time `now`; none was given if it is empty.
    pub(super) fn lease(self, limits: &Limits, now: SystemTime) -> Result<Option<Lease>, Error> {
        let ttl_max = limits.session_ttl_max;
        match (ttl(self.ttl, ttl_max)?, self.expire_time) {
            (None, None) => Ok(None),
            (Some(_), Some(_)) => Err(Error::field("expire_time", "cannot be given together with ttl")),
            (Some(ttl), None) => Ok(Some(Lease::AfterUse(ttl))),
            (None, Some(end)) => {
                let left = end.duration_since(now).unwrap_or_default();
                if left.is_zero() || left > ttl_max {
                    let max_s = ttl_max.as_secs();
                    let why = format!("session_ttl_max_s: must be in the future, by at most {max_s} s");
                    return Err(Error::field("expire_time", why));
                }
                Ok(Some(Lease::Until(end)))
            }
        }
    }
}

/// Checks the keys and values of labels.
pub(super) fn labels(labels: Labels) -> Result<Labels, Error> {
    for (key, value) in &labels {
        session_name("labels", key)?;
        if value.len() > LABEL_BYTES_MAX {
            let why = format!("must have at most {LABEL_BYTES_MAX} bytes, not {}", value.len());
            return Err(Error::field(format!("labels[{key}]"), why));
        }
    }
    Ok(labels)
}

/// Checks the labels that sessions are looked for by.
pub(super) fn wanted_labels(wanted: Labels, limits: &Limits) -> Result<Labels, Error> {
    at_most("labels", wanted.len(), "session_labels_max", limits.session_labels_max)?;
    labels(wanted)
}

/// Checks the keys of labels to remove.
pub(super) fn label_keys(keys: Vec<String>, limits: &Limits) -> Result<Vec<String>, Error> {
    at_most("remove_labels", keys.len(), "session_labels_max", limits.session_labels_max)?;
    for (index, key) in keys.iter().enumerate() {
        session_name(&format!("remove_labels[{index}]"), key)?;
    }
    Ok(keys)
}

/// Checks the beginning of sessions' names.
pub(super) fn name_prefix(prefix: String) -> Result<String, Error> {
    if may_begin_name(&prefix) {
        Ok(prefix)
    } else {
        Err(Error::field("name_prefix", "must be at most 128 characters out of A-Z a-z 0-9 . _ : / -"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: SystemTime = SystemTime::UNIX_EPOCH;

    fn limits() -> Limits {
        Limits { session_ttl_max: Duration::from_secs(10), session_labels_max: 1, ..Limits::default() }
    }

    fn field_of<T: std::fmt::Debug>(outcome: Result<T, Error>) -> String {
        match outcome {
            Err(Error::InvalidField { field, .. }) => field,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn an_end_lies_in_the_future_within_the_limit() {
        let lease = |after: Duration| {
            let expire_time = NOW.checked_add(after);
            Lifetime { ttl: None, expire_time }.lease(&limits(), NOW)
        };
        let ten = Duration::from_secs(10);
        assert_eq!(lease(ten), Ok(Some(Lease::Until(NOW + ten))));
        assert_eq!(field_of(lease(Duration::ZERO)), "expire_time");
        assert_eq!(field_of(lease(Duration::from_secs(11))), "expire_time");
        let past = Lifetime { ttl: None, expire_time: Some(NOW - ten) };
        assert_eq!(field_of(past.lease(&limits(), NOW)), "expire_time");
        let both = Lifetime { ttl: Some(ten), expire_time: Some(NOW + ten) };
        assert_eq!(field_of(both.lease(&limits(), NOW)), "expire_time");
        assert_eq!(Lifetime::default().lease(&limits(), NOW), Ok(None));
    }

    #[test]
    fn labels_have_names_as_keys_and_short_values() {
        let one = |key: &str, value: &str| Labels::from([(key.to_owned(), value.to_owned())]);
        assert!(labels(one("a/b", &"x".repeat(1024))).is_ok());
        assert_eq!(field_of(labels(one("a", &"x".repeat(1025)))), "labels[a]");
        assert_eq!(field_of(labels(one("", "x"))), "labels");
        assert_eq!(field_of(labels(one("a b", "x"))), "labels");
        let mut two = one("a", "x");
        two.append(&mut one("b", "x"));
        assert_eq!(field_of(wanted_labels(two, &limits())), "labels");
        assert_eq!(field_of(label_keys(vec!["a".into(), "b".into()], &limits())), "remove_labels");
        assert_eq!(field_of(label_keys(vec![" ".into()], &limits())), "remove_labels[0]");
        assert_eq!(name_prefix(String::new()), Ok(String::new()));
        assert_eq!(field_of(name_prefix("a*".into())), "name_prefix");
    }
}
