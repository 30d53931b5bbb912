//! What can run in a step.

use super::owner::Owner;
use crate::backend::SpanKind;

/// A sequence that can run.
#[derive(Clone, Copy, Debug)]
pub struct Runnable<'a> {
    /// Its number.
    pub sequence: u64,
    /// Whose it is.
    pub owner: &'a Owner,
    /// Its priority class; 0 is the highest. Of prompts: it rises with waiting.
    pub class: u32,
    /// The class that its caller asked for. Of rows: none of them waits for long.
    pub priority: u32,
    /// What its next span is for.
    pub kind: SpanKind,
    /// Number of its tokens that are not in its KV cache yet; at least one.
    pub pending: u32,
    /// Most tokens of it that one step may take.
    pub span_max: u32,
}

impl Runnable<'_> {
    /// Returns whether a user waits for its next token.
    #[must_use]
    pub fn is_decoding(&self) -> bool {
        match self.kind {
            SpanKind::Decode | SpanKind::Verify => true,
            SpanKind::Prefill => false,
        }
    }

    /// Returns whether it is a row: what decodes, and the last token of a prompt, which costs a step as much;
    /// the first token of the answer follows it.
    pub(super) fn is_row(&self) -> bool {
        self.is_decoding() || self.pending == 1
    }
}
