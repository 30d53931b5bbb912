//! Errors, by what the caller can do about them. A failed call carries the daemon's [`ErrorReason`];
//! transport failures have none.

use std::collections::BTreeMap;
use std::error::Error as _;
use std::fmt;
use std::time::Duration;

use tonic::{Code, ConnectError, Status, TimeoutExpired};
use tonic_types::StatusExt as _;

use crate::address::Address;
use crate::v1::ErrorReason;

/// The domain of the daemon's reasons.
const ERROR_DOMAIN: &str = "mlxd.v1";

/// Prefix of the names of [`ErrorReason`] in the contract; the wire omits it.
const REASON_PREFIX: &str = "ERROR_REASON_";

/// The outcome of a call.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a call, or the connection, failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An option of the connection is invalid; nothing was sent.
    #[error("{option}: {why}")]
    InvalidOption {
        /// The option's name.
        option: &'static str,
        /// The fault.
        why: String,
    },
    /// No daemon could be reached, at the start or by a later call; nothing was sent.
    #[error("no daemon answers at {address}")]
    Connect {
        /// The address that was tried.
        address: String,
        /// The transport's error.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The connection broke during the call; the daemon may have ended. It may have carried
    /// the call out all the same.
    #[error("the connection to the daemon is lost: {cause}")]
    Disconnected {
        /// The transport's innermost error.
        cause: String,
    },
    /// The call ended with an error status.
    #[error(transparent)]
    Call(Box<CallError>),
    /// The answer lacks a field that the contract promises.
    #[error("the daemon's answer is incomplete: no {missing} (request {request_id})")]
    Incomplete {
        /// The missing field or event.
        missing: &'static str,
        /// Id of the request.
        request_id: String,
    },
}

impl Error {
    /// Returns the daemon's reason, `Unspecified` if it gave none.
    #[must_use]
    pub fn reason(&self) -> ErrorReason {
        match self {
            Self::Call(call) => call.reason,
            Self::InvalidOption { .. }
            | Self::Connect { .. }
            | Self::Disconnected { .. }
            | Self::Incomplete { .. } => ErrorReason::Unspecified,
        }
    }

    /// Returns the status of the call, if it got one.
    #[must_use]
    pub fn call(&self) -> Option<&CallError> {
        match self {
            Self::Call(call) => Some(call),
            Self::InvalidOption { .. }
            | Self::Connect { .. }
            | Self::Disconnected { .. }
            | Self::Incomplete { .. } => None,
        }
    }

    /// Tells whether the same call may succeed later, unchanged. A turn of a session is safe to repeat only
    /// with `expected_token_count`: the first attempt may have succeeded.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Call(call) => call.retry_after.is_some() || call.code == Code::Unavailable,
            Self::Connect { .. } | Self::Disconnected { .. } => true,
            Self::InvalidOption { .. } | Self::Incomplete { .. } => false,
        }
    }

    /// Converts the status of a call to the daemon at `address`. One that has a source was made on this side,
    /// not by the daemon.
    pub(crate) fn from_status(status: &Status, request_id: &str, address: &Address) -> Self {
        let mut cause = status.source();
        let mut last = None;
        while let Some(error) = cause {
            if error.is::<TimeoutExpired>() {
                return Self::deadline(request_id);
            }
            if error.is::<ConnectError>() {
                return Self::Connect { address: address.to_string(), source: Box::new(status.clone()) };
            }
            last = Some(error);
            cause = error.source();
        }
        match last {
            Some(root) => Self::Disconnected { cause: root.to_string() },
            None => Self::Call(Box::new(CallError::new(status, request_id))),
        }
    }

    /// Makes the error of a call whose deadline this side saw expire, which is the daemon's for it.
    pub(crate) fn deadline(request_id: &str) -> Self {
        Self::Call(Box::new(CallError {
            reason: ErrorReason::Deadline,
            reason_name: "DEADLINE".to_owned(),
            code: Code::DeadlineExceeded,
            message: "the call's deadline expired".to_owned(),
            metadata: BTreeMap::new(),
            retry_after: None,
            field_violations: Vec::new(),
            request_id: request_id.to_owned(),
        }))
    }
}

/// The status that ended a call.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct CallError {
    /// The daemon's reason; `Unspecified` if a newer daemon gave a reason unknown to this client. An
    /// expired deadline is `Deadline`, whichever side noticed.
    pub reason: ErrorReason,
    /// Name of the reason as sent, without prefix, such as `CONTEXT_OVERFLOW`; empty without a reason.
    pub reason_name: String,
    /// The canonical gRPC code.
    pub code: Code,
    /// Description for people.
    pub message: String,
    /// Details of the reason, such as `prompt_tokens`; `ErrorReason` documents them.
    pub metadata: BTreeMap<String, String>,
    /// Time to wait before trying again.
    pub retry_after: Option<Duration>,
    /// Refused fields of the request.
    pub field_violations: Vec<FieldViolation>,
    /// Id of the request in the daemon's log.
    pub request_id: String,
}

/// A refused field of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FieldViolation {
    /// Its path, as in `sampling.top_p`.
    pub field: String,
    /// The reason of the refusal.
    pub description: String,
}

