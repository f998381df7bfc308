//! Logs go to standard output, as text or JSON: standard error is left to the one line that says why a start failed.
//! Nothing that serves waits for either of them.

mod writer;

use std::io::{IsTerminal, Write};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use anyhow::Context;
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

use crate::config::{LogArgs, LogFormat};
use crate::metrics::LOG_LINES_LOST;
use crate::repeats::REPEATS;
use writer::LastLines;

/// Longest wait for the reader of standard error.
const COMPLAINT: Duration = Duration::from_secs(1);
/// How often [`report`] looks for something to say.
const REPORT_EVERY: Duration = Duration::from_secs(1);

/// The process's log. Dropping it at the end says what has not been said and waits for the last lines to be written.
pub struct Log {
    _last_lines: LastLines,
}

impl Drop for Log {
    fn drop(&mut self) {
        say_repeats(REPEATS.rest());
    }
}

/// Installs the process's subscriber, and a panic hook that logs through it.
///
/// # Errors
/// When the filter does not parse, or a subscriber is installed already.
pub fn init(args: &LogArgs) -> anyhow::Result<Log> {
    let filter = EnvFilter::try_new(&args.log).with_context(|| format!("--log {}", args.log))?;
    let output = writer::standard_output().context("standard output")?;
    let is_terminal = output.is_terminal();
    let lines = writer::LineQueue::start(output, LOG_LINES_LOST.clone()).context("threads")?;
    let last_lines = lines.last_lines();
    // An internal error of the subscriber would be printed to standard error, which may stand still.
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(lines).log_internal_errors(false);
    let installed = match args.log_format {
        LogFormat::Text => builder.with_ansi(is_terminal).with_target(false).try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    };
    installed.map_err(anyhow::Error::from_boxed)?;
    std::panic::set_hook(Box::new(log_panic));
    Ok(Log { _last_lines: last_lines })
}

/// Says once a second, until `stop`, what happened without a line of its own: lines that were lost, and repeated
/// refusals. The message about lost lines is a line like others: where it may be lost too, it is repeated.
pub async fn report(stop: CancellationToken) {
    let mut said = 0;
    while tokio::time::timeout(REPORT_EVERY, stop.cancelled()).await.is_err() {
        say_repeats(REPEATS.overdue(Instant::now()));
        let lost = LOG_LINES_LOST.get();
        if lost > said {
            let lines = lost - said;
            tracing::warn!(lines, "log lines were lost: the log's reader is too slow, or its disk is full");
            if LOG_LINES_LOST.get() == lost {
                said = lost;
            }
        }
    }
}

fn say_repeats(counts: Vec<(&'static str, u64)>) {
    for (kind, repeated) in counts {
        tracing::info!(kind, repeated, "happened again");
    }
}

/// A panic as one line of the log, in the log's format.
fn log_panic(panic: &std::panic::PanicHookInfo<'_>) {
    let Some(repeated) = REPEATS.admit("panic") else { return };
    let thread = std::thread::current();
    let location = panic.location().map(ToString::to_string);
    let payload = panic.payload();
    let cause =
        payload.downcast_ref::<&str>().copied().or_else(|| payload.downcast_ref::<String>().map(String::as_str));
    tracing::error!(
        thread = thread.name().unwrap_or("unnamed"),
        location = location.as_deref().unwrap_or("unknown"),
        cause = cause.unwrap_or("unknown"),
        repeated,
        "a thread panicked, which is a bug"
    );
}

/// Prints one line to standard error, and gives up when nobody reads it: the program is about to end.
pub fn complain(line: String) {
    let (done, written) = channel();
    let write = move || {
        // A closed standard error leaves nobody to tell.
        let _ = writeln!(std::io::stderr(), "{line}");
        let _ = done.send(());
    };
    if std::thread::Builder::new().spawn(write).is_ok() {
        let _ = written.recv_timeout(COMPLAINT);
    }
}
