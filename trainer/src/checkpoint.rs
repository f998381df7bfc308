//! The state of a training run in one file: everything that a resumed run needs to end with the same bits as one
//! that was never interrupted.
//!
//! A safetensors file with tensors `parameter/NAME`, `average/NAME` (moving average of the weights), `mean/NAME` and
//! `square/NAME` (the optimiser's moments), all flat f32, and a JSON [`State`] in its metadata. There is no generator
//! state: random numbers are functions of seed and position ([`crate::data::random`]).

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use model_core::artifact::{Digest, read_file};
use model_core::image::Preprocess;
use model_core::random::AngleStart;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::{Deserialize, Serialize};
use training::optimizer::{AdamW, Moments};

use crate::data::loader::Position;
use crate::diary::Validation;
use crate::files::write_atomically;
use crate::recipe::Recipe;

/// Name of the file in a run folder.
pub const FILE_NAME: &str = "checkpoint.safetensors";
const STATE_KEY: &str = "state";
const VERSION: u32 = 2;

/// Values by parameter name.
pub type Values = BTreeMap<String, Vec<f32>>;

/// The part of a checkpoint that is not tensors.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Layout of the file.
    pub version: u32,
    /// What the run computes.
    pub recipe: Recipe,
    /// What the images looked like, [`crate::data::Dataset::fingerprint`].
    pub data_fingerprint: u64,
    pub position: Position,
    /// Steps the optimiser has taken.
    pub step: u64,
    /// Time spent so far.
    pub seconds: f64,
    /// From bytes to pixels.
    pub preprocess: Preprocess,
    /// Where the angles started; none for a model without.
    pub angle_start: Option<AngleStart>,
    /// Class names, in the order of the head's rows.
    pub labels: Vec<String>,
    /// Results of the latest validation.
    pub validation: Option<Validation>,
}

/// A training run at rest.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    /// All but the tensors.
    pub state: State,
    /// The weights as trained.
    pub parameters: Values,
    /// Their moving average; empty without one.
    pub average: Values,
    /// The optimiser's moments of trained parameters.
    pub moments: BTreeMap<String, Moments>,
}

impl State {
    /// The current layout's number.
    pub const VERSION: u32 = VERSION;
}

impl Checkpoint {
    /// Puts the checkpoint into the run folder `folder` in place of the one before. The old one stays until the new
    /// one is on the disk in full.
    ///
    /// # Errors
    /// When the file cannot be written; the previous checkpoint is then untouched.
    pub fn save(&self, folder: &Path) -> Result<()> {
        let mut tensors: Vec<(String, Vec<u8>)> = Vec::new();
        let mut add = |group: &str, name: &str, values: &[f32]| {
            tensors.push((format!("{group}/{name}"), values.iter().flat_map(|v| v.to_le_bytes()).collect()));
        };
        self.parameters.iter().for_each(|(name, values)| add("parameter", name, values));
        self.average.iter().for_each(|(name, values)| add("average", name, values));
        for (name, moments) in &self.moments {
            add("mean", name, &moments.mean);
            add("square", name, &moments.square);
        }
        let views =
            tensors.iter().map(|(name, bytes)| Ok((name, TensorView::new(Dtype::F32, vec![bytes.len() / 4], bytes)?)));
        let views = views.collect::<Result<Vec<_>>>()?;
        let metadata = HashMap::from([(STATE_KEY.to_owned(), serde_json::to_string(&self.state)?)]);
        let bytes = safetensors::serialize(views, Some(metadata))?;
        write_atomically(&folder.join(FILE_NAME), &bytes)
            .context("saving the checkpoint; the previous one, if any, is still there")
    }

    /// Reads the checkpoint of the run folder `folder`.
    ///
    /// # Errors
    /// When there is none or it is damaged.
    pub fn load(folder: &Path) -> Result<Self> {
        let path = folder.join(FILE_NAME);
        let read = || -> Result<Self> {
            let bytes = read_file(&path)?;
            let (_, metadata) = SafeTensors::read_metadata(&bytes)?;
            let state =
                metadata.metadata().as_ref().and_then(|m| m.get(STATE_KEY)).context("no training state in it")?;
            let state: State = serde_json::from_str(state)?;
            ensure!(state.version == VERSION, "written by another version of the trainer");
            let mut groups: BTreeMap<String, Values> = BTreeMap::new();
            for (name, tensor) in SafeTensors::deserialize(&bytes)?.iter() {
                let (group, name) = name.split_once('/').context("a tensor without group")?;
                let values = tensor.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
                groups.entry(group.to_owned()).or_default().insert(name.to_owned(), values.collect());
            }
            let mut group = |name: &str| groups.remove(name).unwrap_or_default();
            let (parameters, average) = (group("parameter"), group("average"));
            let mut squares = group("square");
            let moments = group("mean").into_iter().map(|(name, mean)| {
                let square = squares.remove(&name).filter(|square| square.len() == mean.len());
                Ok((name, Moments { mean, square: square.context("moments do not pair up")? }))
            });
            Ok(Self { state, parameters, average, moments: moments.collect::<Result<_>>()? })
        };
        read().with_context(|| format!("reading the checkpoint {}", path.display()))
    }

