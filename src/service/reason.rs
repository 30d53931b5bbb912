//! The reason of every error and the numbers that go with it, for programs. Edges turn a [`Reason`] into
//! their protocol's code; the names are those of `errors.proto`.

use std::fmt::Display;
use std::time::Duration;

use crate::error::{Error, MemoryRule, Shortage, listed};

/// When to try again after the daemon shut down or a model was unloaded: a restart and a load take seconds.
const RESTART_RETRY: Duration = Duration::from_secs(2);

/// When to try again where a file cannot be read: other files close within a second.
const READ_RETRY: Duration = Duration::from_secs(1);

/// When to try again where models in use leave no room: an answer takes seconds.
const MEMORY_RETRY: Duration = Duration::from_secs(5);
/// When to try again after the device had no memory: others' answers end in seconds.
const SHORTAGE_RETRY: Duration = Duration::from_secs(1);

/// The kind of an error, by which a client decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "each is the Error of the same name, which says what it means")]
pub enum Reason {
    InvalidField,
    EmptyPrompt,
    ContextOverflow,
    TemplateFailed,
    MessageTooLarge,
    AnswerTooLarge,
    ModelNotFound,
    ModelNotLoaded,
    ModelInvalid,
    ModelUnsupported,
    NoChatTemplate,
    ModelTooLarge,
    ModelBusy,
    MemoryBudget,
    ModelUnloaded,
    SessionNotFound,
    SessionExists,
    SessionBusy,
    SessionMoved,
    SessionWrongModel,
    SessionNotChat,
    CannotAppend,
    SessionTokenizerChanged,
    SessionLimit,
    QueueFull,
    KvTooLarge,
    Deadline,
    DeadlineUnmeetable,
    SlowReader,
    Cancelled,
    Draining,
    EngineDead,
    NonFiniteLogits,
    Internal,
    Unauthenticated,
    PermissionDenied,
    ModelNotAllowed,
    DownloadFailed,
    HubDenied,
    HubUnavailable,
    DiskFull,
    SessionDamaged,
    SessionUnreadable,
    SessionFileInvalid,
    SessionFileUnsupported,
    SnapshotsOff,
    SnapshotFailed,
    SchemaTooLarge,
    SchemaUnsupported,
    GrammarTooComplex,
}

