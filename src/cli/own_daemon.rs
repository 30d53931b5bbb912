//! A daemon that a command starts for itself, where none answers: on a private socket, for as long as the
//! command runs. It ends with the command, however that ends: its stdin is a pipe that closes then.

use std::fs::{self, DirBuilder, File};
use std::os::unix::fs::DirBuilderExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use mlxd_client::{Address, Client, ConnectOptions};

use super::failure::{Failure, Result};
use super::out;

/// Time between two tries to connect to it.
const POLL: Duration = Duration::from_millis(50);

/// Lines of its log that are shown when it does not start.
const LOG_LINES: usize = 5;

/// The daemon; stopped when dropped.
pub(crate) struct OwnDaemon {
    child: Child,
    folder: PathBuf,
}

impl OwnDaemon {
    /// Starts a daemon with the user's configuration and connects to it.
    pub(crate) async fn start() -> Result<(Self, Client)> {
        let folder = std::env::temp_dir().join(format!("mlxd-run-{}", std::process::id()));
        // Fails if somebody else made it.
        DirBuilder::new().mode(0o700).create(&folder)?;
        let socket = folder.join("s");
        let log = File::create(folder.join("log"))?;
        let started = Command::new(std::env::current_exe()?)
            .args(["serve", "--stop-with-stdin", "--socket"])
            .arg(&socket)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(log)
            // Ctrl-C in the terminal is the command's.
            .process_group(0)
            .spawn();
        let child = started.inspect_err(|_| _ = fs::remove_dir_all(&folder))?;
        let mut daemon = Self { child, folder };
        let address: Address = socket.display().to_string().parse()?;
        loop {
            let options = ConnectOptions { address: Some(address.clone()), ..ConnectOptions::default() };
            if let Ok(client) = Client::connect_with(options).await {
                out::note("no daemon answers; one runs for this chat only (`mlxd serve` keeps one)\n");
                return Ok((daemon, client));
            }
            if let Some(status) = daemon.child.try_wait()? {
                let log = fs::read_to_string(daemon.folder.join("log")).unwrap_or_default();
                let lines: Vec<&str> = log.lines().rev().take(LOG_LINES).collect();
                let log: String = lines.iter().rev().map(|line| format!("\n{line}")).collect();
                return Err(Failure::Local(anyhow::anyhow!("the daemon ended with {status}:{log}")));
            }
            tokio::time::sleep(POLL).await;
        }
    }
}

impl Drop for OwnDaemon {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        // It drains by itself; nothing of it is to be seen after this.
        _ = self.child.wait();
        _ = fs::remove_dir_all(&self.folder);
    }
}
