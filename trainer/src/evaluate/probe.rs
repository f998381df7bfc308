//! What a model's experts have learned, shown by taking it away: the same images again with the wrong experts, with none,
//! with the angles back where they started.

use std::fmt::Write;
use std::sync::Arc;

use anyhow::{Result, ensure};
use candle_core::Tensor;
use model_core::artifact::{BackboneArtifact, ExpertSetArtifact};
use model_core::random::{AngleStart, SplitMix64};
use model_core::weights::{AngleCodes, ExpertLayerWeights};
use serde::Serialize;
use training::ops::{self, Activations, AngleGrid};
use training::parameters::Quantizers;
use training::quantize::{angle_codes, router_codes};
use training::vit::ViT;

use super::Tally;

/// What the probe found. Accuracies are shares of the images whose label comes first.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Probe {
    /// Which forward pass: `integer` or `float`.
    pub path: &'static str,
    pub images: usize,
    /// The model as it is.
    pub top1: f64,
    /// Share of angle codes that differ from the start's; none where the artifact does not say where they started.
    pub angles_moved: Option<f64>,
    /// Every token is sent to the expert after the chosen one; none for a single expert.
    pub wrong_expert: Option<f64>,
    /// Random routers, with rows as long as the trained ones', choose and weigh the experts.
    pub random_expert: f64,
    /// All angles are zero: every expert is the substrate as it is.
    pub no_rotation: f64,
    /// The angles are the start's.
    pub angles_at_start: Option<f64>,
    /// The feed-forward branches are left out.
    pub no_experts: f64,
    /// First to last.
    pub layers: Vec<LayerProbe>,
}

/// What the probe found in one layer.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LayerProbe {
    /// Share of angle codes that differ from the start's.
    pub angles_moved: Option<f64>,
    /// Mean cosine between the outputs of two experts for the same token, over all pairs and some tokens; none
    /// for a single expert.
    pub expert_cosine: Option<f64>,
    /// Number of experts that would be used if all were used alike: the exponential of the entropy of their
    /// shares of the choices.
    pub effective_experts: f64,
}

/// A backbone and an expert set on it.
#[derive(Debug, Clone)]
pub struct Artifacts {
    pub backbone: BackboneArtifact,
    pub set: ExpertSetArtifact,
}

impl Artifacts {
    /// With every angle written down, so that it can be changed.
    fn with_own_angles(&self) -> Self {
        let mut changed = self.clone();
        changed.set.weights.own_angles(&self.backbone.weights.config.shape());
        changed
    }

    fn with_layers(&self, change: impl Fn(usize, &mut ExpertLayerWeights)) -> Self {
        let mut changed = self.clone();
        changed.set.weights.layers.iter_mut().enumerate().for_each(|(l, layer)| change(l, layer));
        changed
    }

    /// Every rotation's codes of expert e become those of expert e + 1.
    fn with_wrong_experts(&self) -> Self {
        let experts = self.set.weights.config.num_experts;
        self.with_layers(|_, layer| {
            for rotation in rotations(layer) {
                let of_one = rotation.codes.len() / experts;
                rotation.codes.rotate_left(of_one);
            }
        })
    }

    fn with_random_routers(&self) -> Self {
        let (d_model, config) = (self.backbone.weights.config.d_model, &self.set.weights.config);
        let (bits, scales) = (config.router_bits, config.router_scales);
        self.with_layers(|l, layer| {
            let mut gates = SplitMix64::at(l as u64, 0).normals(layer.router.len(), 1.0);
            let trained = layer.router.chunks_exact(d_model).zip(&layer.router_scale);
            for (row, (codes, scale)) in gates.chunks_exact_mut(d_model).zip(trained) {
                let length = |squares: f32| squares.sqrt();
                let wanted = length(codes.iter().map(|&code| (f32::from(code) * scale).powi(2)).sum());
                let factor = wanted / length(row.iter().map(|v| v * v).sum());
                row.iter_mut().for_each(|v| *v *= factor);
            }
            (layer.router, layer.router_scale) = router_codes(&gates, d_model, bits, scales);
        })
    }

