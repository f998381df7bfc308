//! Labelled pictures to teach expert sets from: `ROOT/SET/LABEL/ID`, which is a folder by class for each set, as
//! `butterflyvit teach` reads it.
//!
//! A file is written whole and flushed before it has its name, so that neither a crash nor a power cut loses an example
//! whose receipt was given, or leaves half of one. Its id is the digest of its bytes: within a set a picture is there once.
//! Beside them lie frames that the server could not name, `ROOT/SET/.unsure/ID.REASON`, the last few of each set, to be
//! labelled. `ROOT/SET/.features/ID` is what a fit has computed of an example, for the next one; it goes with the example. Both make
//! way for examples when bytes are short, features first.
//!
//! Every change is a closure on a pool of one thread, also when the client that asked for it has gone.

use std::collections::{BTreeMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use std::{fs, io};

use anyhow::Context;
use bytes::Bytes;
use model_core::artifact::Digest;
use model_core::artifact::store_layout::{NAME_RULE, is_valid_name};
use serde::Serialize;
use utoipa::ToSchema;

use crate::sets::upload;
use crate::threads::{BlockingPool, Panicked, Priority};
use crate::verdict::Reason;

/// Most examples of one set.
pub const MOST_EXAMPLES: usize = 10_000;
/// Longest label in bytes; it is the name of a folder.
const MOST_LABEL: usize = 200;
/// Digits of an id.
const ID_DIGITS: usize = 24;

/// The folder of frames without a label. It is hidden, so a folder of examples by class is one without it.
const UNSURE: &str = ".unsure";
/// The folder of features, hidden as well.
const FEATURES: &str = ".features";
/// Between two frames of a set that are kept: a camera that shows something new for hours does not wear out a disk.
const UNSURE_EVERY: Duration = Duration::from_secs(1);

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
    #[error("the disk of --examples is full")]
    DiskFull,
    #[error("the folder of --examples cannot be written to")]
    ReadOnly,
    #[error("{0}")]
    Internal(String),
}

impl From<io::Error> for ExampleError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::DiskFull,
            io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::PermissionDenied => Self::ReadOnly,
            _ => Self::Internal(error.to_string()),
        }
    }
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

/// A frame that nobody has said of what it shows.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct Unsure {
    /// The beginning of its digest; with a label it is an example of the same id.
    pub id: String,
    /// Why the server did not name it.
    pub reason: Reason,
    /// Bytes of its file.
    pub bytes: u64,
    /// Seconds since 1970 when it came.
    pub at: f64,
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
    /// Frames without a label that are kept of each set.
    most_unsure: usize,
    /// Whether one of them is being written; others that come meanwhile are not kept.
    is_writing: AtomicBool,
    index: Mutex<Index>,
}

/// Whether features make way. What a fit computed in minutes does not for a frame that anybody may send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Features {
    MayGo,
    Stay,
}

/// By set and id.
#[derive(Debug, Default)]
struct Index {
    sets: BTreeMap<String, BTreeMap<String, Example>>,
    /// Frames without a label by set, the oldest first.
    unsure: BTreeMap<String, VecDeque<Unsure>>,
    /// Bytes of the features that are kept, by set and example.
    features: BTreeMap<(String, String), u64>,
    /// Of all of these.
    bytes: u64,
}

impl Examples {
    /// What lies in `root`, which is made if it is not there. Of each set the last `most_unsure` frames that were not named
    /// are kept. Blocking.
    ///
    /// # Errors
    /// When the folder can be neither made nor read.
    pub fn open(root: PathBuf, budget: u64, most_unsure: usize) -> anyhow::Result<Self> {
        let index = fs::create_dir_all(&root).and_then(|()| scan(&root));
        let index = Mutex::new(index.with_context(|| root.display().to_string())?);
        let files = BlockingPool::start("examples", 1, Priority::Background).context("threads")?;
        let shared = Shared { root, budget, most_unsure, is_writing: AtomicBool::new(false), index };
        Ok(Self { shared: Arc::new(shared), files })
    }

    /// Whether frames that are not named are kept.
    pub fn keeps_unsure(&self) -> bool {
        self.shared.most_unsure > 0
    }

