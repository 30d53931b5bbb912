//! The white space between markup, text and reasoning: what of it is text, decided without looking ahead.
//!
//! Text that is only white space and touches markup is dropped; other text is verbatim, but for newlines
//! right behind reasoning. Newlines at both ends of reasoning belong to its markers, as templates write them.

use super::piece::{Piece, push_reasoning, push_text};

/// White space held back, in bytes; more of it is text.
const BLANK_BYTES_MAX: usize = 1024;

/// What stands before a run of text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum After {
    /// The output's beginning.
    #[default]
    Start,
    /// A call.
    Call,
    /// The end of reasoning.
    Reasoning,
}

/// A run of text between markup.
#[derive(Clone, Debug, Default)]
pub(super) struct Speech {
    after: After,
    /// The white space it begins with.
    blank: String,
    /// Whether more than white space was said.
    begun: bool,
}

impl Speech {
    /// Starts behind some markup.
    pub(super) fn new(after: After) -> Self {
        Self { after, ..Self::default() }
    }

    /// Whether more than white space was said.
    pub(super) fn begun(&self) -> bool {
        self.begun
    }

    /// Whether a call was just read, or nothing at all.
    pub(super) fn opens_answer(&self) -> bool {
        !self.begun && self.after != After::Call
    }

    pub(super) fn say(&mut self, text: &str, pieces: &mut Vec<Piece>) {
        if self.begun {
            return push_text(pieces, text);
        }
        self.blank.push_str(text);
        if self.blank.len() > BLANK_BYTES_MAX || !self.blank.trim().is_empty() {
            self.begun = true;
            let said = std::mem::take(&mut self.blank);
            let newlines: &[char] = if self.after == After::Reasoning { &['\n'] } else { &[] };
            push_text(pieces, said.trim_start_matches(newlines));
        }
    }

    /// What was said so far is none of the output; more than white space has begun it.
    pub(super) fn spoken(&mut self) {
        self.blank.clear();
    }

    /// Ends the output.
    pub(super) fn finish(&mut self, pieces: &mut Vec<Piece>) {
        let blank = std::mem::take(&mut self.blank);
        if self.after == After::Start {
            push_text(pieces, &blank);
        }
    }
}

/// A run of reasoning.
#[derive(Clone, Debug, Default)]
pub(super) struct Thought {
    begun: bool,
    /// Newlines that may be its last ones.
    newlines: usize,
    /// Whether a line ended right before it.
    at_line: bool,
}

impl Thought {
    /// Whether what was thought so far ends a line.
    pub(super) fn line_ended(&self) -> bool {
        !self.begun || self.newlines > 0 || self.at_line
    }

    /// Whether anything was thought.
    pub(super) fn begun(&self) -> bool {
        self.begun
    }

    pub(super) fn think(&mut self, text: &str, pieces: &mut Vec<Piece>) {
        let text = if self.begun { text } else { text.trim_start_matches('\n') };
        if text.is_empty() {
            return;
        }
        (self.begun, self.at_line) = (true, false);
        let content = text.trim_end_matches('\n');
        if !content.is_empty() {
            self.release(pieces);
            push_reasoning(pieces, content);
        }
        self.newlines += text.len() - content.len();
    }

    /// What was thought so far is none of the output.
    pub(super) fn thought(&mut self) {
        self.at_line = std::mem::take(&mut self.newlines) > 0;
    }

    /// Says the newlines held back: the reasoning goes on, or the output ends.
    pub(super) fn release(&mut self, pieces: &mut Vec<Piece>) {
        let newlines = "\n".repeat(std::mem::take(&mut self.newlines));
        push_reasoning(pieces, &newlines);
    }
}
