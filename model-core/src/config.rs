//! Shapes of a model, validated once. Everything downstream may rely on a
//! [`ViTConfig`] that passed [`ViTConfig::validate`].
//!
//! The shape falls into two halves that live in different files: what all expert sets share
//! ([`BackboneConfig`]) and what each set chooses for itself ([`ExpertConfig`]).

use serde::{Deserialize, Serialize};

/// A field of a configuration has a value the model cannot take.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("config field `{field}`: {reason}")]
pub struct ConfigError {
    /// Path of the field, e.g. `experts.stages_hidden`.
    pub field: &'static str,
    /// The fault, with the offending value.
    pub reason: String,
}

fn ensure(ok: bool, field: &'static str, reason: impl FnOnce() -> String) -> Result<(), ConfigError> {
    if ok { Ok(()) } else { Err(ConfigError { field, reason: reason() }) }
}

/// One convolution of the stem, over channel-last features, optionally followed by LayerNorm over channels and GELU,
/// optionally added to its input: `y = x + gelu(norm(conv(x)))`.
///
/// A plain patch embedding is a single such layer with `kernel = stride = patch_size` and neither norm nor residual.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StemLayer {
    /// Output channels.
    pub channels: usize,
    /// Square kernel side in pixels.
    pub kernel: usize,
    /// Step between windows in pixels.
    pub stride: usize,
    /// Zero padding on every side in pixels.
    pub padding: usize,
    /// LayerNorm over channels, then GELU, after the convolution.
    pub norm_gelu: bool,
    /// Add the layer's input to its output; needs stride 1 and equal channels.
    pub residual: bool,
}

impl StemLayer {
    /// A non-overlapping patch embedding.
    pub const fn patch(d_model: usize, patch_size: usize) -> Self {
        Self {
            channels: d_model,
            kernel: patch_size,
            stride: patch_size,
            padding: 0,
            norm_gelu: false,
            residual: false,
        }
    }

    /// A 3x3 convolution with norm and GELU; `stride` 2 halves the side.
    pub const fn conv3(channels: usize, stride: usize) -> Self {
        Self { channels, kernel: 3, stride, padding: 1, norm_gelu: true, residual: false }
    }

    /// A 3x3 residual convolution with norm and GELU.
    pub const fn residual3(channels: usize) -> Self {
        Self { channels, kernel: 3, stride: 1, padding: 1, norm_gelu: true, residual: true }
    }

    /// Output side for a square input of side `side`; `None` when the kernel does not fit.
    pub fn output_side(&self, side: usize) -> Option<usize> {
        Some((side + 2 * self.padding).checked_sub(self.kernel)? / self.stride + 1)
    }
}

/// What every expert set shares: stem, attention, norms, substrates.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BackboneConfig {
    /// Side of the square RGB input in pixels.
    pub image_size: usize,
    /// Convolutions from pixels to patch tokens, first to last; the last one has `d_model` channels.
    pub stem: Vec<StemLayer>,
    /// Width of a token.
    pub d_model: usize,
    /// Width of the hidden layer of an expert.
    pub d_ff: usize,
    /// Number of transformer blocks.
    pub num_layers: usize,
    /// Attention heads; divides `d_model`.
    pub num_heads: usize,
}

/// Most experts in a layer.
pub const MAX_EXPERTS: usize = 4096;

/// What each expert set chooses for itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExpertConfig {
    /// Experts in each layer.
    pub num_experts: usize,
    /// Experts chosen for each token.
    pub top_k: usize,
    /// Butterfly stages of `B(in_i)`, over `d_model` features.
    pub stages_in: usize,
    /// Butterfly stages of `B(hidden_i)`, over `d_ff` features.
    pub stages_hidden: usize,
    /// Butterfly stages of `B(out_i)`, over `d_model` features; 0 for none (the paper's).
    pub stages_out: usize,
    /// Bits of an angle code: 4, 6, 8 or 16. Code c stands for the angle `c * 2 pi / 2^bits`.
    pub angle_bits: u32,
    /// Bits of a router weight code: 8 or 16. Code c of expert e stands for `c * router_scale[e]`.
    pub router_bits: u32,
}

