//! From a float stem to one in int8: the step of every layer's output, and biases that make up for rounded weights.
//!
//! A step is chosen by its squared error on the calibration images: a small one cuts off large values, a large one rounds
//! all of them coarsely. Rounding weights shifts the mean of a channel by the rounding errors times the mean of the input
//! (Nagel et al., arXiv 1906.04721); the bias takes that back.

use anyhow::{Result, ensure};
use candle_core::{Device, Tensor};
use model_core::config::{Activation, StemLayer};
use model_core::weights::{BackboneWeights, ExpertSetWeights, Matrix, Precision};
use training::shards::in_turn;
use training::vit::ViT;

/// Images that a thread looks at in one go.
const SHARD: usize = 4;
/// Bins of a histogram.
const BINS: usize = 4096;
/// Steps that are tried, as shares of the one that cuts nothing off.
const TRIED: std::ops::RangeInclusive<u32> = 20..=100;

/// Magnitudes of values other than zero.
#[derive(Debug, Clone)]
struct Histogram {
    counts: Vec<u64>,
    /// Upper end of the last bin, a power of two.
    range: f32,
}

impl Histogram {
    fn new() -> Self {
        Self { counts: vec![0; BINS], range: 2f32.powi(-10) }
    }

    fn widen(&mut self) {
        self.range *= 2.0;
        for bin in 0..BINS {
            self.counts[bin] = if bin < BINS / 2 { self.counts[2 * bin] + self.counts[2 * bin + 1] } else { 0 };
        }
    }

    fn add(&mut self, value: f32) {
        let magnitude = value.abs();
        if magnitude == 0.0 || !magnitude.is_finite() {
            return;
        }
        while magnitude >= self.range {
            self.widen();
        }
        self.counts[((magnitude / self.range * BINS as f32) as usize).min(BINS - 1)] += 1;
    }

    fn merge(&mut self, mut other: Self) {
        while self.range < other.range {
            self.widen();
        }
        while other.range < self.range {
            other.widen();
        }
        self.counts.iter_mut().zip(other.counts).for_each(|(count, more)| *count += more);
    }

    /// The step with the least squared error where magnitudes may be up to so many steps; 1 without values.
    fn best_step(&self, levels: f64) -> f32 {
        let Some(last) = self.counts.iter().rposition(|count| *count > 0) else { return 1.0 };
        let width = f64::from(self.range) / BINS as f64;
        let largest = (last + 1) as f64 * width;
        let error = |step: f64| -> f64 {
            let bins = self.counts[..=last].iter().enumerate();
            let errors = bins.map(|(bin, &count)| {
                let beyond = (bin as f64 + 0.5) * width - levels * step;
                let error = if beyond > 0.0 { beyond * beyond } else { step * step / 12.0 };
                count as f64 * error
            });
            errors.sum()
        };
        let steps = TRIED.map(|percent| largest / levels * f64::from(percent) / 100.0);
        let best = steps.map(|step| (error(step), step)).min_by(|a, b| a.0.total_cmp(&b.0));
        (best.map_or(1.0, |(_, step)| step) as f32).max(f32::MIN_POSITIVE)
    }
}

/// What the calibration images make of a layer.
#[derive(Debug, Clone)]
struct Seen {
    output: Histogram,
    /// Sum of each channel of the output, over all positions.
    sums: Vec<f64>,
    positions: u64,
}

impl Seen {
    fn new(channels: usize) -> Self {
        Self { output: Histogram::new(), sums: vec![0.0; channels], positions: 0 }
    }

    fn add(&mut self, values: &[f32]) {
        let channels = self.sums.len();
        for position in values.chunks_exact(channels) {
            self.sums.iter_mut().zip(position).for_each(|(sum, value)| *sum += f64::from(*value));
            position.iter().for_each(|value| self.output.add(*value));
        }
        self.positions += (values.len() / channels) as u64;
    }

    fn merge(&mut self, other: Self) {
        self.output.merge(other.output);
        self.sums.iter_mut().zip(&other.sums).for_each(|(sum, more)| *sum += more);
        self.positions += other.positions;
    }

    fn mean(&self, channel: usize) -> f64 {
        self.sums[channel] / self.positions.max(1) as f64
    }
}

