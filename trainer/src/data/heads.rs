//! Several data sets in one run: their classes side by side, each set's behind a head of its own.
//! Soft labels, where there are any, have the last head.

use std::collections::BTreeSet;
use std::ops::Range;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use model_core::artifact::store_layout;
use serde::{Deserialize, Serialize};

use super::Dataset;

/// One of several heads.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Head {
    /// Of what it learns from; the expert set's.
    pub name: String,
    pub classes: usize,
}

impl Head {
    /// The head for the data set in `folder`, named after it.
    ///
    /// # Errors
    /// When the folder's name is none that an expert set may have.
    pub fn of(folder: &Path, dataset: &Dataset) -> Result<Self> {
        Ok(Self { name: set_name(folder)?, classes: dataset.num_classes() })
    }
}

/// The name of the expert set that comes of a folder, or of a file without its ending.
///
/// # Errors
/// When it is none that an expert set may have.
pub fn set_name(path: &Path) -> Result<String> {
    let whole = path.canonicalize().with_context(|| path.display().to_string())?;
    // A link's own name, but `.` and `..` have none.
    let path = if path.file_name().is_some() { path } else { &whole };
    let name = if whole.is_dir() { path.file_name() } else { path.file_stem() };
    let name = name.unwrap_or_default().to_string_lossy().into_owned();
    ensure!(
        store_layout::is_valid_name(&name),
        "{} cannot name its expert set: {}",
        path.display(),
        store_layout::NAME_RULE
    );
    Ok(name)
}

/// Refuses names that are given twice.
///
/// # Errors
/// When there is such a name, which the message says.
pub fn check_set_names(names: &[String]) -> Result<()> {
    let mut seen = BTreeSet::new();
    for name in names {
        ensure!(
            seen.insert(name),
            "two expert sets would be called {name}; give one of the folders or files another name"
        );
    }
    Ok(())
}

/// The data sets as one, whose classes are those of the first, then those of the second, and so on.
///
/// # Errors
/// When there are more classes than labels can count.
///
/// # Panics
/// When there is no data set, or their images have different sizes.
pub fn join(sets: Vec<Dataset>) -> Result<Dataset> {
    let mut sets = sets.into_iter();
    let mut all = sets.next().expect("there is a data set");
    for set in sets {
        assert_eq!(set.side, all.side, "images of one size");
        let before = all.num_classes() as u16;
        add_classes(&mut all, &set.class_names)?;
        all.images.extend(set.images);
        all.labels.extend(set.labels.into_iter().map(|label| before + label));
    }
    Ok(all)
}

/// Puts more classes behind those of a data set.
///
/// # Errors
/// When there are more than labels can count.
pub fn add_classes(dataset: &mut Dataset, names: &[String]) -> Result<()> {
    let classes = dataset.num_classes() + names.len();
    ensure!(classes <= usize::from(u16::MAX), "{classes} classes of all heads are too many");
    dataset.class_names.extend_from_slice(names);
    Ok(())
}

/// The classes of each head, by the number that each has; where none is named, one head has `all`.
pub fn ranges(classes: &[usize], all: usize) -> Vec<Range<usize>> {
    let one = [all];
    let classes = if classes.is_empty() { &one } else { classes };
    let mut end = 0;
    let mut next = |classes: &usize| {
        end += classes;
        end - classes..end
    };
    classes.iter().map(&mut next).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dataset(value: u8, names: [&str; 2]) -> Dataset {
        Dataset { images: vec![value; 6], side: 1, labels: vec![0, 1], class_names: names.map(String::from).into() }
    }

    #[test]
    fn classes_lie_side_by_side() {
        let joined = join(vec![dataset(1, ["a", "b"]), dataset(2, ["b", "c"])]).unwrap();
        assert_eq!(joined.labels, [0, 1, 2, 3]);
        assert_eq!(joined.class_names, ["a", "b", "b", "c"]);
        assert_eq!(joined.image(2), [2; 3]);
        assert_eq!(ranges(&[2, 3], 5), [0..2, 2..5]);
        assert_eq!(ranges(&[], 5).len(), 1);
        let alone = dataset(1, ["a", "b"]);
        assert_eq!(join(vec![alone.clone()]).unwrap(), alone);
    }

    #[test]
    fn a_folder_names_its_set_and_no_two_share_a_name() {
        let root = tempfile::tempdir().unwrap();
        let named = root.path().join("birds");
        std::fs::create_dir(&named).unwrap();
        assert_eq!(set_name(&named).unwrap(), "birds");
        assert_eq!(set_name(&named.join("../birds/.")).unwrap(), "birds");
        let file = named.join("lite0.safetensors");
        std::fs::write(&file, "").unwrap();
        assert_eq!(set_name(&file).unwrap(), "lite0");
        let spaced = root.path().join("my birds");
        std::fs::create_dir(&spaced).unwrap();
        assert!(set_name(&spaced).unwrap_err().to_string().contains("cannot name its expert set: a name has"));
        let names = ["birds", "cars", "birds"].map(String::from);
        assert!(check_set_names(&names).unwrap_err().to_string().contains("called birds"));
        check_set_names(&names[1..]).unwrap();
    }
}
