//! The Vision Transformer in candle, top to bottom as in the paper's figure: the float reference of the engine, and
//! the graph that training differentiates.

use std::collections::{BTreeMap, BTreeSet};

use candle_core::{Device, Result, Tensor, Var};

use crate::config::{ConfigError, FeedForwardKind, ViTConfig};
use crate::layers::{Attention, FeedForward, LayerNorm, Linear, Routing, Stem};
use crate::ops::Activations;
use crate::random::{AngleSpread, AngleStart, SplitMix64};
use crate::train::quantize;
use crate::weights::{
    self, AngleCodes, BackboneWeights, BlockWeights, ExpertLayerWeights, ExpertSetWeights, StemWeights, Ternary,
};

/// Which roundings the forward pass applies to parameters and activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Quantizers {
    /// Substrates are latent matrices, to be ternarised.
    pub substrates: bool,
    /// Angles and routers are latent values, to be rounded to their codes.
    pub experts: bool,
    /// Activations that meet a substrate.
    pub activations: Activations,
}

impl Quantizers {
    /// Parameters as they are: the float path over an artifact's values.
    pub const NONE: Self = Self { substrates: false, experts: false, activations: Activations::Float };
    /// Training from scratch: every rounding the integer engine makes.
    pub const ALL: Self = Self { substrates: true, experts: true, activations: Activations::Int8 };
    /// Training an expert set on the substrates of an artifact.
    pub const EXPERTS: Self = Self { substrates: false, experts: true, activations: Activations::Int8 };
}

/// Named parameters; the names are those of `FORMAT.md`.
#[derive(Debug, Clone, Default)]
pub struct Parameters {
    vars: BTreeMap<String, Var>,
    frozen: BTreeSet<String>,
}

impl Parameters {
    /// The tensor of that name: part of the graph unless frozen.
    ///
    /// # Errors
    /// When there is none.
    pub fn get(&self, name: &str) -> Result<Tensor> {
        let var = self.var(name)?;
        Ok(if self.frozen.contains(name) { var.as_detached_tensor() } else { var.as_tensor().clone() })
    }

    /// The variable of that name.
    ///
    /// # Errors
    /// When there is none.
    pub fn var(&self, name: &str) -> Result<&Var> {
        self.vars.get(name).ok_or_else(|| candle_core::Error::Msg(format!("no parameter is named {name}")).bt())
    }

    /// Every parameter, by name.
    pub fn all(&self) -> &BTreeMap<String, Var> {
        &self.vars
    }

    /// The parameters that training moves.
    pub fn trainable(&self) -> impl Iterator<Item = (&String, &Var)> {
        self.vars.iter().filter(|(name, _)| !self.frozen.contains(*name))
    }

    /// Replaces a parameter's values.
    ///
    /// # Errors
    /// When there is no such parameter or the number of values differs.
    pub fn set(&self, name: &str, values: &[f32]) -> Result<()> {
        let var = self.var(name)?;
        var.set(&Tensor::from_slice(values, var.shape(), var.device())?)
    }

    fn insert(&mut self, name: impl Into<String>, values: Vec<f32>, shape: &[usize]) -> Result<()> {
        self.vars.insert(name.into(), Var::from_vec(values, shape, &Device::Cpu)?);
        Ok(())
    }

    fn values(&self, name: &str) -> Result<Vec<f32>> {
        self.var(name)?.flatten_all()?.to_vec1()
    }
}

/// Whether a parameter belongs to the expert set (the rest is backbone).
pub fn is_expert_set_parameter(name: &str) -> bool {
    name.starts_with("head.") || name.contains(".moe.r")
}

/// Whether a parameter is the angles of a rotation.
pub fn is_angle(name: &str) -> bool {
    name.contains(".moe.rotation_")
}

/// Whether a parameter is a router's gate.
pub fn is_router(name: &str) -> bool {
    name.ends_with(".moe.router")
}

/// A block: `x += attention(norm1(x))`, `x += feed_forward(norm2(x))`.
#[derive(Debug, Clone)]
struct Block {
    norm1: LayerNorm,
    attention: Attention,
    norm2: LayerNorm,
    feed_forward: FeedForward,
}

/// What a forward pass gives.
#[derive(Debug, Clone)]
pub struct Output {
    /// `[batch, classes]`.
    pub logits: Tensor,
    /// One per block, where there are routers.
    pub routing: Vec<Routing>,
}

