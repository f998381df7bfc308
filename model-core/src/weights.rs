//! The parameter tensors of a model, as plain owned arrays: what an artifact holds, what training exports, what the
//! engine packs. Row-major; a linear layer's weight is `[out_features, in_features]`.
//!
//! Nothing here computes. Sizes follow from the configuration; the artifact reader checks them before building one.

use crate::config::{BackboneConfig, ExpertConfig, ViTConfig};

/// `y = x W^T + b`.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Linear {
    /// `[out_features, in_features]`.
    pub weight: Vec<f32>,
    /// `[out_features]`.
    pub bias: Vec<f32>,
}

/// LayerNorm over the last axis, epsilon [`LAYER_NORM_EPS`].
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Norm {
    /// `[features]`.
    pub gamma: Vec<f32>,
    /// `[features]`.
    pub beta: Vec<f32>,
}

/// Added to the (biased) variance before the square root, in every LayerNorm.
pub const LAYER_NORM_EPS: f32 = 1e-5;

/// A ternary matrix with one scale per row: `W[r, c] = scale[r] * codes[r, c]`.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Ternary {
    /// `[rows, cols]`, each -1, 0 or 1.
    pub codes: Vec<i8>,
    /// `[rows]`, positive and finite.
    pub scale: Vec<f32>,
}

/// One stem layer. The convolution's weight is `[channels, kernel, kernel, in_channels]` (channel-last windows).
#[derive(Debug, Clone, PartialEq, Default)]
pub struct StemWeights {
    /// The convolution as a linear layer over windows flattened as `(row, column, channel)`.
    pub conv: Linear,
    /// LayerNorm over channels, present when the layer's `norm_gelu` is set.
    pub norm: Option<Norm>,
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
    /// Substrate `[d_ff, d_model]`.
    pub up: Ternary,
    /// Substrate `[d_model, d_ff]`.
    pub down: Ternary,
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
    /// `[experts]`: gate weight = code * scale.
    pub router_scale: Vec<f32>,
    /// `[experts, stages_in, d_model / 2]`.
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
    /// One per transformer block.
    pub layers: Vec<ExpertLayerWeights>,
    /// `[classes, d_model]`, over the mean-pooled tokens.
    pub head: Linear,
    /// `[classes]`, in the order of the head's rows.
    pub labels: Vec<String>,
}

impl ExpertSetWeights {
    /// The whole model's configuration when this set runs on `backbone`.
    pub fn vit_config(&self, backbone: &BackboneConfig) -> ViTConfig {
        ViTConfig { backbone: backbone.clone(), experts: self.config.clone(), num_classes: self.labels.len() }
    }
}
