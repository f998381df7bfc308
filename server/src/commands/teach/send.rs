//! A taught set on its way into a running server.

use anyhow::{Context, bail};
use serde_json::Value;

use crate::commands::remote::Remote;

/// The version after the highest that the server has of the set.
///
/// # Errors
/// When the server cannot be reached, or does not say.
pub(super) fn next_version(remote: &Remote, set: &str) -> anyhow::Result<u64> {
    let answer = remote.get(&format!("/sets/{set}"))?;
    let versions = match (answer.status, &answer.body) {
        (404, _) => return Ok(1),
        (200, Value::Array(versions)) => versions,
        _ => bail!("the server does not say which versions of `{set}` it has: {}", answer.reason()),
    };
    let highest = versions.iter().filter_map(|view| view["version"].as_u64()).max().unwrap_or(0);
    highest.checked_add(1).context("the set has the highest version there can be")
}

/// Uploads the set. It answers when this returns.
///
/// # Errors
/// When the server refuses it, in the server's words.
pub(super) fn upload(remote: &Remote, set: &str, version: u64, bytes: &[u8]) -> anyhow::Result<()> {
    let answer = remote.put(&format!("/sets/{set}/{version}"), bytes)?;
    match answer.status {
        200 | 201 => Ok(()),
        _ => bail!("the server does not take the set: {}", answer.reason()),
    }
}
