//! One request of the simulated day: what was asked, what came, and the check that it is right.

use std::cell::OnceCell;
use std::sync::Arc;
use std::time::SystemTime;

use tokio::sync::{mpsc, oneshot};

use super::seen::Scope;
use crate::backend::fake::drawn_token;
use crate::engine::task::uniform;
use crate::engine::tests::grammars::constrained_by;
use crate::engine::{CacheUse, Finish, GenerateEvent, Salt, Sampling, Scored};
use crate::error::Error;
use crate::grammar::Grammar;
use crate::ids::SessionKey;
use crate::session::{
    AnswerStart, InputKind, Message, Role, SessionLimits, Terms, TurnContent, TurnGuard, TurnRequest,
};

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

/// Returns the request of a turn after `expected` tokens.
pub(super) fn turn(input: InputKind, expected: u32) -> TurnRequest {
    let expected_token_count = Some(expected);
    TurnRequest { model: None, input, expected_token_count, input_bytes: 0, history: None }
}

/// Returns the text of tokens.
fn text(tokens: &[u32]) -> String {
    tokens.iter().map(|token| format!("{token} ")).collect()
}

/// Returns what a chat turn adds; one that draws nothing has no answer.
fn chat(prompt: &[u32], output: &[u32]) -> TurnContent {
    let before = text(prompt);
    let asked = Message::text(Role::User, text(&prompt[prompt.len() / 2..]));
    let (tokens, text_bytes) = (prompt.len(), Some(before.len()));
    let answer = AnswerStart { tokens, text_bytes, ending_bytes: Some(0), ..AnswerStart::default() };
    let said = (!output.is_empty()).then(|| Message::text(Role::Assistant, text(output)));
    TurnContent::Chat {
        answer: said.as_ref().map(|_| answer),
        messages: std::iter::once(asked).chain(said).collect(),
        text: Some((before + &text(output)).into()),
        text_is_whole: output.len() % 7 != 1,
    }
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
    /// Its number.
    pub(super) number: u64,
    pub(super) input: InputKind,
}

/// A request that was sent.
pub(super) struct Request {
    pub(super) prompt: Vec<u32>,
    pub(super) max_tokens: u32,
    pub(super) inbox: Inbox,
    pub(super) turn: Option<Turn>,
    /// The caller does not read before this tick of the world.
    pub(super) reads_from: u32,
    /// Who may find what it computes.
    pub(super) scope: Scope,
    /// The tokens that it found cached when it started.
    pub(super) cached: Option<u32>,
}

/// Where its answer comes.
pub(super) enum Inbox {
    Choices(Vec<Choice>),
    Scores(oneshot::Receiver<Result<Scored, Error>>),
}

/// One of its outputs.
pub(super) struct Choice {
    events: mpsc::Receiver<GenerateEvent>,
    temperature: f32,
    seed: u64,
    /// What it obeys.
    grammar: Option<Arc<Grammar>>,
    /// What it is alone, once that was asked for.
    expected: OnceCell<Vec<u32>>,
    tokens: Vec<u32>,
    has_ended: bool,
}

impl Choice {
    /// Returns the choice of this number.
    pub(super) fn new(
        events: mpsc::Receiver<GenerateEvent>,
        sampling: &Sampling,
        number: u64,
        grammar: Option<&Arc<Grammar>>,
    ) -> Self {
        let (temperature, seed) = (sampling.temperature, sampling.seed + number);
        let (grammar, expected) = (grammar.cloned(), OnceCell::new());
        Self { events, temperature, seed, grammar, expected, tokens: vec![], has_ended: false }
    }

    /// Reads what has come of the output after `prompt`; returns the outcome at its end.
    fn read(
        &mut self,
        (prompt, max_tokens): (&[u32], u32),
        cached: &mut Option<u32>,
    ) -> Option<Result<(), Error>> {
        loop {
            match self.events.try_recv() {
                Ok(GenerateEvent::Started { cached_tokens, .. }) => {
                    assert_eq!(*cached, None, "a request starts once");
                    assert!((cached_tokens as usize) < prompt.len(), "one token has to run");
                    *cached = Some(cached_tokens);
                }
                Ok(GenerateEvent::Progress { .. }) => {
                    let is_early = cached.is_some() && self.tokens.is_empty();
                    assert!(is_early, "progress comes after the start and before output");
                }
                Ok(GenerateEvent::Delta(delta)) => {
                    assert!(cached.is_some(), "output comes after the start");
                    self.tokens.extend(delta.tokens);
                    let expected = self.expected(prompt, max_tokens);
                    let came = self.tokens.len();
                    assert_eq!(self.tokens, expected[..came], "output is as it would be alone");
                }
                Ok(GenerateEvent::Ended(outcome)) => {
                    assert!(self.events.try_recv().is_err(), "nothing follows the end");
                    self.has_ended = true;
                    return Some(outcome.map(|generated| {
                        assert_eq!(generated.tokens, self.tokens, "the deltas are the output");
                        let expected = self.expected(prompt, max_tokens);
                        assert_eq!(self.tokens.len(), expected.len(), "it runs to its end");
                        let is_cut = self.tokens.len() == max_tokens as usize;
                        assert_eq!(generated.finish == Finish::Length, is_cut, "it says how it ended");
                    }));
                }
                Err(mpsc::error::TryRecvError::Empty) => return None,
                Err(mpsc::error::TryRecvError::Disconnected) => {
                    panic!("a stream ends without its last event")
                }
            }
        }
    }

