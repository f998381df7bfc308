//! Slices in, slices out; knows nothing of candle. Every kernel has a `scalar` definition that is never optimised,
//! and per-ISA code that must equal it: bit for bit on integer paths, within a derived bound on float paths.

pub mod activation;
pub mod rotation;
pub mod router;
pub mod ternary;
