//! From messages of the wire to plain data and back. Everything that comes in is checked and bounded here,
//! before anything is done with it; an error names the field by its path.

mod input;
mod json;
mod names;
mod output;
mod sampling;
mod view;

pub(super) use input::{Chat, Input, count_input, generate_input, score_input};
pub(super) use names::{
    fresh_session_name, model_name, model_page, optional_model, session_name, session_page, ttl,
};
pub(super) use output::{duration, finish, timestamp, token_logprob, token_logprobs};
pub(super) use sampling::{OutputAsk, Resolved, SamplingAsk, StoppingAsk};
pub(super) use view::{message, session};

use super::pb;
use crate::engine::Priority;
use crate::error::Error;

/// A field that must be between two values; NaN is between none.
fn within<T: PartialOrd + std::fmt::Display + Copy>(
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

/// A list that may have so many entries; `limit` is the configuration's key.
fn at_most(path: &str, count: usize, limit: &str, max: u32) -> Result<(), Error> {
    if count <= max as usize {
        Ok(())
    } else {
        Err(Error::field(path, format!("{limit}: at most {max} entries, not {count}")))
    }
}

/// Who goes first.
pub(super) fn priority(sent: i32) -> Result<Priority, Error> {
    match pb::Priority::try_from(sent) {
        Ok(pb::Priority::Unspecified | pb::Priority::Normal) => Ok(Priority::Normal),
        Ok(pb::Priority::Interactive) => Ok(Priority::Interactive),
        Ok(pb::Priority::Background) => Ok(Priority::Background),
        Err(_) => Err(Error::field("priority", "is not a priority this daemon knows")),
    }
}

/// Counts on the wire have 32 bits; more than that is not had.
pub(super) fn count(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}
