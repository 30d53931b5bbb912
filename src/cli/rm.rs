//! `mlxd rm`: removes a downloaded model from the Hugging Face cache. Works without a daemon, and asks one
//! that answers whether the model is in use.

use clap::Args;
use mlxd::hub::{RepoName, remove};

use super::connect::ConnectArgs;
use super::failure::{Failure, Result};
use super::{format, out, pull};

const EXAMPLES: &str = "\
Examples:
  mlxd rm mlx-community/SmolLM2-135M-Instruct

Removes every revision of the repo, for Python's tools too. Folders under model roots are yours to remove.";

/// Remove a downloaded model from the Hugging Face cache.
#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(crate) struct RmArgs {
    /// Repo id, as `mlxd list` shows it
    repo: String,
    #[command(flatten)]
    connect: ConnectArgs,
}

/// Runs the command.
pub(crate) async fn run(args: RmArgs) -> Result<()> {
    let repo = RepoName::parse(&args.repo).map_err(|error| Failure::Usage(error.to_string()))?;
    if args.repo.contains('@') {
        return Err(Failure::Usage("name the repo without a revision: all of its revisions go".into()));
    }
    if let Some(client) = args.connect.connect_if_there().await? {
        let resident = client.list_all_models(true).await?;
        let of_repo = |name: &str| name == repo.id() || name.starts_with(&format!("{}@", repo.id()));
        if let Some(model) = resident.iter().find(|model| of_repo(&model.name)) {
            let name = &model.name;
            return Err(Failure::Local(anyhow::anyhow!("{name} is resident: `mlxd unload {name}` first")));
        }
    }
    let cache = pull::settings()?.cache;
    let removed = tokio::task::spawn_blocking(move || remove(&cache, &repo).map(|bytes| (repo, bytes)));
    let removed = removed.await.map_err(anyhow::Error::from)?;
    let (repo, bytes) = removed.map_err(|error| anyhow::anyhow!("{error}"))?;
    out::data(&format!("removed {repo}, {} freed\n", format::bytes(bytes)))?;
    Ok(())
}
