//! Gradients of one batch, computed by shards on several threads.

use std::collections::BTreeMap;
use std::ops::Range;

use candle_core::{Device, Error, Result, Tensor};

use crate::layers::RouterNoise;
use crate::losses::{LossWeights, expert_loads, losses};
use crate::matmul::Products;
use crate::optimizer::Gradients;
use crate::parameters::Quantizers;
use crate::shards::in_turn;
use crate::vit::{Output, Variation, ViT};

/// What a model is shown.
#[derive(Debug, Clone, PartialEq)]
pub enum Inputs {
    /// Normalised, `[batch, side, side, 3]`.
    Pixels(Vec<f32>),
    /// What the convolutions of a frozen stem made of images, `[batch, tokens, d_model]`.
    Tokens(Vec<f32>),
}

impl Default for Inputs {
    fn default() -> Self {
        Self::Pixels(Vec::new())
    }
}

/// Images ready for the model.
#[derive(Debug, Clone, Default)]
pub struct Batch {
    pub inputs: Inputs,
    /// Soft labels `[batch, classes]`, rows summing to one.
    pub targets: Vec<f32>,
    /// Classes of each of several heads side by side ([`crate::losses::cross_entropy`]); empty for one head.
    pub heads: Vec<usize>,
    pub len: usize,
    /// Stochastic depth (arXiv 1603.09382): what every image's residual branches are multiplied by,
    /// `[batch, 2 * layers]`, attention before feed-forward; empty for one everywhere.
    pub branch_scales: Vec<f32>,
    /// Scale of the noise on routers ([`crate::layers::RouterNoise`]); 0 for none.
    pub router_noise: f64,
    /// Of every image's noise, `[batch]`; empty without noise.
    pub noise_seeds: Vec<u64>,
}

/// Means over a batch.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct StepStats {
    /// The loss that was descended.
    pub loss: f64,
    pub cross_entropy: f64,
    /// Load balance, 1 when balanced.
    pub balance: f64,
    pub smoothness: f64,
    /// Contiguity ratio; 0 when it has no weight.
    pub contiguity: f64,
    /// Share of images whose largest logit is the largest target, mixed and taught as it may be; of several heads in the
    /// first that the target says something of.
    pub accuracy: f64,
}

/// The gradient of the mean loss over `batch`, and its statistics.
///
/// The batch is cut into shards of `shard_size` images that `threads` threads take in turn; shards are summed in
/// order, so the result depends on `shard_size` but not on `threads` or timing. Experts are balanced over the whole
/// batch: all shards go forward before the first goes back.
///
/// # Errors
/// When shapes do not fit, or a parameter receives no gradient.
pub fn gradients(
    vit: &ViT,
    quantizers: Quantizers,
    batch: &Batch,
    weights: LossWeights,
    shard_size: usize,
    threads: usize,
) -> Result<(Gradients, StepStats)> {
    gradients_in(Products::F32, vit, quantizers, batch, weights, (shard_size, threads))
}

/// [`gradients`] by products of the numbers given, and `(shard_size, threads)`.
///
/// # Errors
/// When shapes do not fit, or a parameter receives no gradient.
pub fn gradients_in(
    products: Products,
    vit: &ViT,
    quantizers: Quantizers,
    batch: &Batch,
    weights: LossWeights,
    (shard_size, threads): (usize, usize),
) -> Result<(Gradients, StepStats)> {
    let shards = (0..batch.len).step_by(shard_size).map(|start| start..batch.len.min(start + shard_size)).collect();
    let forward = in_turn(threads, shards, |images| {
        products.scope(|| forward(vit, quantizers, batch, &images).map(|output| (output, images)))
    })?;
    let loads = expert_loads(forward.iter().map(|(output, _)| output));
    let shards = in_turn(threads, forward, |(output, images)| {
        products.scope(|| backward(vit, &output, &loads, batch, &images, weights))
    })?;
    let mut by_name: BTreeMap<String, Vec<Vec<f32>>> = BTreeMap::new();
    let mut stats = StepStats::default();
    for (gradients, shard) in shards {
        for (name, gradient) in gradients {
            by_name.entry(name).or_default().push(gradient);
        }
        stats.loss += shard.loss;
        stats.cross_entropy += shard.cross_entropy;
        stats.balance += shard.balance;
        stats.smoothness += shard.smoothness;
        stats.contiguity += shard.contiguity;
        stats.accuracy += shard.accuracy;
    }
    let sums = in_turn(threads, by_name.into_iter().collect(), |(name, shards)| Ok::<_, Error>((name, sum(shards))))?;
    Ok((sums.into_iter().collect(), stats))
}

