//! What all client commands share: where the daemon is, and which model is meant.

use std::path::PathBuf;

use clap::Args;
use mlxd_client::{BearerToken, Client, ConnectOptions};

use super::failure::{Failure, Result};

/// Where the daemon is.
#[derive(Args, Debug)]
#[command(next_help_heading = "Connection")]
pub(crate) struct ConnectArgs {
    /// unix:///path, a socket's absolute path or http://host:port [default: $MLXD_ADDRESS, else the
    /// user's socket]
    #[arg(long, value_name = "ADDRESS")]
    address: Option<String>,
    /// File with the bearer token of a daemon that listens on TCP
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
}

impl ConnectArgs {
    /// Connects to it.
    pub(crate) async fn connect(&self) -> Result<Client> {
        let address = self.address.as_deref().map(str::parse).transpose()?;
        let token = self.token_file.as_deref().map(BearerToken::from_file).transpose()?;
        Ok(Client::connect_with(ConnectOptions { address, token, client_name: None }).await?)
    }
}

/// The model that was named, or the only one that is resident.
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
