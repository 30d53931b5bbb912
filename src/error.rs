//! The errors of calls, by what the caller can do about them. `service/reason.rs` gives each its reason and
//! metadata, `rpc/status.rs` its status. `Display` goes to the caller; causes go to the log.

use std::fmt;
use std::time::Duration;

use crate::ids::{ModelName, SessionName};

/// Why a model is not loaded: the numbers, the rule, and what is in the way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shortage {
    /// The model.
    pub model: ModelName,
    /// Bytes it needs, with the KV cache that it must have room for.
    pub needed_bytes: u64,
    /// Bytes it could have, those that evictions free included.
    pub available_bytes: u64,
    /// The whole budget.
    pub budget_bytes: u64,
    /// The rule that refuses it.
    pub rule: MemoryRule,
    /// Models that would have to go.
    pub in_the_way: Vec<ModelName>,
}

/// A rule that keeps a model out of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemoryRule {
    /// It exceeds the budget even alone.
    WholeBudget,
    /// Pinned models stay.
    Pinned {
        /// Bytes that they hold.
        held_bytes: u64,
    },
    /// Models in use stay, and a load that runs keeps its bytes.
    InUse {
        /// Bytes that they hold.
        held_bytes: u64,
    },
    /// The system would not give the memory, whatever the budget says.
    System,
}

impl fmt::Display for MemoryRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::WholeBudget => f.write_str("larger than the whole budget"),
            Self::Pinned { held_bytes } => write!(f, "pinned models hold {held_bytes} bytes"),
            Self::InUse { held_bytes } => write!(f, "models in use hold {held_bytes} bytes"),
            Self::System => f.write_str("the system has no more memory"),
        }
    }
}

impl fmt::Display for Shortage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { model, needed_bytes, available_bytes, budget_bytes, rule, in_the_way } = self;
        write!(f, "the model {model} needs {needed_bytes} bytes; ")?;
        match rule {
            MemoryRule::WholeBudget => write!(f, "the whole budget is {budget_bytes}")?,
            MemoryRule::Pinned { .. } | MemoryRule::InUse { .. } | MemoryRule::System => {
                write!(f, "{available_bytes} of a budget of {budget_bytes} can be made free: {rule}")?;
            }
        }
        if in_the_way.is_empty() {
            return Ok(());
        }
        write!(f, "; these would have to go: {}", listed(in_the_way, ", "))
    }
}

/// Returns the names of models as a list.
pub(crate) fn listed(models: &[ModelName], between: &str) -> String {
    models.iter().map(ModelName::as_str).collect::<Vec<_>>().join(between)
}

/// Returns a place in a schema, for people.
fn place(pointer: &str) -> &str {
    if pointer.is_empty() { "the root" } else { pointer }
}