impl CallError {
    fn new(status: &Status, request_id: &str) -> Self {
        let details = status.get_error_details();
        let info = details.error_info().filter(|info| info.domain == ERROR_DOMAIN);
        let reason_name = info.map(|info| info.reason.clone()).unwrap_or_default();
        let answered_id = status.metadata().get("x-request-id").and_then(|value| value.to_str().ok());
        let violations = details.bad_request().map(|bad| bad.field_violations.as_slice()).unwrap_or_default();
        Self {
            reason: ErrorReason::from_str_name(&format!("{REASON_PREFIX}{reason_name}")).unwrap_or_default(),
            reason_name,
            code: status.code(),
            message: status.message().to_owned(),
            metadata: info.map(|info| info.metadata.clone().into_iter().collect()).unwrap_or_default(),
            retry_after: details.retry_info().and_then(|info| info.retry_delay),
            field_violations: violations
                .iter()
                .map(|violation| FieldViolation {
                    field: violation.field.clone(),
                    description: violation.description.clone(),
                })
                .collect(),
            request_id: answered_id.unwrap_or(request_id).to_owned(),
        }
    }
}

impl fmt::Display for CallError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let message = if self.message.is_empty() { "the call failed" } else { &self.message };
        if self.reason_name.is_empty() {
            write!(f, "{message} ({:?})", self.code)
        } else {
            write!(f, "{message} ({})", self.reason_name)
        }
    }
}

impl std::error::Error for CallError {}

#[cfg(test)]
mod tests {
    use tonic_types::ErrorDetails;

    use super::*;

    fn error(status: &Status, request_id: &str) -> Error {
        Error::from_status(status, request_id, &Address::Http("http://127.0.0.1:7070".to_owned()))
    }

    fn status(code: Code, reason: &str, domain: &str) -> Status {
        let mut details = ErrorDetails::new();
        details.set_error_info(reason, domain, [("limit".to_owned(), "8".to_owned())]);
        details.set_retry_info(Some(Duration::from_millis(1500)));
        details.add_bad_request_violation("sampling.top_p", "above 1");
        Status::with_error_details(code, "no room", details)
    }

    #[test]
    fn every_detail_of_a_status_survives() {
        let error = error(&status(Code::ResourceExhausted, "QUEUE_FULL", ERROR_DOMAIN), "sent-id");
        let call = error.call().unwrap();
        assert_eq!(call.reason, ErrorReason::QueueFull);
        assert_eq!(call.metadata["limit"], "8");
        assert_eq!(call.retry_after, Some(Duration::from_millis(1500)));
        assert_eq!(call.field_violations[0].field, "sampling.top_p");
        assert_eq!(call.request_id, "sent-id");
        assert!(error.is_retryable());
        assert_eq!(error.to_string(), "no room (QUEUE_FULL)");
    }

    #[test]
    fn an_answered_request_id_outranks_the_sent_one() {
        let mut status = Status::internal("x");
        status.metadata_mut().insert("x-request-id", "theirs".parse().unwrap());
        assert_eq!(error(&status, "ours").call().unwrap().request_id, "theirs");
    }

    #[test]
    fn reasons_of_others_and_of_the_future_are_unspecified() {
        let foreign = error(&status(Code::Internal, "INTERNAL", "proxy.example"), "");
        assert_eq!(foreign.reason(), ErrorReason::Unspecified);
        assert_eq!(foreign.call().unwrap().reason_name, "");
        let future = error(&status(Code::Internal, "FLUX", ERROR_DOMAIN), "");
        assert_eq!(future.reason(), ErrorReason::Unspecified);
        assert_eq!(future.call().unwrap().reason_name, "FLUX");
    }

    #[test]
    fn an_expired_timer_is_a_deadline_and_another_local_failure_a_lost_connection() {
        let expired = Status::from_error(Box::new(TimeoutExpired(())));
        let late = error(&expired, "sent-id");
        assert_eq!(late.reason(), ErrorReason::Deadline);
        let call = late.call().unwrap();
        assert_eq!((call.code, call.request_id.as_str()), (Code::DeadlineExceeded, "sent-id"));

        let broken = Status::from_error("pipe".into());
        let lost = error(&broken, "");
        assert_eq!(lost.to_string(), "the connection to the daemon is lost: pipe");
        assert!(lost.is_retryable());
    }

    #[test]
    fn a_call_that_finds_no_connection_is_not_one_that_lost_it() {
        let refused = ConnectError(Box::new(std::io::Error::from(std::io::ErrorKind::ConnectionRefused)));
        let error = error(&Status::from_error(Box::new(refused)), "");
        assert_eq!(error.to_string(), "no daemon answers at http://127.0.0.1:7070");
        assert!(error.is_retryable());
    }

    #[test]
    fn only_temporary_conditions_are_retryable() {
        let retryable = |code| error(&Status::new(code, ""), "").is_retryable();
        assert!(retryable(Code::Unavailable));
        for code in [Code::InvalidArgument, Code::Aborted, Code::Internal, Code::ResourceExhausted] {
            assert!(!retryable(code), "{code:?}");
        }
    }
}