/// The kind of feed-forward layer in every block. Artifacts hold [`FeedForwardKind::Butterfly`]; the others exist
/// in training only, to be compared with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FeedForwardKind {
    /// Experts that are rotations of a shared ternary substrate.
    #[default]
    Butterfly,
    /// The same, and behind `up` a gain per expert and feature, which rotations alone cannot make.
    ButterflyGains,
    /// The same, and `down` is the transpose of `up` with a scale per row instead of a substrate of its own.
    ButterflyTied,
    /// As many experts behind the same router, each with fp32 matrices of its own.
    DenseExperts,
    /// A single fp32 feed-forward layer, no router.
    Dense,
    /// As many experts behind the same router, each with ternary matrices of its own.
    TernaryExperts,
    /// The same with 4-bit matrices, a scale per row.
    Int4Experts,
    /// The same with 8-bit matrices, a scale per row.
    Int8Experts,
    /// The same with matrices that are products of two fp32 factors, through [`BackboneConfig::low_rank`] features.
    LowRankExperts,
}

/// A whole model: backbone and one expert set.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ViTConfig {
    /// The shared half.
    pub backbone: BackboneConfig,
    /// The expert set's half.
    pub experts: ExpertConfig,
    /// Rows of the head; one label each.
    pub num_classes: usize,
}

/// Largest value any size field may have. Keeps products of a few sizes far from overflow, and bounds what a
/// hostile configuration can ask for before tensors are looked at.
pub const MAX_SIZE: usize = 1 << 16;
/// Most transformer blocks, stem layers or butterfly stages.
pub const MAX_DEPTH: usize = 64;

fn size(value: usize, field: &'static str) -> Result<(), ConfigError> {
    ensure((1..=MAX_SIZE).contains(&value), field, || format!("{value} is not in 1..={MAX_SIZE}"))
}

fn stages(value: usize, features: usize, features_name: &str, field: &'static str) -> Result<(), ConfigError> {
    ensure(value <= 16 && features.is_multiple_of(1 << value), field, || {
        format!("{value} stages need {features_name} to be a multiple of 2^{value}, but it is {features}")
    })
}

impl BackboneConfig {
    /// Checks every field against the others.
    ///
    /// # Errors
    /// [`ConfigError`] naming the first field that does not fit.
    pub fn validate(&self) -> Result<(), ConfigError> {
        ensure((1..=1024).contains(&self.image_size), "backbone.image_size", || {
            format!("{} is not in 1..=1024", self.image_size)
        })?;
        size(self.d_model, "backbone.d_model")?;
        size(self.d_ff, "backbone.d_ff")?;
        ensure((1..=MAX_DEPTH).contains(&self.num_layers), "backbone.num_layers", || {
            format!("{} is not in 1..={MAX_DEPTH}", self.num_layers)
        })?;
        ensure(self.num_heads >= 1 && self.d_model.is_multiple_of(self.num_heads), "backbone.num_heads", || {
            format!("{} heads do not divide d_model {}", self.num_heads, self.d_model)
        })?;
        ensure((1..=MAX_DEPTH).contains(&self.stem.len()), "backbone.stem", || {
            format!("{} layers; there must be 1..={MAX_DEPTH}", self.stem.len())
        })?;
        let (mut side, mut channels) = (self.image_size, 3);
        for (i, layer) in self.stem.iter().enumerate() {
            size(layer.channels, "backbone.stem.channels")?;
            ensure((1..=64).contains(&layer.kernel), "backbone.stem.kernel", || {
                format!("layer {i}: {} is not in 1..=64", layer.kernel)
            })?;
            ensure((1..=64).contains(&layer.stride), "backbone.stem.stride", || {
                format!("layer {i}: {} is not in 1..=64", layer.stride)
            })?;
            ensure(layer.padding < layer.kernel, "backbone.stem.padding", || {
                format!("layer {i}: {} is not below the kernel side {}", layer.padding, layer.kernel)
            })?;
            let out = layer.output_side(side).filter(|&s| s > 0);
            let Some(out) = out else {
                return Err(ConfigError {
                    field: "backbone.stem.kernel",
                    reason: format!("layer {i}: kernel {} does not fit a {side}x{side} input", layer.kernel),
                });
            };
            ensure(
                (side + 2 * layer.padding - layer.kernel).is_multiple_of(layer.stride) || layer.padding > 0,
                "backbone.stem.stride",
                || {
                    format!(
                        "layer {i}: patches of {} with stride {} do not tile a side of {side}",
                        layer.kernel, layer.stride
                    )
                },
            )?;
            ensure(!layer.residual || (out == side && channels == layer.channels), "backbone.stem.residual", || {
                format!(
                    "layer {i} changes {side}x{side}x{channels} to {out}x{out}x{}, so its input cannot be added",
                    layer.channels
                )
            })?;
            (side, channels) = (out, layer.channels);
        }
        ensure(channels == self.d_model, "backbone.stem.channels", || {
            format!("the last layer has {channels} channels, but d_model is {}", self.d_model)
        })?;
        ensure(side * side <= 4096, "backbone.stem", || format!("{side}x{side} patch tokens are more than 4096"))
    }

