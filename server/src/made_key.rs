//! The admin key of a server that was given none: made anew at each start, in a file that its user alone can read.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

/// Where the server that listens on `port` writes its key unless a flag says where: the folder that systemd or the user's
/// session gave it, or the one for temporary files.
pub fn default_path(port: u16) -> PathBuf {
    let given = ["RUNTIME_DIRECTORY", "XDG_RUNTIME_DIR"].into_iter().filter_map(std::env::var_os);
    let folder = given.map(PathBuf::from).find(|folder| folder.is_dir()).unwrap_or_else(std::env::temp_dir);
    folder.join(format!("butterflyvit-{port}.admin-key"))
}

/// Makes a key and writes it to `path` with mode 0600, in place of what was there.
///
/// # Errors
/// When the folder is missing, cannot be written to, or holds another user's file of that name.
pub fn make(path: &Path) -> io::Result<String> {
    let mut random = [0; 32];
    getrandom::fill(&mut random).map_err(|error| io::Error::other(error.to_string()))?;
    let key: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // Moved into place, so that it never is a link or a file that somebody else has prepared, nor half a key. Temporary
    // files have mode 0600.
    let mut file = NamedTempFile::new_in(folder)?;
    writeln!(file, "{key}")?;
    file.persist(path).map_err(|error| error.error)?;
    Ok(key)
}

/// The key that a server wrote to `path`.
///
/// # Errors
/// When there is none, or this user may not read it.
pub fn read(path: &Path) -> io::Result<String> {
    Ok(std::fs::read_to_string(path)?.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    #[test]
    fn a_key_is_new_and_for_its_user_alone() {
        let folder = tempfile::tempdir().unwrap();
        let (path, elsewhere) = (folder.path().join("key"), folder.path().join("elsewhere"));
        let first = make(&path).unwrap();
        assert_eq!(read(&path).unwrap(), first);
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        assert_ne!(make(&path).unwrap(), first);

        std::fs::remove_file(&path).unwrap();
        std::fs::write(&elsewhere, "unchanged").unwrap();
        symlink(&elsewhere, &path).unwrap();
        let third = make(&path).unwrap();
        assert_eq!(std::fs::read_to_string(&elsewhere).unwrap(), "unchanged", "no link is followed");
        assert_eq!(read(&path).unwrap(), third);
        assert!(make(&folder.path().join("no/such/folder")).is_err());
    }
}
