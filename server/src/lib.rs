//! `butterflyvit`: an inference server for edge gateways. HTTP in front, a registry of expert sets within a memory
//! budget, and compute threads that own the forward pass.
//!
//! A request's journey, and the rooms along it. A room imports from the rooms below it in this table and never
//! from one above it:
//!
//! | step | room |
//! | --- | --- |
//! | start, stop | [`serve`], [`commands`], [`config`], [`logging`] |
//! | accept | [`net`]: TLS, connection limits, slow clients, graceful shutdown |
//! | observe, route, authorise, answer or refuse | [`http`] |
//! | everything that a handler reaches | [`app`] |
//! | ask cameras for pictures, and remember what they show | [`cameras`] |
//! | the journey from images to labels | [`classify`] |
//! | decode, queue, batch, forward | [`compute`] |
//! | find the expert set: files, budget, loading, eviction | [`sets`] |
//! | keep pictures to teach from, and fit expert sets to them | [`examples`], [`fitting`] |
//! | admit requests, images and bytes | [`admission`] |
//! | count, name, measure | [`metrics`], [`statistics`], [`keys`], [`made_key`], [`lifecycle`], [`memory`], [`pages`], [`repeats`], [`routing_map`], [`sentence`], [`threads`], [`verdict`] |

#![deny(unsafe_code)]
#![warn(clippy::too_many_lines, clippy::unwrap_used)]
#![cfg_attr(test, allow(clippy::unwrap_used, reason = "a failed unwrap is how a test fails"))]

pub mod admission;
pub mod app;
pub mod cameras;
pub mod classify;
pub mod commands;
pub mod compute;
pub mod config;
pub mod examples;
pub mod fitting;
pub mod http;
pub mod keys;
pub mod lifecycle;
pub mod logging;
pub mod made_key;
pub mod memory;
pub mod metrics;
pub mod net;
pub mod pages;
pub mod repeats;
pub mod routing_map;
pub mod sentence;
pub mod serve;
pub mod sets;
pub mod statistics;
pub mod threads;
pub mod units;
pub mod verdict;
