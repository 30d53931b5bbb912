//! Stands before every call: gives it a request id and a span for the log, authenticates the caller, reads
//! the deadline, refuses new work while the daemon drains; and after the call adds a reason to every error.
//! Handlers take the [`Caller`] from the request with [`open`].

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use http::{HeaderMap, HeaderValue, Request, Response};
use hyper::body::Incoming;
use tonic::Status;
use tonic::body::Body;
use tonic::service::Routes;
use tower::ServiceExt;
use tracing::Instrument;

use super::body::{CallLog, ObservedBody, ReceivedBody, Sends, add_reason};
use super::status::status;
use crate::clock::Moment;
use crate::error::Error;
use crate::ids::RequestId;
use crate::net::{Authenticator, Connection, is_plain};
use crate::service::{Caller, Claim, Intake, Service};

const REQUEST_ID: &str = "x-request-id";
const REQUEST_ID_CHARS_MAX: usize = 128;

/// Prefix of the paths that are answered while the daemon drains too: a supervisor asks for health then.
const HEALTH_PREFIX: &str = "/grpc.health.v1.Health/";

/// Prefix of the paths whose callers may send messages as long as they like.
const REFLECTION_PREFIX: &str = "/grpc.reflection.";

/// The paths of calls that send many messages.
const MANY: [&str; 1] = ["/mlxd.v1.SessionService/ImportSession"];

/// The gate of one connection.
#[derive(Clone)]
pub struct Gate {
    /// The services behind it.
    pub routes: Routes,
    /// The use cases behind the services.
    pub service: Arc<Service>,
    /// Decides who may call.
    pub authenticator: Arc<Authenticator>,
    /// The connection.
    pub connection: Connection,
    /// The bytes that its requests may have.
    pub intake: Intake,
}

impl tower::Service<Request<Incoming>> for Gate {
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
        let (service, arrived) = (Arc::clone(&self.service), self.service.clock().now());
        let span = tracing::info_span!("call", request = %id, method = request.uri().path());
        let mut log = CallLog { span: span.clone(), service, arrived, code: None };
        let outcome = self.admit_and_run(request, id.clone(), arrived).instrument(span).await;
        let mut response = outcome.unwrap_or_else(|error| status(&error).into_http());
        if let Ok(value) = HeaderValue::from_str(id.as_str()) {
            response.headers_mut().insert(REQUEST_ID, value);
        }
        log.code = add_reason(response.headers_mut(), self.service.limits());
        response.map(|body| Body::new(ObservedBody::new(body, log)))
    }

    async fn admit_and_run(
        &self,
        mut request: Request<Incoming>,
        id: RequestId,
        arrived: Moment,
    ) -> Result<Response<Body>, Error> {
        let (principal, client) = self.authenticator.admit(&self.connection, request.headers())?;
        if self.service.is_draining() && !request.uri().path().starts_with(HEALTH_PREFIX) {
            return Err(Error::Draining);
        }
        let timeout = timeout(request.headers())?;
        let deadline = timeout.map(|timeout| arrived.after(timeout));
        let (connection, claim) = (self.connection.id, Claim::default());
        let caller =
            Caller { request: id, principal, connection, client, arrived, deadline, claim: claim.clone() };
        tracing::debug!(client = %caller.client, ?timeout, "a call");
        request.extensions_mut().insert(caller);
        let answer = self.route(request, claim);
        let Some(timeout) = timeout else { return answer.await.map_err(|never| match never {}) };
        match tokio::time::timeout(timeout, answer).await {
            Ok(answer) => answer.map_err(|never| match never {}),
            Err(_) => Err(Error::Deadline),
        }
    }
}

impl Gate {
    async fn route(&self, request: Request<Incoming>, claim: Claim) -> Result<Response<Body>, Infallible> {
        let routes = self.routes.clone();
        if request.uri().path().starts_with(REFLECTION_PREFIX) {
            return routes.oneshot(request).await;
        }
        let limit = self.service.limits().receive;
        let sends = if MANY.contains(&request.uri().path()) { Sends::Many } else { Sends::One };
        let received = |body| ReceivedBody::new(body, sends, (self.intake.clone(), claim), limit);
        routes.oneshot(request.map(received)).await
    }
}

/// Takes the caller, which the gate put there, and the message out of a request.
pub(super) fn open<T>(request: tonic::Request<T>) -> Result<(Caller, T), Status> {
    let (_, mut extensions, message) = request.into_parts();
    let caller = extensions.remove::<Caller>();
    let caller = caller.ok_or_else(|| status(&Error::Internal("a call without a caller".into())))?;
    Ok((caller, message))
}

/// Returns the caller's id if it may stand in a log line, else a random one.
fn request_id(headers: &HeaderMap) -> RequestId {
    let given = headers.get(REQUEST_ID).and_then(|value| value.to_str().ok());
    match given.filter(|id| is_plain(id, REQUEST_ID_CHARS_MAX)) {
        Some(id) => id.into(),
        None => format!("{:016x}", rand::random::<u64>()).into(),
    }
}

/// Returns the time the caller waits, which the gRPC protocol writes as up to eight digits and a unit.
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
