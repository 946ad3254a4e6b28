//! Requests: redirects followed by hand, so that the token goes to the hub alone, and errors in words.

use std::time::Duration;

use serde::de::DeserializeOwned;
use ureq::http::{HeaderMap, Response, StatusCode, Uri, header};
use ureq::{Agent, Body};

use super::Hub;
use crate::Error;
use crate::error::shown;

/// Redirects followed for one request.
const MAX_REDIRECTS: usize = 8;
/// Most bytes of a listing.
const MAX_JSON_BYTES: u64 = 32 << 20;

pub(super) fn agent() -> Agent {
    Agent::config_builder()
        .max_redirects(0)
        .max_redirects_will_error(false)
        .http_status_as_error(false)
        .user_agent(concat!("edgellm/", env!("CARGO_PKG_VERSION")))
        // A compressed answer has neither the size nor the ranges of the file.
        .accept_encoding("identity")
        .timeout_resolve(Some(Duration::from_secs(30)))
        .timeout_connect(Some(Duration::from_secs(30)))
        .timeout_recv_response(Some(Duration::from_secs(60)))
        .timeout_per_read(Some(Duration::from_secs(60)))
        .build()
        .new_agent()
}

/// Why a request gave nothing.
#[derive(Debug)]
pub(super) enum Failure {
    /// Asking again may help, after the time that the server asks for.
    Again(String, Option<Duration>),
    /// It will not.
    Final(Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Failure::Final(error)
    }
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Again(why, _) => Error::Machine(why),
            Failure::Final(error) => error,
        }
    }
}

/// What is asked for.
#[derive(Debug, Clone, Copy)]
pub(super) enum Method {
    /// The headers of the first answer that knows the file, which for large files is a redirect.
    Head,
    /// The bytes from an offset on.
    GetFrom(u64),
}

impl Hub {
    /// The answer to a request for `url`; `what` is it in words.
    pub(super) fn ask(
        &self,
        url: &str,
        method: Method,
        what: &str,
    ) -> Result<Response<Body>, Failure> {
        let mut url = url.to_owned();
        for _ in 0..=MAX_REDIRECTS {
            let mut request = match method {
                Method::Head => self.agent.head(&url),
                Method::GetFrom(_) => self.agent.get(&url),
            };
            if let Method::GetFrom(from @ 1..) = method {
                request = request.header(header::RANGE, format!("bytes={from}-"));
            }
            if let Some(token) = &self.token
                && origin(&url) == origin(&self.endpoint)
            {
                request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
            }
            let answer = request
                .call()
                .map_err(|e| Failure::Again(format!("cannot reach {}: {e}", host(&url)), None))?;
            let told = matches!(method, Method::Head) && answer.headers().contains_key(LINKED_ETAG);
            if !answer.status().is_redirection() || told {
                return match answer.status() {
                    status if status.is_success() || told => Ok(answer),
                    status => Err(refusal(status, answer.headers(), what)),
                };
            }
            url = target(&url, answer.headers())?;
        }
        let why = format!("{} redirects without end", host(&url));
        Err(Error::Machine(why).into())
    }

    /// The JSON at `url`.
    pub(super) fn json<T: DeserializeOwned>(&self, url: &str, what: &str) -> Result<T, Error> {
        let mut answer = self.ask(url, Method::GetFrom(0), what)?;
        let body = answer.body_mut().with_config().limit(MAX_JSON_BYTES);
        body.read_json()
            .map_err(|e| Error::Machine(format!("{}: unreadable answer: {e}", host(url))))
    }
}

/// Hash of a large file, on the hub's own answer.
pub(super) const LINKED_ETAG: &str = "x-linked-etag";
/// Its size.
pub(super) const LINKED_SIZE: &str = "x-linked-size";

/// The text of a header, if it is there and is text.
pub(super) fn text<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

/// Scheme, host and port.
fn origin(url: &str) -> Option<(String, String)> {
    let uri: Uri = url.parse().ok()?;
    let scheme = uri.scheme_str()?.to_owned();
    Some((scheme, uri.authority()?.as_str().to_ascii_lowercase()))
}

fn host(url: &str) -> String {
    let uri: Option<Uri> = url.parse().ok();
    uri.and_then(|uri| uri.host().map(str::to_owned))
        .unwrap_or_else(|| shown(url))
}

/// Where a redirect leads.
fn target(from: &str, headers: &HeaderMap) -> Result<String, Error> {
    let fail = |why: &str| Error::Machine(format!("{}: a redirect {why}", host(from)));
    let location = text(headers, header::LOCATION.as_str()).ok_or_else(|| fail("to nowhere"))?;
    let (scheme, authority) = origin(from).ok_or_else(|| fail("from nowhere"))?;
    if location.starts_with('/') && !location.starts_with("//") {
        return Ok(format!("{scheme}://{authority}{location}"));
    }
    match origin(location) {
        Some((to, _)) if to == scheme || to == "https" => Ok(location.to_owned()),
        Some(_) => Err(fail("leaves the encrypted connection")),
        None => Err(fail("to an address that is none")),
    }
}

/// A status that is no success, in words with a way out.
fn refusal(status: StatusCode, headers: &HeaderMap, what: &str) -> Failure {
    let input = |text: String| Failure::Final(Error::Input(text));
    let wait = text(headers, header::RETRY_AFTER.as_str())
        .and_then(|seconds| seconds.trim().parse().ok())
        .map(Duration::from_secs);
    match status.as_u16() {
        401 | 403 => input(format!(
            "{what}: the hub does not let you read it ({}): it may not exist, or you have to accept its licence \
             there and set HF_TOKEN to a token of yours",
            status.as_u16()
        )),
        404 => input(format!("{what}: the hub has none (404): check the name")),
        429 => Failure::Again(
            format!("{what}: too many requests (429): try again later, or set HF_TOKEN"),
            wait,
        ),
        408 | 500.. => Failure::Again(format!("{what}: the hub fails ({status})"), wait),
        _ => Failure::Final(Error::Machine(format!("{what}: the hub answers {status}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redirects_stay_encrypted_and_relative_ones_at_home() {
        let to = |from: &str, location: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::LOCATION, location.parse().expect("a header"));
            target(from, &headers).ok()
        };
        let home = "https://h:1/a/b";
        assert_eq!(to(home, "/c?d").as_deref(), Some("https://h:1/c?d"));
        assert_eq!(to(home, "https://cdn/x").as_deref(), Some("https://cdn/x"));
        assert_eq!(
            to("http://h/a", "https://cdn/x").as_deref(),
            Some("https://cdn/x")
        );
        assert_eq!(to(home, "http://cdn/x"), None);
        assert_eq!(to(home, "//cdn/x"), None);
        assert_eq!(to(home, "file:///etc/passwd"), None);
        assert_ne!(origin("https://h:1/a"), origin("https://h:2/a"));
        assert_ne!(origin("https://h/a"), origin("http://h/a"));
    }
}
