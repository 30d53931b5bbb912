//! A generation from its request to its prompt: everything is checked that needs no model, the session's turn
//! begins, the model is made resident, the input is rendered and tokenized. [`Generation`] takes over from
//! there. Whatever fails on the way leaves the session as it was.

use std::sync::Arc;
use std::time::SystemTime;

use serde_json::Value;

use super::caller::Caller;
use super::generation::{Adds, Context, Generation, Prepared};
use super::request::{Chat, GenerateRequest, Input, Target, Tool};
use super::sampling::Resolved;
use super::sessions::{Turn, or_session_deleted};
use super::{Service, blocking, count};
use crate::error::Error;
use crate::hub::ModelAssets;
use crate::session::{Message, TurnRequest, TurnStart, chat_context, joined};
use crate::text::{Conversation, TextError};

impl Service {
    /// Checks and prepares a request and hands it to the engine; returns once the engine has admitted it.
    ///
    /// # Errors
    /// The request is refused, its session was deleted meanwhile, or the engine is dead.
    pub async fn generate(&self, caller: &Caller, request: GenerateRequest) -> Result<Generation, Error> {
        let target = request.check(&self.limits)?;
        let GenerateRequest { input, expected_token_count, sampling, stopping, output, priority, .. } =
            request;
        let (model, mut turn, start) = match target {
            Target::Model(model) => (model, None, None),
            Target::Session { name, model } => {
                let request = TurnRequest { model, input: input.kind(), expected_token_count };
                let (turn, start) = Turn::begin(&self.sessions, &caller.session(name), &request)?;
                (start.model.clone(), Some(turn), Some(start))
            }
        };
        let fit = async {
            let lease = self.models.lease(&model).await?;
            let assets = Arc::clone(lease.assets());
            let context = self.context(&assets, "prompt", input, start).await?;
            let prompt_tokens = count(context.prompt.len());
            let resolved = Resolved::new((&sampling, &stopping), &assets, prompt_tokens, &self.limits)?;
            Ok((lease, context, resolved))
        };
        let (lease, context, resolved) = or_session_deleted(turn.as_mut(), fit).await?;
        let origin = caller.origin(turn.as_ref().map(|turn| turn.guard.key().clone()), priority);
        let assets = Arc::clone(lease.assets());
        Generation::start(self, Prepared { origin, assets, context, resolved, output, turn }, lease).await
    }

    /// Makes the prompt of an input after what its session holds; `text_field` is the path of a raw text.
    pub(super) async fn context(
        &self,
        assets: &Arc<ModelAssets>,
        text_field: &'static str,
        input: Input,
        start: Option<TurnStart>,
    ) -> Result<Context, Error> {
        let (assets, now) = (Arc::clone(assets), self.clock.wall());
        let text_bytes_max = self.limits.text_bytes_max;
        blocking(move || Rendering { assets: &assets, now, text_bytes_max, text_field }.context(input, start))
            .await
    }
}

/// The means to render and tokenize an input.
struct Rendering<'a> {
    assets: &'a ModelAssets,
    now: SystemTime,
    text_bytes_max: usize,
    text_field: &'static str,
}

impl Rendering<'_> {
    /// Renders and tokenizes; takes long for long texts.
    fn context(&self, input: Input, start: Option<TurnStart>) -> Result<Context, Error> {
        let vocabulary = self.assets.files.facts.vocabulary_size;
        let context = match input {
            Input::Chat(chat) => self.chat(chat, start.as_ref())?,
            Input::Text(text) => self.text(&text, start)?,
            Input::Ids(ids) => {
                if let Some((index, id)) = ids.iter().enumerate().find(|(_, id)| **id >= vocabulary) {
                    let why = format!("token id {id}: the vocabulary has {vocabulary} tokens");
                    return Err(Error::field(format!("token_ids.ids[{index}]"), why));
                }
                appended(start, ids)
            }
        };
        // A tokenizer may know tokens that its model does not.
        if let Some(id) = context.prompt.tokens.iter().find(|id| **id >= vocabulary) {
            let why = format!("token id {id}: the vocabulary has {vocabulary} tokens");
            return Err(Error::field("input", why));
        }
        if context.prompt.is_empty() { Err(Error::EmptyPrompt) } else { Ok(context) }
    }

    fn text(&self, text: &str, start: Option<TurnStart>) -> Result<Context, Error> {
        self.refuse_long(self.text_field, text)?;
        let tokenizer = &self.assets.tokenizer;
        // The special tokens around a whole text belong to its beginning only.
        let is_beginning = start.as_ref().is_none_or(|start| start.tokens.is_empty());
        let new = if is_beginning { tokenizer.encode_prompt(text) } else { tokenizer.encode(text, false) };
        let new = new.map_err(|error| Error::field(self.text_field, error.to_string()))?;
        Ok(appended(start, new))
    }

    fn chat(&self, chat: Chat, start: Option<&TurnStart>) -> Result<Context, Error> {
        let ModelAssets { files, tokenizer, chat_template, .. } = self.assets;
        let template = chat_template.as_ref().ok_or_else(|| Error::NoChatTemplate(files.name.clone()))?;
        let Chat { messages, tools, arguments } = chat;
        let old = start.into_iter().flat_map(|start| &start.messages).map(|message| &**message);
        let all: Vec<Value> = old.chain(&messages).map(Message::to_template_value).collect();
        let tools: Vec<Value> = tools.iter().map(Tool::to_template_value).collect();
        let conversation = Conversation {
            messages: &all,
            tools: &tools,
            arguments: &arguments,
            add_generation_prompt: true,
            now: self.now,
        };
        let rendered = template.render(&conversation);
        let rendered = rendered.map_err(|error| Error::TemplateFailed(error.to_string()))?;
        self.refuse_long("chat", &rendered)?;
        // The template writes the special tokens itself.
        let encode = |text: &str| tokenizer.encode(text, false);
        let tokens = match start {
            Some(start) => chat_context(start, &rendered, encode),
            None => encode(&rendered).map(Arc::from),
        };
        let tokens = tokens.map_err(|error: TextError| Error::field("chat", error.to_string()))?;
        Ok(Context { prompt: tokens.into(), adds: Adds::Chat { messages, rendered } })
    }

    fn refuse_long(&self, path: &str, text: &str) -> Result<(), Error> {
        let max = self.text_bytes_max;
        if text.len() <= max {
            return Ok(());
        }
        Err(Error::field(path, format!("text_bytes_max: at most {max} bytes, not {}", text.len())))
    }
}

/// Appends new tokens to those of a session.
fn appended(start: Option<TurnStart>, new: Vec<u32>) -> Context {
    let prompt = match start {
        Some(start) => joined(&start.tokens, &new).into(),
        None => new.into(),
    };
    Context { prompt, adds: Adds::Raw }
}
