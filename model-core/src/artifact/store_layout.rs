//! Where artifacts lie in a model store, and what they may be called. The trainer writes stores, the server reads them.
//!
//! ```text
//! STORE/backbones/NAME.safetensors
//! STORE/expert-sets/NAME/VERSION.safetensors
//! ```

use std::path::{Path, PathBuf};

use super::MAX_TEXT_BYTES;

/// Longest name of a backbone or an expert set in a store, in bytes: a file name with its ending, and no longer than what
/// an artifact may carry as its own name.
pub const MAX_NAME: usize = 200;
const _: () = assert!(MAX_NAME <= MAX_TEXT_BYTES);

/// What a name must look like, as a sentence.
pub const NAME_RULE: &str = "a name has 1 to 200 letters, digits, `-`, `_` or `.`, and does not start with a dot";

/// The ending of an artifact's file name.
pub const EXTENSION: &str = "safetensors";

/// Whether a name may appear in paths, headers and metric labels: [`NAME_RULE`].
pub fn is_valid_name(name: &str) -> bool {
    (1..=MAX_NAME).contains(&name.len())
        && !name.starts_with('.')
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
}

/// A version as it stands in paths and file names. Only one spelling is accepted: `01` and `1` would be two
/// files for one version.
pub fn parse_version(text: &str) -> Option<u64> {
    text.parse::<u64>().ok().filter(|version| version.to_string() == text)
}

/// Where the backbones are.
pub fn backbones_folder(root: &Path) -> PathBuf {
    root.join("backbones")
}

/// Where the expert sets are.
pub fn sets_folder(root: &Path) -> PathBuf {
    root.join("expert-sets")
}

/// Where the versions of a set are.
pub fn set_folder(root: &Path, name: &str) -> PathBuf {
    sets_folder(root).join(name)
}

/// The file of a backbone.
pub fn backbone_path(root: &Path, name: &str) -> PathBuf {
    backbones_folder(root).join(format!("{name}.{EXTENSION}"))
}

/// The file of a version of a set.
pub fn set_path(root: &Path, name: &str, version: u64) -> PathBuf {
    set_folder(root, name).join(format!("{version}.{EXTENSION}"))
}

/// Whether a path ends as an artifact's does.
pub fn is_artifact(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == EXTENSION)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_lead_elsewhere_are_refused() {
        for name in ["cifar100", "a", "Site-7_v2.1", &"x".repeat(MAX_NAME)] {
            assert!(is_valid_name(name), "{name}");
        }
        for name in ["", ".", "..", ".hidden", "a/b", "a\\b", "a\0b", "a b", "blåbær", "a:b", &"x".repeat(MAX_NAME + 1)]
        {
            assert!(!is_valid_name(name), "{name:?}");
        }
        assert!(NAME_RULE.contains(&format!("1 to {MAX_NAME} ")));
    }

    #[test]
    fn a_version_has_one_spelling() {
        assert_eq!([parse_version("0"), parse_version("17")], [Some(0), Some(17)]);
        for text in ["", "01", "+1", "-1", "1.0", "latest", "18446744073709551616"] {
            assert_eq!(parse_version(text), None, "{text}");
        }
    }
}
