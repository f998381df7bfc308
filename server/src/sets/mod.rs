//! Where expert sets come from, and which of them are in memory.
//!
//! [`descriptor`] says what a file holds, [`store`] finds the files, [`upload`] adds one, [`registry`] loads and evicts,
//! [`loaded`] is what a load makes, and [`catalog`] keeps store and registry in step.

pub mod catalog;
pub mod descriptor;
pub mod loaded;
pub mod registry;
pub mod store;
pub mod upload;
