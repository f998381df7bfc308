//! Artifacts in a model store: `backbones/<name>.safetensors` and `expert-sets/<set>/<version>.safetensors`, the
//! layout that the server reads.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use model_core::artifact::{
    BackboneArtifact, Digest, ExpertSetArtifact, read_backbone, read_expert_set, read_file, store_layout,
    write_backbone, write_expert_set,
};
use model_core::config::BackboneConfig;
use model_core::image::Preprocess;
use model_core::weights::{BackboneWeights, ExpertSetWeights};
use serde_json::Value;

use crate::files::{create_folder, write_atomically};

/// A model store on the disk.
#[derive(Debug, Clone)]
pub struct Store {
    root: PathBuf,
}

impl Store {
    /// The store in the folder `root`, which need not exist yet.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// Where the backbone of that name is.
    pub fn backbone_path(&self, name: &str) -> PathBuf {
        store_layout::backbone_path(&self.root, name)
    }

    /// Where that version of an expert set is.
    pub fn set_path(&self, name: &str, version: u64) -> PathBuf {
        store_layout::set_path(&self.root, name, version)
    }

    /// Writes a backbone, and returns its path and digest.
    ///
    /// # Errors
    /// When the name is no file name, the weights are not finite, or the file cannot be written.
    pub fn write_backbone(
        &self,
        name: &str,
        weights: &BackboneWeights,
        preprocess: &Preprocess,
        training: &Value,
    ) -> Result<(PathBuf, Digest)> {
        let bytes = write_backbone(name, weights, preprocess, training).context("packing the backbone")?;
        let path = self.put_backbone(name, &bytes)?;
        Ok((path, read_backbone(&bytes).context("reading back the backbone")?.digest))
    }

    /// Writes the bytes of a backbone, and returns their path.
    ///
    /// # Errors
    /// When the name is no file name, or the file cannot be written.
    pub fn put_backbone(&self, name: &str, bytes: &[u8]) -> Result<PathBuf> {
        check_name(name)?;
        let path = self.backbone_path(name);
        put(&path, bytes)?;
        Ok(path)
    }

    /// Writes the bytes of a version of an expert set, and returns their path.
    ///
    /// # Errors
    /// When the name is no file name, or the file cannot be written.
    pub fn put_set(&self, name: &str, version: u64, bytes: &[u8]) -> Result<PathBuf> {
        check_name(name)?;
        let path = self.set_path(name, version);
        put(&path, bytes)?;
        Ok(path)
    }

    /// Writes an expert set bound to the given backbone, and returns its path.
    pub fn write_set(
        &self,
        name: &str,
        version: u64,
        weights: &ExpertSetWeights,
        backbone: (&BackboneConfig, Digest),
        training: &Value,
    ) -> Result<PathBuf> {
        let bytes = write_expert_set(name, weights, backbone, training).context("packing the expert set")?;
        self.put_set(name, version, &bytes)
    }

    /// The version after the highest one there is of an expert set; 1 for a new one.
    pub fn next_version(&self, name: &str) -> u64 {
        let files = fs::read_dir(store_layout::set_folder(&self.root, name)).into_iter().flatten().flatten();
        let version = |file: fs::DirEntry| file.path().file_stem()?.to_str()?.parse::<u64>().ok();
        files.filter_map(version).max().map_or(1, |highest| highest + 1)
    }
}

fn put(path: &Path, bytes: &[u8]) -> Result<()> {
    path.parent().map_or(Ok(()), create_folder)?;
    write_atomically(path, bytes)
}

fn check_name(name: &str) -> Result<()> {
    ensure!(store_layout::is_valid_name(name), "{name:?} is no name: {}", store_layout::NAME_RULE);
    Ok(())
}

/// Reads a backbone from a file.
///
/// # Errors
/// When the file cannot be read or is no valid backbone.
pub fn load_backbone(path: &Path) -> Result<BackboneArtifact> {
    let bytes = read_file(path).with_context(|| path.display().to_string())?;
    read_backbone(&bytes).with_context(|| path.display().to_string())
}

/// Reads an expert set from a file and checks that it belongs to `backbone`.
///
/// # Errors
/// When the file cannot be read, is no valid set, or is one of another backbone.
pub fn load_set(path: &Path, backbone: &BackboneArtifact) -> Result<ExpertSetArtifact> {
    let read = || -> Result<ExpertSetArtifact> {
        let set = read_expert_set(&read_file(path)?)?;
        set.check_backbone(&backbone.weights.config, backbone.digest)?;
        Ok(set)
    };
    read().with_context(|| path.display().to_string())
}

/// [`load_set`] of a set that has experts of its own, to start or to learn from.
///
/// # Errors
/// Those of [`load_set`], and for a set that borrows its experts.
pub fn load_own_set(path: &Path, backbone: &BackboneArtifact) -> Result<ExpertSetArtifact> {
    let set = load_set(path, backbone)?;
    if let Some(lender) = set.borrowed_experts {
        bail!("{}: it borrows its experts; give the set that lends them, {lender}", path.display());
    }
    Ok(set)
}

/// [`load_set`] with the experts of the set in the file `lender`, if it borrows them.
///
/// # Errors
/// Those of [`load_set`], and when the lender is missing or is not the one that the set names.
pub fn load_complete_set(path: &Path, lender: Option<&Path>, backbone: &BackboneArtifact) -> Result<ExpertSetArtifact> {
    let mut set = load_set(path, backbone)?;
    let lender = lender.map(|path| load_set(path, backbone)).transpose()?;
    set.check_lender(lender.as_ref().map(ExpertSetArtifact::as_lender)).with_context(|| path.display().to_string())?;
    if let Some(lender) = lender.filter(|_| set.borrowed_experts.is_some()) {
        set.weights.layers = lender.weights.layers;
    }
    Ok(set)
}

#[cfg(test)]
mod tests {
    use super::*;
    use model_core::config::ViTConfig;
    use training::vit::ViT;

    #[test]
    fn what_is_written_is_found_and_read() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::new(folder.path());
        let vit = ViT::init(&ViTConfig::preset("tiny").unwrap(), 1).unwrap();
        let labels: Vec<String> = (0..5).map(|i| i.to_string()).collect();
        let (backbone, set) = vit.to_weights(&labels).unwrap();
        let (path, digest) = store.write_backbone("b", &backbone, &Preprocess::default(), &Value::Null).unwrap();
        assert_eq!(store.next_version("s"), 1);
        let set_path = store.write_set("s", 1, &set, (&backbone.config, digest), &Value::Null).unwrap();
        assert_eq!(store.next_version("s"), 2);
        let loaded = load_backbone(&path).unwrap();
        assert_eq!(loaded.weights, backbone);
        assert_eq!(load_set(&set_path, &loaded).unwrap().weights, set);
        for name in ["", "../x", "a/b", ".hidden"] {
            assert!(store.write_set(name, 1, &set, (&backbone.config, digest), &Value::Null).is_err(), "{name}");
        }
    }
}
