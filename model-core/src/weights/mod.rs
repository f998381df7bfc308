//! The parameter tensors of a model, as plain owned arrays: what an artifact holds, what training exports, what the
//! engine packs. Row-major; a linear layer's weight is `[out_features, in_features]`.
//!
//! Nothing here computes. Sizes follow from the configuration; the artifact reader checks them before building one.

mod encode;
mod int4;
mod matrix;

use std::sync::Arc;

pub use encode::{Encodings, router_row};
pub use int4::{Int4Rows, Rows};
pub use matrix::{Matrix, Precision};

use crate::config::{BackboneConfig, BackboneShape, ExpertConfig, FloatFormat, ViTConfig};
use crate::projection::Projection;

/// `y = x W^T + b`.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Linear {
    /// W, row-major `[out_features, in_features]`.
    pub weight: Matrix,
    /// The bias b, `[out_features]`.
    pub bias: Vec<f32>,
}

/// LayerNorm over the last axis, epsilon [`LAYER_NORM_EPS`].
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Norm {
    /// Scale of each feature, `[features]`.
    pub gamma: Vec<f32>,
    /// Shift of each feature, `[features]`.
    pub beta: Vec<f32>,
}

/// Added to the (biased) variance before the square root, in every LayerNorm.
pub const LAYER_NORM_EPS: f32 = 1e-5;

/// A ternary matrix with one scale per row: `W[r, c] = scale[r] * codes[r, c]`.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Ternary {
    /// `[rows, cols]`, each -1, 0 or 1. The same allocation in all blocks that share them.
    pub codes: Arc<[i8]>,
    /// `[rows]`, positive and finite; values of the format that the configuration names.
    pub scale: Vec<f32>,
}

/// One stem layer. The convolution's weight is `[channels, kernel, kernel, in_channels / groups]` (channel-last windows).
#[derive(Debug, Clone, PartialEq, Default)]
pub struct StemWeights {
    /// The convolution as a linear layer over the windows of a channel's group, flattened as `(row, column, channel)`.
    pub conv: Linear,
    /// LayerNorm over channels, present when the layer's `norm` is set.
    pub norm: Option<Norm>,
    /// Calibrated step of the layer's output, residual included, for an integer path that keeps it as codes times the
    /// step. Positive and finite.
    pub step: Option<f32>,
}

/// One pre-norm transformer block without its experts.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct BlockWeights {
    /// Before attention.
    pub norm1: Norm,
    /// `[3 d_model, d_model]`: rows are q, then k, then v; within each, head by head.
    pub qkv: Linear,
    /// `[d_model, d_model]`, after the heads are concatenated.
    pub proj: Linear,
    /// Before router and experts.
    pub norm2: Norm,
    /// The substrate of all experts' first product, `[d_ff, d_model]`.
    pub up: Ternary,
    /// The substrate of all experts' second product, `[d_model, d_ff]`.
    pub down: Ternary,
}

/// Features of images of everything, to hold an expert set's own images against.
#[derive(Debug, Clone, PartialEq)]
pub struct Background {
    /// Mean of each feature, `[d_model]`.
    pub mean: Vec<f32>,
    /// Of the features; not of the form that rests on a background.
    pub covariance: Covariance,
    /// Where the images come from.
    pub source: String,
    /// How many images there were.
    pub images: u64,
}

/// Everything expert sets share.
#[derive(Debug, Clone, PartialEq)]
pub struct BackboneWeights {
    pub config: BackboneConfig,
    /// One per [`BackboneConfig::stem`] layer.
    pub stem: Vec<StemWeights>,
    /// `[tokens, d_model]`, added to the stem's output.
    pub pos_embed: Vec<f32>,
    /// One per transformer block.
    pub blocks: Vec<BlockWeights>,
    /// Before mean pooling.
    pub norm: Norm,
    /// Of the pooled features.
    pub background: Option<Background>,
}

impl BackboneWeights {
    /// The first block whose ternary codes are not those of the first block, although the configuration says
    /// that all share them.
    pub fn unshared_block(&self) -> Option<usize> {
        let first = self.blocks.first().filter(|_| self.config.substrates.shared)?;
        let same = |own: &Arc<[i8]>, shared: &Arc<[i8]>| Arc::ptr_eq(own, shared) || own == shared;
        self.blocks.iter().position(|b| !same(&b.up.codes, &first.up.codes) || !same(&b.down.codes, &first.down.codes))
    }
}

