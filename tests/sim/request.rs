//! One request of the simulated day: what was asked, what came, and the check that it is right.

use tokio::sync::{mpsc, oneshot};

use crate::backend::fake::next_token;
use crate::engine::{CacheUse, GenerateEvent, Salt, Scored};
use crate::error::Error;
use crate::ids::SessionKey;
use crate::session::{InputKind, SessionLimits, TurnContent, TurnGuard, TurnRequest};

/// Few sessions, with room for all that a day brings.
pub(super) const SESSION_LIMITS: SessionLimits = SessionLimits {
    sessions_max: 6,
    sessions_pinned_max: 2,
    session_labels_max: 2,
    session_bytes_max: 1 << 20,
    sessions_bytes_max: 1 << 22,
    sessions_disk_bytes_max: 1 << 23,
    session_watches_max: 1,
};

/// Returns the request of a raw turn after `expected` tokens.
pub(super) fn raw_turn(expected: u32) -> TurnRequest {
    let expected_token_count = Some(expected);
    TurnRequest { model: None, input: InputKind::Raw, expected_token_count, input_bytes: 0, history: None }
}

/// Returns what a request does with cached KV; `number` is a random one below 12.
pub(super) fn cache_use(number: u64) -> CacheUse {
    match number {
        0 => CacheUse::Off,
        1 => CacheUse::Shared(Salt([7; 32])),
        _ => CacheUse::default(),
    }
}

/// A session's turn that a request is.
pub(super) struct Turn {
    pub(super) guard: TurnGuard<oneshot::Sender<()>>,
    /// Resolves when the session is deleted.
    pub(super) stopped: oneshot::Receiver<()>,
}

/// A request that was sent.
pub(super) struct Request {
    pub(super) prompt: Vec<u32>,
    pub(super) max_tokens: u32,
    pub(super) inbox: Inbox,
    pub(super) turn: Option<Turn>,
    /// The caller does not read before this tick of the world.
    pub(super) reads_from: u32,
    tokens: Vec<u32>,
    started: bool,
}

/// Where its answer comes.
pub(super) enum Inbox {
    Events(mpsc::Receiver<GenerateEvent>),
    Scores(oneshot::Receiver<Result<Scored, Error>>),
}

/// A session, and the tokens it is to hold after a turn that was committed.
pub(super) type Kept = (SessionKey, Vec<u32>);

impl Request {
    pub(super) fn new(prompt: Vec<u32>, max_tokens: u32, inbox: Inbox) -> Self {
        Self { prompt, max_tokens, inbox, turn: None, reads_from: 0, tokens: vec![], started: false }
    }

    /// Reads what has come; returns the outcome at its end.
    pub(super) fn read(&mut self) -> Option<Result<(), Error>> {
        match &mut self.inbox {
            Inbox::Scores(scores) => match scores.try_recv() {
                Ok(outcome) => Some(outcome.map(|scored| self.check_scores(&scored))),
                Err(oneshot::error::TryRecvError::Empty) => None,
                Err(oneshot::error::TryRecvError::Closed) => panic!("a score ends without an answer"),
            },
            Inbox::Events(_) => self.read_events(),
        }
    }

    fn read_events(&mut self) -> Option<Result<(), Error>> {
        loop {
            let Inbox::Events(events) = &mut self.inbox else { return None };
            match events.try_recv() {
                Ok(GenerateEvent::Started { cached_tokens, .. }) => {
                    assert!(!self.started, "a request starts once");
                    assert!((cached_tokens as usize) < self.prompt.len(), "one token has to run");
                    self.started = true;
                }
                Ok(GenerateEvent::Progress { .. }) => assert!(self.started, "progress comes after the start"),
                Ok(GenerateEvent::Delta(delta)) => {
                    assert!(self.started, "output comes after the start");
                    self.tokens.extend(delta.tokens);
                    self.check_tokens();
                }
                Ok(GenerateEvent::Ended(outcome)) => {
                    assert!(events.try_recv().is_err(), "nothing follows the end");
                    return Some(outcome.map(|generated| {
                        assert_eq!(generated.tokens, self.tokens, "the deltas are the output");
                        assert_eq!(self.tokens.len(), self.max_tokens as usize, "it runs to its end");
                    }));
                }
                Err(mpsc::error::TryRecvError::Empty) => return None,
                Err(mpsc::error::TryRecvError::Disconnected) => {
                    panic!("a stream ends without its last event")
                }
            }
        }
    }

    /// Checks that what came is what the model says alone.
    fn check_tokens(&self) {
        let mut context = self.prompt.clone();
        for &token in &self.tokens {
            assert_eq!(token, next_token(&context), "output is as it would be alone");
            context.push(token);
        }
    }

    fn check_scores(&self, scored: &Scored) {
        assert_eq!(scored.scores.len(), self.prompt.len(), "every token has a score");
        let tokens: Vec<u32> = scored.scores.iter().flatten().map(|score| score.chosen.0).collect();
        assert_eq!(tokens, self.prompt[1..], "scores are of the tokens that were sent");
    }

    /// Commits its turn, as the service does at a good end; a deleted session keeps nothing.
    pub(super) fn keep(self) -> Option<Kept> {
        let turn = self.turn?;
        let key = turn.guard.key().clone();
        let tokens = [self.prompt, self.tokens].concat();
        let kept = turn.guard.commit(tokens.clone(), TurnContent::Raw);
        kept.is_ok().then_some((key, tokens))
    }
}
