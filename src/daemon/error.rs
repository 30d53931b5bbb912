//! The daemon's own failures: those that keep it from starting or end it. `cli::serve` prints them and exits.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

use crate::error::Error;
use crate::store::StoreError;

/// Why the daemon fails to start or to go on.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// Another daemon serves on the socket.
    #[error("a daemon (pid {pid}) serves on {} already", socket.display())]
    Locked {
        /// The socket.
        socket: PathBuf,
        /// Process id of the other daemon.
        pid: String,
    },
    /// The socket cannot be opened.
    #[error("{}: {source}", socket.display())]
    Socket {
        /// The socket.
        socket: PathBuf,
        /// The error of the operating system.
        source: io::Error,
    },
    /// The TCP address cannot be bound.
    #[error("{address}: {source}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// The error of the operating system.
        source: io::Error,
    },
    /// The folder of the sessions is another daemon's, or cannot be used.
    #[error("`state_dir`: {0}")]
    State(StoreError),
    /// The token file is unreadable, readable by others, or malformed.
    #[error("token_file {}: {why}", path.display())]
    Token {
        /// The file.
        path: PathBuf,
        /// Reason.
        why: String,
    },
    /// The log's filter is invalid.
    #[error("{0}")]
    Log(String),
    /// A configured model cannot be loaded.
    #[error("cannot load {model}: {source}")]
    Preload {
        /// The model.
        model: String,
        /// Reason.
        source: Error,
    },
    /// The engine cannot start.
    #[error("the engine: {0}")]
    Engine(Error),
    /// The engine died while the daemon served.
    #[error("the engine died")]
    EngineDied,
    /// A failure that an intact build and system exclude.
    #[error("{0}")]
    Setup(String),
}
