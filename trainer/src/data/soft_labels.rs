//! What another model makes of the images: a distribution over its own classes for each, read from a file. It is learned
//! by a head of its own.
//!
//! The file is safetensors with `probabilities` (f16 or f32, `[images, classes]`, rows that sum to one), `digests` (u8,
//! `[images, 32]`, SHA-256 of the bytes of each image's file), and in its metadata `labels`, a JSON list of the classes.

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use half::f16;
use model_core::artifact::{Digest, MAX_TEXT_BYTES, read_file};
use rayon::prelude::*;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};

/// Of every image the index of its row in a file of soft labels, and the file's rows.
#[derive(Debug, Clone, PartialEq)]
pub struct SoftLabels {
    /// What the classes are called.
    pub labels: Vec<String>,
    /// `[rows, classes]`, each row summing to one.
    probabilities: Vec<f32>,
    /// `[images]`, once the images are known.
    row_of: Vec<u32>,
}

const DIGEST_BYTES: usize = 32;

impl SoftLabels {
    /// Reads the soft labels of the images in `files`, and the digest of the file that they are in.
    ///
    /// # Errors
    /// A sentence that names what is wrong with the file, or the first image that it does not know.
    pub fn read(path: &Path, files: &[PathBuf]) -> Result<(Self, Digest)> {
        let read = || -> Result<(Self, Digest)> {
            let bytes = read_file(path)?;
            let (mut soft, rows) = Self::parse(&bytes)?;
            soft.find(&rows, files)?;
            Ok((soft, Digest::of("", &bytes)))
        };
        read().with_context(|| format!("reading the soft labels {}", path.display()))
    }

    /// The rows of a file, and which image each is of.
    fn parse(bytes: &[u8]) -> Result<(Self, HashMap<String, u32>)> {
        let whole = "it is no whole safetensors file";
        let (_, metadata) = SafeTensors::read_metadata(bytes).context(whole)?;
        let tensors = SafeTensors::deserialize(bytes).context(whole)?;
        let labels = metadata.metadata().as_ref().and_then(|metadata| metadata.get("labels"));
        let labels: Vec<String> = serde_json::from_str(labels.context("its metadata have no `labels`")?)
            .context("`labels` in its metadata is no JSON list of names")?;
        let distinct: BTreeSet<&String> = labels.iter().collect();
        ensure!(distinct.len() == labels.len(), "a class stands twice in its `labels`");
        let is_label =
            |label: &String| (1..=MAX_TEXT_BYTES).contains(&label.len()) && !label.chars().any(char::is_control);
        if let Some(class) = labels.iter().position(|label| !is_label(label)) {
            bail!(
                "the name of class {class} in its `labels` has not 1 to {MAX_TEXT_BYTES} bytes without control characters"
            );
        }
        let tensor = |name: &str| tensors.tensor(name).with_context(|| format!("it has no tensor `{name}`"));
        let (table, digests) = (tensor("probabilities")?, tensor("digests")?);
        let &[images, classes] = table.shape() else {
            bail!("`probabilities` has the shape {:?} in place of [images, classes]", table.shape())
        };
        ensure!(
            classes > 0 && classes == labels.len(),
            "{classes} classes in `probabilities`, {} `labels`",
            labels.len()
        );
        ensure!(
            digests.dtype() == Dtype::U8 && digests.shape() == [images, DIGEST_BYTES],
            "`digests` is {:?} of shape {:?} in place of U8 of shape [{images}, {DIGEST_BYTES}]",
            digests.dtype(),
            digests.shape()
        );
        let mut probabilities = numbers(&table)?;
        for (row, values) in probabilities.chunks_exact_mut(classes).enumerate() {
            normalise(values).with_context(|| format!("row {row} of `probabilities`"))?;
        }
        let mut rows = HashMap::new();
        for (row, digest) in (0u32..).zip(digests.data().chunks_exact(DIGEST_BYTES)) {
            let digest = digest.iter().map(|byte| format!("{byte:02x}")).collect();
            if let Some(first) = rows.insert(digest, row) {
                bail!("rows {first} and {row} are of the same image");
            }
        }
        Ok((Self { labels, probabilities, row_of: Vec::new() }, rows))
    }

    /// Finds the row of every image.
    fn find(&mut self, rows: &HashMap<String, u32>, files: &[PathBuf]) -> Result<()> {
        let digest = |path: &PathBuf| -> Result<Option<u32>> {
            let bytes = read_file(path).with_context(|| path.display().to_string())?;
            Ok(rows.get(&Digest::of("", &bytes).to_string()).copied())
        };
        let found = files.par_iter().map(digest).collect::<Result<Vec<_>>>()?;
        let missing = found.iter().filter(|row| row.is_none()).count();
        if let Some(first) = found.iter().position(Option::is_none) {
            let first = files[first].display();
            let all = files.len();
            if missing == all {
                bail!("they are of other images: of the {all} images of the data it knows none, {first} for example");
            }
            bail!("it knows {} of the {all} images of the data, but not {first}", all - missing);
        }
        self.row_of = found.into_iter().flatten().collect();
        Ok(())
    }

