//! One reader of a block of calls, whatever its format.

use super::calls::{Calls, Next};
use super::headed::{Headed, MISTRAL};
use super::listed::Listed;
use super::literal::Literal;
use super::tagged::Tagged;

/// The state of one block.
#[derive(Clone, Debug)]
pub(super) enum Reader {
    Listed(Listed),
    Headed(Headed),
    Tagged(Tagged),
    Literal(Literal),
    /// Mistral's two forms begin alike.
    Mistral,
}

impl Reader {
    /// Takes a character, which already stands in `calls.raw`.
    pub(super) fn read(&mut self, c: char, calls: &mut Calls) -> Next {
        match self {
            Self::Listed(listed) => listed.read(c, calls),
            Self::Headed(headed) => headed.read(c, calls),
            Self::Tagged(tagged) => tagged.read(c, calls),
            Self::Literal(literal) => literal.read(c, calls),
            Self::Mistral if c.is_whitespace() => Next::More,
            Self::Mistral => {
                let list = matches!(c, '[' | '{');
                *self = if list {
                    Self::Listed(Listed::new("", false))
                } else {
                    Self::Headed(Headed::new(&MISTRAL, true))
                };
                self.read(c, calls)
            }
        }
    }

    /// Ends the output, at a limit or by the model; returns whether all that was read is whole.
    pub(super) fn finish(&mut self, by_length: bool, calls: &mut Calls) -> bool {
        match self {
            Self::Listed(listed) => listed.finish(calls),
            Self::Headed(headed) => headed.finish(calls),
            Self::Tagged(tagged) => tagged.finish(by_length, calls),
            Self::Literal(literal) => literal.finish(calls),
            Self::Mistral => false,
        }
    }

    /// Whether its closing marker was read, but within a string that may not have been closed.
    pub(super) fn closed_within(&self) -> bool {
        match self {
            Self::Literal(literal) => literal.closed_within(),
            Self::Listed(_) | Self::Headed(_) | Self::Tagged(_) | Self::Mistral => false,
        }
    }
}
