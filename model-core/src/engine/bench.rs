//! Timing the engine against the dense experts that it replaces, in one process, on random weights.
//!
//! The baseline is honest: f32 experts with weights packed ahead for the same panel kernel, and only the chosen experts
//! computed, each once for all of its tokens. Routing is the engine's own for both, and so is the input.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::backbone::Backbone;
use super::expert_set::ExpertSet;
use super::moe::MoeLayer;
use super::session::{Row, Session};
use crate::artifact::Digest;
use crate::config::{BackboneConfig, ConfigError, ViTConfig};
use crate::error::ModelError;
use crate::image::Preprocess;
use crate::kernels::activation::gelu;
use crate::kernels::{Isa, PackedF32};
use crate::random::SplitMix64;
use crate::random_weights::{backbone_weights, expert_set_weights, linear};
use crate::weights::{BlockWeights, ExpertLayerWeights, Linear};

#[derive(Debug, Clone)]
pub struct Options {
    /// Shapes; `experts` is replaced by each of `num_experts` in turn.
    pub config: ViTConfig,
    /// Experts per layer to try.
    pub num_experts: Vec<usize>,
    /// Threads of the engine; the baseline always has one.
    pub threads: usize,
    /// Images of a whole-model batch.
    pub batch: usize,
    /// How long to repeat each measurement.
    pub duration: Duration,
    /// Whether to time dense experts too; they take `8 d_model d_ff` bytes each.
    pub dense: bool,
    pub isa: Isa,
}

/// Durations of repeated runs, milliseconds.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Timing {
    /// The fastest run: what the work takes when nothing else wants the core.
    pub best_ms: f64,
    /// Half the runs were faster.
    pub median_ms: f64,
    /// One run in twenty was slower.
    pub p95_ms: f64,
    pub runs: usize,
}

/// One implementation of the mixture-of-experts layer, for the tokens of one image.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct LayerReport {
    /// Router included for the engine, excluded for the baseline.
    pub time: Timing,
    /// Multiply-accumulates of the matrix products per second.
    pub gmac_per_second: f64,
    /// Weights, scales, codes and routers read for one image.
    pub bytes_read: usize,
    /// Weights, scales, codes and routers in memory.
    pub resident_bytes: usize,
}

/// The whole model, from pixels to logits.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct ModelReport {
    pub time: Timing,
    /// Images of that batch per second, at the median.
    pub images_per_second: f64,
    /// Multiply-accumulates of all products per second, attention's included.
    pub gmac_per_second: f64,
    /// Weights read for one batch, divided by its images: everything but the angles of experts that no token chose.
    pub bytes_read_per_image: usize,
    pub backbone_bytes: usize,
    /// Expert set in memory.
    pub expert_set_bytes: usize,
    /// Scratch of the session.
    pub session_bytes: usize,
}

/// Figures for one number of experts.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Experts per layer.
    pub num_experts: usize,
    pub layer: LayerReport,
    /// The same layer with dense f32 experts.
    pub dense_layer: Option<LayerReport>,
    /// The whole model with our layers.
    pub model: ModelReport,
}

/// Runs every measurement of `options`.
///
/// # Errors
/// [`ModelError`] when the configuration is not valid.
pub fn run(options: &Options) -> Result<Vec<Report>, ModelError> {
    let reports = options.num_experts.iter().map(|&num_experts| {
        let mut config = options.config.clone();
        config.experts.num_experts = num_experts;
        config.experts.top_k = config.experts.top_k.min(num_experts);
        config.validate()?;
        report(&config, options)
    });
    reports.collect()
}

fn report(config: &ViTConfig, options: &Options) -> Result<Report, ModelError> {
    if !config.backbone.has_blocks() {
        let reason = "a stem alone has no layer of experts to time".to_owned();
        return Err(ConfigError { field: "backbone.num_layers", reason }.into());
    }
    let mut random = SplitMix64::at(2603, 0);
    let weights = backbone_weights(&config.backbone, &mut random);
    let set = expert_set_weights(config, &mut random);
    let digest = Digest::of("bench", &[]);
    let backbone = Backbone::from_weights("bench".into(), &weights, Preprocess::default(), digest, options.isa)?;
    let backbone = Arc::new(backbone);
    let expert_set = ExpertSet::from_weights("bench".into(), set.clone(), digest, &backbone)?;
    let model = model(config, options, &backbone, &expert_set, &mut random)?;
    let (layer, dense_layer) = layers(config, options, &weights.blocks[0], &set.layers[0], &mut random)?;
    Ok(Report { num_experts: config.experts.num_experts, layer, dense_layer, model })
}

