//! The Vision Transformer in candle, top to bottom as in the paper's figure: the float reference of the engine, and
//! the graph that training differentiates.

mod convert;
mod init;
mod size;

use candle_core::{Result, Tensor};
use model_core::config::{ConfigError, FeedForwardKind, ViTConfig};
use model_core::random::AngleStart;

use crate::layers::{Attention, FeedForward, LayerNorm, Linear, RouterNoise, Routing, Stem};
use crate::parameters::{Parameters, Quantizers};

/// A block: `x += attention(norm1(x))`, `x += feed_forward(norm2(x))`.
#[derive(Debug, Clone)]
struct Block {
    norm1: LayerNorm,
    attention: Attention,
    norm2: LayerNorm,
    feed_forward: FeedForward,
}

/// What training varies in a forward pass.
#[derive(Debug, Clone, Copy, Default)]
pub struct Variation<'a> {
    /// What the residual branches of every image are multiplied by, `[batch, 2 * layers]`, attention before feed-forward.
    pub branch_scales: Option<&'a Tensor>,
    /// On every layer's routers; the layer in it does not count.
    pub router_noise: Option<RouterNoise<'a>>,
}

/// What a forward pass gives.
#[derive(Debug, Clone)]
pub struct Output {
    /// One row an image, `[batch, classes]`.
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
    /// Where there are blocks.
    norm: Option<LayerNorm>,
    head: Linear,
}

impl ViT {
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
            norm: config.backbone.has_blocks().then(|| LayerNorm::new(p, "norm")).transpose()?,
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
        let Self { config, kind, parameters, angle_start, .. } = self;
        Ok(Self { angle_start, ..Self::assemble(config, kind, parameters.freeze(frozen))? })
    }

    /// The same model with another record of where its angles started: that of the model it was made from.
    pub fn with_angle_start(self, angle_start: Option<AngleStart>) -> Self {
        Self { angle_start, ..self }
    }

    /// Where the angles started; none for a model made of an artifact's values, or without angles.
    pub fn angle_start(&self) -> Option<&AngleStart> {
        self.angle_start.as_ref()
    }

    pub fn config(&self) -> &ViTConfig {
        &self.config
    }

    /// The convolutions from pixels to tokens.
    pub fn stem(&self) -> &Stem {
        &self.stem
    }

    pub fn parameters(&self) -> &Parameters {
        &self.parameters
    }

    /// `pixels [batch, side, side, 3]`, normalised, to logits.
    pub fn forward(&self, pixels: &Tensor, quantizers: Quantizers) -> Result<Output> {
        self.forward_varied(pixels, quantizers, Variation::default())
    }

    /// [`ViT::forward`] with the variations of training.
    pub fn forward_varied(&self, pixels: &Tensor, quantizers: Quantizers, variation: Variation<'_>) -> Result<Output> {
        self.forward_blocks(self.stem.forward(pixels)?, quantizers, variation)
    }

    /// [`ViT::forward_varied`] from what the stem's convolutions made of the pixels, `[batch, tokens, d_model]`.
    pub fn forward_tokens(&self, tokens: Tensor, quantizers: Quantizers, variation: Variation<'_>) -> Result<Output> {
        self.forward_blocks(self.stem.embed(tokens)?, quantizers, variation)
    }

    fn forward_blocks(&self, mut x: Tensor, quantizers: Quantizers, variation: Variation<'_>) -> Result<Output> {
        let scaled = |y: Tensor, branch: usize| match variation.branch_scales {
            Some(scales) => y.broadcast_mul(&scales.narrow(1, branch, 1)?.unsqueeze(2)?),
            None => Ok(y),
        };
        let mut routing = Vec::with_capacity(self.blocks.len());
        for (layer, block) in self.blocks.iter().enumerate() {
            let y = block.attention.forward(&block.norm1.forward(&x)?)?;
            x = (x + scaled(y, 2 * layer)?)?;
            let noise = variation.router_noise.map(|noise| RouterNoise { layer, ..noise });
            let (y, chosen) = block.feed_forward.forward(&block.norm2.forward(&x)?, quantizers, noise)?;
            x = (x + scaled(y, 2 * layer + 1)?)?;
            routing.extend(chosen);
        }
        let pooled = self.norm.iter().try_fold(x, |x, norm| norm.forward(&x))?.mean(1)?;
        Ok(Output { logits: self.head.forward(&pooled)?, routing })
    }
}

fn invalid(error: ConfigError) -> candle_core::Error {
    candle_core::Error::Msg(error.to_string()).bt()
}
