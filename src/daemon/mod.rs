//! The composition root: builds the daemon, connects its parts, serves, and shuts down in order. SIGTERM and
//! SIGINT drain: new calls are refused, running ones finish within a limit, then the exit status is 0; a
//! second signal exits at once. When the engine dies, health says so, every call ends UNAVAILABLE, and
//! [`serve`] fails, so that the process exits non-zero and its supervisor restarts it. Called by `cli::serve`
//! and by the tests, which bring their own engine and clock.

mod error;
mod files;
mod reload;
mod signals;
mod socket;
mod token;
mod watchdog;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use crate::clock::{Clock, SystemClock};
use crate::config::{Config, ConfigError};
use crate::device::MlxBackend;
use crate::engine::{self, EngineHandle};
use crate::error::Error;
use crate::hub::ModelCatalog;
use crate::net::{self, Authenticator, Connection, Listener, Phase};
use crate::rpc::{self, Gate, Health};
use crate::service::Service;
use crate::store::{self, SnapshotSettings};
use crate::telemetry;
pub use error::DaemonError;
use socket::{BoundSocket, SocketFile, SocketLock};

/// Interval between sweeps of expired sessions.
const SWEEP_INTERVAL: Duration = Duration::from_secs(10);

/// Time that a daemon with a dead engine still answers, so that callers and supervisors learn of it.
const DEATH_GRACE: Duration = Duration::from_secs(1);

/// Folder of the sessions' KV caches within the state folder.
const SNAPSHOTS: &str = "kv";

/// Time that there is in any case to save sessions' KV caches after a drain.
const SAVE_LIMIT: Duration = Duration::from_secs(2);

/// Limit for calls on blocking threads, then for the engine's thread, to end after the last call is served.
const END_LIMIT: Duration = Duration::from_secs(2);

/// Number of times that the engine's thread is polled within [`END_LIMIT`].
const END_POLLS: u32 = 200;

/// The addresses of a daemon that accepts connections.
#[derive(Clone, Debug)]
pub struct Bound {
    /// Its unix socket.
    pub socket: PathBuf,
    /// Its loopback address.
    pub tcp: Option<std::net::SocketAddr>,
}

/// Runs a daemon on MLX in the foreground until a signal stops it. `reread` reads the configuration again.
///
/// # Errors
/// It could not start, or its engine died.
pub fn run(
    config: &Config,
    reread: impl Fn() -> Result<Config, ConfigError> + Send + 'static,
) -> Result<(), DaemonError> {
    telemetry::start(config.log_format, &config.log_filter).map_err(DaemonError::Log)?;
    files::raise_limit(config);
    let setup = |error: io::Error| DaemonError::Setup(error.to_string());
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    let runtime = builder.enable_all().thread_name("edge").build().map_err(setup)?;
    let clock: Arc<dyn Clock> = Arc::new(SystemClock::new());
    let (kernels, wired_limit) = (config.kernels, config.wired_limit);
    let residency = config.residency.clone();
    let make = move || MlxBackend::new(kernels, wired_limit);
    let (engine, thread) =
        engine::start(config.engine, residency, Arc::clone(&clock), make).map_err(DaemonError::Engine)?;
    let ended = runtime.block_on(async {
        let stop = signals::stop().map_err(setup)?;
        let control = Control { stop, reloads: signals::reloads(reread).map_err(setup)? };
        serve(engine, config, clock, control, |bound| announce(config, bound)).await
    });
    // Drops every handle to the engine, and with them its thread: MLX must have finished before the process
    // tears down the libraries that it runs on.
    runtime.shutdown_timeout(END_LIMIT);
    for _ in 0..END_POLLS {
        if thread.is_finished() {
            break;
        }
        std::thread::sleep(END_LIMIT / END_POLLS);
    }
    ended
}

/// What reaches a daemon from outside besides calls.
#[derive(Debug)]
pub struct Control<S> {
    /// Stops it when it resolves.
    pub stop: S,
    /// Configurations to take over while it runs, as far as they can change.
    pub reloads: mpsc::Receiver<Config>,
}

/// Serves calls with `engine` until it is stopped and has drained. Calls `ready` once callers can connect.
///
/// # Errors
/// The socket or a configured model is unavailable, or the engine died.
pub async fn serve(
    engine: EngineHandle,
    config: &Config,
    clock: Arc<dyn Clock>,
    control: Control<impl Future<Output = ()>>,
    ready: impl FnOnce(&Bound),
) -> Result<(), DaemonError> {
    let Control { stop, reloads } = control;
    let lock = SocketLock::take(&config.socket)?;
    let token = config.token_file.as_deref().map(token::read).transpose()?;
    let catalog = catalog(config);
    let of_calls = Arc::clone(&clock);
    let service =
        Service::new(engine.clone(), catalog, config.limits.clone(), config.access.clone(), of_calls);
    let service = Arc::new(service);
    keep_sessions(&service, config).await?;
    reload::warn_of_budget(&service, config);
    tokio::pin!(stop);
    tokio::select! {
        loaded = preload(&service, config) => loaded?,
        () = stop.as_mut() => return Ok(()),
    }
    let authenticator = Arc::new(Authenticator::new(rustix::process::getuid().as_raw(), token.as_deref()));
    let mut open = open(&lock, config, &service, &authenticator).await?;
    ready(&open.bound);
    let ended = tokio::select! {
        () = stop.as_mut() => drain(&open, &service, (config.drain, &*clock)).await,
        () = engine.died() => died(&open).await,
        never = reload::take_over(&service, config, reloads) => match never {},
        never = watchdog::watch(&engine, &open.health, &*clock, config.engine_stall) => match never {},
        error = sweep(&service) => {
            tracing::error!(%error, "the engine does not answer");
            died(&open).await
        }
    };
    open.phase.send_replace(Phase::Closing);
    while open.accepting.join_next().await.is_some() {}
    if let Err(error) = service.leave_sessions().await {
        tracing::warn!(%error, "the last changes of sessions may be lost");
    }
    drop(open.file);
    ended
}

