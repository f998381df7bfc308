//! The features of a folder's images.

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, ensure};
use model_core::engine::Session;
use model_core::image::DecodeLimits;
use sha2::{Digest as _, Sha256};

use super::images::{Images, repeated};
use super::progress::Progress;
use crate::fitting::features::{Extractor, MOST_FILE_BYTES, views_of};

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

/// Reads all images and runs them through the backbone, on so many threads.
///
/// # Errors
/// When an image has two labels. A file that cannot be read is left out with a sentence.
pub(super) fn extract(
    extractor: &Extractor,
    images: &Images,
    threads: usize,
    progress: &Progress,
) -> anyhow::Result<Found> {
    let count = images.files.len();
    let views = views_of(count);
    let next = AtomicUsize::new(0);
    let read: Mutex<Vec<Option<Read>>> = Mutex::new((0..count).map(|_| None).collect());
    let work = || {
        let mut session = extractor.session(views);
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            let Some((file, _)) = images.files.get(at) else { return };
            let features = features(extractor, file, &mut session).map_err(|error| format!("{error:#}"));
            read.lock().unwrap_or_else(PoisonError::into_inner)[at] = Some(features);
            progress.show("reading", (at + 1) as f64 / count as f64);
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..threads.min(count) {
            scope.spawn(work);
        }
        work();
    });
    let read = read.into_inner().unwrap_or_else(PoisonError::into_inner);
    let digests: Vec<_> = read.iter().map(|read| read.as_ref()?.as_ref().ok().map(|(_, digest)| *digest)).collect();
    let repeated = repeated(images, &digests)?;
    let mut found = Found {
        features: Vec::with_capacity(count * views * extractor.backbone().config().d_model),
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

/// Features of a file, and its digest.
fn features(extractor: &Extractor, file: &Path, session: &mut Session) -> anyhow::Result<(Vec<f32>, [u8; 32])> {
    let bytes = fs::metadata(file)?.len();
    ensure!(bytes <= MOST_FILE_BYTES, "it has {bytes} bytes; at most {MOST_FILE_BYTES} are read");
    let bytes = fs::read(file)?;
    let features = extractor.features(&bytes, &DecodeLimits::default(), session, &|| false)?;
    Ok((features, Sha256::digest(&bytes).into()))
}
