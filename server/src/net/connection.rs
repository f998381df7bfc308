//! From an open port to HTTP requests: accepting, TLS, and what clients may do to a connection. Every wait for a client
//! ends: for its handshake, its headers, its body (see [`crate::http::body`]), and for it to read what it asked for.

use std::collections::{HashMap, VecDeque};
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use hyper::body::Incoming;
use hyper::header::{HeaderValue, STRICT_TRANSPORT_SECURITY};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::AbortHandle;
use tokio_io_timeout::TimeoutStream;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::ServiceExt;

use crate::admission::{Client, Resource, Share};
use crate::app::AppState;
use crate::http::error::ErrorCode;
use crate::http::{PeerAddress, ProbesOnly};
use crate::net::tls::Tls;
use crate::repeats::REPEATS;

/// How long accepting rests after an error such as "too many open files".
const ACCEPT_REST: Duration = Duration::from_millis(50);
/// Most bytes of a request's line and headers, and of a connection's read buffer.
const MAX_HEADER_BYTES: usize = 32 << 10;
/// Most connections without a place at once, of which the server reads one request each.
const MAX_SURPLUS: usize = 64;
/// How long such a connection may last.
const SURPLUS_TIME: Duration = Duration::from_secs(2);
/// Browsers that came over TLS once come over TLS for a year.
const HSTS: HeaderValue = HeaderValue::from_static("max-age=31536000");

/// What clients may do to connections.
#[derive(Clone)]
pub struct ConnectionSettings {
    /// Most that have a place.
    pub max_connections: usize,
    /// For a TLS handshake, and for the headers of a request; also how long one may be idle between requests.
    pub header_timeout: Duration,
    /// For a client to take any more bytes of an answer.
    pub write_timeout: Duration,
    /// For accepted requests to be answered at the end.
    pub drain_timeout: Duration,
    /// The certificate; without one connections are plain.
    pub tls: Option<Tls>,
}

/// How the server is asked to stop.
#[derive(Debug, Clone, Default)]
pub struct Stop {
    /// The server accepts no more connections and finishes those it has.
    pub drain: CancellationToken,
    /// The server drops unfinished requests.
    pub hurry: CancellationToken,
}

/// Accepts connections until it is told to stop, then finishes what was accepted, for at most `drain_timeout`.
pub async fn serve(listener: TcpListener, router: Router, app: AppState, settings: ConnectionSettings, stop: Stop) {
    let Stop { drain: shutdown, hurry } = stop;
    let connections = TaskTracker::new();
    let slots = Arc::new(Semaphore::new(settings.max_connections));
    let mut surplus = Surplus::default();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = shutdown.cancelled() => break,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                if let Some(repeated) = REPEATS.admit("cannot accept connections") {
                    tracing::warn!(%error, repeated, "cannot accept connections");
                }
                tokio::time::sleep(ACCEPT_REST).await;
                continue;
            }
        };
        let client = Client::from(peer.ip());
        let connection = Connection { peer, router: router.clone(), settings: settings.clone(), has_place: true };
        if let Some(place) = place(&slots, &app, client) {
            let open = app.classifier.metrics.connections_open.clone();
            open.inc();
            let shutdown = shutdown.clone();
            connections.spawn(async move {
                connection.serve(stream, shutdown).await;
                open.dec();
                drop(place);
            });
        } else {
            app.classifier.metrics.request_failures.with_label_values(&[ErrorCode::TooManyConnections.as_str()]).inc();
            let settings = ConnectionSettings { header_timeout: SURPLUS_TIME, ..settings.clone() };
            let connection = Connection { settings, has_place: false, ..connection };
            let shutdown = shutdown.clone();
            let task = connections.spawn(async move {
                let _ = tokio::time::timeout(SURPLUS_TIME, connection.serve(stream, shutdown)).await;
            });
            surplus.add(client, task.abort_handle());
            // Its request may be there already, and is read before the next connection can take its place.
            tokio::task::yield_now().await;
        }
    }
    app.classifier.admission.lifecycle.set_draining();
    drop(listener);
    connections.close();
    tracing::info!(connections = connections.len(), "draining");
    if !in_time(connections.wait(), settings.drain_timeout, &hurry).await {
        tracing::warn!(connections = connections.len(), "not every request was answered in time; connections are cut");
    }
    let drained = tokio::task::spawn_blocking(move || app.classifier.pipeline.drain());
    if !in_time(drained, settings.drain_timeout, &hurry).await {
        tracing::warn!("not every image was answered in time; queued images are dropped");
    }
    tracing::info!("stopped");
}

