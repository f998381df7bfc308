//! What a person or a program reads of it.

use std::io::{self, Write};
use std::path::PathBuf;

use serde_json::json;
use teaching::{Report, Share};

use super::features::Found;
use crate::config::TeachArgs;

/// A set that was taught and written.
pub(super) struct Outcome<'a> {
    pub(super) args: &'a TeachArgs,
    pub(super) report: &'a Report,
    pub(super) found: &'a Found,
    /// The file that was written, or the address that answers.
    pub(super) place: String,
    pub(super) version: u64,
    pub(super) bytes: usize,
    pub(super) copied: Copied,
}

/// What the set rests on and was not in the store: where it went.
#[derive(Debug, Default)]
pub(super) struct Copied {
    pub(super) backbone: Option<PathBuf>,
    pub(super) base: Option<PathBuf>,
}

impl Outcome<'_> {
    pub(super) fn print(&self) -> io::Result<()> {
        let mut out = io::stdout().lock();
        if self.args.json { self.print_json(&mut out) } else { self.print_text(&mut out) }
    }

    fn print_json(&self, out: &mut impl Write) -> io::Result<()> {
        let suspects = self.report.suspects.iter();
        let files: Vec<_> = suspects.map(|suspect| &self.found.files[suspect.image]).collect();
        let document = json!({
            "set": self.args.set,
            "version": self.version,
            "place": self.place,
            "bytes": self.bytes,
            "backbone_copied_to": self.copied.backbone.as_ref().map(|path| path.display().to_string()),
            "base_copied_to": self.copied.base.as_ref().map(|path| path.display().to_string()),
            "left_out": self.found.left_out,
            "suspect_files": files,
            "report": self.report,
        });
        writeln!(out, "{document}")
    }

    fn print_text(&self, out: &mut impl Write) -> io::Result<()> {
        let Report { images, folds, accuracy, none_accuracy, classes, confusions, suspects, calibration, .. } =
            self.report;
        writeln!(out, "{} version {}: {} classes from {images} images", self.args.set, self.version, classes.len())?;
        writeln!(out, "  {} ({} bytes)", self.place, self.bytes)?;
        for (what, copied) in [("backbone", &self.copied.backbone), ("base", &self.copied.base)] {
            if let Some(path) = copied {
                writeln!(out, "  {} (the {what}, copied)", path.display())?;
            }
        }
        writeln!(out, "Held out in {folds} folds:")?;
        writeln!(out, "  right               {}", percent(accuracy))?;
        if let Some(none) = none_accuracy {
            writeln!(out, "  right about none    {}", percent(none))?;
        }
        let unknown = &self.report.unknown;
        writeln!(out, "  called unknown      {}", percent(&unknown.refused))?;
        if let Some(passes) = &unknown.none_passes {
            writeln!(out, "  of none, not so     {}", percent(passes))?;
        }
        if let Some(passes) = &unknown.background_passes {
            writeln!(out, "  of background, not  {}", percent(passes))?;
        }
        if let Some(passes) = &unknown.class_passes {
            writeln!(out, "  of a class left out {}", percent(passes))?;
        }
        let (mean, error) = (100.0 * calibration.mean_score, 100.0 * calibration.expected_error);
        writeln!(out, "  mean score          {mean:.1}%, calibration error {error:.1}%")?;
        writeln!(out, "By class, of its images those that are right:")?;
        for class in classes {
            let few = if class.few { "  (few: take more)" } else { "" };
            writeln!(out, "  {:>5} of {:<5} {}{few}", class.correct, class.images, class.label)?;
        }
        if !confusions.is_empty() {
            writeln!(out, "Taken for another:")?;
        }
        for confusion in confusions {
            writeln!(out, "  {:>5}  {} for {}", confusion.images, confusion.label, confusion.taken_for)?;
        }
        if !suspects.is_empty() {
            writeln!(out, "Probably in the wrong folder:")?;
        }
        for suspect in suspects {
            let file = &self.found.files[suspect.image];
            writeln!(out, "  {file} ({} with a score of {:.2})", suspect.taken_for, suspect.score)?;
        }
        Ok(())
    }
}

fn percent(share: &Share) -> String {
    let Share { count, of, share, low, high } = share;
    format!("{:.1}% ({count} of {of}; 95% interval {:.1} to {:.1}%)", 100.0 * share, 100.0 * low, 100.0 * high)
}
