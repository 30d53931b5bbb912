//! `mlxd bench`: measures the speed of a running daemon from a client's side. Sends random prompts to one
//! model over one connection, one level of a sweep after another; Ctrl-C ends the sweep and shows the levels
//! so far.

mod drive;
mod plan;
mod report;
mod row;
mod svg;

use std::collections::hash_map::RandomState;
use std::fs;
use std::future::Future;
use std::hash::BuildHasher as _;
use std::path::{Path, PathBuf};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use clap::Args;
use mlxd::clock::{Clock as _, SystemClock};
use mlxd_client::Client;
use mlxd_client::v1::{
    CapabilitiesRequest, GetModelRequest, LoadModelRequest, ModelInfo, ServerCapabilities,
};
use serde_json::json;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::connect::{ConnectArgs, choose_model};
use super::failure::{Failure, Result};
use super::out;
use drive::{Amount, Driver};
use plan::{Lengths, Load, LongMix, Workload};
use row::Row;

const EXAMPLES: &str = "\
Examples:
  mlxd bench
  mlxd bench -m SmolLM2-135M-Instruct --concurrency 1,4,16 --prompt-tokens 16..512 --svg sweep.svg
  mlxd bench --concurrency 8 --shared-prefix 0.9 --requests 64
  mlxd bench --concurrency 5 --long-prefill 4000 --output-tokens 200
  mlxd bench --arrival-rate 0.5,1,2 --duration 60 --json result.json

Prompts are random token ids; answers are greedy and continue past end-of-text tokens. Each seed gives
different prompts; a repeated seed may find its prompts in the daemon's KV cache.";

/// Measure the speed of a running daemon: tokens per second, time to first token, inter-token latency.
#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(crate) struct BenchArgs {
    /// Model to use [default: the only resident one]
    #[arg(short, long, value_name = "MODEL")]
    model: Option<String>,
    /// Number of concurrent requests; a list is a sweep
    #[arg(long, value_name = "N", value_delimiter = ',', default_value = "1,2,4,8,16",
          value_parser = clap::value_parser!(u32).range(1..=1024))]
    concurrency: Vec<u32>,
    /// Requests per second, arriving at random (Poisson) whether or not earlier ones have ended; a list is
    /// a sweep
    #[arg(long, value_name = "R", value_delimiter = ',', conflicts_with = "concurrency", value_parser = rate)]
    arrival_rate: Vec<f64>,
    /// Length of a prompt in tokens: a number, or a range A..B to draw from
    #[arg(long, value_name = "N", default_value = "64")]
    prompt_tokens: Lengths,
    /// Length of an answer in tokens: a number, or a range A..B to draw from
    #[arg(long, value_name = "N", default_value = "64")]
    output_tokens: Lengths,
    /// Fraction of each prompt, 0 to 1, that is a prefix common to all prompts
    #[arg(long, value_name = "SHARE", default_value = "0", value_parser = share)]
    shared_prefix: f64,
    /// Mix in prompts of N tokens, and show their effect on the other requests
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    long_prefill: Option<u32>,
    /// Make every N-th request a long one
    #[arg(long, value_name = "N", default_value = "8", requires = "long_prefill",
          value_parser = clap::value_parser!(u32).range(1..))]
    long_every: u32,
    /// Requests per level [default: 4 times the concurrency, at least 8; 32 with --arrival-rate]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    requests: Option<u64>,
    /// Seconds during which a level starts requests, instead of --requests
    #[arg(long, value_name = "SECONDS", conflicts_with = "requests", value_parser = rate)]
    duration: Option<f64>,
    /// Uncounted requests before each level
    #[arg(long, value_name = "N", default_value = "2")]
    warmup: u64,
    /// Seed of the lengths, prompts and arrivals [default: random]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Write settings, machine, results and definitions to FILE
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Plot throughput and time to first token over the sweep into FILE
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    #[command(flatten)]
    connect: ConnectArgs,
}

