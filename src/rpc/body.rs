//! Bodies on their way in and out; the gate wraps both. A request's claims its bytes before they are read and
//! has to arrive within a time limit. In a response's, errors in the trailers get a reason, and its end is
//! logged, also when the caller disconnects before it.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body as HttpBody, Frame, SizeHint};
use hyper::body::Incoming;
use tokio::time::{Sleep, sleep};
use tonic::body::Body;
use tonic::{Code, Status};
use tracing::Span;

use super::status::{status, with_reason};
use crate::clock::Moment;
use crate::error::Error;
use crate::limits::Limits;
use crate::service::{Claim, Intake, Service};

/// The name of a status's details in headers and trailers.
const DETAILS: &str = "grpc-status-details-bin";

/// Bytes before a message: a flag, and the message's length.
const PREFIX_BYTES: usize = 5;

type Claiming = Pin<Box<dyn Future<Output = ()> + Send>>;

/// The body of a call that sends one message.
pub(super) struct ReceivedBody {
    inner: Incoming,
    /// The bytes before the message, as far as they are here.
    prefix: Vec<u8>,
    /// Bytes of the message that are to come.
    left: usize,
    /// The claim that is waited for, and the frame that waits with it.
    claiming: Option<(Claiming, Frame<Bytes>)>,
    intake: Intake,
    claim: Claim,
    limit: Duration,
    until: Pin<Box<Sleep>>,
}

impl ReceivedBody {
    /// Wraps a body that has to arrive within `limit`, the wait for its claim not counted.
    pub(super) fn new(inner: Incoming, intake: Intake, claim: Claim, limit: Duration) -> Self {
        let until = Box::pin(sleep(limit));
        Self { inner, prefix: Vec::new(), left: 0, claiming: None, intake, claim, limit, until }
    }

    /// Counts bytes that have arrived; returns the message's length when it becomes known.
    fn count(&mut self, data: &[u8]) -> Result<Option<usize>, Error> {
        let missing = PREFIX_BYTES - self.prefix.len();
        let (prefix, message) = data.split_at(missing.min(data.len()));
        self.prefix.extend_from_slice(prefix);
        let mut length = None;
        if missing > 0
            && let &[_, a, b, c, d] = self.prefix.as_slice()
        {
            self.left = u32::from_be_bytes([a, b, c, d]) as usize;
            length = Some(self.left);
        }
        let Some(left) = self.left.checked_sub(message.len()) else {
            return Err(Error::field("message", "is followed by another; one is expected"));
        };
        self.left = left;
        Ok(length)
    }
}

impl HttpBody for ReceivedBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = &mut *self;
        loop {
            if let Some((claiming, _)) = &mut this.claiming {
                ready!(claiming.as_mut().poll(cx));
                this.until = Box::pin(sleep(this.limit));
                return Poll::Ready(this.claiming.take().map(|(_, frame)| Ok(frame)));
            }
            let frame = match Pin::new(&mut this.inner).poll_frame(cx) {
                Poll::Ready(Some(Ok(frame))) => frame,
                Poll::Ready(Some(Err(error))) => {
                    return Poll::Ready(Some(Err(Status::from_error(Box::new(error)))));
                }
                Poll::Ready(None) => return Poll::Ready(None),
                Poll::Pending => {
                    ready!(this.until.as_mut().poll(cx));
                    return Poll::Ready(Some(Err(status(&Error::SlowSender { limit: this.limit }))));
                }
            };
            match frame.data_ref().map_or(Ok(None), |data| this.count(data)) {
                Ok(Some(length)) => {
                    let claiming = this.intake.clone().claim(length, this.claim.clone());
                    this.claiming = Some((Box::pin(claiming), frame));
                }
                Ok(None) => return Poll::Ready(Some(Ok(frame))),
                Err(error) => return Poll::Ready(Some(Err(status(&error)))),
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.claiming.is_none() && self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::default()
    }
}

/// A body whose status is read as it passes.
pub(super) struct ObservedBody {
    inner: Body,
    log: CallLog,
}

/// Logs the end of a call when it is dropped.
pub(super) struct CallLog {
    pub(super) span: Span,
    pub(super) service: Arc<Service>,
    pub(super) arrived: Moment,
    /// None until a status was seen.
    pub(super) code: Option<Code>,
}

impl ObservedBody {
    pub(super) fn new(inner: Body, log: CallLog) -> Self {
        Self { inner, log }
    }
}

impl HttpBody for ObservedBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = &mut *self;
        let entered = this.log.span.clone().entered();
        let mut frame = ready!(Pin::new(&mut this.inner).poll_frame(cx));
        drop(entered);
        if let Some(Ok(frame)) = &mut frame
            && let Some(trailers) = frame.trailers_mut()
        {
            this.log.code = add_reason(trailers, this.log.service.limits());
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

impl Drop for CallLog {
    fn drop(&mut self) {
        let time = self.service.clock().now() - self.arrived;
        let _entered = self.span.enter();
        match self.code {
            Some(code) => tracing::info!(?code, ?time, "the call ended"),
            None => tracing::info!(?time, "the caller disconnected"),
        }
    }
}

/// Returns the status in headers or trailers, if there is one, and adds a reason to an error without details.
pub(super) fn add_reason(headers: &mut HeaderMap, limits: &Limits) -> Option<Code> {
    let status = Status::from_header_map(headers)?;
    if status.code() == Code::Ok || headers.contains_key(DETAILS) {
        return Some(status.code());
    }
    let status = with_reason(&status, limits);
    // A status that does not fit in a header stays as tonic wrote it.
    drop(status.add_header(headers));
    Some(status.code())
}