    /// SHA-256 over names and values of the weights that are validated and exported.
    pub fn digest(&self) -> Digest {
        let values = self.parameters.iter().map(|(name, values)| (name, self.average.get(name).unwrap_or(values)));
        let bytes = |(name, values): (&String, &Vec<f32>)| -> Vec<u8> {
            name.bytes().chain(values.iter().flat_map(|v| v.to_le_bytes())).collect()
        };
        Digest::of("", &values.flat_map(bytes).collect::<Vec<u8>>())
    }

    /// The optimiser as it was.
    pub fn optimizer(&self) -> AdamW {
        let mut optimizer = AdamW::new(self.state.recipe.optimizer);
        optimizer.step = self.state.step;
        optimizer.moments = self.moments.clone();
        optimizer
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use model_core::config::ViTConfig;
    use std::fs;

    fn checkpoint() -> Checkpoint {
        let values: Values = [("a".to_owned(), vec![1.5, -0.0, f32::MIN_POSITIVE]), ("b.c".to_owned(), vec![])].into();
        Checkpoint {
            state: State {
                version: VERSION,
                recipe: Recipe::scratch(ViTConfig::preset("tiny").unwrap()),
                data_fingerprint: u64::MAX - 1,
                position: Position { epoch: 3, batch: 4 },
                step: 99,
                seconds: 0.1 + 0.2,
                preprocess: Preprocess { mean: [0.1, 0.2, 0.3], ..Preprocess::default() },
                labels: vec!["x".into()],
                angle_start: None,
                validation: None,
            },
            parameters: values.clone(),
            average: values,
            moments: [("a".to_owned(), Moments { mean: vec![1.0; 3], square: vec![2.0; 3] })].into(),
        }
    }

    #[test]
    fn what_is_saved_comes_back_bit_for_bit() {
        let (folder, saved) = (tempfile::tempdir().unwrap(), checkpoint());
        saved.save(folder.path()).unwrap();
        let loaded = Checkpoint::load(folder.path()).unwrap();
        assert_eq!(loaded.state, saved.state);
        let bits = |values: &Values| -> Vec<Vec<u32>> {
            values.values().map(|v| v.iter().map(|v| v.to_bits()).collect()).collect()
        };
        assert_eq!(bits(&loaded.parameters), bits(&saved.parameters));
        assert_eq!(bits(&loaded.average), bits(&saved.average));
        assert_eq!(loaded.moments["a"].square, [2.0; 3]);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "nothing else is left behind");
    }

    #[test]
    fn a_failed_save_keeps_the_previous_checkpoint() {
        let (folder, saved) = (tempfile::tempdir().unwrap(), checkpoint());
        saved.save(folder.path()).unwrap();
        // A folder in the way of the temporary file fails the write as a full disk would.
        fs::create_dir(folder.path().join(format!("{FILE_NAME}.tmp"))).unwrap();
        let mut next = saved.clone();
        next.state.step = 100;
        let error = format!("{:#}", next.save(folder.path()).unwrap_err());
        assert!(error.contains("previous one"), "{error}");
        assert_eq!(Checkpoint::load(folder.path()).unwrap().state.step, 99);
    }

    #[test]
    fn damaged_checkpoints_are_errors() {
        let (folder, saved) = (tempfile::tempdir().unwrap(), checkpoint());
        let message = |folder: &Path| format!("{:#}", Checkpoint::load(folder).unwrap_err());
        assert!(message(folder.path()).contains(FILE_NAME));
        saved.save(folder.path()).unwrap();
        let path = folder.path().join(FILE_NAME);
        let bytes = fs::read(&path).unwrap();
        for len in [0, 7, 100, bytes.len() - 1] {
            fs::write(&path, &bytes[..len]).unwrap();
            assert!(message(folder.path()).contains("reading the checkpoint"), "{len}");
        }
    }
}