    /// Side of the square grid of patch tokens.
    pub fn grid_side(&self) -> usize {
        self.stem.iter().fold(self.image_size, |side, layer| layer.output_side(side).unwrap_or(0))
    }

    /// Number of patch tokens.
    pub fn num_tokens(&self) -> usize {
        self.grid_side().pow(2)
    }

    /// Rank of the matrices of [`FeedForwardKind::LowRankExperts`]: an eighth of `d_model`.
    pub fn low_rank(&self) -> usize {
        (self.d_model / 8).max(1)
    }

    /// Features of one attention head.
    pub fn head_dim(&self) -> usize {
        self.d_model / self.num_heads
    }

    /// Input side and channels of every stem layer, in order.
    pub fn stem_inputs(&self) -> impl Iterator<Item = (StemLayer, usize, usize)> + '_ {
        self.stem.iter().scan((self.image_size, 3), |state, layer| {
            let (side, channels) = *state;
            *state = (layer.output_side(side)?, layer.channels);
            Some((*layer, side, channels))
        })
    }
}

impl ExpertConfig {
    /// Checks every field, stages against the sizes of the backbone.
    ///
    /// # Errors
    /// [`ConfigError`] naming the first field that does not fit.
    pub fn validate(&self, backbone: &BackboneConfig) -> Result<(), ConfigError> {
        ensure((1..=MAX_EXPERTS).contains(&self.num_experts), "experts.num_experts", || {
            format!("{} is not in 1..={MAX_EXPERTS}", self.num_experts)
        })?;
        ensure((1..=self.num_experts).contains(&self.top_k), "experts.top_k", || {
            format!("{} is not in 1..=num_experts ({})", self.top_k, self.num_experts)
        })?;
        stages(self.stages_in, backbone.d_model, "d_model", "experts.stages_in")?;
        stages(self.stages_hidden, backbone.d_ff, "d_ff", "experts.stages_hidden")?;
        stages(self.stages_out, backbone.d_model, "d_model", "experts.stages_out")?;
        ensure([4, 6, 8, 16].contains(&self.angle_bits), "experts.angle_bits", || {
            format!("{} is not 4, 6, 8 or 16", self.angle_bits)
        })?;
        ensure([8, 16].contains(&self.router_bits), "experts.router_bits", || {
            format!("{} is not 8 or 16", self.router_bits)
        })
    }

    /// Angles of one expert in one layer, all sites.
    pub fn angles_per_expert(&self, backbone: &BackboneConfig) -> usize {
        (self.stages_in + self.stages_out) * backbone.d_model / 2 + self.stages_hidden * backbone.d_ff / 2
    }
}

impl ViTConfig {
    /// Checks everything once; the rest of the crate relies on it.
    ///
    /// # Errors
    /// [`ConfigError`] naming the first field that does not fit.
    pub fn validate(&self) -> Result<(), ConfigError> {
        self.backbone.validate()?;
        self.experts.validate(&self.backbone)?;
        ensure((1..=MAX_SIZE).contains(&self.num_classes), "num_classes", || {
            format!("{} is not in 1..={MAX_SIZE}", self.num_classes)
        })
    }

