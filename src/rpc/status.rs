//! From an error to a status: code, message, `ErrorInfo` with reason and metadata, and the details that help
//! a client to go on: field, resource, time to retry, missing bytes. Statuses that tonic itself makes get a
//! reason here too.

use std::collections::HashMap;

use tonic::{Code, Response, Status};
use tonic_types::{ErrorDetails, StatusExt};

use super::pb::ErrorReason;
use crate::error::Error;
use crate::limits::Limits;
use crate::service::Reason;

/// The domain of every ErrorInfo.
const DOMAIN: &str = "mlxd.v1";

/// Bytes of a text in a status: it travels in headers, of which clients take 8 KiB, and a caller may have
/// written it (the name of an argument, what a template says of a message).
const TEXT_BYTES_MAX: usize = 1 << 10;

/// Returns a text, or its start.
fn cut(mut text: String) -> String {
    if text.len() > TEXT_BYTES_MAX {
        text.truncate(text.floor_char_boundary(TEXT_BYTES_MAX));
        text.push('…');
    }
    text
}

/// Returns the status of an error. The cause of an internal one goes to the log only, in the request's span.
pub(super) fn status(error: &Error) -> Status {
    if let Error::Internal(cause) = error {
        tracing::error!(cause, "internal error");
    }
    let (code, reason) = wire(Reason::of(error));
    let metadata = error.metadata().into_iter().map(|(key, value)| (key.to_owned(), cut(value)));
    let metadata: HashMap<String, String> = metadata.collect();
    let mut details = ErrorDetails::with_error_info(name(reason), DOMAIN, metadata);
    if let Some(delay) = error.retry_after() {
        details.set_retry_info(Some(delay));
    }
    let message = cut(error.to_string());
    add_details(&mut details, error, &message);
    Status::with_error_details(code, message, details)
}

/// Returns what tonic sends for the outcome of a call.
pub(super) fn answer<T>(outcome: Result<T, Error>) -> Result<Response<T>, Status> {
    outcome.map(Response::new).map_err(|error| status(&error))
}

/// Returns the code and the reason on the wire: the table of `errors.proto`.
const fn wire(reason: Reason) -> (Code, ErrorReason) {
    match reason {
        Reason::InvalidField => (Code::InvalidArgument, ErrorReason::InvalidField),
        Reason::EmptyPrompt => (Code::InvalidArgument, ErrorReason::EmptyPrompt),
        Reason::ContextOverflow => (Code::InvalidArgument, ErrorReason::ContextOverflow),
        Reason::TemplateFailed => (Code::InvalidArgument, ErrorReason::TemplateFailed),
        Reason::MessageTooLarge => (Code::InvalidArgument, ErrorReason::MessageTooLarge),
        Reason::AnswerTooLarge => (Code::ResourceExhausted, ErrorReason::AnswerTooLarge),
        Reason::ModelNotFound => (Code::NotFound, ErrorReason::ModelNotFound),
        Reason::ModelNotLoaded => (Code::FailedPrecondition, ErrorReason::ModelNotLoaded),
        Reason::ModelInvalid => (Code::FailedPrecondition, ErrorReason::ModelInvalid),
        Reason::ModelUnsupported => (Code::FailedPrecondition, ErrorReason::ModelUnsupported),
        Reason::NoChatTemplate => (Code::FailedPrecondition, ErrorReason::NoChatTemplate),
        Reason::ModelTooLarge => (Code::FailedPrecondition, ErrorReason::ModelTooLarge),
        Reason::ModelBusy => (Code::FailedPrecondition, ErrorReason::ModelBusy),
        Reason::MemoryBudget => (Code::ResourceExhausted, ErrorReason::MemoryBudget),
        Reason::ModelUnloaded => (Code::Unavailable, ErrorReason::ModelUnloaded),
        Reason::SessionNotFound => (Code::NotFound, ErrorReason::SessionNotFound),
        Reason::SessionExists => (Code::AlreadyExists, ErrorReason::SessionExists),
        Reason::SessionBusy => (Code::FailedPrecondition, ErrorReason::SessionBusy),
        Reason::SessionMoved => (Code::Aborted, ErrorReason::SessionMoved),
        Reason::SessionWrongModel => (Code::FailedPrecondition, ErrorReason::SessionWrongModel),
        Reason::SessionNotChat => (Code::FailedPrecondition, ErrorReason::SessionNotChat),
        Reason::CannotAppend => (Code::FailedPrecondition, ErrorReason::CannotAppend),
        Reason::SessionTokenizerChanged => (Code::FailedPrecondition, ErrorReason::SessionTokenizerChanged),
        Reason::SessionLimit => (Code::ResourceExhausted, ErrorReason::SessionLimit),
        Reason::QueueFull => (Code::ResourceExhausted, ErrorReason::QueueFull),
        Reason::KvTooLarge => (Code::FailedPrecondition, ErrorReason::KvTooLarge),
        Reason::Deadline => (Code::DeadlineExceeded, ErrorReason::Deadline),
        Reason::DeadlineUnmeetable => (Code::DeadlineExceeded, ErrorReason::DeadlineUnmeetable),
        Reason::SlowReader => (Code::Aborted, ErrorReason::SlowReader),
        Reason::Cancelled => (Code::Cancelled, ErrorReason::Cancelled),
        Reason::Draining => (Code::Unavailable, ErrorReason::Draining),
        Reason::EngineDead => (Code::Unavailable, ErrorReason::EngineDead),
        Reason::NonFiniteLogits => (Code::Internal, ErrorReason::NonFiniteLogits),
        Reason::Internal => (Code::Internal, ErrorReason::Internal),
        Reason::Unauthenticated => (Code::Unauthenticated, ErrorReason::Unauthenticated),
        Reason::PermissionDenied => (Code::PermissionDenied, ErrorReason::PermissionDenied),
        Reason::ModelNotAllowed => (Code::PermissionDenied, ErrorReason::ModelNotAllowed),
        Reason::DownloadFailed => (Code::FailedPrecondition, ErrorReason::DownloadFailed),
        Reason::HubDenied => (Code::FailedPrecondition, ErrorReason::HubDenied),
        Reason::HubUnavailable => (Code::Unavailable, ErrorReason::HubUnavailable),
        Reason::DiskFull => (Code::ResourceExhausted, ErrorReason::DiskFull),
        Reason::SessionDamaged => (Code::DataLoss, ErrorReason::SessionDamaged),
        Reason::SessionUnreadable => (Code::Unavailable, ErrorReason::SessionUnreadable),
        Reason::SessionFileInvalid => (Code::InvalidArgument, ErrorReason::SessionFileInvalid),
        Reason::SessionFileUnsupported => (Code::FailedPrecondition, ErrorReason::SessionFileUnsupported),
        Reason::SnapshotsOff => (Code::FailedPrecondition, ErrorReason::SnapshotsOff),
        Reason::SnapshotFailed => (Code::Unavailable, ErrorReason::SnapshotFailed),
        Reason::SchemaTooLarge => (Code::InvalidArgument, ErrorReason::SchemaTooLarge),
        Reason::SchemaUnsupported => (Code::InvalidArgument, ErrorReason::SchemaUnsupported),
        Reason::GrammarTooComplex => (Code::ResourceExhausted, ErrorReason::GrammarTooComplex),
    }
}

