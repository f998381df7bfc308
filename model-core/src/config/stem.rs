//! The convolutions from pixels to patch tokens.

use serde::{Deserialize, Serialize};

use super::{ConfigError, MAX_DEPTH, ensure, size};

/// What follows the convolution and the norm of a stem layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// The identity.
    #[default]
    None,
    /// `min(max(x, 0), 6)`.
    Relu6,
    /// `0.5 x (1 + erf(x / sqrt(2)))`.
    Gelu,
}

/// One convolution of the stem, over channel-last features: `y = activation(norm(conv(x)))`, to which the input of this
/// or of an earlier layer may be added.
///
/// A plain patch embedding is a single layer with `kernel = stride = patch_size` and nothing else. A depthwise
/// convolution has as many groups as channels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StemLayer {
    pub channels: usize,
    /// Square kernel side in pixels.
    pub kernel: usize,
    /// Step between windows in pixels.
    pub stride: usize,
    /// Zero padding `[top, left, bottom, right]` in pixels.
    pub padding: [usize; 4],
    /// Groups of channels that are convolved apart; divides the channels of input and output.
    pub groups: usize,
    /// LayerNorm over channels after the convolution.
    pub norm: bool,
    /// After the norm.
    pub activation: Activation,
    /// The layer, this or an earlier one, whose input is added to the output of this layer. The two have the same shape.
    pub residual: Option<usize>,
}

impl StemLayer {
    /// A non-overlapping patch embedding.
    pub const fn patch(d_model: usize, patch_size: usize) -> Self {
        Self {
            channels: d_model,
            kernel: patch_size,
            stride: patch_size,
            padding: [0; 4],
            groups: 1,
            norm: false,
            activation: Activation::None,
            residual: None,
        }
    }

    /// A 3x3 convolution with norm and GELU; `stride` 2 halves the side.
    pub const fn conv3(channels: usize, stride: usize) -> Self {
        Self { kernel: 3, padding: [1; 4], norm: true, activation: Activation::Gelu, ..Self::patch(channels, stride) }
    }

    /// [`StemLayer::conv3`] of stride 1 that adds the input of the layer `from`.
    pub const fn residual3(channels: usize, from: usize) -> Self {
        Self { residual: Some(from), ..Self::conv3(channels, 1) }
    }

    /// Output side for a square input of side `side`; `None` when the kernel does not fit or the output is not square.
    pub fn output_side(&self, side: usize) -> Option<usize> {
        let [top, left, bottom, right] = self.padding;
        let along = |before: usize, after: usize| {
            Some((side + before + after).checked_sub(self.kernel)?.checked_div(self.stride)? + 1)
        };
        along(top, bottom).filter(|&height| along(left, right) == Some(height))
    }

    /// Values of one window of one group, when the input has so many channels.
    pub fn window_len(&self, input_channels: usize) -> usize {
        self.kernel.pow(2) * (input_channels / self.groups)
    }

    fn validate(&self, i: usize, (side, channels): (usize, usize)) -> Result<usize, ConfigError> {
        let Self { kernel, stride, padding, groups, .. } = *self;
        size(self.channels, "backbone.stem.channels")?;
        ensure((1..=64).contains(&kernel), "backbone.stem.kernel", || format!("layer {i}: {kernel} is not in 1..=64"))?;
        ensure((1..=64).contains(&stride), "backbone.stem.stride", || format!("layer {i}: {stride} is not in 1..=64"))?;
        ensure(padding.iter().all(|&padding| padding < kernel), "backbone.stem.padding", || {
            format!("layer {i}: {padding:?} is not below the kernel side {kernel}")
        })?;
        let divides = |n: usize| groups >= 1 && n.is_multiple_of(groups);
        ensure(divides(channels) && divides(self.channels), "backbone.stem.groups", || {
            format!("layer {i}: {groups} groups do not divide {channels} and {} channels", self.channels)
        })?;
        let [top, left, bottom, right] = padding;
        ensure(side + (top + bottom).min(left + right) >= kernel, "backbone.stem.kernel", || {
            format!("layer {i}: kernel {kernel} does not fit a {side}x{side} input")
        })?;
        let out = self.output_side(side).ok_or_else(|| ConfigError {
            field: "backbone.stem.padding",
            reason: format!("layer {i}: a padding of {padding:?} makes the output no square"),
        })?;
        ensure(padding != [0; 4] || (side - kernel).is_multiple_of(stride), "backbone.stem.stride", || {
            format!("layer {i}: patches of {kernel} with stride {stride} do not tile a side of {side}")
        })?;
        Ok(out)
    }
}

/// Checks all layers of a stem for images of side `image_size`, and returns side and channels of its output.
pub(super) fn validate(stem: &[StemLayer], image_size: usize) -> Result<(usize, usize), ConfigError> {
    ensure((1..=MAX_DEPTH).contains(&stem.len()), "backbone.stem", || {
        format!("{} layers; there must be 1..={MAX_DEPTH}", stem.len())
    })?;
    // Side and channels of the input of every layer so far.
    let mut inputs = Vec::with_capacity(stem.len());
    let mut shape = (image_size, 3);
    for (i, layer) in stem.iter().enumerate() {
        inputs.push(shape);
        let out = layer.validate(i, shape)?;
        shape = (out, layer.channels);
        let Some(from) = layer.residual else { continue };
        let Some(&(side, channels)) = inputs.get(from) else {
            let reason = format!("layer {i} adds the input of layer {from}, which comes later");
            return Err(ConfigError { field: "backbone.stem.residual", reason });
        };
        ensure((side, channels) == shape, "backbone.stem.residual", || {
            format!(
                "layer {i} makes {out}x{out}x{}; the input of layer {from}, {side}x{side}x{channels}, cannot be added",
                layer.channels
            )
        })?;
    }
    Ok(shape)
}
