//! Keeps the model store and the registry in step: what is uploaded, deleted or changed by hand on the disk becomes
//! known here, and nowhere else is the store written to.
//!
//! Every change is one closure on a pool of one thread: changes of files and index happen together, one at a time,
//! and also when the client that asked for them has gone.

use std::collections::HashSet;
use std::fs::{File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, bail};
use model_core::artifact::store_layout;
use tokio_util::sync::CancellationToken;

use crate::sentence::sentence;
use crate::sets::descriptor::{
    BackboneDescriptor, Location, SetDescriptor, check_backbone, check_set, describe_backbone, describe_set,
};
use crate::sets::loaded::SetRegistry;
use crate::sets::registry::{SetError, SetState};
use crate::sets::store::{self, Broken, Contents};
use crate::sets::upload::{self, Upload};
use crate::threads::{BlockingPool, Panicked, Priority};

/// Why the store was not changed.
#[derive(Debug, thiserror::Error)]
pub enum CatalogError {
    /// There is no store.
    #[error("this server runs its embedded model; start it with --model-store to change expert sets")]
    Embedded,
    /// The store may not be written to.
    #[error("the model store is read-only for this server")]
    ReadOnly,
    /// The disk has no room.
    #[error("the disk of the model store is full")]
    DiskFull,
    /// The artifact is broken.
    #[error("{0}")]
    Invalid(String),
    #[error(transparent)]
    Set(#[from] SetError),
    /// The disk fails, or the server has a bug.
    #[error("{0}")]
    Internal(String),
}

impl From<io::Error> for CatalogError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::DiskFull,
            io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::PermissionDenied => Self::ReadOnly,
            _ => Self::Internal(error.to_string()),
        }
    }
}

impl From<Panicked> for CatalogError {
    fn from(panicked: Panicked) -> Self {
        Self::Internal(panicked.to_string())
    }
}

/// The folder of the store cannot be read.
fn unreadable(error: anyhow::Error) -> CatalogError {
    CatalogError::Internal(sentence(&error))
}

/// The model store beside the registry; clones share it.
#[derive(Clone)]
pub struct Catalog {
    shared: Arc<Shared>,
    files: BlockingPool,
}

struct Shared {
    /// `None` for the embedded model, which cannot change.
    root: Option<PathBuf>,
    /// The store's folder, locked for this server alone as long as it is open; `None` where nothing can be written.
    _lock: Option<File>,
    registry: SetRegistry,
    broken: Mutex<Vec<Broken>>,
}

impl Catalog {
    /// Registers what the store holds. Blocking.
    ///
    /// # Errors
    /// When the store's folder cannot be read; a broken file is only listed.
    pub fn open(root: Option<PathBuf>, registry: SetRegistry) -> anyhow::Result<Self> {
        let lock = root.as_deref().map(lock).transpose()?.flatten();
        let contents = match &root {
            Some(root) => {
                upload::remove_leftovers(root);
                let contents = store::scan(root)?;
                if lock.is_some() && contents.is_empty() {
                    store::seed(root).with_context(|| format!("{}: seeding the empty store", root.display()))?;
                    tracing::info!(store = %root.display(), "the model store was empty, and has the embedded models now");
                    store::scan(root)?
                } else {
                    contents
                }
            }
            None => store::embedded()?,
        };
        let broken = register(&registry, contents);
        for file in &broken {
            tracing::warn!(reason = file.reason, "a file of the model store is left out");
        }
        let files = BlockingPool::start("files", 1, Priority::Background).context("threads")?;
        let shared = Shared { root, _lock: lock, registry, broken: Mutex::new(broken) };
        Ok(Self { shared: Arc::new(shared), files })
    }

    /// Files of the store that are not registered, with the reason.
    pub fn broken(&self) -> Vec<Broken> {
        self.shared.broken().clone()
    }

    /// How many files of the store are not registered.
    pub fn broken_count(&self) -> usize {
        self.shared.broken().len()
    }

    /// An empty upload to write to.
    ///
    /// # Errors
    /// [`CatalogError::Embedded`]; [`CatalogError::ReadOnly`]; [`CatalogError::DiskFull`].
    pub async fn begin_upload(&self) -> Result<Upload, CatalogError> {
        self.change(|shared| Ok(Upload::create(shared.root()?)?)).await
    }

