//! The model store: a folder of artifacts, or the models embedded in this program.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;
use model_core::artifact::store_layout::{
    NAME_RULE, backbone_path, backbones_folder, is_artifact, is_valid_name, parse_version, set_folder, set_path,
    sets_folder,
};

use crate::included;
use crate::pages::Included;
use crate::sentence::sentence;
use crate::sets::descriptor::{BackboneDescriptor, Location, SetDescriptor, describe_backbone, describe_set};
use crate::sets::upload;

/// Version of the embedded expert sets.
const EMBEDDED_VERSION: u64 = 1;
/// The embedded set that answers where a request names none.
pub const EMBEDDED_DEFAULT: &str = "imagenet";

/// An artifact that is part of this program, by name.
pub type Embedded = (&'static str, &'static [u8]);

/// The one for photographs, and that of the paper's kind.
static BACKBONES: [(&str, Included); 2] = [
    ("photo", included!("../../../models/photo-backbone.safetensors")),
    ("default", included!("../../../models/default-backbone.safetensors")),
];
static SETS: [(&str, Included); 2] = [
    (EMBEDDED_DEFAULT, included!("../../../models/imagenet.safetensors")),
    ("cifar100", included!("../../../models/cifar100.safetensors")),
];

/// A file that could not be registered.
#[derive(Debug, Clone)]
pub struct Broken {
    pub path: PathBuf,
    /// Why, naming the file.
    pub reason: String,
}

impl Broken {
    /// The file's place within its folder, without telling clients where the store is.
    pub fn file_name(&self) -> String {
        let parts: Vec<_> =
            self.path.components().rev().take(2).map(|part| part.as_os_str().to_string_lossy()).collect();
        parts.into_iter().rev().collect::<Vec<_>>().join("/")
    }
}

/// What a store holds, by the headers of its files.
#[derive(Debug, Default)]
pub struct Contents {
    pub backbones: Vec<BackboneDescriptor>,
    /// Expert sets, whatever backbone they name.
    pub sets: Vec<SetDescriptor>,
    /// Files that are neither.
    pub broken: Vec<Broken>,
}

impl Contents {
    /// Whether there is nothing at all.
    pub fn is_empty(&self) -> bool {
        self.backbones.is_empty() && self.sets.is_empty() && self.broken.is_empty()
    }
}

/// Writes the embedded models into the store. Sets come last, so that one that is there has its backbone. Blocking.
///
/// # Errors
/// When a file cannot be written.
pub fn seed(root: &Path) -> std::io::Result<()> {
    BACKBONES.iter().try_for_each(|(name, file)| upload::put(&backbone_path(root, name), file.bytes()))?;
    SETS.iter().try_for_each(|(name, file)| upload::put(&set_path(root, name, EMBEDDED_VERSION), file.bytes()))
}

/// The embedded backbone of that name.
pub fn embedded_backbone(name: &str) -> Option<Embedded> {
    BACKBONES.into_iter().find(|(own, _)| *own == name).map(|(name, file)| (name, file.bytes()))
}

/// # Errors
/// When an embedded model is broken, which only a broken build can be.
pub fn embedded() -> anyhow::Result<Contents> {
    let backbones = BACKBONES.iter().map(|(name, file)| describe_backbone(name, &Location::Embedded(*file)));
    let sets = SETS.iter().map(|(name, file)| describe_set(name, EMBEDDED_VERSION, &Location::Embedded(*file)));
    Ok(Contents {
        backbones: backbones.collect::<Result<_, _>>()?,
        sets: sets.collect::<Result<_, _>>()?,
        broken: Vec::new(),
    })
}

/// The embedded artifacts with their names: backbones, then expert sets.
pub fn embedded_bytes() -> impl Iterator<Item = Embedded> {
    BACKBONES.into_iter().chain(SETS).map(|(name, file)| (name, file.bytes()))
}

