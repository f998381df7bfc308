//! What a person at the terminal reads.

use std::io::Write;

use anyhow::{Context, Result};

/// To the person at the terminal; results go to standard output, everything else here.
pub(crate) fn say(line: &str) {
    eprintln!("{line}");
}

/// Results to standard output. A reader that has gone (`| head`) is no failure.
pub(crate) fn print(text: &str) -> Result<()> {
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error).context("writing the result"),
        _ => Ok(()),
    }
}
