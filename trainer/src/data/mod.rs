//! Image sets held in memory as bytes, and the way from them to training batches.
//!
//! [`open`] recognises a folder by its files: CIFAR binaries ([`cifar`]), IDX ([`idx`]) or one subfolder of images per
//! class ([`folder`]). Everything is read at the start, so a folder that changes under a run cannot change the run; a
//! resumed run compares [`Dataset::fingerprint`].
//!
//! [`heads`] puts several data sets side by side, [`soft_labels`] adds what another model makes of the images.
//!
//! From there: [`split`] holds out a validation part, [`augment`] varies images, [`loader`] makes batches of them on a
//! thread of its own. Every random choice is a pure function of (seed, epoch, image or batch number), so there is no
//! generator state to save, and a resumed run sees exactly the images it would have seen.

pub mod augment;
pub mod cifar;
pub mod folder;
pub mod frozen_stem;
pub mod heads;
pub mod idx;
pub mod loader;
pub mod random;
pub mod sample;
pub mod soft_labels;
pub mod split;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use model_core::image::{Preprocess, RgbImage};
use rayon::prelude::*;

use crate::stop::Stop;

/// Labelled RGB images of one size.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dataset {
    /// `[n, side, side, 3]`, channel-last.
    pub images: Vec<u8>,
    /// Height and width in pixels.
    pub side: usize,
    /// `[n]`, each an index into `class_names`.
    pub labels: Vec<u16>,
    /// What the labels stand for.
    pub class_names: Vec<String>,
}

impl Dataset {
    pub fn len(&self) -> usize {
        self.labels.len()
    }

    /// Whether there is no image at all.
    pub fn is_empty(&self) -> bool {
        self.labels.is_empty()
    }

    pub fn num_classes(&self) -> usize {
        self.class_names.len()
    }

    /// Images of every class.
    pub fn class_counts(&self) -> Vec<usize> {
        let mut counts = vec![0; self.num_classes()];
        self.labels.iter().for_each(|&label| counts[usize::from(label)] += 1);
        counts
    }

    /// Bytes of one image.
    pub fn image_bytes(&self) -> usize {
        self.side * self.side * 3
    }

    /// Pixels of image `index`, `[side, side, 3]`.
    ///
    /// # Panics
    /// When `index` is not below [`Dataset::len`].
    pub fn image(&self, index: usize) -> &[u8] {
        &self.images[index * self.image_bytes()..][..self.image_bytes()]
    }

    /// The preprocessing that centres and scales every channel over all images.
    pub fn preprocess(&self) -> Preprocess {
        let (mut sum, mut squares) = ([0u64; 3], [0u64; 3]);
        for pixel in self.images.chunks_exact(3) {
            for c in 0..3 {
                sum[c] += u64::from(pixel[c]);
                squares[c] += u64::from(pixel[c]).pow(2);
            }
        }
        let count = (self.images.len() / 3).max(1) as f64;
        let mean = sum.map(|s| s as f64 / count);
        let std = std::array::from_fn(|c| (squares[c] as f64 / count - mean[c] * mean[c]).max(0.0).sqrt() / 255.0);
        Preprocess {
            mean: mean.map(|m| (m / 255.0) as f32),
            // A channel that never varies carries nothing; dividing by one keeps it finite.
            std: std.map(|s| if s > 1e-3 { s as f32 } else { 1.0 }),
            ..Preprocess::default()
        }
    }

    /// Every image cropped and resized to `side`, as the server does with what it is sent.
    ///
    /// # Errors
    /// When `stop` says so.
    pub fn fit(mut self, side: usize, stop: &Stop) -> Result<Self> {
        if self.side != side {
            let (preprocess, from) = (Preprocess::default(), self.side as u32);
            let fit = |image: &[u8]| {
                stop.check()?;
                let image = RgbImage::from_raw(from, from, image.to_vec()).expect("an image has side * side * 3 bytes");
                Ok(preprocess.fit(&image, side))
            };
            let fitted = self.images.par_chunks_exact(self.image_bytes()).map(fit).collect::<Result<Vec<_>>>()?;
            self.images = fitted.concat();
            self.side = side;
        }
        Ok(self)
    }