/// The sum of equally long vectors, in their order.
fn sum(vectors: Vec<Vec<f32>>) -> Vec<f32> {
    let add = |mut sum: Vec<f32>, vector: Vec<f32>| {
        sum.iter_mut().zip(vector).for_each(|(sum, value)| *sum += value);
        sum
    };
    vectors.into_iter().reduce(add).unwrap_or_default()
}

fn forward(vit: &ViT, quantizers: Quantizers, batch: &Batch, images: &Range<usize>) -> Result<Output> {
    let branches = 2 * vit.config().backbone.num_layers;
    let scales = match &batch.branch_scales[..] {
        [] => None,
        all => {
            let scales = &all[images.start * branches..images.end * branches];
            Some(Tensor::from_slice(scales, (images.len(), branches), &Device::Cpu)?)
        }
    };
    let noise = (batch.router_noise > 0.0).then(|| RouterNoise {
        scale: batch.router_noise,
        seeds: &batch.noise_seeds[images.clone()],
        layer: 0,
    });
    let variation = Variation { branch_scales: scales.as_ref(), router_noise: noise };
    let backbone = &vit.config().backbone;
    let of = |values: &[f32], len: usize| values[images.start * len..images.end * len].to_vec();
    match &batch.inputs {
        Inputs::Pixels(pixels) => {
            let (count, side) = (images.len(), backbone.image_size);
            let pixels = Tensor::from_vec(of(pixels, side * side * 3), (count, side, side, 3), &Device::Cpu)?;
            vit.forward_varied(&pixels, quantizers, variation)
        }
        Inputs::Tokens(values) => {
            let (tokens, d_model) = (backbone.num_tokens(), backbone.d_model);
            let values = of(values, tokens * d_model);
            let tokens = Tensor::from_vec(values, (images.len(), tokens, d_model), &Device::Cpu)?;
            vit.forward_tokens(tokens, quantizers, variation)
        }
    }
}

/// The share of the batch's gradient and statistics that comes from `images`.
fn backward(
    vit: &ViT,
    output: &Output,
    loads: &[Vec<f32>],
    batch: &Batch,
    images: &Range<usize>,
    weights: LossWeights,
) -> Result<(Gradients, StepStats)> {
    let classes = vit.config().num_classes;
    let share = images.len() as f64 / batch.len as f64;
    let targets = &batch.targets[images.start * classes..images.end * classes];
    let target_tensor = Tensor::from_slice(targets, (images.len(), classes), &Device::Cpu)?;
    let losses = losses(output, loads, (&target_tensor, &batch.heads), vit.config().backbone.grid_side(), weights)?;
    let grads = (&losses.total * share)?.backward()?;
    let mut named = Gradients::new();
    for (name, var) in vit.parameters().trainable() {
        let gradient = match grads.get(var) {
            Some(gradient) => gradient.flatten_all()?.to_vec1::<f32>()?,
            None => candle_core::bail!("parameter {name} received no gradient"),
        };
        named.insert(name.clone(), gradient);
    }
    let logits = output.logits.flatten_all()?.to_vec1::<f32>()?;
    let hits = logits.chunks_exact(classes).zip(targets.chunks_exact(classes));
    let hits = hits.filter(|(logits, targets)| is_hit(logits, targets, &batch.heads)).count();
    let scalar = |t: &Tensor| t.to_scalar::<f32>().map(f64::from);
    let stats = StepStats {
        loss: scalar(&losses.total)? * share,
        cross_entropy: scalar(&losses.cross_entropy)? * share,
        balance: scalar(&losses.balance)? * share,
        smoothness: scalar(&losses.smoothness)? * share,
        contiguity: scalar(&losses.contiguity)? * share,
        accuracy: hits as f64 / batch.len as f64,
    };
    Ok((named, stats))
}

/// Whether the largest logit is the largest target, in the first head with a target.
fn is_hit(mut logits: &[f32], mut targets: &[f32], heads: &[usize]) -> bool {
    for &classes in heads {
        if targets[..classes].iter().any(|target| *target > 0.0) {
            (logits, targets) = (&logits[..classes], &targets[..classes]);
            break;
        }
        (logits, targets) = (&logits[classes..], &targets[classes..]);
    }
    argmax(logits) == argmax(targets)
}

fn argmax(values: &[f32]) -> usize {
    values.iter().enumerate().fold(0, |best, (i, v)| if *v > values[best] { i } else { best })
}
