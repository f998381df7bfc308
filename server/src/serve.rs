//! From flags to a running server and back: put the application together, listen, drain, end.

use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use model_core::engine::{Crew, Member};
use model_core::image::DecodeLimits;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::net::{TcpListener, TcpSocket};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Semaphore;

use crate::admission::{self, Admission, Shares};
use crate::app::{App, AppState, Limits};
use crate::cameras::Cameras;
use crate::classify::Classifier;
use crate::compute::Pipeline;
use crate::compute::decode::Decoder;
use crate::compute::queue::QueueSettings;
use crate::config::{self, LimitArgs, ServeArgs, TeachingArgs, threads_or_cores};
use crate::examples::Examples;
use crate::fitting::Fitting;
use crate::http::answer::ANSWER_MEMORY;
use crate::http::build_router;
use crate::keys::Keys;
use crate::memory::ProcessMemory;
use crate::metrics::{ImageResult, Metrics, saturating};
use crate::net::connection::{ConnectionSettings, Stop, serve};
use crate::net::tls::Tls;
use crate::sets::catalog::{self, Catalog};
use crate::sets::loaded::{ArtifactSource, Row, SetLease, SetRegistry};
use crate::sets::registry::{self, Registry};
use crate::sets::store::EMBEDDED_DEFAULT;
use crate::statistics::Statistics;
use crate::threads::{BlockingPool, Priority};
use crate::units::ByteSize;
use crate::{http, logging, made_key, pages};

/// Files that are open beside connections: probes' connections, the model store's files, uploads, the runtime's own.
const OTHER_FILES: u64 = 192;
/// Connections that may wait to be accepted; one more costs its client a second, after which TCP asks again.
const BACKLOG: u32 = 1024;
/// Longest wait for a set at start, while no client waits for an answer.
const START_WAIT: Duration = Duration::from_secs(60);
/// Longest time, once the server has drained, to tell an MQTT broker so.
const GOODBYE: Duration = Duration::from_secs(3);

/// What could not be started.
const NO_THREADS: &str = "threads";

