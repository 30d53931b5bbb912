//! What stands before every call: a request id, a span for the log, the caller's identity, the deadline, the
//! refusal of new work while the daemon drains; and after it, a reason on every error.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use http::{HeaderMap, HeaderValue, Request, Response};
use hyper::body::Incoming;
use tonic::body::Body;
use tonic::service::Routes;
use tower::{Service, ServiceExt};
use tracing::Instrument;

use super::body::{End, Watched, add_reason};
use super::caller::Caller;
use super::edge::Edge;
use super::identity::{Access, Connection, is_plain};
use super::status::status;
use crate::error::Error;
use crate::ids::RequestId;

const REQUEST_ID: &str = "x-request-id";
const REQUEST_ID_CHARS_MAX: usize = 128;

/// Answered also while the daemon drains: a supervisor asks for health then.
const HEALTH_PREFIX: &str = "/grpc.health.v1.Health/";

/// The gate of one connection.
#[derive(Clone)]
pub(super) struct Gate {
    pub(super) routes: Routes,
    pub(super) edge: Arc<Edge>,
    pub(super) access: Arc<Access>,
    pub(super) connection: Connection,
}

impl Service<Request<Incoming>> for Gate {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Incoming>) -> Self::Future {
        let gate = self.clone();
        Box::pin(async move { Ok(gate.pass(request).await) })
    }
}

impl Gate {
    async fn pass(self, request: Request<Incoming>) -> Response<Body> {
        let id = request_id(request.headers());
        let edge = Arc::clone(&self.edge);
        let span = tracing::info_span!("call", request = %id, method = request.uri().path());
        let mut end = End { span: span.clone(), edge, arrived: self.edge.clock.now(), code: None };
        let outcome = self.admit_and_run(request, id.clone(), &end).instrument(span).await;
        let mut response = outcome.unwrap_or_else(|error| status(&error).into_http());
        if let Ok(value) = HeaderValue::from_str(id.as_str()) {
            response.headers_mut().insert(REQUEST_ID, value);
        }
        end.code = add_reason(response.headers_mut(), self.edge.limits.message_bytes_max);
        response.map(|body| Body::new(Watched::new(body, end)))
    }

    async fn admit_and_run(
        &self,
        mut request: Request<Incoming>,
        id: RequestId,
        end: &End,
    ) -> Result<Response<Body>, Error> {
        let (principal, client) = self.access.admit(self.connection, request.headers())?;
        if self.edge.is_draining() && !request.uri().path().starts_with(HEALTH_PREFIX) {
            return Err(Error::Draining);
        }
        let timeout = timeout(request.headers())?;
        let deadline = timeout.map(|timeout| end.arrived.after(timeout));
        let caller = Caller { request: id, principal, client, arrived: end.arrived, deadline };
        tracing::debug!(client = %caller.client, ?timeout, "a call");
        request.extensions_mut().insert(caller);
        let answer = self.routes.clone().oneshot(request);
        let Some(timeout) = timeout else { return answer.await.map_err(|never| match never {}) };
        match tokio::time::timeout(timeout, answer).await {
            Ok(answer) => answer.map_err(|never| match never {}),
            Err(_) => Err(Error::Deadline),
        }
    }
}

/// The caller's id, if it may stand in a log line, else one that is drawn.
fn request_id(headers: &HeaderMap) -> RequestId {
    let given = headers.get(REQUEST_ID).and_then(|value| value.to_str().ok());
    match given.filter(|id| is_plain(id, REQUEST_ID_CHARS_MAX)) {
        Some(id) => id.into(),
        None => format!("{:016x}", rand::random::<u64>()).into(),
    }
}

/// How long the caller waits, as the gRPC protocol writes it: up to eight digits and a unit.
fn timeout(headers: &HeaderMap) -> Result<Option<Duration>, Error> {
    let Some(value) = headers.get("grpc-timeout") else { return Ok(None) };
    let malformed =
        || Error::field("grpc-timeout", "must be up to eight digits and a unit out of H M S m u n");
    let text = value.to_str().map_err(|_| malformed())?;
    let (digits, unit) = text.split_at_checked(text.len().saturating_sub(1)).ok_or_else(malformed)?;
    if digits.len() > 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(malformed());
    }
    let count: u64 = digits.parse().map_err(|_| malformed())?;
    let timeout = match unit {
        "H" => Duration::from_secs(count * 3600),
        "M" => Duration::from_secs(count * 60),
        "S" => Duration::from_secs(count),
        "m" => Duration::from_millis(count),
        "u" => Duration::from_micros(count),
        "n" => Duration::from_nanos(count),
        _ => return Err(malformed()),
    };
    Ok(Some(timeout))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(name: &'static str, value: &'static str) -> HeaderMap {
        HeaderMap::from_iter([(http::HeaderName::from_static(name), HeaderValue::from_static(value))])
    }

    #[test]
    fn timeouts_are_read_as_the_protocol_writes_them() {
        let read = |value| timeout(&headers("grpc-timeout", value));
        assert_eq!(read("2H"), Ok(Some(Duration::from_secs(7200))));
        assert_eq!(read("99999999n"), Ok(Some(Duration::from_nanos(99_999_999))));
        assert_eq!(timeout(&HeaderMap::new()), Ok(None));
        for malformed in ["", "S", "+1S", "123456789S", "1x", "1"] {
            assert!(read(malformed).is_err(), "{malformed}");
        }
    }

    #[test]
    fn a_request_id_that_could_forge_a_log_line_is_replaced() {
        assert_eq!(request_id(&headers("x-request-id", "a-1")).as_str(), "a-1");
        let drawn = request_id(&headers("x-request-id", "a b"));
        assert_eq!(drawn.as_str().len(), 16);
    }
}