/// Integer codes with a fixed number of bits, one row per expert.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct AngleCodes {
    /// `[experts, stages, features / 2]`, each below `2^bits`.
    pub codes: Vec<u16>,
}

/// The experts and router of one layer.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ExpertLayerWeights {
    /// `[experts, d_model]`, signed router codes.
    pub router: Vec<i16>,
    /// `[experts]`: gate weight = code * scale. Values of the format that the configuration names.
    pub router_scale: Vec<f32>,
    /// `[experts, stages_in, d_model / 2]`; this and the following ones are empty where angles come from a seed.
    pub rotation_in: AngleCodes,
    /// `[experts, stages_hidden, d_ff / 2]`.
    pub rotation_hidden: AngleCodes,
    /// `[experts, stages_out, d_model / 2]`; empty without an out rotation.
    pub rotation_out: AngleCodes,
}

/// One task's experts, routers, head and labels.
#[derive(Debug, Clone, PartialEq)]
pub struct ExpertSetWeights {
    pub config: ExpertConfig,
    /// One per transformer block; none where experts are borrowed.
    pub layers: Vec<ExpertLayerWeights>,
    /// `[classes, features]`, over the mean-pooled tokens.
    pub head: Linear,
    /// `[classes]`, in the order of the head's rows.
    pub labels: Vec<String>,
    /// What makes the features that head and statistics see of those of the backbone; without it they are the same.
    pub projection: Option<Projection>,
    /// What logits are divided by.
    pub temperature: f32,
    /// What tells images of the set's kind from others.
    pub familiarity: Option<Familiarity>,
}

/// A covariance: of a backbone's background, or the one that the classes of a set share.
#[derive(Debug, Clone, PartialEq)]
pub enum Covariance {
    /// Lower triangle, row by row, `[d_model (d_model + 1) / 2]`; positive definite.
    Packed(Vec<f32>),
    /// `diag(diagonal) + factor^T factor`.
    Diagonal {
        /// One value a feature, `[d_model]`, positive.
        diagonal: Vec<f32>,
        /// The low-rank part, row-major `[rank, d_model]`.
        factor: Vec<f32>,
    },
    /// `scale * C + factor^T factor`, with the covariance C of the backbone's background.
    Background {
        /// What C is multiplied by; positive.
        scale: f32,
        /// The low-rank part, row-major `[rank, d_model]`.
        factor: Vec<f32>,
    },
    /// `scale * 1 + factor^T factor`, of features that are scaled to a mean square of one.
    Even {
        /// Variance in all directions; positive.
        scale: f32,
        /// The low-rank part, `[rank, d_model]`.
        factor: Int4Rows,
    },
}

/// Statistics of a set's own images: an image is unknown when its distance exceeds `threshold`.
#[derive(Debug, Clone, PartialEq)]
pub struct Familiarity {
    /// Format of those statistics that are stored as floats, which must be values of that format.
    pub format: FloatFormat,
    /// Whether the distance to the backbone's background is subtracted.
    pub relative: bool,
    /// One row a mean, `[means, d_model]`; four-bit codes with the even covariance, floats with the others.
    pub means: Rows,
    /// Of the features about the mean of their class.
    pub covariance: Covariance,
    /// Largest distance of what is known.
    pub threshold: f32,
    /// Share of images of other things that stay below the threshold, as measured when the set was fitted.
    pub pass_share: f32,
}

impl ExpertSetWeights {
    /// The whole model's configuration when this set runs on `backbone`.
    pub fn vit_config(&self, backbone: &BackboneConfig) -> ViTConfig {
        ViTConfig { backbone: backbone.clone(), experts: self.config.clone(), num_classes: self.labels.len() }
    }

    /// Writes down the angle codes that a seed stands for: the same experts on `backbone`, whose angles can be changed.
    pub fn own_angles(&mut self, backbone: &BackboneShape) {
        let config = &self.config;
        for (l, layer) in self.layers.iter_mut().enumerate() {
            let sites = [
                (&mut layer.rotation_in, config.stages_in, backbone.d_model),
                (&mut layer.rotation_hidden, config.stages_hidden, backbone.d_ff),
                (&mut layer.rotation_out, config.stages_out, backbone.d_model),
            ];
            for (site, (rotation, stages, features)) in sites.into_iter().enumerate() {
                if let Some(seeded) = config.seeded_angles(l, site) {
                    rotation.codes = seeded.codes(config.num_experts, stages, features / 2);
                }
            }
        }
        self.config.angle_seed = None;
    }
}