/// Runs the server until SIGTERM, SIGINT or SIGHUP.
///
/// # Errors
/// Names what keeps it from starting.
pub fn run(args: &ServeArgs) -> anyhow::Result<()> {
    let _log = logging::init(&args.log)?;
    if !pages::give_back_large_blocks() {
        tracing::warn!("the C library's allocator does not take its setting: photos will take more memory");
    }
    for unknown in config::unknown_variables(std::env::vars_os().map(|(name, _)| name)) {
        tracing::warn!("{unknown}");
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let result = runtime.block_on(async {
        let listener = listen(args.listen).with_context(|| args.listen.to_string())?;
        let stop = stop_signals()?;
        let shutdown = stop.drain.clone();
        tokio::spawn(logging::report(shutdown.clone()));
        let settings = connection_settings(args)?;
        if let Some(tls) = settings.tls.clone() {
            tokio::spawn(tls.watch(args.tls.tls_reload, shutdown.clone()));
        }
        let address = listener.local_addr()?;
        // With the port that port 0 stands for, and as many connections as there can be.
        let limits = LimitArgs { max_connections: settings.max_connections, ..args.limits.clone() };
        let args = &ServeArgs { listen: address, limits, ..args.clone() };
        let app = assemble(args)?;
        let router = build_router(app.clone())?;
        if !args.registry.watch_store.is_zero() {
            tokio::spawn(catalog::watch(app.catalog.clone(), args.registry.watch_store, shutdown.clone()));
        }
        tracing::info!(%address, "listening");
        // The server answers probes while it loads models, so that a probe can tell a starting server from a dead one.
        let mut server = tokio::spawn(serve(listener, router, app.clone(), settings, stop));
        tokio::select! {
            ready = make_ready(&app, args) => ready?,
            stopped = &mut server => return Ok(stopped?),
        }
        let cameras = args.cameras.cameras.clone().map(|file| {
            let (classifier, default_set) = (Arc::clone(&app.classifier), app.default_set().to_owned());
            let cameras = app.cameras.clone();
            let running = cameras.run(file, classifier, default_set, app.limits.max_body_bytes, shutdown.clone());
            tokio::spawn(running)
        });
        server.await?;
        if let Some(cameras) = cameras {
            // The broker hears that the gateway has gone; one that does not listen is not waited for.
            let _ = tokio::time::timeout(GOODBYE, cameras).await;
        }
        Ok(())
    });
    // Work that has not ended by now had its time.
    runtime.shutdown_background();
    result
}

/// Listens with a [`BACKLOG`], which `TcpListener::bind` does not let one choose.
fn listen(address: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    // A server started over takes its port again while old connections linger.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

fn connection_settings(args: &ServeArgs) -> anyhow::Result<ConnectionSettings> {
    let max_connections = possible_connections(args.limits.max_connections);
    let tls = match (&args.tls.tls_cert, &args.tls.tls_key) {
        (Some(certificate), Some(key)) => Some(Tls::load(certificate.clone(), key.clone())?),
        _ => None,
    };
    Ok(ConnectionSettings {
        max_connections,
        header_timeout: args.limits.header_timeout,
        write_timeout: args.limits.write_timeout,
        drain_timeout: args.limits.drain_timeout,
        tls,
    })
}

/// `wanted` connections, or as many as the process may have open beside [`OTHER_FILES`].
fn possible_connections(wanted: usize) -> usize {
    // Shells and services start programs with 1024 open files allowed; more need only be asked for.
    let files = wanted as u64 + OTHER_FILES;
    match allow_open_files(files) {
        Ok(allowed) if allowed < files => {
            let possible = usize::try_from(allowed.saturating_sub(OTHER_FILES)).unwrap_or(usize::MAX).max(1);
            tracing::warn!(
                allowed,
                max_connections = possible,
                "few files may be open, so there are fewer connections"
            );
            possible
        }
        Ok(_) => wanted,
        Err(error) => {
            tracing::warn!(%error, "cannot ask for more open files");
            wanted
        }
    }
}

/// Raises the soft limit of open files to `wanted`, or as far as the hard limit lets it. Returns how many are allowed.
fn allow_open_files(wanted: u64) -> rustix::io::Result<u64> {
    let limit = getrlimit(Resource::Nofile);
    match limit.current {
        Some(current) if current < wanted => {
            let raised = limit.maximum.map_or(wanted, |most| most.min(wanted));
            setrlimit(Resource::Nofile, Rlimit { current: Some(raised), ..limit })?;
            Ok(raised)
        }
        current => Ok(current.unwrap_or(u64::MAX)),
    }
}

/// Puts the application together: every set of the store is known, none is loaded, and requests are answered 503.
pub fn assemble(args: &ServeArgs) -> anyhow::Result<AppState> {
    let metrics = Arc::new(Metrics::new(args.per_set_metrics)?);
    http::declare(&metrics);
    let compute_threads = threads_or_cores(args.pipeline.compute_threads);
    let (crew, members) = Crew::new(compute_threads);
    let registry = new_registry(args, crew, &metrics)?;
    let catalog = Catalog::open(args.models.model_store.clone(), registry.clone())?;
    if let Some(first) = catalog.broken().first().filter(|_| args.registry.strict) {
        bail!("{}", first.reason);
    }
    check_queue(args, &registry)?;
    let examples = open_examples(args)?;
    let batching = QueueSettings {
        max_batch: args.pipeline.max_batch,
        max_wait: args.pipeline.max_wait,
        threads: compute_threads,
    };
    let images = args.pipeline.image_limits(compute_threads);
    metrics.queue_capacity.set(saturating(images.images));
    admission::Resource::ALL.iter().for_each(|resource| metrics.declare_share(resource.as_str()));
    let shares = Shares::new(args.ceilings(), Some(metrics.share_refusals.clone()));

    let classifier = Classifier {
        registry,
        decoder: start_decoder(args, &metrics)?,
        pipeline: Pipeline::new(batching, members),
        admission: Admission::new(args.limits.max_requests, args.limits.body_memory.0, images, shares),
        metrics,
        statistics: Statistics::default(),
        load_wait: args.registry.load_wait,
        examples: examples.clone(),
    };
    let file = args.cameras.cameras.as_deref();
    let fitting = examples.clone().map(|examples| {
        let Classifier { registry, decoder, load_wait, .. } = &classifier;
        Fitting::start(examples, registry.clone(), catalog.clone(), decoder.clone(), *load_wait)
    });
    let cameras = file.map_or_else(|| Ok(Cameras::default()), |file| Cameras::open(file, &classifier))?;
    Ok(AppState::new(App {
        limits: Limits {
            max_body_bytes: args.limits.max_body.0,
            max_images: args.limits.max_images,
            request_timeout: args.limits.request_timeout,
            body_timeout: args.limits.body_timeout,
            max_upload_bytes: args.limits.max_upload.0,
        },
        default_set: OnceLock::new(),
        classifier: Arc::new(classifier),
        cameras,
        bulk: BlockingPool::start("bulk", 1, Priority::Normal).context(NO_THREADS)?,
        answers: Arc::new(Semaphore::new(ANSWER_MEMORY)),
        user_keys: user_keys(args)?,
        admin_keys: admin_keys(args)?,
        cors_origins: args.auth.cors_origin.clone(),
        trusts_loopback: args.auth.trust_loopback,
        catalog,
        examples,
        fitting: fitting.transpose().context(NO_THREADS)?,
        started: Instant::now(),
    }))
}

fn open_examples(args: &ServeArgs) -> anyhow::Result<Option<Examples>> {
    let TeachingArgs { examples, examples_budget, keep_unsure } = &args.teaching;
    examples.clone().map(|root| Examples::open(root, examples_budget.0 as u64, *keep_unsure)).transpose()
}

/// The threads that decode images.
fn start_decoder(args: &ServeArgs, metrics: &Arc<Metrics>) -> anyhow::Result<Decoder> {
    let limits = DecodeLimits {
        max_pixels: args.limits.max_pixels,
        max_bytes: args.pipeline.decode_memory.0 as u64,
        ..DecodeLimits::default()
    };
    let threads = threads_or_cores(args.pipeline.decode_threads);
    Decoder::start(threads, args.pipeline.decode_memory.0, limits, Arc::clone(metrics)).context(NO_THREADS)
}

/// Makes the application ready: the default set and the pinned ones are resident, and every compute
/// thread has run once.
pub async fn make_ready(app: &AppState, args: &ServeArgs) -> anyhow::Result<()> {
    let default = default_set(args, app).await?;
    let classifier = &app.classifier;
    classifier.metrics.declare_layers(default.backbone.value.config().num_layers);
    classifier.metrics.count_images(Some(&default.descriptor.name), ImageResult::Ok, 0);
    classifier.metrics.declare_answers(&default.descriptor.name, default.value.labels());
    // Set nowhere else, so this cannot fail.
    let _ = app.default_set.set(default.descriptor.name.clone());
    for name in &args.registry.pin {
        classifier.registry.pin(name, START_WAIT).await.with_context(|| format!("--pin {name}"))?;
    }
    start_compute(default, Arc::clone(classifier)).await?;
    // Before the log says so: a client that waits for that line may send requests at once.
    classifier.admission.lifecycle.set_ready();
    log_start(args, app);
    Ok(())
}

/// The admin keys that were given, or else one that the server makes. Coming from this machine is no right by itself: a
/// reverse proxy on this machine passes on requests from anywhere.
fn admin_keys(args: &ServeArgs) -> anyhow::Result<Keys> {
    let given = Keys::load(args.auth.admin_key_file.as_deref(), "BVIT_ADMIN_KEYS")?;
    if !given.is_empty() && args.auth.trust_loopback {
        bail!("--trust-loopback goes without admin keys, but BVIT_ADMIN_KEYS holds one");
    }
    if !given.is_empty() || args.auth.trust_loopback {
        return Ok(given);
    }
    let path = args.auth.admin_key_out.clone().unwrap_or_else(|| made_key::default_path(args.listen.port()));
    match made_key::make(&path) {
        Ok(key) => {
            tracing::info!(file = %path.display(), "made an admin key; management needs it");
            Keys::parse(&format!("made:{key}"))
        }
        Err(error) if args.auth.admin_key_out.is_some() => {
            Err(error).with_context(|| format!("--admin-key-out {}", path.display()))
        }
        Err(error) => {
            let file = path.display();
            tracing::warn!(%file, %error, "cannot write an admin key, so nobody may manage; see --admin-key-file");
            Ok(given)
        }
    }
}

fn user_keys(args: &ServeArgs) -> anyhow::Result<Keys> {
    let keys = Keys::load(args.auth.user_key_file.as_deref(), "BVIT_USER_KEYS")?;
    let Some(rate) = args.auth.key_rate else { return Ok(keys) };
    if keys.is_empty() {
        bail!("--key-rate needs user keys: --user-key-file or BVIT_USER_KEYS");
    }
    Ok(keys.with_rate(rate, args.key_burst()))
}

fn new_registry(args: &ServeArgs, crew: Crew, metrics: &Metrics) -> anyhow::Result<SetRegistry> {
    let settings = registry::Settings {
        budget_bytes: args.registry.memory_budget.0,
        queue_bytes: args.pipeline.queue_bytes.0,
        room_wait: args.registry.load_wait,
        drop_idle_backbones: args.registry.drop_idle_backbones,
        ..registry::Settings::default()
    };
    let source = ArtifactSource { crew, max_batch: args.pipeline.max_batch, queue_bytes: args.pipeline.queue_bytes.0 };
    let loader = BlockingPool::start("load", args.registry.load_threads, Priority::Background);
    Registry::new(source, settings, loader.context(NO_THREADS)?, metrics.sets().clone()).map_err(|_| {
        let (budget, queue) = (args.registry.memory_budget, args.pipeline.queue_bytes);
        anyhow!("--memory-budget {budget} does not even hold --queue-bytes {queue}")
    })
}

/// Refuses a queue that a full request of one of the backbones does not fit: it would be refused every time.
fn check_queue(args: &ServeArgs, registry: &SetRegistry) -> anyhow::Result<()> {
    let Some(largest) = registry.backbones().into_iter().max_by_key(|backbone| backbone.config.image_size) else {
        return Ok(());
    };
    let (images, queue) = (args.limits.max_images, args.pipeline.queue_bytes);
    let (name, side) = (&largest.name, largest.config.image_size);
    let needed = images.saturating_mul(side.pow(2) * 3 * size_of::<f32>());
    if needed > queue.0 {
        bail!(
            "--queue-bytes {queue} does not hold a full request: --max-images {images} of the backbone `{name}`, {side} x {side} \
             pixels each, take {needed} bytes; raise the one or lower the other"
        );
    }
    Ok(())
}

/// The default set, resident: the one asked for, or the first that loads of [`EMBEDDED_DEFAULT`] and the rest by name.
async fn default_set(args: &ServeArgs, app: &AppState) -> anyhow::Result<SetLease> {
    let registry = &app.classifier.registry;
    if let Some(name) = &args.models.default_set {
        return registry.load(name, None, START_WAIT).await.with_context(|| format!("--default-set {name}"));
    }
    if args.models.model_store.is_none() {
        return registry.load(EMBEDDED_DEFAULT, None, START_WAIT).await.context("the embedded model");
    }
    let mut names: Vec<String> = registry.names().into_iter().collect();
    names.sort_unstable_by_key(|name| (name != EMBEDDED_DEFAULT, name.clone()));
    let mut first_reason = app.catalog.broken().first().map(|broken| broken.reason.clone());
    for name in names {
        match registry.load(&name, None, START_WAIT).await {
            Ok(lease) => return Ok(lease),
            Err(error) => first_reason = first_reason.or_else(|| Some(error.to_string())),
        }
    }
    let store = args.models.model_store.as_ref().map_or("(embedded)".into(), |root| root.display().to_string());
    match first_reason {
        Some(reason) => bail!("no expert set can be loaded: {reason}"),
        None => bail!("{store}: no expert set in expert-sets/SET/VERSION.safetensors"),
    }
}

/// Starts the compute threads, after one forward pass on each one's scratch, so that the first request finds memory touched
/// and code paged in.
async fn start_compute(lease: SetLease, classifier: Arc<Classifier>) -> anyhow::Result<()> {
    let run = move || {
        let backbone = &lease.backbone.value;
        let pixels = vec![0.0; backbone.input_bytes() / size_of::<f32>()];
        let row = [Row { set: &lease.value, pixels: &pixels, routing: false }];
        let warm_up =
            |member: &mut Member| backbone.forward(member, &row, None).map(drop).context("the model does not run");
        classifier.pipeline.start(&classifier.metrics, warm_up)
    };
    tokio::task::spawn_blocking(run).await.map_err(anyhow::Error::from).flatten()
}

fn log_start(args: &ServeArgs, app: &AppState) {
    let (totals, memory) = (app.classifier.registry.totals(), ProcessMemory::read());
    let budget = args.registry.memory_budget;
    let (decode, bodies) = (args.pipeline.decode_memory, args.limits.body_memory);
    match memory.cgroup_limit {
        Some(limit) if budget.0 + decode.0 + bodies.0 > limit => {
            let limit = ByteSize(limit);
            tracing::warn!(%limit, %budget, %decode, %bodies, "the cgroup's memory limit is below what the flags allow");
        }
        Some(limit) => tracing::info!(limit = %ByteSize(limit), "a cgroup memory limit is in force"),
        None => tracing::info!("no cgroup memory limit is in force; the memory budget is enforced here"),
    }
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        default_set = app.default_set(),
        sets = totals.registered,
        budget = %budget,
        "ready"
    );
}

/// Listens for SIGTERM, SIGINT and SIGHUP: the first drains, the second hurries.
fn stop_signals() -> anyhow::Result<Stop> {
    let stop = Stop::default();
    let mut kinds = vec![SignalKind::terminate(), SignalKind::interrupt()];
    // Where SIGHUP is ignored, as under `nohup`, a terminal that closes is to end nothing.
    if !is_ignored(SignalKind::hangup()) {
        kinds.push(SignalKind::hangup());
    }
    let (sender, mut signals) = tokio::sync::mpsc::unbounded_channel();
    for kind in kinds {
        let (mut signal, sender) = (signal(kind)?, sender.clone());
        tokio::spawn(async move { while signal.recv().await.is_some() && sender.send(()).is_ok() {} });
    }
    let stopping = stop.clone();
    tokio::spawn(async move {
        signals.recv().await;
        stopping.drain.cancel();
        signals.recv().await;
        tracing::warn!("a second signal came: unanswered requests are dropped");
        stopping.hurry.cancel();
    });
    Ok(stop)
}

/// Whether this process was started with a signal ignored.
fn is_ignored(signal: SignalKind) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| u64::from_str_radix(line.strip_prefix("SigIgn:")?.trim(), 16).ok());
    mask.is_some_and(|mask| mask >> (signal.as_raw_value() - 1) & 1 == 1)
}