/// One of the places for connections, and with it one of its client's, until dropped.
fn place(slots: &Arc<Semaphore>, app: &AppState, client: Client) -> Option<(OwnedSemaphorePermit, Share)> {
    let slot = Arc::clone(slots).try_acquire_owned().ok()?;
    let shares = &app.classifier.admission.shares;
    let share = shares.take(client, Resource::Connections, 1);
    if share.is_none() {
        shares.refused(Resource::Connections);
    }
    Some((slot, share?))
}

/// Connections without a place. The server reads one request of each, because that may be a probe.
#[derive(Default)]
struct Surplus(VecDeque<(Client, AbortHandle)>);

impl Surplus {
    /// Takes one more. When there are too many, the oldest one of the client with the most of them is closed: a probe sends
    /// its request at once, and what keeps others out does not.
    fn add(&mut self, client: Client, connection: AbortHandle) {
        self.0.retain(|(_, connection)| !connection.is_finished());
        if self.0.len() == MAX_SURPLUS {
            let mut counts: HashMap<Client, usize> = HashMap::new();
            self.0.iter().for_each(|(client, _)| *counts.entry(*client).or_default() += 1);
            let most = counts.values().copied().max();
            let oldest = self.0.iter().position(|(client, _)| counts.get(client).copied() == most);
            if let Some((_, connection)) = oldest.and_then(|oldest| self.0.remove(oldest)) {
                connection.abort();
            }
        }
        self.0.push_back((client, connection));
    }
}

/// Whether `end` comes within `time` and before a second signal.
async fn in_time(end: impl Future, time: Duration, hurry: &CancellationToken) -> bool {
    tokio::select! {
        _ = end => true,
        () = tokio::time::sleep(time) => false,
        () = hurry.cancelled() => false,
    }
}

/// What serves a connection.
struct Connection {
    peer: SocketAddr,
    router: Router,
    settings: ConnectionSettings,
    /// Without one, only probes are answered, and one request is all.
    has_place: bool,
}

impl Connection {
    async fn serve(self, stream: TcpStream, shutdown: CancellationToken) {
        // Answers are small and complete; waiting to fill a segment only delays them.
        let _ = stream.set_nodelay(true);
        let mut stream = TimeoutStream::new(stream);
        stream.set_write_timeout(Some(self.settings.write_timeout));
        let stream = Box::pin(stream);
        let peer = self.peer;
        let Some(tls) = &self.settings.tls else {
            return self.serve_requests(stream, None, shutdown).await;
        };
        let handshake = TlsAcceptor::from(tls.config()).accept(stream);
        match tokio::time::timeout(self.settings.header_timeout, handshake).await {
            Ok(Ok(stream)) => self.serve_requests(stream, Some(HSTS), shutdown).await,
            Ok(Err(error)) => tracing::debug!(%error, %peer, "TLS handshake failed"),
            Err(_) => tracing::debug!(%peer, "TLS handshake took too long"),
        }
    }

    async fn serve_requests(
        self,
        stream: impl AsyncRead + AsyncWrite + Unpin,
        hsts: Option<HeaderValue>,
        shutdown: CancellationToken,
    ) {
        let Self { peer, router, settings, has_place } = self;
        let service = service_fn(move |request: hyper::Request<Incoming>| {
            let mut request = request.map(Body::new);
            request.extensions_mut().insert(PeerAddress(peer));
            if !has_place {
                request.extensions_mut().insert(ProbesOnly);
            }
            let (router, hsts) = (router.clone(), hsts.clone());
            async move {
                let mut response = router.oneshot(request).await?;
                response.headers_mut().extend(hsts.map(|value| (STRICT_TRANSPORT_SECURITY, value)));
                Ok::<_, Infallible>(response)
            }
        });
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(settings.header_timeout)
            .max_buf_size(MAX_HEADER_BYTES)
            .keep_alive(has_place)
            .serve_connection(TokioIo::new(stream), service);
        let mut connection = std::pin::pin!(connection);
        let result = tokio::select! {
            result = connection.as_mut() => result,
            () = shutdown.cancelled() => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        };
        if let Err(error) = result {
            tracing::debug!(%error, %peer, "connection ended");
        }
    }
}
