//! The store that a taught set goes to, and the backbone that it is taught on.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, bail};
use model_core::artifact::store_layout::{
    backbone_path, is_artifact, is_valid_name, parse_version, set_folder, set_path,
};
use model_core::artifact::{BackboneArtifact, read_backbone};
use model_core::engine::Backbone;
use model_core::kernels::Isa;
use model_core::weights::Background;

use crate::sets::{store, upload};

/// The store that a set goes to, by its root folder.
pub(super) struct Place {
    root: PathBuf,
}

/// The backbone to teach on.
pub(super) struct Source {
    pub(super) backbone: Arc<Backbone>,
    pub(super) weights_background: Option<Background>,
    name: String,
    bytes: Vec<u8>,
}

impl Place {
    pub(super) fn new(root: &Path) -> Self {
        Self { root: root.to_owned() }
    }

    /// The backbone that `wanted` names, by file or by name in the store; without it the store's only one.
    ///
    /// # Errors
    /// When there is none, or it needs experts.
    pub(super) fn backbone(&self, wanted: Option<&str>) -> anyhow::Result<Source> {
        let path = match wanted {
            Some(file) if Path::new(file).is_file() => PathBuf::from(file),
            Some(name) if is_valid_name(name) && backbone_path(&self.root, name).is_file() => {
                backbone_path(&self.root, name)
            }
            Some(wanted) => {
                bail!(
                    "there is no backbone `{wanted}`: neither a file of that name, nor one in {}",
                    self.root.display()
                )
            }
            None => self.only_backbone()?,
        };
        let name = path.file_stem().and_then(|stem| stem.to_str()).filter(|name| is_valid_name(name));
        let name = name.with_context(|| format!("{}: the file name is no name of a backbone", path.display()))?;
        let read = || -> anyhow::Result<Source> {
            let bytes = fs::read(&path)?;
            let BackboneArtifact { name: own, mut weights, preprocess, digest, .. } = read_backbone(&bytes)?;
            if weights.config.has_blocks() {
                bail!(
                    "the backbone has blocks, so a set needs experts, and borrowing those of another set is not served yet; \
                     teach on a backbone without blocks, such as EfficientNet-Lite0, or use `butterflyvit-trainer specialise`"
                );
            }
            let backbone = Backbone::from_weights(own, &weights, preprocess, digest, Isa::from_env()?)?;
            let weights_background = weights.background.take();
            Ok(Source { backbone: Arc::new(backbone), weights_background, name: name.to_owned(), bytes })
        };
        read().with_context(|| path.display().to_string())
    }

    fn only_backbone(&self) -> anyhow::Result<PathBuf> {
        let folder = model_core::artifact::store_layout::backbones_folder(&self.root);
        let mut found = Vec::new();
        for entry in fs::read_dir(&folder).into_iter().flatten() {
            let path = entry?.path();
            if is_artifact(&path) && path.is_file() {
                found.push(path);
            }
        }
        found.sort();
        match &found[..] {
            [] => bail!("{} holds no backbone; name the file of one with --backbone", self.root.display()),
            [only] => Ok(only.clone()),
            several => {
                let names = several.iter().filter_map(|path| path.file_stem()?.to_str());
                bail!(
                    "the store holds several backbones; choose with --backbone: {}",
                    names.collect::<Vec<_>>().join(", ")
                )
            }
        }
    }

    /// Copies the backbone into the store, unless it is there under whatever name. Returns where it went.
    ///
    /// # Errors
    /// When another backbone has its name, or it cannot be written.
    pub(super) fn copy_backbone(&self, source: &Source) -> anyhow::Result<Option<PathBuf>> {
        let mut contents = store::Contents::default();
        store::scan_backbones(&self.root, &mut contents)?;
        if contents.backbones.iter().any(|backbone| backbone.digest == source.backbone.digest()) {
            return Ok(None);
        }
        let path = backbone_path(&self.root, &source.name);
        if path.exists() {
            bail!("the store has another backbone `{}`; rename the file that --backbone names", source.name);
        }
        upload::put(&path, &source.bytes).with_context(|| path.display().to_string())?;
        Ok(Some(path))
    }

    /// Writes a set as the version after the highest that there is.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(super) fn put(&self, name: &str, bytes: &[u8]) -> anyhow::Result<(PathBuf, u64)> {
        let folder = set_folder(&self.root, name);
        let files = fs::read_dir(&folder).into_iter().flatten().flatten();
        let versions = files.filter_map(|file| parse_version(file.path().file_stem()?.to_str()?));
        let highest = versions.max().unwrap_or(0);
        let version = highest.checked_add(1).context("the set has the highest version there can be")?;
        let path = set_path(&self.root, name, version);
        upload::put(&path, bytes).with_context(|| path.display().to_string())?;
        Ok((path, version))
    }
}
