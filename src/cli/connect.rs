//! Shared by all client commands: the daemon's address, and the choice of a model.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use mlxd_client::v1::ModelInfo;
use mlxd_client::{BearerToken, Client, ConnectOptions, Error};

use super::failure::{Failure, Result};

/// What to do when the daemon has no model at all.
pub(crate) const NO_MODELS: &str = "the daemon finds no model: `mlxd serve --model-root DIR` serves the model \
    folders in DIR, and `mlxd convert` makes one of a GGUF file";

/// Number of models that a message names: a line's worth.
const NAMES_MAX: usize = 8;

/// Address of the daemon, and how to call it. Subcommands take it as well.
#[derive(Args, Debug)]
#[command(next_help_heading = "Connection")]
pub(crate) struct ConnectArgs {
    /// Daemon to connect to: unix:///path, an absolute socket path or http://host:port [default:
    /// $MLXD_ADDRESS, else the user's socket]
    #[arg(long, value_name = "ADDRESS", global = true)]
    address: Option<String>,
    /// File with the bearer token, for a daemon on TCP
    #[arg(long, value_name = "FILE", global = true)]
    token_file: Option<PathBuf>,
    /// Give up each call to the daemon after this time [default: never]
    #[arg(long, value_name = "SECONDS", value_parser = seconds, global = true)]
    timeout: Option<Duration>,
}

fn seconds(text: &str) -> std::result::Result<Duration, String> {
    let length = text.parse().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    length.filter(|length| !length.is_zero()).ok_or_else(|| "must be a number of seconds above 0".into())
}

impl ConnectArgs {
    /// Returns whether no address was given, here or in the environment.
    pub(crate) fn is_default(&self) -> bool {
        self.address.is_none() && std::env::var_os("MLXD_ADDRESS").is_none_or(|address| address.is_empty())
    }

    /// Connects to the daemon.
    pub(crate) async fn connect(&self) -> Result<Client> {
        let address = self.address.as_deref().map(str::parse).transpose()?;
        let token = self.token_file.as_deref().map(BearerToken::from_file).transpose()?;
        let options = ConnectOptions { address, token, client_name: None, timeout: self.timeout };
        Ok(Client::connect_with(options).await?)
    }

    /// Connects to the daemon; None where none answers. A wrong address or token is an error.
    pub(crate) async fn connect_if_there(&self) -> Result<Option<Client>> {
        match self.connect().await {
            Ok(client) => Ok(Some(client)),
            Err(Failure::Client(Error::Connect { .. })) => Ok(None),
            Err(failure) => Err(failure),
        }
    }
}

/// Returns `named`, else the only resident model.
pub(crate) async fn choose_model(client: &Client, named: Option<&str>) -> Result<String> {
    if let Some(name) = named {
        return Ok(name.to_owned());
    }
    let mut names: Vec<_> = client.list_all_models(true).await?.into_iter().map(|info| info.name).collect();
    match names.as_slice() {
        [_] => Ok(names.remove(0)),
        [] => Err(Failure::Usage(none_resident(&client.list_all_models(false).await?))),
        [..] => Err(Failure::Usage(format!("name one of the resident models with -m: {}", names.join(", ")))),
    }
}

fn none_resident(on_disk: &[ModelInfo]) -> String {
    if on_disk.is_empty() {
        return NO_MODELS.to_owned();
    }
    let names: Vec<_> = on_disk.iter().take(NAMES_MAX).map(|info| info.name.as_str()).collect();
    let more = if on_disk.len() > NAMES_MAX { ", … (`mlxd ps --all` lists the rest)" } else { "" };
    format!("no model is resident; name one with -m: {}{more}", names.join(", "))
}