/// Returns the models on this machine. What is wrong with them is logged by a thread that nobody waits for.
fn catalog(config: &Config) -> ModelCatalog {
    let roots = config.roots();
    let looked_at = ModelCatalog::new(roots.clone());
    let look = move || {
        for problem in looked_at.problems() {
            tracing::warn!("{problem}");
        }
    };
    if let Err(error) = std::thread::Builder::new().name("models".into()).spawn(look) {
        tracing::warn!(%error, "the models are not looked at");
    }
    ModelCatalog::new(roots).with_forms(config.forms.clone())
}

/// Takes in the sessions of the state folder and keeps them there from now on.
async fn keep_sessions(service: &Service, config: &Config) -> Result<(), DaemonError> {
    let Some(folder) = &config.state_dir else {
        tracing::info!("no state_dir: sessions end with the daemon");
        return Ok(());
    };
    let found = store::open(folder).map_err(DaemonError::State)?;
    tracing::info!(folder = %folder.display(), sessions = found.1.len(), "sessions are kept");
    let setup = |error: io::Error| DaemonError::Setup(error.to_string());
    service.keep_sessions(found, config.durability).map_err(setup)?;
    if config.snapshots {
        let (disk_bytes_max, queue_bytes_max) =
            (config.snapshot_disk_bytes_max, config.snapshot_queue_bytes_max);
        let settings = SnapshotSettings { disk_bytes_max, queue_bytes_max };
        service.keep_snapshots(&folder.join(SNAPSHOTS), settings).await.map_err(DaemonError::Engine)?;
    }
    Ok(())
}

/// A daemon that accepts connections.
struct Open {
    bound: Bound,
    health: Health,
    phase: watch::Sender<Phase>,
    accepting: JoinSet<()>,
    file: SocketFile,
}

/// Binds the addresses and starts accepting connections.
async fn open(
    lock: &SocketLock,
    config: &Config,
    service: &Arc<Service>,
    authenticator: &Arc<Authenticator>,
) -> Result<Open, DaemonError> {
    let (routes, health) = rpc::routes(service).map_err(|error| DaemonError::Setup(error.to_string()))?;
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
        let (routes, service) = (routes.clone(), Arc::clone(service));
        let gatekeeper = Arc::clone(authenticator);
        let gate = move |connection: Connection| Gate {
            routes: routes.clone(),
            service: Arc::clone(&service),
            authenticator: Arc::clone(&gatekeeper),
            intake: service.intake(connection.id),
            connection,
        };
        let (limits, authenticator) = (config.limits.clone(), Arc::clone(authenticator));
        accepting.spawn(net::accept(listener, limits, authenticator, phase.subscribe(), gate));
    }
    Ok(Open { bound, health, phase, accepting, file })
}

/// Loads the configured models before the daemon accepts connections.
async fn preload(service: &Arc<Service>, config: &Config) -> Result<(), DaemonError> {
    for model in &config.models {
        tracing::info!(model, "loading");
        let loaded = service.preload(&model.as_str().into()).await;
        loaded.map_err(|source| DaemonError::Preload { model: model.clone(), source })?;
    }
    Ok(())
}

/// Sweeps expired sessions at intervals; returns once the engine no longer answers.
async fn sweep(service: &Service) -> Error {
    let mut ticks = tokio::time::interval(SWEEP_INTERVAL);
    loop {
        ticks.tick().await;
        if let Err(error) = service.sweep_sessions().await {
            return error;
        }
    }
}

/// Refuses new calls and waits until the running ones have finished, at most for `limit`.
async fn drain(
    open: &Open,
    service: &Service,
    (limit, clock): (Duration, &dyn Clock),
) -> Result<(), DaemonError> {
    tracing::info!(?limit, "draining");
    let until = clock.now().after(limit);
    open.health.set(false).await;
    service.drain();
    open.phase.send_replace(Phase::Draining);
    match service.finish_running(limit).await {
        Ok(()) => tracing::info!("drained"),
        Err(error) => tracing::warn!(%error, "the engine did not drain"),
    }
    // What those who ran to the end have left of the time, or a little.
    let limit = (until - clock.now()).max(SAVE_LIMIT);
    let saved = service.save_sessions(limit).await;
    tracing::info!(saved, "the KV caches of sessions are on disk");
    Ok(())
}

/// Reports the engine's death to health checks and callers for [`DEATH_GRACE`], then fails.
async fn died(open: &Open) -> Result<(), DaemonError> {
    tracing::error!("the engine died");
    open.health.set(false).await;
    tokio::time::sleep(DEATH_GRACE).await;
    Err(DaemonError::EngineDied)
}

/// Prints the addresses on stdout for the person or script that started the daemon.
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
    telemetry::announce(&lines);
}
