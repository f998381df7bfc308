//! The files to learn from.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use model_core::image::ImageFolder;
use teaching::{MOST_CLASSES, MOST_IMAGES};

/// Files by class, in the order of their names.
pub(super) struct Images {
    pub(super) classes: Vec<String>,
    pub(super) files: Vec<(PathBuf, usize)>,
    /// A sentence for each thing that is no image.
    pub(super) passed_over: Vec<String>,
}

impl Images {
    /// # Errors
    /// When the folder holds no two classes, or too much.
    pub(super) fn list(folder: &Path) -> anyhow::Result<Self> {
        let listed = ImageFolder::list(folder, "train")?;
        let name = folder.display();
        if listed.classes.is_empty() {
            bail!("{name} has no subfolders; each class is a subfolder, named as its label, that holds its images");
        }
        if let [only] = &listed.classes[..] {
            bail!("{name} has one class, `{}`; a classifier tells two classes apart at least", only.name);
        }
        if listed.classes.len() > MOST_CLASSES {
            bail!("{name} has {} classes; at most {MOST_CLASSES} are taught", listed.classes.len());
        }
        let count: usize = listed.classes.iter().map(|class| class.files.len()).sum();
        if count > MOST_IMAGES {
            bail!("{name} has {count} images; at most {MOST_IMAGES} are taught");
        }
        let mut images = Self { classes: Vec::new(), files: Vec::new(), passed_over: listed.passed_over };
        for (class, found) in listed.classes.into_iter().enumerate() {
            images.files.extend(found.files.into_iter().map(|file| (file, class)));
            images.classes.push(found.name);
        }
        Ok(images)
    }
}

/// Which of the files hold the very same bytes as one before: in the same class they count once.
///
/// # Errors
/// When the same image has two labels.
pub(super) fn repeated(images: &Images, digests: &[Option<[u8; 32]>]) -> anyhow::Result<Vec<bool>> {
    let mut seen: HashMap<[u8; 32], usize> = HashMap::new();
    let mut repeated = vec![false; digests.len()];
    for (at, digest) in digests.iter().enumerate() {
        let Some(digest) = digest else { continue };
        let first = *seen.entry(*digest).or_insert(at);
        let (file, class) = &images.files[at];
        let (other, other_class) = images.files.get(first).context("a file before")?;
        if class != other_class {
            bail!(
                "{} and {} are the same image, once as `{}` and once as `{}`; take it out of one of the two",
                other.display(),
                file.display(),
                images.classes[*other_class],
                images.classes[*class]
            );
        }
        repeated[at] = first != at;
    }
    Ok(repeated)
}