    fn without_rotations(&self) -> Self {
        self.with_layers(|_, layer| rotations(layer).into_iter().for_each(|rotation| rotation.codes.fill(0)))
    }

    fn with_angles(&self, start: &[[Vec<u16>; 3]]) -> Self {
        self.with_layers(|l, layer| {
            rotations(layer).into_iter().zip(&start[l]).for_each(|(rotation, codes)| rotation.codes.clone_from(codes));
        })
    }

    fn without_experts(&self) -> Self {
        let mut changed = self.clone();
        for block in &mut changed.backbone.weights.blocks {
            block.down.codes = vec![0; block.down.codes.len()].into();
        }
        changed
    }

    /// Its codes, layer by layer and site by site.
    fn own_codes(&self) -> Vec<[Vec<u16>; 3]> {
        let codes = |layer: &ExpertLayerWeights| {
            [&layer.rotation_in, &layer.rotation_hidden, &layer.rotation_out].map(|rotation| rotation.codes.clone())
        };
        self.set.weights.layers.iter().map(codes).collect()
    }

    /// The codes that `start` stands for, layer by layer and site by site.
    fn start_codes(&self, start: &AngleStart) -> Result<Vec<[Vec<u16>; 3]>> {
        let bits = self.set.weights.config.angle_bits;
        let layers = self.set.weights.layers.iter().enumerate().map(|(l, layer)| {
            let mut codes = [Vec::new(), Vec::new(), Vec::new()];
            let rotations = [&layer.rotation_in, &layer.rotation_hidden, &layer.rotation_out];
            for (site, (codes, rotation)) in codes.iter_mut().zip(rotations).enumerate() {
                let angles = start.angles(l, site, rotation.codes.len(), bits);
                ensure!(
                    angles.is_some(),
                    "the set's training record names the generator {:?} for {} layers; {} for {} layers is known",
                    start.generator,
                    start.drawn_before.len(),
                    AngleStart::GENERATOR,
                    self.set.weights.layers.len()
                );
                *codes = angle_codes(&angles.unwrap_or_default(), bits);
            }
            Ok(codes)
        });
        layers.collect()
    }
}

fn rotations(layer: &mut ExpertLayerWeights) -> [&mut AngleCodes; 3] {
    [&mut layer.rotation_in, &mut layer.rotation_hidden, &mut layer.rotation_out]
}

impl Probe {
    /// Probes `model`, whose angles started at `start`; those of a seed are where they started. `measure` shows the images to a model, and `pixels
    /// [images, side, side, 3]` are some of them, normalised, whose tokens the experts' outputs are compared on.
    ///
    /// # Errors
    /// When `measure` fails or the start is of an unknown generator.
    pub fn new(
        model: &Artifacts,
        start: Option<&AngleStart>,
        path: &'static str,
        pixels: &Tensor,
        measure: impl Fn(&Artifacts) -> Result<Tally>,
    ) -> Result<Self> {
        let accuracy = |changed: &Artifacts| Ok::<f64, anyhow::Error>(measure(changed)?.scores().top1);
        let tally = measure(model)?;
        let is_seeded = model.set.weights.config.angle_seed.is_some();
        let model = &model.with_own_angles();
        let start = match start {
            _ if is_seeded => Some(model.own_codes()),
            Some(start) => Some(model.start_codes(start)?),
            None => None,
        };
        let scores = tally.scores();
        let several = model.set.weights.config.num_experts > 1;
        let moved = start.as_ref().map(|start| moved(model, start));
        let cosines = expert_cosines(model, pixels)?;
        let layers = cosines.into_iter().enumerate().map(|(l, expert_cosine)| LayerProbe {
            angles_moved: moved.as_ref().map(|moved| share(moved[l])),
            expert_cosine,
            effective_experts: effective(&tally.layers[l].load),
        });
        Ok(Self {
            path,
            images: scores.images,
            top1: scores.top1,
            angles_moved: moved
                .as_ref()
                .map(|moved| share(moved.iter().fold((0, 0), |sum, layer| (sum.0 + layer.0, sum.1 + layer.1)))),
            wrong_expert: several.then(|| accuracy(&model.with_wrong_experts())).transpose()?,
            random_expert: accuracy(&model.with_random_routers())?,
            no_rotation: accuracy(&model.without_rotations())?,
            angles_at_start: start.map(|start| accuracy(&model.with_angles(&start))).transpose()?,
            no_experts: accuracy(&model.without_experts())?,
            layers: layers.collect(),
        })
    }

