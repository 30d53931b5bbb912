//! The daemon's configuration: defaults < file < environment `MLXD_*` < flags. Everything is checked at once,
//! and an error names where the value came from. `deploy/mlxd.example.toml` documents every key.

mod keys;
mod layers;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use keys::KV_DTYPES;
use layers::Layers;

use crate::backend::{KernelChoice, KvDtype};
use crate::limits::Limits;

/// Bytes of a socket's path. macOS has room for 104 with the closing zero, Linux for 108.
pub const SOCKET_PATH_BYTES_MAX: usize = 103;

/// What the command line says; empty and none leave a key to the other sources.
#[derive(Clone, Debug, Default)]
pub struct Overrides {
    /// The file to read; none is `MLXD_CONFIG`, else the user's, if it is there.
    pub config_file: Option<PathBuf>,
    /// Key `socket`.
    pub socket: Option<PathBuf>,
    /// Key `model_roots`.
    pub model_roots: Vec<PathBuf>,
    /// Key `models`.
    pub models: Vec<String>,
    /// Key `listen`.
    pub listen: Option<SocketAddr>,
    /// Key `token_file`.
    pub token_file: Option<PathBuf>,
    /// Key `log_format`.
    pub log_format: Option<LogFormat>,
}

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

impl LogFormat {
    /// As the key `log_format` names it.
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::Json => "json",
        }
    }

    fn from_word(word: Option<&str>) -> Self {
        if word == Some(Self::Json.as_str()) { Self::Json } else { Self::Text }
    }
}

/// The configuration in force.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// The unix socket.
    pub socket: PathBuf,
    /// The loopback address to serve too.
    pub listen: Option<SocketAddr>,
    /// The bearer token for `listen`.
    pub token_file: Option<PathBuf>,
    /// Folders with models in them.
    pub model_roots: Vec<PathBuf>,
    /// The Hugging Face cache.
    pub hf_cache: Option<PathBuf>,
    /// Models to load at start.
    pub models: Vec<String>,
    /// Load a model when a request names it.
    pub auto_load: bool,
    /// Bytes for weights and KV caches; none is automatic.
    pub memory_budget_bytes: Option<u64>,
    /// Bytes that KV caches of sequences that do not run may keep; none is automatic.
    pub kv_idle_bytes_max: Option<u64>,
    /// How KV caches are kept where a load does not say.
    pub kv_dtype: KvDtype,
    /// Kernels that models compute with.
    pub kernels: KernelChoice,
    /// Prefill tokens in one step.
    pub prefill_chunk_tokens: u32,
    /// Time that a step which only prefills may take.
    pub prefill_step: Duration,
    /// What a step may take when it prefills while others decode, in percent of one that only decodes.
    pub prefill_stretch_percent: u32,
    /// Waiting that lifts a request by a priority class.
    pub priority_ageing: Duration,
    /// How long a caller may leave its stream unread.
    pub slow_reader: Duration,
    /// How long running requests may take to finish at the end.
    pub drain: Duration,
    /// How log lines look.
    pub log_format: LogFormat,
    /// Which log lines there are, as `tracing` filters read it.
    pub log_filter: String,
    /// What callers may ask for and hold.
    pub limits: Limits,
}

/// Why a configuration is refused.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{}: {why}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the system or the TOML parser said.
        why: String,
    },
    /// There is no such key.
    #[error("{origin}: unknown key `{key}`")]
    UnknownKey {
        /// The file.
        origin: String,
        /// The key.
        key: String,
    },
    /// A value is not allowed.
    #[error("{origin}: `{key}` {why}")]
    Value {
        /// The file, variable or flag it came from.
        origin: String,
        /// The key.
        key: &'static str,
        /// What is wrong with it.
        why: String,
    },
}

impl Config {
    /// The configuration from all sources.
    ///
    /// # Errors
    /// A file that cannot be read, an unknown key, or a value that is not allowed.
    pub fn load(overrides: &Overrides) -> Result<Self, ConfigError> {
        Self::from_sources(overrides, &|name| std::env::var(name).ok().filter(|text| !text.is_empty()))
    }

    fn from_sources(
        overrides: &Overrides,
        env: &dyn Fn(&str) -> Option<String>,
    ) -> Result<Self, ConfigError> {
        let mut layers = Layers::defaults();
        if let Some(file) = config_file(overrides, env) {
            layers.add_file(&file)?;
        }
        layers.add_environment(env)?;
        layers.add_flags(overrides)?;
        let home = env("HOME").map(PathBuf::from);
        let path = |key| layers.text(key).map(|text| expand_home(text, home.as_deref()));
        let list = |key| layers.list(key);
        let listen = listen(&layers)?;
        let token_file = path("token_file");
        if listen.is_some() && token_file.is_none() {
            return Err(layers.refuse("listen", "needs `token_file`: any local user could connect otherwise"));
        }
        Ok(Self {
            socket: socket(&layers, path("socket"), env)?,
            listen,
            token_file,
            model_roots: list("model_roots").iter().map(|text| expand_home(text, home.as_deref())).collect(),
            hf_cache: path("hf_cache").or_else(|| default_hf_cache(env)),
            models: list("models"),
            auto_load: layers.flag("auto_load"),
            memory_budget_bytes: layers.number_unless_zero("memory_budget_bytes"),
            kv_idle_bytes_max: layers.number_unless_zero("kv_idle_bytes_max"),
            kv_dtype: kv_dtype(layers.text("kv_dtype")),
            kernels: kernels(layers.text("kernels")),
            prefill_chunk_tokens: layers.number("prefill_chunk_tokens"),
            prefill_step: layers.milliseconds("prefill_step_ms"),
            prefill_stretch_percent: layers.number("prefill_stretch_percent"),
            priority_ageing: layers.seconds("priority_ageing_s"),
            slow_reader: layers.seconds("slow_reader_s"),
            drain: layers.seconds("drain_s"),
            log_format: LogFormat::from_word(layers.text("log_format")),
            log_filter: layers.text("log_filter").unwrap_or("info").to_owned(),
            limits: limits(&layers)?,
        })
    }
}

