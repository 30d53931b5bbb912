//! What `serve` and `convert` call in the library. Until `mlxd::config`, `mlxd::daemon` and
//! `mlxd::hub::convert` are merged this file holds their shapes; then it goes away.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

/// As `mlxd::config::Overrides`.
#[derive(Debug, Default)]
#[allow(dead_code, reason = "read by mlxd::config once it is merged")]
pub(crate) struct Overrides {
    pub(crate) config_file: Option<PathBuf>,
    pub(crate) socket: Option<PathBuf>,
    pub(crate) model_roots: Vec<PathBuf>,
    pub(crate) models: Vec<String>,
    pub(crate) listen: Option<SocketAddr>,
    pub(crate) token_file: Option<PathBuf>,
    pub(crate) log_format: Option<LogFormat>,
}

/// As `mlxd::config::LogFormat`.
#[derive(Clone, Copy, Debug)]
pub(crate) enum LogFormat {
    Text,
    Json,
}

/// As `mlxd::daemon::run(mlxd::config::Config::load(overrides)?)`.
pub(crate) fn serve(overrides: &Overrides) -> anyhow::Result<()> {
    anyhow::bail!("this build has no daemon: {overrides:?}")
}

/// As `mlxd::hub::convert`.
pub(crate) fn convert(
    gguf: &Path,
    _out: &Path,
    _overwrite: bool,
    _progress: &mut dyn FnMut(u64, u64),
) -> anyhow::Result<()> {
    anyhow::bail!("{}: this build cannot convert", gguf.display())
}