    /// Checks an upload from its first byte to its last, gives it its place and registers it. Returns whether
    /// that version is new.
    ///
    /// # Errors
    /// [`CatalogError::Invalid`] when it is not a sound expert set; [`CatalogError::Set`] when its backbone is not here,
    /// borrows the experts of a set that is not here, replaces one whose experts are borrowed,
    /// or can never fit the budget; [`CatalogError::DiskFull`]. The store is then as before.
    pub async fn publish(&self, upload: Upload, name: &str, version: u64) -> Result<bool, CatalogError> {
        self.publish_as(upload, name, move |_, _| Ok(version)).await.map(|(_, is_new)| is_new)
    }

    /// As [`Catalog::publish`], as the version after the highest one. A set that `was_known` and is no more was deleted, and
    /// stays so. Returns the version.
    ///
    /// # Errors
    /// Those of [`Catalog::publish`]; [`SetError::Conflict`] when the set was deleted.
    pub async fn publish_next(&self, upload: Upload, name: &str, was_known: bool) -> Result<u64, CatalogError> {
        let next = move |registry: &SetRegistry, name: &str| match registry.highest_version(name) {
            None if was_known => Err(SetError::Conflict(format!("expert set `{name}` was deleted meanwhile"))),
            highest => highest.unwrap_or(0).checked_add(1).ok_or_else(|| {
                SetError::Conflict(format!("expert set `{name}` has the highest version that there can be"))
            }),
        };
        self.publish_as(upload, name, next).await.map(|(version, _)| version)
    }

    /// Publishes under the version that is due when it takes its place; also returns whether that is new.
    async fn publish_as(
        &self,
        mut upload: Upload,
        name: &str,
        version: impl Fn(&SetRegistry, &str) -> Result<u64, SetError> + Send + 'static,
    ) -> Result<(u64, bool), CatalogError> {
        upload.sync().await?;
        let name = name.to_owned();
        let (upload, descriptor, version) = self
            .change(move |shared| {
                let due = version(&shared.registry, &name)?;
                let descriptor = describe_upload(&shared.registry, &upload, &name, due)?;
                Ok((upload, descriptor, version))
            })
            .await?;
        let memory = self.shared.registry.reserve_reading(&descriptor).await?;
        self.change(move |shared| {
            let _memory = memory;
            let due = version(&shared.registry, &descriptor.name)?;
            let is_new = shared.publish(upload, SetDescriptor { version: due, ..descriptor })?;
            Ok((due, is_new))
        })
        .await
    }

    /// Checks an upload from its first byte to its last, gives it its place as a backbone and registers it. One with the
    /// same contents that is here already stays as it is, whatever its name. Returns the backbone, and whether it is new.
    ///
    /// # Errors
    /// [`CatalogError::Invalid`] when it is no sound backbone; [`CatalogError::Set`] when another has its name, or when it
    /// can never fit the budget; [`CatalogError::DiskFull`]. The store is then as before.
    pub async fn publish_backbone(
        &self,
        mut upload: Upload,
        name: &str,
    ) -> Result<(Arc<BackboneDescriptor>, bool), CatalogError> {
        upload.sync().await?;
        let name = name.to_owned();
        let (upload, backbone) = self
            .change(move |_| {
                let location = Location::File(upload.path().to_owned());
                let backbone = describe_backbone(&name, &location).map_err(|error| invalid(&upload, error))?;
                Ok((upload, backbone))
            })
            .await?;
        let memory =
            self.shared.registry.reserve_beside(&backbone.digest, &backbone.name, backbone.loading_bytes).await?;
        self.change(move |shared| {
            let _memory = memory;
            shared.publish_backbone(upload, backbone)
        })
        .await
    }

    /// Forgets a version of a set, or all of them, and deletes the files. Returns what is gone.
    ///
    /// # Errors
    /// [`CatalogError::Set`] when it is unknown or pinned, or its experts are borrowed; [`CatalogError::ReadOnly`].
    pub async fn delete(&self, name: &str, version: Option<u64>) -> Result<Vec<Arc<SetDescriptor>>, CatalogError> {
        let name = name.to_owned();
        self.change(move |shared| shared.delete(&name, version)).await
    }

    /// Looks again at the backbones and at one set's folder: what was changed by hand becomes known.
    ///
    /// # Errors
    /// [`CatalogError::Internal`] when a folder cannot be read.
    pub async fn refresh(&self, name: &str) -> Result<(), CatalogError> {
        let name = name.to_owned();
        self.change(move |shared| shared.refresh(&name)).await
    }

    /// Looks again at the whole store.
    ///
    /// # Errors
    /// [`CatalogError::Internal`] when a folder cannot be read.
    pub async fn refresh_all(&self) -> Result<(), CatalogError> {
        self.change(Shared::refresh_all).await
    }

