//! A stem whose outputs have calibrated steps: int8 codes from layer to layer, one image at a time.
//!
//! A code q stands for `step * (q - zero)`. The zero is -128 where no value is negative, and 0 elsewhere; pixels have a step
//! and a zero for each channel that follow from the preprocessing, so that their codes are the samples of the picture minus
//! 128. All of it is folded into scale and bias of [`Requantize`], and sums are exact:
//! every instruction set computes the same bits.

use std::ops::Range;

use super::StemThread;
use super::planes::{Lifetime, places};
use crate::config::{Activation, BackboneConfig, ConfigError, StemLayer};
use crate::engine::crew::Loops;
use crate::engine::moe::LENGTHS;
use crate::engine::packed::TILE;
use crate::engine::parts::{Parts, PerThread};
use crate::error::ModelError;
use crate::image::Preprocess;
use crate::kernels::depthwise::{Input, Shape};
use crate::kernels::{Isa, PackedDepthwise, PackedPointwise, Requantize, vectorized};
use crate::weights::{BackboneWeights, Matrix, Precision};

/// 1.5 times 2^23: a float to which this is added has no digits behind the point left, ties to even. What is too large for
/// that saturates as a code. A baseline CPU rounds by a call of a library.
const ROUNDING: f32 = 12_582_912.0;

/// The stem of one backbone.
#[derive(Debug)]
pub(super) struct Calibrated {
    layers: Box<[Layer]>,
    /// Values of the normalised pixels to codes: `round(pixel * scale + shift)` for each channel.
    pixels: [(f32, f32); 3],
    image: Range<usize>,
    /// Of the last layer.
    output: Codes,
    planes_len: usize,
}

/// What codes stand for: `step * (code - zero)`.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Codes {
    step: f32,
    zero: i8,
}

#[derive(Debug)]
struct Layer {
    layer: StemLayer,
    /// Side and channels of the input.
    input: (usize, usize),
    output_side: usize,
    conv: Conv,
    /// Where input, output and what is added to it lie among the planes.
    from: Range<usize>,
    to: Range<usize>,
    added: Option<Range<usize>>,
}

#[derive(Debug)]
enum Conv {
    Depthwise {
        packed: PackedDepthwise,
        zero: i8,
    },
    /// Each channel sees all of the input's.
    Dense {
        packed: PackedPointwise,
        zeros: Box<[i8]>,
    },
}

/// Whether codes can go from layer to layer.
fn is_calibrated(weights: &BackboneWeights) -> bool {
    let steps = weights.stem.iter().all(|layer| layer.step.is_some());
    let plain = |layer: &StemLayer| !layer.norm && layer.activation != Activation::Gelu;
    steps && weights.config.stem.iter().all(plain)
}

/// What the codes of a layer's output stand for.
fn output_codes(layer: &StemLayer, step: f32) -> Codes {
    let positive = layer.activation == Activation::Relu6 && layer.residual.is_none();
    Codes { step, zero: if positive { -128 } else { 0 } }
}