    pub fn classes(&self) -> usize {
        self.labels.len()
    }

    /// The distribution for an image, `[classes]`.
    ///
    /// # Panics
    /// When there is no such image.
    pub fn of(&self, image: u32) -> &[f32] {
        &self.probabilities[self.row_of[image as usize] as usize * self.classes()..][..self.classes()]
    }

    /// The most probable class of an image.
    ///
    /// # Panics
    /// When there is no such image.
    pub fn first(&self, image: u32) -> usize {
        let values = self.of(image);
        values.iter().enumerate().fold(0, |best, (i, v)| if *v > values[best] { i } else { best })
    }
}

/// How much of the loss they are.
#[derive(Debug, Clone, PartialEq)]
pub struct SoftTargets {
    pub labels: Arc<SoftLabels>,
    /// Above 0 and below 1.
    pub share: f32,
}

impl SoftTargets {
    /// Gives them their share of an image's target `row`, whose last classes are theirs. Of the image itself so much is left
    /// that was mixed with `partner`.
    pub fn enter(&self, row: &mut [f32], (image, left): (u32, f32), partner: u32) {
        let (hard, soft) = row.split_at_mut(row.len() - self.labels.classes());
        hard.iter_mut().for_each(|target| *target *= 1.0 - self.share);
        let distributions = self.labels.of(image).iter().zip(self.labels.of(partner));
        for (target, (own, partner)) in soft.iter_mut().zip(distributions) {
            *target = self.share * (left * own + (1.0 - left) * partner);
        }
    }
}

fn numbers(tensor: &TensorView<'_>) -> Result<Vec<f32>> {
    let data = tensor.data();
    Ok(match tensor.dtype() {
        Dtype::F16 => data.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
        Dtype::F32 => data.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
        other => bail!("`probabilities` is of type {other:?} in place of F16 or F32"),
    })
}

