//! `mlxd load` and `mlxd unload`: change which models are resident.

use std::io;

use clap::{Args, ValueEnum};
use indicatif::ProgressBar;
use mlxd::config::KeepAlive;
use mlxd_client::Client;
use mlxd_client::v1::{
    ComputeDtype, Eviction, KvDtype, LoadModelRequest, LoadPhase, LoadProgress, LoadValidated, ModelInfo,
    UnloadModelRequest, load_model_response::Event,
};

use super::bar::styled;
use super::connect::ConnectArgs;
use super::failure::{Failure, Result};
use super::quantize::QuantizeArgs;
use super::{format, json, out};

const LOAD_EXAMPLES: &str = "\
Examples:
  mlxd load SmolLM2-135M-Instruct
  mlxd load owner/name --dry-run && mlxd load owner/name
  mlxd load owner/name --quantize 4
  mlxd load SmolLM2-135M-Instruct --keep-alive 10m
  mlxd load SmolLM2-135M-Instruct --pin

A repo that is not on disk is downloaded first. Idle models make room, the least recently used first. A dry run
of a model that does not fit exits with 1.";

const UNLOAD_EXAMPLES: &str = "\
Examples:
  mlxd unload SmolLM2-135M-Instruct";

/// Make a model resident.
#[derive(Args, Debug)]
#[command(after_help = LOAD_EXAMPLES)]
pub(crate) struct LoadArgs {
    /// A Hugging Face repo id, or the name of a folder under a model root
    model: String,
    /// Report whether the model would fit, without loading it
    #[arg(long, conflicts_with_all = ["keep_alive", "pin", "unpin"])]
    dry_run: bool,
    /// Number format to compute with [default: float32 on a CPU, as stored on a GPU]
    #[arg(long, value_name = "DTYPE")]
    dtype: Option<Dtype>,
    /// Number format of the KV cache [default: the daemon's `kv_dtype`]
    #[arg(long, value_name = "DTYPE")]
    kv_dtype: Option<KvNumbers>,
    #[command(flatten)]
    quantization: QuantizeArgs,
    /// How long it stays in memory after its last use: 5m, 1h30m, seconds, 0 (unload after use), -1 (forever)
    /// [default: as configured]
    #[arg(long, value_name = "TIME", allow_hyphen_values = true)]
    keep_alive: Option<KeepAlive>,
    /// Pin it: neither evict it for another nor unload it with time
    #[arg(long)]
    pin: bool,
    /// Take the pin away
    #[arg(long, conflicts_with = "pin")]
    unpin: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    connect: ConnectArgs,
}

/// Free a resident model and its KV caches; sessions stay.
#[derive(Args, Debug)]
#[command(after_help = UNLOAD_EXAMPLES)]
pub(crate) struct UnloadArgs {
    /// Name of the model, as `mlxd ps` shows it
    model: String,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    connect: ConnectArgs,
}

/// Number format of a model's computation.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Dtype {
    Float32,
    Bfloat16,
    Float16,
}

/// Number format of a KV cache.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum KvNumbers {
    /// The format the model computes with
    Compute,
    /// 8-bit integers with one scale per token and head
    Int8,
}

/// Runs `load`.
pub(crate) async fn run(args: LoadArgs) -> Result<()> {
    let quantize = args.quantization.options()?;
    let client = args.connect.connect().await?;
    let compute_dtype = match args.dtype {
        None => ComputeDtype::Unspecified,
        Some(Dtype::Float32) => ComputeDtype::Float32,
        Some(Dtype::Bfloat16) => ComputeDtype::Bfloat16,
        Some(Dtype::Float16) => ComputeDtype::Float16,
    };
    let kv_dtype = match args.kv_dtype {
        None => KvDtype::Unspecified,
        Some(KvNumbers::Compute) => KvDtype::Compute,
        Some(KvNumbers::Int8) => KvDtype::Int8,
    };
    let model = args.model.clone();
    let request = LoadModelRequest {
        model,
        validate_only: args.dry_run,
        compute_dtype: compute_dtype.into(),
        kv_dtype: kv_dtype.into(),
        quantize,
        keep_alive: args.keep_alive.map(format::keep_alive),
        pin: (args.pin || args.unpin).then_some(args.pin),
    };
    match follow(&client, request).await? {
        Ended::Loaded(info) => print_loaded(&info, args.json)?,
        Ended::Validated(verdict) => print_verdict(&args.model, &verdict, args.json)?,
    }
    Ok(())
}

