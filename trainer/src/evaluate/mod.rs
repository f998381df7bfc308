//! Measuring a model: how often it is right, how well it knows that, and how its routers behave.

mod picture;
mod probe;
mod report;

pub use picture::confusion_picture;
pub use probe::{Artifacts, LayerProbe, Probe};
pub use report::{ClassScore, Confusion, LayerRouting, Report};

use std::collections::BTreeMap;

use model_core::config::ViTConfig;
use model_core::routing_map::Pairs;

use crate::predict::Prediction;

/// Confidence bins of the calibration error.
const BINS: usize = 15;

/// Counts over images already seen; feed it with [`Tally::add`] and read it with [`Tally::scores`].
#[derive(Debug, Clone)]
pub struct Tally {
    classes: usize,
    grid_side: usize,
    top_k: usize,
    images: usize,
    top1: usize,
    /// Of every image whether its label came first.
    right: Vec<bool>,
    top5: usize,
    cross_entropy: f64,
    bins: [Bin; BINS],
    /// Counts of images by label and prediction. Of many classes most pairs never occur.
    confusion: BTreeMap<(usize, usize), u32>,
    layers: Vec<LayerTally>,
}

/// Predictions of similar confidence.
#[derive(Debug, Clone, Copy, Default)]
struct Bin {
    count: usize,
    right: usize,
    confidence: f64,
}

/// What the router of one layer did.
#[derive(Debug, Clone, Default)]
struct LayerTally {
    /// Choices of each expert.
    load: Vec<u64>,
    neighbours: Pairs,
    /// Of patches half the grid apart.
    far: Pairs,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scores {
    pub images: usize,
    /// Share of images whose label comes first.
    pub top1: f64,
    /// Share of images whose label is among the first five.
    pub top5: f64,
    /// Mean of minus the log of the label's probability.
    pub cross_entropy: f64,
    /// Expected calibration error: mean distance of confidence and accuracy over 15 bins of confidence.
    pub calibration_error: f64,
    /// Share of chosen experts that two neighbouring patches have in common, mean over layers; none without routers.
    pub routing_agreement: Option<f64>,
    /// As `routing_agreement`, of patches half the grid apart: what is not due to their being neighbours.
    pub far_agreement: Option<f64>,
}

impl Tally {
    /// Nothing seen yet, of a model with this configuration.
    pub fn new(config: &ViTConfig) -> Self {
        let layer = LayerTally { load: vec![0; config.experts.num_experts], ..LayerTally::default() };
        Self {
            classes: config.num_classes,
            grid_side: config.backbone.grid_side(),
            top_k: config.experts.top_k,
            images: 0,
            top1: 0,
            right: Vec::new(),
            top5: 0,
            cross_entropy: 0.0,
            bins: [Bin::default(); BINS],
            confusion: BTreeMap::new(),
            layers: vec![layer; config.backbone.num_layers],
        }
    }

    /// Counts the answers for images with these labels.
    pub fn add(&mut self, labels: &[u16], answer: &Prediction) {
        for (logits, &label) in answer.logits.chunks_exact(self.classes).zip(labels) {
            self.add_image(logits, usize::from(label));
        }
        let per_image = self.grid_side.pow(2) * self.top_k;
        for (layer, experts) in self.layers.iter_mut().zip(&answer.experts) {
            for image in experts.chunks_exact(per_image) {
                layer.add_image(image, self.grid_side, self.top_k);
            }
        }
    }

    fn add_image(&mut self, logits: &[f32], label: usize) {
        // Ties count against the model when the other class comes first, as a stable sort by logit would have it.
        let better =
            |(class, logit): &(usize, &f32)| **logit > logits[label] || (**logit == logits[label] && *class < label);
        let rank = logits.iter().enumerate().filter(better).count();
        let first = logits.iter().enumerate().fold(0, |best, (i, v)| if *v > logits[best] { i } else { best });
        let max = f64::from(logits[first]);
        let sum: f64 = logits.iter().map(|&v| (f64::from(v) - max).exp()).sum();

        self.images += 1;
        self.top1 += usize::from(rank == 0);
        self.right.push(rank == 0);
        self.top5 += usize::from(rank < 5);
        self.cross_entropy += sum.ln() + max - f64::from(logits[label]);
        *self.confusion.entry((label, first)).or_default() += 1;
        let confidence = 1.0 / sum;
        let bin = &mut self.bins[((confidence * BINS as f64) as usize).min(BINS - 1)];
        bin.count += 1;
        bin.right += usize::from(rank == 0);
        bin.confidence += confidence;
    }

