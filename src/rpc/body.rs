//! A response's body on its way out: errors in its trailers get a reason, and its end is logged, also when
//! the caller goes away before.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body as HttpBody, Frame, SizeHint};
use tonic::body::Body;
use tonic::{Code, Status};
use tracing::Span;

use super::edge::Edge;
use super::status::with_reason;
use crate::clock::Moment;

/// The name of a status's details in headers and trailers.
const DETAILS: &str = "grpc-status-details-bin";

/// A body that is watched to its end.
pub(super) struct Watched {
    inner: Body,
    end: End,
}

/// Logs a call's end, once.
pub(super) struct End {
    pub(super) span: Span,
    pub(super) edge: Arc<Edge>,
    pub(super) arrived: Moment,
    pub(super) code: Option<Code>,
}

impl Watched {
    pub(super) fn new(inner: Body, end: End) -> Self {
        Self { inner, end }
    }
}

impl HttpBody for Watched {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = &mut *self;
        let entered = this.end.span.clone().entered();
        let mut frame = ready!(Pin::new(&mut this.inner).poll_frame(cx));
        drop(entered);
        if let Some(Ok(frame)) = &mut frame
            && let Some(trailers) = frame.trailers_mut()
        {
            this.end.code = add_reason(trailers, this.end.edge.limits.message_bytes_max);
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

impl Drop for End {
    fn drop(&mut self) {
        let time = self.edge.clock.now() - self.arrived;
        let _entered = self.span.enter();
        match self.code {
            Some(code) => tracing::info!(?code, ?time, "the call ended"),
            None => tracing::info!(?time, "the caller went away"),
        }
    }
}

/// The status in headers or trailers, if there is one; an error without details gets a reason.
pub(super) fn add_reason(headers: &mut HeaderMap, message_bytes_max: usize) -> Option<Code> {
    let status = Status::from_header_map(headers)?;
    if status.code() == Code::Ok || headers.contains_key(DETAILS) {
        return Some(status.code());
    }
    let status = with_reason(&status, message_bytes_max);
    // What cannot be written in a header stays as tonic wrote it.
    drop(status.add_header(headers));
    Some(status.code())
}
