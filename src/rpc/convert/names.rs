//! Names, pages and lifetimes.

use std::time::Duration;

use crate::error::Error;
use crate::hub::check_model_name;
use crate::ids::{ModelName, SessionName};
use crate::session::{ListPage, is_valid_name};

const NANOS_PER_SECOND: i32 = 1_000_000_000;
const PAGE_SIZE_DEFAULT: u32 = 100;
const PAGE_SIZE_MAX: u32 = 1000;

/// The name of a model that `path` must give. What cannot be one is refused by every call alike.
pub(in crate::rpc) fn model_name(path: &str, name: &str) -> Result<ModelName, Error> {
    if name.is_empty() {
        return Err(Error::field(path, "must be given"));
    }
    check_model_name(name).map_err(|error| Error::field(path, error.to_string()))?;
    Ok(name.into())
}

pub(in crate::rpc) fn optional_model(path: &str, name: &str) -> Result<Option<ModelName>, Error> {
    if name.is_empty() { Ok(None) } else { model_name(path, name).map(Some) }
}

pub(in crate::rpc) fn session_name(path: &str, name: &str) -> Result<SessionName, Error> {
    if is_valid_name(name) {
        Ok(name.into())
    } else {
        Err(Error::field(path, "must be 1 to 128 characters out of A-Z a-z 0-9 . _ : / -"))
    }
}

/// A new session's name: the caller's, or one that is drawn.
pub(in crate::rpc) fn fresh_session_name(path: &str, name: &str) -> Result<SessionName, Error> {
    if name.is_empty() {
        Ok(format!("s-{:016x}", rand::random::<u64>()).into())
    } else {
        session_name(path, name)
    }
}

/// How long a session is to live; none if it is not said.
pub(in crate::rpc) fn ttl(
    sent: Option<prost_types::Duration>,
    ttl_max: Duration,
) -> Result<Option<Duration>, Error> {
    let Some(sent) = sent else { return Ok(None) };
    // prost would repair what is malformed.
    let is_plain = sent.seconds >= 0 && (0..NANOS_PER_SECOND).contains(&sent.nanos);
    let ttl = Duration::try_from(sent).ok().filter(|ttl| !ttl.is_zero() && *ttl <= ttl_max);
    ttl.filter(|_| is_plain).map(Some).ok_or_else(|| {
        let max_s = ttl_max.as_secs();
        Error::field("ttl", format!("session_ttl_max_s: must be above 0 and at most {max_s} s"))
    })
}

/// A page of sessions. The token is the last name of the page before.
pub(in crate::rpc) fn session_page(size: u32, token: &str, model: &str) -> Result<ListPage, Error> {
    let size = page_size(size)?;
    let after = Some(token).filter(|token| !token.is_empty());
    let after = after.map(|token| session_name("page_token", token).map_err(|_| foreign_token()));
    Ok(ListPage { after: after.transpose()?, size, model: optional_model("model", model)? })
}

/// A page of models: the last name of the page before, and how many are wanted.
pub(in crate::rpc) fn model_page(size: u32, token: &str) -> Result<(Option<ModelName>, usize), Error> {
    let after = optional_model("page_token", token).map_err(|_| foreign_token())?;
    Ok((after, page_size(size)?))
}

fn page_size(size: u32) -> Result<usize, Error> {
    let size = if size == 0 { PAGE_SIZE_DEFAULT } else { size };
    Ok(super::within("page_size", size, 0, PAGE_SIZE_MAX)? as usize)
}

fn foreign_token() -> Error {
    Error::field("page_token", "is not a token of this daemon")
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
    fn a_lifetime_is_a_plain_length_of_time_within_the_limit() {
        let ttl_max = Duration::from_secs(10);
        let read = |seconds, nanos| ttl(Some(prost_types::Duration { seconds, nanos }), ttl_max);
        assert_eq!(read(1, 5), Ok(Some(Duration::new(1, 5))));
        assert_eq!(read(10, 0), Ok(Some(Duration::from_secs(10))));
        for (seconds, nanos) in [(0, 0), (-1, 0), (1, -5), (1, 1_000_000_000), (10, 1), (i64::MAX, 0)] {
            assert_eq!(field_of(read(seconds, nanos)), "ttl", "{seconds} {nanos}");
        }
    }

    #[test]
    fn page_tokens_are_names() {
        assert_eq!(session_page(0, "", "").unwrap().size, 100);
        assert_eq!(session_page(7, "a", "m").unwrap().after, Some("a".into()));
        assert_eq!(model_page(1000, "owner/a model").unwrap(), (Some("owner/a model".into()), 1000));
        assert_eq!(field_of(session_page(0, "\u{1}", "")), "page_token");
        assert_eq!(field_of(session_page(1001, "", "")), "page_size");
        assert_eq!(field_of(session_page(0, "", "../m")), "model");
        assert_eq!(field_of(model_page(0, "../m")), "page_token");
        assert_eq!(field_of(model_page(1001, "")), "page_size");
    }

    #[test]
    fn a_name_that_is_a_path_is_refused_with_its_field() {
        assert_eq!(field_of(model_name("models[2]", "a/../b")), "models[2]");
        assert_eq!(field_of(model_name("model", "")), "model");
        assert_eq!(optional_model("model", ""), Ok(None));
    }
}
