//! Running a model over a data set, shard by shard on several threads.

use std::sync::{Arc, Mutex};

use anyhow::Result;
use candle_core::{Device, Tensor};
use indicatif::ProgressBar;
use model_core::artifact::{BackboneArtifact, ExpertSetArtifact};
use model_core::engine::{Backbone, ExpertSet, Row, Session};
use model_core::image::Preprocess;
use model_core::kernels::Isa;
use training::parameters::Quantizers;
use training::shards::in_turn;
use training::vit::{Output, Variation, ViT};

use crate::data::Dataset;

/// What a model made of some images.
#[derive(Debug, Clone, Default)]
pub struct Prediction {
    /// One row an image, `[images, classes]`.
    pub logits: Vec<f32>,
    /// For every layer the chosen experts `[images, tokens, top_k]`, best first.
    pub experts: Vec<Vec<u16>>,
    /// What the integer path's head sees, `[images, d_model]`; nothing from the float path.
    pub features: Vec<f32>,
}

/// A model ready to look at images.
pub trait Predictor: Sync {
    /// Looks at `len` images of normalised `pixels [len, side, side, 3]`.
    fn predict(&self, pixels: Vec<f32>, len: usize) -> Result<Prediction>;
}

/// The candle model, with the roundings it is asked for.
#[derive(Debug)]
pub struct Candle {
    /// The model; frozen, so that no graph is kept.
    pub vit: ViT,
    /// Which roundings to apply.
    pub quantizers: Quantizers,
}

impl Predictor for Candle {
    fn predict(&self, pixels: Vec<f32>, len: usize) -> Result<Prediction> {
        let side = self.vit.config().backbone.image_size;
        let pixels = Tensor::from_vec(pixels, (len, side, side, 3), &Device::Cpu)?;
        Prediction::of(&self.vit.forward(&pixels, self.quantizers)?)
    }
}

impl Candle {
    /// [`Predictor::predict`] from what the stem made of the images, `[len, tokens, d_model]`.
    pub fn predict_behind_stem(&self, tokens: Vec<f32>, len: usize) -> Result<Prediction> {
        let backbone = &self.vit.config().backbone;
        let tokens = Tensor::from_vec(tokens, (len, backbone.num_tokens(), backbone.d_model), &Device::Cpu)?;
        Prediction::of(&self.vit.forward_tokens(tokens, self.quantizers, Variation::default())?)
    }
}

impl Prediction {
    fn of(output: &Output) -> Result<Self> {
        Ok(Self {
            logits: output.logits.flatten_all()?.to_vec1()?,
            experts: output.routing.iter().map(|routing| routing.experts.to_vec()).collect(),
            features: Vec::new(),
        })
    }
}

/// The integer engine, which is what serves.
#[derive(Debug)]
pub struct Integer {
    backbone: Arc<Backbone>,
    set: ExpertSet,
    /// Choices of one image in one layer.
    choices: usize,
    /// Scratch that no thread is using at the moment.
    idle: Mutex<Vec<Session>>,
}

impl Integer {
    /// Packs artifacts for this CPU.
    pub fn new(backbone: &BackboneArtifact, set: &ExpertSetArtifact) -> Result<Self> {
        set.check_backbone(&backbone.weights.config, backbone.digest)?;
        let choices = backbone.weights.config.num_tokens() * set.weights.config.top_k;
        let BackboneArtifact { name, weights, preprocess, digest, .. } = backbone;
        let backbone = Backbone::from_weights(name.clone(), weights, preprocess.clone(), *digest, Isa::from_env()?)?;
        let set = ExpertSet::from_weights(set.name.clone(), set.weights.clone(), set.digest, &backbone)?;
        Ok(Self { backbone: Arc::new(backbone), set, choices, idle: Mutex::new(Vec::new()) })
    }
}

impl Predictor for Integer {
    fn predict(&self, pixels: Vec<f32>, len: usize) -> Result<Prediction> {
        let idle = self.idle.lock().expect("nobody panics while holding the list").pop();
        let mut session = match idle {
            Some(session) if session.max_batch() >= len => session,
            _ => Session::new(&self.backbone, len.max(SHARD), 1),
        };
        let (classes, layers) = (self.set.labels().len(), self.backbone.config().num_layers);
        let mut logits = vec![0.0; len * classes];
        let mut routing = vec![vec![0; layers * self.choices]; len];
        let d_model = self.backbone.config().d_model;
        let mut features = vec![0.0; len * d_model];
        let outputs = logits.chunks_exact_mut(classes).zip(&mut routing).zip(features.chunks_exact_mut(d_model));
        let mut rows: Vec<Row<'_>> = pixels
            .chunks_exact(self.backbone.pixels_len())
            .zip(outputs)
            .map(|(pixels, ((logits, routing), features))| Row {
                set: &self.set,
                pixels,
                logits,
                routing: Some(routing),
                features: Some(features),
            })
            .collect();
        session.forward(&mut rows)?;
        self.idle.lock().expect("nobody panics while holding the list").push(session);
        // From image by image to layer by layer.
        let of_layer = |layer: usize| {
            routing.iter().flat_map(|image| &image[layer * self.choices..][..self.choices]).copied().collect()
        };
        Ok(Prediction { experts: (0..layers).map(of_layer).collect(), logits, features })
    }
}

