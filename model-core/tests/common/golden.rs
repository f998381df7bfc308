//! Golden vectors of an independent NumPy definition (`golden/reference.py`): every `*.safetensors` of the folder that
//! `GOLDEN_DIR` names, of any seed and size. Without the variable the folder is `../shared/golden` beside the
//! workspace; where that is missing the test says so and passes, except under `CI`.

#![allow(dead_code, reason = "every test binary uses a part of it")]

use std::path::{Path, PathBuf};

use safetensors::SafeTensors;
use serde_json::Value;

pub(crate) struct Golden<'a> {
    pub(crate) name: String,
    pub(crate) spec: Value,
    pub(crate) tensors: SafeTensors<'a>,
}

impl Golden<'_> {
    pub(crate) fn f32(&self, name: &str) -> Vec<f32> {
        let bytes = self.tensors.tensor(name).unwrap_or_else(|e| panic!("{}: {name}: {e}", self.name)).data();
        bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
    }

    pub(crate) fn i8(&self, name: &str) -> Vec<i8> {
        self.tensors.tensor(name).unwrap().data().iter().map(|b| b.cast_signed()).collect()
    }

    pub(crate) fn i32(&self, name: &str) -> Vec<i32> {
        let bytes = self.tensors.tensor(name).unwrap().data();
        bytes.chunks_exact(4).map(|b| i32::from_le_bytes(b.try_into().unwrap())).collect()
    }

    pub(crate) fn size(&self, key: &str) -> usize {
        self.spec[key].as_u64().unwrap_or_else(|| panic!("{}: no size `{key}`", self.name)) as usize
    }

    pub(crate) fn number(&self, key: &str) -> f64 {
        self.spec[key].as_f64().unwrap_or_else(|| panic!("{}: no number `{key}`", self.name))
    }

    /// Every value within the file's tolerance, relative for values above one.
    pub(crate) fn assert_close(&self, what: &str, got: &[f32], expected: &[f32]) {
        let tolerance = self.number("tolerance") as f32;
        assert_eq!(got.len(), expected.len(), "{}: {what}", self.name);
        let scale = expected.iter().fold(1f32, |m, v| m.max(v.abs()));
        for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
            let error = (got - expected).abs();
            assert!(error <= tolerance * scale, "{}: {what}[{i}] is {got}, not {expected}", self.name);
        }
    }
}

/// Hands every file to `check`.
pub(crate) fn for_each_file(check: impl Fn(&Golden<'_>)) {
    let Some(folder) = golden_folder() else { return };
    let entries = std::fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let mut paths: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.retain(|path| path.extension().is_some_and(|e| e == "safetensors"));
    paths.sort();
    assert!(!paths.is_empty(), "{} holds no *.safetensors", folder.display());
    for path in paths {
        let bytes = std::fs::read(&path).unwrap();
        let (_, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
        let spec = metadata.metadata().as_ref().and_then(|m| m.get("spec")).expect("metadata key `spec`");
        let golden = Golden {
            name: path.file_name().unwrap().to_string_lossy().into_owned(),
            spec: serde_json::from_str(spec).unwrap(),
            tensors: SafeTensors::deserialize(&bytes).unwrap(),
        };
        println!("{}", golden.name);
        check(&golden);
    }
}

fn golden_folder() -> Option<PathBuf> {
    if let Some(folder) = std::env::var_os("GOLDEN_DIR") {
        return Some(folder.into());
    }
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/golden");
    if folder.is_dir() {
        return Some(folder);
    }
    assert!(std::env::var_os("CI").is_none(), "{} is missing; set GOLDEN_DIR", folder.display());
    println!("skipped: {} is missing and GOLDEN_DIR is not set", folder.display());
    None
}
