//! The messages of a record. Numbers of fields and roles stay as they are for good: files have them.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use prost::Message as _;

use super::{Keeps, RecordError, values};
use crate::ids::{SessionId, SessionKey, TokenizerHash};
use crate::session::bytes::Charged;
use crate::session::history::History;
use crate::session::message::{Message, Part, Role, ToolCall, ToolResult};
use crate::session::snapshot::{AnswerForms, AnswerStart, Outline, Sizes, TurnEnd};
use crate::session::terms::{Lease, Terms};

/// All facts but the content, and what stays of the content before.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct OutlineRecord {
    #[prost(uint64, tag = "1")]
    id: u64,
    #[prost(string, tag = "2")]
    owner: String,
    #[prost(string, tag = "3")]
    name: String,
    #[prost(string, tag = "4")]
    model: String,
    #[prost(uint64, tag = "5")]
    ttl_ns: u64,
    /// Since 1970; negative before.
    #[prost(sint64, tag = "6")]
    created_ns: i64,
    #[prost(sint64, tag = "7")]
    used_ns: i64,
    /// Turns before this record that stay.
    #[prost(uint64, tag = "8")]
    keep_turns: u64,
    /// Those that follow.
    #[prost(message, repeated, tag = "9")]
    turns: Vec<TurnRecord>,
    #[prost(message, optional, tag = "10")]
    sizes: Option<SizesRecord>,
    #[prost(message, optional, tag = "11")]
    keeps: Option<SizesRecord>,
    #[prost(uint32, tag = "12")]
    history: u32,
    #[prost(string, tag = "13")]
    cache_salt: String,
    /// The time at which it ends, instead of its lifetime.
    #[prost(sint64, optional, tag = "14")]
    until_ns: Option<i64>,
    #[prost(bool, tag = "15")]
    pinned: bool,
    #[prost(btree_map = "string, string", tag = "16")]
    labels: BTreeMap<String, String>,
    /// Whose tokens they are; records before it lack it.
    #[prost(bytes = "vec", optional, tag = "17")]
    tokenizer: Option<Vec<u8>>,
    /// The number of the charge for text and tokens; records before it lack it.
    #[prost(uint64, tag = "18")]
    content_number: u64,
}

#[derive(Clone, PartialEq, prost::Message)]
struct TurnRecord {
    #[prost(uint64, tag = "1")]
    messages: u64,
    #[prost(uint64, tag = "2")]
    tokens: u64,
    #[prost(uint64, optional, tag = "3")]
    text_bytes: Option<u64>,
    #[prost(bool, tag = "4")]
    raw: bool,
    /// Bytes that it is charged with.
    #[prost(uint64, tag = "5")]
    bytes: u64,
    /// Whether the tokens lack a part of it.
    #[prost(bool, tag = "6")]
    rewritten: bool,
    #[prost(message, optional, tag = "7")]
    answer: Option<AnswerRecord>,
    /// The number of that charge; records before it lack it.
    #[prost(uint64, tag = "8")]
    number: u64,
}

#[derive(Clone, PartialEq, prost::Message)]
struct AnswerRecord {
    #[prost(uint64, tag = "1")]
    tokens: u64,
    #[prost(uint64, optional, tag = "2")]
    text_bytes: Option<u64>,
    /// Records before it lack it.
    #[prost(uint64, optional, tag = "3")]
    ending_bytes: Option<u64>,
    /// Names of forms; records before them lack them, when all of an answer was text.
    #[prost(string, optional, tag = "4")]
    tools: Option<String>,
    #[prost(string, optional, tag = "5")]
    reasoning: Option<String>,
    #[prost(bool, tag = "6")]
    begins_reasoning: bool,
}

#[derive(Clone, PartialEq, prost::Message)]
struct SizesRecord {
    #[prost(uint64, tag = "1")]
    messages: u64,
    #[prost(uint64, tag = "2")]
    tokens: u64,
    #[prost(uint64, tag = "3")]
    text_bytes: u64,
}