    pub fn text(&self) -> String {
        let mut out = String::new();
        // Writing to a string cannot fail.
        let _ = self.write_text(&mut out);
        out
    }

    fn write_text(&self, out: &mut String) -> std::fmt::Result {
        let unknown = || "unknown: the artifact does not say where they started".to_owned();
        let percent = |share: Option<f64>| share.map(|share| format!("{:6.2} %", 100.0 * share));
        let against = |top1: Option<f64>| {
            let difference = top1.map(|top1| format!("{:+7.2}", 100.0 * (top1 - self.top1)));
            percent(top1).zip(difference).map(|(top1, difference)| format!("{top1} {difference}"))
        };
        writeln!(out, "{} images, {} path", self.images, self.path)?;
        writeln!(out, "angle codes moved     {}", percent(self.angles_moved).unwrap_or_else(unknown))?;
        writeln!(out, "\ntop-1, and the difference")?;
        writeln!(out, "as it is              {}", percent(Some(self.top1)).unwrap_or_default())?;
        for (name, top1) in [
            ("wrong expert", self.wrong_expert),
            ("random expert", Some(self.random_expert)),
            ("no rotation", Some(self.no_rotation)),
            ("angles at the start", self.angles_at_start),
            ("no experts", Some(self.no_experts)),
        ] {
            writeln!(out, "{name:<21} {}", against(top1).unwrap_or_else(|| "unknown".to_owned()))?;
        }
        writeln!(out, "\n             codes moved   cosine between experts   effective experts")?;
        for (i, layer) in self.layers.iter().enumerate() {
            let moved = percent(layer.angles_moved).unwrap_or_default();
            let cosine = layer.expert_cosine.map_or_else(String::new, |cosine| format!("{cosine:.3}"));
            writeln!(out, "layer {i:<6} {moved:>11} {cosine:>24} {:>19.1}", layer.effective_experts)?;
        }
        Ok(())
    }
}

/// For every layer how many codes differ from `start`, and of how many.
fn moved(model: &Artifacts, start: &[[Vec<u16>; 3]]) -> Vec<(usize, usize)> {
    let layers = model.set.weights.layers.iter().zip(start).map(|(layer, start)| {
        let rotations = [&layer.rotation_in, &layer.rotation_hidden, &layer.rotation_out];
        let codes = || rotations.iter().zip(start).flat_map(|(now, start)| now.codes.iter().zip(start));
        (codes().filter(|(now, start)| now != start).count(), codes().count())
    });
    layers.collect()
}

fn share((part, whole): (usize, usize)) -> f64 {
    part as f64 / whole.max(1) as f64
}

/// The exponential of the entropy of `load`'s shares.
fn effective(load: &[u64]) -> f64 {
    let total = load.iter().sum::<u64>().max(1) as f64;
    let entropy = |&count: &u64| {
        let share = count as f64 / total;
        if count > 0 { -share * share.ln() } else { 0.0 }
    };
    load.iter().map(entropy).sum::<f64>().exp()
}

/// Tokens of a layer whose experts' outputs are compared.
const TOKENS: usize = 64;

