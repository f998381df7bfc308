//! An artifact on its way into the store: written to a temporary file beside its destination, so that readers see
//! either the old file or the whole new one.

use std::fs::{self, File, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use tempfile::{NamedTempFile, TempPath};
use tokio::io::AsyncWriteExt;

use model_core::artifact::store_layout::{set_path, sets_folder};

/// Begins the names of temporary files. Starts with a dot, and does not end as artifacts do: never part of a store.
const PREFIX: &str = ".upload-";

/// A temporary file, deleted when dropped unless [`Upload::publish`] gave it its place.
pub struct Upload {
    file: tokio::fs::File,
    path: TempPath,
}

impl Upload {
    /// An empty temporary file in the store at `root`. Blocking.
    ///
    /// # Errors
    /// When the folder or the file cannot be made.
    pub fn create(root: &Path) -> io::Result<Self> {
        let sets = sets_folder(root);
        fs::create_dir_all(&sets)?;
        // Readable as other files of the store are; the process's umask still applies.
        let (file, path) = tempfile::Builder::new()
            .prefix(PREFIX)
            .permissions(Permissions::from_mode(0o644))
            .tempfile_in(sets)?
            .into_parts();
        Ok(Self { file: tokio::fs::File::from_std(file), path })
    }

    /// Where it is for now.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// # Errors
    /// When the disk is full or broken.
    pub async fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all(bytes).await
    }

    /// Waits until everything written has reached the disk.
    ///
    /// # Errors
    /// When the disk is full or broken.
    pub async fn sync(&mut self) -> io::Result<()> {
        self.file.flush().await?;
        self.file.sync_all().await
    }

    /// Gives the file its place as a version of a set, replacing what is there, and returns that place. Survives a
    /// power cut once it has returned, provided that [`Upload::sync`] came before. Blocking.
    ///
    /// # Errors
    /// When the folder cannot be made or the file not be moved.
    pub fn publish(self, root: &Path, name: &str, version: u64) -> io::Result<PathBuf> {
        let path = set_path(root, name, version);
        self.publish_at(&path)?;
        Ok(path)
    }

    /// As [`Upload::publish`], at any place of the store.
    ///
    /// # Errors
    /// When the folder cannot be made or the file not be moved.
    pub fn publish_at(self, path: &Path) -> io::Result<()> {
        let folder = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
        fs::create_dir_all(folder)?;
        self.path.persist(path).map_err(|error| error.error)?;
        // The entries of file and folder are data of the folders they are in.
        sync_folder(folder)?;
        folder.parent().map_or(Ok(()), sync_folder)
    }
}

/// Writes a file of the store that is not there yet, by way of a temporary one. Blocking.
///
/// # Errors
/// When it is there already, or cannot be written.
pub fn put(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let folder = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
    let file = temporary(folder, bytes)?;
    file.as_file().sync_all()?;
    file.persist_noclobber(path).map_err(|error| error.error)?;
    sync_folder(folder)?;
    folder.parent().map_or(Ok(()), sync_folder)
}

/// Writes a file whole, in the place of what is there, by way of a temporary one, without waiting for the disk: for what can be
/// made again, and whose damage shows. Blocking.
///
/// # Errors
/// When it cannot be written.
pub fn put_lightly(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let file = temporary(path.parent().ok_or(io::ErrorKind::InvalidInput)?, bytes)?;
    file.persist(path).map(drop).map_err(|error| error.error)
}

/// A temporary file with these bytes in a folder, which is made if it is not there.
fn temporary(folder: &Path, bytes: &[u8]) -> io::Result<NamedTempFile> {
    fs::create_dir_all(folder)?;
    let mut file =
        tempfile::Builder::new().prefix(PREFIX).permissions(Permissions::from_mode(0o644)).tempfile_in(folder)?;
    file.write_all(bytes)?;
    Ok(file)
}

/// Moves a file to a place that is not taken yet, making its folder. The old folder goes with its last file. Blocking.
///
/// # Errors
/// When the folder cannot be made or the file not be moved.
pub fn rename(from: &Path, to: &Path) -> io::Result<()> {
    let folder = to.parent().ok_or(io::ErrorKind::InvalidInput)?;
    fs::create_dir_all(folder)?;
    fs::rename(from, to)?;
    sync_folder(folder)?;
    folder.parent().map_or(Ok(()), sync_folder)?;
    // What is not there any more is deleted already; its folder may be empty now.
    delete(from)
}

/// Deletes a version of a set, and its folder when it was the last. Blocking.
///
/// # Errors
/// When the file is there and cannot be deleted.
pub fn delete(path: &Path) -> io::Result<()> {
    delete_lightly(path)?;
    let Some(folder) = path.parent() else { return Ok(()) };
    // Refused when other files are left, as it should be.
    if fs::remove_dir(folder).is_ok() {
        return folder.parent().map_or(Ok(()), sync_folder);
    }
    sync_folder(folder)
}

/// Deletes a file that may come back after a power cut. Blocking.
pub fn delete_lightly(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Deletes what uploads left behind that a crash or a power cut interrupted. Blocking. Only for the one process that
/// writes to the store, before it does.
pub fn remove_leftovers(root: &Path) {
    remove_temporary(&sets_folder(root));
}

/// Deletes the temporary files of a folder. Blocking.
pub fn remove_temporary(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with(PREFIX) {
            match fs::remove_file(entry.path()) {
                Ok(()) => tracing::info!(file = %entry.path().display(), "removed an interrupted upload"),
                Err(error) => tracing::warn!(file = %entry.path().display(), %error, "cannot remove"),
            }
        }
    }
}

fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}
