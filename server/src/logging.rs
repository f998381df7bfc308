//! Logs go to standard output, as text or JSON: standard error is left to the one line that says why a start failed.

use std::io::IsTerminal;

use anyhow::Context;
use tracing_subscriber::EnvFilter;

use crate::config::{LogArgs, LogFormat};

/// Installs the process's subscriber.
///
/// # Errors
/// When the filter does not parse, or a subscriber is installed already.
pub fn init(args: &LogArgs) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(&args.log).with_context(|| format!("--log {}", args.log))?;
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stdout);
    let installed = match args.log_format {
        LogFormat::Text => builder.with_ansi(std::io::stdout().is_terminal()).with_target(false).try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    };
    installed.map_err(anyhow::Error::from_boxed)
}
