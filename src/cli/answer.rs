//! Shared by `generate` and `chat`: sampling options, sessions by name, and an answer streamed to stdout.

use clap::{Args, ValueEnum};
use mlxd::config::KeepAlive;
use mlxd_client::v1::{
    CacheOptions, CapabilitiesRequest, CreateSessionRequest, GenerateFinished, GenerateRequest,
    GetSessionRequest, Priority, SamplingOptions, Session, StoppingOptions, TextList,
    stream_generate_response::Event,
};
use mlxd_client::{Client, ErrorReason};

use super::connect::choose_model;
use super::failure::{Failure, Result};
use super::format;
use super::shown::Shown;

/// Temperature for models whose files name none: AbstractLLM's.
const TEMPERATURE: f32 = 0.7;

/// Sampling and stopping options; an unset one is the model's default.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Sampling")]
pub(crate) struct SamplingArgs {
    /// Softmax temperature, 0 to 100; 0 is greedy [default: the model's, 0.7 if its files name none]
    #[arg(long, value_name = "T")]
    temperature: Option<f32>,
    /// Nucleus sampling: keep the most likely tokens whose probabilities sum to at least P, 0 to 1
    #[arg(long, value_name = "P")]
    top_p: Option<f32>,
    /// Keep only the K most likely tokens; 0 keeps all
    #[arg(long, value_name = "K")]
    top_k: Option<u32>,
    /// Keep tokens whose probability is at least P times that of the most likely one, 0 to 1
    #[arg(long, value_name = "P")]
    min_p: Option<f32>,
    /// Locally typical sampling: keep the tokens whose surprisal is nearest to the entropy, of mass P, 0 to 1
    #[arg(long, value_name = "P")]
    typical_p: Option<f32>,
    /// DRY: strength of the penalty on going on with a repetition, 0 to 100; 0.8 is usual [default: 0]
    #[arg(long, value_name = "X")]
    dry_multiplier: Option<f32>,
    /// DRY: growth of the penalty with each token repeated, 1 to 100 [default: 1.75]
    #[arg(long, value_name = "X", requires = "dry_multiplier")]
    dry_base: Option<f32>,
    /// DRY: length from which a repetition is penalized, in tokens [default: 2]
    #[arg(long, value_name = "N", requires = "dry_multiplier")]
    dry_allowed_length: Option<u32>,
    /// DRY: number of last tokens that are examined; 0 is all [default: 0]
    #[arg(long, value_name = "N", requires = "dry_multiplier")]
    dry_context_size: Option<u32>,
    /// DRY: text that ends a repetition; may be repeated [default: a line break, `:`, `"` and `*`]
    #[arg(long, value_name = "TEXT", requires = "dry_multiplier")]
    dry_breaker: Vec<String>,
    /// Not a sampler of the daemon
    #[arg(long, value_name = "MODE", hide = true, value_parser = no_mirostat)]
    mirostat: Option<String>,
    /// Seed of the random numbers [default: random]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Maximum number of tokens to generate
    #[arg(long, value_name = "N")]
    max_tokens: Option<u32>,
    /// Stop where this text appears; may be repeated
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// Scheduling class when not all requests can run [default: normal]
    #[arg(long, value_name = "CLASS")]
    priority: Option<Class>,
    /// How long the model stays in memory after its last use: 5m, 1h30m, seconds, 0 (unload after use), -1
    /// (forever) [default: unchanged]
    #[arg(long, value_name = "TIME", allow_hyphen_values = true)]
    keep_alive: Option<KeepAlive>,
    /// Compute the whole prompt, and leave no KV cache behind
    #[arg(long)]
    no_cache: bool,
}

/// Scheduling class of a request.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Class {
    /// Latency-sensitive: a user waits for each token
    Interactive,
    /// The default
    Normal,
    /// Batch work that may be preempted
    Background,
}

/// Refuses mirostat with what there is instead.
fn no_mirostat(_: &str) -> std::result::Result<String, &'static str> {
    Err("the daemon has no mirostat; --typical-p and --min-p also bound how unlikely a token may be")
}

