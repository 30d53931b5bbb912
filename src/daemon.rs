//! The composition root: builds the daemon, wires it, serves, and ends it in order. SIGTERM and SIGINT drain:
//! no new calls, running ones finish up to a limit, then the exit status is 0; a second signal ends at once.
//! When the engine dies, health says so, every call ends UNAVAILABLE, and [`serve`] fails, so that the
//! process exits non-zero and its supervisor starts another.

mod socket;

use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinSet;

use crate::clock::{Clock, SystemClock};
use crate::config::Config;
use crate::device::MlxBackend;
use crate::engine::{self, EngineHandle, EngineSettings};
use crate::error::Error;
use crate::hub::{AssetShelf, ModelRoots};
use crate::rpc::{self, Access, Edge, Health, Listener, Phase};
use crate::telemetry;
use socket::{BoundSocket, SocketFile, SocketLock};

/// How often sessions are looked through for those whose time is up.
const SWEEP_INTERVAL: Duration = Duration::from_secs(10);

/// How long a daemon with a dead engine still answers, so that callers and supervisors hear of it.
const DEATH_GRACE: Duration = Duration::from_secs(1);

/// How long calls on blocking threads, then the engine's thread, may take to end after all is served.
const END_LIMIT: Duration = Duration::from_secs(2);

/// How often the engine's thread is looked at meanwhile.
const END_POLLS: u32 = 200;

/// The exit status of a process that a second signal ended.
const EXIT_INTERRUPTED: i32 = 130;

