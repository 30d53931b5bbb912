//! From a request to tokens: the session's turn begins, the model is made resident, the input is rendered
//! and tokenized, and everything is checked against the model.

use std::sync::Arc;
use std::time::SystemTime;

use serde_json::Value;
use tokio::sync::oneshot;

use super::caller::Caller;
use super::convert::{self, Chat, Input, OutputAsk, Resolved, SamplingAsk, StoppingAsk};
use super::edge::{Edge, TurnHold, blocking};
use super::pb;
use crate::engine::Priority;
use crate::error::Error;
use crate::hub::ModelAssets;
use crate::ids::{ModelName, SessionName};
use crate::limits::Limits;
use crate::session::{Message, TurnGuard, TurnRequest, TurnStart, chat_context};
use crate::text::{Conversation, TextError};

/// A generation that was asked for, checked as far as it can be without model and session.
pub(super) struct Ask {
    model: Option<ModelName>,
    input: Input,
    session: Option<SessionName>,
    expected_token_count: Option<u32>,
    sampling: SamplingAsk,
    stopping: StoppingAsk,
    output: OutputAsk,
    priority: Priority,
}

/// A generation that can be handed to the engine.
pub(super) struct Prepared {
    pub(super) assets: Arc<ModelAssets>,
    pub(super) tokens: Vec<u32>,
    pub(super) resolved: Resolved,
    pub(super) output: OutputAsk,
    pub(super) priority: Priority,
    pub(super) turn: Option<Turn>,
}

/// A session's turn, and what it adds if it ends well.
pub(super) struct Turn {
    pub(super) guard: TurnGuard<TurnHold>,
    pub(super) adds: Adds,
    /// Resolves when the session is deleted.
    pub(super) stopped: oneshot::Receiver<()>,
}

/// What a turn adds to its session beside the answer.
pub(super) enum Adds {
    Raw,
    Chat { messages: Vec<Message>, rendered: String },
}

impl Ask {
    pub(super) fn new(request: pb::GenerateRequest, limits: &Limits) -> Result<Self, Error> {
        let pb::GenerateRequest {
            model,
            input,
            session,
            expected_token_count,
            sampling,
            stopping,
            output,
            priority,
        } = request;
        let model = convert::optional_model("model", &model)?;
        if session.is_empty() {
            if model.is_none() {
                return Err(Error::field("model", "must be given where no session names it"));
            }
            if expected_token_count.is_some() {
                return Err(Error::field("expected_token_count", "needs a session"));
            }
        }
        let session = Some(session).filter(|name| !name.is_empty());
        Ok(Self {
            model,
            input: convert::generate_input(input)?,
            session: session.map(|name| convert::session_name("session", &name)).transpose()?,
            expected_token_count,
            sampling: SamplingAsk::new(sampling, limits)?,
            stopping: StoppingAsk::new(stopping, limits)?,
            output: OutputAsk::new(output, limits)?,
            priority: convert::priority(priority)?,
        })
    }

    /// Does everything up to the engine.
    pub(super) async fn prepare(self, edge: &Arc<Edge>, caller: &Caller) -> Result<Prepared, Error> {
        let (output, priority) = (self.output, self.priority);
        let Some(name) = self.session.clone() else {
            let (assets, context, resolved) = self.fit(edge, None).await?;
            return Ok(Prepared { assets, tokens: context.tokens, resolved, output, priority, turn: None });
        };
        let request = TurnRequest {
            model: self.model.clone(),
            input: self.input.kind(),
            expected_token_count: self.expected_token_count,
        };
        let (hold, mut stopped) = oneshot::channel();
        let (guard, start) = edge.sessions.begin(&caller.session(name), &request, hold)?;
        let (assets, context, resolved) = tokio::select! {
            fitted = self.fit(edge, Some(start)) => fitted?,
            _ = &mut stopped => return Err(session_deleted()),
        };
        let Context { tokens, adds } = context;
        let turn = Some(Turn { guard, adds, stopped });
        Ok(Prepared { assets, tokens, resolved, output, priority, turn })
    }

