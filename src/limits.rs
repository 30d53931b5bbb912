//! The daemon's limits by name. Each is a key of the configuration, which holds its default and range; the
//! error that a limit causes names it.

use std::time::Duration;

/// Limits on what callers may ask for and hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of one gRPC message, in either direction.
    pub message_bytes_max: usize,
    /// Connections at once.
    pub connections_max: u32,
    /// Calls at once on one connection.
    pub streams_per_connection_max: u32,
    /// Silence after which a peer is asked whether it lives, and time for its answer.
    pub keep_alive: Duration,
    /// Sessions of one principal.
    pub sessions_max: u32,
    /// How long a session lives after its last use, if its maker does not say.
    pub session_ttl: Duration,
    /// The longest lifetime that may be asked for.
    pub session_ttl_max: Duration,
    /// Requests that may wait for the engine.
    pub queue_length_max: u32,
    /// Requests of one client that may wait for the engine.
    pub queue_length_per_client_max: u32,
    /// Sequences that may run at once, per model.
    pub running_sequences_max: u32,
    /// Tokens a request gets at most if it does not say.
    pub max_tokens_default: u32,
    /// Tokens that one Score may have.
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
    /// Bytes of one `prompt` or rendered chat: what the tokenizer is given.
    pub text_bytes_max: usize,
}
