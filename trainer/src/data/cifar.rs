//! The binary version of CIFAR-10 and CIFAR-100 (<https://www.cs.toronto.edu/~kriz/cifar.html>).
//!
//! A file is a sequence of records: the label bytes (CIFAR-10: one; CIFAR-100: coarse, then fine), then 1024 bytes
//! each of red, green and blue, row by row. Class names are lines of a text file beside it.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use model_core::artifact::read_file;

use super::{Dataset, LabelColumn, Opened, Part};
use crate::stop::Stop;

const SIDE: usize = 32;
const PLANE: usize = SIDE * SIDE;

pub(super) fn is_cifar100(folder: &Path) -> bool {
    folder.join("fine_label_names.txt").is_file() || folder.join("train.bin").is_file()
}

pub(super) fn is_cifar10(folder: &Path) -> bool {
    folder.join("batches.meta.txt").is_file() || folder.join("data_batch_1.bin").is_file()
}

pub(super) fn open_cifar100(folder: &Path, part: Part, labels: LabelColumn, stop: &Stop) -> Result<Opened> {
    let file = match part {
        Part::Train => "train.bin",
        Part::Test => "test.bin",
    };
    let (names, label_byte) = match labels {
        LabelColumn::Coarse => ("coarse_label_names.txt", 0),
        LabelColumn::Fine => ("fine_label_names.txt", 1),
    };
    read_records(folder, &[file.to_owned()], names, Record { label_bytes: 2, label_byte }, stop)
}

pub(super) fn open_cifar10(folder: &Path, part: Part, stop: &Stop) -> Result<Opened> {
    let files = match part {
        Part::Train => {
            let batches = (1..).map(|i| format!("data_batch_{i}.bin"));
            batches.take_while(|name| folder.join(name).is_file()).collect()
        }
        Part::Test => vec!["test_batch.bin".to_owned()],
    };
    ensure!(!files.is_empty(), "data_batch_1.bin is missing");
    read_records(folder, &files, "batches.meta.txt", Record { label_bytes: 1, label_byte: 0 }, stop)
}

/// Layout of the label bytes in front of the planes.
struct Record {
    label_bytes: usize,
    label_byte: usize,
}

fn read_records(folder: &Path, files: &[String], names: &str, record: Record, stop: &Stop) -> Result<Opened> {
    let names_text = fs::read_to_string(folder.join(names)).with_context(|| format!("class names {names}"))?;
    let class_names: Vec<String> =
        names_text.lines().map(str::trim).filter(|line| !line.is_empty()).map(str::to_owned).collect();
    ensure!(!class_names.is_empty(), "{names} names no class");

    let record_bytes = record.label_bytes + 3 * PLANE;
    let mut dataset = Dataset { images: Vec::new(), side: SIDE, labels: Vec::new(), class_names };
    let mut skipped = Vec::new();
    for file in files {
        let bytes = read_file(&folder.join(file)).with_context(|| format!("records {file}"))?;
        ensure!(
            bytes.len().is_multiple_of(record_bytes),
            "{file} has {} bytes, which is not a multiple of the {record_bytes} of one record: the file is truncated \
             or of another kind",
            bytes.len()
        );
        dataset.images.reserve(bytes.len());
        for (number, bytes) in bytes.chunks_exact(record_bytes).enumerate() {
            stop.check()?;
            let label = bytes[record.label_byte];
            if usize::from(label) >= dataset.class_names.len() {
                let classes = dataset.class_names.len();
                skipped.push(format!("record {number} of {file} has label {label}, but {names} names {classes}"));
                continue;
            }
            dataset.labels.push(u16::from(label));
            let (r, gb) = bytes[record.label_bytes..].split_at(PLANE);
            let (g, b) = gb.split_at(PLANE);
            for i in 0..PLANE {
                dataset.images.extend([r[i], g[i], b[i]]);
            }
        }
    }
    Ok(Opened { dataset, files: Vec::new(), skipped, warnings: Vec::new() })
}

#[cfg(test)]
mod tests {
    use super::super::{OpenOptions, open};
    use super::*;

