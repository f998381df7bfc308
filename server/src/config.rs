//! Everything that can be set, as command-line flags and `BVIT_` variables, one struct per concern.
//!
//! Variables are prefixed because docker and systemd put unprefixed ones such as `HOSTNAME` into every environment.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::time::Duration;

use clap::builder::PossibleValuesParser;
use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};
use model_core::config::ViTConfig;
use model_core::image::{Crop, Fit};

use crate::admission::{Ceilings, ImageLimits};
use crate::http::origin::parse_origin;
use crate::sentence::nearest;
use crate::units::{ByteSize, parse_duration};
use crate::verdict::MinScore;

/// Image-classification inference server for edge gateways: ButterflyViT over HTTP.
#[derive(Debug, Parser)]
#[command(name = "butterflyvit", version, args_conflicts_with_subcommands = true)]
pub struct Cli {
    /// What to do; `serve` when left out.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// Flags of `serve`, for when it is left out.
    #[command(flatten)]
    pub serve: ServeArgs,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve over HTTP (the default).
    Serve(Box<ServeArgs>),
    /// Classify image files here, without a server.
    Classify(ClassifyArgs),
    /// Make an expert set from a folder of images by class.
    Teach(TeachArgs),
    /// Show where the bytes of an artifact go.
    Inspect(InspectArgs),
    /// Time layer and model on random weights, beside the dense experts they replace.
    Bench(BenchArgs),
    /// Print the admin key that a server on this machine made at its start.
    AdminKey(AdminKeyArgs),
    /// Ask a running server whether it is ready; exit code 0 when it is, 1 when not.
    Healthcheck(HealthcheckArgs),
}

#[derive(Debug, Clone, Args)]
pub struct ServeArgs {
    /// Address and port to listen on; port 0 takes a free one.
    #[arg(long, env = "BVIT_LISTEN", default_value = "127.0.0.1:8000", value_name = "ADDR:PORT")]
    pub listen: SocketAddr,
    /// Which models to serve.
    #[command(flatten)]
    pub models: ModelArgs,
    /// What a request may cost.
    #[command(flatten)]
    pub limits: LimitArgs,
    /// How work is queued and batched.
    #[command(flatten)]
    pub pipeline: PipelineArgs,
    /// How expert sets come and go.
    #[command(flatten)]
    pub registry: RegistryArgs,
    #[command(flatten)]
    pub cameras: CameraArgs,
    /// What sets are taught from.
    #[command(flatten)]
    pub teaching: TeachingArgs,
    /// Who may do what.
    #[command(flatten)]
    pub auth: AuthArgs,
    #[command(flatten)]
    pub tls: TlsArgs,
    #[command(flatten)]
    pub log: LogArgs,
    /// Give every expert set its own series in the metrics that carry a `set` label.
    #[arg(
        long,
        env = "BVIT_PER_SET_METRICS",
        default_value_t = true,
        action = clap::ArgAction::Set,
        value_name = "BOOL",
        help_heading = "Metrics"
    )]
    pub per_set_metrics: bool,
}

/// Which models to use; shared by `serve` and `classify`.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Models")]
pub struct ModelArgs {
    /// Folder with `backbones/NAME.safetensors` and `expert-sets/SET/VERSION.safetensors`; without it the models
    /// embedded in this program are used. They are copied into a store that is empty.
    #[arg(long, env = "BVIT_MODEL_STORE", value_name = "DIR")]
    pub model_store: Option<PathBuf>,
    /// Expert set used when a request names none; without it `imagenet`, or the first by name of a store without that.
    #[arg(long, env = "BVIT_DEFAULT_SET", value_name = "SET")]
    pub default_set: Option<String>,
}

