//! One subfolder of images per class, as [`ImageFolder`] lists it: below `train` and `test`, or directly. Images go through
//! the decoder and the resizing that the server uses. What a file is called does not say what it is: the content does.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};

use anyhow::{Result, bail, ensure};
use model_core::image::{DecodeLimits, FileError, ImageFolder, Preprocess, read_image};
use rayon::prelude::*;

use super::{Dataset, OpenOptions, Opened, Part};
use crate::stop::{Stop, Stopped};

pub(super) fn is_folder(folder: &Path) -> bool {
    let visible = |entry: std::fs::DirEntry| !entry.file_name().as_encoded_bytes().starts_with(b".");
    folder.read_dir().is_ok_and(|entries| entries.flatten().any(|entry| entry.path().is_dir() && visible(entry)))
}

pub(super) fn open(folder: &Path, part: Part, options: &OpenOptions, stop: &Stop) -> Result<Opened> {
    let part = match part {
        Part::Train => "train",
        Part::Test => "test",
    };
    let ImageFolder { classes, passed_over: mut skipped } = ImageFolder::list(folder, part)?;
    ensure!(classes.len() <= usize::from(u16::MAX), "{} classes are too many", classes.len());
    let side = options.side;
    let limits = DecodeLimits { max_pixels: options.max_pixels, ..DecodeLimits::default() };
    let limits = limits.for_input(&Preprocess::default(), side);
    let mut dataset = Dataset { images: Vec::new(), side, labels: Vec::new(), class_names: Vec::new() };
    let (mut files, mut warnings, mut seen) = (Vec::new(), Vec::new(), HashMap::new());
    for (label, class) in (0u16..).zip(&classes) {
        let before = dataset.labels.len();
        let images = decode_all(&class.files, side, &limits, stop)?;
        for (path, image) in class.files.iter().zip(images) {
            match image {
                Ok(image) => {
                    if let Some(other) = seen.insert(content_hash(&image), label).filter(|other| *other != label) {
                        let other = &classes[usize::from(other)].name;
                        warnings.push(format!("{} looks exactly like an image of class {other}", path.display()));
                    }
                    dataset.images.extend(image);
                    dataset.labels.push(label);
                    files.push(path.clone());
                }
                Err(reason) => skipped.push(format!("{}: {reason}", path.display())),
            }
        }
        if dataset.labels.len() == before {
            let reason = skipped.last().map(|last| format!("; the last one: {last}")).unwrap_or_default();
            bail!("class {} has no usable image{reason}", class.name);
        }
        dataset.class_names.push(class.name.clone());
    }
    Ok(Opened { dataset, files, skipped, warnings })
}

/// The `[side, side, 3]` bytes of a file, or why there are none.
type Decoded = Result<Vec<u8>, FileError>;

/// What is in every file.
fn decode_all(
    files: &[PathBuf],
    side: usize,
    limits: &DecodeLimits,
    stop: &Stop,
) -> std::result::Result<Vec<Decoded>, Stopped> {
    let preprocess = Preprocess::default();
    let decoded = files.par_iter().map(|path| {
        stop.check()?;
        Ok(read_image(path, limits).map(|image| preprocess.fit(&image, side)))
    });
    decoded.collect()
}

