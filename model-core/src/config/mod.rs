//! Shapes of a model, validated once. Everything downstream may rely on a
//! [`ViTConfig`] that passed [`ViTConfig::validate`].
//!
//! The shape falls into two halves that live in different files: what all expert sets share
//! ([`BackboneConfig`]) and what each set chooses for itself ([`ExpertConfig`]).

mod stem;

use serde::{Deserialize, Serialize};

pub use stem::{Activation, StemLayer};

use crate::kernels::rotation::SeededAngles;

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

/// How ternary codes are packed, in a file and in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TernaryPacking {
    /// Four codes a byte.
    #[default]
    TwoBits,
    /// Five codes a byte, as digits of a number in base 3.
    FiveTrits,
}

/// Floating-point formats of scales and statistics.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FloatFormat {
    #[default]
    F32,
    F16,
}

impl FloatFormat {
    /// The nearest value that the format has: infinite beyond its range.
    pub fn round(self, value: f32) -> f32 {
        match self {
            Self::F32 => value,
            Self::F16 => half::f16::from_f32(value).to_f32(),
        }
    }

    /// Bytes of a value.
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 => 2,
        }
    }
}

/// How the substrates are stored, in a file and in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SubstrateConfig {
    /// Whether all blocks have the same codes, each with scales of its own.
    pub shared: bool,
    pub packing: TernaryPacking,
    pub scales: FloatFormat,
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
    /// Number of transformer blocks; none for a backbone that is a stem alone.
    pub num_layers: usize,
    /// Attention heads; divides `d_model`.
    pub num_heads: usize,
    /// How the ternary matrices are stored.
    #[serde(default)]
    pub substrates: SubstrateConfig,
}

/// What the shapes of an expert set's tensors, and the bytes of its feed-forward layers, depend on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BackboneShape {
    /// Width of a token.
    pub d_model: usize,
    /// Width of the hidden layer of an expert.
    pub d_ff: usize,
    /// Number of transformer blocks; none for a backbone that is a stem alone.
    pub num_layers: usize,
    /// How the ternary matrices are stored.
    pub substrates: SubstrateConfig,
}

impl BackboneShape {
    /// Rank of the matrices of [`FeedForwardKind::LowRankExperts`]: an eighth of `d_model`.
    pub fn low_rank(&self) -> usize {
        (self.d_model / 8).max(1)
    }

    /// Checks the sizes.
    ///
    /// # Errors
    /// [`ConfigError`] naming the first field that does not fit.
    pub fn validate(&self) -> Result<(), ConfigError> {
        size(self.d_model, "backbone.d_model")?;
        size(self.d_ff, "backbone.d_ff")?;
        ensure(self.num_layers <= MAX_DEPTH, "backbone.num_layers", || {
            format!("{} is not in 0..={MAX_DEPTH}", self.num_layers)
        })
    }
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
    /// Where angle codes come from when the set holds none.
    #[serde(default)]
    pub angle_seed: Option<AngleSeed>,
    /// Bits of a router weight code: 4, 8 or 16. Code c of expert e stands for `c * router_scale[e]`.
    pub router_bits: u32,
    /// Format of the router scales.
    #[serde(default)]
    pub router_scales: FloatFormat,
}

/// The generators of random angles.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Generator {
    /// SplitMix64, as `FORMAT.md` spells it out.
    #[serde(rename = "splitmix64")]
    SplitMix64,
}

/// Angles that nobody learned: codes drawn by a generator.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AngleSeed {
    pub generator: Generator,
    /// Where the generator starts, below 2^53, so that every JSON reader takes it for the same number.
    pub seed: u64,
    /// Random bits of a code, at most `angle_bits`: codes are uniform in `-2^(n-1) .. 2^(n-1)`, modulo `2^angle_bits`. With
    /// `angle_bits` of them angles are uniform over the circle.
    pub spread_bits: u32,
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
    /// The same with matrices that are products of two fp32 factors, through [`BackboneShape::low_rank`] features.
    LowRankExperts,
}