/// For every layer the mean cosine between two experts' outputs for the same token, by the float path.
fn expert_cosines(model: &Artifacts, pixels: &Tensor) -> Result<Vec<Option<f64>>> {
    let experts = model.set.weights.config.num_experts;
    let vit = ViT::from_weights(&model.backbone.weights, &model.set.weights)?.freeze(|_| true)?;
    let output = vit.forward(pixels, Quantizers::NONE)?;
    let layers = output.routing.iter().enumerate().map(|(l, routing)| {
        if experts < 2 {
            return Ok(None);
        }
        let rows = routing.rows();
        let (tokens, _) = rows.dims2()?;
        // Evenly over all images.
        let some: Vec<u32> = (0..TOKENS.min(tokens)).map(|i| (i * tokens / TOKENS.min(tokens)) as u32).collect();
        let rows = rows.index_select(&Tensor::from_slice(&some, some.len(), rows.device())?, 0)?;
        let outputs = all_outputs(&vit, l, &rows)?.to_vec2::<f32>()?;
        let cosines: Vec<f64> = outputs.chunks_exact(experts).map(mean_cosine).collect();
        Ok(Some(cosines.iter().sum::<f64>() / cosines.len() as f64))
    });
    layers.collect()
}

/// What every expert of `layer` makes of every one of `rows [tokens, d_model]`: `[tokens * experts, d_model]`.
fn all_outputs(vit: &ViT, layer: usize, rows: &Tensor) -> Result<Tensor> {
    let config = &vit.config().experts;
    let (parameters, name) = (vit.parameters(), format!("blocks.{layer}.moe"));
    let experts: Vec<u16> = (0..rows.dim(0)?).flat_map(|_| 0..config.num_experts as u16).collect();
    let experts = Arc::new(experts);
    let rotate = |x: &Tensor, site: &str| -> Result<Tensor> {
        Ok(ops::rotate_rows(x, &parameters.get(&format!("{name}.{site}"))?, experts.clone(), AngleGrid::Continuous)?)
    };
    let product = |x: &Tensor, part: &str| -> Result<Tensor> {
        Ok(ops::ternary_linear(x, &parameters.substrate(&name, part)?, false, Activations::Float)?)
    };
    let h = rotate(&product(&rotate(rows, "rotation_in")?, "up")?, "rotation_hidden")?;
    let o = product(&ops::gelu(&h)?, "down")?;
    if config.stages_out > 0 { rotate(&o, "rotation_out") } else { Ok(o) }
}