    /// Keeps a frame of a set that was not named, unless that is too much work right now. The oldest ones make way for it.
    /// Nobody waits for it; must run inside a tokio runtime.
    pub fn keep_unsure(&self, set: &str, reason: Reason, picture: &[u8]) {
        let now = seconds(SystemTime::now());
        let is_soon = |last: &Unsure| (0.0..UNSURE_EVERY.as_secs_f64()).contains(&(now - last.at));
        let last = self.shared.index().unsure.get(set).and_then(|frames| frames.back().cloned());
        if !self.keeps_unsure() || last.is_some_and(|last| is_soon(&last)) || check_set(set).is_err() {
            return;
        }
        if self.shared.is_writing.swap(true, Ordering::AcqRel) {
            return;
        }
        // A picture may be part of a large body.
        let (set, picture, examples) = (set.to_owned(), picture.to_vec(), self.clone());
        tokio::spawn(async move {
            let kept = examples.change(move |shared| shared.keep_unsure(&set, reason, now, &picture)).await;
            examples.shared.is_writing.store(false, Ordering::Release);
            if let Err(error) = kept {
                tracing::debug!(%error, "a frame is not kept");
            }
        });
    }

    /// The frames of a set without a label, the oldest first.
    ///
    /// # Errors
    /// [`ExampleError::Set`] when that is no name.
    pub fn unsure(&self, set: &str) -> Result<Vec<Unsure>, ExampleError> {
        check_set(set)?;
        Ok(self.shared.index().unsure.get(set).into_iter().flatten().cloned().collect())
    }

