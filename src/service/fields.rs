//! Checks of single fields: names, lifetimes, pages, ranges. An error names the field by its path, and the
//! configuration's key where a limit is exceeded.

use std::time::Duration;

use crate::error::Error;
use crate::hub::check_model_name;
use crate::ids::{ModelName, SessionName};
use crate::limits::Limits;
use crate::session::is_valid_name;

const PAGE_SIZE_DEFAULT: u32 = 100;
const PAGE_SIZE_MAX: u32 = 1000;

/// Refuses a value outside `low..=high`; NaN is outside every range.
pub(super) fn within<T: PartialOrd + std::fmt::Display + Copy>(
    path: &str,
    value: T,
    low: T,
    high: T,
) -> Result<T, Error> {
    if low <= value && value <= high {
        Ok(value)
    } else {
        Err(Error::field(path, format!("must be {low} to {high}")))
    }
}

/// Refuses a number above `max`; `limit` is the configuration's key.
pub(super) fn up_to(path: &str, number: u32, limit: &str, max: u32) -> Result<(), Error> {
    if number <= max { Ok(()) } else { Err(Error::field(path, format!("{limit}: must be 0 to {max}"))) }
}

/// Refuses a list of more than `max` entries; `limit` is the configuration's key.
pub(super) fn at_most(path: &str, count: usize, limit: &str, max: u32) -> Result<(), Error> {
    if count <= max as usize {
        Ok(())
    } else {
        Err(Error::field(path, format!("{limit}: at most {max} entries, not {count}")))
    }
}

/// Refuses a text, or what will be one, that is too long for the tokenizer.
pub(super) fn at_most_bytes(path: &str, bytes: usize, limits: &Limits) -> Result<(), Error> {
    let max = limits.text_bytes_max;
    if bytes <= max {
        return Ok(());
    }
    Err(Error::field(path, format!("text_bytes_max: at most {max} bytes, not {bytes}")))
}

/// Refuses an empty list; `entry` is the noun of what it lists.
pub(super) fn at_least_one(path: &str, count: usize, entry: &str) -> Result<(), Error> {
    if count > 0 { Ok(()) } else { Err(Error::field(path, format!("must have at least one {entry}"))) }
}

/// Checks the name of a model that has to be given.
pub(super) fn model_name(path: &str, name: &str) -> Result<ModelName, Error> {
    if name.is_empty() {
        return Err(Error::field(path, "must be given"));
    }
    check_model_name(name).map_err(|error| Error::field(path, error.to_string()))?;
    Ok(name.into())
}

/// Checks the name of a model; an empty one is none.
pub(super) fn optional_model(path: &str, name: &str) -> Result<Option<ModelName>, Error> {
    if name.is_empty() { Ok(None) } else { model_name(path, name).map(Some) }
}

/// Checks the name of a session.
pub(super) fn session_name(path: &str, name: &str) -> Result<SessionName, Error> {
    if is_valid_name(name) {
        Ok(name.into())
    } else {
        Err(Error::field(path, "must be 1 to 128 characters out of A-Z a-z 0-9 . _ : / -"))
    }
}

/// Checks the name of a new session; an empty one is replaced by a random one.
pub(super) fn fresh_session_name(path: &str, name: &str) -> Result<SessionName, Error> {
    if name.is_empty() {
        Ok(format!("s-{:016x}", rand::random::<u64>()).into())
    } else {
        session_name(path, name)
    }
}

/// Checks a session's lifetime.
pub(super) fn ttl(ttl: Option<Duration>, ttl_max: Duration) -> Result<Option<Duration>, Error> {
    match ttl {
        Some(ttl) if ttl.is_zero() || ttl > ttl_max => {
            let max_s = ttl_max.as_secs();
            Err(Error::field("ttl", format!("session_ttl_max_s: must be above 0 and at most {max_s} s")))
        }
        Some(_) | None => Ok(ttl),
    }
}

/// Checks a page's size in entries; 0 is the default.
pub(super) fn page_size(size: u32) -> Result<usize, Error> {
    let size = if size == 0 { PAGE_SIZE_DEFAULT } else { size };
    Ok(within("page_size", size, 0, PAGE_SIZE_MAX)? as usize)
}

/// Checks a page token, which is the name of the last entry of the page before; an empty one is none.
pub(super) fn page_token<T>(
    token: &str,
    check: impl FnOnce(&str, &str) -> Result<T, Error>,
) -> Result<Option<T>, Error> {
    if token.is_empty() {
        return Ok(None);
    }
    let foreign = |_| Error::field("page_token", "is not a token of this daemon");
    check("page_token", token).map(Some).map_err(foreign)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn field_of<T: std::fmt::Debug>(outcome: Result<T, Error>) -> String {
        match outcome {
            Err(Error::InvalidField { field, .. }) => field,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_lifetime_is_above_zero_and_within_the_limit() {
        let ttl_max = Duration::from_secs(10);
        assert_eq!(ttl(None, ttl_max), Ok(None));
        assert_eq!(ttl(Some(ttl_max), ttl_max), Ok(Some(ttl_max)));
        for bad in [Duration::ZERO, Duration::new(10, 1), Duration::MAX] {
            assert_eq!(field_of(ttl(Some(bad), ttl_max)), "ttl", "{bad:?}");
        }
    }

    #[test]
    fn page_tokens_are_names() {
        assert_eq!((page_size(0), page_size(7), page_size(1000)), (Ok(100), Ok(7), Ok(1000)));
        assert_eq!(field_of(page_size(1001)), "page_size");
        assert_eq!(page_token("a", session_name), Ok(Some("a".into())));
        assert_eq!(page_token("owner/a model", model_name), Ok(Some("owner/a model".into())));
        assert_eq!(page_token("", model_name), Ok(None));
        assert_eq!(field_of(page_token("\u{1}", session_name)), "page_token");
        assert_eq!(field_of(page_token("../m", model_name)), "page_token");
    }

    #[test]
    fn a_name_that_is_a_path_is_refused_with_its_field() {
        assert_eq!(field_of(model_name("models[2]", "a/../b")), "models[2]");
        assert_eq!(field_of(model_name("model", "")), "model");
        assert_eq!(optional_model("model", ""), Ok(None));
    }
}