    /// Gives every class the number that it has among `labels`, which become the class names. There may be more of them.
    ///
    /// # Errors
    /// When a class is none of `labels`, or several of them have its name.
    pub fn take_labels(&mut self, labels: &[String]) -> Result<()> {
        if self.class_names == labels {
            return Ok(());
        }
        let mut numbers: HashMap<&str, Vec<u16>> = HashMap::new();
        for (number, label) in (0..=u16::MAX).zip(labels) {
            numbers.entry(label).or_default().push(number);
        }
        let named = |name: &String| numbers.get(name.as_str()).map_or(&[][..], Vec::as_slice);
        let unknown: Vec<&String> = self.class_names.iter().filter(|name| named(name).is_empty()).collect();
        ensure!(
            unknown.is_empty(),
            "{} of the {} classes are no labels: {}; the labels are {}",
            unknown.len(),
            self.num_classes(),
            listed(&unknown),
            listed(labels)
        );
        let several = self.class_names.iter().find(|name| named(name).len() > 1);
        if let Some(name) = several {
            bail!("the class {name} may be either of {} labels of that name", named(name).len());
        }
        let own: Vec<u16> = self.class_names.iter().map(|name| named(name)[0]).collect();
        self.labels.iter_mut().for_each(|label| *label = own[usize::from(*label)]);
        self.class_names = labels.to_vec();
        Ok(())
    }

    /// A number that changes when any pixel, label or name does (64-bit FNV-1a over words).
    pub fn fingerprint(&self) -> u64 {
        let mut hash = 0xcbf2_9ce4_8422_2325_u64;
        let mut mix = |word: u64| hash = (hash ^ word).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(23);
        for chunk in self.images.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            mix(u64::from_le_bytes(word));
        }
        self.labels.iter().for_each(|&label| mix(u64::from(label)));
        for name in &self.class_names {
            name.bytes().for_each(|byte| mix(u64::from(byte)));
            mix(u64::MAX);
        }
        mix(self.side as u64);
        hash
    }
}

/// Some names, as a sentence has them.
fn listed(names: &[impl AsRef<str>]) -> String {
    const SHOWN: usize = 8;
    let shown: Vec<&str> = names.iter().take(SHOWN).map(AsRef::as_ref).collect();
    let more = names.len().saturating_sub(SHOWN);
    if more > 0 { format!("{} and {more} more", shown.join(", ")) } else { shown.join(", ") }
}

/// Which part of a data folder is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// Learnt from; a held-out share of it makes every choice.
    Train,
    /// Measured once at the end.
    Test,
}

/// Which of CIFAR-100's two label columns to read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LabelColumn {
    /// 100 classes.
    #[default]
    Fine,
    /// 20 superclasses.
    Coarse,
}

/// How to read a data folder.
#[derive(Debug, Clone, Copy)]
pub struct OpenOptions {
    /// Side of the images wanted; others are cropped and resized.
    pub side: usize,
    /// For CIFAR-100 only.
    pub labels: LabelColumn,
    /// Refuse what would otherwise be counted and skipped.
    pub strict: bool,
    /// Most pixels of an image in a folder of images; larger ones are skipped.
    pub max_pixels: u64,
}

/// A data set and what was wrong with its files.
#[derive(Debug)]
pub struct Opened {
    pub dataset: Dataset,
    /// The file of every image; empty where images have none of their own.
    pub files: Vec<PathBuf>,
    /// One sentence for each image left out.
    pub skipped: Vec<String>,
    /// Things worth a sentence that left nothing out.
    pub warnings: Vec<String>,
}

/// Reads one part of the data folder `folder`, whatever its format.
///
/// # Errors
/// When the folder holds no known format, a file is damaged as a whole, nothing is left, or (with
/// [`OpenOptions::strict`]) a single image had to be left out; and [`crate::stop::Stopped`] when `stop` says so.
pub fn open(folder: &Path, part: Part, options: &OpenOptions, stop: &Stop) -> Result<Opened> {
    ensure!(folder.is_dir(), "{} is not a folder", folder.display());
    // Of its own, because the global pool is kept to one thread: see `main`.
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    rayon::ThreadPoolBuilder::new().num_threads(cores).build()?.install(|| read(folder, part, options, stop))
}

/// Whether the images in `folder` have labels of both [`LabelColumn`]s.
pub fn has_columns(folder: &Path) -> bool {
    cifar::is_cifar100(folder)
}