impl SamplingArgs {
    /// Sets the temperature for a model whose files name none, unless one is given. The API's default is
    /// greedy, with which small models repeat themselves to the limit.
    pub(crate) async fn settle(&mut self, client: &Client, model: &str) -> Result<()> {
        if self.temperature.is_none() {
            let request = CapabilitiesRequest { models: vec![model.to_owned()] };
            let models = client.capabilities(request).await?.models;
            let own = models.first().and_then(|model| model.default_sampling).unwrap_or_default();
            self.temperature = (own.temperature <= 0.0).then_some(TEMPERATURE);
        }
        Ok(())
    }

    /// Copies the options into `request`.
    pub(crate) fn apply(&self, request: &mut GenerateRequest) {
        let Self {
            temperature,
            top_p,
            top_k,
            min_p,
            typical_p,
            dry_multiplier,
            dry_base,
            dry_allowed_length,
            dry_context_size,
            ref dry_breaker,
            mirostat: _,
            seed,
            max_tokens,
            ref stop,
            priority,
            keep_alive,
            no_cache,
        } = *self;
        let priority = match priority {
            None => Priority::Unspecified,
            Some(Class::Interactive) => Priority::Interactive,
            Some(Class::Normal) => Priority::Normal,
            Some(Class::Background) => Priority::Background,
        };
        request.priority = priority.into();
        request.keep_alive = keep_alive.map(format::keep_alive);
        request.cache = no_cache.then(|| CacheOptions { off: true, ..CacheOptions::default() });
        let breakers = (!dry_breaker.is_empty()).then(|| TextList { texts: dry_breaker.clone() });
        request.sampling = Some(SamplingOptions {
            temperature,
            top_p,
            top_k,
            min_p,
            typical_p,
            dry_multiplier,
            dry_base,
            dry_allowed_length,
            dry_context_size,
            dry_sequence_breakers: breakers,
            seed,
            ..SamplingOptions::default()
        });
        request.stopping =
            Some(StoppingOptions { max_tokens, stop_strings: stop.clone(), ..StoppingOptions::default() });
    }
}

/// Returns the session `name`; creates it, bound to `model` or the only resident one, if it does not exist.
/// One that is bound to another model is refused.
pub(crate) async fn open_session(client: &Client, name: &str, model: Option<&str>) -> Result<Session> {
    let get =
        || client.get_session(GetSessionRequest { name: name.to_owned(), ..GetSessionRequest::default() });
    match get().await {
        Ok(found) => return bound_to(found.session.unwrap_or_default(), model),
        Err(error) if error.reason() == ErrorReason::SessionNotFound => {}
        Err(error) => return Err(error.into()),
    }
    create_session(client, name, model).await
}

fn bound_to(session: Session, model: Option<&str>) -> Result<Session> {
    match model {
        Some(asked) if asked != session.model => Err(Failure::Usage(format!(
            "the session {} is bound to {}: omit -m, or use another --session",
            session.name, session.model
        ))),
        Some(_) | None => Ok(session),
    }
}

/// Creates a session; for an empty `name` the daemon chooses one.
pub(crate) async fn create_session(client: &Client, name: &str, model: Option<&str>) -> Result<Session> {
    let model = choose_model(client, model).await?;
    let request = CreateSessionRequest { name: name.to_owned(), model, ..CreateSessionRequest::default() };
    Ok(client.create_session(request).await?)
}

/// Streams an answer to stdout and ends its last line, even if the answer is incomplete.
pub(crate) async fn stream_to_stdout(client: &Client, request: GenerateRequest) -> Result<GenerateFinished> {
    let mut stream = client.stream_generate(request).await?;
    let mut shown = Shown::default();
    let mut end = GenerateFinished::default();
    while let Some(event) = stream.next_event().await? {
        match event {
            Event::Delta(delta) => shown.add(delta)?,
            Event::Finished(finished) => end = finished,
            Event::Started(_) | Event::Progress(_) | Event::ChoiceFinished(_) => {}
        }
    }
    shown.close()?;
    Ok(end)
}
