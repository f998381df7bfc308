//! Training batches, made ahead of time on a thread of their own.
//!
//! Batch `b` of epoch `e` is a pure function of (plan, e, b): [`Loader::start`] at any position gives the batches that
//! an uninterrupted loader would have given from there on.

use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread;

use model_core::image::Preprocess;
use rand::Rng;
use training::step::Inputs;

use super::Dataset;
use super::augment::Augment;
use super::frozen_stem::StemOutputs;
use super::heads::ranges;
use super::random::{Purpose, beta, rng, shuffle};
use super::soft_labels::SoftTargets;

/// Batches made ahead; enough to hide the odd slow one.
const AHEAD: usize = 3;

/// Blending pairs of images and their labels: mixup (arXiv 1710.09412) and CutMix (arXiv 1905.04899).
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mixing {
    /// Share of the images that are mixed with a partner from their batch.
    pub probability: f64,
    /// Share of the mixed images that get a rectangle of the partner (CutMix) rather than a blend (mixup).
    pub cutmix_share: f64,
    /// The blend's weight is drawn from Beta(alpha, alpha).
    pub mixup_alpha: f64,
    /// The rectangle's share of the area is drawn from Beta(alpha, alpha).
    pub cutmix_alpha: f64,
}

impl Mixing {
    pub const NONE: Self = Self { probability: 0.0, cutmix_share: 0.5, mixup_alpha: 0.8, cutmix_alpha: 1.0 };
}

/// How batches are made.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// Decides the order and every variation.
    pub seed: u64,
    /// Images in a batch.
    pub batch_size: usize,
    /// Variation of single images.
    pub augment: Augment,
    pub mixing: Mixing,
    /// Share of the target spread evenly over all classes of the image's head.
    pub label_smoothing: f32,
    /// Classes of each of several heads; empty for one. Images are mixed with others of the same head.
    pub heads: Vec<usize>,
    /// What the last head learns of every image.
    pub soft: Option<SoftTargets>,
    /// From bytes to the model's pixels.
    pub preprocess: Preprocess,
    /// Which residual branches are left out.
    pub depth: StochasticDepth,
    /// Whether routers are noisy.
    pub router_noise: bool,
}

/// Stochastic depth (arXiv 1603.09382): residual branches of single images are left out at random, the more often the
/// deeper they lie, and the others multiplied so that the mean stays.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StochasticDepth {
    /// Probability in the last block; block l of L (from 1) has l / L of it.
    pub probability: f64,
    /// Blocks, of two branches each.
    pub layers: usize,
}

impl StochasticDepth {
    /// One image's factors, `[2 * layers]`: 0 for a branch left out.
    fn scales(self, rng: &mut impl Rng) -> impl Iterator<Item = f32> {
        (0..2 * self.layers).map(move |branch| {
            let probability = self.probability * (branch / 2 + 1) as f64 / self.layers as f64;
            if rng.random::<f64>() < probability { 0.0 } else { (1.0 / (1.0 - probability)) as f32 }
        })
    }
}

/// The next batch to make.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, serde::Serialize, serde::Deserialize)]
pub struct Position {
    /// Passes over the training images completed.
    pub epoch: u64,
    /// Batches of the current pass completed.
    pub batch: u64,
}

/// One step's worth of images.
#[derive(Debug, Clone, PartialEq)]
pub struct Batch {
    pub position: Position,
    pub inputs: Inputs,
    /// `[batch, classes]`, mixed and smoothed; every row sums to one, within the image's head and that of soft labels.
    pub targets: Vec<f32>,
    /// `[batch]`, the label with the larger share.
    pub labels: Vec<u16>,
    /// `[batch, 2 * layers]`, what residual branches are multiplied by; empty without stochastic depth.
    pub branch_scales: Vec<f32>,
    /// `[batch]`, of the noise on routers; empty without.
    pub noise_seeds: Vec<u64>,
}

/// An endless sequence of batches, made on another thread; dropping it ends the thread.
#[derive(Debug)]
pub struct Loader {
    batches: Receiver<Batch>,
}

/// Full batches in one pass over `images` images; a remainder waits for the next epoch's order. At least one.
pub fn batches_per_epoch(images: usize, batch_size: usize) -> u64 {
    (images / batch_size).max(1) as u64
}

impl Loader {
    /// Starts making the batches of `indices` from `start` on.
    pub fn start(dataset: Arc<Dataset>, indices: Arc<[u32]>, plan: Plan, start: Position) -> Self {
        Self::start_behind(None, dataset, indices, plan, start)
    }

