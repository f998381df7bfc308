//! Convolutions as products over windows, channel-last; f32 from layer to layer.

use crate::config::{Activation, BackboneConfig, ConfigError, StemLayer};
use crate::engine::packed::{PackedLayer, Quantized};
use crate::kernels::activation::gelu;
use crate::kernels::combine::add_assign;
use crate::kernels::norm::layer_norm;
use crate::kernels::{Isa, KernelError};
use crate::weights::{LAYER_NORM_EPS, Norm, StemWeights};

/// One layer of the stem.
#[derive(Debug)]
pub(super) struct Convolution {
    layer: StemLayer,
    /// Side and channels of the square input.
    input: (usize, usize),
    output_side: usize,
    conv: PackedLayer,
    norm: Option<Norm>,
}

impl Convolution {
    pub(super) fn pack(
        isa: Isa,
        weights: &StemWeights,
        (layer, side, channels): (StemLayer, usize, usize),
        first: bool,
    ) -> Result<Self, KernelError> {
        let window = layer.window_len(channels);
        // Pixels stay f32: their layer is small, and what it rounds away no later one brings back.
        let pack = if first { PackedLayer::f32 } else { PackedLayer::int8 };
        let conv = pack(isa, &weights.conv, layer.channels, window)?;
        let output_side = layer.output_side(side).unwrap_or(0);
        Ok(Self { layer, input: (side, channels), output_side, conv, norm: weights.norm.clone() })
    }

    pub(super) fn heap_bytes(&self) -> usize {
        let norm = self.norm.as_ref().map_or(0, |norm| norm.gamma.len() + norm.beta.len());
        self.conv.heap_bytes() + norm * size_of::<f32>()
    }

    /// Windows of one image.
    pub(super) fn windows(&self) -> usize {
        self.output_side.pow(2)
    }

    pub(super) fn channels(&self) -> usize {
        self.layer.channels
    }

    /// Values of one window.
    pub(super) fn window_len(&self) -> usize {
        self.layer.kernel.pow(2) * self.input.1
    }

    /// Runs the windows from `first` on of one image, a tile of them at most, into `out` `[windows, channels]`. `gathered`
    /// has room for a tile's windows and `raw` for its output.
    pub(super) fn forward(
        &self,
        isa: Isa,
        input: &[f32],
        first: usize,
        (gathered, raw, quantized): (&mut [f32], &mut [f32], &mut Quantized),
        out: &mut [f32],
    ) -> Result<(), KernelError> {
        let gathered = &mut gathered[..out.len() / self.channels() * self.window_len()];
        for (i, window) in gathered.chunks_exact_mut(self.window_len()).enumerate() {
            self.gather(input, first + i, window);
        }
        let Some(norm) = &self.norm else {
            self.conv.forward(gathered, quantized, out)?;
            self.activate(isa, out);
            self.add_input(isa, input, first, out);
            return Ok(());
        };
        let raw = &mut raw[..out.len()];
        self.conv.forward(gathered, quantized, raw)?;
        layer_norm(isa, raw, &norm.gamma, &norm.beta, LAYER_NORM_EPS, out);
        self.activate(isa, out);
        self.add_input(isa, input, first, out);
        Ok(())
    }

    fn activate(&self, isa: Isa, out: &mut [f32]) {
        match self.layer.activation {
            Activation::None => {}
            Activation::Relu6 => out.iter_mut().for_each(|v| *v = v.clamp(0.0, 6.0)),
            Activation::Gelu => gelu(isa, out),
        }
    }

    /// The residual connection; input and output have the same shape where there is one.
    fn add_input(&self, isa: Isa, input: &[f32], first: usize, out: &mut [f32]) {
        if self.layer.residual.is_some() {
            add_assign(isa, out, &input[first * self.channels()..][..out.len()]);
        }
    }

    /// The pixels under window `index`, in the order (row, column, channel); zero where it hangs over the edge.
    fn gather(&self, input: &[f32], index: usize, window: &mut [f32]) {
        let (side, channels) = self.input;
        let StemLayer { kernel, stride, padding: [above, before, ..], .. } = self.layer;
        let (top, left) = (index / self.output_side * stride, index % self.output_side * stride);
        // Columns of the kernel that lie inside the image.
        let begin = before.saturating_sub(left).min(kernel);
        let end = (side + before).saturating_sub(left).clamp(begin, kernel);
        for (row, line) in window.chunks_exact_mut(kernel * channels).enumerate() {
            if top + row < above || top + row >= side + above || begin == end {
                line.fill(0.0);
                continue;
            }
            let start = ((top + row - above) * side + left + begin - before) * channels;
            line[..begin * channels].fill(0.0);
            line[begin * channels..end * channels].copy_from_slice(&input[start..][..(end - begin) * channels]);
            line[end * channels..].fill(0.0);
        }
    }
}

/// Refuses what the float path computes but this one does not: groups, and residuals from layers before.
pub(super) fn check_supported(config: &BackboneConfig) -> Result<(), ConfigError> {
    let unsupported = |(i, layer): (usize, &StemLayer)| {
        let what = match layer {
            StemLayer { groups: 2.., .. } => "grouped convolutions",
            StemLayer { residual: Some(from), .. } if *from != i => "residuals from earlier layers",
            _ => return None,
        };
        Some(ConfigError { field: "backbone.stem", reason: format!("layer {i}: the integer path has no {what}") })
    };
    config.stem.iter().enumerate().find_map(unsupported).map_or(Ok(()), Err)
}

/// Values of the largest activation between layers.
pub(super) fn largest_between(config: &BackboneConfig) -> usize {
    let between = config.stem_inputs().take(config.stem.len().saturating_sub(1));
    let values = between.map(|(layer, side, _)| layer.output_side(side).unwrap_or(0).pow(2) * layer.channels);
    values.max().unwrap_or(0)
}
