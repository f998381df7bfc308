//! The store that a taught set goes to, and the backbone that it is taught on.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, bail};
use model_core::artifact::store_layout::{
    backbone_path, is_artifact, is_valid_name, parse_version, set_folder, set_path,
};
use model_core::artifact::{BackboneArtifact, read_backbone};
use model_core::engine::{Backbone, ExpertSet};
use model_core::kernels::Isa;
use model_core::weights::Background;

use crate::sets::descriptor::{Location, SetDescriptor, describe_set};
use crate::sets::{store, upload};

/// The embedded backbone to teach on where nothing else is named.
const EMBEDDED_FOR_PHOTOGRAPHS: &str = "photo";

/// A store, or a server's.
pub(super) struct Place {
    root: Option<PathBuf>,
}

/// The set whose experts are borrowed.
pub(super) struct Lender {
    pub(super) set: Arc<ExpertSet>,
    pub(super) descriptor: SetDescriptor,
}

/// The backbone to teach on.
pub(super) struct Source {
    pub(super) backbone: Arc<Backbone>,
    pub(super) weights_background: Option<Background>,
    name: String,
    bytes: Cow<'static, [u8]>,
}

impl Place {
    /// The store in the folder `root`; without it, that of a server.
    pub(super) fn new(root: Option<&Path>) -> Self {
        Self { root: root.map(Path::to_owned) }
    }

    /// The backbone that `wanted` names: a file, one in the store, or an embedded one. Without it, the store's only one; in a
    /// store without any, and for a server, the embedded one for photographs.
    ///
    /// # Errors
    /// When there is none.
    pub(super) fn backbone(&self, wanted: Option<&str>) -> anyhow::Result<Source> {
        let (path, wanted) = match wanted {
            Some(file) if Path::new(file).is_file() => (Some(PathBuf::from(file)), ""),
            Some(name) => (self.path_in_store(name), name),
            None => (self.only_backbone()?, EMBEDDED_FOR_PHOTOGRAPHS),
        };
        let Some(path) = path else {
            let (name, bytes) = store::embedded_backbone(wanted).with_context(|| {
                format!("there is no backbone `{wanted}`: neither a file of that name, nor one in the store, nor an embedded one")
            })?;
            return source(name, Cow::Borrowed(bytes)).with_context(|| format!("the embedded backbone {name}"));
        };
        let name = path.file_stem().and_then(|stem| stem.to_str()).filter(|name| is_valid_name(name));
        let name = name.with_context(|| format!("{}: the file name is no name of a backbone", path.display()))?;
        let read = || source(name, Cow::Owned(fs::read(&path)?));
        read().with_context(|| path.display().to_string())
    }

    fn path_in_store(&self, name: &str) -> Option<PathBuf> {
        let root = self.root.as_ref().filter(|_| is_valid_name(name))?;
        Some(backbone_path(root, name)).filter(|path| path.is_file())
    }

    /// The only backbone of the store; none when it holds none.
    fn only_backbone(&self) -> anyhow::Result<Option<PathBuf>> {
        let Some(root) = &self.root else { return Ok(None) };
        let folder = model_core::artifact::store_layout::backbones_folder(root);
        let mut found = Vec::new();
        for entry in fs::read_dir(&folder).into_iter().flatten() {
            let path = entry?.path();
            if is_artifact(&path) && path.is_file() {
                found.push(path);
            }
        }
        found.sort();
        match &found[..] {
            [] => Ok(None),
            [only] => Ok(Some(only.clone())),
            several => {
                let names = several.iter().filter_map(|path| path.file_stem()?.to_str());
                bail!(
                    "the store holds several backbones; choose with --backbone: {}",
                    names.collect::<Vec<_>>().join(", ")
                )
            }
        }
    }

    /// The set that lends its experts to `set`, on this backbone; none where the backbone has no blocks. `wanted` names a file, one
    /// in the store, or an embedded one; without it, it is the lender of the newest version of `set`, and of a new set the only
    /// one that there is at all.
    ///
    /// # Errors
    /// When there is none, or more than one.
    pub(super) fn lender(&self, wanted: Option<&str>, set: &str, source: &Source) -> anyhow::Result<Option<Lender>> {
        let name = &source.name;
        if !source.backbone.config().has_blocks() {
            if wanted.is_some() {
                bail!("--base: the backbone `{name}` has no blocks, so its sets have no experts to borrow");
            }
            return Ok(None);
        }
        let fits = |set: &SetDescriptor| set.backbone == source.backbone.digest();
        let found = match wanted {
            Some(file) if Path::new(file).is_file() => vec![described(Path::new(file))?],
            Some(wanted) => self.sets()?.into_iter().filter(|known| known.name == wanted).collect(),
            None => {
                let mut found = self.sets()?;
                let newest = found.iter().filter(|known| known.name == set).max_by_key(|known| known.version);
                let before = newest.filter(|newest| fits(newest)).and_then(|newest| newest.lender);
                if let Some(at) = before.and_then(|digest| found.iter().position(|known| known.digest == digest)) {
                    return loaded(found.swap_remove(at), source).map(Some);
                }
                found
            }
        };
        if let (Some(wanted), true) = (wanted, found.is_empty()) {
            bail!(
                "--base: there is no set `{wanted}`: neither a file of that name, nor one in the store, nor an embedded one"
            );
        }
        let (lending, others): (Vec<_>, Vec<_>) = found.into_iter().partition(|set| fits(set) && set.lender.is_none());
        // Of each name the newest version, and the same experts once.
        let mut newest: BTreeMap<String, SetDescriptor> = BTreeMap::new();
        for set in lending {
            if newest.get(&set.name).is_none_or(|known| known.version < set.version) {
                newest.insert(set.name.clone(), set);
            }
        }
        let mut seen = HashSet::new();
        let mut lending: Vec<_> = newest.into_values().filter(|set| seen.insert(set.digest)).collect();
        let Some(descriptor) = lending.pop() else {
            match others.iter().find(|_| wanted.is_some()) {
                Some(set) if fits(set) => {
                    bail!("--base: the set `{}` borrows its experts itself, and lends none", set.name)
                }
                Some(set) => bail!("--base: the set `{}` is on another backbone than `{name}`", set.name),
                None => {
                    bail!("the backbone `{name}` has blocks, and there is no set on it whose experts could be borrowed")
                }
            }
        };
        if !lending.is_empty() {
            let names: Vec<_> = lending.iter().chain([&descriptor]).map(|set| &*set.name).collect();
            bail!("several sets on the backbone `{name}` have experts; choose one with --base: {}", names.join(", "));
        }
        loaded(descriptor, source).map(Some)
    }

