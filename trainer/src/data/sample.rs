//! Some images of a folder, spread over it: to calibrate with, or for a background. Nobody asks for their labels.

use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use indicatif::ProgressBar;
use model_core::image::{DecodeLimits, ImageFolder, Preprocess, read_image};
use rayon::prelude::*;

use crate::terminal::say;

/// Normalised pixels `[side, side, 3]` of `count` images of a folder, or of all that there are.
///
/// # Errors
/// When the folder has no usable image.
pub fn sample(folder: &Path, count: usize, (preprocess, side): (&Preprocess, usize)) -> Result<Vec<Vec<f32>>> {
    let listed = ImageFolder::list(folder, "train")?;
    let files: Vec<&PathBuf> = listed.classes.iter().flat_map(|class| &class.files).collect();
    let count = count.min(files.len());
    let limits = DecodeLimits::default().for_input(preprocess, side);
    let bar = ProgressBar::new(count as u64);
    let decoded: Vec<Result<Vec<f32>, String>> = (0..count)
        .into_par_iter()
        .map(|i| {
            let path = files[i * files.len() / count];
            let image = read_image(path, &limits).map_err(|error| format!("{}: {error}", path.display()));
            bar.inc(1);
            Ok(preprocess.pixels(&image?, side))
        })
        .collect();
    bar.finish_and_clear();
    let mut images = Vec::with_capacity(count);
    let mut unusable = Vec::new();
    for image in decoded {
        match image {
            Ok(image) => images.push(image),
            Err(reason) => unusable.push(reason),
        }
    }
    if let Some(first) = unusable.first() {
        say(&format!(
            "{} of {count} files are no usable images and are left out; the first one: {first}",
            unusable.len()
        ));
    }
    ensure!(
        !images.is_empty(),
        "{}: there is no image in it; it must have one subfolder of images for each class",
        folder.display()
    );
    Ok(images)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_without_images_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let preprocess = Preprocess::default();
        let error = sample(folder.path(), 10, (&preprocess, 16)).unwrap_err().to_string();
        assert!(error.contains("there is no image in it"), "{error}");
        std::fs::create_dir(folder.path().join("a")).unwrap();
        std::fs::write(folder.path().join("a/text.jpg"), "no picture").unwrap();
        assert!(sample(folder.path(), 10, (&preprocess, 16)).is_err());
        assert!(sample(&folder.path().join("missing"), 10, (&preprocess, 16)).is_err());
    }
}