/// What a request may cost.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Limits")]
pub struct LimitArgs {
    /// Largest request body, after decompression.
    #[arg(long, env = "BVIT_MAX_BODY", default_value = "16MiB", value_name = "SIZE")]
    pub max_body: ByteSize,
    /// Bytes of request bodies held at once, all requests together.
    #[arg(long, env = "BVIT_BODY_MEMORY", default_value = "24MiB", value_name = "SIZE")]
    pub body_memory: ByteSize,
    /// Most pixels (width times height) of an image.
    #[arg(long, env = "BVIT_MAX_PIXELS", default_value_t = 16_777_216, value_name = "N")]
    pub max_pixels: u64,
    /// Most images in one request.
    #[arg(long, env = "BVIT_MAX_IMAGES", default_value_t = 32, value_name = "N")]
    pub max_images: usize,
    /// Most requests being worked on at once; more are answered 429.
    #[arg(long, env = "BVIT_MAX_REQUESTS", default_value_t = 256, value_name = "N")]
    pub max_requests: usize,
    /// Most open connections; more are answered 503 and closed.
    #[arg(long, env = "BVIT_MAX_CONNECTIONS", default_value_t = 1024, value_name = "N")]
    pub max_connections: usize,
    /// Percentage of connections, requests, queued images and body bytes that one address (of IPv6: one /64 network) may
    /// take, but always one full request; 100 for no such limit. Behind a reverse proxy, all clients have its address: 100.
    #[arg(long, env = "BVIT_CLIENT_SHARE", default_value_t = 25, value_name = "PERCENT", value_parser = clap::value_parser!(u8).range(1..=100))]
    pub client_share: u8,
    /// Longest time from the last byte of a request to its answer.
    #[arg(long, env = "BVIT_REQUEST_TIMEOUT", default_value = "10s", value_parser = parse_duration, value_name = "TIME")]
    pub request_timeout: Duration,
    /// Longest time a client may take to send its headers, or between two requests on one connection.
    #[arg(long, env = "BVIT_HEADER_TIMEOUT", default_value = "10s", value_parser = parse_duration, value_name = "TIME")]
    pub header_timeout: Duration,
    /// Longest time a client may take to send any more of a body, which is also to come with 4 KiB a second on average.
    #[arg(long, env = "BVIT_BODY_TIMEOUT", default_value = "8s", value_parser = parse_duration, value_name = "TIME")]
    pub body_timeout: Duration,
    /// Longest time a client may take to read any more bytes of an answer.
    #[arg(long, env = "BVIT_WRITE_TIMEOUT", default_value = "10s", value_parser = parse_duration, value_name = "TIME")]
    pub write_timeout: Duration,
    /// Largest expert set that may be uploaded.
    #[arg(long, env = "BVIT_MAX_UPLOAD", default_value = "64MiB", value_name = "SIZE")]
    pub max_upload: ByteSize,
    /// Longest time to finish accepted work after SIGTERM.
    #[arg(long, env = "BVIT_DRAIN_TIMEOUT", default_value = "25s", value_parser = parse_duration, value_name = "TIME")]
    pub drain_timeout: Duration,
}

/// How work is queued and batched.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Queue and batching")]
pub struct PipelineArgs {
    /// Most images from admission to answer; more are answered 429. While more come than can be served, only as many are
    /// let in as keep the compute threads busy.
    #[arg(long, env = "BVIT_QUEUE_IMAGES", default_value_t = 64, value_name = "N")]
    pub queue_images: usize,
    /// Most bytes of preprocessed images on their way; part of the memory budget. They hold a full request: `--max-images`
    /// images of the largest backbone, each 12 bytes a pixel.
    #[arg(long, env = "BVIT_QUEUE_BYTES", default_value = "14MiB", value_name = "SIZE")]
    pub queue_bytes: ByteSize,
    /// Most of these images that may belong to one expert set; without it three quarters of the queue.
    #[arg(long, env = "BVIT_SET_QUEUE_IMAGES", value_name = "N")]
    pub set_queue_images: Option<usize>,
    /// Most images in one batch.
    #[arg(long, env = "BVIT_MAX_BATCH", default_value_t = 4, value_name = "N")]
    pub max_batch: usize,
    /// How long the oldest image may wait for company; with 0 a batch closes as soon as a compute thread is free.
    #[arg(long, env = "BVIT_MAX_WAIT", default_value = "0ms", value_parser = parse_duration, value_name = "TIME")]
    pub max_wait: Duration,
    /// Threads that run the model; 0 for one per core, at most 8. Each takes scratch from the memory budget.
    #[arg(long, env = "BVIT_COMPUTE_THREADS", default_value_t = 0, value_name = "N")]
    pub compute_threads: usize,
    /// Threads that decode images; 0 for one per core, at most 8.
    #[arg(long, env = "BVIT_DECODE_THREADS", default_value_t = 0, value_name = "N")]
    pub decode_threads: usize,
    /// Bytes that images being decoded may take together: others wait. A JPEG or PNG that takes more by itself is decoded
    /// at a smaller scale, any other image is answered 413.
    #[arg(long, env = "BVIT_DECODE_MEMORY", default_value = "60MiB", value_name = "SIZE")]
    pub decode_memory: ByteSize,
}