fn content_hash(image: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    image.hash(&mut hasher);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::super::{LabelColumn, open};
    use super::*;
    use std::ffi::OsString;
    use std::fs;
    use std::os::unix::ffi::OsStringExt;

    const OPTIONS: OpenOptions = OpenOptions { side: 2, labels: LabelColumn::Fine, strict: false, max_pixels: 1 << 20 };

    /// A 2x2 bitmap of one colour.
    fn bmp(rgb: [u8; 3]) -> Vec<u8> {
        let [r, g, b] = rgb;
        let row = [b, g, r, b, g, r, 0, 0];
        let header = [&b"BM"[..], &70u32.to_le_bytes(), &[0; 4], &54u32.to_le_bytes()].concat();
        let info = [40u32, 2, 2].iter().flat_map(|v| v.to_le_bytes()).chain([1, 0, 24, 0]).chain([0; 24]);
        header.into_iter().chain(info).chain(row).chain(row).collect()
    }

    fn folder(files: &[(&str, &[u8])]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (path, bytes) in files {
            let path = folder.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, bytes).unwrap();
        }
        folder
    }

    #[test]
    fn classes_are_the_sorted_subfolders() {
        let (red, blue) = (bmp([255, 0, 0]), bmp([0, 0, 255]));
        let folder = folder(&[("dog/1.BMP", &red), ("cat/a.bmp", &blue), (".x/y.bmp", &red)]);
        let opened = open(folder.path(), Part::Train, &OPTIONS, &Stop::default()).unwrap();
        assert_eq!(opened.dataset.class_names, ["cat", "dog"]);
        assert_eq!(opened.dataset.labels, [0, 1]);
        assert_eq!(opened.dataset.image(1), [255, 0, 0].repeat(4));
        assert!(opened.warnings.iter().all(|w| w.contains("a single image")), "{:?}", opened.warnings);
        assert_eq!(opened.warnings.len(), 2);
    }

    #[test]
    fn train_and_test_subfolders_are_the_parts() {
        let folder = folder(&[("train/a/1.bmp", &bmp([1; 3])), ("test/a/1.bmp", &bmp([2; 3]))]);
        let first = |part| open(folder.path(), part, &OPTIONS, &Stop::default()).unwrap().dataset.images[0];
        assert_eq!((first(Part::Train), first(Part::Test)), (1, 2));
    }

    #[test]
    fn unreadable_images_are_counted_and_skipped_or_refused() {
        let files: [(&str, &[u8]); 3] =
            [("a/bad.png", b"not a picture"), ("a/empty.jpg", b""), ("a/good.bmp", &bmp([1; 3]))];
        let folder = folder(&files);
        let opened = open(folder.path(), Part::Train, &OPTIONS, &Stop::default()).unwrap();
        assert_eq!((opened.dataset.len(), opened.skipped.len()), (1, 2));
        assert!(opened.skipped[0].contains("bad.png"), "{:?}", opened.skipped);
        let error =
            open(folder.path(), Part::Train, &OpenOptions { strict: true, ..OPTIONS }, &Stop::default()).unwrap_err();
        assert!(error.to_string().contains("--strict"), "{error}");
    }

    #[test]
    fn every_file_is_an_image_or_listed() {
        let image = bmp([1; 3]);
        let files: [(&str, &[u8]); 12] = [
            ("train/a/1.jfif", &image),
            ("train/a/2.jpe", &bmp([2; 3])),
            ("train/a/no extension", &bmp([3; 3])),
            ("train/a/.hidden", b"?"),
            ("train/a/4.tif", b"II*\0\x08\0\0\0"),
            ("train/a/5.avif", b"\0\0\0\x18ftypavif\0\0\0\0mif1avif"),
            ("train/a/6.heic", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"),
            ("train/a/more/7.bmp", &image),
            ("train/b/1.bmp", &bmp([4; 3])),
            ("train/__MACOSX/a/1.bmp", &image),
            ("train/loose.bmp", &image),
            ("val/a/8.bmp", &image),
        ];
        let folder = folder(&files);
        let Opened { dataset, skipped, .. } = open(folder.path(), Part::Train, &OPTIONS, &Stop::default()).unwrap();
        assert_eq!((dataset.class_names, dataset.labels), (vec!["a".into(), "b".into()], vec![0, 0, 0, 1]));
        let mentioned = ["val: ", "__MACOSX: ", "loose.bmp: ", "more: ", "4.tif: TIFF", "5.avif: AVIF", "6.heic: HEIC"];
        for words in mentioned {
            assert!(skipped.iter().any(|line| line.contains(words)), "{words} in {skipped:?}");
        }
        assert_eq!(skipped.len(), mentioned.len(), "{skipped:?}");
        let error =
            open(folder.path(), Part::Train, &OpenOptions { strict: true, ..OPTIONS }, &Stop::default()).unwrap_err();
        assert!(error.to_string().contains("--strict"), "{error}");
    }

    #[test]
    fn a_pipe_in_a_class_is_not_waited_for() {
        let folder = folder(&[("a/1.bmp", &bmp([1; 3]))]);
        let made = std::process::Command::new("mkfifo").arg(folder.path().join("a/pipe")).status().unwrap();
        assert!(made.success());
        let opened = open(folder.path(), Part::Train, &OPTIONS, &Stop::default()).unwrap();
        assert!(opened.skipped[0].contains("no regular file"), "{:?}", opened.skipped);
    }

    #[test]
    fn images_with_more_pixels_than_asked_for_are_listed() {
        let folder = folder(&[("a/1.bmp", &bmp([1; 3]))]);
        let options = OpenOptions { max_pixels: 3, ..OPTIONS };
        let error = format!("{:#}", open(folder.path(), Part::Train, &options, &Stop::default()).unwrap_err());
        assert!(error.contains("2x2 pixels; at most 3"), "{error}");
    }

    #[test]
    fn a_set_of_one_class_is_said_to_teach_nothing() {
        let folder = folder(&[("a/1.bmp", &bmp([1; 3])), ("a/2.bmp", &bmp([2; 3]))]);
        let opened = open(folder.path(), Part::Train, &OPTIONS, &Stop::default()).unwrap();
        assert!(opened.warnings.iter().any(|line| line.contains("one class, a")), "{:?}", opened.warnings);
    }

    #[test]
    fn reading_ends_when_it_is_to_stop() {
        let folder = folder(&[("a/1.bmp", &bmp([1; 3])), ("a/2.bmp", &bmp([2; 3]))]);
        let late = Stop::after(Some(std::time::Duration::from_nanos(1)));
        let error = open(folder.path(), Part::Train, &OPTIONS, &late).unwrap_err();
        assert!(error.downcast_ref::<Stopped>().is_some(), "{error:#}");
    }

    #[test]
    fn an_empty_class_is_named() {
        let folder = folder(&[("a/1.bmp", &bmp([1; 3])), ("b/readme.md", b"")]);
        let error = format!("{:#}", open(folder.path(), Part::Train, &OPTIONS, &Stop::default()).unwrap_err());
        assert!(error.contains("class b has no usable image"), "{error}");
    }

    #[test]
    fn a_class_name_that_is_not_utf8_is_refused_and_a_file_name_is_not() {
        let folder = folder(&[("a/1.bmp", &bmp([1; 3]))]);
        let odd = OsString::from_vec(b"\xff\xfe.bmp".to_vec());
        fs::write(folder.path().join("a").join(&odd), bmp([2; 3])).unwrap();
        assert_eq!(open(folder.path(), Part::Train, &OPTIONS, &Stop::default()).unwrap().dataset.len(), 2);
        fs::create_dir(folder.path().join(&odd)).unwrap();
        let error = format!("{:#}", open(folder.path(), Part::Train, &OPTIONS, &Stop::default()).unwrap_err());
        assert!(error.contains("not UTF-8"), "{error}");
    }

    #[test]
    fn the_same_image_under_two_labels_is_reported() {
        let image = bmp([9; 3]);
        let folder = folder(&[("a/1.bmp", &image), ("b/2.bmp", &image)]);
        let opened = open(folder.path(), Part::Train, &OPTIONS, &Stop::default()).unwrap();
        assert!(
            opened.warnings.iter().any(|w| w.contains("exactly like an image of class a")),
            "{:?}",
            opened.warnings
        );
    }
}