impl Calibrated {
    /// `None` for a stem that is not calibrated, or has norms or GELU.
    ///
    /// # Errors
    /// [`ModelError`] for groups that are not those of a depthwise convolution, and weights that do not fit.
    pub(super) fn pack(
        isa: Isa,
        weights: &BackboneWeights,
        preprocess: &Preprocess,
    ) -> Result<Option<Self>, ModelError> {
        if !is_calibrated(weights) {
            return Ok(None);
        }
        let config = &weights.config;
        let places = planes(config);
        let mut layers = Vec::with_capacity(config.stem.len());
        // What the input of every layer stands for; pixels have a step and zero of their own for each channel.
        let mut codes: Vec<Codes> = vec![Codes { step: 1.0, zero: 0 }];
        for (i, (layer, side, channels)) in config.stem_inputs().enumerate() {
            let conv = &weights.stem[i].conv;
            crate::error::expect_len("stem bias", conv.bias.len(), layer.channels)?;
            crate::error::expect_len("stem weight", conv.weight.len(), layer.channels * layer.window_len(channels))?;
            let source = match i {
                0 => Source::pixels(preprocess),
                _ => Source::plane(codes[i], channels),
            };
            let output = output_codes(&layer, weights.stem[i].step.unwrap_or(1.0));
            let added = layer.residual.map(|from| codes[from]);
            let depthwise = layer.groups > 1 && layer.groups == channels && layer.channels == channels;
            if layer.residual == Some(0) || (layer.groups > 1 && (i == 0 || !depthwise)) {
                let what =
                    if layer.groups > 1 { "grouped convolutions but depthwise ones" } else { "residuals of pixels" };
                let reason = format!("layer {i}: the integer path has no {what}");
                return Err(ConfigError { field: "backbone.stem", reason }.into());
            }
            let (rows, requantize) = fold(conv, &layer, &source, output, added)?;
            let conv = if depthwise {
                let [top, left, ..] = layer.padding;
                let shape = Shape { channels, kernel: layer.kernel, stride: layer.stride, top, left };
                Conv::Depthwise { packed: PackedDepthwise::pack(isa, &rows, shape, requantize)?, zero: codes[i].zero }
            } else {
                let window = layer.window_len(channels);
                let zeros = source.zeros.iter().map(|zero| zero.round() as i8).collect();
                Conv::Dense { packed: PackedPointwise::pack(isa, &rows, window, requantize)?, zeros }
            };
            layers.push(Layer {
                layer,
                input: (side, channels),
                output_side: layer.output_side(side).unwrap_or(0),
                conv,
                from: places[i].clone(),
                to: places[i + 1].clone(),
                added: layer.residual.map(|from| places[from].clone()),
            });
            codes.push(output);
        }
        let Preprocess { mean, std, .. } = preprocess;
        Ok(Some(Self {
            layers: layers.into(),
            pixels: std::array::from_fn(|c| (255.0 * std[c], 255.0 * mean[c] - 128.0)),
            image: places[0].clone(),
            output: codes[config.stem.len()],
            planes_len: places.iter().map(|place| place.end).max().unwrap_or(0),
        }))
    }

    pub(super) fn heap_bytes(&self) -> usize {
        let layers = self.layers.iter().map(|layer| size_of::<Layer>() + layer.conv.heap_bytes());
        layers.sum()
    }

    /// Codes of one image's planes.
    pub(super) fn planes_len(&self) -> usize {
        self.planes_len
    }

    /// Codes of a tile's gathered windows.
    pub(super) fn windows_len(&self) -> usize {
        let gathered = self.layers.iter().filter(|layer| layer.gathers());
        gathered.map(|layer| TILE * layer.layer.window_len(layer.input.1)).max().unwrap_or(0)
    }

    /// Bytes of a depthwise convolution's columns.
    pub(super) fn columns_len(&self) -> usize {
        let columns = self.layers.iter().map(|layer| match &layer.conv {
            Conv::Depthwise { packed, .. } => PackedDepthwise::scratch_bytes(packed.shape(), layer.output_side),
            Conv::Dense { .. } => 0,
        });
        columns.max().unwrap_or(0)
    }

    /// The codes of normalised pixels.
    #[inline(always)]
    fn encode(&self, pixels: &[f32], codes: &mut [i8]) {
        // Channels repeat after as many values as there are in a few vectors.
        const PERIOD: usize = 48;
        let scale: [f32; PERIOD] = std::array::from_fn(|i| self.pixels[i % 3].0);
        let shift: [f32; PERIOD] = std::array::from_fn(|i| self.pixels[i % 3].1);
        for (pixels, codes) in pixels.chunks(PERIOD).zip(codes.chunks_mut(PERIOD)) {
            for (i, (value, code)) in pixels.iter().zip(codes).enumerate() {
                // The low byte of the sum is the code.
                *code = ((value * scale[i] + shift[i]).clamp(-128.0, 127.0) + ROUNDING).to_bits() as i8;
            }
        }
    }