/// Refuses what is no distribution, and takes the rounding out of its sum.
fn normalise(values: &mut [f32]) -> Result<()> {
    /// Rounding of a thousand values to f16 moves the sum by less than 1e-3.
    const TOLERANCE: f32 = 5e-3;
    if let Some(class) = values.iter().position(|value| !value.is_finite() || *value < 0.0) {
        bail!("{} for class {class} is no probability", values[class]);
    }
    let sum: f32 = values.iter().sum();
    ensure!((sum - 1.0).abs() <= TOLERANCE, "the probabilities sum to {sum}, not to 1");
    values.iter_mut().for_each(|value| *value /= sum);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap as Map;
    use std::fs;

    struct File {
        dtype: Dtype,
        shape: Vec<usize>,
        probabilities: Vec<u8>,
        digests: Vec<u8>,
        labels: Option<String>,
    }

    fn f32s(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|value| value.to_le_bytes()).collect()
    }

    fn sha256(bytes: &[u8]) -> Vec<u8> {
        let hex = Digest::of("", bytes).to_string();
        (0..DIGEST_BYTES).map(|i| u8::from_str_radix(&hex[2 * i..][..2], 16).unwrap()).collect()
    }

    /// Of the two images `one` and `two`.
    fn file() -> File {
        File {
            dtype: Dtype::F32,
            shape: vec![2, 3],
            probabilities: f32s(&[0.5, 0.25, 0.25, 0.0, 0.1, 0.9]),
            digests: [sha256(b"one"), sha256(b"two")].concat(),
            labels: Some(r#"["ant", "bee", "cat"]"#.into()),
        }
    }

    fn bytes(file: &File) -> Vec<u8> {
        let rows = file.digests.len() / DIGEST_BYTES;
        let tensors = [
            ("probabilities", TensorView::new(file.dtype, file.shape.clone(), &file.probabilities).unwrap()),
            ("digests", TensorView::new(Dtype::U8, vec![rows, DIGEST_BYTES], &file.digests).unwrap()),
        ];
        let metadata = file.labels.clone().map(|labels| Map::from([("labels".to_owned(), labels)]));
        safetensors::serialize(tensors, metadata).unwrap()
    }

    /// The soft labels of images with those bytes.
    fn read(file: &[u8], images: &[&str]) -> Result<SoftLabels> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("soft.safetensors");
        fs::write(&path, file).unwrap();
        let write = |(i, image): (usize, &&str)| {
            let path = folder.path().join(format!("{i}.png"));
            fs::write(&path, image).unwrap();
            path
        };
        let images: Vec<PathBuf> = images.iter().enumerate().map(write).collect();
        SoftLabels::read(&path, &images).map(|(soft, digest)| {
            assert_eq!(digest, Digest::of("", file));
            soft
        })
    }

    #[test]
    fn images_are_found_by_their_bytes() {
        let soft = read(&bytes(&file()), &["two", "one", "two"]).unwrap();
        assert_eq!(soft.labels, ["ant", "bee", "cat"]);
        assert_eq!((soft.of(1), soft.first(1)), (&[0.5, 0.25, 0.25][..], 0));
        assert_eq!(soft.first(0), 2);
        assert_eq!(soft.of(0), soft.of(2));
        let half = [0.5f32, 0.25, 0.25, 0.0, 0.1, 0.9].map(|value| f16::from_f32(value).to_le_bytes()).concat();
        let half = read(&bytes(&File { dtype: Dtype::F16, probabilities: half, ..file() }), &["two"]).unwrap();
        assert!((half.of(0)[2] - 0.9).abs() < 1e-3 && (half.of(0).iter().sum::<f32>() - 1.0).abs() < 1e-6);
    }

    #[test]
    fn they_have_their_share_of_a_mixed_target() {
        let labels = Arc::new(read(&bytes(&file()), &["one", "two"]).unwrap());
        let soft = SoftTargets { labels, share: 0.25 };
        // Two classes of the data set, then ant, bee and cat.
        let mut row = [0.75, 0.25, 0.0, 0.0, 0.0];
        soft.enter(&mut row, (0, 0.5), 1);
        let of_both = [0.25 * 0.5 * 0.5, 0.25 * 0.5 * (0.25 + 0.1), 0.25 * 0.5 * (0.25 + 0.9)];
        for (target, expected) in row.iter().zip([0.75 * 0.75, 0.75 * 0.25].into_iter().chain(of_both)) {
            assert!((target - expected).abs() < 1e-6, "{row:?}");
        }
        assert!((row.iter().sum::<f32>() - 1.0).abs() < 1e-6, "{row:?}");
    }

    #[test]
    fn each_bad_file_has_its_sentence() {
        let with = |values: [f32; 3]| {
            let probabilities = f32s(&[[0.5, 0.25, 0.25], values].concat());
            bytes(&File { probabilities, ..file() })
        };
        let good = bytes(&file());
        let mut claims = good.clone();
        // A header that claims to be longer than any memory.
        claims[..8].copy_from_slice(&(1u64 << 50).to_le_bytes());
        let flat = File { shape: vec![6], ..file() };
        let wide = File { shape: vec![3, 2], ..file() };
        let whole = File { dtype: Dtype::I32, ..file() };
        let unnamed = File { labels: None, ..file() };
        let odd = File { labels: Some("ant".into()), ..file() };
        let double = File { labels: Some(r#"["ant", "ant", "cat"]"#.into()), ..file() };
        let nameless = File { labels: Some(r#"["ant", "", "cat"]"#.into()), ..file() };
        let same = File { digests: sha256(b"one").repeat(2), ..file() };
        let short = File { digests: sha256(b"one"), ..file() };
        let metadata = Map::from([("labels".to_owned(), "[]".to_owned())]);
        let empty = safetensors::serialize(Vec::<(&str, TensorView<'_>)>::new(), Some(metadata)).unwrap();
        for (file, said) in [
            (with([0.1, f32::NAN, 0.9]), "row 1 of `probabilities`: NaN for class 1 is no probability"),
            (with([0.2, 0.9, -0.1]), "-0.1 for class 2 is no probability"),
            (with([0.2, f32::INFINITY, 0.0]), "inf for class 1 is no probability"),
            (with([0.2, 0.2, 0.2]), "the probabilities sum to 0.6"),
            (good[..good.len() - 1].into(), "it is no whole safetensors file"),
            (good[..20].into(), "it is no whole safetensors file"),
            (claims, "it is no whole safetensors file"),
            (Vec::new(), "it is no whole safetensors file"),
            (bytes(&flat), "`probabilities` has the shape [6] in place of [images, classes]"),
            (bytes(&wide), "2 classes in `probabilities`, 3 `labels`"),
            (bytes(&whole), "is of type I32 in place of F16 or F32"),
            (bytes(&unnamed), "its metadata have no `labels`"),
            (bytes(&odd), "is no JSON list of names"),
            (bytes(&double), "a class stands twice"),
            (bytes(&nameless), "the name of class 1 in its `labels` has not 1 to 255 bytes"),
            (bytes(&same), "rows 0 and 1 are of the same image"),
            (bytes(&short), "of shape [1, 32] in place of U8 of shape [2, 32]"),
            (empty, "it has no tensor `probabilities`"),
        ] {
            let error = format!("{:#}", read(&file, &["one"]).unwrap_err());
            assert!(error.contains(said) && error.contains("soft.safetensors"), "{error}\n{said}");
        }
        let error = format!("{:#}", read(&good, &["one", "three"]).unwrap_err());
        assert!(
            error.contains("it knows 1 of the 2 images of the data, but not") && error.contains("1.png"),
            "{error}"
        );
        let error = format!("{:#}", read(&good, &["four", "three"]).unwrap_err());
        assert!(error.contains("they are of other images: of the 2 images of the data it knows none"), "{error}");
    }
}
