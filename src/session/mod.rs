//! Sessions: a conversation's messages and tokens, its owner and its lifetime. Pure: `now` comes in, plain
//! data goes out. A session is its tokens; the engine's KV cache is only a cache of it. A turn changes
//! nothing before its commit, so one that fails or is cancelled leaves no trace.
//!
//! [`SessionBook`] is what the service holds; [`Session`] is the logic inside an entry.

mod book;
mod bytes;
mod changes;
mod context;
mod cut;
mod history;
mod list;
mod message;
mod record;
mod snapshot;
mod state;
mod terms;
mod watch;

pub use book::{
    Arrived, Incoming, NewFork, NewSession, Replace, SessionBook, SessionLimits, SessionTotals, SessionWatch,
    TurnGuard,
};
pub use bytes::{Charged, messages_bytes, tokens_bytes};
pub use changes::{Changes, Taken};
pub use context::{chat_rest, chat_text, joined};
pub use cut::AnswerCut;
pub use history::{History, HistoryOutcome};
pub use list::{ListPage, SessionFilter};
pub use message::{Message, Part, Role, ToolCall, ToolResult, object_bytes};
pub use record::{Joined, Keeps, PieceError, Pieces, Record, RecordError, Replay, record, whole};
pub use snapshot::{AnswerForms, AnswerStart, Contents, Outline, Sizes, Snapshot, TurnEnd};
pub use state::{AnswerEnd, InputKind, Session, SessionView, TurnContent, TurnId, TurnRequest, TurnStart};
pub use terms::{Labels, Lease, Terms, TermsChange};
pub use watch::{Change, Told, ViewField};

/// Characters of a session's name.
pub const NAME_CHARS_MAX: usize = 128;

/// Returns whether `name` may name a session: 1 to 128 characters out of `A-Z a-z 0-9 . _ : / -`.
#[must_use]
pub fn is_valid_name(name: &str) -> bool {
    !name.is_empty() && may_begin_name(name)
}

/// Returns whether a session's name may begin with `prefix`; an empty one begins them all.
#[must_use]
pub fn may_begin_name(prefix: &str) -> bool {
    prefix.len() <= NAME_CHARS_MAX
        && prefix.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._:/-".contains(&byte))
}
