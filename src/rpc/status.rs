//! From an error to a status: code, message, `ErrorInfo` with reason and metadata, and what helps to go on:
//! the field, the resource, when to try again, how many bytes are missing. Also the statuses that tonic
//! itself makes get a reason here.

use std::collections::HashMap;
use std::time::Duration;

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

use super::pb::ErrorReason;
use super::reason;
use crate::error::Error;

/// The domain of every ErrorInfo.
const DOMAIN: &str = "mlxd.v1";

/// When to come back to a daemon that shuts down or lost a model: a restart and a load take seconds.
const RESTART_RETRY: Duration = Duration::from_secs(2);

/// The status of an error. What only the log may know is logged, in the request's span.
pub(super) fn status(error: &Error) -> Status {
    if let Error::Internal(cause) = error {
        tracing::error!(cause, "internal error");
    }
    let (code, reason) = reason::of(error);
    let mut details = ErrorDetails::with_error_info(reason::name(reason), DOMAIN, metadata(error));
    add_details(&mut details, error);
    Status::with_error_details(code, error.to_string(), details)
}

/// The numbers and names in the message, for programs.
fn metadata(error: &Error) -> HashMap<String, String> {
    let pairs: Vec<(&str, String)> = match error {
        Error::InvalidField { field, .. } => vec![("field", field.clone())],
        Error::ContextOverflow { prompt_tokens, context_length } => {
            vec![("prompt_tokens", prompt_tokens.to_string()), ("context_length", context_length.to_string())]
        }
        Error::MessageTooLarge { limit_bytes } => vec![("limit_bytes", limit_bytes.to_string())],
        Error::ModelNotLoaded(model)
        | Error::ModelInvalid { model, .. }
        | Error::ModelUnsupported { model, .. }
        | Error::NoChatTemplate(model)
        | Error::ModelUnloaded(model) => vec![("model", model.to_string())],
        Error::ModelBusy { model, running } => {
            vec![("model", model.to_string()), ("running", running.to_string())]
        }
        Error::ModelTooLarge { model, needed_bytes, available_bytes }
        | Error::MemoryBudget { model, needed_bytes, available_bytes } => vec![
            ("model", model.to_string()),
            ("needed_bytes", needed_bytes.to_string()),
            ("available_bytes", available_bytes.to_string()),
        ],
        Error::KvTooLarge { needed_bytes, available_bytes } => {
            vec![("needed_bytes", needed_bytes.to_string()), ("available_bytes", available_bytes.to_string())]
        }
        Error::SessionMoved { session, expected, actual } => vec![
            ("session", session.to_string()),
            ("expected", expected.to_string()),
            ("actual", actual.to_string()),
        ],
        Error::SessionWrongModel { session, model } => {
            vec![("session", session.to_string()), ("model", model.to_string())]
        }
        Error::ModelNotFound(name) => vec![("model", name.clone())],
        Error::SessionNotFound(name) | Error::SessionExists(name) => vec![("session", name.clone())],
        Error::SessionBusy(session) | Error::SessionNotChat(session) => {
            vec![("session", session.to_string())]
        }
        Error::SessionLimit { limit } => {
            vec![("limit", "sessions_max".into()), ("value", limit.to_string())]
        }
        Error::QueueFull { limit, value, .. } => {
            vec![("limit", (*limit).to_owned()), ("value", value.to_string())]
        }
        Error::DeadlineUnmeetable { needed, available } => vec![
            ("needed_ms", needed.as_millis().to_string()),
            ("available_ms", available.as_millis().to_string()),
        ],
        Error::SlowReader { limit } => {
            vec![("limit", "slow_reader_s".into()), ("value", limit.as_secs().to_string())]
        }
        Error::EmptyPrompt
        | Error::TemplateFailed(_)
        | Error::Deadline
        | Error::Cancelled(_)
        | Error::Draining
        | Error::EngineDead
        | Error::NonFiniteLogits
        | Error::Internal(_)
        | Error::Unauthenticated
        | Error::PermissionDenied => Vec::new(),
    };
    pairs.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
}

