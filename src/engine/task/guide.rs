//! A generation's way through its grammar: which tokens it may draw next. They are found out by a worker
//! while the step runs that draws one of them.
//!
//! Where a model reasons first, its grammar begins behind that, as the reader of its output says.
//!
//! An output whose answer was not there in time waits outside of steps until it is. Where a worker took long
//! for an answer, the grammar is slow: its next ones are waited for outside of steps too, whichever outputs
//! are to have them.

use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, TryRecvError};
use std::time::Duration;

use crate::backend::TokenSet;
use crate::clock::Moment;
use crate::engine::api::{Barred, Constraint, Starts};
use crate::engine::masks::{Answer, Asked, MaskWorkers};
use crate::engine::task::reading::Reader;
use crate::error::Error;
use crate::grammar::{Allowed, Grammar, Matcher, Stuck};

/// The way of one generation.
#[derive(Debug)]
pub(super) struct Guide {
    grammar: Arc<Grammar>,
    state: State,
    /// What comes before it; None once it has begun.
    before: Option<Before>,
    /// Whether no step waits for the answer that is asked for: one has in vain, or the grammar is slow.
    waits_apart: bool,
}

/// What comes before a grammar.
#[derive(Debug)]
enum Before {
    /// Perhaps reasoning: the tokens that open it, how many of them came, and what is not drawn in it.
    Opening(Arc<[u32]>, usize, Arc<Barred>),
    /// Reasoning, in which these tokens are not drawn.
    Reasoning(Arc<Barred>),
}

#[derive(Debug)]
enum State {
    /// It has not begun.
    Start,
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

/// What bounds the next token.
#[derive(Clone, Copy, Debug)]
pub(super) enum Bounds<'a> {
    /// It is one of a mask.
    Mask,
    /// It is none of these.
    Barred(&'a Barred),
}

impl Guide {
    pub(super) fn new(constraint: Constraint) -> Self {
        let Constraint { grammar, starts } = constraint;
        let before = match starts {
            Starts::Immediately => None,
            Starts::AfterReasoning { opening, barred } if opening.is_empty() => {
                Some(Before::Reasoning(barred))
            }
            Starts::AfterReasoning { opening, barred } => Some(Before::Opening(opening, 0, barred)),
        };
        Self { grammar, state: State::Start, before, waits_apart: false }
    }

    /// Returns what bounds the next token.
    pub(super) fn bounds(&self) -> Bounds<'_> {
        match &self.before {
            Some(Before::Reasoning(barred)) => Bounds::Barred(barred),
            Some(Before::Opening(..)) | None => Bounds::Mask,
        }
    }

    /// Takes a drawn token, which `reader` has read: it begins, or asks a worker what may follow.
    pub(super) fn take(&mut self, token: u32, reader: &Reader, workers: &mut MaskWorkers) {
        match self.before.take() {
            None => {}
            Some(Before::Reasoning(_)) if reader.speaks() => return,
            Some(before @ Before::Reasoning(_)) => return self.before = Some(before),
            // What reasoning and the grammar both begin with is the grammar's.
            Some(Before::Opening(opening, came, barred))
                if opening[came] == token && (came > 0 || !self.allows(token)) =>
            {
                let is_open = came + 1 == opening.len();
                self.before = Some(if is_open {
                    Before::Reasoning(barred)
                } else {
                    Before::Opening(opening, came + 1, barred)
                });
                return;
            }
            Some(Before::Opening(..)) => {}
        }
        let gone = State::Failed(Error::Internal("a grammar's way is lost".into()));
        let matcher = match std::mem::replace(&mut self.state, gone) {
            State::Start => None,
            State::Known(matcher, _) => Some(matcher),
            State::Asked(..) | State::Failed(_) => unreachable!("what is drawn was known to be allowed"),
        };
        self.waits_apart = self.grammar.pace().is_slow();
        self.state = State::Asked(workers.advance(&self.grammar, matcher, token), None);
    }