/// Content that was added.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct ContentRecord {
    #[prost(message, repeated, tag = "1")]
    messages: Vec<MessageRecord>,
    #[prost(uint32, repeated, tag = "2")]
    tokens: Vec<u32>,
    #[prost(string, tag = "3")]
    text: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct MessageRecord {
    #[prost(uint32, tag = "1")]
    role: u32,
    #[prost(string, tag = "2")]
    name: String,
    #[prost(message, repeated, tag = "3")]
    parts: Vec<PartRecord>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct PartRecord {
    #[prost(oneof = "PartKind", tags = "1, 2, 3, 4")]
    kind: Option<PartKind>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum PartKind {
    #[prost(string, tag = "1")]
    Text(String),
    #[prost(message, tag = "2")]
    Call(CallRecord),
    #[prost(message, tag = "3")]
    Result(ResultRecord),
    #[prost(string, tag = "4")]
    Reasoning(String),
}

#[derive(Clone, PartialEq, prost::Message)]
struct CallRecord {
    #[prost(string, tag = "1")]
    id: String,
    #[prost(string, tag = "2")]
    name: String,
    /// As `values` writes them.
    #[prost(bytes = "vec", tag = "3")]
    arguments: Vec<u8>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct ResultRecord {
    #[prost(string, tag = "1")]
    call_id: String,
    #[prost(string, tag = "2")]
    text: String,
}

impl OutlineRecord {
    pub(super) fn new(outline: &Outline, keeps: Keeps) -> Self {
        let Outline { id, key, model, terms, created, used, .. } = outline;
        let Outline { history, cache_salt, tokenizer, turns, turn_charges, sizes, content_number, .. } =
            outline;
        let turns = turns.iter().zip(turn_charges).skip(keeps.turns);
        let Terms { lease, pinned, labels } = terms;
        let (ttl_ns, until_ns) = match lease {
            Lease::AfterUse(ttl) => (u64::try_from(ttl.as_nanos()).unwrap_or(u64::MAX), None),
            Lease::Until(end) => (0, Some(nanoseconds(*end))),
        };
        Self {
            id: id.0,
            owner: key.owner.to_string(),
            name: key.name.to_string(),
            model: model.to_string(),
            ttl_ns,
            until_ns,
            pinned: *pinned,
            labels: (**labels).clone(),
            created_ns: nanoseconds(*created),
            used_ns: nanoseconds(*used),
            keep_turns: keeps.turns as u64,
            turns: turns.map(|(turn, charged)| TurnRecord::new(turn, *charged)).collect(),
            sizes: Some(SizesRecord::new(*sizes)),
            keeps: Some(SizesRecord::new(keeps.content)),
            history: match history {
                History::Auto => 0,
                History::Append => 1,
                History::Rerender => 2,
            },
            cache_salt: cache_salt.to_string(),
            tokenizer: tokenizer.map(|TokenizerHash(hash)| hash.to_vec()),
            content_number: *content_number,
        }
    }

    pub(super) fn to_bytes(&self) -> Vec<u8> {
        self.encode_to_vec()
    }

    pub(super) fn from_bytes(bytes: &[u8]) -> Result<Self, RecordError> {
        Self::decode(bytes).map_err(malformed)
    }

    /// Returns what it tells by itself: everything but turns and sizes.
    pub(super) fn facts(&self) -> Result<Outline, RecordError> {
        Ok(Outline {
            id: SessionId(self.id),
            key: SessionKey { owner: self.owner.as_str().into(), name: self.name.as_str().into() },
            model: self.model.as_str().into(),
            terms: Terms {
                lease: match self.until_ns {
                    None => Lease::AfterUse(Duration::from_nanos(self.ttl_ns)),
                    Some(end) => Lease::Until(time(end)?),
                },
                pinned: self.pinned,
                labels: Arc::new(self.labels.clone()),
            },
            created: time(self.created_ns)?,
            used: time(self.used_ns)?,
            history: match self.history {
                0 => History::Auto,
                1 => History::Append,
                2 => History::Rerender,
                _ => return Err(RecordError::Malformed("an unknown history".into())),
            },
            cache_salt: self.cache_salt.as_str().into(),
            tokenizer: match self.tokenizer.as_deref().map(<[u8; 32]>::try_from) {
                None => None,
                Some(Ok(hash)) => Some(TokenizerHash(hash)),
                Some(Err(_)) => return Err(RecordError::Malformed("the hash of a tokenizer".into())),
            },
            turns: Vec::new(),
            turn_charges: Vec::new(),
            sizes: Sizes::default(),
            content_number: self.content_number,
        })
    }

    /// Returns the session after this record, and what stays of the one before.
    pub(super) fn after(self, before: Option<Outline>) -> Result<(Outline, Keeps), RecordError> {
        let facts = self.facts()?;
        if before.as_ref().is_some_and(|before| before.id != facts.id || before.key != facts.key) {
            return Err(RecordError::Contradiction("it is another session's"));
        }
        let (mut turns, mut turn_charges) =
            before.map_or_else(Default::default, |before| (before.turns, before.turn_charges));
        let keep_turns = size(self.keep_turns)?;
        if keep_turns > turns.len() {
            return Err(RecordError::Contradiction("more turns are kept than there were"));
        }
        turns.truncate(keep_turns);
        turn_charges.truncate(keep_turns);
        for turn in self.turns {
            turn_charges.push(Charged { bytes: size(turn.bytes)?, number: turn.number });
            turns.push(turn.into_turn()?);
        }
        let sizes = self.sizes.unwrap_or_default().into_sizes()?;
        let outline = Outline { turns, turn_charges, sizes, ..facts };
        Ok((outline, Keeps { turns: keep_turns, content: self.keeps.unwrap_or_default().into_sizes()? }))
    }
}

impl TurnRecord {
    fn new(turn: &TurnEnd, charged: Charged) -> Self {
        let TurnEnd { message_count, token_count, text_bytes, is_whole, ref answer, raw } = *turn;
        Self {
            messages: message_count as u64,
            tokens: token_count as u64,
            text_bytes: text_bytes.map(|bytes| bytes as u64),
            raw,
            bytes: charged.bytes as u64,
            number: charged.number,
            rewritten: !is_whole,
            answer: answer.as_ref().map(AnswerRecord::new),
        }
    }

    fn into_turn(self) -> Result<TurnEnd, RecordError> {
        Ok(TurnEnd {
            message_count: size(self.messages)?,
            token_count: size(self.tokens)?,
            text_bytes: self.text_bytes.map(size).transpose()?,
            is_whole: !self.rewritten,
            answer: self.answer.map(AnswerRecord::into_start).transpose()?,
            raw: self.raw,
        })
    }
}

impl AnswerRecord {
    fn new(start: &AnswerStart) -> Self {
        let AnswerStart { tokens, text_bytes, ending_bytes, forms } = start;
        let AnswerForms { tools, reasoning, begins_reasoning } = forms;
        Self {
            tokens: *tokens as u64,
            text_bytes: text_bytes.map(|bytes| bytes as u64),
            ending_bytes: ending_bytes.map(|bytes| bytes as u64),
            tools: tools.as_deref().map(str::to_owned),
            reasoning: reasoning.as_deref().map(str::to_owned),
            begins_reasoning: *begins_reasoning,
        }
    }

    fn into_start(self) -> Result<AnswerStart, RecordError> {
        let Self { tokens, text_bytes, ending_bytes, tools, reasoning, begins_reasoning } = self;
        let (tools, reasoning) = (tools.map(Arc::from), reasoning.map(Arc::from));
        Ok(AnswerStart {
            tokens: size(tokens)?,
            text_bytes: text_bytes.map(size).transpose()?,
            ending_bytes: ending_bytes.map(size).transpose()?,
            forms: AnswerForms { tools, reasoning, begins_reasoning },
        })
    }
}

impl SizesRecord {
    fn new(sizes: Sizes) -> Self {
        let Sizes { messages, tokens, text_bytes } = sizes;
        Self { messages: messages as u64, tokens: tokens as u64, text_bytes: text_bytes as u64 }
    }

    fn into_sizes(self) -> Result<Sizes, RecordError> {
        let Self { messages, tokens, text_bytes } = self;
        Ok(Sizes { messages: size(messages)?, tokens: size(tokens)?, text_bytes: size(text_bytes)? })
    }
}

impl ContentRecord {
    pub(super) fn new(messages: &[Arc<Message>], tokens: &[u32], text: &str) -> Self {
        let messages = messages.iter().map(|message| MessageRecord::new(message)).collect();
        Self { messages, tokens: tokens.to_vec(), text: text.to_owned() }
    }

    pub(super) fn to_bytes(&self) -> Vec<u8> {
        self.encode_to_vec()
    }

    pub(super) fn from_bytes(bytes: &[u8]) -> Result<Self, RecordError> {
        Self::decode(bytes).map_err(malformed)
    }

    pub(super) fn into_parts(self) -> Result<(Vec<Message>, Vec<u32>, String), RecordError> {
        let messages: Result<_, _> = self.messages.into_iter().map(MessageRecord::into_message).collect();
        Ok((messages?, self.tokens, self.text))
    }
}

impl MessageRecord {
    fn new(message: &Message) -> Self {
        let Message { role, name, parts } = message;
        let role = match role {
            Role::System => 1,
            Role::User => 2,
            Role::Assistant => 3,
            Role::Tool => 4,
            Role::Developer => 5,
        };
        let parts = parts.iter().map(|part| PartRecord { kind: Some(PartKind::new(part)) }).collect();
        Self { role, name: name.clone(), parts }
    }

    fn into_message(self) -> Result<Message, RecordError> {
        let role = match self.role {
            1 => Role::System,
            2 => Role::User,
            3 => Role::Assistant,
            4 => Role::Tool,
            5 => Role::Developer,
            _ => return Err(RecordError::Malformed("an unknown role".into())),
        };
        let parts = self.parts.into_iter().map(PartRecord::into_part);
        Ok(Message { role, name: self.name, parts: parts.collect::<Result<_, _>>()? })
    }
}

impl PartKind {
    fn new(part: &Part) -> Self {
        match part {
            Part::Text(text) => Self::Text(text.clone()),
            Part::Reasoning(text) => Self::Reasoning(text.clone()),
            Part::ToolCall(ToolCall { id, name, arguments }) => {
                let arguments = values::to_bytes(arguments);
                Self::Call(CallRecord { id: id.clone(), name: name.clone(), arguments })
            }
            Part::ToolResult(ToolResult { call_id, text }) => {
                Self::Result(ResultRecord { call_id: call_id.clone(), text: text.clone() })
            }
        }
    }
}

impl PartRecord {
    fn into_part(self) -> Result<Part, RecordError> {
        match self.kind {
            Some(PartKind::Text(text)) => Ok(Part::Text(text)),
            Some(PartKind::Reasoning(text)) => Ok(Part::Reasoning(text)),
            Some(PartKind::Call(CallRecord { id, name, arguments })) => {
                let arguments = values::from_bytes(&arguments);
                let arguments =
                    arguments.ok_or_else(|| RecordError::Malformed("the arguments of a tool call".into()))?;
                Ok(Part::ToolCall(ToolCall { id, name, arguments }))
            }
            Some(PartKind::Result(ResultRecord { call_id, text })) => {
                Ok(Part::ToolResult(ToolResult { call_id, text }))
            }
            None => Err(RecordError::Malformed("a part of an unknown kind".into())),
        }
    }
}

#[allow(clippy::needless_pass_by_value, reason = "it is passed to map_err")]
fn malformed(error: prost::DecodeError) -> RecordError {
    RecordError::Malformed(error.to_string())
}

fn size(size: u64) -> Result<usize, RecordError> {
    usize::try_from(size).map_err(|_| RecordError::Malformed("a size beyond this machine's".into()))
}

/// Returns a time as nanoseconds since 1970; saturates in 1677 and 2262.
fn nanoseconds(time: SystemTime) -> i64 {
    match time.duration_since(SystemTime::UNIX_EPOCH) {
        Ok(since) => i64::try_from(since.as_nanos()).unwrap_or(i64::MAX),
        Err(before) => i64::try_from(before.duration().as_nanos()).map_or(i64::MIN, |before| -before),
    }
}

fn time(nanoseconds: i64) -> Result<SystemTime, RecordError> {
    let distance = Duration::from_nanos(nanoseconds.unsigned_abs());
    let time = if nanoseconds < 0 {
        SystemTime::UNIX_EPOCH.checked_sub(distance)
    } else {
        SystemTime::UNIX_EPOCH.checked_add(distance)
    };
    time.ok_or_else(|| RecordError::Malformed("a time beyond this machine's".into()))
}