/// A whole model: backbone and one expert set.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ViTConfig {
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
        self.shape().validate()?;
        ensure(self.num_heads >= 1 && self.d_model.is_multiple_of(self.num_heads), "backbone.num_heads", || {
            format!("{} heads do not divide d_model {}", self.num_heads, self.d_model)
        })?;
        let (side, channels) = stem::validate(&self.stem, self.image_size)?;
        ensure(channels == self.d_model, "backbone.stem.channels", || {
            format!("the last layer has {channels} channels, but d_model is {}", self.d_model)
        })?;
        ensure(side * side <= 4096, "backbone.stem", || format!("{side}x{side} patch tokens are more than 4096"))
    }

    /// What expert sets need to know of it.
    pub fn shape(&self) -> BackboneShape {
        let Self { d_model, d_ff, num_layers, substrates, .. } = *self;
        BackboneShape { d_model, d_ff, num_layers, substrates }
    }

    /// Whether there are blocks, and with them a position embedding and a norm.
    /// Without blocks the head pools the stem's output.
    pub fn has_blocks(&self) -> bool {
        self.num_layers > 0
    }

    /// Side of the square grid of patch tokens.
    pub fn grid_side(&self) -> usize {
        self.stem.iter().fold(self.image_size, |side, layer| layer.output_side(side).unwrap_or(0))
    }

    /// Number of patch tokens.
    pub fn num_tokens(&self) -> usize {
        self.grid_side().pow(2)
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
    /// Of a set on a backbone without blocks, which has no experts and of which nobody asks for any.
    pub const NONE: Self = Self {
        num_experts: 1,
        top_k: 1,
        stages_in: 0,
        stages_hidden: 0,
        stages_out: 0,
        angle_bits: 8,
        angle_seed: None,
        router_bits: 8,
        router_scales: FloatFormat::F32,
    };

    /// Checks every field, stages against the sizes of the backbone.
    ///
    /// # Errors
    /// [`ConfigError`] naming the first field that does not fit.
    pub fn validate(&self, backbone: &BackboneShape) -> Result<(), ConfigError> {
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
        ensure([4, 8, 16].contains(&self.router_bits), "experts.router_bits", || {
            format!("{} is not 4, 8 or 16", self.router_bits)
        })?;
        let Some(AngleSeed { seed, spread_bits, .. }) = self.angle_seed else { return Ok(()) };
        ensure(seed < 1 << 53, "experts.angle_seed.seed", || format!("{seed} is not below 2^53"))?;
        ensure((1..=self.angle_bits).contains(&spread_bits), "experts.angle_seed.spread_bits", || {
            format!("{spread_bits} is not in 1..=angle_bits ({})", self.angle_bits)
        })
    }

    /// What draws the angle codes of `site` (0 for `in`, 1 for `hidden`, 2 for `out`) of block `layer`, if they
    /// come from a seed.
    pub fn seeded_angles(&self, layer: usize, site: usize) -> Option<SeededAngles> {
        let AngleSeed { generator: Generator::SplitMix64, seed, spread_bits } = self.angle_seed?;
        Some(SeededAngles::new(seed, layer, site, self.angle_bits, spread_bits))
    }

    /// Angles of one expert in one layer, all sites.
    pub fn angles_per_expert(&self, backbone: &BackboneShape) -> usize {
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
        self.experts.validate(&self.backbone.shape())?;
        ensure((1..=MAX_SIZE).contains(&self.num_classes), "num_classes", || {
            format!("{} is not in 1..={MAX_SIZE}", self.num_classes)
        })
    }

    /// The configuration of that name, or `None`: see [`ViTConfig::PRESETS`].
    #[expect(clippy::too_many_lines, reason = "a table of shapes with an arm for each preset")]
    pub fn preset(name: &str) -> Option<Self> {
        let experts = |num_experts, top_k, stages_in, stages_hidden, angle_bits| ExpertConfig {
            num_experts,
            top_k,
            stages_in,
            stages_hidden,
            stages_out: 0,
            angle_bits,
            angle_seed: None,
            router_bits: 8,
            router_scales: FloatFormat::F32,
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
                    substrates: SubstrateConfig::default(),
                },
                // Deviation: the paper has 16 bits an angle; eight put every run-time byte 424 times below dense experts.
                experts: experts(64, 2, 4, 4, 8),
                num_classes: 100,
            },
            "tiny" => Self {
                backbone: BackboneConfig {
                    image_size: 8,
                    stem: vec![StemLayer::conv3(8, 1), StemLayer::residual3(8, 1), StemLayer::patch(16, 2)],
                    d_model: 16,
                    d_ff: 32,
                    num_layers: 2,
                    num_heads: 2,
                    substrates: SubstrateConfig::default(),
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
                        StemLayer::residual3(64, 2),
                        StemLayer::conv3(128, 2),
                        StemLayer::residual3(128, 4),
                        StemLayer::residual3(128, 5),
                    ],
                    d_model: 128,
                    d_ff: 512,
                    num_layers: 4,
                    num_heads: 4,
                    substrates: SubstrateConfig::default(),
                },
                // The smallest of the shapes tried on paper that keep the feed-forward layers 500 times below dense ones.
                experts: experts(64, 2, 3, 2, 4),
                num_classes: 100,
            },
            // Behind the stem of a finished backbone, which takes the place of the layer here.
            "photo" => Self {
                backbone: BackboneConfig {
                    image_size: 128,
                    stem: vec![StemLayer::patch(192, 32)],
                    d_model: 192,
                    d_ff: 768,
                    num_layers: 3,
                    num_heads: 6,
                    substrates: SubstrateConfig {
                        shared: true,
                        packing: TernaryPacking::FiveTrits,
                        scales: FloatFormat::F16,
                    },
                },
                experts: ExpertConfig { router_bits: 4, router_scales: FloatFormat::F16, ..experts(64, 2, 3, 2, 4) },
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
                    substrates: SubstrateConfig::default(),
                },
                experts: experts(64, 2, 3, 2, 4),
                num_classes: 100,
            },
            _ => return None,
        })
    }

    /// Names that [`ViTConfig::preset`] knows: the paper's, one for tests, the shipped one, one for behind a finished
    /// stem, and one for `compare`.
    pub const PRESETS: [&'static str; 5] = ["paper", "tiny", "cifar", "photo", "study"];
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
            ("backbone.num_layers", |c| c.backbone.num_layers = MAX_DEPTH + 1),
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
