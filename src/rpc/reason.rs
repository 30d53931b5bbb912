//! The reason and the canonical code of every error: the table of `errors.proto`.

use tonic::Code;

use super::pb::ErrorReason;
use crate::error::Error;

/// What a client decides by. Exhaustive on purpose: a new variant must be thought of here.
pub(super) const fn of(error: &Error) -> (Code, ErrorReason) {
    match error {
        Error::InvalidField { .. } => (Code::InvalidArgument, ErrorReason::InvalidField),
        Error::EmptyPrompt => (Code::InvalidArgument, ErrorReason::EmptyPrompt),
        Error::ContextOverflow { .. } => (Code::InvalidArgument, ErrorReason::ContextOverflow),
        Error::TemplateFailed(_) => (Code::InvalidArgument, ErrorReason::TemplateFailed),
        Error::MessageTooLarge { .. } => (Code::InvalidArgument, ErrorReason::MessageTooLarge),
        Error::ModelNotFound(_) => (Code::NotFound, ErrorReason::ModelNotFound),
        Error::ModelNotLoaded(_) => (Code::FailedPrecondition, ErrorReason::ModelNotLoaded),
        Error::ModelInvalid { .. } => (Code::FailedPrecondition, ErrorReason::ModelInvalid),
        Error::ModelUnsupported { .. } => (Code::FailedPrecondition, ErrorReason::ModelUnsupported),
        Error::NoChatTemplate(_) => (Code::FailedPrecondition, ErrorReason::NoChatTemplate),
        Error::ModelTooLarge { .. } => (Code::FailedPrecondition, ErrorReason::ModelTooLarge),
        Error::ModelBusy { .. } => (Code::FailedPrecondition, ErrorReason::ModelBusy),
        Error::MemoryBudget { .. } => (Code::ResourceExhausted, ErrorReason::MemoryBudget),
        Error::ModelUnloaded(_) => (Code::Unavailable, ErrorReason::ModelUnloaded),
        Error::SessionNotFound(_) => (Code::NotFound, ErrorReason::SessionNotFound),
        Error::SessionExists(_) => (Code::AlreadyExists, ErrorReason::SessionExists),
        Error::SessionBusy(_) => (Code::FailedPrecondition, ErrorReason::SessionBusy),
        Error::SessionMoved { .. } => (Code::Aborted, ErrorReason::SessionMoved),
        Error::SessionWrongModel { .. } => (Code::FailedPrecondition, ErrorReason::SessionWrongModel),
        Error::SessionNotChat(_) => (Code::FailedPrecondition, ErrorReason::SessionNotChat),
        Error::SessionLimit { .. } => (Code::ResourceExhausted, ErrorReason::SessionLimit),
        Error::QueueFull { .. } => (Code::ResourceExhausted, ErrorReason::QueueFull),
        Error::DeadlineUnmeetable { .. } => (Code::DeadlineExceeded, ErrorReason::DeadlineUnmeetable),
        Error::SlowReader { .. } => (Code::Aborted, ErrorReason::SlowReader),
        Error::KvTooLarge { .. } => (Code::FailedPrecondition, ErrorReason::KvTooLarge),
        Error::Deadline => (Code::DeadlineExceeded, ErrorReason::Deadline),
        Error::Cancelled(_) => (Code::Cancelled, ErrorReason::Cancelled),
        Error::Draining => (Code::Unavailable, ErrorReason::Draining),
        Error::EngineDead => (Code::Unavailable, ErrorReason::EngineDead),
        Error::NonFiniteLogits => (Code::Internal, ErrorReason::NonFiniteLogits),
        Error::Internal(_) => (Code::Internal, ErrorReason::Internal),
        Error::Unauthenticated => (Code::Unauthenticated, ErrorReason::Unauthenticated),
        Error::PermissionDenied => (Code::PermissionDenied, ErrorReason::PermissionDenied),
    }
}

/// The reason as it stands in ErrorInfo.
pub(super) fn name(reason: ErrorReason) -> &'static str {
    let name = reason.as_str_name();
    name.strip_prefix("ERROR_REASON_").unwrap_or(name)
}
