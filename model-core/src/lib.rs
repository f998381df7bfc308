//! ButterflyViT: a mixture-of-experts Vision Transformer in which every expert is a learned butterfly
//! rotation of one shared ternary matrix (arXiv 2603.06746, building on ButterflyMoE, arXiv 2601.13563).
//!
//! From image bytes to logits; no HTTP, no async, no global state. Read in this order:
//!
//! | module | what it holds | may depend on |
//! | --- | --- | --- |
//! | [`kernels`] | slices in, slices out: rotation, matrix products, activations, per instruction set | nothing |
//! | [`config`] | shapes of a model, validated once | nothing |
//! | [`projection`] | what a set sees of its backbone's features | `kernels` |
//! | [`weights`] | the plain parameter tensors an artifact holds | `config`, `projection` |
//! | [`random`] | the one stream of random numbers; where angles started in it | nothing |
//! | [`random_weights`] | random models for measurements and tests | `random`, `weights` |
//! | [`image`] | image bytes to the pixels a model sees | nothing |
//! | [`artifact`] | the safetensors files of `FORMAT.md`: reading, writing, digests, checks | `weights`, `image` |
//! | [`error`] | why a model could not be built or run | `artifact`, `kernels` |
//! | [`familiarity`] | how far an image lies from those that a set was fitted to | `artifact`, `weights` |
//! | [`engine`] | the integer forward pass that serves: artifact bytes in, logits out; timing it | all of the above |
//! | [`footprint`] | where every byte goes | `artifact`, `kernels` |
//! | [`routing_map`] | how alike pairs of patches are routed | nothing |
//!
//! Training, and the float reference that the engine is measured against, are the crate `training`.

#![warn(clippy::too_many_lines)]

pub mod artifact;
pub mod config;
pub mod engine;
pub mod error;
pub mod familiarity;
pub mod footprint;
pub mod image;
pub mod kernels;
pub mod projection;
pub mod random;
pub mod random_weights;
pub mod routing_map;
pub mod weights;
