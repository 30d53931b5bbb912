//! HTTP with the hub. Redirects are followed here, not by the library: the token goes to the hub's own origin
//! and nowhere else. Every answer has a limit, and every refusal becomes a typed error without addresses.

use std::ops::Range;
use std::time::Duration;

use reqwest::header::{
    ACCEPT_ENCODING, AUTHORIZATION, DATE, HeaderMap, HeaderName, LINK, LOCATION, RANGE, RETRY_AFTER,
    USER_AGENT,
};
use reqwest::{Response, StatusCode, Url, redirect};
use rustls::crypto::ring;
use serde::de::DeserializeOwned;

use super::FetchError;
use super::repo::RepoName;
use super::settings::{HubSettings, Token};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Longest silence within an answer.
const READ_TIMEOUT: Duration = Duration::from_secs(30);

/// Longest time for a whole answer of the API.
const JSON_TIMEOUT: Duration = Duration::from_secs(60);

/// Redirects of one request; the hub's own need two.
const REDIRECTS_MAX: usize = 8;

/// Tries of a question to the API.
const JSON_TRIES: u32 = 4;

/// First wait between tries; it doubles.
const FIRST_WAIT: Duration = Duration::from_millis(250);

/// Longest wait between tries. A hub that asks for more is reported instead.
const WAIT_MAX: Duration = Duration::from_secs(60);

/// Characters of a message of the hub that are shown.
const MESSAGE_CHARS_MAX: usize = 200;

/// What a request asks for, for messages.
pub(super) struct Ask<'a> {
    /// As in `the hub has no …`.
    pub(super) what: String,
    pub(super) repo: &'a RepoName,
}

/// A client of one hub.
#[derive(Debug)]
pub(super) struct Client {
    http: reqwest::Client,
    endpoint: Url,
    token: Option<Token>,
}

/// An answer, and the address that it came from.
pub(super) struct Answer {
    pub(super) response: Response,
    pub(super) from: Url,
}

impl Client {
    pub(super) fn new(settings: &HubSettings) -> Result<Self, FetchError> {
        let cannot_start = |error: String| FetchError::unreachable(format!("TLS cannot be set up: {error}"));
        // For the whole process; a second time changes nothing.
        _ = ring::default_provider().install_default();
        let http = reqwest::Client::builder()
            .redirect(redirect::Policy::none())
            .connect_timeout(CONNECT_TIMEOUT)
            .read_timeout(READ_TIMEOUT)
            .build()
            .map_err(|error| cannot_start(error.without_url().to_string()))?;
        let HubSettings { endpoint, token, .. } = settings;
        Ok(Self { http, endpoint: endpoint.clone(), token: token.clone() })
    }

    /// Returns an address of the hub: `before`, the parts of the repo's id, `after`; each is one part.
    pub(super) fn url(&self, before: &[&str], id: &str, after: &[&str]) -> Url {
        let mut url = self.endpoint.clone();
        if let Ok(mut path) = url.path_segments_mut() {
            path.pop_if_empty().extend(before).extend(id.split('/')).extend(after);
        }
        url
    }

    /// Asks for JSON of at most `bytes_max` bytes; returns the address of the next page too.
    pub(super) async fn json<T: DeserializeOwned>(
        &self,
        url: &Url,
        ask: &Ask<'_>,
        bytes_max: usize,
    ) -> Result<(T, Option<Url>), FetchError> {
        retrying(JSON_TRIES, async || {
            let request = self.json_once(url, ask, bytes_max);
            let slow = |_| FetchError::unreachable("its answer takes too long");
            tokio::time::timeout(JSON_TIMEOUT, request).await.map_err(slow)?
        })
        .await
    }