    /// Every version of every set in the store, and the embedded ones whose names are not among them.
    fn sets(&self) -> anyhow::Result<Vec<SetDescriptor>> {
        let in_store = self.root.as_ref().filter(|root| root.is_dir()).map(|root| store::scan(root)).transpose()?;
        let mut sets = in_store.map(|contents| contents.sets).unwrap_or_default();
        let names: HashSet<String> = sets.iter().map(|set| set.name.clone()).collect();
        sets.extend(store::embedded()?.sets.into_iter().filter(|set| !names.contains(&set.name)));
        Ok(sets)
    }

    /// Copies the set whose experts are borrowed into the store, unless it is there under whatever name. Returns where it went.
    ///
    /// # Errors
    /// When another set has its name, or it cannot be written.
    pub(super) fn copy_lender(&self, lender: &Lender) -> anyhow::Result<Option<PathBuf>> {
        let (root, SetDescriptor { name, version, digest, .. }) = (self.root()?, &lender.descriptor);
        if root.is_dir() && store::scan(root)?.sets.iter().any(|set| set.digest == *digest) {
            return Ok(None);
        }
        if set_folder(root, name).exists() {
            bail!("the store has another set `{name}`; rename the file that --base names");
        }
        let path = set_path(root, name, *version);
        upload::put(&path, &lender.descriptor.location.read()?).with_context(|| path.display().to_string())?;
        Ok(Some(path))
    }

    /// Copies the backbone into the store, unless it is there under whatever name. Returns where it went.
    ///
    /// # Errors
    /// When another backbone has its name, or it cannot be written.
    pub(super) fn copy_backbone(&self, source: &Source) -> anyhow::Result<Option<PathBuf>> {
        let root = self.root()?;
        let mut contents = store::Contents::default();
        store::scan_backbones(root, &mut contents)?;
        if contents.backbones.iter().any(|backbone| backbone.digest == source.backbone.digest()) {
            return Ok(None);
        }
        let path = backbone_path(root, &source.name);
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
        let root = self.root()?;
        let folder = set_folder(root, name);
        let files = fs::read_dir(&folder).into_iter().flatten().flatten();
        let versions = files.filter_map(|file| parse_version(file.path().file_stem()?.to_str()?));
        let highest = versions.max().unwrap_or(0);
        let version = highest.checked_add(1).context("the set has the highest version there can be")?;
        let path = set_path(root, name, version);
        upload::put(&path, bytes).with_context(|| path.display().to_string())?;
        Ok((path, version))
    }

    fn root(&self) -> anyhow::Result<&Path> {
        self.root.as_deref().context("there is no store to write to")
    }
}

/// A set that lends its experts, as it is described.
fn loaded(descriptor: SetDescriptor, source: &Source) -> anyhow::Result<Lender> {
    let set = descriptor.location.read().and_then(|bytes| Ok(ExpertSet::from_bytes(&bytes, &source.backbone)?));
    let set = Arc::new(set.with_context(|| descriptor.location.to_string())?);
    Ok(Lender { set, descriptor })
}

/// A set in a file of its own, which has the file's name.
fn described(path: &Path) -> anyhow::Result<SetDescriptor> {
    let name = path.file_stem().and_then(|stem| stem.to_str()).filter(|name| is_valid_name(name));
    let name = name.with_context(|| format!("{}: the file name is no name of a set", path.display()))?;
    describe_set(name, 1, &Location::File(path.to_owned()))
}

fn source(name: &str, bytes: Cow<'static, [u8]>) -> anyhow::Result<Source> {
    let BackboneArtifact { name: own, mut weights, preprocess, digest, .. } = read_backbone(&bytes)?;
    let backbone = Backbone::from_weights(own, &weights, preprocess, digest, Isa::from_env()?)?;
    let weights_background = weights.background.take();
    Ok(Source { backbone: Arc::new(backbone), weights_background, name: name.to_owned(), bytes })
}
