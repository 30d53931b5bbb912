//! `mlxd convert`: converts a GGUF file into a model folder for MLX. Works without a daemon.

use std::path::PathBuf;

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use mlxd::hub;

use super::failure::Result;
use super::out;

const EXAMPLES: &str = "\
Examples:
  mlxd convert SmolLM2-135M-Instruct.Q8_0.gguf ~/models/SmolLM2-135M-Instruct";

/// Convert a GGUF file into an MLX model folder.
#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(crate) struct ConvertArgs {
    /// GGUF file to read
    gguf: PathBuf,
    /// Model folder to write
    out: PathBuf,
    /// Replace the folder if it exists
    #[arg(long)]
    overwrite: bool,
}

/// Runs the command.
pub(crate) fn run(args: &ConvertArgs) -> Result<()> {
    let bar = out::notes_are_watched().then(|| {
        let style =
            ProgressStyle::with_template("converting {wide_bar} {binary_bytes} of {binary_total_bytes}");
        let bar = ProgressBar::new(0);
        style.map(|style| bar.clone().with_style(style)).unwrap_or(bar)
    });
    let converted = hub::convert(&args.gguf, &args.out, args.overwrite, &mut |done_bytes, total_bytes| {
        if let Some(bar) = &bar {
            bar.set_length(total_bytes);
            bar.set_position(done_bytes);
        }
    });
    if let Some(bar) = bar {
        bar.finish_and_clear();
    }
    converted.map_err(anyhow::Error::from)?;
    out::data(&format!("wrote {}\n", args.out.display()))?;
    Ok(())
}
