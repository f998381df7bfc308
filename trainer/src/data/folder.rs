//! One subfolder of images per class: `class/anything.{png,jpg,jpeg,webp,gif,bmp}`.
//!
//! When the folder has a subfolder `train`, the classes are looked for in `train` and `test`; otherwise the folder is
//! whatever part it is asked for. Images go through the decoder and the resizing that the server uses. What a file is
//! called does not say what it is: the content does.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use model_core::image::{DecodeLimits, Preprocess, decode};
use rayon::prelude::*;

use super::{Dataset, Opened, Part};

const EXTENSIONS: [&str; 6] = ["png", "jpg", "jpeg", "webp", "gif", "bmp"];

pub(super) fn is_folder(folder: &Path) -> bool {
    entries(folder).is_ok_and(|entries| entries.iter().any(|path| path.is_dir()))
}

pub(super) fn open(folder: &Path, part: Part, side: usize) -> Result<Opened> {
    let root = match (folder.join("train").is_dir(), part) {
        (false, _) => folder.to_owned(),
        (true, Part::Train) => folder.join("train"),
        (true, Part::Test) => folder.join("test"),
    };
    let classes: Vec<PathBuf> = entries(&root)?.into_iter().filter(|path| path.is_dir()).collect();
    ensure!(classes.len() <= usize::from(u16::MAX), "{} classes are too many", classes.len());
    let mut dataset = Dataset { images: Vec::new(), side, labels: Vec::new(), class_names: Vec::new() };
    let (mut skipped, mut warnings) = (Vec::new(), Vec::new());
    let mut seen = HashMap::new();
    for (label, class) in (0u16..).zip(&classes) {
        let name = class_name(class)?;
        let mut usable = 0;
        for (path, result) in decode_all(class, side)? {
            match result {
                Ok(image) => {
                    if let Some(other) = seen.insert(content_hash(&image), label).filter(|other| *other != label) {
                        let other = class_name(&classes[usize::from(other)])?;
                        warnings.push(format!("{} looks exactly like an image of class {other}", path.display()));
                    }
                    dataset.images.extend(image);
                    dataset.labels.push(label);
                    usable += 1;
                }
                Err(reason) => skipped.push(format!("{}: {reason:#}", path.display())),
            }
        }
        if usable == 0 {
            let reason = skipped.last().map(|last| format!("; the last one: {last}")).unwrap_or_default();
            bail!("class {name} has no usable image{reason}");
        }
        dataset.class_names.push(name);
    }
    Ok(Opened { dataset, skipped, warnings })
}

/// Paths in `folder` without hidden ones, sorted: the order of a listing differs between file systems.
fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    let list = fs::read_dir(folder).with_context(|| format!("listing {}", folder.display()))?;
    let mut names: Vec<OsString> = list.map(|entry| Ok(entry?.file_name())).collect::<Result<_>>()?;
    names.retain(|name| !name.as_encoded_bytes().starts_with(b"."));
    names.sort_unstable();
    Ok(names.into_iter().map(|name| folder.join(name)).collect())
}

/// The folder's name, which becomes a label.
fn class_name(class: &Path) -> Result<String> {
    match class.file_name().and_then(|name| name.to_str()) {
        Some(name) => Ok(name.to_owned()),
        None => {
            bail!("the name of the class folder {} is not UTF-8, so it cannot be a label; rename it", class.display())
        }
    }
}

/// Every image file below `class` with its `[side, side, 3]` bytes, or why there are none.
fn decode_all(class: &Path, side: usize) -> Result<Vec<(PathBuf, Result<Vec<u8>>)>> {
    let is_image = |path: &PathBuf| {
        let extension = path.extension().and_then(|e| e.to_str()).map(str::to_ascii_lowercase);
        extension.is_some_and(|e| EXTENSIONS.contains(&e.as_str()))
    };
    let files: Vec<PathBuf> = entries(class)?.into_iter().filter(is_image).collect();
    let preprocess = Preprocess::default();
    let read = |path: &PathBuf| -> Result<Vec<u8>> {
        let image = decode(&fs::read(path)?, &DecodeLimits::default().for_side(side))?;
        Ok(preprocess.fit(&image, side))
    };
    let decoded: Vec<_> = files.par_iter().map(read).collect();
    Ok(files.into_iter().zip(decoded).collect())
}