    /// From the pixels of one image to `x` `[tokens, channels]`.
    pub(super) fn forward(
        &self,
        pixels: &[f32],
        loops: &mut dyn Loops,
        (planes, threads): (&mut [i8], &PerThread<StemThread>),
        x: &mut [f32],
    ) {
        vectorized(
            #[inline(always)]
            || self.encode(pixels, &mut planes[self.image.clone()]),
        );
        for layer in &self.layers {
            let planes = Parts::new(planes);
            let (item_len, items) = layer.items();
            loops.run(items, &|thread, item| {
                let out = layer.to.start + item * item_len..(layer.to.start + (item + 1) * item_len).min(layer.to.end);
                // SAFETY: a thread number is used by one call at a time; items have outputs of their own; and planes that
                // a layer reads overlap none that it writes.
                let (thread, input, added, out) = unsafe {
                    let first = out.start - layer.to.start;
                    (
                        threads.of(thread),
                        planes.shared(layer.from.start, layer.from.len()),
                        layer.added.as_ref().map(|added| planes.shared(added.start + first, out.len())),
                        planes.part(out.start, out.len()),
                    )
                };
                layer.forward(item, input, added, (&mut thread.codes, &mut thread.columns), out);
            });
        }
        let Codes { step, zero } = self.output;
        let codes = self.layers.last().map_or(&planes[..0], |layer| &planes[layer.to.clone()]);
        for (x, code) in x.iter_mut().zip(codes) {
            *x = (i16::from(*code) - i16::from(zero)) as f32 * step;
        }
    }
}

impl Conv {
    fn heap_bytes(&self) -> usize {
        match self {
            Self::Depthwise { packed, .. } => packed.resident_bytes(),
            Self::Dense { packed, zeros } => packed.resident_bytes() + zeros.len(),
        }
    }
}

impl Layer {
    /// Whether windows are no pixels of the input as it lies.
    fn gathers(&self) -> bool {
        matches!(self.conv, Conv::Dense { .. }) && (self.layer.kernel, self.layer.stride) != (1, 1)
    }

    /// Codes of what one call of [`Layer::forward`] computes, a row of a depthwise convolution or a tile of windows, and
    /// the number of calls.
    fn items(&self) -> (usize, usize) {
        let len = match self.conv {
            Conv::Depthwise { .. } => self.output_side * self.layer.channels,
            Conv::Dense { .. } => TILE * self.layer.channels,
        };
        (len, self.to.len().div_ceil(len))
    }

    fn forward(
        &self,
        item: usize,
        input: &[i8],
        added: Option<&[i8]>,
        (windows, columns): (&mut [i8], &mut [u8]),
        out: &mut [i8],
    ) {
        let (side, channels) = self.input;
        match &self.conv {
            Conv::Depthwise { packed, zero } => {
                let input = Input { codes: input, width: side, zero: *zero };
                packed.forward_row(input, item, added, columns, out).expect(LENGTHS);
            }
            Conv::Dense { packed, zeros } => {
                let (first, count) = (item * TILE, out.len() / self.layer.channels);
                let windows = if self.gathers() {
                    let len = self.layer.window_len(channels);
                    let windows = &mut windows[..count * len];
                    for (i, window) in windows.chunks_exact_mut(len).enumerate() {
                        self.gather(input, first + i, zeros, window);
                    }
                    &*windows
                } else {
                    &input[first * channels..][..count * channels]
                };
                packed.forward(windows, count, added, out).expect(LENGTHS);
            }
        }
    }

    /// The codes under window `index`, in the order (row, column, channel); `zeros` where it hangs over the edge.
    fn gather(&self, input: &[i8], index: usize, zeros: &[i8], window: &mut [i8]) {
        let (side, channels) = self.input;
        let StemLayer { kernel, stride, padding: [above, before, ..], .. } = self.layer;
        let (top, left) = (index / self.output_side * stride, index % self.output_side * stride);
        // Columns of the kernel that lie inside the image.
        let begin = before.saturating_sub(left).min(kernel);
        let end = (side + before).saturating_sub(left).clamp(begin, kernel);
        let fill = |part: &mut [i8]| part.chunks_exact_mut(channels).for_each(|pixel| pixel.copy_from_slice(zeros));
        for (row, line) in window.chunks_exact_mut(kernel * channels).enumerate() {
            let y = (top + row).checked_sub(above).filter(|&y| y < side && begin < end);
            let Some(y) = y else {
                fill(line);
                continue;
            };
            fill(&mut line[..begin * channels]);
            let start = (y * side + left + begin - before) * channels;
            line[begin * channels..end * channels].copy_from_slice(&input[start..][..(end - begin) * channels]);
            fill(&mut line[end * channels..]);
        }
    }
}

