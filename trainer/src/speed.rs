//! How fast training is, beside how fast its matrix products could be.
//!
//! A step's multiply-adds are known from the configuration, and the machine's rate is measured by one large product of
//! the kind that dominates a step, between the steps and on as many threads: a machine that is busy with something
//! else slows both alike.

use std::time::{Duration, Instant};

use anyhow::Result;
use model_core::config::{FeedForwardKind, ViTConfig};
use serde::Serialize;
use training::matmul::{Mat, Write, matmul};
use training::optimizer::AdamW;
use training::step::{Batch, Inputs, gradients_in};

use crate::recipe::Recipe;

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Speed {
    pub threads: usize,
    pub steps: usize,
    /// Training images a second, optimiser included; images are synthetic and ready.
    pub images_per_second: f64,
    /// Multiply-adds of the matrix products of one image, forward and backward.
    pub multiply_adds_per_image: u64,
    /// Multiply-adds a second of the training steps, in billions.
    pub training_rate: f64,
    /// Of an f32 product of 8192 x 192 x 768 on every thread, in billions.
    pub product_rate: f64,
    /// `training_rate / product_rate`.
    pub share: f64,
}

/// Multiply-adds of the matrix products of a forward pass of one image.
pub fn forward_multiply_adds(config: &ViTConfig, kind: FeedForwardKind) -> u64 {
    let (b, e) = (&config.backbone, &config.experts);
    let tokens = b.num_tokens();
    let per_token = {
        let (d, f) = (b.d_model, b.d_ff);
        let attention = 4 * d * d + 2 * tokens * d;
        attention
            + match kind {
                FeedForwardKind::Dense => 2 * d * f,
                FeedForwardKind::DenseExperts
                | FeedForwardKind::TernaryExperts
                | FeedForwardKind::Int4Experts
                | FeedForwardKind::Int8Experts => e.num_experts * d + 2 * e.top_k * d * f,
                FeedForwardKind::LowRankExperts => e.num_experts * d + 2 * e.top_k * b.shape().low_rank() * (d + f),
                // Without an out rotation the sum over experts comes before `down`.
                _ => e.num_experts * d + (e.top_k + if e.stages_out > 0 { e.top_k } else { 1 }) * d * f,
            }
    };
    stem_multiply_adds(config).sum::<u64>()
        + (b.num_layers * tokens * per_token + config.num_classes * b.d_model) as u64
}

fn stem_multiply_adds(config: &ViTConfig) -> impl Iterator<Item = u64> + '_ {
    config.backbone.stem_inputs().map(|(layer, side, channels)| {
        let out = layer.output_side(side).unwrap_or(0);
        (out * out * layer.kernel.pow(2) * channels * layer.channels) as u64
    })
}

/// Forward once, backward twice as much: with respect to inputs and to weights. Pixels need no gradient.
pub fn training_multiply_adds(config: &ViTConfig, kind: FeedForwardKind) -> u64 {
    3 * forward_multiply_adds(config, kind) - stem_multiply_adds(config).next().unwrap_or(0)
}

/// Trains on synthetic images for about `duration`, alternating with the large product.
pub fn measure(recipe: &Recipe, threads: usize, duration: Duration) -> Result<Speed> {
    recipe.validate()?;
    let vit = recipe.init_model()?.freeze(|name| recipe.is_frozen(name))?;
    let mut optimizer = AdamW::new(recipe.optimizer);
    let batch = synthetic(&recipe.model, recipe.batch_size);
    let mut step = || -> Result<Duration> {
        let started = Instant::now();
        let sizes = (recipe.shard_size, threads);
        let (gradients, _) = gradients_in(recipe.products, &vit, recipe.quantizers(), &batch, recipe.losses, sizes)?;
        // A rate of nothing: the weights stay where they are, and the work is the same.
        optimizer.step(vit.parameters(), &gradients, 0.0, threads)?;
        Ok(started.elapsed())
    };
    // The first step of each pays for memory and instruction caches.
    let mut product = Product::new(threads);
    step()?;
    product.run();
    let started = Instant::now();
    let (mut steps, mut training, mut products) = (0, Duration::ZERO, Duration::ZERO);
    while steps == 0 || started.elapsed() < duration {
        training += step()?;
        products += product.run();
        steps += 1;
    }
    let images = (steps * recipe.batch_size) as f64;
    let multiply_adds_per_image = training_multiply_adds(&recipe.model, recipe.feed_forward);
    let images_per_second = images / training.as_secs_f64();
    let training_rate = images_per_second * multiply_adds_per_image as f64 / 1e9;
    let [m, k, n] = PRODUCT;
    let product_rate = (steps * threads * m * k * n) as f64 / products.as_secs_f64() / 1e9;
    let share = training_rate / product_rate;
    Ok(Speed { threads, steps, images_per_second, multiply_adds_per_image, training_rate, product_rate, share })
}