fn content_hash(image: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    image.hash(&mut hasher);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::super::{LabelColumn, OpenOptions, open};
    use super::*;
    use std::os::unix::ffi::OsStringExt;

    const OPTIONS: OpenOptions = OpenOptions { side: 2, labels: LabelColumn::Fine, strict: false };

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
        let folder =
            folder(&[("dog/1.BMP", &red), ("cat/a.bmp", &blue), ("cat/notes.txt", b"no image"), (".x/y.bmp", &red)]);
        let opened = open(folder.path(), Part::Train, &OPTIONS).unwrap();
        assert_eq!(opened.dataset.class_names, ["cat", "dog"]);
        assert_eq!(opened.dataset.labels, [0, 1]);
        assert_eq!(opened.dataset.image(1), [255, 0, 0].repeat(4));
        assert!(opened.warnings.iter().all(|w| w.contains("a single image")), "{:?}", opened.warnings);
        assert_eq!(opened.warnings.len(), 2);
    }

    #[test]
    fn train_and_test_subfolders_are_the_parts() {
        let folder = folder(&[("train/a/1.bmp", &bmp([1; 3])), ("test/a/1.bmp", &bmp([2; 3]))]);
        let first = |part| open(folder.path(), part, &OPTIONS).unwrap().dataset.images[0];
        assert_eq!((first(Part::Train), first(Part::Test)), (1, 2));
    }

    #[test]
    fn unreadable_images_are_counted_and_skipped_or_refused() {
        let files: [(&str, &[u8]); 3] =
            [("a/bad.png", b"not a picture"), ("a/empty.jpg", b""), ("a/good.bmp", &bmp([1; 3]))];
        let folder = folder(&files);
        let opened = open(folder.path(), Part::Train, &OPTIONS).unwrap();
        assert_eq!((opened.dataset.len(), opened.skipped.len()), (1, 2));
        assert!(opened.skipped[0].contains("bad.png"), "{:?}", opened.skipped);
        let error = open(folder.path(), Part::Train, &OpenOptions { strict: true, ..OPTIONS }).unwrap_err();
        assert!(error.to_string().contains("--strict"), "{error}");
    }

    #[test]
    fn an_empty_class_is_named() {
        let folder = folder(&[("a/1.bmp", &bmp([1; 3])), ("b/readme.md", b"")]);
        let error = format!("{:#}", open(folder.path(), Part::Train, &OPTIONS).unwrap_err());
        assert!(error.contains("class b has no usable image"), "{error}");
    }

    #[test]
    fn a_class_name_that_is_not_utf8_is_refused_and_a_file_name_is_not() {
        let folder = folder(&[("a/1.bmp", &bmp([1; 3]))]);
        let odd = OsString::from_vec(b"\xff\xfe.bmp".to_vec());
        fs::write(folder.path().join("a").join(&odd), bmp([2; 3])).unwrap();
        assert_eq!(open(folder.path(), Part::Train, &OPTIONS).unwrap().dataset.len(), 2);
        fs::create_dir(folder.path().join(&odd)).unwrap();
        let error = format!("{:#}", open(folder.path(), Part::Train, &OPTIONS).unwrap_err());
        assert!(error.contains("not UTF-8"), "{error}");
    }

    #[test]
    fn the_same_image_under_two_labels_is_reported() {
        let image = bmp([9; 3]);
        let folder = folder(&[("a/1.bmp", &image), ("b/2.bmp", &image)]);
        let opened = open(folder.path(), Part::Train, &OPTIONS).unwrap();
        assert!(
            opened.warnings.iter().any(|w| w.contains("exactly like an image of class a")),
            "{:?}",
            opened.warnings
        );
    }
}