impl PipelineArgs {
    /// Bounds on images, with so many compute threads.
    pub fn image_limits(&self, compute_threads: usize) -> ImageLimits {
        // One that runs and one that comes while it does keep a thread busy; where images wait for company, a batch each.
        let per_thread = if self.max_wait.is_zero() { self.max_batch } else { self.max_batch.saturating_mul(2) };
        // Of three, one set may have two.
        let images_when_busy = compute_threads.saturating_mul(per_thread.max(2)).max(3);
        ImageLimits {
            images: self.queue_images,
            bytes: self.queue_bytes.0,
            images_per_set: self.images_per_set(),
            images_when_busy: images_when_busy.min(self.queue_images),
        }
    }

    /// Most images of one expert set.
    pub fn images_per_set(&self) -> usize {
        self.set_queue_images.unwrap_or(self.queue_images - self.queue_images / 4).min(self.queue_images)
    }
}

/// How expert sets come and go.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Expert sets")]
pub struct RegistryArgs {
    /// Bytes that backbones, resident expert sets, scratch and queue may take together.
    #[arg(long, env = "BVIT_MEMORY_BUDGET", default_value = "64MiB", value_name = "SIZE")]
    pub memory_budget: ByteSize,
    /// Expert sets to load at start and never evict.
    #[arg(long, env = "BVIT_PIN", value_delimiter = ',', value_name = "SET")]
    pub pin: Vec<String>,
    /// Threads that load expert sets.
    #[arg(long, env = "BVIT_LOAD_THREADS", default_value_t = 2, value_name = "N")]
    pub load_threads: usize,
    /// How long a request waits for its expert set to be loaded before it is answered 503.
    #[arg(long, env = "BVIT_LOAD_WAIT", default_value = "5s", value_parser = parse_duration, value_name = "TIME")]
    pub load_wait: Duration,
    /// Drop a backbone from memory together with its last resident expert set.
    #[arg(long, env = "BVIT_DROP_IDLE_BACKBONES", default_value_t = false)]
    pub drop_idle_backbones: bool,
    /// Look for files changed by hand in the model store this often; 0 for never. Uploads and loads asked for over
    /// HTTP need no watching.
    #[arg(long, env = "BVIT_WATCH_STORE", default_value = "0s", value_parser = parse_duration, value_name = "TIME")]
    pub watch_store: Duration,
    /// Refuse to start when any file of the model store is broken.
    #[arg(long, env = "BVIT_STRICT", default_value_t = false)]
    pub strict: bool,
}

/// Cameras that the server asks for pictures.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Cameras")]
pub struct CameraArgs {
    /// File of cameras in TOML, which the server reads again when it changes; `docs/cameras.md` says what it holds.
    #[arg(long, env = "BVIT_CAMERAS", value_name = "FILE")]
    pub cameras: Option<PathBuf>,
}

