//! `mlxd pull`: downloads a model from the Hugging Face hub into the standard cache. Works without a daemon.

use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use mlxd::hub::{self, Fetched, HubSettings, Progress, RepoName, Stop};

use super::failure::{Failure, Result};
use super::transfer_bars::TransferBars;
use super::{config, format, out};

const EXAMPLES: &str = "\
Examples:
  mlxd pull mlx-community/SmolLM2-135M-Instruct
  mlxd pull owner/name@v1.0

Downloads safetensors, configs, tokenizer and templates into the Hugging Face cache, which Python's tools share.
An interrupted download goes on where it ended. HF_HOME, HF_HUB_CACHE, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE
are used as Python's huggingface_hub uses them.";

/// Time between two looks at the progress.
const TICK: Duration = Duration::from_millis(100);

/// Download a model from the Hugging Face hub.
#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(crate) struct PullArgs {
    /// Repo id, with a branch, tag or commit if not `main`
    #[arg(value_name = "REPO[@REVISION]")]
    repo: String,
    /// Connections at one time
    #[arg(long, value_name = "N", default_value_t = HubSettings::CONNECTIONS,
          value_parser = clap::value_parser!(u8).range(1..=32))]
    connections: u8,
    /// Print no progress
    #[arg(short, long)]
    quiet: bool,
}

/// Runs the command.
pub(crate) async fn run(args: PullArgs) -> Result<()> {
    let repo = RepoName::parse(&args.repo).map_err(|error| Failure::Usage(error.to_string()))?;
    let mut settings = settings()?;
    settings.connections = args.connections.into();
    let fetched = pull(settings, repo, args.quiet).await?;
    out::data(&format!("{}\n", fetched.snapshot.display()))?;
    Ok(())
}

/// Returns the settings of downloads: those of the daemon's configuration and of the environment.
pub(crate) fn settings() -> Result<HubSettings> {
    let cache = config()?.hf_cache.ok_or_else(|| Failure::Usage("neither HF_HOME nor HOME is set".into()))?;
    Ok(HubSettings::from_environment(cache).map_err(anyhow::Error::from)?)
}

/// Downloads a repo and shows the progress; a caller that leaves stops the download.
pub(crate) async fn pull(settings: HubSettings, repo: RepoName, quiet: bool) -> Result<Fetched> {
    let (progress, stop) = (Arc::new(Progress::default()), Stop::new());
    let _stopped = StopOnDrop(stop.clone());
    let mut bars = (!quiet).then(|| TransferBars::new(&repo.to_string()));
    let watched = Arc::clone(&progress);
    let mut download = tokio::task::spawn_blocking(move || hub::fetch(&settings, &repo, &progress, &stop));
    let ended = loop {
        tokio::select! {
            ended = &mut download => break ended,
            () = tokio::time::sleep(TICK) => {}
        }
        if let Some(bars) = &mut bars {
            bars.show(&watched);
        }
    };
    // The error's own text has its cause.
    let fetched = ended.map_err(anyhow::Error::from)?.map_err(|error| anyhow::anyhow!("{error}"))?;
    if let Some(mut bars) = bars {
        bars.show(&watched);
        let count = fetched.files_count;
        if count == 0 {
            bars.finish("offline: the cache has it\n");
            return Ok(fetched);
        }
        let (bytes, received) = (format::bytes(fetched.bytes), format::bytes(watched.received_bytes()));
        bars.finish(&format!("{count} files, {bytes}; {received} downloaded\n"));
    }
    Ok(fetched)
}

/// Ends the download with the command that waits for it.
struct StopOnDrop(Stop);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.stop();
    }
}