    async fn change<T: Send + 'static>(
        &self,
        change: impl FnOnce(&Shared) -> Result<T, CatalogError> + Send + 'static,
    ) -> Result<T, CatalogError> {
        let shared = Arc::clone(&self.shared);
        self.files.run(move || change(&shared)).await?
    }
}

impl Shared {
    fn publish(&self, upload: Upload, descriptor: SetDescriptor) -> Result<bool, CatalogError> {
        check_upload(&self.registry, &upload, &descriptor)?;
        let (name, version) = (&descriptor.name, descriptor.version);
        let path = upload.publish(self.root()?, name, version)?;
        let known = self.registry.status(name).unwrap_or_default();
        let is_new = known.iter().all(|status| status.descriptor.version != version);
        self.broken().retain(|broken| broken.path != path);
        self.registry.register(SetDescriptor { location: Location::File(path), ..descriptor })?;
        Ok(is_new)
    }

    fn publish_backbone(
        &self,
        upload: Upload,
        backbone: BackboneDescriptor,
    ) -> Result<(Arc<BackboneDescriptor>, bool), CatalogError> {
        check_backbone(&backbone.location).map_err(|error| invalid(&upload, error))?;
        if let Some(known) = self.registry.backbone(&backbone.digest) {
            return Ok((known, false));
        }
        let BackboneDescriptor { name, digest, resident_bytes, .. } = &backbone;
        if self.registry.backbones().iter().any(|known| known.name == *name) {
            let taken = format!("another backbone is named `{name}`, and sets rest on it; choose another name");
            return Err(SetError::Conflict(taken).into());
        }
        let available = self.registry.budget().limit();
        if *resident_bytes > available {
            return Err(SetError::TooLarge { name: name.clone(), needed: *resident_bytes, available }.into());
        }
        let (digest, path) = (*digest, store_layout::backbone_path(self.root()?, name));
        upload.publish_at(&path)?;
        self.broken().retain(|broken| broken.path != path);
        self.registry.register_backbone(BackboneDescriptor { location: Location::File(path), ..backbone });
        let registered = self.registry.backbone(&digest);
        Ok((registered.ok_or_else(|| CatalogError::Internal("the backbone is not registered".into()))?, true))
    }

    fn delete(&self, name: &str, version: Option<u64>) -> Result<Vec<Arc<SetDescriptor>>, CatalogError> {
        let mut gone = self.registry.remove(name, version)?;
        // Lenders before those that borrow their experts, should they have to come back; files go the other way.
        gone.sort_by_key(|set| set.lender.is_some());
        gone.reverse();
        for (i, descriptor) in gone.iter().enumerate() {
            let Location::File(path) = &descriptor.location else { continue };
            if let Err(error) = upload::delete(path) {
                for kept in gone[i..].iter().rev() {
                    self.registry.register(SetDescriptor::clone(kept))?;
                }
                return Err(error.into());
            }
        }
        Ok(gone)
    }

    fn refresh(&self, name: &str) -> Result<(), CatalogError> {
        let Some(root) = self.root.as_ref().filter(|_| store_layout::is_valid_name(name)) else { return Ok(()) };
        let mut contents = Contents::default();
        store::scan_backbones(root, &mut contents).map_err(unreadable)?;
        store::scan_set(root, name, &mut contents).map_err(unreadable)?;
        let (sets, folder) = (store_layout::sets_folder(root), store_layout::set_folder(root, name));
        self.apply(contents, [name.to_owned()], |path| path.starts_with(&sets) && !path.starts_with(&folder));
        Ok(())
    }

    fn refresh_all(&self) -> Result<(), CatalogError> {
        let Some(root) = &self.root else { return Ok(()) };
        let contents = store::scan(root).map_err(unreadable)?;
        self.apply(contents, self.registry.names(), |_| false);
        Ok(())
    }

    /// Registers what a scan found, and forgets the versions of `names` whose files are gone. `unseen` says which
    /// files the scan did not look at.
    fn apply(&self, contents: Contents, names: impl IntoIterator<Item = String>, unseen: impl Fn(&Path) -> bool) {
        // A file that is there but broken stays registered: what is resident goes on serving.
        let mut present: HashSet<PathBuf> = contents.broken.iter().map(|broken| broken.path.clone()).collect();
        present.extend(contents.sets.iter().filter_map(|set| match &set.location {
            Location::File(path) => Some(path.clone()),
            Location::Embedded(_) => None,
        }));
        let broken = register(&self.registry, contents);
        let known = names.into_iter().flat_map(|name| self.registry.status(&name).unwrap_or_default());
        // A lender cannot go before those that borrow its experts.
        let (borrowers, owners): (Vec<_>, Vec<_>) = known.partition(|status| status.descriptor.lender.is_some());
        for status in borrowers.into_iter().chain(owners) {
            let descriptor = &status.descriptor;
            if matches!(&descriptor.location, Location::File(path) if !present.contains(path)) {
                // Refused for pinned sets and lenders, which go on serving from memory.
                let _ = self.registry.remove(&descriptor.name, Some(descriptor.version));
            }
        }
        let mut known = self.broken();
        known.retain(|file| unseen(&file.path));
        known.extend(broken);
    }