/// What sets are taught from.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Teaching")]
pub struct TeachingArgs {
    /// Folder for the pictures that are sent to `/teach`, by set and label; without it none are taken.
    #[arg(long, env = "BVIT_EXAMPLES", value_name = "DIR")]
    pub examples: Option<PathBuf>,
    /// Most bytes that these pictures may take on the disk.
    #[arg(long, env = "BVIT_EXAMPLES_BUDGET", default_value = "256MiB", value_name = "SIZE")]
    pub examples_budget: ByteSize,
    /// Keep the last N frames of each set there that were unknown or unsure, to be labelled.
    #[arg(long, env = "BVIT_KEEP_UNSURE", default_value_t = 0, value_name = "N", requires = "examples", value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(..=1000))]
    pub keep_unsure: usize,
}

/// Keys and rates. The server reads keys from the environment or a file so that they do not show in a process list.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Keys")]
pub struct AuthArgs {
    /// File of admin keys, one `NAME:KEY` or `KEY` a line; without admin keys the server makes one at start.
    #[arg(long, env = "BVIT_ADMIN_KEY_FILE", value_name = "FILE")]
    pub admin_key_file: Option<PathBuf>,
    /// Where the server writes the admin key that it makes when it is given none; `butterflyvit admin-key` prints it.
    /// Without this flag `butterflyvit-PORT.admin-key` in the user's or service's runtime folder, or among temporary files.
    #[arg(long, env = "BVIT_ADMIN_KEY_OUT", value_name = "FILE")]
    pub admin_key_out: Option<PathBuf>,
    /// Make no admin key: anyone on this machine may manage without one. For a laptop: a reverse proxy on this machine
    /// lets everybody manage.
    #[arg(long, env = "BVIT_TRUST_LOOPBACK", default_value_t = false, conflicts_with_all = ["admin_key_file", "admin_key_out"])]
    pub trust_loopback: bool,
    /// Other site whose pages may send requests and read answers, as `https://HOST` or `https://HOST:PORT`; several
    /// separated by commas. Without one, what pages of other sites send is refused unless it carries a key.
    #[arg(long, env = "BVIT_CORS_ORIGIN", value_delimiter = ',', value_parser = parse_origin, value_name = "ORIGIN")]
    pub cors_origin: Vec<String>,
    /// File of user keys, one `NAME:KEY` or `KEY` a line; without user keys anyone may classify.
    #[arg(long, env = "BVIT_USER_KEY_FILE", value_name = "FILE")]
    pub user_key_file: Option<PathBuf>,
    /// Images that each user key may have classified per second, on average; more are answered 429.
    #[arg(long, env = "BVIT_KEY_RATE", value_name = "N")]
    pub key_rate: Option<NonZeroU32>,
    /// Images that a user key may send at once after a rest; without it the rate, and at least one full request.
    #[arg(long, env = "BVIT_KEY_BURST", value_name = "N", requires = "key_rate")]
    pub key_burst: Option<NonZeroU32>,
}

/// The certificate; without one connections are plain HTTP.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "TLS")]
pub struct TlsArgs {
    /// File with the certificate chain in PEM format.
    #[arg(long, env = "BVIT_TLS_CERT", value_name = "FILE", requires = "tls_key")]
    pub tls_cert: Option<PathBuf>,
    /// File with the certificate's key in PEM format.
    #[arg(long, env = "BVIT_TLS_KEY", value_name = "FILE", requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,
    /// How often to look whether certificate or key have changed.
    #[arg(long, env = "BVIT_TLS_RELOAD", default_value = "10s", value_parser = parse_duration, value_name = "TIME")]
    pub tls_reload: Duration,
}

/// Logs, to standard output; standard error says only why the program stops.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Logs")]
pub struct LogArgs {
    /// What to log: a level, or `tracing` directives such as `butterflyvit=debug,hyper=warn`.
    #[arg(long, env = "BVIT_LOG", default_value = "info", value_name = "FILTER")]
    pub log: String,
    /// Text for people or JSON for collectors.
    #[arg(long, env = "BVIT_LOG_FORMAT", default_value = "text", value_name = "FORMAT")]
    pub log_format: LogFormat,
}

/// How a log line looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// One line of text.
    Text,
    /// One JSON object a line.
    Json,
}