/// Why the daemon ends with a failure.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// Another daemon has the socket.
    #[error("a daemon (pid {pid}) serves on {} already", socket.display())]
    Locked {
        /// The socket.
        socket: PathBuf,
        /// Its process.
        pid: String,
    },
    /// The socket cannot be had.
    #[error("{}: {source}", socket.display())]
    Socket {
        /// The socket.
        socket: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The TCP port cannot be had.
    #[error("{address}: {source}")]
    Listen {
        /// The address.
        address: std::net::SocketAddr,
        /// What the system said.
        source: io::Error,
    },
    /// The token file cannot be used.
    #[error("token_file {}: {why}", path.display())]
    Token {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// The log cannot start.
    #[error("{0}")]
    Log(String),
    /// A model of `models` cannot be loaded.
    #[error("cannot load {model}: {source}")]
    Preload {
        /// The model.
        model: String,
        /// Why.
        source: Error,
    },
    /// The engine could not start, or does not answer.
    #[error("the engine: {0}")]
    Engine(Error),
    /// The engine died while the daemon served.
    #[error("the engine died")]
    EngineDied,
    /// Something that cannot happen with an intact build and system.
    #[error("{0}")]
    Setup(String),
}

/// Where a daemon can be reached, when it can.
#[derive(Clone, Debug)]
pub struct Bound {
    /// Its unix socket.
    pub socket: PathBuf,
    /// Its loopback address.
    pub tcp: Option<std::net::SocketAddr>,
}

/// Runs a daemon on MLX in the foreground until a signal ends it.
///
/// # Errors
/// It could not start, or its engine died.
pub fn run(config: &Config) -> Result<(), DaemonError> {
    telemetry::start(config.log_format, &config.log_filter).map_err(DaemonError::Log)?;
    let setup = |error: io::Error| DaemonError::Setup(error.to_string());
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    let runtime = builder.enable_all().thread_name("edge").build().map_err(setup)?;
    let clock: Arc<dyn Clock> = Arc::new(SystemClock::new());
    let (settings, kernels) = (engine_settings(config), config.kernels);
    let (engine, thread) = engine::start(settings, Arc::clone(&clock), move |settings| {
        MlxBackend::new(settings.memory_budget_bytes, kernels)
    })
    .map_err(DaemonError::Engine)?;
    let ended = runtime.block_on(async {
        let stop = stop_signal().map_err(setup)?;
        serve(engine, config, clock, stop, |bound| announce(config, bound)).await
    });
    // Whatever still holds the engine goes, and with it the engine's thread: MLX must be through before
    // the process tears down what it stands on.
    runtime.shutdown_timeout(END_LIMIT);
    for _ in 0..END_POLLS {
        if thread.is_finished() {
            break;
        }
        std::thread::sleep(END_LIMIT / END_POLLS);
    }
    ended
}

fn engine_settings(config: &Config) -> EngineSettings {
    EngineSettings {
        memory_budget_bytes: config.memory_budget_bytes,
        kv_idle_bytes_max: config.kv_idle_bytes_max,
        kv_dtype: config.kv_dtype,
        prefill_chunk_tokens: config.prefill_chunk_tokens,
        prefill_step: config.prefill_step,
        prefill_stretch_percent: config.prefill_stretch_percent,
        running_sequences_max: config.limits.running_sequences_max,
        queue_length_max: config.limits.queue_length_max,
        queue_length_per_client_max: config.limits.queue_length_per_client_max,
        priority_ageing: config.priority_ageing,
        slow_reader: config.slow_reader,
    }
}

/// Serves calls with an engine until `stop` is ready and the daemon has drained. `ready` is called when
/// callers can connect.
///
/// # Errors
/// The socket or a model of the configuration cannot be had, or the engine died.
pub async fn serve(
    engine: EngineHandle,
    config: &Config,
    clock: Arc<dyn Clock>,
    stop: impl Future<Output = ()>,
    ready: impl FnOnce(&Bound),
) -> Result<(), DaemonError> {
    let lock = SocketLock::take(&config.socket)?;
    let token = config.token_file.as_deref().map(read_token).transpose()?;
    let shelf = AssetShelf::new(ModelRoots::new(config.model_roots.clone(), config.hf_cache.clone()));
    let edge = Edge::new(engine.clone(), shelf, config.limits.clone(), config.auto_load, clock);
    let edge = Arc::new(edge);
    tokio::pin!(stop);
    tokio::select! {
        loaded = preload(&edge, config) => loaded?,
        () = stop.as_mut() => return Ok(()),
    }
    let access = Arc::new(Access::new(rustix::process::getuid().as_raw(), token.as_deref()));
    let mut open = open(&lock, config, &edge, &access).await?;
    ready(&open.bound);
    let ended = tokio::select! {
        () = stop.as_mut() => drain(&open, &edge, config.drain).await,
        () = engine.died() => died(&open).await,
        error = sweep(&edge) => {
            tracing::error!(%error, "the engine does not answer");
            died(&open).await
        }
    };
    open.phase.send_replace(Phase::Closing);
    while open.accepting.join_next().await.is_some() {}
    drop(open.file);
    ended
}

/// A daemon that can be called.
struct Open {
    bound: Bound,
    health: Health,
    phase: watch::Sender<Phase>,
    accepting: JoinSet<()>,
    file: SocketFile,
}

async fn open(
    lock: &SocketLock,
    config: &Config,
    edge: &Arc<Edge>,
    access: &Arc<Access>,
) -> Result<Open, DaemonError> {
    let (routes, health) = rpc::routes(edge).map_err(|error| DaemonError::Setup(error.to_string()))?;
    health.set(true).await;
    let BoundSocket { listener, file } = lock.bind()?;
    let mut listeners = vec![Listener::Unix(listener)];
    let mut bound = Bound { socket: config.socket.clone(), tcp: None };
    if let Some(address) = config.listen {
        let fault = |source| DaemonError::Listen { address, source };
        let listener = TcpListener::bind(address).await.map_err(fault)?;
        bound.tcp = Some(listener.local_addr().map_err(fault)?);
        listeners.push(Listener::Tcp(listener));
    }
    let phase = watch::Sender::new(Phase::Open);
    let mut accepting = JoinSet::new();
    for listener in listeners {
        let (edge, access) = (Arc::clone(edge), Arc::clone(access));
        accepting.spawn(rpc::accept(listener, edge, routes.clone(), access, phase.subscribe()));
    }
    Ok(Open { bound, health, phase, accepting, file })
}

async fn preload(edge: &Arc<Edge>, config: &Config) -> Result<(), DaemonError> {
    for model in &config.models {
        tracing::info!(model, "loading");
        let loaded = edge.preload(&model.as_str().into()).await;
        loaded.map_err(|source| DaemonError::Preload { model: model.clone(), source })?;
    }
    Ok(())
}

/// Returns only when the engine is gone.
async fn sweep(edge: &Edge) -> Error {
    let mut ticks = tokio::time::interval(SWEEP_INTERVAL);
    loop {
        ticks.tick().await;
        if let Err(error) = edge.sweep_sessions().await {
            return error;
        }
    }
}

/// Lets running calls finish, up to the limit.
async fn drain(open: &Open, edge: &Edge, limit: Duration) -> Result<(), DaemonError> {
    tracing::info!(?limit, "draining");
    open.health.set(false).await;
    edge.drain();
    open.phase.send_replace(Phase::Draining);
    match edge.finish_running(limit).await {
        Ok(()) => tracing::info!("drained"),
        Err(error) => tracing::warn!(%error, "the engine did not drain"),
    }
    Ok(())
}

async fn died(open: &Open) -> Result<(), DaemonError> {
    tracing::error!("the engine died");
    open.health.set(false).await;
    tokio::time::sleep(DEATH_GRACE).await;
    Err(DaemonError::EngineDied)
}

/// The token that callers over TCP must know. Only this user may be able to read it.
fn read_token(path: &Path) -> Result<String, DaemonError> {
    let fault = |why: String| DaemonError::Token { path: path.to_owned(), why };
    let mode = std::fs::metadata(path).map_err(|error| fault(error.to_string()))?.permissions().mode();
    if mode & 0o077 != 0 {
        return Err(fault(format!("others may use it (mode {:03o}); make it 600", mode & 0o777)));
    }
    let token = std::fs::read_to_string(path).map_err(|error| fault(error.to_string()))?;
    let token = token.trim();
    if token.is_empty() || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(fault("must hold one token of visible ASCII characters".into()));
    }
    Ok(token.to_owned())
}

/// Ready at the first signal. A second one ends the process.
fn stop_signal() -> io::Result<impl Future<Output = ()>> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let (stop, stopped) = oneshot::channel();
    tokio::spawn(async move {
        let mut next = async || {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        };
        next().await;
        // The daemon may have ended otherwise.
        let _ = stop.send(());
        next().await;
        tracing::warn!("a second signal: ending at once");
        std::process::exit(EXIT_INTERRUPTED);
    });
    Ok(async { drop(stopped.await) })
}

/// Tells the person at the terminal, or the script that started the daemon, that it can be called.
fn announce(config: &Config, bound: &Bound) {
    let socket = bound.socket.display();
    let mut lines = format!("mlxd {} listens on unix://{socket}\n", env!("CARGO_PKG_VERSION"));
    if let (Some(address), Some(token)) = (bound.tcp, &config.token_file) {
        lines += &format!("  and on http://{address} for callers with the token in {}\n", token.display());
    }
    let model = config.models.first().map_or("MODEL", String::as_str);
    lines += "Next, in another terminal:\n";
    lines +=
        &format!("  mlxd generate --address unix://{socket} -m {model} \"What is the capital of France?\"\n");
    // Nobody may be reading.
    drop(io::stdout().write_all(lines.as_bytes()).and_then(|()| io::stdout().flush()));
}
