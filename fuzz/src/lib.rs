//! The whole server without a socket, for targets that send it requests.

use std::sync::OnceLock;

use axum::Router;
use axum::body::Body;
use axum::http::request;
use butterflyvit::config::Cli;
use butterflyvit::{http, serve};
use clap::Parser;
use tokio::runtime::Runtime;
use tower::ServiceExt;

/// Most bytes that answering one small request may take: decode memory, the start of the server aside.
pub const MOST_BYTES: usize = 64 << 20;

/// Sends `body` and insists on an answer that lays no blame on the server. A panic on any thread ends the process.
///
/// # Panics
/// When the answer is one that no request may get.
pub fn answer(request: request::Builder, body: &[u8]) {
    static SERVER: OnceLock<(Runtime, Router)> = OnceLock::new();
    let (runtime, router) = SERVER.get_or_init(|| start().expect("the embedded model is served"));
    let request = request.body(Body::from(body.to_vec())).expect("a valid head");
    let Ok(response) = runtime.block_on(router.clone().oneshot(request));
    let status = response.status().as_u16();
    // 404: a multipart field names the set.
    assert!([200, 400, 404, 413, 415, 422].contains(&status), "answered {status}");
}

fn start() -> Result<(Runtime, Router), Box<dyn std::error::Error + Send + Sync>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let router = runtime.block_on(async {
        // The small model: what is fuzzed is the way to it.
        let flags = [
            "butterflyvit",
            "--trust-loopback",
            "--default-set=cifar100",
            "--compute-threads=1",
            "--decode-threads=1",
            "--request-timeout=1h",
        ];
        let args = Cli::try_parse_from(flags)?.serve;
        let app = serve::assemble(&args)?;
        serve::make_ready(&app, &args).await?;
        Ok::<_, Box<dyn std::error::Error + Send + Sync>>(http::build_router(app)?)
    })?;
    Ok((runtime, router))
}