#[derive(Debug, Clone, Args)]
pub struct ClassifyArgs {
    /// Files of images, in the formats that the server reads.
    #[arg(required = true, value_name = "FILE")]
    pub files: Vec<PathBuf>,
    /// Which models to use.
    #[command(flatten)]
    pub models: ModelArgs,
    /// Expert set to use.
    #[arg(long, env = "BVIT_SET", value_name = "SET")]
    pub set: Option<String>,
    /// The part of each picture to look at, of the upright picture: in shares when any of the four has a decimal point or
    /// all are at most 1, otherwise in pixels; the set decides when left out.
    #[arg(long, env = "BVIT_CROP", value_name = "X,Y,W,H")]
    pub crop: Option<Crop>,
    /// How that part becomes a square, `crop`, `pad` or `stretch`; the set decides when left out.
    #[arg(long, env = "BVIT_FIT", value_name = "FIT")]
    pub fit: Option<Fit>,
    /// Say that a picture is unknown when the best label's score is lower, from 0 to 1.
    #[arg(long, env = "BVIT_MIN_SCORE", value_name = "SCORE")]
    pub min_score: Option<MinScore>,
    /// How many labels to print for each image.
    #[arg(long, env = "BVIT_TOP_K", default_value_t = 5, value_name = "N")]
    pub top_k: usize,
    /// Print one JSON document a file.
    #[arg(long, env = "BVIT_JSON")]
    pub json: bool,
    /// Print every logit too.
    #[arg(long, env = "BVIT_LOGITS")]
    pub logits: bool,
    /// Most pixels (width times height) of an image.
    #[arg(long, env = "BVIT_MAX_PIXELS", default_value_t = 16_777_216, value_name = "N")]
    pub max_pixels: u64,
}

#[derive(Debug, Clone, Args)]
pub struct TeachArgs {
    /// A folder with a subfolder for each class, named as its label, that holds images of it.
    #[arg(value_name = "FOLDER")]
    pub folder: PathBuf,
    /// Name of the expert set; a set that is there gets another version.
    #[arg(long, env = "BVIT_SET", value_name = "SET")]
    pub set: String,
    /// Model store that the set goes to; made when it is not there. A server on it has the set at its next start, or
    /// when it looks again.
    #[arg(long, env = "BVIT_STORE", value_name = "DIR", required_unless_present = "server", conflicts_with = "server")]
    pub store: Option<PathBuf>,
    /// Server that the set goes to, as http://127.0.0.1:8000: it answers with the set at once.
    #[arg(long, env = "BVIT_SERVER", value_name = "URL")]
    pub server: Option<String>,
    /// File whose first admin key, `NAME:KEY` or `KEY`, is sent to the server; without it the key that a server on this
    /// machine made at its start.
    #[arg(long, env = "BVIT_ADMIN_KEY_FILE", value_name = "FILE")]
    pub admin_key_file: Option<PathBuf>,
    /// The certificate of the server, when it speaks TLS.
    #[arg(long, env = "BVIT_TLS_CERT", value_name = "FILE")]
    pub tls_cert: Option<PathBuf>,
    /// Backbone to teach on: a file, the name of one in the store, or of an embedded one; it is copied into the store when
    /// it is not there. Without it the store's only one, otherwise the embedded one for photographs.
    #[arg(long, env = "BVIT_BACKBONE", value_name = "FILE|NAME")]
    pub backbone: Option<String>,
    /// Expert set whose experts the new one borrows, on a backbone with blocks: a file, the name of one in the store, or of an
    /// embedded one; it is copied into the store when it is not there. Without it the only one on that backbone.
    #[arg(long, env = "BVIT_BASE", value_name = "FILE|NAME")]
    pub base: Option<String>,
    /// The part of each picture that the set looks at, in shares of the upright picture.
    #[arg(long, env = "BVIT_CROP", value_name = "X,Y,W,H")]
    pub crop: Option<Crop>,
    /// How that part becomes a square: `crop`, `pad` or `stretch`.
    #[arg(long, env = "BVIT_FIT", value_name = "FIT")]
    pub fit: Option<Fit>,
    /// Threads that compute; without it one for each core.
    #[arg(long, env = "BVIT_COMPUTE_THREADS", value_name = "N")]
    pub threads: Option<usize>,
    /// Print the report as one JSON document.
    #[arg(long, env = "BVIT_JSON")]
    pub json: bool,
}

