//! A generation's way through its grammar: which tokens it may draw next. They are found out by a worker
//! while the step runs that draws one of them.
//!
//! Where a model reasons first, its grammar begins behind that, as the reader of its output says.
//!
//! An output whose answer was not there in time waits outside of steps until it is. If a worker had begun
//! with it, the grammar is slow: its next answers are waited for outside of steps too.

use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, TryRecvError};
use std::time::Duration;

use crate::backend::TokenSet;
use crate::clock::Moment;
use crate::engine::api::{Constraint, Starts};
use crate::engine::masks::{Answer, Asked, MaskWorkers};
use crate::engine::task::reading::Reader;
use crate::error::Error;
use crate::grammar::{Allowed, Canceller, Matcher, Stuck};

/// Answers after which an output that was slow is taken for one that is not.
const FAST_AGAIN: u32 = 16;

/// The way of one generation.
#[derive(Debug)]
pub(super) struct Guide {
    state: State,
    canceller: Canceller,
    /// What comes before it; None once it has begun.
    before: Option<Before>,
    /// Whether a step has waited for the answer that is asked for, in vain.
    is_late: bool,
    /// Number of answers until it is not slow any more.
    slow: u32,
}

/// What comes before a grammar.
#[derive(Debug)]
enum Before {
    /// Perhaps reasoning: the tokens that open it, how many of them came, and what is not drawn in it.
    Opening(Arc<[u32]>, usize, Arc<[u32]>),
    /// Reasoning, in which these tokens are not drawn.
    Reasoning(Arc<[u32]>),
}

#[derive(Debug)]
enum State {
    /// What may be drawn next is known.
    Known(Box<Matcher>, Allowed),
    /// A worker finds it out; it was seen to do so since then.
    Asked(Asked, Option<Moment>),
    /// It cannot go on.
    Failed(Error),
}

/// What is known of the next token.
#[derive(Debug)]
pub(crate) enum Mask {
    /// It is one of these.
    Tokens(TokenSet),
    /// There is none: the output is whole.
    Whole,
    /// There is none: the output cannot go on.
    Failed(Error),
    /// Nothing yet.
    Late,
}

impl Guide {
    pub(super) fn new(constraint: Constraint) -> Self {
        let Constraint { mut matcher, starts } = constraint;
        let canceller = matcher.canceller();
        let state = match matcher.allowed() {
            Ok(allowed) => State::Known(matcher, allowed),
            Err(stuck) => State::Failed(error_of(stuck)),
        };
        let before = match starts {
            Starts::Immediately => None,
            Starts::AfterReasoning { opening, ends } if opening.is_empty() => Some(Before::Reasoning(ends)),
            Starts::AfterReasoning { opening, ends } => Some(Before::Opening(opening, 0, ends)),
        };
        Self { state, canceller, before, is_late: false, slow: 0 }
    }

    /// Returns which tokens alone are not drawn next; None if only those of its mask are.
    pub(super) fn barred(&self) -> Option<&[u32]> {
        match &self.before {
            Some(Before::Reasoning(ends)) => Some(ends),
            Some(Before::Opening(..)) | None => None,
        }
    }

    /// Takes a drawn token, which `reader` has read: it begins, or asks a worker what may follow.
    pub(super) fn take(&mut self, token: u32, reader: &Reader, workers: &mut MaskWorkers) {
        match self.before.take() {
            None => {}
            Some(Before::Reasoning(_)) if reader.speaks() => return,
            Some(before @ Before::Reasoning(_)) => return self.before = Some(before),
            // What reasoning and the grammar both begin with is the grammar's.
            Some(Before::Opening(opening, came, ends))
                if opening[came] == token && (came > 0 || !self.allows(token)) =>
            {
                let is_open = came + 1 == opening.len();
                self.before = Some(if is_open {
                    Before::Reasoning(ends)
                } else {
                    Before::Opening(opening, came + 1, ends)
                });
                return;
            }
            Some(Before::Opening(..)) => {}
        }
        let gone = State::Failed(Error::Internal("a grammar's way is lost".into()));
        self.state = match std::mem::replace(&mut self.state, gone) {
            State::Known(matcher, _) => State::Asked(workers.advance(matcher, token, self.slow > 0), None),
            State::Asked(..) | State::Failed(_) => unreachable!("what is drawn was known to be allowed"),
        };
    }