/// Looks at every file of the store in `root`, headers only.
///
/// # Errors
/// When the folder itself cannot be read. A broken file is not an error; it is listed.
pub fn scan(root: &Path) -> anyhow::Result<Contents> {
    let mut contents = Contents::default();
    fs::read_dir(root).with_context(|| root.display().to_string())?;
    scan_backbones(root, &mut contents)?;
    for folder in entries(&sets_folder(root))?.into_iter().filter(|path| path.is_dir()) {
        match folder.file_name().and_then(|name| name.to_str()).filter(|name| is_valid_name(name)) {
            Some(name) => scan_set(root, name, &mut contents)?,
            None => {
                let reason = format!("{}: {}", folder.display(), NAME_RULE);
                contents.broken.push(Broken { path: folder, reason });
            }
        }
    }
    Ok(contents)
}

/// Looks at every backbone.
///
/// # Errors
/// When their folder cannot be read.
pub fn scan_backbones(root: &Path, contents: &mut Contents) -> anyhow::Result<()> {
    for path in artifacts(&backbones_folder(root))? {
        let described = name_of(&path).and_then(|name| describe_backbone(&name, &Location::File(path.clone())));
        match described {
            Ok(backbone) => contents.backbones.push(backbone),
            Err(error) => contents.broken.push(Broken { path, reason: sentence(&error) }),
        }
    }
    Ok(())
}

/// Looks at every version of one set.
///
/// # Errors
/// When its folder cannot be read.
pub fn scan_set(root: &Path, name: &str, contents: &mut Contents) -> anyhow::Result<()> {
    for path in artifacts(&set_folder(root, name))? {
        let described =
            version_of(&path).and_then(|version| describe_set(name, version, &Location::File(path.clone())));
        match described {
            Ok(set) => contents.sets.push(set),
            Err(error) => contents.broken.push(Broken { path, reason: sentence(&error) }),
        }
    }
    Ok(())
}

fn name_of(path: &Path) -> anyhow::Result<String> {
    let stem = path.file_stem().and_then(|stem| stem.to_str()).filter(|name| is_valid_name(name));
    stem.map(str::to_owned).with_context(|| format!("{}: {NAME_RULE}", path.display()))
}

fn version_of(path: &Path) -> anyhow::Result<u64> {
    let stem = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
    parse_version(stem).with_context(|| format!("{}: the file name must be a whole version number", path.display()))
}

/// The `.safetensors` files of a folder by name; none when it does not exist.
fn artifacts(folder: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut paths = entries(folder)?;
    paths.retain(|path| is_artifact(path));
    Ok(paths)
}

fn entries(folder: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let read = match fs::read_dir(folder) {
        Ok(read) => read,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).with_context(|| folder.display().to_string()),
    };
    let mut paths: Vec<PathBuf> = read.filter_map(|entry| entry.ok().map(|entry| entry.path())).collect();
    paths.sort();
    Ok(paths)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guarantee_13_junk_in_the_store_is_listed_not_fatal() {
        let root = tempfile::tempdir().unwrap();
        assert!(scan(&root.path().join("missing")).is_err());
        assert!(scan(root.path()).unwrap().broken.is_empty(), "an empty store is a store");
        for (path, bytes) in [
            ("backbones/b.safetensors", "junk"),
            ("backbones/notes.txt", "not looked at"),
            ("expert-sets/s/1.safetensors", ""),
            ("expert-sets/s/01.safetensors", "junk"),
            ("expert-sets/s/latest.safetensors", "junk"),
            ("expert-sets/bad name/1.safetensors", "junk"),
        ] {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, bytes).unwrap();
        }
        let contents = scan(root.path()).unwrap();
        let mut broken: Vec<_> = contents.broken.iter().map(Broken::file_name).collect();
        broken.sort();
        let expected = [
            "backbones/b.safetensors",
            "expert-sets/bad name",
            "s/01.safetensors",
            "s/1.safetensors",
            "s/latest.safetensors",
        ];
        assert_eq!(broken, expected);
    }
}