    /// [`Loader::start`] with what a stem made of the images in place of their pixels. The stem saw the images varied;
    /// the batches are mixed only.
    pub fn start_behind(
        stem: Option<Arc<StemOutputs>>,
        dataset: Arc<Dataset>,
        indices: Arc<[u32]>,
        plan: Plan,
        start: Position,
    ) -> Self {
        let (sender, batches) = sync_channel(AHEAD);
        let produce = move || {
            let per_epoch = batches_per_epoch(indices.len(), plan.batch_size);
            let mut position = start;
            loop {
                let order = epoch_order(&indices, plan.seed, position.epoch);
                while position.batch < per_epoch {
                    if sender.send(make_batch(&dataset, stem.as_deref(), &order, &plan, position)).is_err() {
                        return;
                    }
                    position.batch += 1;
                }
                position = Position { epoch: position.epoch + 1, batch: 0 };
            }
        };
        thread::Builder::new().name("loader".into()).spawn(produce).expect("the system can start one more thread");
        Self { batches }
    }

    /// Waits for the next batch.
    ///
    /// # Panics
    /// When the loader's thread has panicked.
    pub fn next_batch(&mut self) -> Batch {
        self.batches.recv().expect("the loader's thread never ends before its receiver")
    }
}

/// The order in which `epoch` visits `indices`.
fn epoch_order(indices: &[u32], seed: u64, epoch: u64) -> Vec<u32> {
    let mut order = indices.to_vec();
    shuffle(&mut rng(seed, Purpose::Order, epoch, 0), &mut order);
    order
}

/// Images of a batch, varied and normalised, `[batch, side, side, 3]`.
fn pixels(dataset: &Dataset, members: &[u32], plan: &Plan, epoch: u64) -> Vec<f32> {
    let image_len = dataset.image_bytes();
    let mut images = vec![0; members.len() * image_len];
    for (&index, out) in members.iter().zip(images.chunks_exact_mut(image_len)) {
        let mut rng = rng(plan.seed, Purpose::Image, epoch, u64::from(index));
        plan.augment.apply(dataset.image(index as usize), dataset.side, &mut rng, out);
    }
    plan.preprocess.normalize(&images)
}

fn make_batch(dataset: &Dataset, stem: Option<&StemOutputs>, order: &[u32], plan: &Plan, position: Position) -> Batch {
    let size = plan.batch_size.min(order.len());
    let members = &order[position.batch as usize * size..][..size];
    let (mut values, side, channels) = match stem {
        None => (pixels(dataset, members, plan, position.epoch), dataset.side, 3),
        Some(stem) => (stem.tokens(stem.view_of(position.epoch), members), stem.grid, stem.d_model),
    };
    let image_len = side * side * channels;
    // Partners are read from here, so that nobody receives an image that was already mixed.
    let unmixed = (plan.mixing.probability > 0.0).then(|| values.clone());

    let classes = dataset.num_classes();
    let heads = ranges(&plan.heads, classes);
    let of_heads: Vec<usize> = members.iter().map(|&index| head_of(&heads, dataset.labels[index as usize])).collect();
    let partners = partners(&of_heads, heads.len());
    let mut targets = vec![0.0; size * classes];
    let mut labels = Vec::with_capacity(size);
    for (i, &index) in members.iter().enumerate() {
        let partner = partners[i];
        let label = usize::from(dataset.labels[index as usize]);
        let partner_label = usize::from(dataset.labels[members[partner] as usize]);
        let mut share = 1.0;
        if let Some(unmixed) = &unmixed {
            let mut rng = rng(plan.seed, Purpose::Mix, position.epoch, u64::from(index));
            let own = &mut values[i * image_len..][..image_len];
            share = mix(own, &unmixed[partner * image_len..][..image_len], side, &plan.mixing, &mut rng);
        }
        let row = &mut targets[i * classes..][..classes];
        let head = heads[of_heads[i]].clone();
        let smoothed = plan.label_smoothing / head.len() as f32;
        row[head].fill(smoothed);
        row[label] += (1.0 - plan.label_smoothing) * share;
        row[partner_label] += (1.0 - plan.label_smoothing) * (1.0 - share);
        if let Some(soft) = &plan.soft {
            soft.enter(row, (index, share), members[partner]);
        }
        labels.push(if share >= 0.5 { label } else { partner_label } as u16);
    }
    let mut branch_scales = Vec::new();
    if plan.depth.probability > 0.0 {
        for &index in members {
            let mut rng = rng(plan.seed, Purpose::Depth, position.epoch, u64::from(index));
            branch_scales.extend(plan.depth.scales(&mut rng));
        }
    }
    let mut noise_seeds = Vec::new();
    if plan.router_noise {
        let seed = |&index: &u32| rng(plan.seed, Purpose::Route, position.epoch, u64::from(index)).random::<u64>();
        noise_seeds.extend(members.iter().map(seed));
    }
    let inputs = if stem.is_some() { Inputs::Tokens(values) } else { Inputs::Pixels(values) };
    Batch { position, inputs, targets, labels, branch_scales, noise_seeds }
}

