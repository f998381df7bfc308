//! The IDX files of the MNIST family: grey images, plain or gzipped.
//!
//! Big-endian header: `0 0 8 d` (8 = unsigned bytes, d dimensions), then d 32-bit sizes, then the bytes.

use std::fs::{self, File};
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use flate2::bufread::MultiGzDecoder;

use super::{Dataset, Opened, Part};
use crate::stop::Stop;

/// No file of this kind is larger; stops a small gzip file from filling the memory.
const MAX_BYTES: u64 = 4 << 30;

/// `{train,t10k}-{images,labels}` in the spellings that are about.
fn find(folder: &Path, part: Part, what: &str, dimensions: usize) -> Option<PathBuf> {
    let prefixes: &[&str] = match part {
        Part::Train => &["train"],
        Part::Test => &["t10k", "test"],
    };
    prefixes.iter().find_map(|prefix| {
        ["-", "."].iter().find_map(|dot| {
            ["", ".gz"].iter().find_map(|gz| {
                let path = folder.join(format!("{prefix}-{what}{dot}idx{dimensions}-ubyte{gz}"));
                path.is_file().then_some(path)
            })
        })
    })
}

pub(super) fn is_idx(folder: &Path) -> bool {
    find(folder, Part::Train, "images", 3).is_some() || find(folder, Part::Test, "images", 3).is_some()
}

pub(super) fn open(folder: &Path, part: Part, stop: &Stop) -> Result<Opened> {
    let file = |what, dimensions| {
        find(folder, part, what, dimensions).with_context(|| format!("no {what} file of the {part:?} part"))
    };
    let images_path = file("images", 3)?;
    let labels_path = file("labels", 1)?;
    let ([count, height, width], pixels) = read(&images_path, stop)?;
    let ([label_count], labels) = read(&labels_path, stop)?;
    ensure!(count == label_count, "{count} images, but {label_count} labels");
    ensure!(height == width && height > 0, "images of {height}x{width} are not square");

    let names_path = folder.join("class_names.txt");
    let class_names: Vec<String> = if names_path.is_file() {
        let text = fs::read_to_string(&names_path).context("class names class_names.txt")?;
        text.lines().map(str::trim).filter(|line| !line.is_empty()).map(str::to_owned).collect()
    } else {
        // The format carries no names. Both parts must agree on their number, so it is never below MNIST's ten.
        let highest = labels.iter().copied().max().unwrap_or(0);
        (0..=highest.max(9)).map(|label| label.to_string()).collect()
    };

    let mut dataset = Dataset { images: Vec::new(), side: height, labels: Vec::new(), class_names };
    let mut skipped = Vec::new();
    dataset.images.reserve(pixels.len() * 3);
    for (number, (image, &label)) in pixels.chunks_exact(height * width).zip(&labels).enumerate() {
        stop.check()?;
        if usize::from(label) >= dataset.class_names.len() {
            let classes = dataset.class_names.len();
            skipped.push(format!("image {number} has label {label}, but class_names.txt names {classes}"));
            continue;
        }
        dataset.labels.push(u16::from(label));
        dataset.images.extend(image.iter().flat_map(|&grey| [grey; 3]));
    }
    Ok(Opened { dataset, files: Vec::new(), skipped, warnings: Vec::new() })
}

/// Sizes and bytes of one file of `D` dimensions.
fn read<const D: usize>(path: &Path, stop: &Stop) -> Result<([usize; D], Vec<u8>)> {
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let reader = BufReader::new(File::open(path).with_context(|| name.clone())?);
    let mut reader: Box<dyn Read> =
        if name.ends_with(".gz") { Box::new(MultiGzDecoder::new(reader)) } else { Box::new(reader) };
    let mut word = || -> Result<[u8; 4]> {
        let mut word = [0; 4];
        reader.read_exact(&mut word).with_context(|| format!("{name}: header cut short"))?;
        Ok(word)
    };
    let magic = word()?;
    if magic[..3] != [0, 0, 8] || usize::from(magic[3]) != D {
        bail!("{name} does not start as an IDX file of bytes in {D} dimensions");
    }
    let mut sizes = [0; D];
    let mut expected = 1u64;
    for size in &mut sizes {
        let value = u32::from_be_bytes(word()?);
        *size = value as usize;
        expected = expected.saturating_mul(u64::from(value));
    }
    ensure!(expected <= MAX_BYTES, "{name} claims {expected} bytes");
    let mut bytes = Vec::new();
    // A piece at a time, with a look at the clock between two.
    const PIECE: u64 = 1 << 20;
    let mut reader = reader.take(expected + 1);
    while reader.by_ref().take(PIECE).read_to_end(&mut bytes).with_context(|| name.clone())? > 0 {
        stop.check()?;
    }
    let read = bytes.len() as u64;
    ensure!(
        read == expected,
        "{name} promises {expected} bytes, but holds {}",
        if read > expected { "more" } else { "fewer" }
    );
    Ok((sizes, bytes))
}

