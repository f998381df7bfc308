//! The integer forward pass that serves: int8 activations against packed substrates and int8 weights of attention and
//! stem, f32 for the stem's first layer, rotations, router, softmax, norms and head.
//!
//! ```text
//! x  = stem(pixels) + pos_embed
//! for each block:  x += proj(attention(qkv(norm1(x))));  x += experts(norm2(x))
//! logits = head(mean over tokens of norm(x))
//! ```
//! A calibrated stem is int8 throughout. A backbone without blocks is a stem alone: no position embedding, no norm.
//!
//! A [`Backbone`] is loaded once and shared; an [`ExpertSet`] is bound to one backbone and small; a [`Session`]
//! is the scratch of one compute thread (or one small team of threads). Pixels are f32, channel-last
//! `[H, W, 3]`, normalised by [`Backbone::preprocess`].
//!
//! All images of a batch go through every step together; rows of one expert set are made neighbours first. Rows may
//! belong to different expert sets of the session's backbone. Every row's answer is bit for bit what the row gets alone:
//! all sums run in an order that does not depend on the other rows. The float reference is `training`'s `ViT`.

mod attention;
mod backbone;
pub mod bench;
mod crew;
mod expert_set;
mod group;
mod lines;
mod moe;
mod packed;
mod parts;
mod session;
mod stem;

pub use backbone::Backbone;
pub use crew::{Crew, Invitation, Member};
pub use expert_set::ExpertSet;
pub use group::SessionGroup;
pub use moe::MoeLayer;
pub(crate) use moe::storage;
pub use session::{Row, Session};
