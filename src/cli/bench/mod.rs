//! `mlxd bench`: how fast a running daemon serves, as its clients see it. Random prompts go to one model over one
//! connection, level after level of a sweep; Ctrl-C ends the sweep and shows what it has measured.

mod drive;
mod plan;
mod report;
mod row;
mod svg;

use std::collections::hash_map::RandomState;
use std::fs;
use std::future::Future;
use std::hash::BuildHasher as _;
use std::io::{self, IsTerminal as _, Write as _};
use std::path::PathBuf;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::Duration;

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

Prompts are random token ids, answers are greedy and go on past end-of-text tokens. Another seed makes
other prompts; the same seed again may find them in the daemon's KV cache.";

/// Measure how fast a running daemon serves: tokens per second, time to first token, gaps between tokens.
#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(crate) struct BenchArgs {
    /// Model to ask; may be left out if one is resident
    #[arg(short, long, value_name = "MODEL")]
    model: Option<String>,
    /// Requests at once; a list is a sweep
    #[arg(long, value_name = "N", value_delimiter = ',', default_value = "1,2,4,8,16",
          value_parser = clap::value_parser!(u32).range(1..=1024))]
    concurrency: Vec<u32>,
    /// Requests that arrive per second, at random (Poisson), whether or not others have ended; a list is
    /// a sweep
    #[arg(long, value_name = "R", value_delimiter = ',', conflicts_with = "concurrency", value_parser = rate)]
    arrival_rate: Vec<f64>,
    /// Tokens of a prompt: a number, or a range A..B from which lengths are drawn
    #[arg(long, value_name = "N", default_value = "64")]
    prompt_tokens: Lengths,
    /// Tokens of an answer: a number, or a range A..B
    #[arg(long, value_name = "N", default_value = "64")]
    output_tokens: Lengths,
    /// Share of each prompt, 0 to 1, that all prompts begin with
    #[arg(long, value_name = "SHARE", default_value = "0", value_parser = share)]
    shared_prefix: f64,
    /// Mix in prompts of this many tokens, and show what they do to the others
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    long_prefill: Option<u32>,
    /// Every so many-th request is a long one
    #[arg(long, value_name = "N", default_value = "8", requires = "long_prefill",
          value_parser = clap::value_parser!(u32).range(1..))]
    long_every: u32,
    /// Requests of a level [default: 4 for each at once, at least 8; 32 with --arrival-rate]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    requests: Option<u64>,
    /// Start requests for this many seconds instead
    #[arg(long, value_name = "SECONDS", conflicts_with = "requests", value_parser = rate)]
    duration: Option<f64>,
    /// Requests before each level that are not counted
    #[arg(long, value_name = "N", default_value = "2")]
    warmup: u64,
    /// Seed of lengths, prompts and arrivals [default: random]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Write settings, machine, rows and definitions to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Draw throughput and time to first token over the sweep into this file
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    #[command(flatten)]
    connect: ConnectArgs,
}

fn share(text: &str) -> std::result::Result<f64, String> {
    let share = text.parse().ok().filter(|share| (0.0..=1.0).contains(share));
    share.ok_or_else(|| "needs a number from 0 to 1".into())
}

fn rate(text: &str) -> std::result::Result<f64, String> {
    let rate = text.parse().ok().filter(|rate| (1e-3..=1e6).contains(rate));
    rate.ok_or_else(|| "needs a number from 0.001 on".into())
}

/// The levels' prompts are apart from those of their warm-ups.
const WARMUP: u64 = 1 << 32;

/// Who answers.
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
    let driver = Driver {
        client: subject.client.clone(),
        model: subject.model.name.clone(),
        workload: Arc::new(workload),
        clock: Arc::new(SystemClock::new()),
    };
    let mut rows = Vec::new();
    for (level, load) in (0..).zip(args.loads()) {
        tell(&format!("{} …", describe(load)))?;
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

/// One level, after its warm-up; until the end, or Ctrl-C.
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
    /// Connects, and makes the model resident if it is not.
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
            // Short enough to be typed again.
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
            let text =
                format!("prompt and answer may have {needed} tokens; {}'s context is {context}", model.name);
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
        io::stdout().lock().write_all(text.as_bytes())?;
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
            fs::write(file, format!("{result:#}\n"))?;
        }
        if let Some(file) = &self.svg {
            fs::write(file, svg::plot(&title, &setting, rows))?;
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

fn describe(load: Load) -> String {
    match load {
        Load::Closed(1) => "1 request at once".into(),
        Load::Closed(count) => format!("{count} requests at once"),
        Load::Open(rate) => format!("{rate} requests per second"),
    }
}

/// Says on a terminal what is being waited for.
fn tell(text: &str) -> io::Result<()> {
    let mut stderr = io::stderr().lock();
    if stderr.is_terminal() { writeln!(stderr, "{text}") } else { Ok(()) }
}
