//! Accepts connections and serves each until it closes or the daemon ends. `daemon` starts one [`accept`] per
//! listener; `standing` has the limits of connections.

use std::error::Error;
use std::io::{self, ErrorKind};
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
use tokio::sync::watch;
use tokio::task::JoinSet;
use tower::Service;

use super::authority::PlainAuthority;
use super::identity::{Authenticator, Connection, Peer};
use super::linger::Lingering;
use super::standing::{Newcomers, Places, Standing};
use crate::ids::ConnectionId;
use crate::limits::Limits;

/// Time a peer has to close after the daemon did.
const LINGER: Duration = Duration::from_secs(1);

/// Time all connections have to close when the daemon ends.
const CLOSE_LIMIT: Duration = Duration::from_secs(2);

/// Delay after a failed accept, which means too many open files.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// Bytes that a peer may send of a body that nobody reads. A connection may send 1 MiB in all: with a window
/// as large for each body, one that waits for its claim would hold up all others.
const BODY_WINDOW_BYTES: u32 = 64 << 10;

/// Bytes that a connection of our own user may have sent and we have not read: those of 64 messages that
/// wait for their turn, before they keep the connection's other calls out. A stranger's are the library's
/// 1 MiB.
const KNOWN_WINDOW_BYTES: u32 = 64 * BODY_WINDOW_BYTES;

/// Calls that a peer of our own user may cancel before we have seen them, in multiples of those it may have
/// open. The HTTP/2 library's 20 are for strangers; agents cancel whole batches in one write, and each waits
/// with its headers until it is seen.
const CANCELLED_CALLS_FACTOR: usize = 16;

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
    authenticator: Arc<Authenticator>,
    phase: watch::Receiver<Phase>,
    answers: impl Fn(Connection) -> S,
) where
    S: Answers<B>,
    B: Body<Data = Bytes, Error: Into<Fault>> + Send + 'static,
{
    static SERIAL: AtomicU64 = AtomicU64::new(1);
    let places = Places::new(limits.connections_max);
    let mut newcomers = Newcomers::new(limits.connections_unproven_max);
    let mut connections = JoinSet::new();
    let mut is_failing = false;
    let mut draining = phase.clone();
    loop {
        // Reaps the tasks that have ended.
        while connections.try_join_next().is_some() {}
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = draining.wait_for(|phase| *phase > Phase::Open) => break,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                if !is_of_one_peer(&error) {
                    if !std::mem::replace(&mut is_failing, true) {
                        tracing::warn!(%error, "no connection can be accepted now");
                    }
                    tokio::time::sleep(ACCEPT_RETRY).await;
                }
                continue;
            }
        };
        is_failing = false;
        let standing = places.newcomer();
        let newcomer = Arc::downgrade(&standing);
        let id = ConnectionId(SERIAL.fetch_add(1, Ordering::Relaxed));
        let connection = Connection { peer, id, standing: Arc::clone(&standing) };
        let is_known = authenticator.known_uid(peer).is_some();
        let served = Served { stream, is_known, limits: limits.clone(), standing, phase: phase.clone() };
        newcomers.add(newcomer, connections.spawn(served.run(answers(connection))));
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

/// Returns whether an accept failed because one peer had left. Other faults, such as too many open files,
/// stay for a while.
fn is_of_one_peer(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::ConnectionAborted | ErrorKind::ConnectionReset | ErrorKind::Interrupted)
}

trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

impl Listener {
    async fn accept(&self) -> io::Result<(Box<dyn Stream>, Peer)> {
        match self {
            Self::Unix(listener) => {
                let (stream, _) = listener.accept().await?;
                let peer = Peer::Unix(stream.peer_cred().ok().map(|peer| peer.uid()));
                let (read, write) = stream.into_split();
                Ok((Box::new(tokio::io::join(PlainAuthority::new(read), write)), peer))
            }
            Self::Tcp(listener) => {
                let (stream, _) = listener.accept().await?;
                // Deltas are small and must not wait for one another. It fails where the peer has left.
                let _ = stream.set_nodelay(true);
                Ok((Box::new(stream), Peer::Tcp))
            }
        }
    }
}

/// A connection while it is served.
struct Served {
    stream: Box<dyn Stream>,
    /// Whether the kernel vouches for the peer.
    is_known: bool,
    limits: Limits,
    standing: Arc<Standing>,
    phase: watch::Receiver<Phase>,
}

impl Served {
    async fn run<S, B>(self, answers: S)
    where
        S: Answers<B>,
        B: Body<Data = Bytes, Error: Into<Fault>> + Send + 'static,
    {
        let Self { stream, is_known, limits, standing, mut phase } = self;
        let builder = builder(&limits, is_known);
        let stream = TokioIo::new(Lingering::new(stream, LINGER));
        let connection = builder.serve_connection(stream, TowerToHyperService::new(answers));
        tokio::pin!(connection);
        let silent = async {
            tokio::time::sleep(limits.first_call).await;
            if standing.is_established() {
                std::future::pending::<()>().await;
            }
        };
        let ended = tokio::select! {
            ended = connection.as_mut() => Some(ended),
            _ = phase.wait_for(|phase| *phase == Phase::Closing) => None,
            () = silent => {
                tracing::debug!("first_call_s: a connection without a call is closed");
                None
            }
        };
        let ended = match ended {
            Some(ended) => Ok(ended),
            None => {
                connection.as_mut().graceful_shutdown();
                tokio::time::timeout(CLOSE_LIMIT, connection.as_mut()).await
            }
        };
        match ended {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!(%error, "a connection broke"),
            // The first call came with the end of its time: it is answered.
            Err(_) if standing.is_established() => drop(connection.await),
            Err(_) => {}
        }
    }
}

/// Returns the HTTP/2 server of a connection.
fn builder(limits: &Limits, is_known: bool) -> Builder<TokioExecutor> {
    let mut builder = Builder::new(TokioExecutor::new()).http2_only();
    let mut http2 = builder.http2();
    http2
        .timer(TokioTimer::new())
        .max_concurrent_streams(limits.streams_per_connection_max)
        .initial_stream_window_size(BODY_WINDOW_BYTES)
        .keep_alive_interval(limits.keep_alive)
        .keep_alive_timeout(limits.keep_alive);
    if is_known {
        http2.initial_connection_window_size(KNOWN_WINDOW_BYTES);
        let streams = limits.streams_per_connection_max as usize;
        http2.max_pending_accept_reset_streams(streams * CANCELLED_CALLS_FACTOR);
        // Frames that were under way when a call was refused count as the peer's errors.
        http2.max_local_error_reset_streams(None);
    }
    builder
}