/// m, k, n.
const PRODUCT: [usize; 3] = [8192, 192, 768];

/// The large product, its matrices allocated and touched once: fresh memory would cost it page faults.
struct Product {
    lhs: Vec<f32>,
    rhs: Vec<f32>,
    outs: Vec<Vec<f32>>,
}

impl Product {
    fn new(threads: usize) -> Self {
        let [m, k, n] = PRODUCT;
        Self { lhs: vec![0.5; m * k], rhs: vec![0.25; k * n], outs: vec![vec![0.0; m * n]; threads] }
    }

    /// One product on each thread.
    fn run(&mut self) -> Duration {
        let [m, k, n] = PRODUCT;
        let (lhs, rhs) = (Mat::new(&self.lhs, m, k), Mat::new(&self.rhs, k, n));
        let started = Instant::now();
        std::thread::scope(|scope| {
            for out in &mut self.outs {
                scope.spawn(move || matmul(lhs, rhs, 1.0, out, n, Write::Set));
            }
        });
        started.elapsed()
    }
}

fn synthetic(config: &ViTConfig, len: usize) -> Batch {
    let pixels = len * config.backbone.image_size.pow(2) * 3;
    let mut targets = vec![0.0; len * config.num_classes];
    targets.chunks_exact_mut(config.num_classes).enumerate().for_each(|(i, row)| row[i % row.len()] = 1.0);
    let pixels = (0..pixels).map(|i| (i as f32 * 0.37).sin()).collect();
    Batch { inputs: Inputs::Pixels(pixels), targets, len, ..Batch::default() }
}

impl std::fmt::Display for Speed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "{:.1} images/s on {} threads ({} steps)", self.images_per_second, self.threads, self.steps)?;
        writeln!(f, "{:.1} M multiply-adds an image", self.multiply_adds_per_image as f64 / 1e6)?;
        writeln!(f, "{:.1} G multiply-adds/s while training", self.training_rate)?;
        let [m, k, n] = PRODUCT;
        writeln!(f, "{:.1} G multiply-adds/s in a product of {m} x {k} x {n}", self.product_rate)?;
        writeln!(f, "{:.1} % of it", 100.0 * self.share)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn multiply_adds_of_the_papers_configuration_by_hand() {
        let config = ViTConfig::preset("paper").unwrap();
        // 64 patches of 4 x 4 x 3 to 256.
        let stem = 64 * 48 * 256;
        // qkv and proj 4 x 256^2, attention 2 x 64 x 256, router 64 x 256, up twice and down once 256 x 1024.
        let token = 262_144 + 32_768 + 16_384 + 3 * 262_144;
        let forward = stem + 7 * 64 * token + 100 * 256;
        assert_eq!(forward_multiply_adds(&config, FeedForwardKind::Butterfly), forward);
        assert_eq!(training_multiply_adds(&config, FeedForwardKind::Butterfly), 3 * forward - stem);
        let dense = stem + 7 * 64 * (262_144 + 32_768 + 2 * 262_144) + 100 * 256;
        assert_eq!(forward_multiply_adds(&config, FeedForwardKind::Dense), dense);
    }

    #[test]
    fn a_measurement_adds_up() {
        let recipe = Recipe { batch_size: 4, ..Recipe::scratch(ViTConfig::preset("tiny").unwrap()) };
        let speed = measure(&recipe, 2, Duration::ZERO).unwrap();
        assert_eq!((speed.threads, speed.steps), (2, 1));
        let rate = speed.images_per_second * speed.multiply_adds_per_image as f64 / 1e9;
        assert!((speed.share - rate / speed.product_rate).abs() < 1e-9 && speed.share > 0.0);
    }
}
