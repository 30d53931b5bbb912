//! Accepts connections and serves each until it closes or the daemon ends. Connections have a limit; more
//! wait in the kernel's queue.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;
use tonic::service::Routes;

use super::edge::Edge;
use super::gate::Gate;
use super::identity::{Access, Connection, Peer};
use super::linger::Lingering;

/// How long a peer may take to close after the daemon did.
const LINGER: Duration = Duration::from_secs(1);

/// How long connections may take to close at the end.
const CLOSE_LIMIT: Duration = Duration::from_secs(2);

/// When to try again after a failed accept, which means too many open files.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// Where connections come from.
#[derive(Debug)]
pub enum Listener {
    /// A unix socket.
    Unix(UnixListener),
    /// A loopback port.
    Tcp(TcpListener),
}

/// Where the daemon is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Takes connections.
    Open,
    /// Takes no new ones; calls end.
    Draining,
    /// Closes them.
    Closing,
}

/// Serves `listener` until the phase is `Closing` and its connections are closed.
pub async fn accept(
    listener: Listener,
    edge: Arc<Edge>,
    routes: Routes,
    access: Arc<Access>,
    phase: watch::Receiver<Phase>,
) {
    static SERIAL: AtomicU64 = AtomicU64::new(1);
    let permits = Arc::new(Semaphore::new(edge.limits.connections_max as usize));
    let mut connections = JoinSet::new();
    let mut draining = phase.clone();
    loop {
        // Forgets the ones that are over.
        while connections.try_join_next().is_some() {}
        let accepted = tokio::select! {
            accepted = listener.accept(&permits) => accepted,
            _ = draining.wait_for(|phase| *phase > Phase::Open) => break,
        };
        let (stream, peer, permit) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_RETRY).await;
                continue;
            }
        };
        let connection = Connection { peer, serial: SERIAL.fetch_add(1, Ordering::Relaxed) };
        let (routes, edge, access) = (routes.clone(), Arc::clone(&edge), Arc::clone(&access));
        let gate = Gate { routes, edge, access, connection };
        connections.spawn(serve(stream, gate, permit, phase.clone()));
    }
    // New callers are refused at once rather than left waiting.
    drop(listener);
    let mut closing = phase;
    drop(closing.wait_for(|phase| *phase == Phase::Closing).await);
    let all = async { while connections.join_next().await.is_some() {} };
    if tokio::time::timeout(CLOSE_LIMIT, all).await.is_err() {
        tracing::warn!("connections are cut off");
    }
}

trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

impl Listener {
    async fn accept(
        &self,
        permits: &Arc<Semaphore>,
    ) -> io::Result<(Box<dyn Stream>, Peer, OwnedSemaphorePermit)> {
        let permit = Arc::clone(permits).acquire_owned().await.map_err(io::Error::other)?;
        match self {
            Self::Unix(listener) => {
                let (stream, _) = listener.accept().await?;
                let peer = Peer::Unix(stream.peer_cred().ok().map(|peer| peer.uid()));
                Ok((Box::new(stream), peer, permit))
            }
            Self::Tcp(listener) => {
                let (stream, _) = listener.accept().await?;
                // Deltas are small and must not wait for one another.
                stream.set_nodelay(true)?;
                Ok((Box::new(stream), Peer::Tcp, permit))
            }
        }
    }
}

async fn serve(
    stream: Box<dyn Stream>,
    gate: Gate,
    permit: OwnedSemaphorePermit,
    mut phase: watch::Receiver<Phase>,
) {
    let (streams_max, keep_alive) =
        (gate.edge.limits.streams_per_connection_max, gate.edge.limits.keep_alive);
    let mut builder = Builder::new(TokioExecutor::new()).http2_only();
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(streams_max)
        .keep_alive_interval(keep_alive)
        .keep_alive_timeout(keep_alive);
    let connection = builder
        .serve_connection(TokioIo::new(Lingering::new(stream, LINGER)), TowerToHyperService::new(gate));
    tokio::pin!(connection);
    tokio::select! {
        ended = connection.as_mut() => {
            if let Err(error) = ended {
                tracing::debug!(%error, "a connection broke");
            }
            return;
        }
        _ = phase.wait_for(|phase| *phase == Phase::Closing) => connection.as_mut().graceful_shutdown(),
    }
    if let Err(error) = connection.await {
        tracing::debug!(%error, "a connection broke");
    }
    drop(permit);
}
