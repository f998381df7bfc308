//! `butterflyvit admin-key`: for scripts, and for containers without a shell.

use std::process::ExitCode;

use anyhow::Context;

use crate::config::AdminKeyArgs;
use crate::made_key;

/// Prints the key on a line.
///
/// # Errors
/// A sentence that names the file.
pub fn run(args: &AdminKeyArgs) -> anyhow::Result<ExitCode> {
    let path = args.admin_key_out.clone().unwrap_or_else(|| made_key::default_path(args.listen.port()));
    println!("{}", made_key::read(&path).with_context(|| path.display().to_string())?);
    Ok(ExitCode::SUCCESS)
}
