//! A generation from its request to its prompt: everything is checked that needs no model, the session's turn
//! begins, the input is rendered and tokenized, the model is made resident. [`Generation`] takes over from
//! there. Whatever fails on the way leaves the session as it was, and what is refused loads no model; a
//! caller who leaves on the way ends the work with the piece that is being done.

use std::sync::Arc;
use std::time::SystemTime;

use super::answer::{instructions, plan, prompts, reading, switch, template_values};
use super::caller::Caller;
use super::chat::{Chat, Tool};
use super::choices::ChoiceCounts;
use super::demand::{Demand, Lead};
use super::desk::{Desk, Place};
use super::fields::at_most;
use super::generation::{Adds, Context, Generation, Prepared};
use super::history::{Dialogue, Written, renders_max};
use super::kv::Lacking;
use super::prompted::Conversation;
use super::request::{GenerateRequest, Input, Target};
use super::sampling::Resolved;
use super::sessions::{Turn, or_session_deleted};
use super::{Service, blocking};
use crate::count::count;
use crate::engine::WorkOrigin;
use crate::error::Error;
use crate::hub::ModelAssets;
use crate::ids::ConnectionId;
use crate::limits::Limits;
use crate::output::Start;
use crate::session::{AnswerForms, HistoryOutcome, Message, TurnRequest, TurnStart, joined};
use crate::text::{ChatTemplate, Encoding};

/// Bytes that rendering a message or a tool costs as much as, besides its own.
const PART_BYTES: usize = 256;

/// What a request is for.
#[derive(Clone, Copy, Debug)]
pub(super) enum Aim {
    /// To answer, with these choices.
    Answer(ChoiceCounts),
    /// Only to compute its context, which its session keeps.
    Context,
}

impl Service {
    /// Checks and prepares a request and hands it to the engine; returns once the engine has admitted it.
    ///
    /// # Errors
    /// The request is refused, its session was deleted meanwhile, or the engine is dead.
    pub async fn generate(&self, caller: &Caller, request: GenerateRequest) -> Result<Generation, Error> {
        let target = request.check(&self.limits)?;
        let choices = ChoiceCounts::of(&request, &target, &self.limits)?;
        self.begin(caller, request, target, Aim::Answer(choices)).await
    }

    /// Prepares a request that is checked and hands it to the engine.
    pub(super) async fn begin(
        &self,
        caller: &Caller,
        request: GenerateRequest,
        target: Target,
        aim: Aim,
    ) -> Result<Generation, Error> {
        let GenerateRequest {
            model: _,
            input,
            session: _,
            expected_token_count,
            sampling,
            stopping,
            output,
            priority,
            keep_alive,
            history,
            cache,
            response_format,
            n: _,
            best_of: _,
        } = request;
        let (model, mut turn, start) = match target {
            Target::Model(model) => (model, None, None),
            Target::Session { name, model } => {
                input.check_kept(&self.limits)?;
                let (kind, input_bytes) = (input.kind(), input.kept_bytes());
                let request = TurnRequest { model, input: kind, expected_token_count, input_bytes, history };
                let key = caller.session(name);
                self.saves.warm(&self.sessions, &key).await?;
                let (turn, start) = Turn::begin(&self.sessions, &key, &request)?;
                (start.model.clone(), Some(turn), Some(start))
            }
        };
        let session = turn.as_ref().map(|turn| turn.key().clone());
        let pinned = start.as_ref().is_some_and(|start| start.pinned);
        let cache = cache.for_work(start.as_ref().map_or("", |start| &start.cache_salt));
        let fit = async {
            let found = self.models.find(&model, caller).await?;
            let assets = Arc::clone(found.assets());
            let preparation = self.preparation(caller, &assets, "prompt");
            let mut context = preparation.within_context().context(input, start).await?;
            let prompt_tokens = count(context.prompt.len());
            let resolved = Resolved::new((&sampling, &stopping), &assets, prompt_tokens, &self.limits)?;
            let (resolved, choices) = match aim {
                Aim::Answer(choices) => (resolved, choices),
                Aim::Context => (resolved.without_answer(), ChoiceCounts::ONE),
            };
            let held = (context.demanded.take(), response_format);
            let constraint = self.held_to(caller, &assets, held, context.thinks_first.take()).await?;
            caller.claim.release();
            let lease = self.models.lease(found, caller.connection).await?;
            if let Some(key) = session {
                let id = self.sessions.read(&key, |session| Ok(session.id()))?;
                let (lease, tokens) = (&lease, &context.prompt.tokens);
                self.restore(caller, Lacking { key, id, pinned, cache, lease, tokens }).await?;
            }
            Ok((lease, context, resolved, constraint, choices))
        };
        let (lease, context, resolved, constraint, choices) = or_session_deleted(turn.as_mut(), fit).await?;
        if let Some(turn) = &turn {
            turn.reserve(context.kept_bytes())?;
        }
        let origin = caller.origin(turn.as_ref().map(|turn| turn.key().clone()), priority, cache);
        let origin = WorkOrigin { pinned, ..origin };
        let assets = Arc::clone(lease.assets());
        let prepared =
            Prepared { origin, assets, context, resolved, constraint, output, turn, keep_alive, choices };
        Generation::start(self, prepared, lease).await
    }