/// The model with its parameters.
#[derive(Debug, Clone)]
pub struct ViT {
    config: ViTConfig,
    kind: FeedForwardKind,
    parameters: Parameters,
    angle_start: Option<AngleStart>,
    stem: Stem,
    blocks: Vec<Block>,
    norm: LayerNorm,
    head: Linear,
}

impl ViT {
    /// Fresh latent parameters; the same `seed` gives the same model.
    ///
    /// # Errors
    /// When `config` is invalid.
    pub fn init(config: &ViTConfig, seed: u64) -> Result<Self> {
        Self::init_kind(config, FeedForwardKind::Butterfly, AngleSpread::Narrow, seed)
    }

    /// [`ViT::init`] with feed-forward layers of another kind or another spread of angles. The parameters outside the
    /// feed-forward layers are the same for every kind, and all but the angles for every spread.
    ///
    /// # Errors
    /// When `config` is invalid.
    pub fn init_kind(config: &ViTConfig, kind: FeedForwardKind, spread: AngleSpread, seed: u64) -> Result<Self> {
        config.validate().map_err(invalid)?;
        let mut rng = SplitMix64::at(seed, 0);
        let mut drawn_before = Vec::new();
        let mut p = Parameters::default();
        let (b, e) = (&config.backbone, &config.experts);
        let mut linear = |p: &mut Parameters, name: &str, out: usize, inputs: usize, gain: f64| -> Result<()> {
            p.insert(
                format!("{name}.weight"),
                rng.normals(out * inputs, gain / (inputs as f64).sqrt()),
                &[out, inputs],
            )?;
            p.insert(format!("{name}.bias"), vec![0.0; out], &[out])
        };
        let norm = |p: &mut Parameters, name: &str, n: usize| -> Result<()> {
            p.insert(format!("{name}.gamma"), vec![1.0; n], &[n])?;
            p.insert(format!("{name}.beta"), vec![0.0; n], &[n])
        };
        for (i, (layer, _, channels)) in b.stem_inputs().enumerate() {
            linear(&mut p, &format!("stem.{i}.conv"), layer.channels, layer.kernel.pow(2) * channels, 1.4)?;
            if layer.norm_gelu {
                norm(&mut p, &format!("stem.{i}.norm"), layer.channels)?;
            }
        }
        for l in 0..b.num_layers {
            norm(&mut p, &format!("blocks.{l}.norm1"), b.d_model)?;
            linear(&mut p, &format!("blocks.{l}.attention.qkv"), 3 * b.d_model, b.d_model, 1.0)?;
            linear(&mut p, &format!("blocks.{l}.attention.proj"), b.d_model, b.d_model, 0.5)?;
            norm(&mut p, &format!("blocks.{l}.norm2"), b.d_model)?;
        }
        norm(&mut p, "norm", b.d_model)?;
        linear(&mut p, "head", config.num_classes, b.d_model, 0.5)?;
        p.insert("pos_embed", rng.normals(b.num_tokens() * b.d_model, 0.02), &[b.num_tokens(), b.d_model])?;
        for l in 0..b.num_layers {
            let mut matrix = |part: &str, std: f64, shape: &[usize]| {
                p.insert(format!("blocks.{l}.moe.{part}"), rng.normals(shape.iter().product(), std), shape)
            };
            // Dense experts own their matrices, so there is one of each per expert.
            let own: &[usize] = if kind == FeedForwardKind::DenseExperts { &[e.num_experts] } else { &[] };
            matrix("up", (b.d_model as f64).powf(-0.5), &[own, &[b.d_ff, b.d_model]].concat())?;
            if kind != FeedForwardKind::ButterflyTied {
                matrix("down", 0.5 * (b.d_ff as f64).powf(-0.5), &[own, &[b.d_model, b.d_ff]].concat())?;
            }
            if kind == FeedForwardKind::Dense {
                continue;
            }
            matrix("router", (b.d_model as f64).powf(-0.5), &[e.num_experts, b.d_model])?;
            if kind == FeedForwardKind::DenseExperts {
                continue;
            }
            let sites =
                [("in", e.stages_in, b.d_model), ("hidden", e.stages_hidden, b.d_ff), ("out", e.stages_out, b.d_model)];
            drawn_before.push([0; 3]);
            for (i, (site, stages, features)) in sites.into_iter().enumerate() {
                drawn_before[l][i] = rng.drawn();
                if stages > 0 || site != "out" {
                    let shape = [e.num_experts, stages, features / 2];
                    let angles = rng.angles(shape.iter().product(), spread, e.angle_bits);
                    p.insert(format!("blocks.{l}.moe.rotation_{site}"), angles, &shape)?;
                }
            }
            match kind {
                FeedForwardKind::ButterflyGains => {
                    let name = format!("blocks.{l}.moe.gains");
                    p.insert(name, vec![1.0; e.num_experts * b.d_ff], &[e.num_experts, b.d_ff])?;
                }
                FeedForwardKind::ButterflyTied => {
                    // As large as a `down` of its own would be.
                    let scale = 0.5 * (b.d_model as f32 / b.d_ff as f32).sqrt();
                    p.insert(format!("blocks.{l}.moe.down_scale"), vec![scale; b.d_model], &[b.d_model])?;
                }
                _ => {}
            }
        }
        let start = AngleStart { generator: AngleStart::GENERATOR.into(), seed, spread, drawn_before };
        let angle_start = (!start.drawn_before.is_empty()).then_some(start);
        Ok(Self { angle_start, ..Self::assemble(config.clone(), kind, p)? })
    }

