//! `Score`: one pass over given tokens, after a session's if there is one; the session is not changed.

use std::sync::Arc;

use tokio::sync::oneshot;

use super::caller::Caller;
use super::convert;
use super::edge::{Edge, blocking};
use super::pb;
use super::prepare::context;
use crate::engine::{ScoreWork, Scored, TokenLogprobs};
use crate::error::Error;
use crate::hub::ModelAssets;
use crate::ids::{ModelName, SessionKey};
use crate::session::TurnStart;

pub(super) async fn score(
    edge: &Arc<Edge>,
    caller: &Caller,
    request: pb::ScoreRequest,
) -> Result<pb::ScoreResponse, Error> {
    let pb::ScoreRequest { model, input, top_logprobs, session, priority } = request;
    let priority = convert::priority(priority)?;
    let model = convert::optional_model("model", &model)?;
    let input = convert::score_input(input)?;
    let limits = &edge.limits;
    if top_logprobs > limits.top_logprobs_max {
        return Err(Error::field("top_logprobs", format!("must be 0 to {}", limits.top_logprobs_max)));
    }
    let session = Some(session).filter(|name| !name.is_empty());
    let session = session.map(|name| convert::session_name("session", &name)).transpose()?;
    let session = session.map(|name| caller.session(name));
    let (model, before) = ground(edge, model, session.as_ref())?;
    let assets = edge.ensure_loaded(&model).await?;
    let score_from = before.as_ref().map_or(0, |start| start.tokens.len());
    let input_path = input.path();
    let (given, now, text_bytes_max) = (Arc::clone(&assets), edge.clock.wall(), limits.text_bytes_max);
    let tokens = blocking(move || context(&given, input, before, now, text_bytes_max)).await?.tokens;
    let max = limits.score_tokens_max;
    if tokens.len() - score_from > max as usize {
        return Err(Error::field(input_path, format!("score_tokens_max: at most {max} tokens")));
    }
    check_length(&assets, tokens.len())?;
    let scored_tokens = tokens.get(score_from..).map(<[u32]>::to_vec).unwrap_or_default();
    let prompt_tokens = convert::count(tokens.len());
    let work = |tokens: Vec<u32>, reply| ScoreWork {
        origin: caller.origin(session.clone(), priority),
        model: model.clone(),
        prompt: tokens.into(),
        score_from: convert::count(score_from),
        top_logprobs,
        reply,
    };
    let scored = match ask(edge, |reply| work(tokens.clone(), reply)).await {
        // The engine lost the model since it was loaded.
        Err(Error::ModelUnloaded(lost) | Error::ModelNotLoaded(lost)) => {
            edge.resident.remove(&lost);
            edge.ensure_loaded(&lost).await?;
            ask(edge, |reply| work(tokens, reply)).await?
        }
        outcome => outcome?,
    };
    let usage = pb::Usage { prompt_tokens, cached_tokens: scored.cached_tokens, completion_tokens: 0 };
    let scores = scored_tokens.iter().zip(&scored.scores);
    let tokens = scores.map(|(id, score)| token_score(&assets, *id, score.as_ref())).collect();
    Ok(pb::ScoreResponse { tokens, usage: Some(usage) })
}

/// The model, and the session's tokens so far.
fn ground(
    edge: &Edge,
    model: Option<ModelName>,
    session: Option<&SessionKey>,
) -> Result<(ModelName, Option<TurnStart>), Error> {
    let Some(key) = session else {
        let model = model.ok_or_else(|| Error::field("model", "must be given where no session names it"))?;
        return Ok((model, None));
    };
    edge.sessions.with(key, |session, _| {
        let bound = session.model().clone();
        if model.is_some_and(|model| model != bound) {
            return Err(Error::SessionWrongModel { session: key.name.clone(), model: bound });
        }
        let tokens = session.tokens().to_vec();
        Ok((bound.clone(), Some(TurnStart { model: bound, messages: Vec::new(), text: None, tokens })))
    })
}

fn check_length(assets: &ModelAssets, tokens: usize) -> Result<(), Error> {
    let (prompt_tokens, context_length) = (convert::count(tokens), assets.facts.context_length);
    if prompt_tokens > context_length {
        return Err(Error::ContextOverflow { prompt_tokens, context_length });
    }
    Ok(())
}

/// Dropping this future closes the reply, which stops the work.
async fn ask(
    edge: &Edge,
    work: impl FnOnce(oneshot::Sender<Result<Scored, Error>>) -> ScoreWork,
) -> Result<Scored, Error> {
    let (reply, answer) = oneshot::channel();
    edge.engine.score(work(reply))?;
    answer.await.map_err(|_| Error::EngineDead)?
}

fn token_score(assets: &ModelAssets, id: u32, score: Option<&TokenLogprobs>) -> pb::TokenScore {
    let tokenizer = &assets.tokenizer;
    let (token, top) = score.map_or(((id, 0.0), &[][..]), |score| (score.chosen, &score.top));
    pb::TokenScore {
        token: Some(convert::token_logprob(tokenizer, token)),
        has_logprob: score.is_some(),
        top: top.iter().map(|pair| convert::token_logprob(tokenizer, *pair)).collect(),
    }
}