    /// Reads what a turn lacks from its session's snapshot, as far as its caller waits for it.
    async fn restore(&self, caller: &Caller, lacking: Lacking<'_>) -> Result<(), Error> {
        let restored = self.snapshots.restore(&self.engine, lacking);
        match caller.deadline {
            Some(deadline) => {
                let left = deadline - self.clock.now();
                tokio::time::timeout(left, restored).await.map_err(|_| Error::Deadline)
            }
            None => {
                restored.await;
                Ok(())
            }
        }
    }

    /// Returns the means to make the prompt of a caller's input; `text_field` is the path of a raw text.
    pub(super) fn preparation<'a>(
        &'a self,
        caller: &Caller,
        assets: &Arc<ModelAssets>,
        text_field: &'static str,
    ) -> Preparation<'a> {
        Preparation {
            desk: &self.desk,
            connection: caller.connection,
            assets: Arc::clone(assets),
            now: self.clock.wall(),
            limits: &self.limits,
            text_field,
            limit: None,
        }
    }
}

/// The means to render and tokenize an input, piece by piece.
pub(super) struct Preparation<'a> {
    desk: &'a Arc<Desk>,
    connection: ConnectionId,
    assets: Arc<ModelAssets>,
    now: SystemTime,
    limits: &'a Limits,
    text_field: &'static str,
    limit: Option<TokenLimit>,
}

/// What tokens have to fit; beyond it, the rest of an input does not matter.
#[derive(Clone, Copy)]
enum TokenLimit {
    /// The model's context.
    Context(u32),
    /// An answer that lists them, of at most this number.
    Answer(usize),
}