    /// The values an artifact stands for. Meant for [`Quantizers::NONE`]: its substrates are already ternary.
    ///
    /// # Errors
    /// When the shapes of the weights do not fit their configuration.
    pub fn from_weights(backbone: &BackboneWeights, set: &ExpertSetWeights) -> Result<Self> {
        Self::from_weights_with(backbone, set, dense)
    }

    /// Latent parameters that round to the artifact's values ([`ViT::to_weights`]), so that training can go on from it
    /// with [`Quantizers::ALL`].
    ///
    /// # Errors
    /// As for [`ViT::from_weights`].
    pub fn latent_from_weights(backbone: &BackboneWeights, set: &ExpertSetWeights) -> Result<Self> {
        Self::from_weights_with(backbone, set, latent)
    }

    fn from_weights_with(
        backbone: &BackboneWeights,
        set: &ExpertSetWeights,
        substrate: fn(&Ternary) -> Vec<f32>,
    ) -> Result<Self> {
        let config = set.vit_config(&backbone.config);
        config.validate().map_err(invalid)?;
        let (b, e) = (&config.backbone, &config.experts);
        let mut p = Parameters::default();
        let linear = |p: &mut Parameters, name: &str, layer: &weights::Linear| -> Result<()> {
            let out = layer.bias.len();
            p.insert(format!("{name}.weight"), layer.weight.clone(), &[out, layer.weight.len() / out.max(1)])?;
            p.insert(format!("{name}.bias"), layer.bias.clone(), &[out])
        };
        let norm = |p: &mut Parameters, name: &str, layer: &weights::Norm| -> Result<()> {
            p.insert(format!("{name}.gamma"), layer.gamma.clone(), &[layer.gamma.len()])?;
            p.insert(format!("{name}.beta"), layer.beta.clone(), &[layer.beta.len()])
        };
        for (i, layer) in backbone.stem.iter().enumerate() {
            linear(&mut p, &format!("stem.{i}.conv"), &layer.conv)?;
            if let Some(layer) = &layer.norm {
                norm(&mut p, &format!("stem.{i}.norm"), layer)?;
            }
        }
        p.insert("pos_embed", backbone.pos_embed.clone(), &[b.num_tokens(), b.d_model])?;
        for (l, (block, layer)) in backbone.blocks.iter().zip(&set.layers).enumerate() {
            norm(&mut p, &format!("blocks.{l}.norm1"), &block.norm1)?;
            linear(&mut p, &format!("blocks.{l}.attention.qkv"), &block.qkv)?;
            linear(&mut p, &format!("blocks.{l}.attention.proj"), &block.proj)?;
            norm(&mut p, &format!("blocks.{l}.norm2"), &block.norm2)?;
            let mut matrix = |part: &str, values: Vec<f32>, shape: &[usize]| {
                p.insert(format!("blocks.{l}.moe.{part}"), values, shape)
            };
            matrix("up", substrate(&block.up), &[b.d_ff, b.d_model])?;
            matrix("down", substrate(&block.down), &[b.d_model, b.d_ff])?;
            let rows = layer.router.chunks_exact(b.d_model).zip(&layer.router_scale);
            let router = rows.flat_map(|(row, scale)| row.iter().map(move |&code| f32::from(code) * scale)).collect();
            matrix("router", router, &[e.num_experts, b.d_model])?;
            let angles = |codes: &AngleCodes| quantize::angles_of_codes(&codes.codes, e.angle_bits);
            matrix("rotation_in", angles(&layer.rotation_in), &[e.num_experts, e.stages_in, b.d_model / 2])?;
            matrix("rotation_hidden", angles(&layer.rotation_hidden), &[e.num_experts, e.stages_hidden, b.d_ff / 2])?;
            if e.stages_out > 0 {
                matrix("rotation_out", angles(&layer.rotation_out), &[e.num_experts, e.stages_out, b.d_model / 2])?;
            }
        }
        norm(&mut p, "norm", &backbone.norm)?;
        linear(&mut p, "head", &set.head)?;
        Self::assemble(config, FeedForwardKind::Butterfly, p)
    }