impl Reason {
    /// Returns the reason of an error. Exhaustive on purpose: a new variant needs a decision here.
    #[must_use]
    pub const fn of(error: &Error) -> Self {
        match error {
            Error::InvalidField { .. } => Self::InvalidField,
            Error::EmptyPrompt => Self::EmptyPrompt,
            Error::ContextOverflow { .. } => Self::ContextOverflow,
            Error::TemplateFailed(_) => Self::TemplateFailed,
            Error::MessageTooLarge { .. } => Self::MessageTooLarge,
            Error::AnswerTooLarge { .. } => Self::AnswerTooLarge,
            Error::ModelNotFound { .. } => Self::ModelNotFound,
            Error::ModelNotLoaded(_) => Self::ModelNotLoaded,
            Error::ModelInvalid { .. } | Error::ModelIncomplete { .. } => Self::ModelInvalid,
            Error::ModelUnsupported { .. } => Self::ModelUnsupported,
            Error::NoChatTemplate { .. } => Self::NoChatTemplate,
            Error::ModelTooLarge(_) => Self::ModelTooLarge,
            Error::ModelBusy { .. } => Self::ModelBusy,
            Error::MemoryBudget(_) | Error::KvShortage { .. } | Error::KvCrowded { .. } => Self::MemoryBudget,
            Error::ModelUnloaded(_) => Self::ModelUnloaded,
            Error::SessionNotFound(_) => Self::SessionNotFound,
            Error::SessionExists(_) => Self::SessionExists,
            Error::SessionBusy(_) => Self::SessionBusy,
            Error::SessionMoved { .. } => Self::SessionMoved,
            Error::SessionWrongModel { .. } => Self::SessionWrongModel,
            Error::SessionNotChat(_) => Self::SessionNotChat,
            Error::CannotAppend(_) => Self::CannotAppend,
            Error::SessionTokenizerChanged(_) => Self::SessionTokenizerChanged,
            Error::SessionLimit { .. } => Self::SessionLimit,
            Error::SessionDamaged { .. } => Self::SessionDamaged,
            Error::SessionUnreadable { .. } => Self::SessionUnreadable,
            Error::SessionFileInvalid(_) => Self::SessionFileInvalid,
            Error::SessionFileUnsupported { .. } => Self::SessionFileUnsupported,
            Error::SnapshotsOff(_) => Self::SnapshotsOff,
            Error::SnapshotFailed { .. } => Self::SnapshotFailed,
            Error::QueueFull { .. }
            | Error::WaitingBytes { .. }
            | Error::TooManyOpen { .. }
            | Error::GrammarsBusy { .. } => Self::QueueFull,
            Error::KvTooLarge { .. } => Self::KvTooLarge,
            Error::Deadline | Error::SlowSender { .. } => Self::Deadline,
            Error::DeadlineUnmeetable { .. } => Self::DeadlineUnmeetable,
            Error::SlowReader { .. } => Self::SlowReader,
            Error::Cancelled(_) => Self::Cancelled,
            Error::Draining => Self::Draining,
            Error::EngineDead => Self::EngineDead,
            Error::NonFiniteLogits => Self::NonFiniteLogits,
            Error::Internal(_) => Self::Internal,
            Error::Unauthenticated => Self::Unauthenticated,
            Error::PermissionDenied | Error::OwnerOnly(_) => Self::PermissionDenied,
            Error::ModelNotAllowed { .. } => Self::ModelNotAllowed,
            Error::DownloadFailed { .. } => Self::DownloadFailed,
            Error::HubDenied { .. } => Self::HubDenied,
            Error::HubUnavailable { .. } => Self::HubUnavailable,
            Error::DiskFull { .. } => Self::DiskFull,
            Error::SchemaTooLarge { .. } => Self::SchemaTooLarge,
            Error::SchemaUnsupported { .. } => Self::SchemaUnsupported,
            Error::GrammarTooComplex(_) => Self::GrammarTooComplex,
        }
    }
}