fn share(text: &str) -> std::result::Result<f64, String> {
    let share = text.parse().ok().filter(|share| (0.0..=1.0).contains(share));
    share.ok_or_else(|| "must be a number from 0 to 1".into())
}

fn rate(text: &str) -> std::result::Result<f64, String> {
    let rate = text.parse().ok().filter(|rate| (1e-3..=1e6).contains(rate));
    rate.ok_or_else(|| "must be a number from 0.001 to 1000000".into())
}

/// Offset of the warm-ups' level numbers, which gives them prompts of their own.
const WARMUP: u64 = 1 << 32;

/// The daemon and model to measure.
struct Subject {
    client: Client,
    server: ServerCapabilities,
    model: ModelInfo,
}

/// Runs the command.
pub(crate) async fn run(args: BenchArgs) -> Result<()> {
    let mut interrupt = pin!(tokio::signal::ctrl_c());
    let subject = tokio::select! {
        subject = Subject::find(&args) => subject?,
        _ = &mut interrupt => return Err(Failure::Interrupted),
    };
    let workload = args.workload(&subject.model)?;
    for file in [&args.json, &args.svg].into_iter().flatten() {
        check_writable(file)?;
    }
    let driver = Driver {
        client: subject.client.clone(),
        model: subject.model.name.clone(),
        workload: Arc::new(workload),
        clock: Arc::new(SystemClock::new()),
    };
    let mut rows = Vec::new();
    for (level, load) in (0..).zip(args.loads()) {
        tell(&format!("{} …", describe(load)));
        let row = measure(&driver, &args, (level, load), interrupt.as_mut()).await;
        let interrupted = row.interrupted;
        rows.push(row);
        if interrupted {
            break;
        }
    }
    args.show(&subject, &driver, &rows)?;
    match rows.last() {
        Some(row) if row.interrupted => Err(Failure::Interrupted),
        _ if rows.iter().any(|row| row.requests == 0) => Err(Failure::Negative),
        _ => Ok(()),
    }
}

/// Measures one level after its warm-up, until its end or Ctrl-C.
async fn measure(
    driver: &Driver,
    args: &BenchArgs,
    (level, load): (u64, Load),
    mut interrupt: Pin<&mut impl Future>,
) -> Row {
    let mut samples = Vec::new();
    let warm_up = Amount::Requests(args.warmup);
    let mut interrupted = tokio::select! {
        () = driver.run(WARMUP + level, load, warm_up, &mut samples) => false,
        _ = &mut interrupt => true,
    };
    samples.clear();
    let start = driver.clock.now();
    if !interrupted {
        interrupted = tokio::select! {
            () = driver.run(level, load, args.amount(load), &mut samples) => false,
            _ = &mut interrupt => true,
        };
    }
    let first = samples.iter().map(|sample| sample.start).min();
    let wall = driver.clock.now() - first.unwrap_or(start);
    Row { interrupted, ..Row::new(load, &samples, wall, args.long_prefill.is_some()) }
}

impl Subject {
    /// Connects, and loads the model if it is not resident.
    async fn find(args: &BenchArgs) -> Result<Self> {
        let client = args.connect.connect().await?;
        let name = choose_model(&client, args.model.as_deref()).await?;
        let mut load = client
            .load_model(LoadModelRequest { model: name.clone(), ..LoadModelRequest::default() })
            .await?;
        while load.next_event().await?.is_some() {}
        let model = client.get_model(GetModelRequest { model: name }).await?;
        let server = client.capabilities(CapabilitiesRequest::default()).await?.server.unwrap_or_default();
        Ok(Self { client, server, model })
    }

    fn title(&self) -> String {
        let Self { server, model, .. } = self;
        format!("{}, {}, on {} ({})", model.name, model.computes_in, server.device, server.platform)
    }
}