    /// The codes that latent parameters round to, ready for an artifact.
    ///
    /// # Errors
    /// When the number of `labels` is not the number of classes, or the feed-forward layers are of a kind that
    /// artifacts do not hold.
    pub fn to_weights(&self, labels: &[String]) -> Result<(BackboneWeights, ExpertSetWeights)> {
        let (b, e) = (&self.config.backbone, &self.config.experts);
        if labels.len() != self.config.num_classes {
            candle_core::bail!("{} labels for {} classes", labels.len(), self.config.num_classes);
        }
        if self.kind != FeedForwardKind::Butterfly {
            candle_core::bail!("artifacts hold butterfly experts, not {:?}", self.kind);
        }
        let p = &self.parameters;
        let linear = |name: &str| -> Result<weights::Linear> {
            Ok(weights::Linear {
                weight: p.values(&format!("{name}.weight"))?,
                bias: p.values(&format!("{name}.bias"))?,
            })
        };
        let norm = |name: &str| -> Result<weights::Norm> {
            Ok(weights::Norm { gamma: p.values(&format!("{name}.gamma"))?, beta: p.values(&format!("{name}.beta"))? })
        };
        let stem = b.stem.iter().enumerate().map(|(i, layer)| {
            Ok(StemWeights {
                conv: linear(&format!("stem.{i}.conv"))?,
                norm: if layer.norm_gelu { Some(norm(&format!("stem.{i}.norm"))?) } else { None },
            })
        });
        let ternary = |name: &str, cols: usize| -> Result<Ternary> {
            let (codes, scale) = crate::kernels::ternary::scalar::ternarize(&p.values(name)?, cols);
            Ok(Ternary { codes, scale })
        };
        let blocks = (0..b.num_layers).map(|l| {
            Ok(BlockWeights {
                norm1: norm(&format!("blocks.{l}.norm1"))?,
                qkv: linear(&format!("blocks.{l}.attention.qkv"))?,
                proj: linear(&format!("blocks.{l}.attention.proj"))?,
                norm2: norm(&format!("blocks.{l}.norm2"))?,
                up: ternary(&format!("blocks.{l}.moe.up"), b.d_model)?,
                down: ternary(&format!("blocks.{l}.moe.down"), b.d_ff)?,
            })
        });
        let backbone = BackboneWeights {
            config: b.clone(),
            stem: stem.collect::<Result<_>>()?,
            pos_embed: p.values("pos_embed")?,
            blocks: blocks.collect::<Result<_>>()?,
            norm: norm("norm")?,
        };
        let layers = (0..b.num_layers).map(|l| {
            let values = |part: &str| p.values(&format!("blocks.{l}.moe.{part}"));
            let codes = |part: &str| -> Result<AngleCodes> {
                Ok(AngleCodes { codes: quantize::angle_codes(&values(part)?, e.angle_bits) })
            };
            let (router, router_scale) = quantize::router_codes(&values("router")?, b.d_model, e.router_bits);
            Ok(ExpertLayerWeights {
                router,
                router_scale,
                rotation_in: codes("rotation_in")?,
                rotation_hidden: codes("rotation_hidden")?,
                rotation_out: if e.stages_out > 0 { codes("rotation_out")? } else { AngleCodes::default() },
            })
        });
        let set = ExpertSetWeights {
            config: e.clone(),
            layers: layers.collect::<Result<_>>()?,
            head: linear("head")?,
            labels: labels.to_vec(),
        };
        Ok((backbone, set))
    }

