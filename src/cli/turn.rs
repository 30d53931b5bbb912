//! What `generate` and `chat` share: sampling options, sessions by name, and a streamed answer on stdout.

use std::io::{self, Write as _};

use clap::{Args, ValueEnum};
use mlxd_client::v1::{
    CreateSessionRequest, GenerateFinished, GenerateRequest, GetSessionRequest, Priority, SamplingOptions,
    Session, StoppingOptions, stream_generate_response::Event,
};
use mlxd_client::{Client, ErrorReason};

use super::connect::choose_model;
use super::failure::Result;

/// How tokens are chosen and when generation ends; what is unset is the model's default.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Sampling")]
pub(crate) struct SamplingArgs {
    /// Softmax temperature, 0 to 100; 0 is greedy
    #[arg(long, value_name = "T")]
    temperature: Option<f32>,
    /// Keep the likeliest tokens whose mass reaches this
    #[arg(long, value_name = "P")]
    top_p: Option<f32>,
    /// Keep this many likeliest tokens
    #[arg(long, value_name = "K")]
    top_k: Option<u32>,
    /// Keep tokens at least this likely relative to the likeliest
    #[arg(long, value_name = "P")]
    min_p: Option<f32>,
    /// Seed of the random numbers
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// The most tokens to generate
    #[arg(long, value_name = "N")]
    max_tokens: Option<u32>,
    /// End where this text appears; may be repeated
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// Who goes first where not all can run [default: normal]
    #[arg(long, value_name = "CLASS")]
    priority: Option<Class>,
}

/// Who goes first.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Class {
    /// Somebody waits for every token
    Interactive,
    Normal,
    /// Nobody waits
    Background,
}

impl SamplingArgs {
    /// Puts them into a request.
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

/// The session of this name; it is made, bound to `model` or the only resident one, if there is none.
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

/// A new session; an empty name lets the daemon choose one.
pub(crate) async fn create_session(client: &Client, name: &str, model: Option<&str>) -> Result<Session> {
    let model = choose_model(client, model).await?;
    let request = CreateSessionRequest { name: name.to_owned(), model, ttl: None };
    Ok(client.create_session(request).await?)
}

/// Streams an answer to stdout, with a line end after it, also after a part of one.
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

/// Text on stdout whose last line is ended when the answer ends, for whatever reason.
#[derive(Default)]
struct OpenLine {
    open: bool,
}

impl OpenLine {
    fn write(&mut self, text: &str) -> io::Result<()> {
        let Some(last) = text.chars().last() else { return Ok(()) };
        self.open = last != '\n';
        let mut out = io::stdout().lock();
        out.write_all(text.as_bytes())?;
        out.flush()
    }

    fn close(&mut self) -> io::Result<()> {
        if std::mem::take(&mut self.open) { writeln!(io::stdout().lock()) } else { Ok(()) }
    }
}

impl Drop for OpenLine {
    fn drop(&mut self) {
        // Cancelled or failed within a line: the error or the prompt that follows starts a new one.
        _ = self.close();
    }
}
