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

/// Time that it has to drain at the end; nobody uses it any more, so then it is killed.
const END_LIMIT: Duration = Duration::from_secs(5);

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
            // Its sessions end with it; the user's folder may be another daemon's.
            .env("MLXD_STATE_DIR", "off")
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
        end(&mut self.child, END_LIMIT);
        _ = fs::remove_dir_all(&self.folder);
    }
}

/// Ends a process that drains when its stdin closes, and kills it after `limit`. Nothing of it is to be seen
/// after this.
fn end(child: &mut Child, limit: Duration) {
    drop(child.stdin.take());
    let mut waited = Duration::ZERO;
    while waited < limit && matches!(child.try_wait(), Ok(None)) {
        std::thread::sleep(POLL);
        waited += POLL;
    }
    // Neither does anything to a process that has ended.
    _ = child.kill();
    _ = child.wait();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_daemon_that_does_not_end_by_itself_is_killed() {
        let mut child = Command::new("sleep").arg("1000").stdin(Stdio::piped()).spawn().unwrap();
        end(&mut child, Duration::ZERO);
        assert!(!child.wait().unwrap().success());
    }

    #[test]
    fn a_daemon_that_ends_with_its_stdin_is_not_killed() {
        let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        end(&mut child, Duration::from_secs(30));
        assert!(child.wait().unwrap().success());
    }
}
