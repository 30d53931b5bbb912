//! Grammars that outputs obey: a tokenizer's vocabulary as bytes (`vocabulary`), what callers give as a
//! grammar (`source`, and `schema` for JSON schemas), its compiled form and the state of one output in it
//! (`compiled`). llguidance does the work; this room says what it may cost, and what is refused.
//!
//! Pure: it starts no thread and reads no clock. The service compiles, the engine's workers compute masks.

mod brackets;
mod budget;
mod compiled;
mod cost;
mod expression;
mod keywords;
mod lark;
mod limits;
mod merge;
mod place;
mod refusal;
mod rewrite;
mod schema;
mod shape;
mod source;
mod terminals;
mod vocabulary;

pub use compiled::{Allowed, Canceller, Grammar, IN_TIME, Matcher, Pace, Stuck};
pub use limits::GrammarLimits;
pub use refusal::Refusal;
pub use source::Source;
pub use vocabulary::Vocabulary;

/// Bytes of the stack that compiling takes at most, of which only what is used is memory: a level of schemas
/// or rules within each other takes some kilobytes, of which there are at most some thousands (`cost`).
pub const COMPILING_STACK_BYTES: usize = 256 << 20;

#[cfg(test)]
mod cost_tests;
#[cfg(test)]
mod hostile_tests;
#[cfg(test)]
mod tests;
