//! Grammars as callers give them, their limits, and what llguidance's errors mean.

use std::fmt::Write as _;

use llguidance::api::TopLevelGrammar;
use serde_json::json;

use super::Refusal;
use super::brackets::{deepest, depth};
use super::budget::Budget;
use super::expression::expression;
use super::lark;
use super::limits::GrammarLimits;
use super::schema::prepare;

/// What a grammar is given as.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Source {
    /// Any JSON object.
    JsonObject,
    /// A JSON schema, as text.
    JsonSchema(String),
    /// A regular expression, which the whole output matches.
    Regex(String),
    /// A grammar in llguidance's variant of Lark.
    Lark(String),
    /// One of these texts.
    Choice(Vec<String>),
}

impl Source {
    /// Returns the bytes of its text.
    #[must_use]
    pub fn bytes(&self) -> usize {
        match self {
            Self::JsonObject => 0,
            Self::JsonSchema(text) | Self::Regex(text) | Self::Lark(text) => text.len(),
            Self::Choice(texts) => texts.iter().map(String::len).sum(),
        }
    }

    /// Checks it, and returns it as llguidance takes it.
    pub(super) fn read(&self, limits: &GrammarLimits) -> Result<TopLevelGrammar, Refusal> {
        let too_large = |limit, value: usize| Refusal::TooLarge { limit, value: value as u64 };
        if self.bytes() > limits.bytes_max {
            return Err(too_large("grammar_bytes_max", limits.bytes_max));
        }
        if self.depth() > limits.depth_max {
            return Err(too_large("grammar_depth_max", limits.depth_max));
        }
        let mut budget = Budget::new(limits);
        let mut of_schema =
            |schema| prepare(schema, "", limits, &mut budget).map(TopLevelGrammar::from_json_schema);
        match self {
            Self::JsonObject => of_schema(json!({ "type": "object" })),
            Self::JsonSchema(text) => {
                of_schema(serde_json::from_str(text).map_err(|error| Refusal::Invalid(error.to_string()))?)
            }
            Self::Regex(regex) if regex.is_empty() => Err(Refusal::Invalid("is empty".into())),
            Self::Regex(regex) => {
                budget.first(expression(regex, ""))?;
                Ok(TopLevelGrammar::from_regex(regex))
            }
            Self::Lark(text) if text.trim().is_empty() => Err(Refusal::Invalid("is empty".into())),
            Self::Lark(text) => {
                // It has the limits itself.
                Ok(TopLevelGrammar::from_lark(lark::read(text, limits, &mut budget)?))
            }
            Self::Choice(texts) => {
                if texts.is_empty() || texts.iter().any(String::is_empty) {
                    return Err(Refusal::Invalid("must have texts, and none that is empty".into()));
                }
                let any = texts.iter().map(|text| literal(text)).collect::<Vec<_>>().join("|");
                budget.first(expression(&any, ""))?;
                Ok(TopLevelGrammar::from_regex(&any))
            }
        }
    }

    /// Returns how deep brackets stand within each other; a Lark grammar is counted where it is read.
    fn depth(&self) -> usize {
        match self {
            Self::JsonObject | Self::Choice(_) | Self::Lark(_) => 0,
            Self::JsonSchema(text) => depth(text),
            Self::Regex(text) => deepest(text.chars()),
        }
    }

    /// Returns why llguidance did not compile it.
    pub(super) fn refusal(&self, error: &str, limits: &GrammarLimits) -> Refusal {
        // What follows the first line is the grammar itself.
        let first = error.lines().next().unwrap_or_default().trim();
        let says = |words: &[&str]| words.iter().any(|word| first.contains(word));
        // The words of llguidance's grammar_builder.rs, regexvec.rs, parser.rs and shared_context.rs.
        if says(&["too big", "initial_lexer_fuel", "schema too large", "TooComplex", "fuel exhausted"]) {
            return Refusal::TooLarge { limit: "grammar_work_max", value: limits.work_max };
        }
        if says(&["Unsatisfiable", "NoExtensionBias", "no tokens allowed"]) {
            return Refusal::Invalid(format!("no output obeys it: {first}"));
        }
        match self {
            Self::JsonSchema(_) | Self::JsonObject if says(&["oneOf constraints"]) => {
                let why = "its alternatives are not told apart by their types or by constants; use anyOf";
                Refusal::unsupported("", "oneOf", why)
            }
            Self::JsonSchema(_) | Self::JsonObject => Refusal::unsupported("", "schema", first),
            Self::Regex(_) | Self::Lark(_) | Self::Choice(_) => Refusal::Invalid(first.to_owned()),
        }
    }
}

/// Returns the regular expression of a text.
fn literal(text: &str) -> String {
    let mut regex = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\\' | '.' | '+' | '*' | '?' | '(' | ')' | '|' | '[' | ']' | '{' | '}' | '^' | '$' | '#'
            | '&' | '-' | '~' => regex.extend(['\\', c]),
            c if c.is_control() => {
                // A write to a string does not fail.
                let _ = write!(regex, "\\x{{{:x}}}", u32::from(c));
            }
            c => regex.push(c),
        }
    }
    regex
}