impl Error {
    /// Returns when to try again, for an error that passes by itself.
    #[must_use]
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::QueueFull { retry_after, .. }
            | Self::WaitingBytes { retry_after, .. }
            | Self::TooManyOpen { retry_after, .. }
            | Self::GrammarsBusy { retry_after, .. }
            | Self::SnapshotFailed { retry_after, .. }
            | Self::HubUnavailable { retry_after, .. } => Some(*retry_after),
            Self::Draining | Self::ModelUnloaded(_) => Some(RESTART_RETRY),
            Self::SessionUnreadable { .. } => Some(READ_RETRY),
            Self::MemoryBudget(shortage) => match shortage.rule {
                MemoryRule::InUse { .. } => Some(MEMORY_RETRY),
                // A pin, the budget and the machine do not change by themselves.
                MemoryRule::Pinned { .. } | MemoryRule::WholeBudget | MemoryRule::System => None,
            },
            Self::KvShortage { .. } => Some(SHORTAGE_RETRY),
            Self::KvCrowded { .. } => Some(MEMORY_RETRY),
            Self::InvalidField { .. }
            | Self::EmptyPrompt
            | Self::ContextOverflow { .. }
            | Self::TemplateFailed(_)
            | Self::MessageTooLarge { .. }
            | Self::AnswerTooLarge { .. }
            | Self::ModelNotFound { .. }
            | Self::ModelNotLoaded(_)
            | Self::ModelInvalid { .. }
            | Self::ModelIncomplete { .. }
            | Self::ModelUnsupported { .. }
            | Self::ModelNotAllowed { .. }
            | Self::DownloadFailed { .. }
            | Self::HubDenied { .. }
            | Self::DiskFull { .. }
            | Self::NoChatTemplate { .. }
            | Self::ModelTooLarge(_)
            | Self::ModelBusy { .. }
            | Self::SessionNotFound(_)
            | Self::SessionExists(_)
            | Self::SessionBusy(_)
            | Self::SessionMoved { .. }
            | Self::SessionWrongModel { .. }
            | Self::SessionNotChat(_)
            | Self::CannotAppend(_)
            | Self::SessionTokenizerChanged(_)
            | Self::SessionLimit { .. }
            | Self::SessionDamaged { .. }
            | Self::SessionFileInvalid(_)
            | Self::SessionFileUnsupported { .. }
            | Self::SnapshotsOff(_)
            | Self::KvTooLarge { .. }
            | Self::Deadline
            | Self::DeadlineUnmeetable { .. }
            | Self::SlowReader { .. }
            | Self::SlowSender { .. }
            | Self::Cancelled(_)
            | Self::EngineDead
            | Self::NonFiniteLogits
            | Self::SchemaTooLarge { .. }
            | Self::SchemaUnsupported { .. }
            | Self::GrammarTooComplex(_)
            | Self::Internal(_)
            | Self::Unauthenticated
            | Self::PermissionDenied
            | Self::OwnerOnly(_) => None,
        }
    }

    /// Returns the numbers and names in the message, by key.
    #[must_use]
    pub fn metadata(&self) -> Vec<(&'static str, String)> {
        match self {
            Self::InvalidField { field, .. } => vec![("field", field.clone())],
            Self::OwnerOnly(field) => vec![("field", (*field).to_owned())],
            Self::ContextOverflow { prompt_tokens, context_length } => {
                pairs(&[("prompt_tokens", prompt_tokens), ("context_length", context_length)])
            }
            Self::MessageTooLarge { limit_bytes } | Self::AnswerTooLarge { limit_bytes } => {
                vec![("limit_bytes", limit_bytes.to_string())]
            }
            Self::ModelNotFound { name, .. } => vec![("model", name.clone())],
            Self::ModelNotLoaded(model)
            | Self::ModelInvalid { model, .. }
            | Self::ModelIncomplete { model, .. }
            | Self::ModelUnsupported { model, .. }
            | Self::DownloadFailed { model, .. }
            | Self::HubDenied { model, .. }
            | Self::HubUnavailable { model, .. }
            | Self::NoChatTemplate { model, .. }
            | Self::SessionTokenizerChanged(model)
            | Self::ModelUnloaded(model) => vec![("model", model.to_string())],
            Self::SnapshotsOff(key) => vec![("key", (*key).to_owned())],
            Self::ModelNotAllowed { model, key } => pairs(&[("model", model), ("key", key)]),
            Self::DiskFull { model, needed_bytes, available_bytes } => {
                bytes_metadata_with(*needed_bytes, *available_bytes, "model", model.to_string())
            }
            Self::ModelBusy { model, running } => pairs(&[("model", model), ("running", running)]),
            Self::ModelTooLarge(shortage) | Self::MemoryBudget(shortage) => shortage_metadata(shortage),
            Self::KvTooLarge { needed_bytes, available_bytes }
            | Self::KvShortage { needed_bytes, available_bytes } => {
                bytes_metadata(*needed_bytes, *available_bytes).into()
            }
            Self::KvCrowded { needed_bytes, available_bytes, in_the_way } => {
                bytes_metadata_with(*needed_bytes, *available_bytes, "in_the_way", listed(in_the_way, ","))
            }
            Self::SessionMoved { session, expected, actual } => {
                pairs(&[("session", session), ("expected", expected), ("actual", actual)])
            }
            Self::SessionWrongModel { session, model } => pairs(&[("session", session), ("model", model)]),
            Self::SessionNotFound(name) | Self::SessionExists(name) => vec![("session", name.clone())],
            Self::SessionBusy(session)
            | Self::SessionNotChat(session)
            | Self::SessionDamaged { session, .. }
            | Self::SessionUnreadable { session, .. }
            | Self::SnapshotFailed { session, .. } => pairs(&[("session", session)]),
            Self::QueueFull { limit, value, .. } => pairs(&[("limit", limit), ("value", value)]),
            Self::SessionLimit { limit, value }
            | Self::WaitingBytes { limit, value, .. }
            | Self::GrammarsBusy { limit, value, .. }
            | Self::TooManyOpen { limit, value, .. } => pairs(&[("limit", limit), ("value", value)]),
            Self::DeadlineUnmeetable { needed, available } => deadline_metadata(*needed, *available),
            Self::SlowReader { limit } => seconds_metadata("slow_reader_s", *limit),
            Self::SlowSender { limit } => seconds_metadata("receive_s", *limit),
            Self::SessionFileUnsupported { found, known } => format_metadata(*found, *known),
            Self::SchemaTooLarge { field, limit, value } => limit_metadata(field, limit, *value),
            Self::SchemaUnsupported { field, path, keyword, .. } => schema_metadata(field, path, keyword),
            Self::EmptyPrompt
            | Self::CannotAppend(_)
            | Self::SessionFileInvalid(_)
            | Self::TemplateFailed(_)
            | Self::Deadline
            | Self::Cancelled(_)
            | Self::Draining
            | Self::EngineDead
            | Self::NonFiniteLogits
            | Self::GrammarTooComplex(_)
            | Self::Internal(_)
            | Self::Unauthenticated
            | Self::PermissionDenied => Vec::new(),
        }
    }
}

