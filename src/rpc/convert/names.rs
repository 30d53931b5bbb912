//! Names, pages and lifetimes.

use std::time::Duration;

use crate::error::Error;
use crate::ids::{ModelName, SessionName};
use crate::limits::Limits;
use crate::session::{ListPage, is_valid_name};

/// Longer than any repo id.
const MODEL_NAME_BYTES_MAX: usize = 256;
const PAGE_SIZE_DEFAULT: u32 = 100;
const PAGE_SIZE_MAX: u32 = 1000;

/// A model's name; what it may be made of is for the model roots to say.
pub(in crate::rpc) fn model_name(name: &str) -> Result<ModelName, Error> {
    optional_model(name)?.ok_or_else(|| Error::field("model", "must be given"))
}

pub(in crate::rpc) fn optional_model(name: &str) -> Result<Option<ModelName>, Error> {
    if name.len() > MODEL_NAME_BYTES_MAX {
        return Err(Error::field("model", format!("must have at most {MODEL_NAME_BYTES_MAX} bytes")));
    }
    Ok(Some(name).filter(|name| !name.is_empty()).map(ModelName::from))
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
    limits: &Limits,
) -> Result<Option<Duration>, Error> {
    let Some(sent) = sent else { return Ok(None) };
    let ttl = Duration::try_from(sent).ok().filter(|ttl| !ttl.is_zero() && *ttl <= limits.session_ttl_max);
    ttl.map(Some).ok_or_else(|| {
        let max_s = limits.session_ttl_max.as_secs();
        Error::field("ttl", format!("session_ttl_max_s: must be above 0 and at most {max_s} s"))
    })
}

/// A page of a list. The token is the last name of the page before.
pub(in crate::rpc) fn page(size: u32, token: &str, model: &str) -> Result<ListPage, Error> {
    let size = match size {
        0 => PAGE_SIZE_DEFAULT,
        size => super::within("page_size", size, 0, PAGE_SIZE_MAX)?,
    };
    if token.len() > MODEL_NAME_BYTES_MAX {
        return Err(Error::field("page_token", "is not a token of this daemon"));
    }
    let after = Some(token).filter(|token| !token.is_empty()).map(SessionName::from);
    Ok(ListPage { after, size: size as usize, model: optional_model(model)? })
}
