//! `mlxd convert`: converts a GGUF file, a Hugging Face folder or a repo of the local cache into a model
//! folder for MLX. Works without a daemon.

use std::fs;
use std::io;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use clap::{Args, ValueEnum};
use indicatif::{HumanBytes, ProgressBar};
use mlxd::device::{self, Conversion, ConvertError, MlxQuantizer};
use mlxd::hub::{self, GgufConversion, HubError, ModelFolder, RepoName};

use super::bar::styled;
use super::failure::{Failure, Result};
use super::quantize::QuantizeArgs;
use super::{config, out, runtime};

const EXAMPLES: &str = "\
Examples:
  mlxd convert ~/Downloads/SmolLM2-135M-Instruct ~/models/SmolLM2-135M-Instruct-4bit --quantize 4
  mlxd convert Qwen/Qwen3-0.6B ~/models/Qwen3-0.6B-mixed --recipe mixed_3_6
  mlxd convert SmolLM2-135M-Instruct.Q8_0.gguf ~/models/SmolLM2-135M-Instruct

Quantized weights are those of `mlx_lm.convert` to the last bit. Without a daemon; nothing is downloaded.";

/// Convert a Hugging Face model or a GGUF file into an MLX model folder.
#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(crate) struct ConvertArgs {
    /// Folder with config.json and safetensors, repo id in the local Hugging Face cache, or GGUF file (the
    /// first of a split model's)
    source: String,
    /// Model folder to write
    out: PathBuf,
    /// Replace the folder if it exists
    #[arg(long)]
    overwrite: bool,
    /// Type of the floats [default: what the config names, else as stored; of GGUF files: as stored, float16
    /// if quantized]
    #[arg(long, value_name = "DTYPE")]
    dtype: Option<FloatType>,
    #[command(flatten)]
    quantization: QuantizeArgs,
}

/// Type of floats.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum FloatType {
    Float32,
    Float16,
    Bfloat16,
}

/// Runs the command.
pub(crate) fn run(args: &ConvertArgs) -> Result<()> {
    let quantization = args.quantization.quantization()?;
    let dtype = args.dtype.map(|dtype| match dtype {
        FloatType::Float32 => hub::Dtype::F32,
        FloatType::Float16 => hub::Dtype::F16,
        FloatType::Bfloat16 => hub::Dtype::BF16,
    });
    let bar = Bar::new();
    let stop = stopped_by_signals()?;
    let mut watch = |done_bytes, total_bytes| {
        bar.show(done_bytes, total_bytes);
        if stop.load(Ordering::Relaxed) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    let path = Path::new(&args.source);
    let written = if path.is_file() {
        let job =
            GgufConversion { file: path, out: &args.out, overwrite: args.overwrite, dtype, quantization };
        let mut quantizer = MlxQuantizer::new().map_err(anyhow::Error::from)?;
        let converted = hub::convert_gguf(&job, &mut quantizer, &mut watch).map_err(refused)?;
        if !converted.rounded.is_empty() {
            out::note(&format!("{} tensors were rounded to float16\n", converted.rounded.len()));
        }
        converted.bytes
    } else {
        let source = folder(&args.source)?;
        let job =
            Conversion { source: &source, out: &args.out, overwrite: args.overwrite, dtype, quantization };
        let converted = device::convert(&job, &mut watch).map_err(|error| match error {
            ConvertError::Hub(error) => refused(error),
            other => Failure::Local(other.into()),
        })?;
        converted.bytes
    };
    drop(bar);
    out::data(&format!("wrote {} ({})\n", args.out.display(), HumanBytes(written)))?;
    Ok(())
}

/// Returns the folder of a source: a path, else the name of a model as the daemon finds it.
fn folder(source: &str) -> Result<ModelFolder> {
    let path = Path::new(source);
    if path.is_dir() {
        let real = fs::canonicalize(path)?;
        let name = real.file_name().unwrap_or(real.as_os_str()).to_string_lossy().into_owned();
        return Ok(ModelFolder { name, path: real, revision: String::new() });
    }
    config()?.roots().resolve(source).map_err(|error| match error {
        HubError::NotFound { .. } if RepoName::parse(source).is_ok() => {
            Failure::Local(anyhow::anyhow!("{error}: `mlxd pull {source}` downloads it"))
        }
        other => refused(other),
    })
}

fn refused(error: HubError) -> Failure {
    match error {
        HubError::Io { source, .. } if source.kind() == io::ErrorKind::Interrupted => Failure::Interrupted,
        other => Failure::Local(other.into()),
    }
}

/// Returns a flag that Ctrl-C and SIGTERM set: the conversion ends at the next tensor and cleans up.
fn stopped_by_signals() -> Result<Arc<AtomicBool>> {
    use tokio::signal::unix::{SignalKind, signal};
    let stop = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&stop);
    let runtime = runtime()?;
    let (mut interrupt, mut terminate) = {
        let _entered = runtime.enter();
        (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?)
    };
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        runtime.block_on(async {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
        });
        flag.store(true, Ordering::Relaxed);
    })?;
    Ok(stop)
}

/// The progress on a terminal; vanishes when it is dropped.
struct Bar(Option<ProgressBar>);

impl Bar {
    fn new() -> Self {
        let template = "converting {wide_bar} {binary_bytes} of {binary_total_bytes}";
        Self(out::notes_are_watched().then(|| styled(template)))
    }

    fn show(&self, done_bytes: u64, total_bytes: u64) {
        if let Some(bar) = &self.0 {
            bar.set_length(total_bytes);
            bar.set_position(done_bytes);
        }
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        if let Some(bar) = &self.0 {
            bar.finish_and_clear();
        }
    }
}