    /// Returns what the model says alone, by its grammar if it has one.
    fn expected(&self, prompt: &[u32], max_tokens: u32) -> &[u32] {
        let draw = |context: &[u32]| {
            let drawn = uniform(self.seed, context.len() as u64);
            drawn_token(context, self.temperature, drawn)
        };
        let most = max_tokens as usize;
        self.expected.get_or_init(|| match &self.grammar {
            Some(grammar) => constrained_by(grammar, prompt, (most, &[]), draw),
            None => {
                let mut context = prompt.to_vec();
                (0..most).for_each(|_| context.push(draw(&context)));
                context.split_off(prompt.len())
            }
        })
    }
}

/// What clients know of a session.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Known {
    pub(super) tokens: Vec<u32>,
    pub(super) terms: Terms,
    /// Time of its last use.
    pub(super) used: SystemTime,
    /// The number of its last turn, which may run.
    pub(super) turn: Option<u64>,
}

impl Known {
    pub(super) fn is_expired(&self, now: SystemTime) -> bool {
        self.terms.end(self.used).is_some_and(|end| end <= now)
    }
}

impl Request {
    pub(super) fn new(prompt: Vec<u32>, max_tokens: u32, scope: Scope, inbox: Inbox) -> Self {
        let (turn, cached) = (None, None);
        Self { prompt, max_tokens, inbox, turn, reads_from: 0, scope, cached }
    }

    /// Returns its prompt and what came, for each choice.
    pub(super) fn contexts(&self) -> Vec<Vec<u32>> {
        match &self.inbox {
            Inbox::Choices(choices) => {
                choices.iter().map(|choice| [&self.prompt[..], &choice.tokens].concat()).collect()
            }
            Inbox::Scores(_) => vec![self.prompt.clone()],
        }
    }

    /// Reads what has come; returns the outcome at its end.
    pub(super) fn read(&mut self) -> Option<Result<(), Error>> {
        match &mut self.inbox {
            Inbox::Scores(scores) => match scores.try_recv() {
                Ok(outcome) => Some(outcome.map(|scored| self.check_scores(&scored))),
                Err(oneshot::error::TryRecvError::Empty) => None,
                Err(oneshot::error::TryRecvError::Closed) => panic!("a score ends without an answer"),
            },
            Inbox::Choices(_) => self.read_choices(),
        }
    }

    /// Reads all that has come; an error ends the request, as it does in the service.
    fn read_choices(&mut self) -> Option<Result<(), Error>> {
        let Self { inbox: Inbox::Choices(choices), prompt, max_tokens, cached, .. } = self else {
            return None;
        };
        for choice in choices.iter_mut().filter(|choice| !choice.has_ended) {
            if let Some(Err(error)) = choice.read((prompt, *max_tokens), cached) {
                return Some(Err(error));
            }
        }
        choices.iter().all(|choice| choice.has_ended).then_some(Ok(()))
    }

    fn check_scores(&self, scored: &Scored) {
        assert_eq!(scored.scores.len(), self.prompt.len(), "every token has a score");
        let tokens: Vec<u32> = scored.scores.iter().flatten().map(|score| score.chosen.0).collect();
        assert_eq!(tokens, self.prompt[1..], "scores are of the tokens that were sent");
    }

    /// Commits its turn, as the service does at a good end; a deleted session keeps nothing. Returns the
    /// session and the tokens that it is to hold.
    pub(super) fn keep(self) -> Option<(SessionKey, Vec<u32>)> {
        let tokens = self.contexts().pop()?;
        let Self { prompt, turn, .. } = self;
        let Turn { guard, input, .. } = turn?;
        let content = match input {
            InputKind::Raw => TurnContent::Raw,
            InputKind::Chat => chat(&prompt, &tokens[prompt.len()..]),
        };
        let key = guard.key().clone();
        let kept = guard.commit(tokens.clone(), content);
        kept.is_ok().then_some((key, tokens))
    }
}
