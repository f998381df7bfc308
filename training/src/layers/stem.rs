//! From pixels to patch tokens: the stem's convolutions and the position embedding.

use candle_core::{Result, Tensor};

use super::LayerNorm;
use crate::ops;
use crate::parameters::Parameters;
use model_core::config::{Activation, BackboneConfig, StemLayer};

#[derive(Debug, Clone)]
struct Convolution {
    layer: StemLayer,
    is_depthwise: bool,
    weight: Tensor,
    bias: Tensor,
    norm: Option<LayerNorm>,
}

/// Patch embedding: a stack of convolutions, the last of which has `d_model` channels.
#[derive(Debug, Clone)]
pub struct Stem {
    layers: Vec<Convolution>,
    /// Where there are blocks.
    pos_embed: Option<Tensor>,
}

impl Stem {
    /// The stem of `config`, parameters `stem.{i}.conv.*`, `stem.{i}.norm.*` and `pos_embed`.
    pub fn new(parameters: &Parameters, config: &BackboneConfig) -> Result<Self> {
        let layers = config.stem_inputs().enumerate().map(|(i, (layer, _, channels))| {
            let weight = parameters.get(&format!("stem.{i}.conv.weight"))?;
            let is_depthwise = layer.groups == channels && layer.channels == channels;
            Ok(Convolution {
                layer,
                is_depthwise,
                weight: if is_depthwise { weight } else { without_groups(&weight, layer, channels)? },
                bias: parameters.get(&format!("stem.{i}.conv.bias"))?,
                norm: if layer.norm { Some(LayerNorm::new(parameters, &format!("stem.{i}.norm"))?) } else { None },
            })
        });
        let pos_embed = config.has_blocks().then(|| parameters.get("pos_embed")).transpose()?;
        Ok(Self { layers: layers.collect::<Result<_>>()?, pos_embed })
    }

    /// `[batch, side, side, 3] -> [batch, tokens, d_model]`, tokens row by row.
    pub fn forward(&self, pixels: &Tensor) -> Result<Tensor> {
        self.embed(self.forward_each(pixels, |_, _| Ok(()))?.flatten(1, 2)?)
    }

    /// Adds the position embedding to what the convolutions made, `[batch, tokens, d_model]`.
    pub fn embed(&self, tokens: Tensor) -> Result<Tensor> {
        self.pos_embed.iter().try_fold(tokens, |x, embedding| x.broadcast_add(embedding))
    }

    /// `[batch, side, side, 3] -> [batch, side', side', d_model]`; shows `visit` the output of every layer.
    pub fn forward_each(&self, pixels: &Tensor, mut visit: impl FnMut(usize, &Tensor) -> Result<()>) -> Result<Tensor> {
        let mut x = pixels.clone();
        // The input of every layer so far, for residuals.
        let mut inputs = Vec::with_capacity(self.layers.len());
        for (i, Convolution { layer, is_depthwise, weight, bias, norm }) in self.layers.iter().enumerate() {
            inputs.push(x.clone());
            let conv = if *is_depthwise { ops::depthwise } else { ops::conv };
            let y = conv(&x, weight, bias, *layer)?;
            let y = match (norm, layer.activation) {
                (Some(norm), Activation::Gelu) => norm.forward_gelu(&y)?,
                (Some(norm), activation) => activate(&norm.forward(&y)?, activation)?,
                (None, activation) => activate(&y, activation)?,
            };
            x = match layer.residual {
                Some(from) => (&inputs[from] + y)?,
                None => y,
            };
            visit(i, &x)?;
        }
        Ok(x)
    }
}

fn activate(x: &Tensor, activation: Activation) -> Result<Tensor> {
    match activation {
        Activation::None => Ok(x.clone()),
        Activation::Relu6 => x.clamp(0f32, 6f32),
        Activation::Gelu => ops::gelu(x),
    }
}

/// The weight `[out, kernel * kernel * in / groups]` as one that sees all input channels,
/// `[out, kernel * kernel * in]`, with zeros for those of other groups.
fn without_groups(weight: &Tensor, layer: StemLayer, channels: usize) -> Result<Tensor> {
    let StemLayer { channels: out, kernel, groups, .. } = layer;
    if groups == 1 {
        return Ok(weight.clone());
    }
    let (own, outputs) = (channels / groups, out / groups);
    let weight = weight.reshape((out, kernel * kernel, own))?;
    let parts = (0..groups).map(|group| {
        let rows = weight.narrow(0, group * outputs, outputs)?;
        rows.pad_with_zeros(2, group * own, channels - (group + 1) * own)
    });
    Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, 0)?.reshape((out, kernel * kernel * channels))
}