/// Which head the class `label` is of.
fn head_of(heads: &[Range<usize>], label: u16) -> usize {
    heads.partition_point(|head| head.end <= usize::from(label))
}

/// With whom every member of a batch is mixed, by the members' heads: the first of a head with the last of it, and so on.
fn partners(of_heads: &[usize], heads: usize) -> Vec<usize> {
    let mut by_head = vec![Vec::new(); heads];
    of_heads.iter().enumerate().for_each(|(member, &head)| by_head[head].push(member));
    let mut partners = vec![0; of_heads.len()];
    for members in by_head {
        members.iter().zip(members.iter().rev()).for_each(|(&member, &partner)| partners[member] = partner);
    }
    partners
}

/// Mixes `partner` into `own` (or does not), both `[side, side, channels]`, and returns the share of `own` that is left.
fn mix(own: &mut [f32], partner: &[f32], side: usize, mixing: &Mixing, rng: &mut impl Rng) -> f32 {
    if rng.random::<f64>() >= mixing.probability {
        return 1.0;
    }
    if rng.random::<f64>() >= mixing.cutmix_share {
        let share = beta(rng, mixing.mixup_alpha) as f32;
        own.iter_mut().zip(partner).for_each(|(a, b)| *a = *a * share + b * (1.0 - share));
        return share;
    }
    // A square of the wanted area around a random centre, cut off at the borders as in the paper.
    let half = ((1.0 - beta(rng, mixing.cutmix_alpha)).sqrt() * side as f64 / 2.0).round() as usize;
    let (y, x) = (rng.random_range(0..side), rng.random_range(0..side));
    let rows = y.saturating_sub(half)..(y + half).min(side);
    let columns = x.saturating_sub(half)..(x + half).min(side);
    let channels = own.len() / (side * side);
    for row in rows.clone() {
        let span = (row * side + columns.start) * channels..(row * side + columns.end) * channels;
        own[span.clone()].copy_from_slice(&partner[span]);
    }
    1.0 - (rows.len() * columns.len()) as f32 / (side * side) as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Image i is i everywhere and has label i % 3.
    fn dataset(count: u8) -> Arc<Dataset> {
        Arc::new(Dataset {
            images: (0..count).flat_map(|i| [i; 4 * 4 * 3]).collect(),
            side: 4,
            labels: (0..count).map(|i| u16::from(i) % 3).collect(),
            class_names: ["a", "b", "c"].map(String::from).into(),
        })
    }

    fn plan(mixing: Mixing) -> Plan {
        Plan {
            seed: 5,
            batch_size: 4,
            augment: Augment { crop_padding: 1, reflect: false, flip: true, ..Augment::NONE },
            mixing,
            label_smoothing: 0.1,
            heads: Vec::new(),
            soft: None,
            preprocess: Preprocess { mean: [0.0; 3], std: [1.0; 3], ..Preprocess::default() },
            depth: StochasticDepth { probability: 0.0, layers: 3 },
            router_noise: false,
        }
    }

    fn pixels(batch: &Batch) -> &[f32] {
        let Inputs::Pixels(pixels) = &batch.inputs else { panic!("there is no stem") };
        pixels
    }

    fn loader(plan: Plan, start: Position) -> Loader {
        let dataset = dataset(10);
        let indices = (0..dataset.len() as u32).collect();
        Loader::start(dataset, indices, plan, start)
    }

    const ALWAYS: Mixing = Mixing { probability: 1.0, ..Mixing::NONE };

    #[test]
    fn starting_in_the_middle_continues_the_sequence() {
        let mut whole = loader(plan(ALWAYS), Position::default());
        let batches: Vec<Batch> = (0..7).map(|_| whole.next_batch()).collect();
        let start = Position { epoch: 1, batch: 1 };
        assert_eq!(batches[3].position, start);
        let mut rest = loader(plan(ALWAYS), start);
        for batch in &batches[3..] {
            assert_eq!(&rest.next_batch(), batch);
        }
    }

    #[test]
    fn an_epoch_visits_no_image_twice_and_epochs_differ() {
        let plain = Plan { augment: Augment::NONE, ..plan(Mixing::NONE) };
        let mut loader = loader(plain, Position::default());
        let mut epoch = || -> Vec<u32> {
            let batches = [loader.next_batch(), loader.next_batch()];
            batches.iter().flat_map(|b| pixels(b).chunks_exact(48).map(|p| (p[0] * 255.0).round() as u32)).collect()
        };
        let (first, second) = (epoch(), epoch());
        assert_ne!(first, second);
        for mut seen in [first, second] {
            seen.sort_unstable();
            seen.dedup();
            assert_eq!(seen.len(), 8);
        }
    }

    #[test]
    fn targets_are_smoothed_and_sum_to_one() {
        let mut plain = loader(plan(Mixing::NONE), Position::default());
        let batch = plain.next_batch();
        for (row, &label) in batch.targets.chunks_exact(3).zip(&batch.labels) {
            for (class, &target) in row.iter().enumerate() {
                let expected = 0.1 / 3.0 + if class == usize::from(label) { 0.9 } else { 0.0 };
                assert!((target - expected).abs() < 1e-6, "{row:?}");
            }
        }
        let mut mixed = loader(plan(ALWAYS), Position::default());
        for row in mixed.next_batch().targets.chunks_exact(3) {
            assert!((row.iter().sum::<f32>() - 1.0).abs() < 1e-6, "{row:?}");
        }
    }

    #[test]
    fn heads_share_no_targets_and_are_not_mixed() {
        // Labels 0 and 1 are one head's, label 2 another's.
        let two = Plan { heads: vec![2, 1], batch_size: 10, ..plan(ALWAYS) };
        let batch = loader(two, Position::default()).next_batch();
        for (row, &label) in batch.targets.chunks_exact(3).zip(&batch.labels) {
            let (first, second) = (row[0] + row[1], row[2]);
            let expected = if label < 2 { (1.0, 0.0) } else { (0.0, 1.0) };
            assert!((first - expected.0).abs() < 1e-6 && (second - expected.1).abs() < 1e-6, "{label}: {row:?}");
        }
        assert_eq!(partners(&[0, 1, 0, 0, 1], 2), [3, 4, 2, 0, 1]);
        assert_eq!(partners(&[0; 4], 1), [3, 2, 1, 0], "of one head as ever");
    }

    #[test]
    fn mixed_shares_match_the_pixels() {
        let (own, partner) = (vec![1.0; 300], vec![0.0; 300]);
        for (index, cutmix_share) in (0..200).map(|i| (i, f64::from(i as u32 % 2))) {
            let mut mixed = own.clone();
            let mixing = Mixing { cutmix_share, ..ALWAYS };
            let share = mix(&mut mixed, &partner, 10, &mixing, &mut rng(1, Purpose::Mix, 0, index));
            assert!((mixed.iter().sum::<f32>() / 300.0 - share).abs() < 1e-5, "{index}");
        }
    }

    #[test]
    fn branches_are_left_out_the_more_often_the_deeper_and_keep_their_mean() {
        let depth = StochasticDepth { probability: 0.6, layers: 3 };
        let images = 10_000;
        let mut kept = [0; 6];
        for image in 0..images {
            let mut rng = rng(1, Purpose::Depth, 0, image);
            for ((kept, scale), branch) in kept.iter_mut().zip(depth.scales(&mut rng)).zip(0..) {
                let share = 1.0 - 0.2 * (branch / 2 + 1) as f32;
                assert!(scale == 0.0 || (scale * share - 1.0).abs() < 1e-6, "branch {branch}: {scale}");
                *kept += u64::from(scale > 0.0);
            }
        }
        for (branch, &kept) in kept.iter().enumerate() {
            let share = 1.0 - 0.2 * (branch / 2 + 1) as f64;
            // Four standard errors, at most 4 sqrt(0.25 / 10000).
            assert!((kept as f64 / images as f64 - share).abs() < 0.02, "branch {branch}: {kept}");
        }
        let plan = Plan { depth, ..plan(Mixing::NONE) };
        assert_eq!(loader(plan, Position::default()).next_batch().branch_scales.len(), 4 * 6);
    }

    #[test]
    fn every_image_has_noise_of_its_own_in_every_epoch() {
        let plan = Plan { router_noise: true, ..plan(Mixing::NONE) };
        let seeds = |epoch| loader(plan.clone(), Position { epoch, batch: 0 }).next_batch().noise_seeds;
        assert_eq!(seeds(0), seeds(0));
        let all: std::collections::BTreeSet<u64> = [seeds(0), seeds(1)].concat().into_iter().collect();
        assert_eq!(all.len(), 8, "two batches of four");
    }

    #[test]
    fn a_set_smaller_than_a_batch_is_one_batch() {
        let dataset = dataset(3);
        let indices = (0..3).collect();
        let mut loader = Loader::start(dataset, indices, plan(Mixing::NONE), Position::default());
        assert_eq!(loader.next_batch().labels.len(), 3);
        assert_eq!(loader.next_batch().position, Position { epoch: 1, batch: 0 });
    }
}
