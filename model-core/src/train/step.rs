//! Gradients of one batch, computed by shards on several threads.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use candle_core::{Device, Result, Tensor};

use super::loss::{LossWeights, losses};
use super::optimizer::Gradients;
use crate::vit::{Quantizers, ViT};

/// Images ready for the model.
#[derive(Debug, Clone)]
pub struct Batch {
    /// Normalised pixels, `[batch, side, side, 3]`.
    pub pixels: Vec<f32>,
    /// Soft labels `[batch, classes]`, rows summing to one.
    pub targets: Vec<f32>,
    /// Number of images.
    pub len: usize,
    /// Stochastic depth (arXiv 1603.09382): what every image's residual branches are multiplied by,
    /// `[batch, 2 * layers]`, attention before feed-forward; empty for one everywhere.
    pub branch_scales: Vec<f32>,
}

/// Means over a batch.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct StepStats {
    /// The loss that was descended.
    pub loss: f64,
    /// Its cross-entropy term.
    pub cross_entropy: f64,
    /// Load balance, 1 when balanced.
    pub balance: f64,
    /// Spatial smoothness.
    pub smoothness: f64,
    /// Contiguity ratio; 0 when it has no weight.
    pub contiguity: f64,
    /// Share of images whose largest logit is the largest target, mixed and taught as it may be.
    pub accuracy: f64,
}

/// The gradient of the mean loss over `batch`, and its statistics.
///
/// The batch is cut into shards of `shard_size` images that `threads` threads take in turn; shards are summed in
/// order, so the result depends on `shard_size` but not on `threads` or timing.
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
    let shards = batch.len.div_ceil(shard_size);
    let next = AtomicUsize::new(0);
    type ShardResult = Option<Result<(Gradients, StepStats)>>;
    let results: Mutex<Vec<ShardResult>> = Mutex::new((0..shards).map(|_| None).collect());
    std::thread::scope(|scope| {
        for _ in 0..threads.clamp(1, shards.max(1)) {
            scope.spawn(|| {
                loop {
                    let shard = next.fetch_add(1, Ordering::Relaxed);
                    if shard >= shards {
                        break;
                    }
                    let start = shard * shard_size;
                    let result =
                        shard_gradients(vit, quantizers, batch, start, shard_size.min(batch.len - start), weights);
                    results.lock().expect("no thread panics while it holds the lock")[shard] = Some(result);
                }
            });
        }
    });
    let mut sum = Gradients::new();
    let mut stats = StepStats::default();
    let results = results.into_inner().expect("no thread panics while it holds the lock");
    for (gradients, shard) in results.into_iter().flatten().collect::<Result<Vec<_>>>()? {
        for (name, gradient) in gradients {
            match sum.get_mut(&name) {
                Some(sum) => sum.iter_mut().zip(&gradient).for_each(|(s, g)| *s += g),
                None => drop(sum.insert(name, gradient)),
            }
        }
        stats.loss += shard.loss;
        stats.cross_entropy += shard.cross_entropy;
        stats.balance += shard.balance;
        stats.smoothness += shard.smoothness;
        stats.contiguity += shard.contiguity;
        stats.accuracy += shard.accuracy;
    }
    Ok((sum, stats))
}

/// The share of the batch's gradient and statistics that comes from `len` images from `start`.
fn shard_gradients(
    vit: &ViT,
    quantizers: Quantizers,
    batch: &Batch,
    start: usize,
    len: usize,
    weights: LossWeights,
) -> Result<(Gradients, StepStats)> {
    let side = vit.config().backbone.image_size;
    let classes = vit.config().num_classes;
    let share = len as f64 / batch.len as f64;
    let pixels = batch.pixels[start * side * side * 3..][..len * side * side * 3].to_vec();
    let targets = &batch.targets[start * classes..][..len * classes];
    let pixels = Tensor::from_vec(pixels, (len, side, side, 3), &Device::Cpu)?;
    let branches = 2 * vit.config().backbone.num_layers;
    let output = if batch.branch_scales.is_empty() {
        vit.forward(&pixels, quantizers)?
    } else {
        let scales = batch.branch_scales[start * branches..][..len * branches].to_vec();
        vit.forward_scaled(&pixels, quantizers, Some(&Tensor::from_vec(scales, (len, branches), &Device::Cpu)?))?
    };
    let target_tensor = Tensor::from_slice(targets, (len, classes), &Device::Cpu)?;
    let losses = losses(&output, &target_tensor, vit.config().backbone.grid_side(), weights)?;
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
    let hits = hits.filter(|(logits, targets)| argmax(logits) == argmax(targets)).count();
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

fn argmax(values: &[f32]) -> usize {
    values.iter().enumerate().fold(0, |best, (i, v)| if *v > values[best] { i } else { best })
}
