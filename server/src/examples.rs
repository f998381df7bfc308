//! Labelled pictures to teach expert sets from: `ROOT/SET/LABEL/ID`, which is a folder by class for each set, as
//! `butterflyvit teach` reads it.
//!
//! A file is written whole and flushed before it has its name, so that neither a crash nor a power cut loses an example
//! whose receipt was given, or leaves half of one. Its id is the digest of its bytes: within a set a picture is there once.
//! Every change is a closure on a pool of one thread, also when the client that asked for it has gone.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::{fs, io};

use anyhow::Context;
use bytes::Bytes;
use model_core::artifact::Digest;
use model_core::artifact::store_layout::{NAME_RULE, is_valid_name};
use serde::Serialize;
use utoipa::ToSchema;

use crate::sets::upload;
use crate::threads::{BlockingPool, Panicked, Priority};

/// Most examples of one set.
pub const MOST_EXAMPLES: usize = 10_000;
/// Longest label in bytes; it is the name of a folder.
const MOST_LABEL: usize = 200;
/// Digits of an id.
const ID_DIGITS: usize = 24;

/// Why an example is not there, or was not taken.
#[derive(Debug, thiserror::Error)]
pub enum ExampleError {
    /// No folder for examples is configured.
    #[error("this server keeps no examples; start it with --examples DIR")]
    Off,
    #[error("`{0}` is no name of a set: {NAME_RULE}")]
    Set(String),
    /// The label cannot be the name of a folder.
    #[error("a label has 1 to {MOST_LABEL} bytes, no `/` and no control characters, and does not begin with a dot")]
    Label,
    /// The same picture stands for something else.
    #[error("this picture is example {id} already, with the label `{label}`; change that instead")]
    OtherLabel { id: String, label: String },
    /// No example of the set has that id.
    #[error("the set has no example {0}")]
    Unknown(String),
    /// The byte budget is spent.
    #[error("there is no room: examples take {used} of {budget} bytes (--examples-budget), and this one has {bytes}")]
    Full { used: u64, budget: u64, bytes: u64 },
    /// The set has as many examples as are kept.
    #[error("a set has at most {MOST_EXAMPLES} examples")]
    TooMany,
    #[error("the examples cannot be written: {0}")]
    Disk(#[from] io::Error),
    #[error("{0}")]
    Internal(String),
}

impl From<Panicked> for ExampleError {
    fn from(panicked: Panicked) -> Self {
        Self::Internal(panicked.to_string())
    }
}

/// A picture with what it shows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct Example {
    /// The beginning of its digest.
    pub id: String,
    pub label: String,
    /// Bytes of its file.
    pub bytes: u64,
}

/// The examples of all sets; clones share them.
#[derive(Clone)]
pub struct Examples {
    shared: Arc<Shared>,
    files: BlockingPool,
}

struct Shared {
    root: PathBuf,
    budget: u64,
    index: Mutex<Index>,
}

/// By set and id.
#[derive(Debug, Default)]
struct Index {
    sets: BTreeMap<String, BTreeMap<String, Example>>,
    bytes: u64,
}

impl Examples {
    /// What lies in `root`, which is made if it is not there. Blocking.
    ///
    /// # Errors
    /// When the folder can be neither made nor read.
    pub fn open(root: PathBuf, budget: u64) -> anyhow::Result<Self> {
        let index = fs::create_dir_all(&root).and_then(|()| scan(&root));
        let index = Mutex::new(index.with_context(|| root.display().to_string())?);
        let files = BlockingPool::start("examples", 1, Priority::Background).context("threads")?;
        Ok(Self { shared: Arc::new(Shared { root, budget, index }), files })
    }

    /// Every example of a set, by id; none of a set that has none.
    ///
    /// # Errors
    /// [`ExampleError::Set`].
    pub fn list(&self, set: &str) -> Result<Vec<Example>, ExampleError> {
        check_set(set)?;
        let index = self.shared.index();
        Ok(index.sets.get(set).map(|examples| examples.values().cloned().collect()).unwrap_or_default())
    }

    /// One example of a set.
    ///
    /// # Errors
    /// [`ExampleError::Unknown`], and [`ExampleError::Set`].
    pub fn find(&self, set: &str, id: &str) -> Result<Example, ExampleError> {
        check_set(set)?;
        self.shared.find(set, id)
    }

