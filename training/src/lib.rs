//! What learns: ButterflyViT in candle, as the float reference of `model-core`'s integer engine and as the graph that
//! training differentiates. The loop, the data and the checkpoints are the trainer's.
//!
//! | module | what it holds | may depend on |
//! | --- | --- | --- |
//! | [`matmul`] | f32 matrix products of any strides | nothing |
//! | [`ops`] | candle operations with gradients of their own | `matmul` |
//! | [`quantize`] | from latent parameters to an artifact's codes, and the same rounding inside a graph | nothing |
//! | [`parameters`] | named parameters, and which roundings a forward pass applies to them | `ops` |
//! | [`layers`] | stem, attention, router, experts, each `new(parameters, ..) -> forward` | `parameters`, `quantize` |
//! | [`vit`] | the model: forward pass, initial weights, from and to an artifact's weights | `layers` |
//! | [`losses`] | cross-entropy and the routing losses | `vit` |
//! | [`optimizer`] | AdamW | `parameters` |
//! | [`shards`] | the loop of threads over shards | nothing |
//! | [`step`] | gradients of one batch, by shards on several threads | `losses`, `optimizer`, `shards` |

#![warn(clippy::too_many_lines)]

pub mod layers;
pub mod losses;
pub mod matmul;
pub mod ops;
pub mod optimizer;
pub mod parameters;
pub mod quantize;
pub mod shards;
pub mod step;
pub mod vit;
