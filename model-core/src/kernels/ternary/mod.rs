//! The substrate product: a ternary matrix against int8 (or f32) activations.

pub mod scalar;