    /// Of every image seen, in order, whether its label came first.
    pub fn right(&self) -> &[bool] {
        &self.right
    }

    /// Images with each label, and how many of them were recognised.
    fn by_label(&self) -> Vec<(u32, u32)> {
        let mut counts = vec![(0, 0); self.classes];
        for (&(label, prediction), &count) in &self.confusion {
            counts[label].0 += count;
            counts[label].1 += if label == prediction { count } else { 0 };
        }
        counts
    }

    /// The main figures so far.
    pub fn scores(&self) -> Scores {
        let n = self.images.max(1) as f64;
        let gap = |bin: &Bin| (bin.confidence - bin.right as f64).abs();
        let agreement = |of: fn(&LayerTally) -> Pairs| {
            let sum: f64 = self.layers.iter().map(|layer| of(layer).agreement(self.top_k).unwrap_or(0.0)).sum();
            let routed = self.layers.iter().any(|layer| of(layer).count > 0);
            routed.then(|| sum / self.layers.len().max(1) as f64)
        };
        Scores {
            images: self.images,
            top1: self.top1 as f64 / n,
            top5: self.top5 as f64 / n,
            cross_entropy: self.cross_entropy / n,
            calibration_error: self.bins.iter().map(gap).sum::<f64>() / n,
            routing_agreement: agreement(|layer| layer.neighbours),
            far_agreement: agreement(|layer| layer.far),
        }
    }
}

impl LayerTally {
    /// `experts [side, side, top_k]`, best first.
    fn add_image(&mut self, experts: &[u16], side: usize, top_k: usize) {
        experts.iter().for_each(|&e| self.load[usize::from(e)] += 1);
        self.neighbours += Pairs::apart(1, experts, side, top_k);
        self.far += Pairs::apart(side.div_ceil(2).max(2), experts, side, top_k);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tally(logits: &[f32], labels: &[u16]) -> Tally {
        let mut config = ViTConfig::preset("tiny").unwrap();
        config.num_classes = 6;
        let mut tally = Tally::new(&config);
        tally.add(labels, &Prediction { logits: logits.to_vec(), ..Prediction::default() });
        tally
    }

    #[test]
    fn ranks_count_from_the_largest_logit() {
        let logits = [[9.0, 5.0, 4.0, 3.0, 2.0, 1.0f32]; 3].concat();
        let scores = tally(&logits, &[0, 4, 5]).scores();
        assert_eq!((scores.images, scores.top1, scores.top5), (3, 1.0 / 3.0, 2.0 / 3.0));
    }

    #[test]
    fn equal_logits_are_not_all_right() {
        let scores = tally(&[0.0; 36], &[0, 1, 2, 3, 4, 5]).scores();
        assert_eq!((scores.top1, scores.top5), (1.0 / 6.0, 5.0 / 6.0));
        assert!((scores.cross_entropy - 6f64.ln()).abs() < 1e-12);
    }

    #[test]
    fn calibration_compares_confidence_with_accuracy() {
        // Two answers of confidence 1, one of them right: off by a half.
        let sure = [[100.0, 0.0, 0.0, 0.0, 0.0, 0.0f32]; 2].concat();
        assert!((tally(&sure, &[0, 1]).scores().calibration_error - 0.5).abs() < 1e-9);
        // Confidence 1/6 and one in six right: perfectly calibrated.
        assert!(tally(&[0.0; 36], &[0, 1, 2, 3, 4, 5]).scores().calibration_error < 1e-9);
    }

    #[test]
    fn layers_count_loads_neighbours_and_patches_half_the_grid_apart() {
        let mut layer = LayerTally { load: vec![0; 4], ..LayerTally::default() };
        layer.add_image(&[0, 1, 1, 0, 1, 2, 2, 1], 2, 2);
        assert_eq!((&layer.load[..], layer.neighbours.shared), (&[2, 4, 2, 0][..], 6));
        assert_eq!(layer.far.count, 0, "a grid of two has no patches that are no neighbours");
        // Stripes of one column in a 4x4 grid, top-1: those two rows apart agree, and those two columns apart.
        let mut layer = LayerTally { load: vec![0; 2], ..LayerTally::default() };
        layer.add_image(&[0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1], 4, 1);
        assert_eq!((layer.far.agreement(1), layer.neighbours.agreement(1)), (Some(1.0), Some(0.5)));
    }
}