    /// The configuration of that name, or `None`: see [`ViTConfig::PRESETS`].
    pub fn preset(name: &str) -> Option<Self> {
        let experts = |num_experts, top_k, stages_in, stages_hidden, angle_bits| ExpertConfig {
            num_experts,
            top_k,
            stages_in,
            stages_hidden,
            stages_out: 0,
            angle_bits,
            router_bits: 8,
        };
        Some(match name {
            "paper" => Self {
                backbone: BackboneConfig {
                    image_size: 32,
                    stem: vec![StemLayer::patch(256, 4)],
                    d_model: 256,
                    d_ff: 1024,
                    num_layers: 7,
                    num_heads: 8,
                },
                // Deviation: the paper has 16 bits an angle; eight put every run-time byte 424 times below dense experts.
                experts: experts(64, 2, 4, 4, 8),
                num_classes: 100,
            },
            "tiny" => Self {
                backbone: BackboneConfig {
                    image_size: 8,
                    stem: vec![StemLayer::conv3(8, 1), StemLayer::residual3(8), StemLayer::patch(16, 2)],
                    d_model: 16,
                    d_ff: 32,
                    num_layers: 2,
                    num_heads: 2,
                },
                experts: ExpertConfig { stages_out: 2, ..experts(4, 2, 4, 4, 8) },
                num_classes: 5,
            },
            "cifar" => Self {
                backbone: BackboneConfig {
                    image_size: 32,
                    stem: vec![
                        StemLayer::conv3(32, 1),
                        StemLayer::conv3(64, 2),
                        StemLayer::residual3(64),
                        StemLayer::conv3(128, 2),
                        StemLayer::residual3(128),
                        StemLayer::residual3(128),
                    ],
                    d_model: 128,
                    d_ff: 512,
                    num_layers: 4,
                    num_heads: 4,
                },
                // The smallest of the shapes tried on paper that keep the feed-forward layers 500 times below dense ones.
                experts: experts(64, 2, 3, 2, 4),
                num_classes: 100,
            },
            // For `compare`: small enough that several variants and seeds finish within hours on one core.
            "study" => Self {
                backbone: BackboneConfig {
                    image_size: 32,
                    stem: vec![StemLayer::conv3(32, 2), StemLayer::conv3(64, 2)],
                    d_model: 64,
                    d_ff: 256,
                    num_layers: 3,
                    num_heads: 2,
                },
                experts: experts(64, 2, 3, 2, 4),
                num_classes: 100,
            },
            _ => return None,
        })
    }

    /// Names that [`ViTConfig::preset`] knows: the paper's, one for tests, the shipped one, and one for `compare`.
    pub const PRESETS: [&'static str; 4] = ["paper", "tiny", "cifar", "study"];
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn presets_are_valid() {
        for name in ViTConfig::PRESETS {
            ViTConfig::preset(name).unwrap().validate().unwrap();
        }
    }

    #[test]
    fn errors_name_the_field() {
        type Edit = fn(&mut ViTConfig);
        let cases: [(&str, Edit); 12] = [
            ("backbone.image_size", |c| c.backbone.image_size = 0),
            ("backbone.num_heads", |c| c.backbone.num_heads = 3),
            ("backbone.num_layers", |c| c.backbone.num_layers = 0),
            ("backbone.stem", |c| c.backbone.stem.clear()),
            ("backbone.stem.stride", |c| c.backbone.stem[0].stride = 3),
            ("backbone.stem.channels", |c| c.backbone.stem[0].channels = 7),
            ("experts.top_k", |c| c.experts.top_k = 65),
            ("experts.num_experts", |c| c.experts.num_experts = 0),
            ("experts.stages_in", |c| c.experts.stages_in = 9),
            ("experts.stages_hidden", |c| c.experts.stages_hidden = 11),
            ("experts.angle_bits", |c| c.experts.angle_bits = 5),
            ("num_classes", |c| c.num_classes = 0),
        ];
        for (field, edit) in cases {
            let mut config = ViTConfig::preset("paper").unwrap();
            edit(&mut config);
            assert_eq!(config.validate().unwrap_err().field, field);
        }
    }
}
