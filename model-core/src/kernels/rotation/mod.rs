//! Butterfly rotations `B(angles)`: `stages` stages of 2x2 Givens rotations (arXiv 2601.13563).
//!
//! ```text
//! for stage l in 0..stages:                          # stride 2^l
//!     for every pair (j, j + 2^l) inside blocks of 2^(l+1):
//!         y[j]       = cos * x[j] - sin * x[j + 2^l]
//!         y[j + 2^l] = sin * x[j] + cos * x[j + 2^l]
//! ```
//!
//! Two ideas make it fast:
//! - **Lane order** ([`LaneOrder`]). The first stages pair neighbours, which would cost shuffles inside registers. The
//!   order of the features is ours to choose, though: it is folded into the rows and columns of the substrates when
//!   they are packed, and into the angle codes when a set is loaded. In lane order the bits of a feature's index that
//!   the *last* stages use select the lane, so that the first stages pair whole registers, without one shuffle.
//! - **Angles are decoded once for all rows of an expert** ([`PackedAngles::decode`]), or for a few of them where that is
//!   cheap, and then never leave the registers ([`rotate_by`]): codes stay integers in memory.
//!   Up to eight bits a code, sine and cosine come from one table of a turn: a load of the pair, or with AVX-512 two
//!   lookups in registers, one for each half of the code, joined by the addition theorem. Sixteen bits are a fraction of a
//!   turn whose reduction is exact integer arithmetic, and one odd polynomial on a quarter turn gives both.
//!   Tried and lost: gathers, which cost more than the polynomial's ten multiplications.
//!   Codes that come from a seed ([`SeededAngles`]) take no memory: they are drawn each time they are decoded.

mod angles;
mod apply;
mod order;
pub mod scalar;
mod seeded;
#[cfg(test)]
mod tests;

pub use angles::{Coefficients, PackedAngles, SINCOS_ERROR};
pub use apply::{Then, rotate, rotate_by};
pub use order::LaneOrder;
pub use seeded::{SeededAngles, splitmix64};