/// Images a thread looks at in one go.
const SHARD: usize = 32;

/// What the head of `engine` sees of images of normalised pixels, `[images, d_model]`.
///
/// # Errors
/// When the model does not fit the images.
pub fn features(engine: &Integer, images: &[Vec<f32>], threads: usize) -> Result<Vec<f32>> {
    let bar = ProgressBar::new(images.len() as u64);
    let features = in_turn(threads, images.chunks(SHARD).collect(), |shard| {
        let features = engine.predict(shard.concat(), shard.len())?.features;
        bar.inc(shard.len() as u64);
        anyhow::Ok(features)
    })?;
    bar.finish_and_clear();
    Ok(features.concat())
}

/// Shows the images `indices` of `dataset` to `model` and hands every shard's answer, with the shard's indices,
/// to `take`, in order.
///
/// # Errors
/// When the model does not fit the images.
pub fn for_each_shard(
    model: &dyn Predictor,
    dataset: &Dataset,
    indices: &[u32],
    preprocess: &Preprocess,
    threads: usize,
    take: &mut dyn FnMut(&[u32], Prediction),
) -> Result<()> {
    let answer = |shard: &[u32]| {
        let bytes: Vec<u8> = shard.iter().flat_map(|&i| dataset.image(i as usize)).copied().collect();
        model.predict(preprocess.normalize(&bytes), shard.len())
    };
    by_shards(indices, threads, answer, take)
}

/// Hands what `answer` says of every shard of `indices` to `take`, in order.
///
/// # Errors
/// The first of `answer`.
pub fn by_shards(
    indices: &[u32],
    threads: usize,
    answer: impl Fn(&[u32]) -> Result<Prediction> + Sync,
    take: &mut dyn FnMut(&[u32], Prediction),
) -> Result<()> {
    // A window bounds the answers that wait for their turn.
    for window in indices.chunks(SHARD * threads.max(1) * 4) {
        let shards: Vec<&[u32]> = window.chunks(SHARD).collect();
        let answers = in_turn(threads, shards.clone(), &answer)?;
        for (shard, answer) in shards.into_iter().zip(answers) {
            take(shard, answer);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use model_core::artifact::{read_backbone, read_expert_set, write_backbone, write_expert_set};
    use model_core::config::ViTConfig;
    use serde_json::Value;

    #[test]
    fn both_paths_agree_on_logits_and_routing() {
        let labels: Vec<String> = (0..5).map(|class| class.to_string()).collect();
        let (backbone, set) = ViT::init(&ViTConfig::preset("tiny").unwrap(), 4).unwrap().to_weights(&labels).unwrap();
        let bytes = write_backbone("b", &backbone, &Preprocess::default(), &Value::Null).unwrap();
        let backbone = read_backbone(&bytes).unwrap();
        let bytes = write_expert_set("s", &set, (&backbone.weights.config, backbone.digest), &Value::Null).unwrap();
        let set = read_expert_set(&bytes).unwrap();
        let vit = ViT::from_weights(&backbone.weights, &set.weights).unwrap().freeze(|_| true).unwrap();
        let float = Candle { vit, quantizers: Quantizers::NONE };
        let integer = Integer::new(&backbone, &set).unwrap();

        let dataset = Dataset {
            images: (0..70 * 192).map(|i: usize| (i.wrapping_mul(2_654_435_761) >> 9) as u8).collect(),
            side: 8,
            labels: vec![0; 70],
            class_names: labels,
        };
        let indices: Vec<u32> = (0..70).rev().collect();
        let answers = |model: &dyn Predictor, threads| {
            let (mut logits, mut experts, mut order) = (Vec::new(), Vec::new(), Vec::new());
            let mut take = |shard: &[u32], answer: Prediction| {
                order.extend_from_slice(shard);
                logits.extend(answer.logits);
                experts.extend(answer.experts[1].clone());
            };
            for_each_shard(model, &dataset, &indices, &backbone.preprocess, threads, &mut take).unwrap();
            assert_eq!(order, indices);
            (logits, experts)
        };
        let (exact, exact_experts) = answers(&float, 1);
        let (logits, experts) = answers(&integer, 1);
        assert_eq!(answers(&integer, 3), (logits.clone(), experts.clone()));
        let error: f32 = logits.iter().zip(&exact).map(|(a, b)| (a - b).powi(2)).sum();
        let norm: f32 = exact.iter().map(|v| v.powi(2)).sum();
        // Eight-bit activations are good for about a percent; a wrong layout would be off by all of it.
        assert!(error.sqrt() < 0.05 * norm.sqrt(), "relative error {}", (error / norm).sqrt());
        let same = experts.iter().zip(&exact_experts).filter(|(a, b)| a == b).count();
        assert!(same * 10 > experts.len() * 9, "{same} of {}", experts.len());
    }
}
