//! Distillation (arXiv 1503.02531): part of every target is what a finished model makes of the same pixels. A teacher
//! of the student's own kind and size works, too (arXiv 1805.04770).

use std::path::Path;

use anyhow::{Result, ensure};
use model_core::image::Preprocess;
use training::shards::in_turn;

use crate::data::Dataset;
use crate::predict::{Integer, Predictor};
use crate::recipe::Distillation;
use crate::store::{load_backbone, load_own_set};

/// A finished model, on the integer path.
#[derive(Debug)]
pub struct Teacher {
    model: Integer,
    preprocess: Preprocess,
    labels: Vec<String>,
    image_size: usize,
    backbone: String,
    set: String,
}

impl Teacher {
    /// Reads the teacher's artifacts.
    ///
    /// # Errors
    /// When a file is unusable or they do not belong together.
    pub fn load(backbone: &Path, set: &Path) -> Result<Self> {
        let backbone = load_backbone(backbone)?;
        let set = load_own_set(set, &backbone)?;
        Ok(Self {
            model: Integer::new(&backbone, &set)?,
            preprocess: backbone.preprocess.clone(),
            labels: set.weights.labels.clone(),
            image_size: backbone.weights.config.image_size,
            backbone: backbone.digest.to_string(),
            set: set.digest.to_string(),
        })
    }

    /// What a recipe remembers of learning `share` of every target from this teacher.
    pub fn distillation(&self, share: f64) -> Distillation {
        Distillation { share, backbone: self.backbone.clone(), set: self.set.clone() }
    }

    /// Whether it can teach on these images.
    ///
    /// # Errors
    /// When its classes or its image size are others.
    pub fn check(&self, dataset: &Dataset) -> Result<()> {
        ensure!(
            self.labels == dataset.class_names,
            "the teacher's {} labels are not the {} classes of the data",
            self.labels.len(),
            dataset.num_classes()
        );
        ensure!(
            self.image_size == dataset.side,
            "the teacher looks at images of side {}, the student at {}",
            self.image_size,
            dataset.side
        );
        Ok(())
    }

    /// `targets <- (1 - share) targets + share softmax(teacher)`, for `pixels [batch, side, side, 3]`, normalised
    /// as `normalized` says, and `targets [batch, classes]`. Each image's answer is its own, so that threads do
    /// not change the result.
    pub fn teach(
        &self,
        pixels: &[f32],
        normalized: &Preprocess,
        targets: &mut [f32],
        share: f64,
        threads: usize,
    ) -> Result<()> {
        let (classes, image) = (self.labels.len(), self.image_size.pow(2) * 3);
        let share = share as f32;
        /// Images that a thread asks about at once.
        const SHARD: usize = 32;
        let shards = pixels.chunks(SHARD * image).zip(targets.chunks_mut(SHARD * classes)).collect();
        in_turn(threads, shards, |(pixels, targets)| -> Result<()> {
            let answer = self.model.predict(self.renormalized(pixels, normalized), pixels.len() / image)?;
            for (target, logits) in targets.chunks_exact_mut(classes).zip(answer.logits.chunks_exact(classes)) {
                let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let sum: f32 = logits.iter().map(|logit| (logit - max).exp()).sum();
                for (target, logit) in target.iter_mut().zip(logits) {
                    *target = (1.0 - share) * *target + share * (logit - max).exp() / sum;
                }
            }
            Ok(())
        })
        .map(drop)
    }

    /// Pixels as the teacher wants them.
    fn renormalized(&self, pixels: &[f32], normalized: &Preprocess) -> Vec<f32> {
        let mut pixels = pixels.to_vec();
        let (from, to) = (normalized, &self.preprocess);
        if (from.mean, from.std) != (to.mean, to.std) {
            for pixel in pixels.chunks_exact_mut(3) {
                for (channel, value) in pixel.iter_mut().enumerate() {
                    *value = (*value * from.std[channel] + from.mean[channel] - to.mean[channel]) / to.std[channel];
                }
            }
        }
        pixels
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Store;
    use model_core::config::ViTConfig;
    use serde_json::Value;
    use training::vit::ViT;

    fn dataset() -> Dataset {
        Dataset {
            images: (0..70 * 192).map(|i: usize| (i.wrapping_mul(2_654_435_761) >> 9) as u8).collect(),
            side: 8,
            labels: vec![0; 70],
            class_names: (0..5).map(|class| class.to_string()).collect(),
        }
    }

    fn teacher() -> Teacher {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::new(folder.path());
        let model = ViT::init(&ViTConfig::preset("tiny").unwrap(), 4).unwrap();
        let (backbone, set) = model.to_weights(&dataset().class_names).unwrap();
        let (path, digest) = store.write_backbone("b", &backbone, &Preprocess::default(), &Value::Null).unwrap();
        let set = store.write_set("s", 1, &set, (&backbone.config, digest), &Value::Null).unwrap();
        Teacher::load(&path, &set).unwrap()
    }

    #[test]
    fn its_share_of_a_target_is_its_softmax() {
        let (teacher, dataset) = (teacher(), dataset());
        teacher.check(&dataset).unwrap();
        let pixels = teacher.preprocess.normalize(&dataset.images);
        let labels: Vec<f32> = (0..70 * 5).map(|i| if i % 5 == 2 { 1.0 } else { 0.0 }).collect();
        let taught = |share, threads| {
            let mut targets = labels.clone();
            teacher.teach(&pixels, &teacher.preprocess, &mut targets, share, threads).unwrap();
            targets
        };
        assert_eq!(taught(0.0, 1), labels);
        let answers = taught(1.0, 1);
        let logits = teacher.model.predict(pixels[..192].to_vec(), 1).unwrap().logits;
        let sum: f32 = logits.iter().map(|logit| logit.exp()).sum();
        for (answer, logit) in answers.iter().zip(&logits) {
            assert!((answer - logit.exp() / sum).abs() < 1e-5, "{answers:?} of {logits:?}");
        }
        let half = taught(0.5, 3);
        for ((half, label), answer) in half.iter().zip(&labels).zip(&answers) {
            assert!((half - 0.5 * label - 0.5 * answer).abs() < 1e-6);
        }
        for row in half.chunks_exact(5) {
            assert!((row.iter().sum::<f32>() - 1.0).abs() < 1e-5);
        }
        assert_eq!(taught(0.5, 1), half, "threads change nothing");

        let other = Preprocess { mean: [0.2, 0.5, 0.4], std: [0.1, 0.3, 1.0], ..Preprocess::default() };
        let mut targets = labels.clone();
        teacher.teach(&other.normalize(&dataset.images), &other, &mut targets, 1.0, 1).unwrap();
        let far = targets.iter().zip(&answers).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        // Rounding of the pixels may move an activation to the next of 255 codes.
        assert!(far < 0.02, "the teacher sees the same image however the student's are normalised: {far}");
    }

    #[test]
    fn other_classes_and_other_sizes_are_refused() {
        let teacher = teacher();
        let mut other = dataset();
        other.class_names[3] = "pear".into();
        assert!(teacher.check(&other).unwrap_err().to_string().contains("labels are not"));
        let large = Dataset { side: 16, images: vec![0; 16 * 16 * 3], labels: vec![0], ..dataset() };
        assert!(teacher.check(&large).unwrap_err().to_string().contains("side 8, the student at 16"));
    }
}