/// The details that stand beside ErrorInfo.
fn add_details(details: &mut ErrorDetails, error: &Error) {
    match error {
        Error::InvalidField { field, why } => drop(details.add_bad_request_violation(field, why)),
        Error::EmptyPrompt | Error::ContextOverflow { .. } => {
            details.add_bad_request_violation("input", error.to_string());
        }
        Error::TemplateFailed(why) => drop(details.add_bad_request_violation("chat", why)),
        Error::ModelNotFound(name) => {
            details.set_resource_info("mlxd.v1.Model", name, "", error.to_string());
        }
        Error::SessionNotFound(name) | Error::SessionExists(name) => {
            details.set_resource_info("mlxd.v1.Session", name, "", error.to_string());
        }
        Error::MemoryBudget { model, .. } => {
            details.add_quota_failure_violation(format!("model:{model}"), error.to_string());
        }
        Error::SessionLimit { .. } => {
            details.add_quota_failure_violation("sessions_max", error.to_string());
        }
        Error::QueueFull { retry_after, .. } => drop(details.set_retry_info(Some(*retry_after))),
        Error::Draining | Error::ModelUnloaded(_) => drop(details.set_retry_info(Some(RESTART_RETRY))),
        Error::MessageTooLarge { .. }
        | Error::ModelNotLoaded(_)
        | Error::ModelInvalid { .. }
        | Error::ModelUnsupported { .. }
        | Error::NoChatTemplate(_)
        | Error::ModelTooLarge { .. }
        | Error::ModelBusy { .. }
        | Error::SessionBusy(_)
        | Error::SessionMoved { .. }
        | Error::SessionWrongModel { .. }
        | Error::SessionNotChat(_)
        | Error::KvTooLarge { .. }
        | Error::Deadline
        | Error::DeadlineUnmeetable { .. }
        | Error::SlowReader { .. }
        | Error::Cancelled(_)
        | Error::EngineDead
        | Error::NonFiniteLogits
        | Error::Internal(_)
        | Error::Unauthenticated
        | Error::PermissionDenied => {}
    }
}

/// A status with a reason for one that tonic made without: a message that is too large or cannot be
/// decoded, a method that does not exist, a service that health does not know.
pub(super) fn with_reason(bare: &Status, message_bytes_max: usize) -> Status {
    let message = match (bare.code(), bare.message()) {
        (Code::Unimplemented, "") => "this daemon has no such method",
        (_, message) => message,
    };
    // tonic says which limit was met in the text only.
    if message.contains("message length too large") {
        return status(&Error::MessageTooLarge { limit_bytes: message_bytes_max as u64 });
    }
    if bare.code() == Code::Internal && message.contains("decode") {
        return status(&Error::field("message", message));
    }
    let reason = match bare.code() {
        Code::Unimplemented => ErrorReason::Unimplemented,
        Code::Cancelled => ErrorReason::Cancelled,
        Code::DeadlineExceeded => ErrorReason::Deadline,
        Code::InvalidArgument | Code::NotFound | Code::OutOfRange => ErrorReason::InvalidField,
        Code::Unauthenticated => ErrorReason::Unauthenticated,
        Code::PermissionDenied => ErrorReason::PermissionDenied,
        Code::Ok
        | Code::Unknown
        | Code::AlreadyExists
        | Code::ResourceExhausted
        | Code::FailedPrecondition
        | Code::Aborted
        | Code::Internal
        | Code::Unavailable
        | Code::DataLoss => ErrorReason::Internal,
    };
    let details = ErrorDetails::with_error_info(reason::name(reason), DOMAIN, HashMap::new());
    Status::with_error_details(bare.code(), message, details)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reason_of(status: &Status) -> String {
        status.get_error_details().error_info().unwrap().reason.clone()
    }

    #[test]
    fn every_status_has_reason_domain_and_numbers() {
        let error = Error::SessionMoved { session: "s".into(), expected: 1, actual: 2 };
        let status = status(&error);
        let details = status.get_error_details();
        let info = details.error_info().unwrap();
        assert_eq!((status.code(), info.reason.as_str()), (Code::Aborted, "SESSION_MOVED"));
        assert_eq!((info.domain.as_str(), info.metadata["actual"].as_str()), ("mlxd.v1", "2"));
    }

    #[test]
    fn details_say_what_to_do() {
        let full =
            Error::QueueFull { limit: "queue_length_max", value: 3, retry_after: Duration::from_secs(1) };
        let retry = status(&full).get_error_details().retry_info().unwrap().retry_delay;
        assert_eq!(retry, Some(Duration::from_secs(1)));
        let field = status(&Error::field("sampling.top_p", "must be 0 to 1")).get_error_details();
        assert_eq!(field.bad_request().unwrap().field_violations[0].field, "sampling.top_p");
        let bytes = Error::MemoryBudget { model: "m".into(), needed_bytes: 2, available_bytes: 1 };
        assert!(status(&bytes).get_error_details().quota_failure().is_some());
    }

    #[test]
    fn the_cause_of_an_internal_error_stays_inside() {
        let status = status(&Error::Internal("secret".into()));
        assert_eq!(status.message(), "internal error");
        assert!(!String::from_utf8_lossy(status.details()).contains("secret"));
    }

    #[test]
    fn statuses_of_tonic_get_a_reason() {
        let large = Status::out_of_range("Error, decoded message length too large: found 9 bytes");
        let rewritten = with_reason(&large, 7);
        assert_eq!(
            (rewritten.code(), reason_of(&rewritten)),
            (Code::InvalidArgument, "MESSAGE_TOO_LARGE".into())
        );
        let unknown = with_reason(&Status::unimplemented(""), 7);
        assert_eq!(reason_of(&unknown), "UNIMPLEMENTED");
        assert!(!unknown.message().is_empty());
        let garbled = with_reason(&Status::internal("failed to decode Protobuf message: x"), 7);
        assert_eq!((garbled.code(), reason_of(&garbled)), (Code::InvalidArgument, "INVALID_FIELD".into()));
    }
}
