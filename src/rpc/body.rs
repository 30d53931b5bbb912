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

/// Bytes of a call of many messages that have to arrive within the time limit; a caller with fewer left sends
/// those.
const STRETCH_BYTES: usize = 1 << 20;

/// Messages that a call sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sends {
    /// One.
    One,
    /// As many as it likes: each claims its bytes when the one before it was taken.
    Many,
}

/// The body of a call.
pub(super) struct ReceivedBody {
    inner: Incoming,
    sends: Sends,
    arrived: Arrived,
    /// The claim that is waited for, and the frame that waits with it.
    claiming: Option<(Claiming, Frame<Bytes>)>,
    intake: Intake,
    claim: Claim,
    limit: Duration,
    until: Pin<Box<Sleep>>,
    /// Bytes that have arrived of those that have to within the limit.
    stretch: usize,
    /// Whether the claim was waited for.
    has_waited: bool,
}

/// What has arrived.
#[derive(Debug, Default)]
struct Arrived {
    /// The bytes before the message, as far as they are here.
    prefix: Vec<u8>,
    /// Bytes of the message that are to come.
    left: usize,
}

impl Arrived {
    /// Counts bytes that have arrived; returns the length of the messages that begin with them, where that
    /// becomes known.
    fn count(&mut self, mut data: &[u8], sends: Sends) -> Result<Option<usize>, Error> {
        let mut lengths = None;
        while !data.is_empty() {
            if self.prefix.len() == PREFIX_BYTES && self.left == 0 {
                match sends {
                    Sends::One => {
                        return Err(Error::field("message", "is followed by another; one is expected"));
                    }
                    Sends::Many => self.prefix.clear(),
                }
            }
            let missing = PREFIX_BYTES - self.prefix.len();
            let (prefix, rest) = data.split_at(missing.min(data.len()));
            self.prefix.extend_from_slice(prefix);
            if missing > 0
                && let &[_, a, b, c, d] = self.prefix.as_slice()
            {
                self.left = u32::from_be_bytes([a, b, c, d]) as usize;
                lengths = Some(lengths.unwrap_or(0) + self.left);
            }
            let own = self.left.min(rest.len());
            self.left -= own;
            data = &rest[own..];
        }
        Ok(lengths)
    }
}

impl ReceivedBody {
    /// Wraps a body. One message has to arrive within `limit`, the wait for its claim not counted; of many,
    /// each further [`STRETCH_BYTES`].
    pub(super) fn new(
        inner: Incoming,
        sends: Sends,
        (intake, claim): (Intake, Claim),
        limit: Duration,
    ) -> Self {
        let (arrived, until) = (Arrived::default(), Box::pin(sleep(limit)));
        let (claiming, stretch, has_waited) = (None, 0, false);
        Self { inner, sends, arrived, claiming, intake, claim, limit, until, stretch, has_waited }
    }

    /// Counts bytes that have arrived; returns what their messages have to claim.
    fn count(&mut self, data: &[u8]) -> Result<Option<usize>, Error> {
        let lengths = self.arrived.count(data, self.sends)?;
        if self.sends == Sends::Many {
            self.stretch += data.len();
            if self.stretch >= STRETCH_BYTES {
                self.stretch = 0;
                self.until = Box::pin(sleep(self.limit));
            }
        }
        Ok(lengths)
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
                if claiming.as_mut().poll(cx).is_pending() {
                    this.has_waited = true;
                    return Poll::Pending;
                }
                if this.sends == Sends::One || std::mem::take(&mut this.has_waited) {
                    this.until = Box::pin(sleep(this.limit));
                }
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
                    // Those of the message before, which was taken.
                    this.claim.release();
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns messages of these lengths, as they are sent.
    fn sent(lengths: &[u8]) -> Vec<u8> {
        lengths
            .iter()
            .flat_map(|length| [vec![0, 0, 0, 0, *length], vec![7; *length as usize]].concat())
            .collect()
    }

    #[test]
    fn the_lengths_of_many_messages_are_known_however_they_are_cut() {
        let bytes = sent(&[3, 0, 200, 1, 0]);
        for piece in 1..bytes.len() {
            let mut arrived = Arrived::default();
            let counted = bytes.chunks(piece).map(|data| arrived.count(data, Sends::Many).unwrap());
            let sum: usize = counted.flatten().sum();
            assert_eq!(sum, 204, "{piece}");
            assert_eq!((arrived.left, arrived.prefix.len()), (0, PREFIX_BYTES));
        }
    }

    #[test]
    fn one_message_is_not_followed_by_another() {
        for length in [0, 3] {
            let mut arrived = Arrived::default();
            assert_eq!(arrived.count(&sent(&[length]), Sends::One), Ok(Some(usize::from(length))));
            assert!(arrived.count(&[0], Sends::One).is_err());
            assert!(Arrived::default().count(&sent(&[length, 1]), Sends::One).is_err());
        }
    }
}
