//! The mixture of butterfly experts, `y = sum_k w_k [B(out_i)] Down(gelu(B(hidden_i) Up(B(in_i) x)))`.
//!
//! ```text
//! route:    logits = x . router^T; the top_k experts of every token, softmax over their logits
//! assign:   counting sort of the (token, choice) rows by (expert set, expert): a segment is one expert's rows
//! up:       for each tile of rows: for each of its segments: decode B(in_i), rotate, quantise
//!                                  one product with `up` for the whole tile, whatever experts and sets
//!                                  for each of its segments: decode B(hidden_i), rotate, gelu
//! down:     for each tile of tokens: weighted sum over k, quantise, one product with `down`, add to the residual
//! ```
//! Deviation from the reference's order: the weighted sum commutes with `down`, so without an `out` rotation it comes
//! first, and `down` runs (and quantises) one row per token instead of `top_k`. With an `out` rotation `down` runs on
//! the tiles of rows, followed by `B(out_i)`, and the weighted sum comes last, as in the reference.
//!
//! Inside the layer features lie in [`LaneOrder`], which is folded into the substrates, routers and angle codes.
//! Every row and token is computed by operations that do not see the other rows, so a row's answer does not depend on
//! what shares its batch.

mod experts;
mod forward;
mod layer;
mod plan;
mod thread;

pub(crate) use experts::storage;
pub(super) use experts::{ExpertLayer, LENGTHS, Substrates};
pub(super) use forward::Moe;
pub use layer::MoeLayer;
pub(super) use plan::{MoeScratch, Span};
pub(super) use thread::MoeThread;
