//! The limits of calls, by name. Each is a key of the configuration, which has its default and range; the
//! error that a limit causes names it. Those of the engine are its own settings.

use std::time::Duration;

/// Limits on what callers may ask for and hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of one message of a request.
    pub message_bytes_max: usize,
    /// Bytes of one message of an answer.
    pub answer_bytes_max: usize,
    /// Connections at once that have made an admitted call.
    pub connections_max: u32,
    /// Connections at once that have not made one yet.
    pub connections_unproven_max: u32,
    /// Time that a connection has to make one.
    pub first_call: Duration,
    /// Calls at once on one connection.
    pub streams_per_connection_max: u32,
    /// Silence after which a peer is pinged, and time for its answer.
    pub keep_alive: Duration,
    /// Sessions of one principal.
    pub sessions_max: u32,
    /// Pinned sessions of one principal.
    pub sessions_pinned_max: u32,
    /// Labels of one session.
    pub session_labels_max: u32,
    /// Bytes of one session.
    pub session_bytes_max: u64,
    /// Bytes of all sessions of one principal; what forks share counts once.
    pub sessions_bytes_max: u64,
    /// Bytes of all sessions of one principal on disk; a fork counts whole.
    pub sessions_disk_bytes_max: u64,
    /// Streams in which one principal watches sessions.
    pub session_watches_max: u32,
    /// Sessions that one principal saves at once, those that wait included.
    pub session_saves_max: u32,
    /// Default lifetime of a session after its last use.
    pub session_ttl: Duration,
    /// Longest lifetime of a session that may be requested.
    pub session_ttl_max: Duration,
    /// Default of a request's max_tokens.
    pub max_tokens_default: u32,
    /// Last tokens that DRY examines.
    pub dry_context_max: u32,
    /// Choices of one request.
    pub choices_max: u32,
    /// Tokens of one Score.
    pub score_tokens_max: u32,
    /// Alternatives per token in logprobs and scores.
    pub top_logprobs_max: u32,
    /// Stop strings of one request.
    pub stop_strings_max: u32,
    /// Bytes of one stop string.
    pub stop_string_bytes_max: u32,
    /// Stop token ids of one request.
    pub stop_token_ids_max: u32,
    /// Entries of one request's logit_bias.
    pub logit_bias_max: u32,
    /// Bytes of one `prompt` or rendered chat, which the tokenizer gets.
    pub text_bytes_max: usize,
    /// Bytes of all requests that arrive or are prepared.
    pub receive_bytes_max: usize,
    /// The same of one connection.
    pub receive_bytes_per_connection_max: usize,
    /// Time for a request to arrive.
    pub receive: Duration,
    /// Messages, texts and tool calls of one chat, those of its session included.
    pub chat_parts_max: u32,
    /// Tools of one chat.
    pub tools_max: u32,
    /// Prompts that are rendered or tokenized at once; None chooses by the number of processors.
    pub preparations_max: Option<u64>,
    /// Bytes of one grammar.
    pub grammar_bytes_max: usize,
    /// Brackets within each other in one grammar.
    pub grammar_depth_max: usize,
    /// Work to compile one grammar.
    pub grammar_work_max: u64,
    /// Time to compile one grammar.
    pub grammar_compile: Duration,
    /// Bytes of compiled grammars that are kept.
    pub grammar_cache_bytes_max: usize,
    /// Downloads for calls at one time.
    pub downloads_running_max: usize,
}
