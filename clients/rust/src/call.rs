//! One call: its id in the daemon's log, and its deadline, which this side keeps too: a daemon that stands
//! still answers nothing, and the transport's timer ends with the first byte of an answer.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher as _;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::{Instant, timeout_at};
use tonic::metadata::{Ascii, MetadataMap, MetadataValue};
use tonic::{Response, Status};

use crate::address::Address;
use crate::error::{Error, Result};

/// Header of a call's time limit.
pub(crate) const TIMEOUT_HEADER: &str = "grpc-timeout";

/// Header of a call's id.
const ID_HEADER: &str = "x-request-id";

/// A call that begins now.
pub(crate) struct Call {
    /// Id of the request in the daemon's log.
    pub(crate) request_id: String,
    /// Its end, if it has one.
    pub(crate) deadline: Option<Instant>,
    /// The daemon's address, for errors.
    pub(crate) address: Address,
}

impl Call {
    /// Reads a call's id and time limit from its metadata; draws an id if there is none.
    pub(crate) fn new(metadata: &mut MetadataMap, address: Address) -> Self {
        let limit = metadata.get(TIMEOUT_HEADER).and_then(|value| time_limit(value.to_str().ok()?));
        // A limit beyond what a clock can hold is none.
        let deadline = limit.and_then(|limit| Instant::now().checked_add(limit));
        if let Some(id) = id_in(metadata) {
            return Self { request_id: id, deadline, address };
        }
        let (request_id, value) = next_request_id();
        metadata.insert(ID_HEADER, value);
        Self { request_id, deadline, address }
    }

    /// Waits for the answer until the deadline.
    pub(crate) async fn answer<T>(
        &self,
        answer: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<Response<T>> {
        let answered = match self.deadline {
            Some(deadline) => {
                timeout_at(deadline, answer).await.map_err(|_| Error::deadline(&self.request_id))?
            }
            None => answer.await,
        };
        answered.map_err(|status| Error::from_status(&status, &self.request_id, &self.address))
    }

    /// Takes the id of an accepted call from the daemon's answer.
    pub(crate) fn accepted(self, metadata: &MetadataMap) -> Self {
        Self { request_id: id_in(metadata).unwrap_or(self.request_id), ..self }
    }
}

fn id_in(metadata: &MetadataMap) -> Option<String> {
    metadata.get(ID_HEADER)?.to_str().ok().map(str::to_owned)
}

/// Parses a time limit as `Request::set_timeout` writes it: digits and a unit.
fn time_limit(text: &str) -> Option<Duration> {
    let (number, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let number: u64 = number.parse().ok()?;
    match unit {
        "n" => Some(Duration::from_nanos(number)),
        "u" => Some(Duration::from_micros(number)),
        "m" => Some(Duration::from_millis(number)),
        "S" => Some(Duration::from_secs(number)),
        "M" => Some(Duration::from_secs(number.checked_mul(60)?)),
        "H" => Some(Duration::from_secs(number.checked_mul(3600)?)),
        _ => None,
    }
}

/// Returns an id that is unique on this machine with near certainty: 64 random bits for the process
/// and a counter.
fn next_request_id() -> (String, MetadataValue<Ascii>) {
    static PROCESS: LazyLock<u64> = LazyLock::new(|| RandomState::new().hash_one(std::process::id()));
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let id = format!("{:016x}-{count}", *PROCESS);
    // Hexadecimal digits are always a valid header; the fallback is a number, which is valid by type.
    let value = id.parse().unwrap_or_else(|_| MetadataValue::from(count));
    (id, value)
}

#[cfg(test)]
mod tests {
    use tonic::Request;

    use super::*;

    #[test]
    fn every_limit_that_a_request_can_set_is_read_back() {
        for seconds in [1e-9, 0.5, 9.0, 3_600.0, 1e6, 1e9] {
            let mut request = Request::new(());
            request.set_timeout(Duration::from_secs_f64(seconds));
            let text = request.metadata().get(TIMEOUT_HEADER).unwrap().to_str().unwrap();
            let read = time_limit(text).unwrap().as_secs_f64();
            assert!((read - seconds).abs() <= seconds * 1e-3, "{text} for {seconds} s");
        }
        for text in ["", "5", "x5S", "5x", "é"] {
            assert_eq!(time_limit(text), None, "{text}");
        }
    }
}