    async fn json_once<T: DeserializeOwned>(
        &self,
        url: &Url,
        ask: &Ask<'_>,
        bytes_max: usize,
    ) -> Result<(T, Option<Url>), FetchError> {
        let Answer { mut response, from } = self.get(url, ask, None).await?;
        let next = next_page(response.headers()).map(|next| {
            let next = from.join(&next).ok().filter(|next| self.is_hub(next));
            next.ok_or_else(|| FetchError::bad(&ask.what, "continues it at the address of another server"))
        });
        let next = next.transpose()?;
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(broken)? {
            if body.len() + chunk.len() > bytes_max {
                return Err(FetchError::bad(&ask.what, format!("answers with more than {bytes_max} bytes")));
            }
            body.extend_from_slice(&chunk);
        }
        let why = if body.trim_ascii_start().starts_with(b"<") {
            "answers with a web page instead of JSON"
        } else {
            "answers with JSON that is not what its API promises"
        };
        let value = serde_json::from_slice(&body).map_err(|_| FetchError::bad(&ask.what, why))?;
        Ok((value, next))
    }

    /// Asks for a file or a range of its bytes, following redirects; fails unless the answer is a success.
    pub(super) async fn get(
        &self,
        url: &Url,
        ask: &Ask<'_>,
        range: Option<&Range<u64>>,
    ) -> Result<Answer, FetchError> {
        let mut url = url.clone();
        for _ in 0..REDIRECTS_MAX {
            let response = self.send(&url, range).await?;
            if !response.status().is_redirection() {
                return if response.status().is_success() {
                    Ok(Answer { response, from: url })
                } else {
                    Err(self.refusal(&response, &url, ask))
                };
            }
            let target = response.headers().get(LOCATION).and_then(|location| location.to_str().ok());
            let target = target.and_then(|target| url.join(target).ok());
            url = target
                .filter(|target| matches!(target.scheme(), "http" | "https"))
                .ok_or_else(|| FetchError::bad(&ask.what, "redirects to what is not an address"))?;
        }
        Err(FetchError::bad(&ask.what, "redirects without end"))
    }

    async fn send(&self, url: &Url, range: Option<&Range<u64>>) -> Result<Response, FetchError> {
        let mut request = self.http.get(url.clone());
        request = request.header(USER_AGENT, concat!("mlxd/", env!("CARGO_PKG_VERSION")));
        // Sizes and ranges are those of the file itself.
        request = request.header(ACCEPT_ENCODING, "identity");
        if let Some(Range { start, end }) = range {
            request = request.header(RANGE, format!("bytes={start}-{}", end.saturating_sub(1)));
        }
        if let Some(Token(token)) = self.token.as_ref().filter(|_| self.is_hub(url)) {
            request = request.header(AUTHORIZATION, token.clone());
        }
        request.send().await.map_err(broken)
    }

    /// Whether an address has the hub's origin: scheme, host and port.
    pub(super) fn is_hub(&self, url: &Url) -> bool {
        url.origin() == self.endpoint.origin()
    }

    fn refusal(&self, response: &Response, url: &Url, ask: &Ask<'_>) -> FetchError {
        let status = response.status();
        let code = header(response, "x-error-code").unwrap_or_default();
        let said =
            header(response, "x-error-message").map_or_else(|| status.to_string(), |text| shown(&text));
        let repo = ask.repo.id().to_owned();
        let hint = if self.token.is_none() { "; HF_TOKEN gives a token" } else { "" };
        match status {
            // The storage behind the hub refuses an address that has expired.
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN if !self.is_hub(url) => {
                FetchError::unreachable(format!("its storage answers {status}"))
            }
            _ if code == "GatedRepo" => {
                let why = format!("it is gated: ask for access on its page at the hub{hint} ({said})");
                FetchError::Denied { repo, why }
            }
            // So the hub answers for repos that it does not have, too.
            StatusCode::UNAUTHORIZED if code == "RepoNotFound" => {
                FetchError::NotFound { what: format!("{}, or it is private{hint}", ask.what) }
            }
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                FetchError::Denied { repo, why: format!("{said}{hint}") }
            }
            StatusCode::NOT_FOUND | StatusCode::GONE => FetchError::NotFound { what: ask.what.clone() },
            StatusCode::RANGE_NOT_SATISFIABLE => FetchError::bad(&ask.what, "has fewer bytes than it lists"),
            _ if is_passing(status) => {
                FetchError::Unreachable { why: said, retry_after: retry_after(response.headers()) }
            }
            _ => FetchError::bad(&ask.what, format!("answers {said}")),
        }
    }
}

