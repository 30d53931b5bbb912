//! Reads calls that are JSON objects between markers: one, several in a row, or a list of them.

use super::calls::{Calls, Next};
use super::object::Object;
use super::scan::Scan;

#[derive(Clone, Debug)]
enum State {
    /// Before the first object or the bracket.
    Start,
    /// Before an object.
    Item,
    Object(Box<Object>),
    /// Behind an object.
    Behind,
    /// Behind the bracket.
    Close,
}

/// The state of one block.
#[derive(Clone, Debug)]
pub(super) struct Listed {
    /// The marker that ends the block; empty if none does.
    close: &'static str,
    /// Whether only functions that may be called are.
    known_only: bool,
    state: State,
    list: bool,
    scan: Scan,
}

impl Listed {
    /// Starts behind the marker that opens the block.
    pub(super) fn new(close: &'static str, known_only: bool) -> Self {
        Self { close, known_only, state: State::Start, list: false, scan: Scan::default() }
    }

    pub(super) fn read(&mut self, c: char, calls: &mut Calls) -> Next {
        let between = !matches!(self.state, State::Object(_)) && self.scan.held().is_empty();
        if between && c.is_whitespace() {
            return Next::More;
        }
        match (&mut self.state, c) {
            (State::Object(object), _) => {
                let Some(ended) = object.read(c, calls) else { return Next::Not(c.len_utf8()) };
                return if ended { self.behind(calls) } else { Next::More };
            }
            (State::Start, '[') => {
                self.list = true;
                self.state = State::Item;
            }
            (State::Start | State::Item, '{') => return self.object(c, calls),
            (State::Behind, '{') if !self.list && self.close.is_empty() => return self.object(c, calls),
            (State::Behind, ';') if !self.list && self.close.is_empty() => self.state = State::Item,
            (State::Behind, ',') if self.list => self.state = State::Item,
            (State::Behind, ']') if self.list && self.close.is_empty() => return Next::Closed,
            (State::Behind, ']') if self.list => self.state = State::Close,
            (State::Behind, _) if !self.list && !self.close.is_empty() => return self.marker(c, calls),
            (State::Close, _) => return self.marker(c, calls),
            (State::Start | State::Item | State::Behind, _) => return Next::Not(c.len_utf8()),
        }
        Next::More
    }

    /// Ends the output; returns whether all that was read is whole.
    pub(super) fn finish(&mut self, calls: &mut Calls) -> bool {
        match self.state {
            State::Start | State::Item | State::Object(_) => false,
            State::Behind => self.list || self.close.is_empty() || calls.end().is_some(),
            State::Close => true,
        }
    }

    fn object(&mut self, c: char, calls: &mut Calls) -> Next {
        let mut object = Box::new(Object::new(self.known_only));
        let begins = object.read(c, calls).is_some();
        self.state = State::Object(object);
        if begins { Next::More } else { Next::Not(c.len_utf8()) }
    }

    /// An object has ended; one that stands alone between markers is a call when its marker comes.
    fn behind(&mut self, calls: &mut Calls) -> Next {
        self.state = State::Behind;
        let waits = !self.list && !self.close.is_empty();
        if waits || calls.end().is_some() { Next::More } else { Next::Not(0) }
    }

    fn marker(&mut self, c: char, calls: &mut Calls) -> Next {
        match self.scan.anchored(c, &[self.close]) {
            Err(other) => Next::Not(other),
            Ok(None) => Next::More,
            Ok(Some(_)) if self.list || calls.end().is_some() => Next::Closed,
            Ok(Some(_)) => Next::Not(0),
        }
    }
}
