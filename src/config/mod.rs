//! The daemon's configuration: defaults < file < environment `MLXD_*` < flags. Everything is checked at once,
//! and an error names the source of the value. A new setting is a field of the struct that a room takes, a
//! row in `keys`, and its lines in `deploy/mlxd.example.toml`, which documents every key.

mod keys;
mod layers;
mod models;
mod state_dir;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use layers::Layers;
use models::Sections;

use crate::backend::{KernelChoice, WiredLimit};
use crate::engine::{EngineSettings, ModelSettings, ResidencySettings};
pub use crate::engine::{KeepAlive, NotAKeepAlive};
use crate::hub::{FormSettings, ModelAccess, ModelRoots, Pattern, default_hf_cache, expand_home};
use crate::ids::ModelName;
use crate::limits::Limits;
use crate::store::Durability;

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

/// How long a model stays after its last use, unless the configuration says otherwise: pauses of those who
/// work with it keep its sessions' KV caches, and nights give its memory back.
const KEEP_ALIVE_DEFAULT: KeepAlive = KeepAlive::For(Duration::from_secs(60 * 60));

/// Format of log lines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

impl LogFormat {
    /// Words of the key; the default first.
    const WORDS: [&str; 2] = [Self::Text.as_str(), Self::Json.as_str()];

    /// As the key `log_format` names it.
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::Json => "json",
        }
    }

    fn from_word(word: &str) -> Self {
        if word == Self::Json.as_str() { Self::Json } else { Self::Text }
    }
}

/// The configuration in force; its sections are the structs that the rooms below take.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Config {
    /// The unix socket.
    pub socket: PathBuf,
    /// The loopback address to serve too.
    pub listen: Option<SocketAddr>,
    /// The bearer token for `listen`.
    pub token_file: Option<PathBuf>,
    /// Folders with models in them.
    pub model_roots: Vec<PathBuf>,
    /// Whether links in a model root may lead out of it.
    pub model_links_anywhere: bool,
    /// The Hugging Face cache.
    pub hf_cache: Option<PathBuf>,
    /// Models to load at start.
    pub models: Vec<String>,
    /// What calls may have loaded and downloaded.
    pub access: ModelAccess,
    /// The engine's settings.
    pub engine: EngineSettings,
    /// Who stays in memory, and for how long.
    pub residency: ResidencySettings,
    /// Kernels that models compute with.
    pub kernels: KernelChoice,
    /// Whether weights are wired.
    pub wired_limit: WiredLimit,
    /// The folder that keeps sessions; None keeps them in memory only.
    pub state_dir: Option<PathBuf>,
    /// When changes of sessions are on disk.
    pub durability: Durability,
    /// Whether their KV caches are kept there too.
    pub snapshots: bool,
    /// Bytes of all KV caches on disk.
    pub snapshot_disk_bytes_max: u64,
    /// Bytes of KV caches that may wait to be written.
    pub snapshot_queue_bytes_max: u64,
    /// Limits of calls.
    pub limits: Limits,
    /// Time for running requests to finish before the daemon exits.
    pub drain: Duration,
    /// Time after which a turn of the engine that does not end is a hang.
    pub engine_stall: Duration,
    /// Format of log lines.
    pub log_format: LogFormat,
    /// Selection of log lines, as a `tracing` filter.
    pub log_filter: String,
    /// The values by key, as they were given.
    values: BTreeMap<&'static str, toml::Value>,
    /// What the sections of single models say of their forms.
    pub forms: BTreeMap<ModelName, FormSettings>,
    /// The rest of those sections, as they were given.
    sections: BTreeMap<ModelName, ModelSettings>,
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
    /// Reads the configuration from all sources.
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
        let listen = listen(&layers)?;
        let token_file = path("token_file");
        if listen.is_some() && token_file.is_none() {
            return Err(layers.refuse("listen", "needs `token_file`: any local user could connect otherwise"));
        }
        let roots = layers.list("model_roots");
        let mut config = Self {
            socket: socket(&layers, path("socket"), env)?,
            listen,
            token_file,
            model_roots: roots.iter().map(|text| expand_home(text, home.as_deref())).collect(),
            hf_cache: path("hf_cache").or_else(|| default_hf_cache(env)),
            state_dir: state_dir::folder(path("state_dir"), env),
            ..Self::default()
        };
        layers.apply(&mut config);
        (config.access.loads, config.access.downloads) = patterns(&layers, home.as_deref())?;
        if config.limits.session_ttl > config.limits.session_ttl_max {
            return Err(layers.refuse("session_ttl_s", "may not be above `session_ttl_max_s`"));
        }
        config.values = layers.values();
        (config.residency.keep_alive, config.residency.keep_alive_max) =
            stays(&layers, config.access.auto_load)?;
        let Sections { settings, forms } = layers.models;
        (config.sections, config.forms) = (settings, forms);
        config.residency.models = config.single_models();
        Ok(config)
    }

    /// Returns the settings of single models: who names one to be there from the start wants it to stay.
    fn single_models(&self) -> BTreeMap<ModelName, ModelSettings> {
        let mut models = self.sections.clone();
        for model in &self.models {
            let own = models.entry(model.as_str().into()).or_default();
            own.keep_alive = own.keep_alive.or(Some(KeepAlive::Forever));
        }
        models
    }

    /// Returns where models are looked for.
    #[must_use]
    pub fn roots(&self) -> ModelRoots {
        ModelRoots::new(self.model_roots.clone(), self.hf_cache.clone(), self.model_links_anywhere)
    }

    /// Takes over what can change without a restart. Returns the keys that changed, and those of them that
    /// take a restart, which stay as they are.
    pub fn renew(&mut self, new: Self) -> (Vec<&'static str>, Vec<&'static str>) {
        let keys: BTreeSet<_> = self.values.keys().chain(new.values.keys()).copied().collect();
        let changed = keys.into_iter().filter(|key| self.values.get(key) != new.values.get(key));
        let (live, fixed): (Vec<_>, Vec<_>) = changed.partition(|key| keys::LIVE.contains(key));
        for key in &live {
            match new.values.get(key) {
                Some(value) => drop(self.values.insert(key, value.clone())),
                None => drop(self.values.remove(key)),
            }
        }
        self.residency = new.residency;
        (self.sections, self.forms) = (new.sections, new.forms);
        // `models` itself takes a restart.
        self.residency.models = self.single_models();
        self.model_roots = new.model_roots;
        self.model_links_anywhere = new.model_links_anywhere;
        self.hf_cache = new.hf_cache;
        self.access = new.access;
        (live, fixed)
    }
}