impl TeachArgs {
    /// The part of each picture, in shares.
    ///
    /// # Errors
    /// When it is in pixels: pictures may differ in size.
    pub fn crop_shares(&self) -> anyhow::Result<[f64; 4]> {
        match self.crop.unwrap_or_default() {
            Crop::Shares(shares) => Ok(shares),
            Crop::Pixels(_) => {
                anyhow::bail!("the crop of a set is in shares of the picture, from 0 to 1, not in pixels")
            }
        }
    }
}

#[derive(Debug, Clone, Args)]
pub struct InspectArgs {
    /// A backbone or expert set; without it the embedded ones.
    #[arg(value_name = "FILE")]
    pub file: Option<PathBuf>,
    /// Print JSON in place of text.
    #[arg(long, env = "BVIT_JSON")]
    pub json: bool,
}

/// Flags of `bench`. `BVIT_ISA` forces an instruction set here as elsewhere.
#[derive(Debug, Clone, Args)]
pub struct BenchArgs {
    /// The configuration whose shapes are timed.
    #[arg(long, env = "BVIT_PRESET", default_value = "paper", value_parser = PossibleValuesParser::new(ViTConfig::PRESETS))]
    pub preset: String,
    /// Numbers of experts per layer to try.
    #[arg(long, env = "BVIT_EXPERTS", value_delimiter = ',', default_value = "8,64,256", value_name = "N,..")]
    pub experts: Vec<usize>,
    /// Threads that run our layer and model; dense experts always have one.
    #[arg(long, env = "BVIT_COMPUTE_THREADS", default_value_t = 1, value_name = "N")]
    pub threads: usize,
    /// Images of a batch through the model.
    #[arg(long, env = "BVIT_BATCH", default_value_t = 1, value_name = "N")]
    pub batch: usize,
    /// How long to repeat each measurement.
    #[arg(long, env = "BVIT_DURATION", default_value = "1s", value_parser = parse_duration, value_name = "TIME")]
    pub duration: Duration,
    /// Leave dense experts out: they take `8 * d_model * d_ff` bytes each.
    #[arg(long, env = "BVIT_NO_DENSE")]
    pub no_dense: bool,
    /// Print JSON in place of text.
    #[arg(long, env = "BVIT_JSON")]
    pub json: bool,
}

#[derive(Debug, Clone, Args)]
pub struct AdminKeyArgs {
    /// Address the server listens on.
    #[arg(long, env = "BVIT_LISTEN", default_value = "127.0.0.1:8000", value_name = "ADDR:PORT")]
    pub listen: SocketAddr,
    /// Where the server wrote the key, when it was told where.
    #[arg(long, env = "BVIT_ADMIN_KEY_OUT", value_name = "FILE")]
    pub admin_key_out: Option<PathBuf>,
}

#[derive(Debug, Clone, Args)]
pub struct HealthcheckArgs {
    /// Address the server listens on.
    #[arg(long, env = "BVIT_LISTEN", default_value = "127.0.0.1:8000", value_name = "ADDR:PORT")]
    pub listen: SocketAddr,
    /// The certificate the server was given, when it speaks TLS.
    #[arg(long, env = "BVIT_TLS_CERT", value_name = "FILE")]
    pub tls_cert: Option<PathBuf>,
    /// How long to wait for the answer.
    #[arg(long, env = "BVIT_HEALTHCHECK_TIMEOUT", default_value = "3s", value_parser = parse_duration, value_name = "TIME")]
    pub timeout: Duration,
}

/// Most threads of a kind unless asked for more: each compute thread's scratch comes out of the memory budget, 3.6 MB with
/// the default model, and the default budget has to hold expert sets, too.
const MOST_THREADS_BY_DEFAULT: usize = 8;