/// Times a batch of images through the whole model.
fn model(
    config: &ViTConfig,
    options: &Options,
    backbone: &Arc<Backbone>,
    set: &ExpertSet,
    random: &mut SplitMix64,
) -> Result<ModelReport, ModelError> {
    let (tokens, layers, batch) = (config.backbone.num_tokens(), config.backbone.num_layers, options.batch);
    let mut session = Session::new(backbone, batch, options.threads);
    let pixels = random.uniforms(batch * backbone.pixels_len(), 1.0);
    let mut logits = vec![0.0; batch * config.num_classes];
    let choices = layers * tokens * config.experts.top_k;
    let mut routing = vec![0; batch * choices];
    let rows = logits.chunks_exact_mut(config.num_classes).zip(routing.chunks_exact_mut(choices));
    let rows = rows.zip(pixels.chunks_exact(backbone.pixels_len()));
    let mut rows: Vec<_> = rows
        .map(|((logits, routing), pixels)| Row { set, pixels, logits, routing: Some(routing), features: None })
        .collect();
    session.forward(&mut rows)?;
    let time = time(options.duration, || {
        session.forward(&mut rows).expect("the first forward succeeded with the same rows");
    });
    drop(rows);
    let mut chosen = vec![false; layers * config.experts.num_experts];
    for (i, &id) in routing.iter().enumerate() {
        let layer = i / (tokens * config.experts.top_k) % layers;
        chosen[layer * config.experts.num_experts + usize::from(id)] = true;
    }
    let idle = chosen.iter().filter(|&&chosen| !chosen).count() * angle_bytes(config);
    Ok(ModelReport {
        time,
        images_per_second: batch as f64 * 1e3 / time.median_ms,
        gmac_per_second: (batch * model_macs(config)) as f64 / time.median_ms / 1e6,
        bytes_read_per_image: (backbone.resident_bytes() + set.resident_bytes() - idle) / batch,
        backbone_bytes: backbone.resident_bytes(),
        expert_set_bytes: set.resident_bytes(),
        session_bytes: session.resident_bytes(),
    })
}

/// Multiply-accumulates of the products of one mixture-of-experts layer for one image. `down` runs on one row per
/// token unless an `out` rotation forbids it. Rotations are not counted, since dense experts have none.
fn layer_macs(config: &ViTConfig) -> usize {
    let BackboneConfig { d_model, d_ff, .. } = config.backbone;
    let (tokens, top_k) = (config.backbone.num_tokens(), config.experts.top_k);
    let down_rows = if config.experts.stages_out == 0 { tokens } else { tokens * top_k };
    (tokens * top_k + down_rows) * d_model * d_ff + tokens * d_model * config.experts.num_experts
}

/// Multiply-accumulates of all products for one image.
fn model_macs(config: &ViTConfig) -> usize {
    let (d_model, tokens) = (config.backbone.d_model, config.backbone.num_tokens());
    let stem = config.backbone.stem_inputs().map(|(layer, side, channels)| {
        layer.output_side(side).unwrap_or(0).pow(2) * layer.channels * layer.window_len(channels)
    });
    let attention = 4 * tokens * d_model.pow(2) + 2 * tokens.pow(2) * d_model;
    stem.sum::<usize>() + config.backbone.num_layers * (attention + layer_macs(config)) + config.num_classes * d_model
}

/// Bytes of the angle codes of one expert in one layer.
fn angle_bytes(config: &ViTConfig) -> usize {
    config.experts.angles_per_expert(&config.backbone.shape()) * config.experts.angle_bits as usize / 8
}

/// Times our layer and, where asked for, the dense one, on the tokens of one image.
fn layers(
    config: &ViTConfig,
    options: &Options,
    block: &BlockWeights,
    experts: &ExpertLayerWeights,
    random: &mut SplitMix64,
) -> Result<(LayerReport, Option<LayerReport>), ModelError> {
    let d_model = config.backbone.d_model;
    let (tokens, top_k) = (config.backbone.num_tokens(), config.experts.top_k);
    let x = random.uniforms(tokens * d_model, 1.0);
    let (shape, substrates, experts) = (config.backbone.shape(), (&block.up, &block.down), (experts, &config.experts));
    let mut layer = MoeLayer::new(options.isa, &shape, substrates, experts, &x, options.threads)?;
    let mut residual = vec![0.0; x.len()];
    let timing = time(options.duration, || layer.run(&mut residual));

    let (ids, _) = layer.choices();
    let mut by_expert = vec![Vec::new(); config.experts.num_experts];
    for (slot, &id) in ids.iter().enumerate() {
        by_expert[usize::from(id)].push(slot / top_k);
    }
    let chosen = by_expert.iter().filter(|tokens| !tokens.is_empty()).count();
    let idle = (config.experts.num_experts - chosen) * angle_bytes(config);
    let resident_bytes = layer.resident_bytes();
    let ours = LayerReport {
        time: timing,
        gmac_per_second: layer_macs(config) as f64 / timing.median_ms / 1e6,
        bytes_read: resident_bytes - idle,
        resident_bytes,
    };
    if !options.dense {
        return Ok((ours, None));
    }
    Ok((ours, Some(dense_layer(config, options, &x, &by_expert, random)?)))
}

