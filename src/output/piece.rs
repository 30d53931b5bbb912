//! The parts of an output, and what they add up to.

/// A part of an output, in the order of the text. Neighbouring parts of one kind may be split anywhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    /// What the model says.
    Text(String),
    /// What it thinks before it speaks.
    Reasoning(String),
    /// A call begins.
    CallBegin {
        /// Counts the calls of this output from 0.
        index: u32,
        /// The model's own id of it, if it wrote one before the name: a call begins with its name, and an id
        /// that comes later (old Mistral templates write it last) is not taken.
        id: Option<String>,
        /// The function's name.
        name: String,
    },
    /// The next characters of a call's arguments: JSON as the model wrote it, or all of it at once where the
    /// format is another one.
    CallArguments {
        /// The call.
        index: u32,
        /// A part of a JSON object's text.
        fragment: String,
    },
    /// A call is whole: its fragments joined are a JSON object.
    CallEnd {
        /// The call.
        index: u32,
    },
    /// A call that had begun is not one; the next call has its index again.
    CallDropped {
        /// The call.
        index: u32,
        /// Why, and what becomes of its text.
        why: Dropped,
    },
}

/// Why a call is not one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dropped {
    /// It breaks its format. Its text follows as text, markup included.
    Broken,
    /// The output ended inside it at a limit. Its text is neither text nor a call.
    Cut,
    /// It is longer than a call may be. Its text follows as text, markup included.
    TooLong,
}

/// A whole call.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Call {
    /// The model's own id of it.
    pub id: Option<String>,
    /// The function's name.
    pub name: String,
    /// The text of a JSON object.
    pub arguments: String,
}

/// What the pieces of an output add up to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Collected {
    /// What the model says.
    pub text: String,
    /// What it thinks.
    pub reasoning: String,
    /// The whole calls.
    pub calls: Vec<Call>,
    /// The call that has begun.
    begun: Call,
}

impl Collected {
    /// Adds the next piece.
    pub fn add(&mut self, piece: &Piece) {
        match piece {
            Piece::Text(text) => self.text += text,
            Piece::Reasoning(text) => self.reasoning += text,
            Piece::CallBegin { index: _, id, name } => {
                self.begun = Call { id: id.clone(), name: name.clone(), arguments: String::new() };
            }
            Piece::CallArguments { index: _, fragment } => self.begun.arguments += fragment,
            Piece::CallEnd { index: _ } => self.calls.push(std::mem::take(&mut self.begun)),
            Piece::CallDropped { index: _, why: _ } => self.begun = Call::default(),
        }
    }

    /// Returns the sum of some pieces.
    #[must_use]
    pub fn of(pieces: &[Piece]) -> Self {
        let mut collected = Self::default();
        for piece in pieces {
            collected.add(piece);
        }
        collected
    }
}

/// Appends what the model says.
pub(super) fn push_text(pieces: &mut Vec<Piece>, text: &str) {
    match pieces.last_mut() {
        Some(Piece::Text(last)) => last.push_str(text),
        _ if text.is_empty() => {}
        _ => pieces.push(Piece::Text(text.to_owned())),
    }
}

/// Appends what the model thinks.
pub(super) fn push_reasoning(pieces: &mut Vec<Piece>, text: &str) {
    match pieces.last_mut() {
        Some(Piece::Reasoning(last)) => last.push_str(text),
        _ if text.is_empty() => {}
        _ => pieces.push(Piece::Reasoning(text.to_owned())),
    }
}
