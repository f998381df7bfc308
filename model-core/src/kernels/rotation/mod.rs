//! Butterfly rotations `B(angles)`: `stages` stages of 2x2 Givens rotations.

pub mod scalar;