    fn root(&self) -> Result<&Path, CatalogError> {
        self.root.as_deref().ok_or(CatalogError::Embedded)
    }

    fn broken(&self) -> MutexGuard<'_, Vec<Broken>> {
        self.broken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Locks a store that can be written to: of two servers, one would delete the other's uploads and not know of its sets.
/// Servers may share a store that neither can write to.
fn lock(root: &Path) -> anyhow::Result<Option<File>> {
    if tempfile::tempfile_in(root).is_err() {
        return Ok(None);
    }
    let folder = File::open(root).with_context(|| root.display().to_string())?;
    match folder.try_lock() {
        Ok(()) => Ok(Some(folder)),
        Err(TryLockError::WouldBlock) => {
            bail!("{}: another server uses this model store; give each a store of its own", root.display())
        }
        // Some file systems have no locks.
        Err(TryLockError::Error(error)) => {
            tracing::warn!(%error, store = %root.display(), "the model store cannot be locked: let no other server use it");
            Ok(None)
        }
    }
}

/// Looks at the store every `interval` until `shutdown`.
pub async fn watch(catalog: Catalog, interval: Duration, shutdown: CancellationToken) {
    while tokio::time::timeout(interval, shutdown.cancelled()).await.is_err() {
        if let Err(error) = catalog.refresh_all().await {
            tracing::warn!(%error, "cannot look at the model store");
        }
    }
}

/// Whether a new file for `version` replaces what is in memory: it should then be loaded at once, or requests would go
/// on getting the old one.
pub fn replaces_resident(registry: &SetRegistry, name: &str, version: u64) -> bool {
    let statuses = registry.status(name).unwrap_or_default();
    statuses.iter().filter(|status| status.state == SetState::Resident).any(|status| {
        let resident = status.descriptor.version;
        resident == version || (status.current && resident < version)
    })
}

/// Registers backbones and sets; returns what is broken, sets for unknown backbones included.
fn register(registry: &SetRegistry, contents: Contents) -> Vec<Broken> {
    let mut broken = contents.broken;
    contents.backbones.into_iter().for_each(|backbone| registry.register_backbone(backbone));
    // Lenders before those that borrow their experts.
    let (borrowers, owners): (Vec<_>, Vec<_>) = contents.sets.into_iter().partition(|set| set.lender.is_some());
    for set in owners.into_iter().chain(borrowers) {
        let location = set.location.clone();
        if let Err(error) = registry.register(set) {
            broken.push(Broken { path: location.to_string().into(), reason: format!("{location}: {error}") });
        }
    }
    broken
}

/// The error without the upload's place on the disk, which is none of the client's business.
fn invalid(upload: &Upload, error: anyhow::Error) -> CatalogError {
    CatalogError::Invalid(sentence(&error).replace(&upload.path().display().to_string(), "the upload"))
}

/// Describes an upload from its header, and checks that it could ever be loaded.
fn describe_upload(
    registry: &SetRegistry,
    upload: &Upload,
    name: &str,
    version: u64,
) -> Result<SetDescriptor, CatalogError> {
    let location = Location::File(upload.path().to_owned());
    let descriptor = describe_set(name, version, &location).map_err(|error| invalid(upload, error))?;
    registry.check_place(&descriptor)?;
    registry.check_fits(&descriptor)?;
    Ok(descriptor)
}

/// Checks an upload from its first byte to its last.
fn check_upload(registry: &SetRegistry, upload: &Upload, descriptor: &SetDescriptor) -> Result<(), CatalogError> {
    // Once more: the store may have changed since it was described.
    registry.check_place(descriptor)?;
    let SetDescriptor { name, backbone, location, .. } = descriptor;
    let missing = || SetError::NoBackbone { name: name.clone(), backbone: *backbone };
    let backbone = registry.backbone(backbone).ok_or_else(missing)?;
    let lender = descriptor.lender.and_then(|lender| registry.lender(&lender));
    check_set(location, &backbone, lender.as_deref()).map_err(|error| invalid(upload, error))
}
