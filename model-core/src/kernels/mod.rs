//! Slices in, slices out; knows nothing of tensors. Every kernel has a `scalar` definition that is never optimised,
//! and per-ISA code that must equal it: bit for bit on integer paths, within a derived bound on float paths.

pub mod activation;
pub mod combine;
pub mod dense;
pub mod depthwise;
mod error;
#[allow(clippy::needless_range_loop, reason = "a micro-kernel indexes a register file; indices are its honest form")]
mod gemm;
pub mod isa;
pub mod linear;
pub mod norm;
pub mod pointwise;
pub mod quantize;
pub mod requantize;
pub mod rotation;
pub mod router;
mod scales;
mod simd;
pub mod softmax;
pub mod ternary;

pub use dense::PackedF32;
pub use depthwise::PackedDepthwise;
pub use error::KernelError;
pub use isa::Isa;
pub use linear::PackedInt8;
pub use pointwise::PackedPointwise;
pub use quantize::quantize_rows;
pub use requantize::Requantize;
pub use rotation::{LaneOrder, PackedAngles};
pub(crate) use scales::Scales;
pub use ternary::{PackedTernary, TernaryStorage};
