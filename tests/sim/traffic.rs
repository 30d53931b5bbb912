//! What clients ask for, and how they read what comes.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};

use super::request::{Choice, Inbox, Request, Turn, cache_use};
use super::seen::Scope;
use super::world::{MODELS, POISON, PRINCIPALS, World};
use crate::backend::fake::{CONTEXT, spec};
use crate::clock::Clock;
use crate::engine::tests::grammars::constraint;
use crate::engine::{
    Command, GenerateWork, ModelLease, Penalty, Sampling, ScoreWork, Stopping, Tenancy, WorkOrigin,
};
use crate::error::Error;
use crate::ids::{ConnectionId, ModelName, SessionKey};
use crate::sched::{Owner, Priority};

const CLIENTS: u64 = 5;

impl World {
    fn origin(&mut self, session: Option<&SessionKey>) -> WorkOrigin {
        let principal = format!("p{}", self.random.below(PRINCIPALS));
        let principal = session.map_or(principal.as_str().into(), |key| key.owner.clone());
        let number = self.random.below(CLIENTS);
        let client = format!("{principal}/c{number}");
        let now = self.clock.now();
        let deadline = self.random.once_in(8).then(|| {
            let left = self.random.below(1200);
            now.after(Duration::from_millis(left))
        });
        let priority = match self.random.below(4) {
            0 => Priority::Interactive,
            1 => Priority::Background,
            _ => Priority::Normal,
        };
        WorkOrigin {
            request: "r".into(),
            owner: Owner { principal, connection: ConnectionId(number / 2), client: client.as_str().into() },
            priority,
            session: session.cloned(),
            pinned: session.is_some() && self.random.once_in(4),
            turn: None,
            cache: cache_use(self.random.below(12)),
            arrived: now,
            deadline,
        }
    }

    /// Returns a prompt, which may begin as others do.
    fn tokens(&mut self) -> Vec<u32> {
        let shared = self.random.small(3) * 40;
        let longest = if self.random.once_in(10) { 600 } else { 60 };
        let own = 1 + self.random.below(longest);
        let mut tokens: Vec<u32> = (0..shared).map(|place| place * 7 % 900).collect();
        tokens.extend((0..own).map(|_| self.random.small(900)).collect::<Vec<_>>());
        if self.random.once_in(60) {
            tokens.push(POISON);
        }
        tokens
    }

    pub(super) fn generate(&mut self, turn: Option<(Turn, ModelName, Vec<u32>)>) {
        let model: ModelName = MODELS[usize::try_from(self.random.below(2)).unwrap()].into();
        let new = self.tokens();
        let (turn, model, prompt) = match turn {
            Some((turn, model, old)) => (Some(turn), model, [old, new].concat()),
            None => (None, model, new),
        };
        let room = CONTEXT.saturating_sub(u32::try_from(prompt.len()).unwrap());
        if room == 0 {
            return;
        }
        let longest = if self.random.once_in(12) { 900 } else { 40 };
        // At times only the context is to be computed.
        let max_tokens = if self.random.once_in(10) { 0 } else { (1 + self.random.small(longest)).min(room) };
        let sampling = if turn.is_none() { self.sampling() } else { greedy() };
        // At times a request has several choices, but not a turn.
        let more = if turn.is_none() && max_tokens > 0 && self.random.once_in(6) {
            1 + self.random.below(3)
        } else {
            0
        };
        let grammar = (max_tokens > 0 && self.random.once_in(12)).then(|| Arc::clone(&self.grammar));
        let (mut senders, mut choices) = (vec![], vec![]);
        for number in 0..=more {
            let (events, inbox) = mpsc::channel(3 + usize::try_from(self.random.below(30)).unwrap());
            senders.push(events);
            choices.push(Choice::new(inbox, &sampling, number, grammar.as_ref()));
        }
        let others = senders.split_off(1);
        let origin = self.origin(turn.as_ref().map(|turn| turn.guard.key()));
        let principal = origin.owner.principal.clone();
        let scope = Scope { principal, model: model.clone(), cache: origin.cache };
        self.seen.add(&scope, &prompt);
        let work = GenerateWork {
            origin,
            model: self.lease(&model),
            prompt: prompt.clone().into(),
            sampling,
            stopping: Stopping { max_tokens, stop_strings: Arc::new([]), stop_token_ids: vec![] },
            constraint: grammar.as_ref().map(constraint),
            top_logprobs: None,
            tokenizer: self.tokenizer.clone(),
            detokenizer: self.tokenizer.detokenizer(),
            reading: None,
            keep_alive: self.keep_alive(),
            events: senders.remove(0),
            others,
        };
        self.engine.command(Command::Generate(Box::new(work)));
        let mut request = Request::new(prompt, max_tokens, scope, Inbox::Choices(choices));
        request.turn = turn;
        if self.random.once_in(10) {
            request.reads_from = self.ticks + self.random.small(400);
        }
        self.requests.push(request);
    }

