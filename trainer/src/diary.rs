//! The run's diary: one JSON object a line, readable while the run goes on.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

/// Name of the file in a run folder.
pub const FILE_NAME: &str = "metrics.jsonl";

/// Averages over the steps since the line before.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct StepLine {
    /// Steps taken so far.
    pub step: u64,
    /// The same in epochs.
    pub epoch: f64,
    pub loss: f64,
    /// Its cross-entropy term, against smoothed and mixed targets.
    pub cross_entropy: f64,
    /// Load balance, 1 when balanced.
    pub balance: f64,
    /// Spatial smoothness of the routers.
    pub smoothness: f64,
    /// Contiguity ratio of the routers; 0 when it has no weight.
    #[serde(default)]
    pub contiguity: f64,
    /// Share of the (augmented) training images whose larger label was found.
    pub accuracy: f64,
    /// Gradient's global norm before clipping.
    pub gradient_norm: f64,
    /// Of the last step.
    pub learning_rate: f64,
    pub images_per_second: f64,
    /// Since the start of the run, interruptions not counted.
    pub seconds: f64,
}

/// How the averaged weights do on the held-out images.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Validation {
    pub step: u64,
    pub epoch: u64,
    pub cross_entropy: f64,
    /// Share of images whose label comes first.
    pub top1: f64,
    /// Share of images whose label is among the first five.
    pub top5: f64,
    /// Share of chosen experts that neighbouring patches have in common; none without routers.
    pub routing_agreement: Option<f64>,
    /// Since the start of the run, interruptions not counted.
    pub seconds: f64,
    /// What the logits are best divided by; 1 of several heads, each of which has its own.
    #[serde(default = "one")]
    pub temperature: f32,
    /// Of each of several heads, in their order; empty for one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub heads: Vec<HeadValidation>,
}

/// [`Validation`] of one head, on its own data set's held-out images.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HeadValidation {
    pub name: String,
    pub images: usize,
    pub cross_entropy: f64,
    pub top1: f64,
    pub top5: f64,
    /// What the head's logits are best divided by.
    #[serde(default = "one")]
    pub temperature: f32,
}

impl Validation {
    /// The temperature of one head of several, or of the only one.
    pub fn temperature_of(&self, head: usize) -> f32 {
        self.heads.get(head).map_or(self.temperature, |head| head.temperature)
    }
}

/// The temperature of runs that fitted none.
fn one() -> f32 {
    1.0
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Line {
    Step(StepLine),
    Validation(Validation),
}

impl Line {
    fn step(&self) -> u64 {
        match self {
            Self::Step(line) => line.step,
            Self::Validation(line) => line.step,
        }
    }
}

/// The diary of a run folder, open for appending.
#[derive(Debug)]
pub struct Diary {
    file: File,
}

impl Diary {
    /// Opens the diary at `step`: lines of steps that an interruption undid are dropped.
    pub fn open(folder: &Path, step: u64) -> Result<Self> {
        let path = folder.join(FILE_NAME);
        let kept: Vec<Line> = read(folder).into_iter().filter(|line| line.step() <= step).collect();
        let open = || -> Result<Self> {
            let mut text = String::new();
            for line in &kept {
                text += &(serde_json::to_string(line)? + "\n");
            }
            fs::write(&path, text)?;
            Ok(Self { file: OpenOptions::new().append(true).open(&path)? })
        };
        open().with_context(|| format!("opening {}", path.display()))
    }

    /// Appends a line.
    ///
    /// # Errors
    /// When the disk is full, for example.
    pub fn write(&mut self, line: &Line) -> Result<()> {
        writeln!(self.file, "{}", serde_json::to_string(line)?).with_context(|| format!("writing {FILE_NAME}"))
    }
}

/// The readable lines of a run folder's diary; none when there is no diary.
pub fn read(folder: &Path) -> Vec<Line> {
    let text = fs::read_to_string(folder.join(FILE_NAME)).unwrap_or_default();
    text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reopening_drops_what_was_undone_and_a_torn_last_line() {
        let folder = tempfile::tempdir().unwrap();
        let line = |step| Line::Step(StepLine { step, ..StepLine::default() });
        let mut diary = Diary::open(folder.path(), 0).unwrap();
        (1..=5).for_each(|step| diary.write(&line(step)).unwrap());
        write!(diary.file, "{{\"kind\":\"st").unwrap();
        let mut diary = Diary::open(folder.path(), 3).unwrap();
        diary.write(&line(4)).unwrap();
        assert_eq!(read(folder.path()), (1..=4).map(line).collect::<Vec<_>>());
    }
}
