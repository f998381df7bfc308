//! Labelled images as files: one subfolder for each class, which holds them directly.
//!
//! Nothing is left out without a word. Every file of a class is one of its images, whatever it is called, and reading it
//! says what it is; all else that lies about is listed as passed over. Only hidden names (`.DS_Store`) are not there.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::{fs, io};

use super::{DecodeLimits, ImageError, RgbImage, decode};

/// Bytes of an image file at most: as much as the pixels of any image that is accepted.
const MAX_FILE_BYTES: u64 = 256 << 20;
/// What archives made on macOS hold beside the files.
const MACOS: &str = "__MACOSX";

/// A folder of images by class.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageFolder {
    /// In the order of their names.
    pub classes: Vec<ClassFolder>,
    /// A sentence for each file or folder that is no image and no class.
    pub passed_over: Vec<String>,
}

/// The images of a class.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClassFolder {
    pub name: String,
    /// In the order of their names.
    pub files: Vec<PathBuf>,
}

/// Why a folder could not be listed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FolderError {
    /// The operating system does not give the names in it.
    #[error("listing {path}: {error}")]
    List {
        path: PathBuf,
        /// What the operating system says.
        error: io::Error,
    },
    /// A name that cannot be a label.
    #[error("the name of the class folder {path} is not UTF-8, so it cannot be a label; rename it")]
    Name {
        /// The folder of the class.
        path: PathBuf,
    },
}

/// Why a file did not become an image.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FileError {
    /// The file cannot be read.
    #[error("reading it: {0}")]
    Read(#[from] io::Error),
    /// The file is larger than any image.
    #[error("it has {bytes} bytes; at most {MAX_FILE_BYTES} are read")]
    TooLarge { bytes: u64 },
    /// The file is not an image, or not one that is decoded.
    #[error(transparent)]
    Decode(#[from] ImageError),
}

impl ImageFolder {
    /// Lists the classes of `folder`. When it has a subfolder `train`, they are those of the subfolder `part`, which is
    /// `train` or `test`; otherwise `folder` is whatever part it is asked for.
    ///
    /// # Errors
    /// When a folder cannot be listed, or the name of one is not UTF-8.
    pub fn list(folder: &Path, part: &str) -> Result<Self, FolderError> {
        let mut listed = Self { classes: Vec::new(), passed_over: Vec::new() };
        let has_parts = folder.join("train").is_dir();
        if has_parts {
            let parts = [folder.join("train"), folder.join("test")];
            for path in names(folder)?.into_iter().filter(|path| !parts.contains(path)) {
                listed.pass_over(&path, "beside `train` and `test` nothing is read");
            }
        }
        let root = if has_parts { folder.join(part) } else { folder.to_owned() };
        for path in names(&root)? {
            if !path.is_dir() {
                listed.pass_over(&path, "it lies beside the folders of the classes, not in one");
            } else if path.ends_with(MACOS) {
                listed.pass_over(&path, "archives made on macOS hold it beside the files; it is no class");
            } else {
                listed.add_class(path)?;
            }
        }
        Ok(listed)
    }

    fn add_class(&mut self, folder: PathBuf) -> Result<(), FolderError> {
        let mut files = Vec::new();
        for path in names(&folder)? {
            match fs::metadata(&path) {
                Ok(metadata) if metadata.is_dir() => {
                    self.pass_over(&path, "it is a folder; the images of a class lie directly in its folder");
                }
                // Reading a pipe may wait for ever.
                Ok(metadata) if !metadata.is_file() => self.pass_over(&path, "it is no regular file"),
                _ => files.push(path),
            }
        }
        match folder.file_name().and_then(|name| name.to_str()) {
            Some(name) => self.classes.push(ClassFolder { name: name.to_owned(), files }),
            None => return Err(FolderError::Name { path: folder }),
        }
        Ok(())
    }

    fn pass_over(&mut self, path: &Path, reason: &str) {
        self.passed_over.push(format!("{}: {reason}", path.display()));
    }
}

/// Paths in `folder` without hidden ones, sorted: the order of a listing differs between file systems.
fn names(folder: &Path) -> Result<Vec<PathBuf>, FolderError> {
    let failed = |error| FolderError::List { path: folder.to_owned(), error };
    let list = fs::read_dir(folder).map_err(failed)?;
    let mut names = list.map(|entry| Ok(entry?.file_name())).collect::<Result<Vec<OsString>, _>>().map_err(failed)?;
    names.retain(|name| !name.as_encoded_bytes().starts_with(b"."));
    names.sort_unstable();
    Ok(names.into_iter().map(|name| folder.join(name)).collect())
}

/// Reads and decodes a file.
///
/// # Errors
/// [`FileError`] saying what is wrong with it.
pub fn read_image(path: &Path, limits: &DecodeLimits) -> Result<RgbImage, FileError> {
    let bytes = fs::metadata(path)?.len();
    if bytes > MAX_FILE_BYTES {
        return Err(FileError::TooLarge { bytes });
    }
    Ok(decode(&fs::read(path)?, limits)?)
}
