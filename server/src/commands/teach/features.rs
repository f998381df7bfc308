//! What the backbone makes of images: features, by the integer engine that serves.

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Context;
use model_core::artifact::Digest;
use model_core::config::ExpertConfig;
use model_core::engine::{Backbone, ExpertSet, Row, Session};
use model_core::image::{Crop, DecodeLimits, Sight, View, decode_picture};
use model_core::weights::{ExpertSetWeights, Linear};
use sha2::{Digest as _, Sha256};

use super::images::{Images, repeated};
use super::place::Source;
use super::progress::Progress;

/// Bytes of a file at most, as everywhere.
const MOST_FILE_BYTES: u64 = 256 << 20;
/// Up to so many images, each is looked at in so many ways.
const VIEWS: [(usize, usize); 2] = [(1000, 4), (4000, 2)];
/// Share of the sides of what is seen that a cropped view sees.
const CROPPED: f64 = 0.9;

/// Runs a backbone over images.
pub(super) struct Extractor {
    backbone: Arc<Backbone>,
    set: ExpertSet,
    view: View,
    threads: usize,
}

/// Features of the images that could be read.
pub(super) struct Found {
    /// Rows of all images, `[images, views, d_model]`.
    pub(super) features: Vec<f32>,
    pub(super) views: usize,
    pub(super) labels: Vec<usize>,
    pub(super) classes: Vec<String>,
    /// Paths of the images.
    pub(super) files: Vec<String>,
    /// A sentence for each file that is not among them.
    pub(super) left_out: Vec<String>,
}

/// A file's features and digest, or why there are none.
type Read = Result<(Vec<f32>, [u8; 32]), String>;

impl Extractor {
    /// # Errors
    /// When the backbone needs experts.
    pub(super) fn new(source: &Source, view: View, threads: usize) -> anyhow::Result<Self> {
        let backbone = Arc::clone(&source.backbone);
        let d_model = backbone.config().d_model;
        // Features come out before the head, whatever that is.
        let weights = ExpertSetWeights {
            config: ExpertConfig::NONE,
            layers: Vec::new(),
            head: Linear { weight: vec![0.0; d_model].into(), bias: vec![0.0] },
            labels: vec!["none".to_owned()],
            temperature: 1.0,
            familiarity: None,
        };
        let set = ExpertSet::from_weights("features".to_owned(), weights, Digest::of("", &[]), &backbone)?;
        Ok(Self { backbone, set, view, threads: threads.max(1) })
    }

    /// Reads all images and runs them through the backbone.
    ///
    /// # Errors
    /// When an image has two labels. A file that cannot be read is left out with a sentence.
    pub(super) fn extract(&self, images: &Images, progress: &Progress) -> anyhow::Result<Found> {
        let count = images.files.len();
        let views = VIEWS.iter().find(|(most, _)| count <= *most).map_or(1, |(_, views)| *views);
        let next = AtomicUsize::new(0);
        let read: Mutex<Vec<Option<Read>>> = Mutex::new((0..count).map(|_| None).collect());
        let work = || {
            let mut session = Session::new(&self.backbone, views, 1);
            loop {
                let at = next.fetch_add(1, Ordering::Relaxed);
                let Some((file, _)) = images.files.get(at) else { return };
                let features = self.features(file, &mut session, views).map_err(|error| format!("{error:#}"));
                read.lock().unwrap_or_else(PoisonError::into_inner)[at] = Some(features);
                progress.show("reading", (at + 1) as f64 / count as f64);
            }
        };
        std::thread::scope(|scope| {
            for _ in 1..self.threads.min(count) {
                scope.spawn(work);
            }
            work();
        });
        let read = read.into_inner().unwrap_or_else(PoisonError::into_inner);
        let digests: Vec<_> = read.iter().map(|read| read.as_ref()?.as_ref().ok().map(|(_, digest)| *digest)).collect();
        let repeated = repeated(images, &digests)?;
        let mut found = Found {
            features: Vec::with_capacity(count * views * self.backbone.config().d_model),
            views,
            labels: Vec::new(),
            classes: images.classes.clone(),
            files: Vec::new(),
            left_out: images.passed_over.clone(),
        };
        for (((file, class), read), repeated) in images.files.iter().zip(read).zip(repeated) {
            let file = file.display().to_string();
            match read.context("every file is read")? {
                Err(reason) => found.left_out.push(format!("{file}: {reason}")),
                Ok(_) if repeated => {
                    found.left_out.push(format!("{file}: the very same image is in its class already"));
                }
                Ok((features, _)) => {
                    found.features.extend(features);
                    found.labels.push(*class);
                    found.files.push(file);
                }
            }
        }
        Ok(found)
    }

    /// Features `[views, d_model]` of a file, and its digest.
    fn features(&self, file: &Path, session: &mut Session, views: usize) -> anyhow::Result<(Vec<f32>, [u8; 32])> {
        let bytes = fs::metadata(file)?.len();
        anyhow::ensure!(bytes <= MOST_FILE_BYTES, "it has {bytes} bytes; at most {MOST_FILE_BYTES} are read");
        let bytes = fs::read(file)?;
        let picture = decode_picture(&bytes, &DecodeLimits::default(), &|| false)?;
        let (preprocess, side) = (self.backbone.preprocess(), self.backbone.config().image_size);
        let Sight { samples: plain, seen, is_flat } =
            preprocess.see(&picture, (Crop::Shares(self.view.crop), self.view.fit), side)?;
        anyhow::ensure!(!is_flat, "it shows nothing, and such pictures are called unknown before any set is asked");
        let mut inputs = vec![preprocess.normalize(&plain)];
        if views > 1 {
            inputs.push(preprocess.normalize(&mirrored(&plain, side)));
        }
        // Opposite corners of what is seen; one of the two mirrored.
        for view in 2..views {
            let [x, y, w, h] = seen.crop;
            let corner = (1.0 - CROPPED) * (view % 2) as f64;
            let crop = [x + corner * w, y + corner * h, CROPPED * w, CROPPED * h];
            let cropped = preprocess.see(&picture, (Crop::Shares(crop), self.view.fit), side)?.samples;
            let cropped = if view % 2 == 1 { mirrored(&cropped, side) } else { cropped };
            inputs.push(preprocess.normalize(&cropped));
        }
        let mut features = vec![0.0; views * self.backbone.config().d_model];
        let mut logits = vec![0.0; views];
        let outputs = features.chunks_exact_mut(self.backbone.config().d_model).zip(logits.chunks_exact_mut(1));
        let rows = inputs.iter().zip(outputs).map(|(pixels, (features, logits))| Row {
            set: &self.set,
            pixels,
            logits,
            routing: None,
            features: Some(features),
        });
        session.forward(&mut rows.collect::<Vec<_>>())?;
        Ok((features, Sha256::digest(&bytes).into()))
    }
}

/// RGB8 `[side, side, 3]` with left and right exchanged.
fn mirrored(samples: &[u8], side: usize) -> Vec<u8> {
    let rows = samples.chunks_exact(3 * side.max(1));
    rows.flat_map(|row| row.chunks_exact(3).rev().flatten().copied()).collect()
}