/// The cause of a failed call.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Error {
    /// A field is missing, malformed or out of range.
    #[error("{field}: {why}")]
    InvalidField {
        /// Path of the field, as in `sampling.top_p`.
        field: String,
        /// What is wrong with it.
        why: String,
    },
    /// The input has no token.
    #[error("the input is empty")]
    EmptyPrompt,
    /// The input leaves no room in the context.
    #[error(
        "the input has at least {prompt_tokens} tokens; the model's context of {context_length} leaves no room for an answer"
    )]
    ContextOverflow {
        /// Tokens of the input, the session's included; of a long one only as many as were counted.
        prompt_tokens: u32,
        /// Tokens the model can hold.
        context_length: u32,
    },
    /// The chat template refused the messages.
    #[error("the model's chat template refused the messages: {0}")]
    TemplateFailed(String),
    /// The message exceeds the size limit.
    #[error("message_bytes_max: a message may have at most {limit_bytes} bytes")]
    MessageTooLarge {
        /// The limit.
        limit_bytes: u64,
    },
    /// The answer exceeds the size limit.
    #[error(
        "answer_bytes_max: an answer may have at most {limit_bytes} bytes; streams and pages are sent in smaller parts"
    )]
    AnswerTooLarge {
        /// The limit.
        limit_bytes: u64,
    },
    /// There is no model of this name.
    #[error("{problems}no model named {name:?} under the model roots or in the Hugging Face cache")]
    ModelNotFound {
        /// The name asked for.
        name: String,
        /// What is wrong with the model roots; empty or sentences that end with `; `.
        problems: String,
    },
    /// The model is not resident, and loading on demand is off.
    #[error("the model {0} is not loaded")]
    ModelNotLoaded(ModelName),
    /// The owner does not let calls load or download the model.
    #[error("{model}: `{key}` does not allow it")]
    ModelNotAllowed {
        /// The model.
        model: ModelName,
        /// The configuration key that would allow it.
        key: &'static str,
    },
    /// The download failed, and will until somebody has looked at it.
    #[error("the model {model} cannot be downloaded: {why}")]
    DownloadFailed {
        /// The model.
        model: ModelName,
        /// What is wrong with the hub's answer, the environment or the cache's disk.
        why: String,
    },
    /// The hub refuses the daemon.
    #[error("the model {model} cannot be downloaded: {why}")]
    HubDenied {
        /// The model.
        model: ModelName,
        /// What the hub said, and what the owner can do.
        why: String,
    },
    /// The hub does not answer now.
    #[error("the model {model} cannot be downloaded now: {why}")]
    HubUnavailable {
        /// The model.
        model: ModelName,
        /// What failed.
        why: String,
        /// Delay before the next try.
        retry_after: Duration,
    },
    /// The disk of the Hugging Face cache has no room for the model.
    #[error("the download of {model} needs {needed_bytes} bytes; the disk has {available_bytes} free")]
    DiskFull {
        /// The model.
        model: ModelName,
        /// Bytes still to write, and those that stay free.
        needed_bytes: u64,
        /// Bytes free.
        available_bytes: u64,
    },
    /// The model's files are damaged.
    #[error("the model {model} cannot be used: {why}")]
    ModelInvalid {
        /// The model.
        model: ModelName,
        /// What is wrong with its files.
        why: String,
    },
    /// The model was not downloaded completely.
    #[error("the model {model} cannot be used: {why}")]
    ModelIncomplete {
        /// The model.
        model: ModelName,
        /// What is missing.
        why: String,
    },
    /// The model needs an architecture or option that is not implemented.
    #[error("the model {model} is not supported: {why}")]
    ModelUnsupported {
        /// The model.
        model: ModelName,
        /// The missing architecture or option.
        why: String,
    },
    /// The model has no chat template that can be used.
    #[error("the model {model} has no usable chat template ({why}); use prompt or token_ids")]
    NoChatTemplate {
        /// The model.
        model: ModelName,
        /// What is wrong with it, or that there is none.
        why: String,
    },
    /// The model exceeds the whole memory budget.
    #[error("{0}")]
    ModelTooLarge(Box<Shortage>),
    /// Requests for the model run or wait.
    #[error("the model {model} is busy: {running} requests run or wait")]
    ModelBusy {
        /// The model.
        model: ModelName,
        /// Their number.
        running: u32,
    },
    /// The model does not fit beside those that stay.
    #[error("{0}")]
    MemoryBudget(Box<Shortage>),
    /// The model was unloaded while the request waited.
    #[error("the model {0} was unloaded while the request waited")]
    ModelUnloaded(ModelName),
    /// The caller has no such session.
    #[error("no session named {0:?}")]
    SessionNotFound(String),
    /// The caller already has a session of this name.
    #[error("a session named {0:?} already exists")]
    SessionExists(String),
    /// A turn runs in the session.
    #[error("the session {0} is busy: a turn is running")]
    SessionBusy(SessionName),
    /// The session's token count is not the expected one.
    #[error("the session {session} has {actual} tokens, not {expected}")]
    SessionMoved {
        /// The session.
        session: SessionName,
        /// Token count that the caller expected.
        expected: u32,
        /// Token count that it has.
        actual: u32,
    },
    /// The session is bound to another model.
    #[error("the session {session} is bound to the model {model}")]
    SessionWrongModel {
        /// The session.
        session: SessionName,
        /// Its model.
        model: ModelName,
    },
    /// A chat turn cannot follow raw ones.
    #[error("the session {0} has raw turns; a chat turn cannot follow them")]
    SessionNotChat(SessionName),
    /// A turn cannot follow the session's tokens as they are.
    #[error("history append: {0}; auto or rerender takes this turn")]
    CannotAppend(&'static str),
    /// A session's tokens are of another tokenizer.
    #[error(
        "the tokens are of another tokenizer than {0} has now; a chat turn tokenizes its conversation anew"
    )]
    SessionTokenizerChanged(ModelName),
    /// The session was stored, and what is stored cannot be read.
    #[error("the session {session} is damaged: {why}; it can only be deleted")]
    SessionDamaged {
        /// The session.
        session: SessionName,
        /// What is wrong.
        why: String,
    },
    /// The session was stored, and its file cannot be read now.
    #[error("the session {session} cannot be read now: {why}")]
    SessionUnreadable {
        /// The session.
        session: SessionName,
        /// What the system says.
        why: String,
    },
    /// What was sent as a session's file is none.
    #[error("the file is not a session as it was exported: {0}")]
    SessionFileInvalid(String),
    /// A session's file is of a newer format.
    #[error("the file has format {found}; this daemon reads formats up to {known}")]
    SessionFileUnsupported {
        /// Its format.
        found: u32,
        /// The newest that is known.
        known: u32,
    },
    /// KV caches are not written to disk.
    #[error("KV caches are not kept on disk: `{0}` or `state_dir` is off")]
    SnapshotsOff(&'static str),
    /// A session's KV cache could not be written to disk.
    #[error("the KV cache of the session {session} was not saved: {why}")]
    SnapshotFailed {
        /// The session.
        session: SessionName,
        /// What the disk or the device said.
        why: String,
        /// Delay before the next try.
        retry_after: Duration,
    },
    /// The caller has reached what it may hold in sessions.
    #[error("{limit}: at most {value}")]
    SessionLimit {
        /// The limit's name.
        limit: &'static str,
        /// The limit, in sessions or bytes.
        value: u64,
    },
    /// Too many requests wait.
    #[error("{limit}: {value} requests are waiting already")]
    QueueFull {
        /// The limit's name.
        limit: &'static str,
        /// The limit.
        value: u32,
        /// Delay before the next try.
        retry_after: Duration,
    },
    /// Too many bytes of requests wait for downloads.
    #[error("{limit}: requests of {value} bytes may wait for a download, and no more")]
    WaitingBytes {
        /// The limit's name.
        limit: &'static str,
        /// The limit.
        value: u64,
        /// Delay before the next try.
        retry_after: Duration,
    },
    /// Too many connections or files are open.
    #[error("{limit}: {value} are open already")]
    TooManyOpen {
        /// The limit's name.
        limit: &'static str,
        /// The limit.
        value: u64,
        /// Delay before the next try.
        retry_after: Duration,
    },
    /// The request's KV cache can never fit.
    #[error(
        "the KV cache of this request needs {needed_bytes} bytes; at most {available_bytes} are available"
    )]
    KvTooLarge {
        /// Bytes it needs.
        needed_bytes: u64,
        /// Bytes that the budget leaves beside the weights.
        available_bytes: u64,
    },
    /// The device has no memory for the request's KV cache now.
    #[error("the KV cache of this request needs {needed_bytes} bytes; the device has {available_bytes} now")]
    KvShortage {
        /// Bytes it needs.
        needed_bytes: u64,
        /// Bytes that the device would give.
        available_bytes: u64,
    },
    /// The request's KV cache would fit without models that others keep in use.
    #[error(
        "the KV cache of this request needs {needed_bytes} bytes; {available_bytes} are available beside models in use: {}",
        listed(.in_the_way, ", ")
    )]
    KvCrowded {
        /// Bytes it needs.
        needed_bytes: u64,
        /// Bytes that the budget leaves beside the weights of models that stay for now.
        available_bytes: u64,
        /// The models that others keep in use.
        in_the_way: Vec<ModelName>,
    },
    /// The call's deadline passed.
    #[error("the deadline passed")]
    Deadline,
    /// The first token would come after the call's deadline.
    #[error("the first token takes at least {needed:.1?}; the deadline leaves {available:.1?}")]
    DeadlineUnmeetable {
        /// Shortest time to the first token.
        needed: Duration,
        /// Time until the deadline.
        available: Duration,
    },
    /// The caller does not read its stream.
    #[error("slow_reader_s: the caller read nothing of the stream for {limit:?}")]
    SlowReader {
        /// The limit.
        limit: Duration,
    },
    /// The request does not arrive.
    #[error("receive_s: the request did not arrive within {limit:?}")]
    SlowSender {
        /// The limit.
        limit: Duration,
    },
    /// The work was cancelled.
    #[error("cancelled: {0}")]
    Cancelled(String),
    /// The daemon is shutting down.
    #[error("the daemon is shutting down")]
    Draining,
    /// The engine is dead.
    #[error("the engine stopped; the daemon is about to exit")]
    EngineDead,
    /// The model produced numbers that are not finite.
    #[error("the model produced logits that are not finite")]
    NonFiniteLogits,
    /// The grammar exceeds a limit.
    #[error("{field}: {limit}: at most {value}")]
    SchemaTooLarge {
        /// Path of the field.
        field: String,
        /// The limit's name.
        limit: &'static str,
        /// The limit.
        value: u64,
    },
    /// The JSON schema uses something that is not implemented.
    #[error("{field}: {keyword} at {} is not supported{why}", place(.path))]
    SchemaUnsupported {
        /// Path of the field.
        field: String,
        /// Place in the schema, as a JSON pointer; empty for the root.
        path: String,
        /// The keyword.
        keyword: String,
        /// What is known about it: empty, or begins with `: `.
        why: String,
    },
    /// Too many grammars are being compiled.
    #[error("{limit}: in {value} ms it was not the turn of this grammar to be compiled")]
    GrammarsBusy {
        /// The limit's name.
        limit: &'static str,
        /// The limit, in milliseconds.
        value: u64,
        /// Delay before the next try.
        retry_after: Duration,
    },
    /// What may come next by the grammar takes more work than the limits allow.
    #[error("the output cannot go on by its grammar: {0}")]
    GrammarTooComplex(String),
    /// A defect of the daemon. The text goes to the log, not to the caller.
    #[error("internal error")]
    Internal(String),
    /// The bearer token is missing or wrong.
    #[error("a valid bearer token is required")]
    Unauthenticated,
    /// The peer may not use this daemon.
    #[error("this daemon serves another user")]
    PermissionDenied,
    /// Only the daemon's own user may do this, on its unix socket.
    #[error("{0}: only on the daemon's unix socket")]
    OwnerOnly(&'static str),
}

impl Error {
    /// Returns the error of a field that is missing, malformed or out of range.
    pub fn field(path: impl Into<String>, why: impl Into<String>) -> Self {
        Self::InvalidField { field: path.into(), why: why.into() }
    }
}