    /// The picture of an example. Blocking.
    ///
    /// # Errors
    /// [`ExampleError::Unknown`] when it is not there as it was listed, and those of the disk.
    pub fn read(&self, set: &str, example: &Example) -> Result<Bytes, ExampleError> {
        match fs::read(self.shared.path(set, example)) {
            Ok(bytes) => Ok(bytes.into()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(ExampleError::Unknown(example.id.clone())),
            Err(error) => Err(error.into()),
        }
    }

    /// Bytes that all examples take, and may take.
    pub fn bytes(&self) -> (u64, u64) {
        (self.shared.index().bytes, self.shared.budget)
    }

    /// Keeps a picture, and says whether it is new; the same picture under the same label is kept once.
    ///
    /// # Errors
    /// [`ExampleError::OtherLabel`]; [`ExampleError::Full`]; [`ExampleError::TooMany`]; and those of names and disk.
    pub async fn add(&self, set: &str, label: &str, picture: Bytes) -> Result<(Example, bool), ExampleError> {
        check_set(set)?;
        check_label(label)?;
        let (set, label) = (set.to_owned(), label.to_owned());
        self.change(move |shared| shared.add(&set, label, &picture)).await
    }

    /// Gives an example another label.
    ///
    /// # Errors
    /// [`ExampleError::Unknown`], and those of names and disk.
    pub async fn relabel(&self, set: &str, id: &str, label: &str) -> Result<Example, ExampleError> {
        check_set(set)?;
        check_label(label)?;
        let (set, id, label) = (set.to_owned(), id.to_owned(), label.to_owned());
        self.change(move |shared| shared.relabel(&set, &id, label)).await
    }

    /// Deletes an example and its file.
    ///
    /// # Errors
    /// [`ExampleError::Unknown`], and those of names and disk.
    pub async fn remove(&self, set: &str, id: &str) -> Result<Example, ExampleError> {
        check_set(set)?;
        let (set, id) = (set.to_owned(), id.to_owned());
        self.change(move |shared| shared.remove(&set, &id)).await
    }

    async fn change<T: Send + 'static>(
        &self,
        change: impl FnOnce(&Shared) -> Result<T, ExampleError> + Send + 'static,
    ) -> Result<T, ExampleError> {
        let shared = Arc::clone(&self.shared);
        self.files.run(move || change(&shared)).await?
    }
}

impl Shared {
    fn index(&self) -> MutexGuard<'_, Index> {
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn path(&self, set: &str, example: &Example) -> PathBuf {
        self.root.join(set).join(&example.label).join(&example.id)
    }

    fn find(&self, set: &str, id: &str) -> Result<Example, ExampleError> {
        let index = self.index();
        let found = index.sets.get(set).and_then(|examples| examples.get(id)).cloned();
        found.ok_or_else(|| ExampleError::Unknown(id.chars().take(ID_DIGITS).collect()))
    }

    fn add(&self, set: &str, label: String, picture: &[u8]) -> Result<(Example, bool), ExampleError> {
        let id = Digest::of("", picture).to_string()[..ID_DIGITS].to_owned();
        let example = Example { id, label, bytes: picture.len() as u64 };
        {
            let index = self.index();
            let known = index.sets.get(set);
            if let Some(other) = known.and_then(|examples| examples.get(&example.id)) {
                let Example { id, label, .. } = other.clone();
                return if label == example.label {
                    Ok((example, false))
                } else {
                    Err(ExampleError::OtherLabel { id, label })
                };
            }
            if known.is_some_and(|examples| examples.len() >= MOST_EXAMPLES) {
                return Err(ExampleError::TooMany);
            }
            if index.bytes.saturating_add(example.bytes) > self.budget {
                return Err(ExampleError::Full { used: index.bytes, budget: self.budget, bytes: example.bytes });
            }
        }
        upload::put(&self.path(set, &example), picture)?;
        let mut index = self.index();
        index.bytes += example.bytes;
        index.sets.entry(set.to_owned()).or_default().insert(example.id.clone(), example.clone());
        Ok((example, true))
    }

    fn relabel(&self, set: &str, id: &str, label: String) -> Result<Example, ExampleError> {
        let old = self.find(set, id)?;
        let new = Example { label, ..old.clone() };
        if new.label != old.label {
            upload::rename(&self.path(set, &old), &self.path(set, &new))?;
            self.index().sets.entry(set.to_owned()).or_default().insert(new.id.clone(), new.clone());
        }
        Ok(new)
    }

    fn remove(&self, set: &str, id: &str) -> Result<Example, ExampleError> {
        let example = self.find(set, id)?;
        upload::delete(&self.path(set, &example))?;
        let mut index = self.index();
        index.bytes = index.bytes.saturating_sub(example.bytes);
        if let Some(examples) = index.sets.get_mut(set) {
            examples.remove(id);
            if examples.is_empty() {
                index.sets.remove(set);
            }
        }
        Ok(example)
    }
}

