//! Shared by all client commands: the daemon's address, and the choice of a model.

use std::path::PathBuf;

use clap::Args;
use mlxd_client::{BearerToken, Client, ConnectOptions};

use super::failure::{Failure, Result};

/// Address and token of the daemon.
#[derive(Args, Debug)]
#[command(next_help_heading = "Connection")]
pub(crate) struct ConnectArgs {
    /// Daemon to connect to: unix:///path, an absolute socket path or http://host:port [default:
    /// $MLXD_ADDRESS, else the user's socket]
    #[arg(long, value_name = "ADDRESS")]
    address: Option<String>,
    /// File with the bearer token, for a daemon on TCP
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
}

impl ConnectArgs {
    /// Connects to the daemon.
    pub(crate) async fn connect(&self) -> Result<Client> {
        let address = self.address.as_deref().map(str::parse).transpose()?;
        let token = self.token_file.as_deref().map(BearerToken::from_file).transpose()?;
        Ok(Client::connect_with(ConnectOptions { address, token, client_name: None }).await?)
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
        [] => {
            Err(Failure::Usage("no model is resident; name one with -m (`mlxd ps --all` lists them)".into()))
        }
        [..] => Err(Failure::Usage(format!("name one of the resident models with -m: {}", names.join(", ")))),
    }
}