impl Preparation<'_> {
    /// Gives up as soon as the input is known not to fit the model's context.
    pub(super) fn within_context(self) -> Self {
        Self { limit: Some(TokenLimit::Context(self.assets.files.facts.context_length)), ..self }
    }

    /// Gives up as soon as the input is known to have more tokens than an answer has room for.
    pub(super) fn within_answer(self, tokens_max: usize) -> Self {
        Self { limit: Some(TokenLimit::Answer(tokens_max)), ..self }
    }

    /// Renders and tokenizes an input after what its session holds.
    pub(super) async fn context(self, input: Input, start: Option<TurnStart>) -> Result<Context, Error> {
        let vocabulary = self.assets.vocabulary_size;
        let is_unknown = |id: &u32| *id >= vocabulary;
        let unknown = |field: &str, id: &u32| {
            Error::field(field, format!("token id {id}: the vocabulary has {vocabulary} tokens"))
        };
        let context = match input {
            Input::Chat(chat) => self.chat(chat, start).await?,
            Input::Text(_) | Input::Ids(_) if !self.is_readable(start.as_ref()) => {
                return Err(Error::SessionTokenizerChanged(self.assets.files.name.clone()));
            }
            Input::Text(text) => self.text(text, start).await?,
            Input::Ids(ids) => {
                if let Some((index, id)) = ids.iter().enumerate().find(|(_, id)| is_unknown(id)) {
                    return Err(unknown(&format!("token_ids.ids[{index}]"), id));
                }
                self.appended(start, ids).await?
            }
        };
        // A tokenizer may know tokens that its model does not.
        if let Some(id) = context.prompt.tokens.iter().find(|id| is_unknown(id)) {
            return Err(unknown("input", id));
        }
        if context.prompt.is_empty() { Err(Error::EmptyPrompt) } else { Ok(context) }
    }

    /// Returns whether a session's tokens are the model's, as far as is known. An imported one may say of any
    /// tokens that they are.
    fn is_readable(&self, start: Option<&TurnStart>) -> bool {
        let is_known = |id: &u32| *id < self.assets.vocabulary_size;
        start.is_none_or(|start| start.is_of(self.assets.tokenizer_hash) && start.tokens.iter().all(is_known))
    }

    async fn text(&self, text: String, start: Option<TurnStart>) -> Result<Context, Error> {
        let tokenizer = &self.assets.tokenizer;
        let is_beginning = start.as_ref().is_none_or(|start| start.tokens.is_empty());
        let before = start.as_ref().map_or(0, |start| start.tokens.len());
        self.refuse_bytes(before, text.len())?;
        let encoding = if is_beginning {
            Encoding::of_prompt(tokenizer, text)
        } else {
            Encoding::of_more(tokenizer, text)
        };
        let new = self.encode(self.text_field, before, encoding).await?;
        self.appended(start, new).await
    }

    /// Appends new tokens to those of a session.
    async fn appended(&self, start: Option<TurnStart>, new: Vec<u32>) -> Result<Context, Error> {
        let before = start.as_ref().map_or(0, |start| start.tokens.len());
        self.refuse_tokens(before + new.len())?;
        let outcome = (before > 0).then_some(HistoryOutcome::Continued);
        let tokens: Arc<[u32]> = match start {
            Some(start) => joined(&start.tokens, &new),
            None => new.into(),
        };
        let (tokenizer, before) = (self.assets.tokenizer.clone(), Arc::clone(&tokens));
        let detokenizer = blocking(move || Ok(tokenizer.detokenizer_after(&before))).await?;
        Ok(Context {
            prompt: tokens.into(),
            adds: Adds::Raw,
            outcome,
            detokenizer,
            reading: None,
            calls: None,
            forms: AnswerForms::default(),
            thinks_first: None,
            demanded: None,
        })
    }

    async fn chat(&self, chat: Chat, mut start: Option<TurnStart>) -> Result<Context, Error> {
        let is_readable = self.is_readable(start.as_ref());
        if let Some(start) = start.as_mut().filter(|_| !is_readable) {
            // Its tokens mean something else now: the conversation is tokenized anew.
            (start.tokens, start.text) = (Arc::default(), None);
        }
        let held: &[Arc<Message>] = start.as_ref().map_or(&[], |start| &start.messages);
        let parts = held.iter().map(|message| message.part_count()).sum::<usize>() + chat.part_count();
        at_most("chat.messages", parts, "chat_parts_max", self.limits.chat_parts_max)?;
        let bytes = held.iter().map(|message| message.bytes()).sum::<usize>() + chat.bytes();
        let (renders, continues) = (renders_max(&self.assets, start.as_ref()), chat.continue_final_message);
        let calls_before = held.iter().map(|message| &**message).chain(&chat.messages);
        let calls_before = calls_before.map(|message| message.tool_calls().count() as u64).sum();
        let plan = plan(self.assets.forms, &chat, &self.assets.tokenizer)?;
        let (demand, lead) = (Demand::of(&chat, &plan)?, Lead::of(&chat, &plan));
        let calls = plan.syntax.format.map(|format| (format, calls_before));
        let place = self.desk.place(self.connection, renders * (bytes + parts * PART_BYTES)).await;
        let (written, messages) = self.write(place, chat, start.clone()).await?;
        let Written { kept, rest, text, outcome } = written;
        let outcome = if is_readable { outcome } else { Some(HistoryOutcome::Rerendered) };
        let old = start.map_or_else(Arc::default, |start| start.tokens);
        self.refuse_bytes(kept, rest.text.len())?;
        let end = if rest.text.is_empty() { text.as_deref().unwrap_or_default() } else { &rest.text };
        let (mut reading, forms) = reading(plan, end);
        let mut thinks_first = lead.thinks_first(reading.as_deref(), end, &self.assets);
        let mut demanded = None;
        if let Some(demand) = demand {
            if demand.is_whole() {
                thinks_first = None;
            }
            // A call in reasoning is none that the grammar has seen.
            reading.iter_mut().for_each(|reading| reading.parser.end_reasoning_by_its_marker());
            let start = if forms.begins_reasoning { Start::Reasoning } else { Start::Text };
            demanded = Some(demand.source(start, &self.assets).await?);
        }
        let tokens = if rest.text.is_empty() && kept == old.len() {
            old
        } else {
            // The template writes the special tokens itself.
            let last = old[..kept].last().copied();
            let encoding = Encoding::of_rendered(&self.assets.tokenizer, rest, last);
            joined(&old[..kept], &self.encode("chat", kept, encoding).await?)
        };
        let detokenizer = if continues {
            let (tokenizer, before) = (self.assets.tokenizer.clone(), Arc::clone(&tokens));
            blocking(move || Ok(tokenizer.detokenizer_after(&before))).await?
        } else {
            self.assets.tokenizer.detokenizer()
        };
        let adds = Adds::Chat { messages, text };
        let prompt = tokens.into();
        Ok(Context { prompt, adds, outcome, detokenizer, reading, calls, forms, thinks_first, demanded })
    }

    /// Returns the conversation as the template writes it after what its session holds, and its new messages.
    async fn write(
        &self,
        place: Place,
        chat: Chat,
        start: Option<TurnStart>,
    ) -> Result<(Written, Vec<Message>), Error> {
        let (assets, now, bytes_max) = (Arc::clone(&self.assets), self.now, self.limits.text_bytes_max);
        blocking(move || {
            let _place = place;
            let ending = chat.ending();
            let prompted = prompts(assets.forms, &chat).then(|| instructions(&chat));
            let offered = if prompted.is_some() { &[] } else { chat.offered_tools() };
            let tools = offered.iter().map(Tool::to_template_value).collect();
            let Chat { messages, mut arguments, allow_control_tokens, reasoning, .. } = chat;
            let held: &[Arc<Message>] = start.as_ref().map_or(&[], |start| &start.messages);
            let all = held.iter().map(|message| &**message).chain(&messages);
            let template = assets.chat_template.as_ref().ok();
            if let Some(template) = template {
                switch(&mut arguments, &reasoning, template)?;
            }
            let values = template_values(all, held.len(), template, assets.forms)?;
            let conversation = match prompted {
                None => Conversation::plain(values),
                Some(instructions) => {
                    let has_system = template.is_none_or(ChatTemplate::writes_system);
                    Conversation::prompted(values, &instructions, has_system)
                }
            };
            let dialogue = Dialogue {
                held: held.len(),
                conversation,
                tools,
                arguments,
                ending,
                control_tokens: allow_control_tokens,
                now,
                bytes_max,
            };
            Ok((dialogue.write(&assets, start.as_ref())?, messages))
        })
        .await
    }

    /// Tokenizes a text after `before` tokens.
    async fn encode(
        &self,
        path: &'static str,
        before: usize,
        mut encoding: Encoding,
    ) -> Result<Vec<u32>, Error> {
        loop {
            let place = self.desk.place(self.connection, encoding.next_bytes()).await;
            let piece = move || {
                let _place = place;
                let is_done = encoding.advance();
                is_done
                    .map(|is_done| (encoding, is_done))
                    .map_err(|error| Error::field(path, error.to_string()))
            };
            let (advanced, is_done) = blocking(piece).await?;
            if is_done {
                return Ok(advanced.into_ids());
            }
            self.refuse_tokens(before + advanced.token_count())?;
            encoding = advanced;
        }
    }

    /// Refuses a text of more bytes than the tokens can stand for, before it is tokenized.
    fn refuse_bytes(&self, before: usize, bytes: usize) -> Result<(), Error> {
        match self.assets.tokenizer.token_bytes_max() {
            Some(token_bytes_max) => self.refuse_tokens(before + bytes.div_ceil(token_bytes_max)),
            None => Ok(()),
        }
    }

    fn refuse_tokens(&self, tokens: usize) -> Result<(), Error> {
        match self.limit {
            Some(TokenLimit::Context(context_length)) if count(tokens) > context_length => {
                Err(Error::ContextOverflow { prompt_tokens: count(tokens), context_length })
            }
            Some(TokenLimit::Answer(tokens_max)) => fit_answer(tokens, tokens_max, self.limits),
            Some(TokenLimit::Context(_)) | None => Ok(()),
        }
    }
}

/// Refuses what an answer has no room for.
pub(super) fn fit_answer(tokens: usize, tokens_max: usize, limits: &Limits) -> Result<(), Error> {
    if tokens <= tokens_max {
        return Ok(());
    }
    Err(Error::AnswerTooLarge { limit_bytes: limits.answer_bytes_max as u64 })
}