#[cfg(test)]
mod tests {
    use super::super::{LabelColumn, OpenOptions, open};
    use super::*;
    use std::io::Write;

    const OPTIONS: OpenOptions =
        OpenOptions { side: 2, labels: LabelColumn::Fine, strict: false, max_pixels: u64::MAX };

    fn idx(sizes: &[u32], bytes: &[u8]) -> Vec<u8> {
        let header = [0, 0, 8, sizes.len() as u8].into_iter().chain(sizes.iter().flat_map(|s| s.to_be_bytes()));
        header.chain(bytes.iter().copied()).collect()
    }

    #[test]
    fn reading_ends_when_it_is_to_stop() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("train-images-idx3-ubyte"), idx(&[1, 2, 2], &[1, 2, 3, 4])).unwrap();
        fs::write(folder.path().join("train-labels-idx1-ubyte"), idx(&[1], &[0])).unwrap();
        let late = Stop::after(Some(std::time::Duration::from_nanos(1)));
        let error = open(folder.path(), Part::Train, &OPTIONS, &late).unwrap_err();
        assert!(error.downcast_ref::<crate::stop::Stopped>().is_some(), "{error:#}");
    }

    #[test]
    fn plain_and_gzipped_files_become_grey_rgb() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("train-images-idx3-ubyte"), idx(&[2, 2, 2], &[1, 2, 3, 4, 5, 6, 7, 8])).unwrap();
        let labels = File::create(folder.path().join("train-labels-idx1-ubyte.gz")).unwrap();
        let mut gz = flate2::write::GzEncoder::new(labels, flate2::Compression::fast());
        gz.write_all(&idx(&[2], &[9, 0])).unwrap();
        gz.finish().unwrap();
        let dataset = open(folder.path(), Part::Train, &OPTIONS, &Stop::default()).unwrap().dataset;
        assert_eq!((dataset.side, dataset.labels.as_slice(), dataset.num_classes()), (2, &[9, 0][..], 10));
        assert_eq!(dataset.image(1), [5, 5, 5, 6, 6, 6, 7, 7, 7, 8, 8, 8]);
    }

    #[test]
    fn damaged_files_are_errors_that_name_the_file() {
        let good = idx(&[1, 2, 2], &[1, 2, 3, 4]);
        let mut other_kind = good.clone();
        other_kind[2] = 13;
        let cases = [
            ("fewer", good[..good.len() - 1].to_vec()),
            ("more", [&good[..], &[0]].concat()),
            ("does not start", other_kind),
            ("header cut short", good[..6].to_vec()),
            ("claims", idx(&[u32::MAX; 3], &[])),
            ("not square", idx(&[1, 2, 3], &[0; 6])),
            ("2 images, but 1 labels", idx(&[2, 2, 2], &[0; 8])),
        ];
        for (sentence, images) in cases {
            let folder = tempfile::tempdir().unwrap();
            fs::write(folder.path().join("train-images-idx3-ubyte"), images).unwrap();
            fs::write(folder.path().join("train-labels-idx1-ubyte"), idx(&[1], &[0])).unwrap();
            let error = format!("{:#}", open(folder.path(), Part::Train, &OPTIONS, &Stop::default()).unwrap_err());
            assert!(error.contains(sentence), "{sentence}: {error}");
        }
    }
}