/// One f32 network per expert.
fn dense_layer(
    config: &ViTConfig,
    options: &Options,
    x: &[f32],
    by_expert: &[Vec<usize>],
    random: &mut SplitMix64,
) -> Result<LayerReport, ModelError> {
    let BackboneConfig { d_model, d_ff, .. } = config.backbone;
    let mut pack = |rows: usize, cols: usize| {
        let Linear { weight, bias } = linear(random, rows, cols);
        PackedF32::pack(options.isa, &weight.to_f32(), &bias, rows, cols)
    };
    let experts: Vec<_> = by_expert
        .iter()
        .map(|_| Ok((pack(d_ff, d_model)?, pack(d_model, d_ff)?)))
        .collect::<Result<_, ModelError>>()?;
    let most = by_expert.iter().map(Vec::len).max().unwrap_or(0);
    let (mut rows, mut hidden) = (vec![0.0; most * d_model], vec![0.0; most * d_ff]);
    let mut y = vec![0.0; x.len()];
    let weight = 1.0 / config.experts.top_k as f32;
    let timing = time(options.duration, || {
        y.fill(0.0);
        for (tokens, (up, down)) in by_expert.iter().zip(&experts) {
            let rows = &mut rows[..tokens.len() * d_model];
            let hidden = &mut hidden[..tokens.len() * d_ff];
            for (row, &token) in rows.chunks_exact_mut(d_model).zip(tokens) {
                row.copy_from_slice(&x[token * d_model..][..d_model]);
            }
            up.matmul(rows, hidden).expect("buffers fit the experts' shapes");
            gelu(options.isa, hidden);
            down.matmul(hidden, rows).expect("buffers fit the experts' shapes");
            for (row, &token) in rows.chunks_exact(d_model).zip(tokens) {
                for (y, v) in y[token * d_model..].iter_mut().zip(row) {
                    *y += weight * v;
                }
            }
        }
    });
    let expert_bytes = experts.first().map_or(0, |(up, down)| up.resident_bytes() + down.resident_bytes());
    let router_bytes = by_expert.len() * d_model * size_of::<f32>();
    let slots: usize = by_expert.iter().map(Vec::len).sum();
    let chosen = by_expert.iter().filter(|tokens| !tokens.is_empty()).count();
    Ok(LayerReport {
        time: timing,
        gmac_per_second: (slots * 2 * d_model * d_ff) as f64 / timing.median_ms / 1e6,
        bytes_read: chosen * expert_bytes + router_bytes,
        resident_bytes: experts.len() * expert_bytes + router_bytes,
    })
}

/// Repeats `work` for about `duration`, after one run to warm up; at least five times.
fn time(duration: Duration, mut work: impl FnMut()) -> Timing {
    const FEWEST: usize = 5;
    work();
    let begin = Instant::now();
    let mut runs = Vec::new();
    while runs.len() < FEWEST || begin.elapsed() < duration {
        let start = Instant::now();
        work();
        runs.push(start.elapsed().as_secs_f64() * 1e3);
    }
    runs.sort_by(f64::total_cmp);
    Timing { best_ms: runs[0], median_ms: runs[runs.len() / 2], p95_ms: runs[runs.len() * 95 / 100], runs: runs.len() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tiny_bench_reports_every_number_of_experts() {
        let options = Options {
            config: ViTConfig::preset("tiny").unwrap(),
            num_experts: vec![1, 4],
            threads: 1,
            batch: 2,
            duration: Duration::ZERO,
            dense: true,
            isa: Isa::best(),
        };
        let reports = run(&options).unwrap();
        assert_eq!(reports.iter().map(|r| r.num_experts).collect::<Vec<_>>(), [1, 4]);
        for report in reports {
            let dense = report.dense_layer.unwrap();
            assert!(report.layer.bytes_read <= report.layer.resident_bytes && dense.bytes_read <= dense.resident_bytes);
            assert!(report.model.images_per_second > 0.0);
            let resident = report.model.backbone_bytes + report.model.expert_set_bytes;
            // Half of it for each of the two images.
            assert!((1..=resident / 2).contains(&report.model.bytes_read_per_image));
        }
    }
}