fn pairs(named: &[(&'static str, &dyn Display)]) -> Vec<(&'static str, String)> {
    named.iter().map(|(name, value)| (*name, value.to_string())).collect()
}

fn deadline_metadata(needed: Duration, available: Duration) -> Vec<(&'static str, String)> {
    pairs(&[("needed_ms", &needed.as_millis()), ("available_ms", &available.as_millis())])
}

fn limit_metadata(field: &str, limit: &str, value: u64) -> Vec<(&'static str, String)> {
    pairs(&[("field", &field), ("limit", &limit), ("value", &value)])
}

fn schema_metadata(field: &str, path: &str, keyword: &str) -> Vec<(&'static str, String)> {
    pairs(&[("field", &field), ("path", &path), ("keyword", &keyword)])
}

fn format_metadata(found: u32, known: u32) -> Vec<(&'static str, String)> {
    pairs(&[("format", &found), ("format_max", &known)])
}

fn seconds_metadata(limit: &str, value: Duration) -> Vec<(&'static str, String)> {
    vec![("limit", limit.to_owned()), ("value", value.as_secs().to_string())]
}

fn bytes_metadata(needed_bytes: u64, available_bytes: u64) -> [(&'static str, String); 2] {
    [("needed_bytes", needed_bytes.to_string()), ("available_bytes", available_bytes.to_string())]
}

fn bytes_metadata_with(
    needed_bytes: u64,
    available_bytes: u64,
    key: &'static str,
    value: String,
) -> Vec<(&'static str, String)> {
    let [needed, available] = bytes_metadata(needed_bytes, available_bytes);
    vec![needed, available, (key, value)]
}

fn shortage_metadata(shortage: &Shortage) -> Vec<(&'static str, String)> {
    let Shortage { model, needed_bytes, available_bytes, budget_bytes, rule, in_the_way } = shortage;
    let [needed, available] = bytes_metadata(*needed_bytes, *available_bytes);
    vec![
        ("model", model.to_string()),
        needed,
        available,
        ("budget_bytes", budget_bytes.to_string()),
        ("rule", rule.to_string()),
        ("in_the_way", listed(in_the_way, ",")),
    ]
}