    const OPTIONS: OpenOptions =
        OpenOptions { side: SIDE, labels: LabelColumn::Fine, strict: false, max_pixels: u64::MAX };

    /// A record whose red is `fill`, green `fill + 1`, blue `fill + 2` everywhere.
    fn record(labels: &[u8], fill: u8) -> Vec<u8> {
        let planes = (0..3).flat_map(|c| vec![fill + c; PLANE]);
        labels.iter().copied().chain(planes).collect()
    }

    fn cifar100(train: &[Vec<u8>]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("fine_label_names.txt"), "apple\nbear\ncup\n").unwrap();
        fs::write(folder.path().join("coarse_label_names.txt"), "food\nanimal\n").unwrap();
        fs::write(folder.path().join("train.bin"), train.concat()).unwrap();
        folder
    }

    #[test]
    fn cifar100_gives_channel_last_pixels_and_either_label() {
        let folder = cifar100(&[record(&[1, 2], 10), record(&[0, 0], 20)]);
        let fine = open(folder.path(), Part::Train, &OPTIONS, &Stop::default()).unwrap().dataset;
        assert_eq!(fine.labels, [2, 0]);
        assert_eq!(fine.image(0)[..6], [10, 11, 12, 10, 11, 12]);
        assert_eq!(fine.image(1)[3069..], [20, 21, 22]);
        let options = OpenOptions { labels: LabelColumn::Coarse, ..OPTIONS };
        let coarse = open(folder.path(), Part::Train, &options, &Stop::default()).unwrap().dataset;
        assert_eq!(coarse.labels, [1, 0]);
        assert_eq!(coarse.class_names, ["food", "animal"]);
    }

    #[test]
    fn cifar10_joins_its_batches() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("batches.meta.txt"), "plane\ncar\n\n").unwrap();
        fs::write(folder.path().join("data_batch_1.bin"), record(&[1], 1)).unwrap();
        fs::write(folder.path().join("data_batch_2.bin"), record(&[0], 2)).unwrap();
        fs::write(folder.path().join("test_batch.bin"), record(&[0], 3)).unwrap();
        let train = open(folder.path(), Part::Train, &OPTIONS, &Stop::default()).unwrap().dataset;
        assert_eq!((train.labels, train.class_names.len()), (vec![1, 0], 2));
        assert_eq!(open(folder.path(), Part::Test, &OPTIONS, &Stop::default()).unwrap().dataset.image(0)[0], 3);
    }

    #[test]
    fn a_label_out_of_range_is_skipped_or_refused() {
        let folder = cifar100(&[record(&[1, 2], 10), record(&[0, 3], 20)]);
        let opened = open(folder.path(), Part::Train, &OPTIONS, &Stop::default()).unwrap();
        assert_eq!((opened.dataset.len(), opened.skipped.len()), (1, 1));
        let strict = OpenOptions { strict: true, ..OPTIONS };
        let error = open(folder.path(), Part::Train, &strict, &Stop::default()).unwrap_err().to_string();
        assert!(error.contains("label 3") && error.contains("--strict"), "{error}");
    }

    #[test]
    fn reading_ends_when_it_is_to_stop() {
        let folder = cifar100(&[record(&[1, 2], 10)]);
        let late = Stop::after(Some(std::time::Duration::from_nanos(1)));
        let error = open(folder.path(), Part::Train, &OPTIONS, &late).unwrap_err();
        assert!(error.downcast_ref::<crate::stop::Stopped>().is_some(), "{error:#}");
    }

    #[test]
    fn damaged_files_are_named() {
        let folder = cifar100(&[record(&[1, 2], 10)[..3000].to_vec()]);
        let error = format!("{:#}", open(folder.path(), Part::Train, &OPTIONS, &Stop::default()).unwrap_err());
        assert!(error.contains("train.bin") && error.contains("truncated"), "{error}");
        let error = format!("{:#}", open(folder.path(), Part::Test, &OPTIONS, &Stop::default()).unwrap_err());
        assert!(error.contains("test.bin"), "{error}");
    }
}