    /// Returns whether steps go on without it until the answer is there; with `is_strict` no step begins
    /// before.
    pub(super) fn waits(&self, is_strict: bool) -> bool {
        matches!(self.state, State::Asked(..)) && (is_strict || self.is_late || self.slow > 0)
    }

    /// Looks for the answer, and waits for it at most for `wait`.
    pub(super) fn settle(&mut self, wait: Duration) {
        let State::Asked(asked, _) = &self.state else { return };
        match asked.answer.recv_timeout(wait) {
            Ok(answer) => self.note(answer),
            Err(RecvTimeoutError::Disconnected) => self.lose(),
            Err(RecvTimeoutError::Timeout) => {
                self.slow = if asked.has_begun() { FAST_AGAIN } else { self.slow };
                self.is_late = true;
            }
        }
    }

    /// Looks for the answer. A worker that is seen to work on it for longer than `limit` is to end.
    pub(super) fn look(&mut self, now: Moment, limit: Duration) {
        let State::Asked(asked, since) = &mut self.state else { return };
        match asked.answer.try_recv() {
            Ok(answer) => self.note(answer),
            Err(TryRecvError::Disconnected) => self.lose(),
            Err(TryRecvError::Empty) if asked.has_begun() => {
                if now - *since.get_or_insert(now) >= limit {
                    self.canceller.cancel();
                    let why = "mask_ms_max: what may come next was not found in time".into();
                    self.state = State::Failed(Error::GrammarTooComplex(why));
                }
            }
            Err(TryRecvError::Empty) => {}
        }
    }

    /// Returns whether a token is known to be allowed.
    fn allows(&self, token: u32) -> bool {
        let State::Known(_, Allowed::Tokens(tokens)) = &self.state else { return false };
        tokens.get(token as usize / 32).is_some_and(|word| word >> (token % 32) & 1 == 1)
    }

    /// Returns what is known of the next token.
    pub(super) fn mask(&self) -> Mask {
        match &self.state {
            State::Known(_, Allowed::Tokens(tokens)) => match &self.before {
                Some(Before::Opening(opening, came, _)) => Mask::Tokens(opened(tokens, opening, *came)),
                Some(Before::Reasoning(_)) | None => Mask::Tokens(TokenSet::clone(tokens)),
            },
            State::Known(_, Allowed::Nothing) => Mask::Whole,
            State::Failed(error) => Mask::Failed(error.clone()),
            State::Asked(..) => Mask::Late,
        }
    }

    fn note(&mut self, (matcher, allowed): Answer) {
        self.is_late = false;
        self.slow = self.slow.saturating_sub(1);
        self.state = match allowed {
            Ok(allowed) => State::Known(matcher, allowed),
            Err(stuck) => State::Failed(error_of(stuck)),
        };
    }

    fn lose(&mut self) {
        self.state = State::Failed(Error::Internal("no worker found out what a grammar allows".into()));
    }
}

impl Drop for Guide {
    fn drop(&mut self) {
        // What a worker does for an output that has ended is of no use.
        self.canceller.cancel();
    }
}

/// Returns what may be drawn where `came` of the tokens came that open reasoning, and the grammar allows
/// `tokens`.
fn opened(tokens: &TokenSet, opening: &[u32], came: usize) -> TokenSet {
    let mut words = if came == 0 { tokens.to_vec() } else { vec![0; tokens.len()] };
    if let Some(word) = words.get_mut(opening[came] as usize / 32) {
        *word |= 1 << (opening[came] % 32);
    }
    words.into()
}

fn error_of(stuck: Stuck) -> Error {
    match stuck {
        Stuck::Work(why) => Error::GrammarTooComplex(why),
        Stuck::DeadEnd => {
            let why = "the grammar leads to where no token of the model can follow; no such output exists";
            Error::field("response_format", why)
        }
    }
}
