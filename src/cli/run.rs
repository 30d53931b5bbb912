//! `mlxd run`: from nothing to a chat. Downloads the model if it is not there, makes it resident, and chats;
//! where no daemon answers, one is started for the chat.

use clap::Args;
use mlxd::hub::RepoName;
use mlxd_client::v1::{GetModelRequest, LoadModelRequest};
use mlxd_client::{Address, Client, ErrorReason};
use tokio::runtime::Runtime;

use super::answer::SamplingArgs;
use super::asking::AskingArgs;
use super::chat::{self, ChatArgs};
use super::connect::ConnectArgs;
use super::failure::Result;
use super::interrupts::Interrupts;
use super::own_daemon::OwnDaemon;
use super::{load, pull};

const EXAMPLES: &str = "\
Examples:
  mlxd run mlx-community/SmolLM2-135M-Instruct
  mlxd run SmolLM2-135M-Instruct --system \"Answer in one sentence.\"
  echo \"Why is the sky blue?\" | mlxd run owner/name

Downloads into the Hugging Face cache, as `mlxd pull` does; Ctrl-C stops it, and the next run continues it.";

/// Download a model if needed, load it and chat.
#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(crate) struct RunArgs {
    /// A Hugging Face repo id, or the name of a folder under a model root
    model: String,
    /// System message, sent with the first turn
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    #[command(flatten)]
    asking: AskingArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    connect: ConnectArgs,
}

/// Runs the command.
pub(crate) fn run(runtime: &Runtime, args: RunArgs) -> Result<()> {
    let RunArgs { model, system, asking, sampling, connect } = args;
    let mut interrupts = Interrupts::listen(runtime)?;
    let (_daemon, client) = runtime.block_on(interrupts.or(prepare(&connect, &model)))?;
    let (session, history, model) = (None, None, Some(model));
    let chat = ChatArgs { model, session, system, history, asking, sampling, connect };
    chat::with_client(runtime, &mut interrupts, client, chat)
}

/// Returns a daemon that has the model in memory, and the process that was started for it.
async fn prepare(connect: &ConnectArgs, model: &str) -> Result<(Option<OwnDaemon>, Client)> {
    // At an address that was named there must be one.
    let there =
        if connect.is_default() { connect.connect_if_there().await? } else { Some(connect.connect().await?) };
    let (daemon, client) = match there {
        Some(client) => (None, client),
        None => {
            let (daemon, client) = OwnDaemon::start().await?;
            (Some(daemon), client)
        }
    };
    fetch_if_missing(&client, model).await?;
    let request = LoadModelRequest { model: model.to_owned(), ..LoadModelRequest::default() };
    load::follow(&client, request).await?;
    Ok((daemon, client))
}

/// Downloads the model unless the daemon has it. A daemon on this machine finds it in the cache.
async fn fetch_if_missing(client: &Client, model: &str) -> Result<()> {
    let Err(error) = client.get_model(GetModelRequest { model: model.to_owned() }).await else {
        return Ok(());
    };
    let is_here = matches!(client.address(), Address::Unix(_));
    let may_help = matches!(error.reason(), ErrorReason::ModelNotFound | ErrorReason::ModelInvalid);
    let repo = RepoName::of_model(model).filter(|_| is_here && may_help);
    let Some(repo) = repo else { return Err(error.into()) };
    pull::pull(pull::settings()?, repo, false).await.map(drop)
}