    /// Returns how the tokens of a request are drawn: mostly the most likely ones.
    fn sampling(&mut self) -> Sampling {
        if self.random.once_in(5) {
            Sampling { temperature: 1.0, seed: self.random.below(1000), ..greedy() }
        } else {
            greedy()
        }
    }

    pub(super) fn score(&mut self) {
        let (reply, answer) = oneshot::channel();
        let (model, tokens): (ModelName, _) = (MODELS[0].into(), self.tokens());
        let origin = self.origin(None);
        let principal = origin.owner.principal.clone();
        let scope = Scope { principal, model: model.clone(), cache: origin.cache };
        self.seen.add(&scope, &tokens);
        let work = ScoreWork {
            origin,
            model: self.lease(&model),
            prompt: tokens.clone().into(),
            score_from: 0,
            top_logprobs: 0,
            keep_alive: None,
            reply,
        };
        self.engine.command(Command::Score(Box::new(work)));
        self.requests.push(Request::new(tokens, 0, scope, Inbox::Scores(answer)));
    }

    /// A lease of the model; of an earlier tenancy if it is not resident, as if the device had failed
    /// meanwhile.
    pub(super) fn lease(&self, model: &ModelName) -> ModelLease {
        let lease = self.engine.table().borrow().lease(model);
        lease.unwrap_or_else(|| Tenancy::new(spec(model.as_str()).assets).lease())
    }

    pub(super) fn somebody_leaves(&mut self) {
        let count = self.requests.len() as u64;
        if count > 0 {
            let place = usize::try_from(self.random.below(count)).unwrap();
            drop(self.requests.swap_remove(place));
            self.note_uses();
            *self.ended.entry("Cancelled".into()).or_default() += 1;
        }
    }

    pub(super) fn read(&mut self) {
        let mut reading = std::mem::take(&mut self.requests);
        reading.retain_mut(|request| {
            // The service stops a turn whose session is gone.
            let stopped = request.turn.as_mut().is_some_and(|turn| {
                turn.stopped.try_recv().is_err_and(|e| e == oneshot::error::TryRecvError::Closed)
            });
            !stopped
        });
        let mut waiting = vec![];
        for mut request in reading {
            if self.ticks < request.reads_from {
                waiting.push(request);
                continue;
            }
            let had_started = request.cached.is_some();
            let outcome = request.read();
            if !had_started && let Some(cached) = request.cached {
                let most = self.seen.longest(&request.scope, &request.prompt);
                assert!(cached as usize <= most, "{cached} tokens of a context of which {most} were its own");
            }
            match outcome {
                None => waiting.push(request),
                Some(outcome) => self.note_end(request, &outcome),
            }
        }
        self.requests = waiting;
    }

    fn note_end(&mut self, request: Request, outcome: &Result<(), Error>) {
        let how = match outcome {
            Ok(()) => "ok".to_owned(),
            Err(Error::NonFiniteLogits) => {
                assert!(request.prompt.contains(&POISON), "only poison does that");
                "NonFiniteLogits".to_owned()
            }
            Err(error) => {
                let name = format!("{error:?}");
                name.split(['(', ' ', '{']).next().unwrap_or_default().to_owned()
            }
        };
        *self.ended.entry(how).or_default() += 1;
        request.contexts().iter().for_each(|context| self.seen.add(&request.scope, context));
        // A turn that does not end well is dropped with its request, and leaves no trace.
        if outcome.is_ok()
            && let Some((key, tokens)) = request.keep()
        {
            self.kept.get_mut(&key).unwrap().tokens = tokens;
        }
    }
}

fn greedy() -> Sampling {
    let off = |value| Penalty { value, context_size: 0 };
    Sampling {
        temperature: 0.0,
        top_p: 1.0,
        top_k: 0,
        min_p: 0.0,
        typical_p: 1.0,
        seed: 0,
        repetition: off(1.0),
        presence: off(0.0),
        frequency: off(0.0),
        logit_bias: vec![],
        xtc: None,
        dry: None,
    }
}