/// Returns a reason as ErrorInfo names it.
fn name(reason: ErrorReason) -> &'static str {
    let name = reason.as_str_name();
    name.strip_prefix("ERROR_REASON_").unwrap_or(name)
}

/// Adds the details that stand beside ErrorInfo and RetryInfo.
fn add_details(details: &mut ErrorDetails, error: &Error, message: &str) {
    match error {
        Error::InvalidField { field, why } => {
            details.add_bad_request_violation(cut(field.clone()), cut(why.clone()));
        }
        Error::SchemaTooLarge { field, .. } | Error::SchemaUnsupported { field, .. } => {
            details.add_bad_request_violation(field.clone(), message);
        }
        Error::EmptyPrompt | Error::ContextOverflow { .. } => {
            details.add_bad_request_violation("input", message);
        }
        Error::TemplateFailed(why) => drop(details.add_bad_request_violation("chat", cut(why.clone()))),
        Error::ModelNotFound { name, .. } => {
            details.set_resource_info("mlxd.v1.Model", cut(name.clone()), "", message);
        }
        Error::SessionNotFound(name) | Error::SessionExists(name) => {
            details.set_resource_info("mlxd.v1.Session", cut(name.clone()), "", message);
        }
        Error::MemoryBudget(shortage) => {
            details.add_quota_failure_violation(format!("model:{}", shortage.model), message);
        }
        Error::KvShortage { .. } | Error::KvCrowded { .. } => {
            details.add_quota_failure_violation("kv", message);
        }
        Error::DiskFull { .. } => drop(details.add_quota_failure_violation("disk", message)),
        Error::SessionLimit { limit, .. } => drop(details.add_quota_failure_violation(*limit, message)),
        Error::QueueFull { .. }
        | Error::WaitingBytes { .. }
        | Error::TooManyOpen { .. }
        | Error::GrammarsBusy { .. }
        | Error::Draining
        | Error::ModelUnloaded(_)
        | Error::MessageTooLarge { .. }
        | Error::AnswerTooLarge { .. }
        | Error::ModelNotLoaded(_)
        | Error::ModelInvalid { .. }
        | Error::ModelIncomplete { .. }
        | Error::ModelNotAllowed { .. }
        | Error::DownloadFailed { .. }
        | Error::HubDenied { .. }
        | Error::HubUnavailable { .. }
        | Error::ModelUnsupported { .. }
        | Error::NoChatTemplate { .. }
        | Error::ModelTooLarge(_)
        | Error::ModelBusy { .. }
        | Error::SessionBusy(_)
        | Error::SessionMoved { .. }
        | Error::SessionWrongModel { .. }
        | Error::SessionNotChat(_)
        | Error::CannotAppend(_)
        | Error::SessionTokenizerChanged(_)
        | Error::SessionDamaged { .. }
        | Error::SessionUnreadable { .. }
        | Error::SessionFileInvalid(_)
        | Error::SessionFileUnsupported { .. }
        | Error::SnapshotsOff(_)
        | Error::SnapshotFailed { .. }
        | Error::KvTooLarge { .. }
        | Error::Deadline
        | Error::DeadlineUnmeetable { .. }
        | Error::SlowReader { .. }
        | Error::SlowSender { .. }
        | Error::Cancelled(_)
        | Error::EngineDead
        | Error::NonFiniteLogits
        | Error::GrammarTooComplex(_)
        | Error::Internal(_)
        | Error::Unauthenticated
        | Error::PermissionDenied
        | Error::OwnerOnly(_) => {}
    }
}

