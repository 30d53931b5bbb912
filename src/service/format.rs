//! The form of an answer, and what is returned besides its text, as a request says it.

use super::fields::up_to;
use crate::error::Error;
use crate::grammar::Source;
use crate::limits::Limits;

/// The form of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ResponseFormat {
    /// Any JSON object.
    JsonObject,
    /// JSON that this schema, as text, is valid for.
    JsonSchema(String),
    /// Text that this regular expression matches as a whole.
    Regex(String),
    /// Text of this grammar in llguidance's Lark.
    Grammar(String),
    /// One of these texts.
    Choice(Vec<String>),
}

impl ResponseFormat {
    /// Returns its path in a request.
    pub(super) fn field(&self) -> &'static str {
        match self {
            Self::JsonObject => "response_format.json_object",
            Self::JsonSchema(_) => "response_format.json_schema.schema",
            Self::Regex(_) => "response_format.regex",
            Self::Grammar(_) => "response_format.grammar",
            Self::Choice(_) => "response_format.choice",
        }
    }

    /// Returns its grammar.
    pub(super) fn into_source(self) -> Source {
        match self {
            Self::JsonObject => Source::JsonObject,
            Self::JsonSchema(schema) => Source::JsonSchema(schema),
            Self::Regex(regex) => Source::Regex(regex),
            Self::Grammar(grammar) => Source::Lark(grammar),
            Self::Choice(texts) => Source::Choice(texts),
        }
    }
}

/// Extras to return besides the text.
#[derive(Clone, Copy, Debug, Default)]
pub struct OutputOptions {
    /// Log-probabilities with this many alternatives.
    pub top_logprobs: Option<u32>,
    /// The output's token ids.
    pub token_ids: bool,
}

impl OutputOptions {
    /// Refuses values outside the contract's ranges.
    pub(super) fn check(&self, limits: &Limits) -> Result<(), Error> {
        match self.top_logprobs {
            Some(top) => up_to("output.logprobs", top, "top_logprobs_max", limits.top_logprobs_max),
            None => Ok(()),
        }
    }
}