/// What the codes that a layer reads stand for: `steps[c] * (code - zeros[c])`. The zero of pixels need not be a code.
struct Source {
    steps: Vec<f32>,
    zeros: Vec<f32>,
}

impl Source {
    fn pixels(preprocess: &Preprocess) -> Self {
        let Preprocess { mean, std, .. } = preprocess;
        Self {
            steps: std.iter().map(|std| (255.0 * std).recip()).collect(),
            zeros: mean.iter().map(|mean| (255.0 * mean - 128.0).clamp(-128.0, 127.0)).collect(),
        }
    }

    fn plane(Codes { step, zero }: Codes, channels: usize) -> Self {
        Self { steps: vec![step; channels], zeros: vec![f32::from(zero); channels] }
    }
}

/// The codes of a layer's weights `[channels, window]`, and what makes its sums codes.
fn fold(
    conv: &crate::weights::Linear,
    layer: &StemLayer,
    source: &Source,
    output: Codes,
    added: Option<Codes>,
) -> Result<(Vec<i8>, Requantize), ModelError> {
    let window = conv.weight.len() / layer.channels.max(1);
    let per_group = window / layer.kernel.pow(2).max(1);
    // The input channel of value `i` of the window of output channel `row`.
    let channel = |row: usize, i: usize| row / (layer.channels / layer.groups).max(1) * per_group + i % per_group;
    let one_step = source.steps.iter().all(|step| *step == source.steps[0]);
    // Codes as they are stored, unless channels of the input have steps of their own.
    let weights = match &conv.weight {
        weight @ Matrix::Int8 { .. } if one_step => weight.clone(),
        weight => {
            let mut values = weight.to_f32().into_owned();
            for (row, values) in values.chunks_exact_mut(window.max(1)).enumerate() {
                for (i, value) in values.iter_mut().enumerate() {
                    *value *= source.steps[channel(row, i)] / source.steps[0];
                }
            }
            Matrix::encode(&values, layer.channels, Precision::Int8)
        }
    };
    let Matrix::Int8 { codes, scale } = weights else { unreachable!("it was encoded as int8") };
    let ratio = added.map_or(0.0, |added| added.step / output.step);
    let shift = f32::from(output.zero) - added.map_or(0.0, |added| f32::from(added.zero) * ratio);
    let scale: Vec<f32> = scale.iter().map(|scale| scale * source.steps[0] / output.step).collect();
    let bias = conv.bias.iter().enumerate().map(|(row, bias)| {
        let codes = codes[row * window..][..window].iter().enumerate();
        let zeros: f64 = codes.map(|(i, code)| f64::from(*code) * f64::from(source.zeros[channel(row, i)])).sum();
        let bias = f64::from(*bias) / f64::from(output.step) - zeros * f64::from(scale[row]) + f64::from(shift);
        bias as f32
    });
    let bounds = match layer.activation {
        Activation::Relu6 => (shift, 6.0 / output.step + shift),
        Activation::None | Activation::Gelu => (f32::NEG_INFINITY, f32::INFINITY),
    };
    let requantize = Requantize::new(&scale, &bias.collect::<Vec<_>>(), bounds, ratio)?;
    Ok((codes, requantize))
}

/// The places of the image and of every layer's output.
fn planes(config: &BackboneConfig) -> Vec<Range<usize>> {
    let mut planes = vec![Lifetime { from: 0, to: 0, len: config.image_size.pow(2) * 3 }];
    for (i, (layer, side, _)) in config.stem_inputs().enumerate() {
        let len = layer.output_side(side).unwrap_or(0).pow(2) * layer.channels;
        planes.push(Lifetime { from: i + 1, to: i + 1, len });
        if let Some(from) = layer.residual {
            planes[from].to = i;
        }
    }
    places(&planes)
}
