//! From pixels to patch tokens: the stem's convolutions and the position embedding.

use candle_core::{Result, Tensor};

use super::LayerNorm;
use crate::ops;
use crate::parameters::Parameters;
use model_core::config::{BackboneConfig, StemLayer};

#[derive(Debug, Clone)]
struct Convolution {
    layer: StemLayer,
    weight: Tensor,
    bias: Tensor,
    norm: Option<LayerNorm>,
}

/// Patch embedding: a stack of convolutions, the last of which has `d_model` channels.
#[derive(Debug, Clone)]
pub struct Stem {
    layers: Vec<Convolution>,
    pos_embed: Tensor,
}

impl Stem {
    /// The stem of `config`, parameters `stem.{i}.conv.*`, `stem.{i}.norm.*` and `pos_embed`.
    pub fn new(parameters: &Parameters, config: &BackboneConfig) -> Result<Self> {
        let layers = config.stem.iter().enumerate().map(|(i, &layer)| {
            Ok(Convolution {
                layer,
                weight: parameters.get(&format!("stem.{i}.conv.weight"))?,
                bias: parameters.get(&format!("stem.{i}.conv.bias"))?,
                norm: if layer.norm_gelu { Some(LayerNorm::new(parameters, &format!("stem.{i}.norm"))?) } else { None },
            })
        });
        Ok(Self { layers: layers.collect::<Result<_>>()?, pos_embed: parameters.get("pos_embed")? })
    }

    /// `[batch, side, side, 3] -> [batch, tokens, d_model]`, tokens row by row.
    pub fn forward(&self, pixels: &Tensor) -> Result<Tensor> {
        let mut x = pixels.clone();
        for Convolution { layer, weight, bias, norm } in &self.layers {
            let mut y = ops::conv(&x, weight, bias, *layer)?;
            if let Some(norm) = norm {
                y = norm.forward_gelu(&y)?;
            }
            x = if layer.residual { (x + y)? } else { y };
        }
        x.flatten(1, 2)?.broadcast_add(&self.pos_embed)
    }
}