/// Returns a status with a reason for one that tonic made without: a message that is too large or cannot be
/// decoded, an unknown method, a service that health does not know.
pub(super) fn with_reason(bare: &Status, limits: &Limits) -> Status {
    let message = match (bare.code(), bare.message()) {
        (Code::Unimplemented, "") => "this daemon has no such method",
        (_, message) => message,
    };
    // tonic tells which limit was exceeded in the text only.
    if message.contains("decoded message length too large") {
        return status(&Error::MessageTooLarge { limit_bytes: limits.message_bytes_max as u64 });
    }
    if message.contains("encoded message length too large") {
        return status(&Error::AnswerTooLarge { limit_bytes: limits.answer_bytes_max as u64 });
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
    let details = ErrorDetails::with_error_info(name(reason), DOMAIN, HashMap::new());
    Status::with_error_details(bare.code(), message, details)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::error::{MemoryRule, Shortage};

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
    fn what_a_caller_wrote_does_not_fill_the_headers() {
        let long = "ä".repeat(1 << 20);
        let errors = [
            Error::field(format!("chat.template_arguments.{long}"), long.clone()),
            Error::TemplateFailed(long.clone()),
            Error::ModelNotFound { name: long.clone(), problems: String::new() },
        ];
        for error in errors {
            let headers = status(&error).into_http::<()>().into_parts().0.headers;
            let bytes: usize = headers.values().map(http::HeaderValue::len).sum();
            assert!(bytes < 20 << 10, "{bytes}");
        }
    }

    #[test]
    fn details_tell_the_client_what_to_do() {
        let full =
            Error::QueueFull { limit: "queue_length_max", value: 3, retry_after: Duration::from_secs(1) };
        let retry = status(&full).get_error_details().retry_info().unwrap().retry_delay;
        assert_eq!(retry, Some(Duration::from_secs(1)));
        let field = status(&Error::field("sampling.top_p", "must be 0 to 1")).get_error_details();
        assert_eq!(field.bad_request().unwrap().field_violations[0].field, "sampling.top_p");
        let shortage = Shortage {
            model: "m".into(),
            needed_bytes: 3,
            available_bytes: 1,
            budget_bytes: 4,
            rule: MemoryRule::InUse { held_bytes: 3 },
            in_the_way: vec!["a".into(), "b".into()],
        };
        let details = status(&Error::MemoryBudget(Box::new(shortage.clone()))).get_error_details();
        assert!(details.quota_failure().is_some() && details.retry_info().is_some());
        let metadata = &details.error_info().unwrap().metadata;
        let values = ["budget_bytes", "rule", "in_the_way"].map(|key| metadata[key].as_str());
        assert_eq!(values, ["4", "models in use hold 3 bytes", "a,b"]);
        let pinned = Shortage { rule: MemoryRule::Pinned { held_bytes: 3 }, ..shortage };
        let details = status(&Error::MemoryBudget(Box::new(pinned))).get_error_details();
        assert!(details.retry_info().is_none(), "a pin does not pass by itself");
        let kv = status(&Error::KvShortage { needed_bytes: 2, available_bytes: 1 });
        let details = kv.get_error_details();
        assert_eq!(kv.code(), Code::ResourceExhausted);
        assert_eq!(details.error_info().unwrap().reason, "MEMORY_BUDGET");
        assert_eq!(details.error_info().unwrap().metadata["available_bytes"], "1");
        assert!(details.quota_failure().is_some() && details.retry_info().is_some(), "it passes");
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
        let limits = Limits::default();
        let rewritten = with_reason(&large, &limits);
        assert_eq!(
            (rewritten.code(), reason_of(&rewritten)),
            (Code::InvalidArgument, "MESSAGE_TOO_LARGE".into())
        );
        let answer = Status::out_of_range("Error, encoded message length too large: found 9 bytes");
        let rewritten = with_reason(&answer, &limits);
        assert_eq!(
            (rewritten.code(), reason_of(&rewritten)),
            (Code::ResourceExhausted, "ANSWER_TOO_LARGE".into())
        );
        let unknown = with_reason(&Status::unimplemented(""), &limits);
        assert_eq!(reason_of(&unknown), "UNIMPLEMENTED");
        assert!(!unknown.message().is_empty());
        let garbled = with_reason(&Status::internal("failed to decode Protobuf message: x"), &limits);
        assert_eq!((garbled.code(), reason_of(&garbled)), (Code::InvalidArgument, "INVALID_FIELD".into()));
    }
}
