//! A response's body on its way out: errors in its trailers get a reason, and its end is logged, also when
//! the caller disconnects before it. The gate wraps every response in one.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body as HttpBody, Frame, SizeHint};
use tonic::body::Body;
use tonic::{Code, Status};
use tracing::Span;

use super::status::with_reason;
use crate::clock::Moment;
use crate::service::Service;

/// The name of a status's details in headers and trailers.
const DETAILS: &str = "grpc-status-details-bin";

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
            this.log.code = add_reason(trailers, this.log.service.limits().message_bytes_max);
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
pub(super) fn add_reason(headers: &mut HeaderMap, message_bytes_max: usize) -> Option<Code> {
    let status = Status::from_header_map(headers)?;
    if status.code() == Code::Ok || headers.contains_key(DETAILS) {
        return Some(status.code());
    }
    let status = with_reason(&status, message_bytes_max);
    // A status that does not fit in a header stays as tonic wrote it.
    drop(status.add_header(headers));
    Some(status.code())
}