/// How a load ended.
pub(crate) enum Ended {
    /// The model is resident.
    Loaded(Box<ModelInfo>),
    /// Whether it would fit.
    Validated(LoadValidated),
}

/// Loads a model, or asks whether it would fit, and shows the progress.
pub(crate) async fn follow(client: &Client, request: LoadModelRequest) -> Result<Ended> {
    let mut stream = client.load_model(request).await?;
    let mut progress = Progress::new();
    let mut ended = None;
    while let Some(event) = stream.next_event().await? {
        match event {
            Event::Progress(step) => progress.show(&step),
            Event::Loaded(loaded) => ended = Some(Ended::Loaded(Box::new(loaded.model.unwrap_or_default()))),
            Event::Validated(verdict) => ended = Some(Ended::Validated(verdict)),
        }
    }
    progress.clear();
    ended.ok_or_else(|| Failure::Local(anyhow::anyhow!("the load ended without a result")))
}

/// Runs `unload`.
pub(crate) async fn run_unload(args: UnloadArgs) -> Result<()> {
    let client = args.connect.connect().await?;
    let answer = client.unload_model(UnloadModelRequest { model: args.model.clone() }).await?;
    if args.json {
        json::print(&serde_json::json!({ "model": args.model, "freed_bytes": answer.freed_bytes }))?;
    } else {
        let freed = format::bytes(answer.freed_bytes);
        out::data(&format!("unloaded {}, {freed} freed\n", args.model))?;
    }
    Ok(())
}

fn print_loaded(info: &ModelInfo, as_json: bool) -> io::Result<()> {
    if as_json {
        return json::print(&json::model(info));
    }
    out::data(&format!(
        "loaded {}: {}, {} parameters, stored as {}, computes in {}, {}\n",
        info.name,
        info.architecture,
        format::count(info.parameter_count),
        info.stored_as,
        info.computes_in,
        format::bytes(info.weight_bytes),
    ))
}

fn print_verdict(model: &str, verdict: &LoadValidated, as_json: bool) -> Result<()> {
    if as_json {
        json::print(&json::verdict(verdict))?;
    } else {
        out::data(&verdict_line(model, verdict))?;
    }
    if verdict.fits { Ok(()) } else { Err(Failure::Negative) }
}

fn verdict_line(model: &str, verdict: &LoadValidated) -> String {
    let LoadValidated { fits, needed_bytes, available_bytes, evictions, rule, budget_bytes: _, in_the_way } =
        verdict;
    let needed = format::bytes(*needed_bytes);
    let available = format::bytes(*available_bytes);
    let numbers = format!("it needs {needed}, {available} are available");
    if !fits {
        let holders = match in_the_way.as_slice() {
            [] => String::new(),
            models => format!(" ({})", models.join(", ")),
        };
        return format!("{model} does not fit: {numbers}; {rule}{holders}\n");
    }
    let evicted = evictions.iter().map(|evicted| {
        let Eviction { model, bytes } = evicted;
        format!("{model} ({})", format::bytes(*bytes))
    });
    let evicted: Vec<String> = evicted.collect();
    let evicts =
        if evicted.is_empty() { String::new() } else { format!("; it would evict {}", evicted.join(", ")) };
    format!("{model} fits: {numbers}{evicts}\n")
}

/// Progress on stderr: a bar on a terminal, else one line per phase.
struct Progress {
    bar: Option<ProgressBar>,
    phase: LoadPhase,
}

impl Progress {
    fn new() -> Self {
        let template = "{msg:10} {wide_bar} {binary_bytes} of {binary_total_bytes}";
        let bar = out::notes_are_watched().then(|| styled(template));
        Self { bar, phase: LoadPhase::Unspecified }
    }

    fn show(&mut self, step: &LoadProgress) {
        let phase = step.phase();
        let name = json::enum_name(phase.as_str_name(), "LOAD_PHASE_");
        if let Some(bar) = &self.bar {
            bar.set_length(step.total_bytes);
            bar.set_position(step.done_bytes);
            bar.set_message(name);
        } else if phase != self.phase {
            let size = if step.total_bytes == 0 {
                String::new()
            } else {
                format!(" {}", format::bytes(step.total_bytes))
            };
            out::note(&format!("{name}{size}\n"));
        }
        self.phase = phase;
    }

    fn clear(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