impl BenchArgs {
    fn workload(&self, model: &ModelInfo) -> Result<Workload> {
        let workload = Workload {
            // 24 bits: short enough to type.
            seed: self.seed.unwrap_or_else(|| RandomState::new().hash_one("seed") >> 40),
            vocabulary: model.vocabulary_size.max(1),
            prompt: self.prompt_tokens,
            output: self.output_tokens,
            shared_prefix: self.shared_prefix,
            long: self.long_prefill.map(|tokens| LongMix { tokens, every: self.long_every }),
        };
        let needed = workload.tokens_max();
        if needed > u64::from(model.context_length) {
            let context = model.context_length;
            let text = format!(
                "prompt and answer need up to {needed} tokens; the context of {} has {context}",
                model.name
            );
            return Err(Failure::Usage(text));
        }
        Ok(workload)
    }

    fn loads(&self) -> Vec<Load> {
        if self.arrival_rate.is_empty() {
            return self.concurrency.iter().copied().map(Load::Closed).collect();
        }
        self.arrival_rate.iter().copied().map(Load::Open).collect()
    }

    fn amount(&self, load: Load) -> Amount {
        if let Some(seconds) = self.duration {
            return Amount::For(Duration::from_secs_f64(seconds));
        }
        let default = match load {
            Load::Closed(at_once) => (u64::from(at_once) * 4).max(8),
            Load::Open(_) => 32,
        };
        Amount::Requests(self.requests.unwrap_or(default))
    }

    /// Prints the table and writes the files.
    fn show(&self, subject: &Subject, driver: &Driver, rows: &[Row]) -> Result<()> {
        let title = subject.title();
        let seed = driver.workload.seed;
        let setting = format!("{} tokens in, {} out, seed {seed}", self.prompt_tokens, self.output_tokens);
        let text = format!("{title}\n{setting}\n\n{}", report::table(rows));
        out::data(&text)?;
        if let Some(file) = &self.json {
            let wall = OffsetDateTime::from(driver.clock.wall());
            let result = json!({
                "date": wall.format(&Rfc3339).unwrap_or_default(),
                "client_version": env!("CARGO_PKG_VERSION"),
                "address": subject.client.address().to_string(),
                "machine": report::machine(&subject.server, &subject.model),
                "settings": self.settings(seed),
                "rows": report::rows(rows),
                "definitions": report::definitions(),
            });
            fs::write(file, format!("{result:#}\n")).with_context(|| file.display().to_string())?;
        }
        if let Some(file) = &self.svg {
            let plot = svg::plot(&title, &setting, rows);
            fs::write(file, plot).with_context(|| file.display().to_string())?;
        }
        Ok(())
    }

    fn settings(&self, seed: u64) -> serde_json::Value {
        let long = self.long_prefill.map(|tokens| json!({ "tokens": tokens, "every": self.long_every }));
        let closed = self.arrival_rate.is_empty();
        json!({
            "concurrency": closed.then_some(&self.concurrency),
            "arrival_rate_per_s": (!closed).then_some(&self.arrival_rate),
            "prompt_tokens": [self.prompt_tokens.min, self.prompt_tokens.max],
            "output_tokens": [self.output_tokens.min, self.output_tokens.max],
            "shared_prefix": self.shared_prefix,
            "long_prefill": long,
            "requests": self.requests,
            "duration_s": self.duration,
            "warmup": self.warmup,
            "seed": seed,
        })
    }
}

/// Finds a path that cannot be written before anything is measured. Changes no existing file.
fn check_writable(file: &Path) -> Result<()> {
    let opened = fs::OpenOptions::new().append(true).create(true).open(file);
    opened.with_context(|| file.display().to_string())?;
    Ok(())
}

fn describe(load: Load) -> String {
    match load {
        Load::Closed(1) => "1 request at once".into(),
        Load::Closed(count) => format!("{count} requests at once"),
        Load::Open(rate) => format!("{rate} requests per second"),
    }
}

/// Shows the current activity on a terminal.
fn tell(text: &str) {
    if out::notes_are_watched() {
        out::note(&format!("{text}\n"));
    }
}