fn read(folder: &Path, part: Part, options: &OpenOptions, stop: &Stop) -> Result<Opened> {
    let mut opened = if cifar::is_cifar100(folder) {
        cifar::open_cifar100(folder, part, options.labels, stop)
    } else if cifar::is_cifar10(folder) {
        cifar::open_cifar10(folder, part, stop)
    } else if idx::is_idx(folder) {
        idx::open(folder, part, stop)
    } else if folder::is_folder(folder) {
        folder::open(folder, part, options, stop)
    } else {
        bail!(
            "{}: no known data set: looked for train.bin (CIFAR-100), data_batch_1.bin (CIFAR-10), \
             train-images-idx3-ubyte (IDX) and subfolders of images, one per class",
            folder.display()
        )
    }
    .with_context(|| format!("reading the data set in {}", folder.display()))?;
    if let (true, Some(first)) = (options.strict, opened.skipped.first()) {
        bail!("{} files are no usable images, refused because of --strict; the first: {first}", opened.skipped.len());
    }
    ensure!(!opened.dataset.is_empty(), "{} holds no usable image", folder.display());
    for (class, count) in opened.dataset.class_counts().into_iter().enumerate().filter(|(_, count)| *count <= 1) {
        let name = &opened.dataset.class_names[class];
        opened.warnings.push(match count {
            0 => format!("class {name} has no image"),
            _ => format!("class {name} has a single image: it is learnt from and cannot be held out"),
        });
    }
    if let [only] = opened.dataset.class_names.as_slice() {
        opened.warnings.push(format!("the data set has one class, {only}: there is nothing to tell apart"));
    }
    opened.dataset = opened.dataset.fit(options.side, stop)?;
    Ok(opened)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two 1x1 images, one black and one (255, 0, 51).
    fn two_pixels() -> Dataset {
        Dataset {
            images: vec![0, 0, 0, 255, 0, 51],
            side: 1,
            labels: vec![0, 1],
            class_names: vec!["a".into(), "b".into()],
        }
    }

    #[test]
    fn preprocessing_centres_and_scales_each_channel() {
        let norm = two_pixels().preprocess();
        assert_eq!(norm.mean, [0.5, 0.0, 0.1]);
        assert_eq!(norm.std, [0.5, 1.0, 0.1]);
        let out = norm.normalize(&[255, 0, 51]);
        assert!(out.iter().zip([1.0, 0.0, 1.0]).all(|(a, b)| (a - b).abs() < 1e-6), "{out:?}");
    }

    #[test]
    fn fingerprint_sees_pixels_labels_and_names() {
        let original = two_pixels();
        let edits: [fn(&mut Dataset); 3] =
            [|d| d.images[5] ^= 1, |d| d.labels.swap(0, 1), |d| d.class_names[1] = "c".into()];
        for edit in edits {
            let mut other = original.clone();
            edit(&mut other);
            assert_ne!(other.fingerprint(), original.fingerprint());
        }
    }

    #[test]
    fn unknown_folders_say_what_was_looked_for() {
        let folder = tempfile::tempdir().unwrap();
        let options = OpenOptions { side: 32, labels: LabelColumn::Fine, strict: false, max_pixels: u64::MAX };
        let error = open(folder.path(), Part::Train, &options, &Stop::default()).unwrap_err().to_string();
        assert!(error.contains("train.bin"), "{error}");
        let error = open(&folder.path().join("none"), Part::Train, &options, &Stop::default()).unwrap_err().to_string();
        assert!(error.contains("not a folder"), "{error}");
    }

    #[test]
    fn fitting_keeps_grey_grey_and_scales() {
        let grey = Dataset { images: vec![90; 28 * 28 * 3], side: 28, labels: vec![0], class_names: vec!["a".into()] };
        let fitted = grey.clone().fit(32, &Stop::default()).unwrap();
        assert_eq!((fitted.side, fitted.images), (32, vec![90; 32 * 32 * 3]));
        assert_eq!(grey.clone().fit(28, &Stop::default()).unwrap(), grey);
    }

    #[test]
    fn labels_are_found_by_name() {
        let names = |names: &[&str]| -> Vec<String> { names.iter().map(|&name| name.to_owned()).collect() };
        let given = |labels: &[&str]| {
            let mut dataset = two_pixels();
            dataset.take_labels(&names(labels)).map(|()| dataset)
        };
        assert_eq!(given(&["a", "b"]).unwrap(), two_pixels());
        let turned = given(&["c", "b", "a"]).unwrap();
        assert_eq!((turned.labels, turned.class_names), (vec![2, 1], names(&["c", "b", "a"])));
        let refused = |labels: &[&str]| given(labels).unwrap_err().to_string();
        assert_eq!(refused(&["a", "c"]), "1 of the 2 classes are no labels: b; the labels are a, c");
        assert_eq!(refused(&["b", "a", "b"]), "the class b may be either of 2 labels of that name");
        assert!(refused(&["x"; 10]).ends_with("x, x and 2 more"));
    }
}