/// Returns the patterns of what calls may load, and download.
fn patterns(layers: &Layers, home: Option<&Path>) -> Result<(Vec<Pattern>, Vec<Pattern>), ConfigError> {
    let loads = layers.list("loads_allowed").into_iter();
    let loads = loads.map(|text| Pattern::new(expand_home(&text, home).to_string_lossy()));
    let downloads = layers.list("downloads_allowed");
    // It would allow nothing.
    let is_no_repo = |text: &&String| text.starts_with(['/', '~']) || !text.contains(['/', '*']);
    if let Some(text) = downloads.iter().find(is_no_repo) {
        let why = format!("names repos, such as \"owner/*\": {text:?} can be none");
        return Err(layers.refuse("downloads_allowed", &why));
    }
    Ok((loads.collect(), downloads.into_iter().map(Pattern::new).collect()))
}

/// Returns how long models stay, and the most that a call may ask for.
fn stays(layers: &Layers, auto_load: bool) -> Result<(KeepAlive, KeepAlive), ConfigError> {
    let max = layers.stay("model_keep_alive_max").unwrap_or(KeepAlive::Forever);
    // Without auto_load a model that has gone does not come back by itself.
    let default = if auto_load { KEEP_ALIVE_DEFAULT } else { KeepAlive::Forever };
    match layers.stay("model_keep_alive") {
        Some(given) if given > max => {
            Err(layers.refuse("model_keep_alive", "may not be above `model_keep_alive_max`"))
        }
        Some(given) => Ok((given, max)),
        None => Ok((default.min(max), max)),
    }
}

fn listen(layers: &Layers) -> Result<Option<SocketAddr>, ConfigError> {
    let Some(text) = layers.text("listen") else { return Ok(None) };
    let address: SocketAddr = text
        .parse()
        .map_err(|_| layers.refuse("listen", "must be an address and a port, such as 127.0.0.1:7411"))?;
    if !address.ip().is_loopback() {
        return Err(layers
            .refuse("listen", "must be a loopback address: others need TLS, which is not supported yet"));
    }
    Ok(Some(address))
}

fn socket(
    layers: &Layers,
    given: Option<PathBuf>,
    env: &dyn Fn(&str) -> Option<String>,
) -> Result<PathBuf, ConfigError> {
    let Some(socket) = given.or_else(|| default_socket(env)) else {
        return Err(
            layers.refuse("socket", "must be given: neither XDG_RUNTIME_DIR nor HOME is an absolute path")
        );
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

/// Returns the socket where none is configured. The clients follow the same rule; `tests/default_socket.json`
/// has its cases. A path that is not absolute counts as unset, as the specification of XDG_RUNTIME_DIR says.
fn default_socket(env: &dyn Fn(&str) -> Option<String>) -> Option<PathBuf> {
    let folder = |name| env(name).map(PathBuf::from).filter(|folder| folder.is_absolute());
    let runtime = folder("XDG_RUNTIME_DIR").map(|runtime| runtime.join("mlxd"));
    Some(runtime.or_else(|| folder("HOME").map(|home| home.join(".mlxd")))?.join("mlxd.sock"))
}

fn config_file(overrides: &Overrides, env: &dyn Fn(&str) -> Option<String>) -> Option<PathBuf> {
    if let Some(file) = overrides.config_file.clone().or_else(|| env("MLXD_CONFIG").map(PathBuf::from)) {
        return Some(file);
    }
    let folder = env("XDG_CONFIG_HOME").map(PathBuf::from);
    let folder = folder.or_else(|| env("HOME").map(|home| Path::new(&home).join(".config")))?;
    Some(folder.join("mlxd/mlxd.toml")).filter(|file| file.exists())
}

#[cfg(test)]
mod tests;
