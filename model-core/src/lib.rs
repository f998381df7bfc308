//! ButterflyViT: a mixture-of-experts Vision Transformer in which every expert is a learned butterfly
//! rotation of one shared ternary matrix (arXiv 2603.06746, building on ButterflyMoE, arXiv 2601.13563).
//!
//! From image bytes to logits; no HTTP, no async, no global state. Read in this order:
//!
//! | module | what it holds | may depend on |
//! | --- | --- | --- |
//! | [`kernels`] | slices in, slices out: rotation, ternary product, activations, per instruction set | nothing |
//! | [`config`] | shapes of a model, validated once | nothing |
//! | [`weights`] | the plain parameter tensors an artifact holds | `config` |
//! | [`random`] | the numbers that initial weights come from; where angles started | nothing |
//! | [`artifact`] | the safetensors files of `FORMAT.md`: reading, writing, digests, checks | `weights` |
//! | [`image`] | image bytes to the pixels a model sees | `config` |
//! | [`ops`], [`layers`], [`vit`], [`train`] | the candle model: float reference and training | `kernels`, `weights` |
//! | [`engine`] | the integer forward pass that serves | `kernels`, `weights` |
//! | [`footprint`] | where every byte goes | `config` |
//! | [`model`] | the facade that server and trainer see | all of the above |
//! | [`restart`] | starting the program over with settings that libraries read before `main` | nothing |

#![warn(missing_docs)]

pub mod artifact;
pub mod bench;
pub mod config;
pub mod engine;
pub mod footprint;
pub mod image;
pub mod kernels;
pub mod layers;
pub mod model;
pub mod ops;
pub mod random;
pub mod restart;
pub mod train;
pub mod vit;
pub mod weights;
