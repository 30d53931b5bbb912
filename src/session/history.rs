//! How a chat turn goes on from the tokens of its session, and what a turn did.

/// What happens to a session's tokens where the chat template writes the past differently.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum History {
    /// They stay if the template has a switch for keeping past reasoning, and that is all the difference.
    #[default]
    Auto,
    /// They stay.
    Append,
    /// The conversation is tokenized anew.
    Rerender,
}

/// What a turn did with the tokens of its session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HistoryOutcome {
    /// They stayed, and stand for what the template writes.
    Continued,
    /// They stayed, where the template would write the past differently.
    Appended,
    /// The conversation was tokenized anew.
    Rerendered,
}
