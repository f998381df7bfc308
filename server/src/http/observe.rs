//! What happens to every request: an id, counters and one log line.

use std::net::{IpAddr, SocketAddr};

use axum::extract::{MatchedPath, Request, State};
use axum::http::uri::Authority;
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, header};
use axum::middleware::Next;
use axum::response::Response;
use tokio::time::Instant;

use super::error::{Failure, cut};
use super::extract::RequestContext;
use crate::admission::Client;
use crate::app::AppState;
use crate::repeats::REPEATS;

pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Longest request id taken from a client.
const MAX_REQUEST_ID: usize = 128;
/// Stands for every path that matches no route, so that clients cannot make labels.
const UNMATCHED: &str = "unmatched";

/// The other end of the connection, put into each request by the listener.
#[derive(Debug, Clone, Copy)]
pub struct PeerAddress(pub SocketAddr);

/// Counts a request as in flight until dropped, also when its client goes away in the middle.
struct InFlight<'a>(&'a prometheus::IntGauge);

impl<'a> InFlight<'a> {
    fn new(gauge: &'a prometheus::IntGauge) -> Self {
        gauge.inc();
        Self(gauge)
    }
}

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.0.dec();
    }
}

pub async fn observe(State(app): State<AppState>, mut request: Request, next: Next) -> Response {
    let started = Instant::now();
    let peer = request.extensions().get::<PeerAddress>().copied();
    let context = RequestContext {
        started,
        client: peer.map_or(Client::UNKNOWN, |PeerAddress(peer)| peer.ip().into()),
        from_loopback: peer.is_some_and(|peer| is_local(peer, request.headers())),
    };
    request.extensions_mut().insert(context);
    let id = request.headers().get(&REQUEST_ID).cloned();
    let method = request.method().clone();
    let matched = request.extensions().get::<MatchedPath>().map(|path| path.as_str().to_owned());

    let in_flight = InFlight::new(&app.classifier.metrics.requests_in_flight);
    let response = next.run(request).await;
    drop(in_flight);

    let route = matched.as_deref().unwrap_or(UNMATCHED);
    record(&app, &method, route, id.as_ref(), &response, started);
    response
}

/// Whether a request was sent by someone on this machine. A proxy here speaks for others, and so may a browser here:
/// pages of other sites can make it send requests, under a name of their own that leads to this machine.
fn is_local(PeerAddress(address): PeerAddress, headers: &HeaderMap) -> bool {
    let is_proxied = ["forwarded", "x-forwarded-for"].iter().any(|&name| headers.contains_key(name));
    let host = headers.get(header::HOST).and_then(|host| host.to_str().ok()?.parse::<Authority>().ok());
    let is_this_machine = |host: &Authority| {
        let name = host.host().trim_matches(['[', ']']);
        name.eq_ignore_ascii_case("localhost") || name.parse::<IpAddr>().is_ok()
    };
    let is_same_origin = |origin: &HeaderValue| {
        let origin = origin.to_str().ok().and_then(|origin| origin.split_once("://"));
        origin.is_some_and(|(_, origin)| host.as_ref().is_some_and(|host| host.as_str() == origin))
    };
    address.ip().to_canonical().is_loopback()
        && !is_proxied
        && host.as_ref().is_none_or(is_this_machine)
        && headers.get(header::ORIGIN).is_none_or(is_same_origin)
}

/// Removes an id that cannot be repeated in an answer and a log; the request then gets a new one.
pub async fn forget_unusable_id(mut request: Request) -> Request {
    let usable =
        |id: &HeaderValue| (1..=MAX_REQUEST_ID).contains(&id.len()) && id.as_bytes().iter().all(u8::is_ascii_graphic);
    if !request.headers().get(&REQUEST_ID).is_some_and(usable) {
        request.headers_mut().remove(&REQUEST_ID);
    }
    request
}

fn record(
    app: &AppState,
    method: &Method,
    route: &str,
    id: Option<&HeaderValue>,
    response: &Response,
    started: Instant,
) {
    let (status, elapsed) = (response.status(), started.elapsed());
    app.classifier.metrics.http_requests.with_label_values(&[route, status.as_str()]).inc();
    app.classifier.metrics.request_duration.with_label_values(&[route]).observe(elapsed.as_secs_f64());
    let (id, method) = (id.and_then(|id| id.to_str().ok()).unwrap_or_default(), cut(method.as_str()));
    let (method, status, duration_ms) = (method.as_ref(), status.as_u16(), elapsed.as_secs_f64() * 1e3);
    let Some(Failure { code, message }) = response.extensions().get::<Failure>() else {
        return tracing::debug!(request.id = id, method, route, status, duration_ms, "request answered");
    };
    let (code, error) = (code.as_str(), message.as_str());
    app.classifier.metrics.request_failures.with_label_values(&[code]).inc();
    // A client may be refused as often as it likes, and the log is on somebody's SD card.
    let Some(repeated) = REPEATS.admit(code) else { return };
    if status >= 500 {
        tracing::warn!(request.id = id, method, route, status, duration_ms, code, error, repeated, "request failed");
    } else {
        tracing::info!(request.id = id, method, route, status, duration_ms, code, error, repeated, "request refused");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_this_machine_sends_for_itself_is_local() {
        let here = PeerAddress(([127, 0, 0, 1], 1234).into());
        let there = PeerAddress(([192, 168, 0, 7], 1234).into());
        type Case = (PeerAddress, &'static [(&'static str, &'static str)], bool);
        let cases: [Case; 9] = [
            (here, &[], true),
            (here, &[("host", "127.0.0.1:8000")], true),
            (here, &[("host", "[::1]:8000")], true),
            (here, &[("host", "localhost:8000"), ("origin", "http://localhost:8000")], true),
            (there, &[("host", "127.0.0.1:8000")], false),
            (here, &[("host", "localhost"), ("x-forwarded-for", "192.168.0.7")], false),
            (here, &[("host", "localhost:8000"), ("origin", "http://evil.example")], false),
            (here, &[("host", "rebound.example:8000"), ("origin", "http://rebound.example:8000")], false),
            (here, &[("host", "localhost:8000"), ("origin", "null")], false),
        ];
        for (peer, headers, expected) in cases {
            let map =
                headers.iter().map(|&(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value)));
            assert_eq!(is_local(peer, &map.collect()), expected, "{peer:?} {headers:?}");
        }
    }
}