    /// The picture of an example, or of a frame without a label. Blocking.
    ///
    /// # Errors
    /// [`ExampleError::Unknown`], and those of the disk.
    pub fn picture(&self, set: &str, id: &str) -> Result<Bytes, ExampleError> {
        check_set(set)?;
        match self.shared.find_unsure(set, id) {
            Some(frame) => read(&self.shared.unsure_path(set, &frame), id),
            None => self.read(set, &self.shared.find(set, id)?),
        }
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

    /// The picture of an example. Blocking.
    ///
    /// # Errors
    /// [`ExampleError::Unknown`] when it is not there as it was listed, and those of the disk.
    pub fn read(&self, set: &str, example: &Example) -> Result<Bytes, ExampleError> {
        read(&self.shared.path(set, example), &example.id)
    }

    /// The file of the features of an example that a fit has kept. Blocking.
    pub fn features(&self, set: &str, id: &str) -> Option<Vec<u8>> {
        self.shared.index().features.get(&(set.to_owned(), id.to_owned()))?;
        fs::read(self.shared.features_path(set, id)).ok()
    }

    /// Keeps the features of an example for the next fit if there is room for them; nobody is told when there is none.
    pub async fn keep_features(&self, set: &str, id: &str, features: Vec<u8>) {
        let (set, id) = (set.to_owned(), id.to_owned());
        let kept = self.change(move |shared| shared.keep_features(set, id, &features)).await;
        if let Err(error) = kept {
            tracing::debug!(%error, "features are not kept");
        }
    }

    /// Bytes that all examples take, and may take.
    pub fn bytes(&self) -> (u64, u64) {
        (self.shared.index().bytes, self.shared.budget)
    }

    /// Keeps `kept` of a picture, and says whether it is new; the same picture under the same label is kept once.
    ///
    /// # Errors
    /// [`ExampleError::OtherLabel`]; [`ExampleError::Full`]; [`ExampleError::TooMany`]; and those of names and disk.
    pub async fn add(
        &self,
        set: &str,
        label: &str,
        picture: Bytes,
        kept: Bytes,
    ) -> Result<(Example, bool), ExampleError> {
        check_set(set)?;
        check_label(label)?;
        let (set, label) = (set.to_owned(), label.to_owned());
        self.change(move |shared| shared.add(&set, label, id_of(&picture), &kept)).await
    }

    /// The example that a picture is already, or becomes because it was a frame without a label.
    ///
    /// # Errors
    /// [`ExampleError::OtherLabel`], and those of names and disk.
    pub async fn recognise(
        &self,
        set: &str,
        label: &str,
        picture: Bytes,
    ) -> Result<Option<(Example, bool)>, ExampleError> {
        check_set(set)?;
        check_label(label)?;
        let (set, label) = (set.to_owned(), label.to_owned());
        self.change(move |shared| shared.recognise(&set, &label, &id_of(&picture))).await
    }

    /// Gives an example another label, or a frame its first one.
    ///
    /// # Errors
    /// [`ExampleError::Unknown`], and those of names and disk.
    pub async fn relabel(&self, set: &str, id: &str, label: &str) -> Result<Example, ExampleError> {
        check_set(set)?;
        check_label(label)?;
        let (set, id, label) = (set.to_owned(), id.to_owned(), label.to_owned());
        self.change(move |shared| shared.relabel(&set, &id, label)).await
    }

    /// Deletes an example or a frame without a label, and its file.
    ///
    /// # Errors
    /// [`ExampleError::Unknown`], and those of names and disk.
    pub async fn remove(&self, set: &str, id: &str) -> Result<(), ExampleError> {
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

    fn find_unsure(&self, set: &str, id: &str) -> Option<Unsure> {
        self.index().unsure.get(set)?.iter().find(|frame| frame.id == id).cloned()
    }

    fn unsure_path(&self, set: &str, frame: &Unsure) -> PathBuf {
        self.root.join(set).join(UNSURE).join(format!("{}.{}", frame.id, frame.reason.as_str()))
    }

    fn keep_unsure(&self, set: &str, reason: Reason, at: f64, picture: &[u8]) -> Result<(), ExampleError> {
        let id = id_of(picture);
        if self.find(set, &id).is_ok() || self.find_unsure(set, &id).is_some() {
            return Ok(());
        }
        let frame = Unsure { id, reason, bytes: picture.len() as u64, at };
        self.make_room(frame.bytes, Features::Stay)?;
        upload::put(&self.unsure_path(set, &frame), picture)?;
        // In one step, so that nobody sees one too few or too many.
        let gone: Vec<Unsure> = {
            let mut index = self.index();
            index.bytes += frame.bytes;
            let frames = index.unsure.entry(set.to_owned()).or_default();
            frames.push_back(frame);
            let excess = frames.len().saturating_sub(self.most_unsure);
            let gone: Vec<Unsure> = frames.drain(..excess).collect();
            index.bytes = index.bytes.saturating_sub(gone.iter().map(|frame| frame.bytes).sum());
            gone
        };
        gone.iter().try_for_each(|frame| Ok(upload::delete(&self.unsure_path(set, frame))?))
    }

    fn features_path(&self, set: &str, id: &str) -> PathBuf {
        self.root.join(set).join(FEATURES).join(id)
    }

    fn keep_features(&self, set: String, id: String, features: &[u8]) -> Result<(), ExampleError> {
        // Deleted while its features were computed.
        self.find(&set, &id)?;
        let bytes = features.len() as u64;
        let old = self.index().features.get(&(set.clone(), id.clone())).copied().unwrap_or(0);
        self.check_room(bytes.saturating_sub(old))?;
        upload::put_lightly(&self.features_path(&set, &id), features)?;
        let mut index = self.index();
        index.bytes = (index.bytes + bytes).saturating_sub(old);
        index.features.insert((set, id), bytes);
        Ok(())
    }

    /// Deletes the features of an example, if any are kept.
    fn forget_features(&self, set: &str, id: &str) -> Result<(), ExampleError> {
        let key = (set.to_owned(), id.to_owned());
        if self.index().features.contains_key(&key) {
            upload::delete_lightly(&self.features_path(set, id))?;
            // Refused when other files are left, as it should be.
            let _ = fs::remove_dir(self.root.join(set).join(FEATURES));
            let mut index = self.index();
            let bytes = index.features.remove(&key).unwrap_or(0);
            index.bytes = index.bytes.saturating_sub(bytes);
        }
        Ok(())
    }

    /// Deletes features, if they may go, and then frames without a label, the oldest first, until so many bytes fit. Deletes
    /// nothing where that would not be enough.
    fn make_room(&self, bytes: u64, features: Features) -> Result<(), ExampleError> {
        if self.check_room(bytes).is_ok() {
            return Ok(());
        }
        let stays: u64 = {
            let index = self.index();
            let examples: u64 = index.sets.values().flat_map(BTreeMap::values).map(|example| example.bytes).sum();
            examples + if features == Features::Stay { index.features.values().sum() } else { 0 }
        };
        if stays.saturating_add(bytes) > self.budget {
            return self.check_room(bytes);
        }
        while self.check_room(bytes).is_err() {
            let first = self.index().features.keys().next().filter(|_| features == Features::MayGo).cloned();
            if let Some((set, id)) = first {
                self.forget_features(&set, &id)?;
                continue;
            }
            let oldest = {
                let index = self.index();
                let firsts = index.unsure.iter().filter_map(|(set, frames)| Some((set, frames.front()?)));
                let oldest = firsts.min_by(|(_, a), (_, b)| a.at.total_cmp(&b.at));
                oldest.map(|(set, frame)| (set.clone(), frame.clone()))
            };
            match oldest {
                Some((set, frame)) => self.forget_unsure(&set, &frame)?,
                None => return self.check_room(bytes),
            }
        }
        Ok(())
    }

    fn check_room(&self, bytes: u64) -> Result<(), ExampleError> {
        let used = self.index().bytes;
        let fits = used.saturating_add(bytes) <= self.budget;
        if fits { Ok(()) } else { Err(ExampleError::Full { used, budget: self.budget, bytes }) }
    }

    /// Deletes the file of a frame and forgets it.
    fn forget_unsure(&self, set: &str, frame: &Unsure) -> Result<(), ExampleError> {
        upload::delete(&self.unsure_path(set, frame))?;
        self.index().drop_unsure(set, frame);
        Ok(())
    }

    fn recognise(&self, set: &str, label: &str, id: &str) -> Result<Option<(Example, bool)>, ExampleError> {
        if self.find_unsure(set, id).is_some() {
            return self.relabel(set, id, label.to_owned()).map(|example| Some((example, true)));
        }
        match self.find(set, id) {
            Ok(known) if known.label == label => Ok(Some((known, false))),
            Ok(Example { id, label, .. }) => Err(ExampleError::OtherLabel { id, label }),
            Err(_) => Ok(None),
        }
    }

    fn add(&self, set: &str, label: String, id: String, kept: &[u8]) -> Result<(Example, bool), ExampleError> {
        if let Some(known) = self.recognise(set, &label, &id)? {
            return Ok(known);
        }
        let example = Example { id, label, bytes: kept.len() as u64 };
        if self.index().sets.get(set).is_some_and(|examples| examples.len() >= MOST_EXAMPLES) {
            return Err(ExampleError::TooMany);
        }
        self.make_room(example.bytes, Features::MayGo)?;
        upload::put(&self.path(set, &example), kept)?;
        let mut index = self.index();
        index.bytes += example.bytes;
        index.sets.entry(set.to_owned()).or_default().insert(example.id.clone(), example.clone());
        Ok((example, true))
    }

    fn relabel(&self, set: &str, id: &str, label: String) -> Result<Example, ExampleError> {
        if let Some(frame) = self.find_unsure(set, id) {
            let example = Example { id: frame.id.clone(), label, bytes: frame.bytes };
            if self.index().sets.get(set).is_some_and(|examples| examples.len() >= MOST_EXAMPLES) {
                return Err(ExampleError::TooMany);
            }
            upload::rename(&self.unsure_path(set, &frame), &self.path(set, &example))?;
            let mut index = self.index();
            index.drop_unsure(set, &frame);
            index.bytes += example.bytes;
            index.sets.entry(set.to_owned()).or_default().insert(example.id.clone(), example.clone());
            return Ok(example);
        }
        let old = self.find(set, id)?;
        let new = Example { label, ..old.clone() };
        if new.label != old.label {
            upload::rename(&self.path(set, &old), &self.path(set, &new))?;
            self.index().sets.entry(set.to_owned()).or_default().insert(new.id.clone(), new.clone());
        }
        Ok(new)
    }

    fn remove(&self, set: &str, id: &str) -> Result<(), ExampleError> {
        if let Some(frame) = self.find_unsure(set, id) {
            return self.forget_unsure(set, &frame);
        }
        let example = self.find(set, id)?;
        self.forget_features(set, id)?;
        upload::delete(&self.path(set, &example))?;
        let mut index = self.index();
        index.bytes = index.bytes.saturating_sub(example.bytes);
        if let Some(examples) = index.sets.get_mut(set) {
            examples.remove(id);
            if examples.is_empty() {
                index.sets.remove(set);
            }
        }
        Ok(())
    }
}

impl Index {
    fn drop_unsure(&mut self, set: &str, frame: &Unsure) {
        let Some(frames) = self.unsure.get_mut(set) else { return };
        let before = frames.len();
        frames.retain(|other| other.id != frame.id);
        if frames.len() < before {
            self.bytes = self.bytes.saturating_sub(frame.bytes);
        }
        if frames.is_empty() {
            self.unsure.remove(set);
        }
    }
}

fn id_of(picture: &[u8]) -> String {
    Digest::of("", picture).to_string()[..ID_DIGITS].to_owned()
}

fn is_id(text: &str) -> bool {
    text.len() == ID_DIGITS && text.bytes().all(|digit| b"0123456789abcdef".contains(&digit))
}

fn seconds(time: SystemTime) -> f64 {
    time.duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

fn read(path: &Path, id: &str) -> Result<Bytes, ExampleError> {
    match fs::read(path) {
        Ok(bytes) => Ok(bytes.into()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(ExampleError::Unknown(id.to_owned())),
        Err(error) => Err(error.into()),
    }
}

/// # Errors
/// [`ExampleError::Set`] when no set can have that name.
pub fn check_set(set: &str) -> Result<(), ExampleError> {
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
        let frames = scan_unsure(&folder.join(UNSURE))?;
        index.bytes += frames.iter().map(|frame| frame.bytes).sum::<u64>();
        if !frames.is_empty() {
            index.unsure.insert(set.clone(), frames);
        }
        for (label, folder) in named(&folder)?.into_iter().filter(|(label, _)| check_label(label).is_ok()) {
            upload::remove_temporary(&folder);
            for (id, path) in named(&folder)? {
                if !is_id(&id) {
                    continue;
                }
                let bytes = fs::metadata(path)?.len();
                let example = Example { id: id.clone(), label: label.clone(), bytes };
                let old = index.sets.entry(set.clone()).or_default().insert(id, example);
                index.bytes += bytes - old.map_or(0, |old| old.bytes.min(bytes));
            }
        }
        scan_features(&set, &folder.join(FEATURES), &mut index)?;
    }
    Ok(index)
}

/// The features in a folder. Those of examples that are not there are deleted.
fn scan_features(set: &str, folder: &Path, index: &mut Index) -> io::Result<()> {
    upload::remove_temporary(folder);
    for (id, path) in named(folder)? {
        if index.sets.get(set).is_some_and(|examples| examples.contains_key(&id)) {
            let bytes = fs::metadata(path)?.len();
            index.bytes += bytes;
            index.features.insert((set.to_owned(), id), bytes);
        } else if is_id(&id)
            && let Err(error) = upload::delete_lightly(&path)
        {
            tracing::warn!(file = %path.display(), %error, "cannot remove");
        }
    }
    Ok(())
}

/// The frames without a label in a folder, the oldest first.
fn scan_unsure(folder: &Path) -> io::Result<VecDeque<Unsure>> {
    upload::remove_temporary(folder);
    let mut frames = Vec::new();
    for (name, path) in named(folder)? {
        let Some((id, reason)) = name.split_once('.').filter(|(id, _)| is_id(id)) else { continue };
        let Some(reason) = Reason::ALL.into_iter().find(|known| known.as_str() == reason) else { continue };
        let metadata = fs::metadata(path)?;
        let at = seconds(metadata.modified()?);
        frames.push(Unsure { id: id.to_owned(), reason, bytes: metadata.len(), at });
    }
    frames.sort_by(|a, b| a.at.total_cmp(&b.at));
    Ok(frames.into())
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
        let open = || Examples::open(root.path().to_owned(), 25, 0).unwrap();
        let examples = open();
        let bytes = |text: &'static str| Bytes::from_static(text.as_bytes());
        let (first, is_new) = examples.add("door", "open", bytes("0123456789"), bytes("0123456789")).await.unwrap();
        assert!(is_new && first.label == "open" && first.bytes == 10);
        let again = examples.add("door", "open", bytes("0123456789"), bytes("0123456789")).await.unwrap();
        assert_eq!(again, (first.clone(), false));
        let other = examples.add("door", "closed", bytes("0123456789"), bytes("0123456789")).await.unwrap_err();
        assert!(matches!(other, ExampleError::OtherLabel { ref label, .. } if label == "open"), "{other}");
        let (second, _) =
            examples.add("door", "half open, ?*", bytes("9876543210"), bytes("9876543210")).await.unwrap();
        assert!(matches!(
            examples.add("gate", "open", bytes("too much"), bytes("too much")).await,
            Err(ExampleError::Full { used: 20, .. })
        ));
        for label in ["", ".", "..", ".hidden", "a/b", "a\nb", &"x".repeat(201)] {
            assert!(
                matches!(examples.add("door", label, bytes("x"), bytes("x")).await, Err(ExampleError::Label)),
                "{label}"
            );
        }
        for set in ["", "..", "a/b"] {
            assert!(
                matches!(examples.add(set, "open", bytes("x"), bytes("x")).await, Err(ExampleError::Set(_))),
                "{set}"
            );
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

    #[tokio::test]
    async fn the_last_unsure_frames_are_kept_and_make_way_for_examples() {
        let root = tempfile::tempdir().unwrap();
        let open = || Examples::open(root.path().to_owned(), 25, 2).unwrap();
        let examples = open();
        let frames = ["first", "second", "third"];
        for (at, frame) in (1u32..).zip(frames) {
            examples.shared.keep_unsure("door", Reason::Unsure, at.into(), frame.as_bytes()).unwrap();
            examples.shared.keep_unsure("door", Reason::Unsure, at.into(), frame.as_bytes()).unwrap();
        }
        let kept = examples.unsure("door").unwrap();
        assert_eq!(kept.iter().map(|frame| &frame.id).collect::<Vec<_>>(), [&id_of(b"second"), &id_of(b"third")]);
        assert_eq!(examples.bytes().0, 11);
        assert!(examples.list("door").unwrap().is_empty(), "they are no examples yet");
        let ids = |examples: &Examples| examples.unsure("door").unwrap().into_iter().map(|f| f.id).collect::<Vec<_>>();
        let (mut then, mut now) = (ids(&open()), ids(&examples));
        then.sort();
        now.sort();
        assert_eq!(then, now, "they are found again");

        // A label makes an example of one, sending it with a label as well.
        let labelled = examples.relabel("door", &id_of(b"third"), "cat").await.unwrap();
        assert_eq!((&*labelled.label, examples.unsure("door").unwrap().len(), examples.bytes().0), ("cat", 1, 11));
        assert_eq!(examples.picture("door", &labelled.id).unwrap(), "third");
        examples.add("door", "dog", Bytes::from_static(b"second"), Bytes::from_static(b"second")).await.unwrap();
        assert_eq!((examples.unsure("door").unwrap().len(), examples.bytes().0), (0, 11));
        assert!(!root.path().join("door").join(UNSURE).exists());

        // Examples drive frames out, and not the other way round.
        examples.shared.keep_unsure("gate", Reason::Unfamiliar, 9.0, b"a frame").unwrap();
        examples
            .add("door", "dog", Bytes::from_static(b"fourteen bytes"), Bytes::from_static(b"fourteen bytes"))
            .await
            .unwrap();
        assert_eq!((examples.unsure("gate").unwrap().len(), examples.bytes().0), (0, 25));
        let full = examples.shared.keep_unsure("gate", Reason::Unfamiliar, 10.0, b"a frame");
        assert!(matches!(full, Err(ExampleError::Full { .. })));
        assert_eq!(examples.list("door").unwrap().len(), 3);
    }

    #[tokio::test]
    async fn features_make_way_for_examples_that_fit_and_for_no_frame() {
        let root = tempfile::tempdir().unwrap();
        let open = || Examples::open(root.path().to_owned(), 40, 2).unwrap();
        let examples = open();
        let add = async |bytes: &'static [u8]| {
            examples.add("door", "open", Bytes::from_static(bytes), Bytes::from_static(bytes)).await
        };
        let (first, _) = add(b"0123456789").await.unwrap();
        examples.keep_features("door", &first.id, vec![7; 15]).await;
        examples.shared.keep_unsure("door", Reason::Unsure, 1.0, b"a frame").unwrap();
        let there = || (examples.features("door", &first.id).is_some(), examples.unsure("door").unwrap().len());
        assert_eq!((there(), examples.bytes().0), ((true, 1), 32));

        // 10 bytes of example and 31 more are over the budget whatever is deleted.
        let full = add(b"thirty-one bytes, one too many!").await;
        assert!(matches!(full, Err(ExampleError::Full { .. })), "{full:?}");
        assert_eq!(there(), (true, 1), "nothing is deleted for what can never fit");

        examples.shared.keep_unsure("door", Reason::Unsure, 2.0, b"fourteen bytes").unwrap();
        assert_eq!((there(), examples.bytes().0), ((true, 1), 39), "the frame before made way, the features did not");
        let full = examples.shared.keep_unsure("door", Reason::Unsure, 3.0, b"a frame of 18 byte");
        assert!(matches!(full, Err(ExampleError::Full { .. })), "{full:?}");
        assert_eq!(there(), (true, 1));

        add(b"twelve bytes").await.unwrap();
        assert_eq!((there(), examples.bytes().0), ((false, 1), 36), "features go before frames");
        assert!(open().features("door", &first.id).is_none());
    }
}