fn kv_dtype(word: Option<&str>) -> KvDtype {
    if word == Some(KV_DTYPES[1]) { KvDtype::Int8 } else { KvDtype::Compute }
}

fn kernels(word: Option<&str>) -> KernelChoice {
    KernelChoice::ALL.into_iter().find(|choice| word == Some(choice.as_str())).unwrap_or_default()
}

fn limits(layers: &Layers) -> Result<Limits, ConfigError> {
    let limits = Limits {
        message_bytes_max: layers.number("message_bytes_max"),
        connections_max: layers.number("connections_max"),
        streams_per_connection_max: layers.number("streams_per_connection_max"),
        keep_alive: layers.seconds("keep_alive_s"),
        sessions_max: layers.number("sessions_max"),
        session_ttl: layers.seconds("session_ttl_s"),
        session_ttl_max: layers.seconds("session_ttl_max_s"),
        queue_length_max: layers.number("queue_length_max"),
        queue_length_per_client_max: layers.number("queue_length_per_client_max"),
        running_sequences_max: layers.number("running_sequences_max"),
        max_tokens_default: layers.number("max_tokens_default"),
        score_tokens_max: layers.number("score_tokens_max"),
        top_logprobs_max: layers.number("top_logprobs_max"),
        stop_strings_max: layers.number("stop_strings_max"),
        stop_string_bytes_max: layers.number("stop_string_bytes_max"),
        stop_token_ids_max: layers.number("stop_token_ids_max"),
        logit_bias_max: layers.number("logit_bias_max"),
        text_bytes_max: layers.number("text_bytes_max"),
    };
    if limits.session_ttl > limits.session_ttl_max {
        return Err(layers.refuse("session_ttl_s", "may not be above `session_ttl_max_s`"));
    }
    Ok(limits)
}

fn listen(layers: &Layers) -> Result<Option<SocketAddr>, ConfigError> {
    let Some(text) = layers.text("listen") else { return Ok(None) };
    let address: SocketAddr = text
        .parse()
        .map_err(|_| layers.refuse("listen", "must be an address and a port, such as 127.0.0.1:7411"))?;
    if !address.ip().is_loopback() {
        return Err(
            layers.refuse("listen", "must be a loopback address: others need TLS, which is not there yet")
        );
    }
    Ok(Some(address))
}

fn socket(
    layers: &Layers,
    given: Option<PathBuf>,
    env: &dyn Fn(&str) -> Option<String>,
) -> Result<PathBuf, ConfigError> {
    let Some(socket) = given.or_else(|| default_socket(env)) else {
        return Err(layers.refuse("socket", "must be given: neither XDG_RUNTIME_DIR nor HOME is set"));
    };
    let bytes = socket.as_os_str().len();
    if bytes > SOCKET_PATH_BYTES_MAX {
        let why = format!(
            "is a path of {bytes} bytes; a unix socket's may have {SOCKET_PATH_BYTES_MAX}: {}",
            socket.display()
        );
        return Err(layers.refuse("socket", &why));
    }
    Ok(socket)
}

fn default_socket(env: &dyn Fn(&str) -> Option<String>) -> Option<PathBuf> {
    let runtime = env("XDG_RUNTIME_DIR").map(|folder| Path::new(&folder).join("mlxd"));
    let folder = runtime.or_else(|| env("HOME").map(|home| Path::new(&home).join(".mlxd")))?;
    Some(folder.join("mlxd.sock"))
}

/// Where the Hugging Face tools keep their cache.
fn default_hf_cache(env: &dyn Fn(&str) -> Option<String>) -> Option<PathBuf> {
    if let Some(cache) = env("HF_HUB_CACHE") {
        return Some(cache.into());
    }
    let home = env("HF_HOME").map(PathBuf::from);
    let home = home.or_else(|| env("HOME").map(|home| Path::new(&home).join(".cache/huggingface")))?;
    Some(home.join("hub"))
}

fn config_file(overrides: &Overrides, env: &dyn Fn(&str) -> Option<String>) -> Option<PathBuf> {
    if let Some(file) = overrides.config_file.clone().or_else(|| env("MLXD_CONFIG").map(PathBuf::from)) {
        return Some(file);
    }
    let folder = env("XDG_CONFIG_HOME").map(PathBuf::from);
    let folder = folder.or_else(|| env("HOME").map(|home| Path::new(&home).join(".config")))?;
    Some(folder.join("mlxd/mlxd.toml")).filter(|file| file.exists())
}

fn expand_home(text: &str, home: Option<&Path>) -> PathBuf {
    match (text.strip_prefix("~/"), home) {
        (Some(rest), Some(home)) => home.join(rest),
        _ => text.into(),
    }
}

#[cfg(test)]
mod tests;
