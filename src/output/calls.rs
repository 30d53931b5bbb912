//! The calls of an output while they are read: numbers them, keeps the text of the one that is open, and
//! checks it at its end.

use std::sync::Arc;

use serde_json::{Map, Value};

use super::Tool;
use super::piece::{Dropped, Piece};

/// Longest name of a function, in bytes.
const NAME_BYTES_MAX: usize = 256;

/// What a reader says of a character.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// It belongs to the block of calls.
    More,
    /// It ends the block.
    Closed,
    /// What was read since the last whole call is not a call; the last bytes of it may begin something else.
    Not(usize),
}

/// The calls of one output.
#[derive(Clone, Debug)]
pub(super) struct Calls {
    /// What may be called.
    pub(super) tools: Arc<[Tool]>,
    /// What was read and not taken yet.
    pub(super) pieces: Vec<Piece>,
    /// The text since the block began or its last call ended.
    pub(super) raw: String,
    /// The whole calls so far.
    pub(super) count: u32,
    /// The arguments of the call that has begun.
    open: Option<String>,
}

impl Calls {
    pub(super) fn new(tools: Arc<[Tool]>) -> Self {
        Self { tools, pieces: Vec::new(), raw: String::new(), count: 0, open: None }
    }

    /// Whether a function of this name may be called.
    pub(super) fn knows(&self, name: &str) -> bool {
        self.tool(name).is_some()
    }

    /// Returns the function of this name.
    pub(super) fn tool(&self, name: &str) -> Option<&Tool> {
        self.tools.iter().find(|tool| tool.name == name)
    }

    /// Whether a call has begun and not ended.
    pub(super) fn is_open(&self) -> bool {
        self.open.is_some()
    }

    /// Begins a call; `None` if this cannot be a function's name.
    pub(super) fn begin(&mut self, id: Option<String>, name: &str) -> Option<()> {
        if !is_name(name) || self.open.is_some() {
            return None;
        }
        self.open = Some(String::new());
        self.pieces.push(Piece::CallBegin { index: self.count, id, name: name.to_owned() });
        Some(())
    }

    /// Adds to the arguments of the call that has begun.
    pub(super) fn arguments(&mut self, text: &str) {
        let Some(arguments) = &mut self.open else { return };
        arguments.push_str(text);
        if let Some(Piece::CallArguments { fragment, .. }) = self.pieces.last_mut() {
            fragment.push_str(text);
        } else {
            self.pieces.push(Piece::CallArguments { index: self.count, fragment: text.to_owned() });
        }
    }

    /// Ends the call; `None` if its arguments are not a JSON object.
    pub(super) fn end(&mut self) -> Option<()> {
        serde_json::from_str::<Map<String, Value>>(self.open.as_ref()?).ok()?;
        self.open = None;
        self.raw.clear();
        self.pieces.push(Piece::CallEnd { index: self.count });
        self.count += 1;
        Some(())
    }

    /// Adds a whole call.
    pub(super) fn whole(&mut self, name: &str, arguments: &Map<String, Value>) -> Option<()> {
        let arguments = serde_json::to_string(arguments).ok()?;
        self.begin(None, name)?;
        self.arguments(&arguments);
        self.end()
    }

    /// Forgets the call that has begun, if one has.
    pub(super) fn drop_open(&mut self, why: Dropped) {
        if self.open.take().is_some() {
            self.pieces.push(Piece::CallDropped { index: self.count, why });
        }
    }
}

/// Whether a text can be a function's name.
pub(super) fn is_name(text: &str) -> bool {
    let odd = |c: char| c.is_whitespace() || c.is_control() || "<>{}\"".contains(c);
    !text.is_empty() && text.len() <= NAME_BYTES_MAX && !text.contains(odd)
}
