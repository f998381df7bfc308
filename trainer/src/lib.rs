//! The trainer: from a folder of images to a backbone and its expert sets.
//!
//! The mathematics (layers, losses, optimiser) is the crate `training`; what is here is everything around it.
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`data`] | image sets in memory, held-out splits, augmentation, batches on their own thread |
//! | [`recipe`] | everything that decides what a run computes, in one value |
//! | [`train`], [`stop`] | the loop: steps, validation, checkpoints, diary; and what ends it early |
//! | [`checkpoint`], [`diary`], [`files`] | what a run leaves on the disk, and how it survives a crash |
//! | [`predict`], [`evaluate`] | running a model over a data set; accuracy, calibration, routing |
//! | [`compare`] | variants of one recipe over several seeds, as table and picture |
//! | [`temperature`] | how sure a set may be, by the held-out images |
//! | [`speed`] | images/s, and the share of the machine's matrix products in it |
//! | [`plot`] | the learning curve, and what pictures share |
//! | [`encode`] | the same model in other encodings |
//! | [`background`] | mean and covariance of features over images of everything |
//! | [`import`] | a backbone for photographs from weights that others trained |
//! | [`store`] | artifacts in the layout that the server reads |
//! | [`cli`], [`commands`] | from arguments to files |

#![forbid(unsafe_code)]
#![warn(clippy::too_many_lines)]

pub mod background;
pub mod checkpoint;
pub mod cli;
pub mod commands;
pub mod compare;
pub mod data;
pub mod diary;
pub mod encode;
pub mod evaluate;
pub mod files;
pub mod import;
pub mod plot;
pub mod predict;
pub mod recipe;
pub mod speed;
pub mod stop;
pub mod store;
pub mod teacher;
pub mod temperature;
mod terminal;
pub mod train;
