//! The subcommands that are not `serve`.

pub mod admin_key;
pub mod bench;
pub mod classify;
pub mod healthcheck;
pub mod inspect;
mod remote;
pub mod teach;
