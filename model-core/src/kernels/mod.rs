//! Slices in, slices out; knows nothing of tensors. Every kernel has a scalar definition that is never optimised, and code
//! for each instruction set that must equal it: bit for bit on integer paths, within a derived bound on float paths.
//!
//! Training has float operations of its own (the crate `training`) and takes definitions, [`vectorized`], products of bf16
//! ([`gemm::bf16`]) and the substrates' forward product from here. The other kernels want weights that were packed once and are used a million times, and every row's answer independent
//! of its neighbours; training changes all weights in every step, multiplies by transposes on the way back, keeps what the
//! way back needs, and sums over rows. Only the definitions are common ground, and the tests hold both sides to them.

pub mod activation;
pub mod combine;
pub mod depthwise;
mod error;
#[allow(clippy::needless_range_loop, reason = "a micro-kernel indexes a register file; indices are its honest form")]
pub mod gemm;
pub mod isa;
pub mod norm;
pub mod quantize;
pub mod requantize;
pub mod rotation;
pub mod router;
mod scales;
mod simd;
pub mod softmax;
pub mod transpose;

pub use depthwise::PackedDepthwise;
pub use error::KernelError;
pub use gemm::{Int8Rows, PackedF32, PackedInt8, PackedPointwise, PackedTernary, TernaryStorage};
pub use isa::Isa;
pub use quantize::quantize_rows;
pub use requantize::Requantize;
pub use rotation::{LaneOrder, PackedAngles};
pub(crate) use scales::Scales;
pub use simd::vectorized;