    /// Fits the request to its model.
    async fn fit(
        self,
        edge: &Arc<Edge>,
        start: Option<TurnStart>,
    ) -> Result<(Arc<ModelAssets>, Context, Resolved), Error> {
        let model = start.as_ref().map(|start| start.model.clone()).or(self.model);
        let assets =
            edge.ensure_loaded(&model.ok_or_else(|| Error::field("model", "must be given"))?).await?;
        let (given, now, text_bytes_max) =
            (Arc::clone(&assets), edge.clock.wall(), edge.limits.text_bytes_max);
        let context = blocking(move || context(&given, self.input, start, now, text_bytes_max)).await?;
        let prompt_tokens = convert::count(context.tokens.len());
        let asks = (&self.sampling, &self.stopping);
        let resolved = Resolved::new(asks, &assets, prompt_tokens, &edge.limits)?;
        Ok((assets, context, resolved))
    }
}

/// Why a turn's work stops when its session goes.
pub(super) fn session_deleted() -> Error {
    Error::Cancelled("the session was deleted".into())
}

/// What a generation runs on, and what it adds to its session.
pub(super) struct Context {
    pub(super) tokens: Vec<u32>,
    pub(super) adds: Adds,
}

/// Renders and tokenizes an input after what its session holds. Takes long for long texts.
pub(super) fn context(
    assets: &ModelAssets,
    input: Input,
    start: Option<TurnStart>,
    now: SystemTime,
    text_bytes_max: usize,
) -> Result<Context, Error> {
    let vocabulary = assets.facts.vocabulary_size;
    let context = match input {
        Input::Chat(chat) => chat_input(assets, chat, start.as_ref(), now, text_bytes_max)?,
        Input::Text(path, text) => {
            refuse_long(path, &text, text_bytes_max)?;
            let mut tokens = start.map(|start| start.tokens).unwrap_or_default();
            // The tokens around a whole text belong to its beginning only.
            let new = if tokens.is_empty() {
                assets.tokenizer.encode_prompt(&text)
            } else {
                assets.tokenizer.encode(&text, false)
            };
            tokens.extend(new.map_err(|error| Error::field(path, error.to_string()))?);
            Context { tokens, adds: Adds::Raw }
        }
        Input::Ids(ids) => {
            if let Some((index, id)) = ids.iter().enumerate().find(|(_, id)| **id >= vocabulary) {
                let why = format!("token id {id}: the vocabulary has {vocabulary} tokens");
                return Err(Error::field(format!("token_ids.ids[{index}]"), why));
            }
            let mut tokens = start.map(|start| start.tokens).unwrap_or_default();
            tokens.extend(ids);
            Context { tokens, adds: Adds::Raw }
        }
    };
    // A tokenizer may know tokens that its model does not.
    if let Some(id) = context.tokens.iter().find(|id| **id >= vocabulary) {
        return Err(Error::field("input", format!("token id {id}: the vocabulary has {vocabulary} tokens")));
    }
    if context.tokens.is_empty() { Err(Error::EmptyPrompt) } else { Ok(context) }
}

fn chat_input(
    assets: &ModelAssets,
    chat: Chat,
    start: Option<&TurnStart>,
    now: SystemTime,
    text_bytes_max: usize,
) -> Result<Context, Error> {
    let template = assets.chat_template.as_ref().ok_or_else(|| Error::NoChatTemplate(assets.name.clone()))?;
    let Chat { messages, tools, arguments } = chat;
    let old = start.into_iter().flat_map(|start| &start.messages);
    let all: Vec<Value> = old.chain(&messages).map(Message::to_template_value).collect();
    let conversation = Conversation {
        messages: &all,
        tools: &tools,
        arguments: &arguments,
        add_generation_prompt: true,
        now,
    };
    let rendered =
        template.render(&conversation).map_err(|error| Error::TemplateFailed(error.to_string()))?;
    refuse_long("chat", &rendered, text_bytes_max)?;
    // The template writes the special tokens itself.
    let encode = |text: &str| assets.tokenizer.encode(text, false);
    let tokens = match start {
        Some(start) => chat_context(start, &rendered, encode),
        None => encode(&rendered),
    };
    let tokens = tokens.map_err(|error: TextError| Error::field("chat", error.to_string()))?;
    Ok(Context { tokens, adds: Adds::Chat { messages, rendered } })
}

fn refuse_long(path: &str, text: &str, text_bytes_max: usize) -> Result<(), Error> {
    if text.len() <= text_bytes_max {
        return Ok(());
    }
    Err(Error::field(path, format!("text_bytes_max: at most {text_bytes_max} bytes, not {}", text.len())))
}
