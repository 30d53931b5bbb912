//! What a model's output says: text, reasoning and calls of tools, in each format that models write; and the
//! grammars that make a model call.
//!
//! [`Parser`] reads an output as it comes; [`Format`] and [`Reasoning`] say how a model writes, found in its
//! chat template. Pure: no other room is named. A file for each family of formats: `listed` (JSON objects
//! between markers), `headed` (a name, then JSON), `tagged` (arguments between tags), `literal` (Python,
//! Gemma), `harmony`.

mod bare;
mod calls;
mod cursor;
mod format;
mod gemma;
mod grammar;
mod harmony;
mod headed;
mod json;
mod listed;
mod literal;
mod object;
mod parser;
mod piece;
mod prompted;
#[cfg(test)]
mod property_tests;
mod python;
mod reader;
mod reasoning;
mod said;
mod scan;
mod tagged;
#[cfg(test)]
mod tests;
mod typed;

pub use format::Format;
pub use grammar::NoGrammar;
pub use parser::{Parser, Syntax};
pub use piece::{Call, Collected, Dropped, Piece};
pub use prompted::prompted_instructions;
pub use reasoning::{Reasoning, Start};

/// Longest text of one call, in bytes; what is longer is text.
pub const CALL_BYTES_MAX: usize = 1 << 20;

/// A function that the model may call.
#[derive(Clone, Debug, PartialEq)]
pub struct Tool {
    /// The name.
    pub name: String,
    /// What it does, for the model.
    pub description: String,
    /// The JSON schema of its arguments; null for none.
    pub parameters: serde_json::Value,
}