fn is_passing(status: StatusCode) -> bool {
    status.is_server_error() || matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT)
}

/// The error of a connection that fails or breaks. The library's own text has the address in it.
pub(super) fn broken(error: reqwest::Error) -> FetchError {
    let error = error.without_url();
    let mut cause: &dyn std::error::Error = &error;
    while let Some(deeper) = cause.source() {
        cause = deeper;
    }
    FetchError::unreachable(shown(&cause.to_string()))
}

/// Returns the start of a text of a stranger, without characters that steer a terminal.
fn shown(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(MESSAGE_CHARS_MAX).collect()
}

fn header(response: &Response, name: &str) -> Option<String> {
    response.headers().get(name).and_then(|value| value.to_str().ok()).map(str::to_owned)
}

/// Returns how long a hub asks to wait: in seconds, or until a date (RFC 9110, 10.2.3). A date is compared
/// with the answer's own, so that it does not matter what our clock says.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = |name: HeaderName| headers.get(name).and_then(|value| value.to_str().ok()).map(str::trim);
    let given = text(RETRY_AFTER)?;
    if let Ok(seconds) = given.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let date = |text: &str| httpdate::parse_http_date(text).ok();
    let (until, now) = (date(given)?, date(text(DATE)?)?);
    Some(until.duration_since(now).unwrap_or_default())
}

/// Returns the address of `Link: <address>; rel="next"` (RFC 8288), which may be relative.
fn next_page(headers: &HeaderMap) -> Option<String> {
    let links = headers.get_all(LINK).into_iter().map(|value| String::from_utf8_lossy(value.as_bytes()));
    let links: String = links.collect::<Vec<_>>().join(",");
    let mut links = links.split('<').filter_map(|link| link.split_once('>'));
    let is_next = |parameters: &str| {
        let mut parameters = parameters.split([';', ',']).map(|parameter| parameter.trim().to_lowercase());
        parameters.any(|parameter| matches!(parameter.as_str(), "rel=\"next\"" | "rel=next"))
    };
    links.find(|(_, parameters)| is_next(parameters)).map(|(address, _)| address.to_owned())
}

/// Tries again what fails for a reason that passes by itself, at most `tries` times in all.
pub(super) async fn retrying<T>(
    tries: u32,
    mut attempt: impl AsyncFnMut() -> Result<T, FetchError>,
) -> Result<T, FetchError> {
    let mut failed = 0;
    loop {
        let error = match attempt().await {
            Ok(value) => return Ok(value),
            Err(error) => error,
        };
        failed += 1;
        match wait_after(&error, failed).filter(|_| failed < tries) {
            Some(wait) => tokio::time::sleep(wait).await,
            None => return Err(error),
        }
    }
}

