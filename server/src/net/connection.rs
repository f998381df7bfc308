//! From an open port to HTTP requests: accepting, TLS, and what clients may do to a connection. Every wait for a client
//! ends: for its handshake, its headers, its body (see [`crate::http::body`]), and for it to read what it asked for.

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
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_io_timeout::TimeoutStream;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::ServiceExt;

use crate::app::AppState;
use crate::http::error::{ApiError, ErrorCode};
use crate::http::{PeerAddress, build_router};
use crate::net::tls::Tls;
use crate::repeats::REPEATS;

/// How long accepting rests after an error such as "too many open files".
const ACCEPT_REST: Duration = Duration::from_millis(50);
/// Most bytes of a request's line and headers, and of a connection's read buffer.
const MAX_HEADER_BYTES: usize = 32 << 10;
/// Most connections that are being told at once that there are too many; others are closed without a word.
const MAX_REFUSALS: usize = 64;
/// How long a refused client may take to read why.
const REFUSAL_TIME: Duration = Duration::from_secs(1);
/// Browsers that came over TLS once come over TLS for a year.
const HSTS: HeaderValue = HeaderValue::from_static("max-age=31536000");

/// What clients may do to connections.
#[derive(Clone)]
pub struct ConnectionSettings {
    /// Most open ones.
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
pub async fn serve(listener: TcpListener, app: AppState, settings: ConnectionSettings, stop: Stop) {
    let Stop { drain: shutdown, hurry } = stop;
    let router = build_router(app.clone());
    let connections = TaskTracker::new();
    let slots = Arc::new(Semaphore::new(settings.max_connections));
    let refusals = Arc::new(Semaphore::new(MAX_REFUSALS));
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
        if let Ok(slot) = Arc::clone(&slots).try_acquire_owned() {
            let connection = serve_connection(stream, peer, router.clone(), settings.clone(), shutdown.clone());
            let open = app.classifier.metrics.connections_open.clone();
            open.inc();
            connections.spawn(async move {
                connection.await;
                open.dec();
                drop(slot);
            });
        } else {
            let error = ApiError::new(ErrorCode::TooManyConnections, "too many connections are open; try again later");
            app.classifier.metrics.request_failures.with_label_values(&[error.code().as_str()]).inc();
            // Over TLS saying so would take a handshake, which is the work to be saved.
            if let Ok(slot) = Arc::clone(&refusals).try_acquire_owned()
                && settings.tls.is_none()
            {
                connections.spawn(async move {
                    let _ = tokio::time::timeout(REFUSAL_TIME, refuse(stream, &error)).await;
                    drop(slot);
                });
            }
        }
    }
    app.classifier.admission.lifecycle.set_draining();
    drop(listener);
    connections.close();
    tracing::info!(connections = connections.len(), "draining");
    if !in_time(connections.wait(), settings.drain_timeout, &hurry).await {
        tracing::warn!(connections = connections.len(), "the drain timeout passed; connections are cut");
    }
    let drained = tokio::task::spawn_blocking(move || app.classifier.pipeline.drain());
    if !in_time(drained, settings.drain_timeout, &hurry).await {
        tracing::warn!("the drain timeout passed; queued images are dropped");
    }
    tracing::info!("stopped");
}

/// Answers a connection for which there is no room, whatever it asks for.
async fn refuse(mut stream: TcpStream, error: &ApiError) -> std::io::Result<()> {
    let body = serde_json::to_string(&error.body())?;
    let head = format!(
        "HTTP/1.1 {}\r\nconnection: close\r\nretry-after: 1\r\ncontent-type: application/json\r\ncontent-length: {}",
        error.code().status(),
        body.len()
    );
    stream.write_all(format!("{head}\r\n\r\n{body}").as_bytes()).await?;
    stream.shutdown().await?;
    // Closing with unread bytes resets the connection, and the client may lose the answer.
    let mut unread = [0; 1024];
    while stream.read(&mut unread).await? > 0 {}
    Ok(())
}

/// Whether `end` comes within `time` and before a second signal.
async fn in_time(end: impl Future, time: Duration, hurry: &CancellationToken) -> bool {
    tokio::select! {
        _ = end => true,
        () = tokio::time::sleep(time) => false,
        () = hurry.cancelled() => false,
    }
}

async fn serve_connection(
    stream: TcpStream,
    peer: SocketAddr,
    router: Router,
    settings: ConnectionSettings,
    shutdown: CancellationToken,
) {
    // Answers are small and complete; waiting to fill a segment only delays them.
    let _ = stream.set_nodelay(true);
    let mut stream = TimeoutStream::new(stream);
    stream.set_write_timeout(Some(settings.write_timeout));
    let stream = Box::pin(stream);
    let Some(tls) = settings.tls else {
        return serve_requests(stream, peer, router, settings.header_timeout, None, shutdown).await;
    };
    let handshake = TlsAcceptor::from(tls.config()).accept(stream);
    match tokio::time::timeout(settings.header_timeout, handshake).await {
        Ok(Ok(stream)) => {
            serve_requests(stream, peer, router, settings.header_timeout, Some(HSTS), shutdown).await;
        }
        Ok(Err(error)) => tracing::debug!(%error, %peer, "TLS handshake failed"),
        Err(_) => tracing::debug!(%peer, "TLS handshake took too long"),
    }
}

async fn serve_requests(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    peer: SocketAddr,
    router: Router,
    header_timeout: Duration,
    hsts: Option<HeaderValue>,
    shutdown: CancellationToken,
) {
    let service = service_fn(move |request: hyper::Request<Incoming>| {
        let mut request = request.map(Body::new);
        request.extensions_mut().insert(PeerAddress(peer));
        let (router, hsts) = (router.clone(), hsts.clone());
        async move {
            let mut response = router.oneshot(request).await?;
            response.headers_mut().extend(hsts.map(|value| (STRICT_TRANSPORT_SECURITY, value)));
            Ok::<_, Infallible>(response)
        }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(header_timeout)
        .max_buf_size(MAX_HEADER_BYTES)
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
