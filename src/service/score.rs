//! What a model does besides generating: a score is one pass over given tokens, after a session's if one is
//! named (the session is not changed); a count only tokenizes.

use std::sync::Arc;

use tokio::sync::oneshot;

use super::Service;
use super::caller::Caller;
use super::event::{TokenLogprob, TokenScore, Usage};
use super::fields::{model_name, up_to};
use super::prepare::fit_answer;
use super::request::{CountRequest, Counted, Input, ScoreRequest, Scores, Target};
use crate::count::count;
use crate::engine::{ScoreWork, Scored, TokenLogprobs, WorkOrigin};
use crate::error::Error;
use crate::hub::ModelAssets;
use crate::prompt::Prompt;
use crate::residency::{KeepAlive, ModelLease};

/// A pass that the engine can be asked for.
struct Pass {
    origin: WorkOrigin,
    prompt: Prompt,
    /// Index of the first token to score.
    from: usize,
    top_logprobs: u32,
    keep_alive: Option<KeepAlive>,
}

impl Service {
    /// Returns an input's tokens as a generation would have them. Needs no resident model.
    ///
    /// # Errors
    /// The request is refused, or the model's files cannot be used.
    pub async fn count_tokens(&self, caller: &Caller, request: CountRequest) -> Result<Counted, Error> {
        let CountRequest { model, input, answer_tokens_max } = request;
        let model = model_name("model", &model)?;
        // An empty text has a count too.
        let is_empty = matches!(&input, Input::Text(text) if text.is_empty());
        if !is_empty {
            input.check("prompt", &self.limits)?;
        }
        let assets = self.models.assets(&model).await?;
        if is_empty {
            return Ok(Counted { tokens: [].into(), context_length: assets.files.facts.context_length });
        }
        let preparation = self.preparation(caller, &assets, "prompt");
        let preparation = match answer_tokens_max {
            Some(max) => preparation.within_answer(max),
            None => preparation,
        };
        let tokens = preparation.context(input, None).await?.prompt.tokens;
        Ok(Counted { tokens, context_length: assets.files.facts.context_length })
    }

    /// Returns the log-probability of every token of an input.
    ///
    /// # Errors
    /// The request is refused, or the engine is dead.
    pub async fn score(&self, caller: &Caller, request: ScoreRequest) -> Result<Scores, Error> {
        let ScoreRequest {
            model,
            mut input,
            top_logprobs,
            session,
            priority,
            cache,
            answer_tokens_max,
            keep_alive,
        } = request;
        let target = Target::new(&model, &session)?;
        if let Input::Chat(chat) = &mut input {
            if matches!(target, Target::Session { .. }) {
                return Err(Error::field(
                    "chat",
                    "not in a session: text and token ids go on from its tokens",
                ));
            }
            // What would follow the messages is not theirs.
            chat.add_generation_prompt.get_or_insert(false);
        }
        input.check("text", &self.limits)?;
        up_to("top_logprobs", top_logprobs, "top_logprobs_max", self.limits.top_logprobs_max)?;
        cache.check()?;
        let input_path = match input {
            Input::Ids(_) => "token_ids.ids",
            Input::Text(_) => "text",
            Input::Chat(_) => "chat",
        };
        let (model, session, start) = match target {
            Target::Model(model) => (model, None, None),
            Target::Session { name, model } => {
                let key = caller.session(name);
                self.saves.warm(&self.sessions, &key).await?;
                let start = self.sessions.read(&key, |session| session.raw_start(model.as_ref()))?;
                (start.model.clone(), Some(key), Some(start))
            }
        };
        let cache = cache.for_work(start.as_ref().map_or("", |start| &start.cache_salt));
        let found = self.models.find(&model, caller).await?;
        let assets = &Arc::clone(found.assets());
        let from = start.as_ref().map_or(0, |start| start.tokens.len());
        let preparation = self.preparation(caller, assets, "text").within_context();
        let prompt = preparation.context(input, start).await?.prompt;
        caller.claim.release();
        let max = self.limits.score_tokens_max;
        if prompt.len() - from > max as usize {
            return Err(Error::field(input_path, format!("score_tokens_max: at most {max} tokens")));
        }
        fit_answer(prompt.len() - from, answer_tokens_max, &self.limits)?;
        let lease = self.models.lease(found, caller.connection).await?;
        let origin = caller.origin(session, priority, cache);
        let pass = Pass { origin, prompt, from, top_logprobs, keep_alive };
        let scored = pass.run(self, lease).await?;
        let prompt_tokens = count(pass.prompt.len());
        let usage = Usage {
            prompt_tokens,
            cached_tokens: scored.cached_tokens,
            completion_tokens: 0,
            reasoning_tokens: 0,
        };
        let scores = pass.prompt.tokens.iter().skip(from).zip(&scored.scores);
        let tokens = scores.map(|(id, score)| token_score(assets, *id, score.as_ref())).collect();
        Ok(Scores { tokens, usage })
    }
}

impl Pass {
    /// Dropping this future closes the reply, which stops the work.
    async fn run(&self, service: &Service, lease: ModelLease) -> Result<Scored, Error> {
        let (reply, answer) = oneshot::channel();
        let work = ScoreWork {
            origin: self.origin.clone(),
            model: lease,
            prompt: self.prompt.clone(),
            score_from: count(self.from),
            top_logprobs: self.top_logprobs,
            keep_alive: self.keep_alive,
            reply,
        };
        service.engine.score(work).await?;
        answer.await.map_err(|_| Error::EngineDead)?
    }
}

fn token_score(assets: &ModelAssets, id: u32, score: Option<&TokenLogprobs>) -> TokenScore {
    let tokenizer = &assets.tokenizer;
    let (token, top) = score.map_or(((id, 0.0), &[][..]), |score| (score.chosen, &score.top));
    TokenScore {
        token: TokenLogprob::new(tokenizer, token),
        has_logprob: score.is_some(),
        top: TokenLogprob::list(tokenizer, top),
    }
}
