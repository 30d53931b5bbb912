//! Shared by `generate` and `chat`: sampling options, sessions by name, and an answer streamed to stdout.

use std::io;

use clap::{Args, ValueEnum};
use mlxd_client::v1::{
    CreateSessionRequest, GenerateFinished, GenerateRequest, GetSessionRequest, Priority, SamplingOptions,
    Session, StoppingOptions, stream_generate_response::Event,
};
use mlxd_client::{Client, ErrorReason};

use super::connect::choose_model;
use super::failure::Result;
use super::out;

/// Sampling and stopping options; an unset one is the model's default.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Sampling")]
pub(crate) struct SamplingArgs {
    /// Softmax temperature, 0 to 100; 0 is greedy
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

impl SamplingArgs {
    /// Copies the options into `request`.
    pub(crate) fn apply(&self, request: &mut GenerateRequest) {
        let Self { temperature, top_p, top_k, min_p, seed, max_tokens, ref stop, priority } = *self;
        let priority = match priority {
            None => Priority::Unspecified,
            Some(Class::Interactive) => Priority::Interactive,
            Some(Class::Normal) => Priority::Normal,
            Some(Class::Background) => Priority::Background,
        };
        request.priority = priority.into();
        request.sampling =
            Some(SamplingOptions { temperature, top_p, top_k, min_p, seed, ..SamplingOptions::default() });
        request.stopping =
            Some(StoppingOptions { max_tokens, stop_strings: stop.clone(), ..StoppingOptions::default() });
    }
}

/// Returns the session `name`; creates it, bound to `model` or the only resident one, if it does not exist.
pub(crate) async fn open_session(client: &Client, name: &str, model: Option<&str>) -> Result<Session> {
    let get =
        || client.get_session(GetSessionRequest { name: name.to_owned(), ..GetSessionRequest::default() });
    match get().await {
        Ok(found) => return Ok(found.session.unwrap_or_default()),
        Err(error) if error.reason() == ErrorReason::SessionNotFound => {}
        Err(error) => return Err(error.into()),
    }
    create_session(client, name, model).await
}

/// Creates a session; for an empty `name` the daemon chooses one.
pub(crate) async fn create_session(client: &Client, name: &str, model: Option<&str>) -> Result<Session> {
    let model = choose_model(client, model).await?;
    let request = CreateSessionRequest { name: name.to_owned(), model, ttl: None };
    Ok(client.create_session(request).await?)
}

/// Streams an answer to stdout and ends its last line, even if the answer is incomplete.
pub(crate) async fn stream_to_stdout(client: &Client, request: GenerateRequest) -> Result<GenerateFinished> {
    let mut stream = client.stream_generate(request).await?;
    let mut line = OpenLine::default();
    let mut end = GenerateFinished::default();
    while let Some(event) = stream.next_event().await? {
        match event {
            Event::Delta(delta) => line.write(&delta.text)?,
            Event::Finished(finished) => end = finished,
            Event::Started(_) | Event::Progress(_) => {}
        }
    }
    line.close()?;
    Ok(end)
}

/// Writer to stdout that ends an open last line when it is closed or dropped.
#[derive(Default)]
struct OpenLine {
    open: bool,
}

impl OpenLine {
    fn write(&mut self, text: &str) -> io::Result<()> {
        let Some(last) = text.chars().last() else { return Ok(()) };
        self.open = last != '\n';
        out::data(text)
    }

    fn close(&mut self) -> io::Result<()> {
        if std::mem::take(&mut self.open) { out::data("\n") } else { Ok(()) }
    }
}

impl Drop for OpenLine {
    fn drop(&mut self) {
        // Cancelled or failed within a line: the next error or prompt must start a new one.
        _ = self.close();
    }
}