    /// Returns whether steps go on without it until the answer is there; with `is_strict` no step begins
    /// before.
    pub(super) fn waits(&self, is_strict: bool) -> bool {
        matches!(self.state, State::Asked(..)) && (is_strict || self.waits_apart)
    }

    /// Looks for the answer, and waits for it at most for `wait`.
    pub(super) fn settle(&mut self, wait: Duration) {
        let State::Asked(asked, _) = &self.state else { return };
        match asked.answer.recv_timeout(wait) {
            Ok(answer) => self.note(answer),
            Err(RecvTimeoutError::Disconnected) => self.lose(),
            Err(RecvTimeoutError::Timeout) => self.waits_apart = true,
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
                    asked.cancel();
                    let why = "mask_ms_max: what may come next was not found in time".into();
                    self.state = State::Failed(Error::GrammarTooComplex(why));
                }
            }
            Err(TryRecvError::Empty) => {}
        }
    }

    /// Returns whether a token is known to be allowed.
    fn allows(&self, token: u32) -> bool {
        let Some(Allowed::Tokens(tokens)) = self.known() else { return false };
        tokens.get(token as usize / 32).is_some_and(|word| word >> (token % 32) & 1 == 1)
    }

    /// Returns what may be drawn next, if it is known.
    fn known(&self) -> Option<&Allowed> {
        match &self.state {
            State::Start => Some(self.grammar.first()),
            State::Known(_, allowed) => Some(allowed),
            State::Asked(..) | State::Failed(_) => None,
        }
    }

    /// Returns what is known of the next token.
    pub(super) fn mask(&self) -> Mask {
        match (&self.state, self.known()) {
            (State::Failed(error), _) => Mask::Failed(error.clone()),
            (_, None) => Mask::Late,
            (_, Some(Allowed::Nothing)) => Mask::Whole,
            (_, Some(Allowed::Tokens(tokens))) => match &self.before {
                Some(Before::Opening(opening, came, _)) => Mask::Tokens(opened(tokens, opening, *came)),
                Some(Before::Reasoning(_)) | None => Mask::Tokens(TokenSet::clone(tokens)),
            },
        }
    }

    fn note(&mut self, (matcher, allowed): Answer) {
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
        if let State::Asked(asked, _) = &self.state {
            asked.cancel();
        }
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
        Stuck::Broken(why) => Error::Internal(format!("a grammar's matcher: {why}")),
        Stuck::DeadEnd => {
            let why = "the grammar leads to where no token of the model can follow; no such output exists";
            Error::field("response_format", why)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::engine::tests::grammars::{constraint, grammar};
    use crate::engine::tests::{HandClock, tokenizer};
    use crate::text::StopMatcher;

    #[test]
    fn a_grammar_that_was_slow_is_slow_for_all_its_outputs() {
        let mut workers = MaskWorkers::new(0, Arc::new(HandClock(Mutex::default())));
        let reader = Reader::new(None, StopMatcher::new([].into()));
        let grammar = grammar(&tokenizer(), "( t500){9}", &[]);
        let mut guides = [(); 3].map(|()| Guide::new(constraint(&grammar)));
        workers.hold();
        guides[0].take(500, &reader, &mut workers);
        guides[1].take(500, &reader, &mut workers);
        assert!(!guides[0].waits(false) && guides[0].waits(true));
        guides[0].settle(Duration::ZERO);
        assert!(guides[0].waits(false) && !guides[1].waits(false), "the other's answer may be in time");
        grammar.pace().note(Duration::from_secs(1));
        guides[2].take(500, &reader, &mut workers);
        assert!(guides[2].waits(false) && !guides[1].waits(false));
        workers.release();
        for guide in &mut guides {
            guide.look(Moment::default(), Duration::from_secs(1));
            assert!(!guide.waits(true) && matches!(guide.mask(), Mask::Tokens(_)));
        }
    }
}