/// How many steps the largest magnitude may be away from zero: 255 where no output is negative.
fn levels(layer: &StemLayer) -> f64 {
    if layer.activation == Activation::Relu6 && layer.residual.is_none() { 255.0 } else { 127.0 }
}

/// Gives `backbone` int8 weights and the steps of its stem. `images` are normalised pixels `[side, side, 3]`; `set` is any
/// set of the float backbone.
///
/// # Errors
/// When there are no images, or the shapes of the weights are wrong.
pub(super) fn calibrate(
    backbone: &mut BackboneWeights,
    set: &ExpertSetWeights,
    images: &[Vec<f32>],
    threads: usize,
    done: impl Fn(usize) + Sync,
) -> Result<()> {
    ensure!(!images.is_empty(), "there is no image to calibrate with");
    let config = backbone.config.clone();
    let side = config.image_size;
    let vit = ViT::from_weights(backbone, set)?.freeze(|_| true)?;
    let unseen = || -> Vec<Seen> {
        // The image counts as the output of a layer before the first.
        std::iter::once(3).chain(config.stem.iter().map(|layer| layer.channels)).map(Seen::new).collect()
    };
    let shards: Vec<&[Vec<f32>]> = images.chunks(SHARD).collect();
    let mut seen = unseen();
    // A window bounds the histograms that wait for their turn.
    for window in shards.chunks(threads.max(1) * 4) {
        let looked = in_turn(threads, window.to_vec(), |shard| -> Result<Vec<Seen>> {
            let mut seen = unseen();
            shard.iter().for_each(|image| seen[0].add(image));
            let pixels = Tensor::from_vec(shard.concat(), (shard.len(), side, side, 3), &Device::Cpu)?;
            vit.stem().forward_each(&pixels, |i, output| {
                seen[i + 1].add(&output.flatten_all()?.to_vec1::<f32>()?);
                Ok(())
            })?;
            done(shard.len());
            Ok(seen)
        })?;
        for more in looked {
            seen.iter_mut().zip(more).for_each(|(seen, more)| seen.merge(more));
        }
    }
    for (i, (layer, _, channels)) in config.stem_inputs().enumerate() {
        let stem = &mut backbone.stem[i];
        stem.step = Some(seen[i + 1].output.best_step(levels(&layer)));
        let exact = stem.conv.weight.to_f32().into_owned();
        let rounded = Matrix::encode(&exact, layer.channels, Precision::Int8);
        let own = channels / layer.groups;
        let window = layer.window_len(channels);
        let values = rounded.to_f32();
        let rows = exact.chunks_exact(window).zip(values.chunks_exact(window));
        for (row, (bias, (exact, rounded))) in stem.conv.bias.iter_mut().zip(rows).enumerate() {
            let first = row / (layer.channels / layer.groups) * own;
            let errors = exact.iter().zip(rounded).enumerate();
            let shift: f64 = errors.map(|(n, (a, b))| f64::from(b - a) * seen[i].mean(first + n % own)).sum();
            *bias = (f64::from(*bias) - shift) as f32;
        }
        drop(values);
        stem.conv.weight = rounded;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(values: impl IntoIterator<Item = f32>) -> Histogram {
        let mut histogram = Histogram::new();
        values.into_iter().for_each(|value| histogram.add(value));
        histogram
    }

    #[test]
    fn a_step_covers_even_values_and_cuts_off_what_is_rare() {
        let even = || (1..=1000).map(|i| i as f32 / 1000.0);
        let step = of(even()).best_step(255.0) * 255.0;
        assert!((0.95..=1.01).contains(&step), "{step}");
        // A million values up to 1 and one of 20.
        let rare = of((0..1000).flat_map(|_| even()).chain([20.0])).best_step(255.0) * 255.0;
        assert!(rare < 10.0, "{rare}");
        assert_eq!(of([0.0]).best_step(255.0), 1.0);
    }

    #[test]
    fn histograms_of_different_ranges_add_up() {
        let (small, large) = (of([0.001, 0.002]), of([100.0, -7.0]));
        let mut merged = small.clone();
        merged.merge(large.clone());
        assert_eq!((merged.range, merged.counts.iter().sum::<u64>()), (128.0, 4));
        let mut other = large;
        other.merge(small);
        assert_eq!((other.range, other.counts), (merged.range, merged.counts));
    }
}
