//! The figures of an evaluation in full, as text and as JSON.

use std::fmt::Write;

use serde::Serialize;

use super::Tally;

/// Everything an evaluation found.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// Which forward pass: `integer` or `float`.
    pub path: &'static str,
    pub images: usize,
    /// Images left out because they could not be read.
    pub skipped: usize,
    /// Share of images whose label comes first.
    pub top1: f64,
    /// Share of images whose label is among the first five.
    pub top5: f64,
    /// Mean of minus the log of the label's probability.
    pub cross_entropy: f64,
    /// Expected calibration error over 15 bins of confidence.
    pub calibration_error: f64,
    /// Speed of this evaluation.
    pub images_per_second: f64,
    /// In the order of the labels.
    pub classes: Vec<ClassScore>,
    /// The most frequent confusions, most frequent first.
    pub confusions: Vec<Confusion>,
    /// First to last.
    pub layers: Vec<LayerRouting>,
}

/// How one class did.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ClassScore {
    pub name: String,
    pub images: u32,
    /// Share of them that was recognised.
    pub accuracy: f64,
}

/// One class taken for another.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Confusion {
    pub label: String,
    /// What it was taken for.
    pub prediction: String,
    pub count: u32,
}

/// How one layer's router behaved.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LayerRouting {
    /// Share of chosen experts that two neighbouring patches have in common.
    pub agreement: f64,
    /// The same of patches half the grid apart.
    pub far_agreement: f64,
    /// Share of neighbouring patches with the same first choice.
    pub first_choice_agreement: f64,
    /// Share of all choices that went to each expert.
    pub load: Vec<f64>,
    /// Largest load over the mean load; 1 when balanced.
    pub peak_load: f64,
    /// Experts that no patch chose.
    pub unused: usize,
}

const CONFUSIONS: usize = 20;

impl Report {
    /// Sums up a tally.
    pub fn new(tally: &Tally, names: &[String], path: &'static str, skipped: usize, seconds: f64) -> Self {
        let scores = tally.scores();
        let classes = names.iter().zip(tally.by_label()).map(|(name, (images, right))| {
            let accuracy = f64::from(right) / f64::from(images.max(1));
            ClassScore { name: name.clone(), images, accuracy }
        });
        let mut confusions: Vec<_> = tally.confusion.iter().filter(|((a, b), _)| a != b).collect();
        confusions.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
        let confusion = |(&(a, b), &count): (&(usize, usize), &u32)| Confusion {
            label: names[a].clone(),
            prediction: names[b].clone(),
            count,
        };
        let layers = tally.layers.iter().map(|layer| {
            let total = layer.load.iter().sum::<u64>().max(1) as f64;
            let load: Vec<f64> = layer.load.iter().map(|&n| n as f64 / total).collect();
            LayerRouting {
                agreement: layer.neighbours.agreement(tally.top_k).unwrap_or(0.0),
                far_agreement: layer.far.agreement(tally.top_k).unwrap_or(0.0),
                first_choice_agreement: layer.neighbours.same_first_choice().unwrap_or(0.0),
                peak_load: load.iter().copied().fold(0.0, f64::max) * load.len() as f64,
                unused: layer.load.iter().filter(|&&n| n == 0).count(),
                load,
            }
        });
        Self {
            path,
            images: scores.images,
            skipped,
            top1: scores.top1,
            top5: scores.top5,
            cross_entropy: scores.cross_entropy,
            calibration_error: scores.calibration_error,
            images_per_second: scores.images as f64 / seconds.max(1e-9),
            classes: classes.collect(),
            confusions: confusions.into_iter().take(CONFUSIONS).map(confusion).collect(),
            layers: layers.collect(),
        }
    }

    pub fn text(&self) -> String {
        let mut out = String::new();
        // Writing to a string cannot fail.
        let _ = self.write_text(&mut out);
        out
    }

    fn write_text(&self, out: &mut String) -> std::fmt::Result {
        let percent = |share: f64| 100.0 * share;
        writeln!(
            out,
            "{} images ({} skipped), {} path, {:.0} images/s",
            self.images, self.skipped, self.path, self.images_per_second
        )?;
        writeln!(out, "top-1                 {:6.2} %", percent(self.top1))?;
        writeln!(out, "top-5                 {:6.2} %", percent(self.top5))?;
        writeln!(out, "cross-entropy         {:7.3}", self.cross_entropy)?;
        writeln!(out, "calibration error     {:6.2} %", percent(self.calibration_error))?;
        if !self.layers.is_empty() {
            writeln!(
                out,
                "\nrouting      neighbours agree   far patches agree   same first choice   peak load   unused experts"
            )?;
        }
        for (i, layer) in self.layers.iter().enumerate() {
            writeln!(
                out,
                "layer {i:<6} {:15.1} % {:17.1} % {:17.1} % {:11.2} {:16}",
                percent(layer.agreement),
                percent(layer.far_agreement),
                percent(layer.first_choice_agreement),
                layer.peak_load,
                layer.unused
            )?;
        }
        let mut classes: Vec<&ClassScore> = self.classes.iter().filter(|class| class.images > 0).collect();
        classes.sort_by(|a, b| b.accuracy.total_cmp(&a.accuracy));
        if classes.len() < self.classes.len() {
            writeln!(out, "\nof {} labels {} have images", self.classes.len(), classes.len())?;
        }
        writeln!(out, "\nclass accuracy, best first")?;
        for class in classes {
            writeln!(out, "{:6.1} %  {}", percent(class.accuracy), class.name)?;
        }
        writeln!(out, "\nmost frequent confusions")?;
        for confusion in &self.confusions {
            writeln!(out, "{:4} x  {} taken for {}", confusion.count, confusion.label, confusion.prediction)?;
        }
        Ok(())
    }
}