/// `requested` threads, or one per core, at most 8, when it is 0.
pub fn threads_or_cores(requested: usize) -> usize {
    match requested {
        0 => std::thread::available_parallelism().map_or(1, usize::from).min(MOST_THREADS_BY_DEFAULT),
        n => n,
    }
}

/// Parses a command line.
///
/// # Errors
/// clap's error; [`one_line`] makes it fit on one line. `--help` and `--version` come as errors too.
pub fn parse(args: impl IntoIterator<Item = std::ffi::OsString>) -> Result<Cli, clap::Error> {
    let cli = Cli::try_parse_from(args)?;
    if let Some(serve) = match &cli.command {
        None => Some(&cli.serve),
        Some(Command::Serve(serve)) => Some(serve.as_ref()),
        Some(_) => None,
    } {
        serve.validate()?;
    }
    Ok(cli)
}

/// A sentence for each variable that looks like a setting and is none. Values may be keys, so none is said.
pub fn unknown_variables(names: impl Iterator<Item = OsString>) -> Vec<String> {
    /// Variables without a flag.
    const OTHERS: [&str; 3] = ["BVIT_ADMIN_KEYS", "BVIT_USER_KEYS", "BVIT_ISA"];
    let command = Cli::command();
    let commands = std::iter::once(&command).chain(command.get_subcommands());
    let mut known: BTreeSet<&str> =
        commands.flat_map(clap::Command::get_arguments).filter_map(|arg| arg.get_env()?.to_str()).collect();
    known.extend(OTHERS);
    let settings = names.map(|name| name.to_string_lossy().into_owned()).filter(|name| name.starts_with("BVIT_"));
    let unknown = settings.filter(|name| !known.contains(name.as_str()));
    let sentence = |name: String| {
        // Every name begins alike.
        let ends: Vec<&str> = known.iter().filter_map(|known| known.strip_prefix("BVIT_")).collect();
        let meant = name.strip_prefix("BVIT_").and_then(|end| nearest(end, &ends));
        let meant = meant.map(|meant| format!("; did you mean `BVIT_{meant}`?")).unwrap_or_default();
        format!("no setting is called `{name}`{meant}")
    };
    unknown.map(sentence).collect()
}

impl ServeArgs {
    /// What one client may hold at once.
    pub fn ceilings(&self) -> Ceilings {
        let LimitArgs { client_share, max_connections, max_requests, max_images, max_body, body_memory, .. } =
            self.limits;
        if client_share == 100 {
            return Ceilings::NONE;
        }
        // Rounded up, so that a limit of one has a share of one.
        let share = |limit: usize| (limit as u128 * u128::from(client_share)).div_ceil(100) as usize;
        // A request that passes when nothing else is going on has to pass for a client that sends nothing else.
        let images = share(self.pipeline.queue_images).max(max_images);
        Ceilings([share(max_connections), share(max_requests), images, share(body_memory.0).max(max_body.0)])
    }

    /// Images that a user key may send at once.
    pub fn key_burst(&self) -> NonZeroU32 {
        let full_request = u32::try_from(self.limits.max_images).ok().and_then(NonZeroU32::new);
        let burst = self.auth.key_burst.or(self.auth.key_rate.max(full_request));
        burst.unwrap_or(NonZeroU32::MIN)
    }

