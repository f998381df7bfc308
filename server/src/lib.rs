//! `butterflyvit`: an inference server for edge gateways. HTTP in front, a registry of expert sets within a memory
//! budget, and compute threads that own the forward pass.
//!
//! A request's journey, and the modules along it:
//!
//! | step | module |
//! | --- | --- |
//! | start, stop | [`serve`] |
//! | accept | [`connection`]: TLS ([`tls`]), connection limits, slow clients, graceful shutdown |
//! | observe, route, authorise | [`http`] |
//! | admit | [`admission`]: requests, images and bytes, each bounded |
//! | find the expert set | [`registry`]: budget, loading, eviction; [`store`]: the files; [`catalog`]: both in step |
//! | decode, preprocess | [`pipeline::decode`] |
//! | queue, batch | [`pipeline::queue`] |
//! | forward | [`pipeline`]: compute threads; [`model`]: the seam to `model-core`; [`routing`]: maps of its choices |
//! | answer or refuse | [`http`], [`error`]: the one status table |

#![forbid(unsafe_code)]
#![warn(clippy::unwrap_used, missing_docs)]
#![cfg_attr(test, allow(clippy::unwrap_used, reason = "a failed unwrap is how a test fails"))]

pub mod admission;
pub mod blocking;
pub mod catalog;
pub mod commands;
pub mod config;
pub mod connection;
pub mod error;
pub mod http;
pub mod lifecycle;
pub mod logging;
pub mod metrics;
pub mod model;
pub mod pipeline;
pub mod registry;
pub mod routing;
pub mod serve;
pub mod state;
pub mod store;
pub mod tls;
pub mod units;