/// Returns how long to wait after this many failures in a row; `None` for what does not pass by itself.
pub(super) fn wait_after(error: &FetchError, failed: u32) -> Option<Duration> {
    let FetchError::Unreachable { retry_after, .. } = error else { return None };
    let own = FIRST_WAIT.saturating_mul(1 << failed.saturating_sub(1).min(6));
    Some(retry_after.unwrap_or(own)).filter(|wait| *wait <= WAIT_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(endpoint: &str) -> Client {
        let env = |name: &str| (name == "HF_ENDPOINT").then(|| endpoint.to_owned());
        Client::new(&HubSettings::from_variables("/cache".into(), &env).unwrap()).unwrap()
    }

    #[test]
    fn parts_of_an_address_cannot_become_other_parts() {
        let client = client("https://hub.example/mirror");
        let url = client.url(&["api", "models"], "owner/name", &["revision", "refs/pr/1"]);
        assert_eq!(url.as_str(), "https://hub.example/mirror/api/models/owner/name/revision/refs%2Fpr%2F1");
        let url = client.url(&[], "a/b", &["resolve", "main", "x y?#%.json"]);
        assert_eq!(url.path(), "/mirror/a/b/resolve/main/x%20y%3F%23%25.json");
    }

    #[test]
    fn another_port_or_scheme_is_not_the_hub() {
        let client = client("https://hub.example");
        let is_hub = |url: &str| client.is_hub(&Url::parse(url).unwrap());
        assert!(is_hub("https://hub.example/x") && is_hub("https://HUB.example:443/"));
        for other in ["http://hub.example/", "https://hub.example:8443/", "https://cdn.hub.example/"] {
            assert!(!is_hub(other), "{other}");
        }
    }

    #[test]
    fn the_hub_says_when_to_try_again() {
        let error = |retry_after| FetchError::Unreachable { why: String::new(), retry_after };
        let seconds = |n| Some(Duration::from_secs(n));
        assert_eq!(wait_after(&error(seconds(7)), 1), seconds(7));
        assert_eq!(wait_after(&error(seconds(61)), 1), None, "reported instead");
        assert_eq!(wait_after(&error(None), 1), Some(FIRST_WAIT));
        assert_eq!(wait_after(&error(None), 3), seconds(1));
        assert_eq!(wait_after(&FetchError::Stopped, 1), None);
    }

    #[test]
    fn a_wait_is_in_seconds_or_until_a_date_of_the_hubs_clock() {
        let read = |given: &str, date: Option<&str>| {
            let mut headers = HeaderMap::new();
            headers.insert(RETRY_AFTER, given.parse().unwrap());
            date.map(|date| headers.insert(DATE, date.parse().unwrap()));
            retry_after(&headers).map(|wait| wait.as_secs())
        };
        let (then, now) = ("Sun, 06 Nov 1994 09:49:37 GMT", Some("Sun, 06 Nov 1994 08:49:37 GMT"));
        assert_eq!(read("7", now), Some(7));
        assert_eq!(read(then, now), Some(3600));
        assert_eq!(read(then, Some("Sun Nov  6 09:49:36 1994")), Some(1), "the old form");
        assert_eq!(read(then, Some("Mon, 07 Nov 1994 00:00:00 GMT")), Some(0), "it has passed");
        assert_eq!(read(then, None), None, "nothing to compare with");
        assert_eq!(read(then, Some("now")), None);
        for wrong in ["", "soon", "-1", "1.5", "Sun, 99 Nov 1994 08:49:37 GMT"] {
            assert_eq!(read(wrong, now), None, "{wrong}");
        }
    }

    #[test]
    fn the_next_page_is_the_links() {
        let next = |links: &[&str]| {
            let mut headers = HeaderMap::new();
            for link in links {
                headers.append(LINK, link.parse().unwrap());
            }
            next_page(&headers)
        };
        let address = Some("https://h/b?cursor=x,y".to_owned());
        assert_eq!(next(&["<https://h/b?cursor=x,y>; rel=\"next\""]), address);
        assert_eq!(next(&["<https://h/b?cursor=x,y>; title=a; Rel=next"]), address);
        assert_eq!(next(&["</a>; rel=\"prev\", <https://h/b?cursor=x,y>; rel=\"next\""]), address);
        assert_eq!(next(&["</a>; rel=\"prev\"", "<https://h/b?cursor=x,y>; rel=\"next\""]), address);
        assert_eq!(next(&["<https://h/b>; rel=\"prev\""]), None);
        assert_eq!(next(&[]), None);
    }
}