    fn assemble(config: ViTConfig, kind: FeedForwardKind, parameters: Parameters) -> Result<Self> {
        let p = &parameters;
        let blocks = (0..config.backbone.num_layers).map(|l| {
            Ok(Block {
                norm1: LayerNorm::new(p, &format!("blocks.{l}.norm1"))?,
                attention: Attention::new(p, &format!("blocks.{l}.attention"), config.backbone.num_heads)?,
                norm2: LayerNorm::new(p, &format!("blocks.{l}.norm2"))?,
                feed_forward: FeedForward::new(p, &format!("blocks.{l}.moe"), kind, &config.experts)?,
            })
        });
        Ok(Self {
            stem: Stem::new(p, &config.backbone)?,
            blocks: blocks.collect::<Result<_>>()?,
            norm: LayerNorm::new(p, "norm")?,
            head: Linear::new(p, "head")?,
            config,
            kind,
            parameters,
            angle_start: None,
        })
    }

    /// The same model with every parameter for which `frozen` is true left out of the graph.
    ///
    /// # Errors
    /// Never for a model that was built.
    pub fn freeze(self, frozen: impl Fn(&str) -> bool) -> Result<Self> {
        let Self { config, kind, mut parameters, angle_start, .. } = self;
        parameters.frozen = parameters.vars.keys().filter(|name| frozen(name)).cloned().collect();
        Ok(Self { angle_start, ..Self::assemble(config, kind, parameters)? })
    }

    /// The same model with another record of where its angles started: that of the model it was made from.
    pub fn with_angle_start(self, angle_start: Option<AngleStart>) -> Self {
        Self { angle_start, ..self }
    }

    /// Where the angles started; none for a model made of an artifact's values, or without angles.
    pub fn angle_start(&self) -> Option<&AngleStart> {
        self.angle_start.as_ref()
    }

    /// The model's shapes.
    pub fn config(&self) -> &ViTConfig {
        &self.config
    }

    /// The model's parameters.
    pub fn parameters(&self) -> &Parameters {
        &self.parameters
    }

    /// `pixels [batch, side, side, 3]`, normalised, to logits.
    ///
    /// # Errors
    /// When shapes do not fit.
    pub fn forward(&self, pixels: &Tensor, quantizers: Quantizers) -> Result<Output> {
        self.forward_scaled(pixels, quantizers, None)
    }

    /// [`ViT::forward`] with the residual branches of every image multiplied by `branch_scales [batch, 2 * layers]`,
    /// attention before feed-forward.
    ///
    /// # Errors
    /// When shapes do not fit.
    pub fn forward_scaled(
        &self,
        pixels: &Tensor,
        quantizers: Quantizers,
        branch_scales: Option<&Tensor>,
    ) -> Result<Output> {
        let scaled = |y: Tensor, branch: usize| match branch_scales {
            Some(scales) => y.broadcast_mul(&scales.narrow(1, branch, 1)?.unsqueeze(2)?),
            None => Ok(y),
        };
        let mut x = self.stem.forward(pixels)?;
        let mut routing = Vec::with_capacity(self.blocks.len());
        for (layer, block) in self.blocks.iter().enumerate() {
            let y = block.attention.forward(&block.norm1.forward(&x)?)?;
            x = (x + scaled(y, 2 * layer)?)?;
            let (y, chosen) = block.feed_forward.forward(&block.norm2.forward(&x)?, quantizers)?;
            x = (x + scaled(y, 2 * layer + 1)?)?;
            routing.extend(chosen);
        }
        let pooled = self.norm.forward(&x)?.mean(1)?;
        Ok(Output { logits: self.head.forward(&pooled)?, routing })
    }
}

fn dense(matrix: &Ternary) -> Vec<f32> {
    let cols = matrix.codes.len() / matrix.scale.len().max(1);
    let rows = matrix.codes.chunks_exact(cols.max(1)).zip(&matrix.scale);
    rows.flat_map(|(row, scale)| row.iter().map(move |&code| f32::from(code) * scale)).collect()
}

/// Rounding takes the mean magnitude of a row for its scale. That of `code * scale` is smaller by the share of codes that
/// are not zero.
fn latent(matrix: &Ternary) -> Vec<f32> {
    let cols = (matrix.codes.len() / matrix.scale.len().max(1)).max(1);
    let rows = matrix.codes.chunks_exact(cols).zip(&matrix.scale);
    let latents = rows.flat_map(|(row, scale)| {
        let nonzero = row.iter().filter(|&&code| code != 0).count().max(1);
        let value = (f64::from(*scale) * cols as f64 / nonzero as f64) as f32;
        row.iter().map(move |&code| f32::from(code) * value)
    });
    latents.collect()
}

fn invalid(error: ConfigError) -> candle_core::Error {
    candle_core::Error::Msg(error.to_string()).bt()
}
