//! Accepts connections and serves each until it closes or the daemon ends. Connections have a limit; more
//! wait in the kernel's queue. `daemon` starts one [`accept`] per listener.

use std::error::Error;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body::Body;
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;
use tower::Service;

use super::identity::{Connection, Peer};
use super::linger::Lingering;
use crate::limits::Limits;

/// Time a peer has to close after the daemon did.
const LINGER: Duration = Duration::from_secs(1);

/// Time all connections have to close when the daemon ends.
const CLOSE_LIMIT: Duration = Duration::from_secs(2);

/// Delay after a failed accept, which means too many open files.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// A source of connections.
#[derive(Debug)]
pub enum Listener {
    /// A unix socket.
    Unix(UnixListener),
    /// A loopback port.
    Tcp(TcpListener),
}

/// Phase of the daemon's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Takes connections.
    Open,
    /// Takes no new ones; calls end.
    Draining,
    /// Closes them.
    Closing,
}

/// An HTTP service that answers the requests of one connection.
pub trait Answers<B>:
    Service<Request<Incoming>, Response = Response<B>, Error: Into<Fault>, Future: Send> + Clone + Send + 'static
{
}
impl<B, S> Answers<B> for S where
    S: Service<Request<Incoming>, Response = Response<B>, Error: Into<Fault>, Future: Send>
        + Clone
        + Send
        + 'static
{
}

type Fault = Box<dyn Error + Send + Sync>;

/// Serves `listener` until the phase is `Closing` and its connections are closed. `answers` makes the service
/// of one connection.
pub async fn accept<S, B>(
    listener: Listener,
    limits: Limits,
    phase: watch::Receiver<Phase>,
    answers: impl Fn(Connection) -> S,
) where
    S: Answers<B>,
    B: Body<Data = Bytes, Error: Into<Fault>> + Send + 'static,
{
    static SERIAL: AtomicU64 = AtomicU64::new(1);
    let permits = Arc::new(Semaphore::new(limits.connections_max as usize));
    let mut connections = JoinSet::new();
    let mut draining = phase.clone();
    loop {
        // Reaps the tasks that have ended.
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
        let served = Served { stream, limits: limits.clone(), permit, phase: phase.clone() };
        connections.spawn(served.run(answers(connection)));
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

/// A connection while it is served; its permit counts it.
struct Served {
    stream: Box<dyn Stream>,
    limits: Limits,
    permit: OwnedSemaphorePermit,
    phase: watch::Receiver<Phase>,
}

impl Served {
    async fn run<S, B>(self, answers: S)
    where
        S: Answers<B>,
        B: Body<Data = Bytes, Error: Into<Fault>> + Send + 'static,
    {
        let Self { stream, limits, permit, mut phase } = self;
        let mut builder = Builder::new(TokioExecutor::new()).http2_only();
        builder
            .http2()
            .timer(TokioTimer::new())
            .max_concurrent_streams(limits.streams_per_connection_max)
            .keep_alive_interval(limits.keep_alive)
            .keep_alive_timeout(limits.keep_alive);
        let stream = TokioIo::new(Lingering::new(stream, LINGER));
        let connection = builder.serve_connection(stream, TowerToHyperService::new(answers));
        tokio::pin!(connection);
        let ended = tokio::select! {
            ended = connection.as_mut() => Some(ended),
            _ = phase.wait_for(|phase| *phase == Phase::Closing) => None,
        };
        let ended = match ended {
            Some(ended) => ended,
            None => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        };
        if let Err(error) = ended {
            tracing::debug!(%error, "a connection broke");
        }
        drop(permit);
    }
}
