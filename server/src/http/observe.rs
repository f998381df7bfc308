//! What happens to every request: an id, a deadline, counters and one log line.

use std::net::SocketAddr;

use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderName, HeaderValue, Method};
use axum::middleware::Next;
use axum::response::Response;
use tokio::time::Instant;

use super::extract::RequestContext;
use crate::error::Failure;
use crate::state::AppState;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
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

/// The outermost middleware.
pub async fn observe(State(app): State<AppState>, mut request: Request, next: Next) -> Response {
    let started = Instant::now();
    let peer = request.extensions().get::<PeerAddress>().copied();
    let context = RequestContext {
        started,
        deadline: started + app.limits.request_timeout,
        from_loopback: peer.is_some_and(|PeerAddress(address)| address.ip().to_canonical().is_loopback()),
    };
    request.extensions_mut().insert(context);
    let id = request_id(&request);
    let method = request.method().clone();
    let matched = request.extensions().get::<MatchedPath>().map(|path| path.as_str().to_owned());

    let in_flight = InFlight::new(&app.metrics.requests_in_flight);
    let mut response = next.run(request).await;
    drop(in_flight);

    let route = matched.as_deref().unwrap_or(UNMATCHED);
    record(&app, &method, route, &id, &response, started);
    response.headers_mut().insert(REQUEST_ID, id);
    response
}

/// The client's id when it is one we can repeat, or a new one.
fn request_id(request: &Request) -> HeaderValue {
    let usable = |id: &&HeaderValue| {
        (1..=MAX_REQUEST_ID).contains(&id.len()) && id.as_bytes().iter().all(|byte| byte.is_ascii_graphic())
    };
    let made = || HeaderValue::try_from(uuid::Uuid::new_v4().to_string()).unwrap_or(HeaderValue::from_static("none"));
    request.headers().get(&REQUEST_ID).filter(usable).cloned().unwrap_or_else(made)
}

fn record(app: &AppState, method: &Method, route: &str, id: &HeaderValue, response: &Response, started: Instant) {
    let (status, elapsed) = (response.status(), started.elapsed());
    app.metrics.http_requests.with_label_values(&[route, status.as_str()]).inc();
    app.metrics.request_duration.with_label_values(&[route]).observe(elapsed.as_secs_f64());
    let id = id.to_str().unwrap_or_default();
    let (status, duration_ms) = (status.as_u16(), elapsed.as_secs_f64() * 1e3);
    match response.extensions().get::<Failure>() {
        None => tracing::debug!(request.id = id, %method, route, status, duration_ms, "request answered"),
        Some(Failure { code, message }) => {
            app.metrics.request_failures.with_label_values(&[code.as_str()]).inc();
            let (code, error) = (code.as_str(), message.as_str());
            if status >= 500 {
                tracing::warn!(request.id = id, %method, route, status, duration_ms, code, error, "request failed");
            } else {
                tracing::info!(request.id = id, %method, route, status, duration_ms, code, error, "request refused");
            }
        }
    }
}