/// The mean cosine over all pairs of `vectors`: of unit vectors u, `(|sum u|^2 - n) / (n (n - 1))`. A vector of zeros counts
/// as perpendicular to all.
fn mean_cosine(vectors: &[Vec<f32>]) -> f64 {
    let mut sum = vec![0f64; vectors[0].len()];
    let mut unit_vectors = 0.0;
    for vector in vectors {
        let length = vector.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>().sqrt();
        if length > 0.0 {
            unit_vectors += 1.0;
            sum.iter_mut().zip(vector).for_each(|(sum, &v)| *sum += f64::from(v) / length);
        }
    }
    let n = vectors.len() as f64;
    (sum.iter().map(|v| v * v).sum::<f64>() - unit_vectors) / (n * (n - 1.0))
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use model_core::artifact::{read_backbone, read_expert_set, write_backbone, write_expert_set};
    use model_core::config::{FeedForwardKind, ViTConfig};
    use model_core::image::Preprocess;
    use model_core::random::AngleSpread;
    use serde_json::Value;

    use super::*;
    use crate::data::Dataset;
    use crate::predict::{Integer, Prediction, for_each_shard};

    const IMAGES: usize = 200;

    fn dataset(model: &Artifacts) -> Dataset {
        Dataset {
            images: (0..IMAGES * 192).map(|i: usize| (i.wrapping_mul(2_654_435_761) >> 9) as u8).collect(),
            side: 8,
            labels: vec![0; IMAGES],
            class_names: model.set.weights.labels.clone(),
        }
    }

    /// Hands the answers for all images to `take`.
    fn show(model: &Artifacts, dataset: &Dataset, mut take: impl FnMut(&[u32], Prediction) + Send) {
        let integer = Integer::new(&model.backbone, &model.set).unwrap();
        let all: Vec<u32> = (0..IMAGES as u32).collect();
        for_each_shard(&integer, dataset, &all, &Preprocess::default(), 1, &mut take).unwrap();
    }

    /// A random model whose angles are spread over the circle, and where they started. Its head's biases are such that it
    /// answers with every class.
    fn model() -> (Artifacts, AngleStart) {
        model_of(&ViTConfig::preset("tiny").unwrap())
    }

    fn model_of(config: &ViTConfig) -> (Artifacts, AngleStart) {
        let vit = ViT::init_kind(config, FeedForwardKind::Butterfly, AngleSpread::Uniform, 4).unwrap();
        let labels: Vec<String> = (0..5).map(|class| class.to_string()).collect();
        let (backbone, set) = vit.to_weights(&labels).unwrap();
        let bytes = write_backbone("b", &backbone, &Preprocess::default(), &Value::Null).unwrap();
        let backbone = read_backbone(&bytes).unwrap();
        let bytes = write_expert_set("s", &set, (&backbone.weights.config, backbone.digest), &Value::Null).unwrap();
        let mut model = Artifacts { backbone, set: read_expert_set(&bytes).unwrap() };
        let mut means = [0f32; 5];
        show(&model, &dataset(&model), |_, answer| {
            answer.logits.iter().enumerate().for_each(|(i, logit)| means[i % 5] += logit / IMAGES as f32);
        });
        model.set.weights.head.bias.iter_mut().zip(means).for_each(|(bias, mean)| *bias -= mean);
        (model, vit.angle_start().unwrap().clone())
    }

    /// The labels are what `model` answers, so that it is always right.
    fn probe(model: &Artifacts, start: &AngleStart) -> Probe {
        let mut dataset = dataset(model);
        let mut labels = Vec::new();
        show(model, &dataset, |_, answer| {
            for logits in answer.logits.chunks_exact(5) {
                labels.push((0..5).fold(0, |best, i| if logits[i] > logits[best] { i } else { best }) as u16);
            }
        });
        dataset.labels = labels;
        let pixels = Preprocess::default().normalize(&dataset.images[..8 * 192]);
        let pixels = Tensor::from_vec(pixels, (8, 8, 8, 3), &Device::Cpu).unwrap();
        let measure = |changed: &Artifacts| {
            let mut tally = Tally::new(&ViTConfig::preset("tiny").unwrap());
            show(changed, &dataset, |shard, answer| {
                let labels: Vec<u16> = shard.iter().map(|&i| dataset.labels[i as usize]).collect();
                tally.add(&labels, &answer);
            });
            Ok(tally)
        };
        Probe::new(model, Some(start), "integer", &pixels, measure).unwrap()
    }

    #[test]
    fn a_model_at_its_start_has_not_moved_and_needs_its_experts() {
        let (model, start) = model();
        let probe = probe(&model, &start);
        assert_eq!((probe.images, probe.top1, probe.angles_moved), (IMAGES, 1.0, Some(0.0)));
        assert_eq!(probe.angles_at_start, Some(1.0));
        for (name, top1) in [
            ("wrong_expert", probe.wrong_expert.unwrap()),
            ("random_expert", probe.random_expert),
            ("no_rotation", probe.no_rotation),
            ("no_experts", probe.no_experts),
        ] {
            assert!(top1 < 1.0, "{name} changes nothing: {probe:?}");
        }
        for layer in &probe.layers {
            assert!(layer.expert_cosine.unwrap() < 0.9, "experts spread over the circle differ: {probe:?}");
            assert!((1.0..=4.0).contains(&layer.effective_experts), "{probe:?}");
        }
    }

    #[test]
    fn blocks_may_share_their_substrates() {
        let mut config = ViTConfig::preset("tiny").unwrap();
        config.backbone.substrates.shared = true;
        let (model, start) = model_of(&config);
        let probe = probe(&model, &start);
        assert_eq!((probe.top1, probe.angles_moved), (1.0, Some(0.0)));
        assert!(probe.layers.iter().all(|layer| layer.expert_cosine.unwrap() < 0.9), "{probe:?}");
    }

    #[test]
    fn angles_of_a_seed_are_taken_away_like_others() {
        let (mut model, start) = model();
        let generator = model_core::config::Generator::SplitMix64;
        model.set.weights.config.angle_seed =
            Some(model_core::config::AngleSeed { generator, seed: 3, spread_bits: 8 });
        for layer in &mut model.set.weights.layers {
            rotations(layer).into_iter().for_each(|rotation| rotation.codes.clear());
        }
        let seeded = probe(&model, &start);
        assert_eq!((seeded.top1, seeded.angles_moved, seeded.angles_at_start), (1.0, Some(0.0), Some(1.0)));
        assert!(seeded.wrong_expert.unwrap() < 1.0 && seeded.no_rotation < 1.0, "{seeded:?}");
        let written = probe(&model.with_own_angles(), &start);
        assert_eq!(
            (written.wrong_expert, written.no_rotation, written.layers[0].expert_cosine),
            (seeded.wrong_expert, seeded.no_rotation, seeded.layers[0].expert_cosine)
        );
    }

    #[test]
    fn moved_codes_are_counted() {
        let (model, start) = model();
        // Two codes of expert 0, in layer 1 only; tiny has 4 experts of 4 * 8 + 4 * 16 + 2 * 8 angles.
        let moved = model.with_layers(|l, layer| {
            if l == 1 {
                layer.rotation_in.codes[3] ^= 1;
                layer.rotation_out.codes[0] ^= 128;
            }
        });
        let probe = probe(&moved, &start);
        let all = 4 * (4 * 8 + 4 * 16 + 2 * 8);
        assert_eq!(probe.angles_moved, Some(2.0 / f64::from(2 * all)));
        assert_eq!(probe.layers[0].angles_moved, Some(0.0));
        assert_eq!(probe.layers[1].angles_moved, Some(2.0 / f64::from(all)));
    }

    #[test]
    fn experts_that_are_all_alike_cannot_be_wrong() {
        let (model, start) = model();
        let alike = model.with_layers(|_, layer| {
            for rotation in rotations(layer) {
                let first = rotation.codes[..rotation.codes.len() / 4].to_vec();
                rotation.codes = first.repeat(4);
            }
        });
        let probe = probe(&alike, &start);
        // Weights of equal outputs sum to one within a rounding, which decides no image here.
        assert_eq!((probe.wrong_expert, probe.random_expert), (Some(1.0), 1.0));
        for layer in &probe.layers {
            assert!((layer.expert_cosine.unwrap() - 1.0).abs() < 1e-6, "{probe:?}");
        }
        assert!(probe.angles_moved.unwrap() > 0.7 && probe.no_rotation < 1.0, "{probe:?}");
    }

    #[test]
    fn what_is_not_there_is_not_missed() {
        let (model, start) = model();
        assert_eq!(probe(&model.without_rotations(), &start).no_rotation, 1.0);
        assert_eq!(probe(&model.without_experts(), &start).no_experts, 1.0);
        // Equal logits: every token goes to the first two experts.
        let unrouted = model.with_layers(|_, layer| layer.router.fill(0));
        for layer in probe(&unrouted, &start).layers {
            assert!((layer.effective_experts - 2.0).abs() < 1e-9);
        }
    }

    #[test]
    fn numbers_by_hand() {
        assert!((effective(&[5, 5, 0, 5]) - 3.0).abs() < 1e-12);
        let cosine = mean_cosine(&[vec![2.0, 0.0], vec![0.0, 3.0], vec![-1.0, 0.0]]);
        assert!((cosine - (0.0 - 1.0 + 0.0) / 3.0).abs() < 1e-12, "{cosine}");
    }

    #[test]
    fn an_unknown_generator_is_named() {
        let (model, start) = model();
        let other = AngleStart { generator: "dice".into(), ..start };
        assert!(model.start_codes(&other).unwrap_err().to_string().contains("\"dice\""));
    }
}