fn check_set(set: &str) -> Result<(), ExampleError> {
    if is_valid_name(set) { Ok(()) } else { Err(ExampleError::Set(set.chars().take(64).collect())) }
}

fn check_label(label: &str) -> Result<(), ExampleError> {
    let is_good = (1..=MOST_LABEL).contains(&label.len())
        && !label.starts_with('.')
        && !label.chars().any(|c| c == '/' || c.is_control());
    if is_good { Ok(()) } else { Err(ExampleError::Label) }
}

/// What lies in a folder of examples. What interrupted writes left is deleted; files of other names are not examples.
fn scan(root: &Path) -> io::Result<Index> {
    let mut index = Index::default();
    for (set, folder) in named(root)?.into_iter().filter(|(set, _)| is_valid_name(set)) {
        for (label, folder) in named(&folder)?.into_iter().filter(|(label, _)| check_label(label).is_ok()) {
            upload::remove_temporary(&folder);
            for (id, path) in named(&folder)? {
                if id.len() != ID_DIGITS || !id.bytes().all(|digit| b"0123456789abcdef".contains(&digit)) {
                    continue;
                }
                let bytes = fs::metadata(path)?.len();
                let example = Example { id: id.clone(), label: label.clone(), bytes };
                let old = index.sets.entry(set.clone()).or_default().insert(id, example);
                index.bytes += bytes - old.map_or(0, |old| old.bytes.min(bytes));
            }
        }
    }
    Ok(index)
}

/// What a folder holds, by name; nothing in what is no folder.
fn named(folder: &Path) -> io::Result<Vec<(String, PathBuf)>> {
    if !folder.is_dir() {
        return Ok(Vec::new());
    }
    let entries = fs::read_dir(folder)?.filter_map(Result::ok);
    Ok(entries.filter_map(|entry| Some((entry.file_name().into_string().ok()?, entry.path()))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn examples_are_kept_once_within_the_budget_and_found_again() {
        let root = tempfile::tempdir().unwrap();
        let open = || Examples::open(root.path().to_owned(), 25).unwrap();
        let examples = open();
        let bytes = |text: &'static str| Bytes::from_static(text.as_bytes());
        let (first, is_new) = examples.add("door", "open", bytes("0123456789")).await.unwrap();
        assert!(is_new && first.label == "open" && first.bytes == 10);
        let again = examples.add("door", "open", bytes("0123456789")).await.unwrap();
        assert_eq!(again, (first.clone(), false));
        let other = examples.add("door", "closed", bytes("0123456789")).await.unwrap_err();
        assert!(matches!(other, ExampleError::OtherLabel { ref label, .. } if label == "open"), "{other}");
        let (second, _) = examples.add("door", "half open, ?*", bytes("9876543210")).await.unwrap();
        assert!(matches!(
            examples.add("gate", "open", bytes("too much")).await,
            Err(ExampleError::Full { used: 20, .. })
        ));
        for label in ["", ".", "..", ".hidden", "a/b", "a\nb", &"x".repeat(201)] {
            assert!(matches!(examples.add("door", label, bytes("x")).await, Err(ExampleError::Label)), "{label}");
        }
        for set in ["", "..", "a/b"] {
            assert!(matches!(examples.add(set, "open", bytes("x")).await, Err(ExampleError::Set(_))), "{set}");
        }

        let moved = examples.relabel("door", &second.id, "closed").await.unwrap();
        assert_eq!(moved.label, "closed");
        // What a crash leaves behind: half an example without its name.
        fs::write(root.path().join("door/open/.upload-1"), "half").unwrap();
        let reopened = open();
        assert_eq!(reopened.list("door").unwrap(), examples.list("door").unwrap());
        assert_eq!(reopened.bytes(), (20, 25));
        assert!(!root.path().join("door/open/.upload-1").exists());
        assert!(!root.path().join("door/half open, ?*").exists(), "a folder goes with its last example");

        reopened.remove("door", &first.id).await.unwrap();
        assert!(matches!(reopened.remove("door", &first.id).await, Err(ExampleError::Unknown(_))));
        assert!(matches!(reopened.relabel("door", "../../x", "open").await, Err(ExampleError::Unknown(_))));
        assert_eq!((reopened.bytes().0, open().list("door").unwrap()), (10, vec![moved]));
    }
}
