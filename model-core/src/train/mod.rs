//! The differentiable pieces of training: losses, quantisers with straight-through gradients, the optimiser and one
//! data-parallel step. The loop, the data and the checkpoints are the trainer's.

pub mod loss;
pub mod optimizer;
pub mod quantize;
pub mod step;

pub use loss::LossWeights;
pub use optimizer::{AdamW, AdamWConfig};
pub use step::{Batch, StepStats, gradients};