    /// Flags that make no sense are refused at start, not discovered under load.
    fn validate(&self) -> Result<(), clap::Error> {
        let LimitArgs { max_body, body_memory, max_pixels, max_images, max_requests, max_connections, .. } =
            self.limits;
        let PipelineArgs { queue_images, max_batch, .. } = self.pipeline;
        let positive: [(&str, u64); 8] = [
            ("--max-body", max_body.0 as u64),
            ("--max-pixels", max_pixels),
            ("--max-images", max_images as u64),
            ("--max-requests", max_requests as u64),
            ("--max-connections", max_connections as u64),
            ("--queue-images", queue_images as u64),
            ("--max-batch", max_batch as u64),
            ("--load-threads", self.registry.load_threads as u64),
        ];
        for (flag, value) in positive {
            if value == 0 {
                return Err(invalid(format!("{flag} must be at least 1")));
            }
        }
        if self.limits.max_connections > tokio::sync::Semaphore::MAX_PERMITS {
            return Err(invalid(format!("--max-connections must be at most {}", tokio::sync::Semaphore::MAX_PERMITS)));
        }
        if body_memory < max_body {
            return Err(invalid(format!("--body-memory {body_memory} is below --max-body {max_body}")));
        }
        // Otherwise a full batch would be told to try again, for ever in vain.
        let room = self.pipeline.images_per_set();
        if max_images > room {
            return Err(invalid(format!(
                "--max-images {max_images} is more than one expert set may queue: {room} by --queue-images \
                 {queue_images} and --set-queue-images"
            )));
        }
        if self.auth.key_burst.is_some_and(|burst| (burst.get() as usize) < max_images) {
            return Err(invalid(format!(
                "--key-burst is below --max-images {max_images}: a full request would never pass"
            )));
        }
        if self.tls.tls_reload.is_zero() {
            return Err(invalid("--tls-reload must be more than 0".into()));
        }
        Ok(())
    }
}

fn invalid(message: String) -> clap::Error {
    clap::Error::raw(clap::error::ErrorKind::ValueValidation, message)
}

/// The error on one line, without the usage text that clap adds.
pub fn one_line(error: &clap::Error) -> String {
    let text = error.render().to_string();
    let first_paragraph: Vec<&str> = text.lines().take_while(|line| !line.trim().is_empty()).map(str::trim).collect();
    let message = first_paragraph.join(" ");
    message.strip_prefix("error: ").unwrap_or(&message).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse_strs(args: &[&str]) -> Result<Cli, clap::Error> {
        parse(std::iter::once("butterflyvit").chain(args.iter().copied()).map(Into::into))
    }

    #[test]
    fn the_command_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn serve_is_the_default() {
        let cli = parse_strs(&["--listen", "127.0.0.1:0"]).unwrap();
        assert!(cli.command.is_none());
        assert_eq!(cli.serve.listen.port(), 0);
        let cli = parse_strs(&["serve", "--max-batch", "3"]).unwrap();
        assert!(matches!(cli.command, Some(Command::Serve(serve)) if serve.pipeline.max_batch == 3));
    }

    #[test]
    fn every_flag_is_also_a_prefixed_variable() {
        let check = |command: &clap::Command| {
            for arg in command.get_arguments().filter(|arg| arg.get_long().is_some()) {
                if !["help", "version"].contains(&arg.get_id().as_str()) {
                    let env = arg.get_env().map(|env| env.to_string_lossy().into_owned());
                    assert!(env.is_some_and(|env| env.starts_with("BVIT_")), "--{}", arg.get_long().unwrap());
                }
            }
        };
        let command = Cli::command();
        check(&command);
        command.get_subcommands().for_each(check);
    }

    #[test]
    fn a_variable_that_is_no_setting_is_named_without_its_value() {
        let names = ["BVIT_MAX_BODY", "BVIT_ADMIN_KEYS", "BVIT_ISA", "BVIT_TOP_K", "PATH", "BVIT_MAXBODY", "BVIT_X"];
        let said = unknown_variables(names.map(OsString::from).into_iter());
        assert_eq!(
            said,
            ["no setting is called `BVIT_MAXBODY`; did you mean `BVIT_MAX_BODY`?", "no setting is called `BVIT_X`"]
        );
    }

    #[test]
    fn a_wrong_flag_is_one_line() {
        for args in [&["--nonsense"][..], &["--max-body", "lots"], &["--max-batch", "0"], &["classify"]] {
            let line = one_line(&parse_strs(args).unwrap_err());
            assert!(!line.contains('\n') && !line.is_empty(), "{line:?}");
        }
        assert_eq!(one_line(&parse_strs(&["--max-batch", "0"]).unwrap_err()), "--max-batch must be at least 1");
    }
}
