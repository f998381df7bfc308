//! What is known of a classifier that was fitted: all of it from images that were held out.

use serde::Serialize;
use serde_json::{Value, json};

/// Images of a class below which the report says that they are few.
pub const FEW_IMAGES: usize = 10;

/// Share of counted things, with the interval that holds the true share in 95 of 100 cases (Wilson, 1927).
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Share {
    pub count: usize,
    pub of: usize,
    /// `count / of`, and 0 of none.
    pub share: f64,
    /// Lower end of the interval.
    pub low: f64,
    /// Upper end of the interval.
    pub high: f64,
}

impl Share {
    pub fn new(count: usize, of: usize) -> Self {
        if of == 0 {
            return Self { count, of, share: 0.0, low: 0.0, high: 1.0 };
        }
        const Z: f64 = 1.959_963_984_540_054;
        let (n, share) = (of as f64, count as f64 / of as f64);
        let spread = 1.0 + Z * Z / n;
        let middle = (share + Z * Z / (2.0 * n)) / spread;
        let half = Z / spread * (share * (1.0 - share) / n + Z * Z / (4.0 * n * n)).sqrt();
        Self { count, of, share, low: (middle - half).max(0.0), high: (middle + half).min(1.0) }
    }
}

/// How a class does.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ClassReport {
    pub label: String,
    pub images: usize,
    /// Of them, those that get this label when they are held out.
    pub correct: usize,
    /// Whether there are fewer than [`FEW_IMAGES`].
    pub few: bool,
}

/// Images of one class that were taken for another.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Confusion {
    pub label: String,
    pub taken_for: String,
    pub images: usize,
}

/// An image that its own label hardly fits.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Suspect {
    /// Its number among the images.
    pub image: usize,
    pub label: String,
    pub taken_for: String,
    /// The score of that other label.
    pub score: f64,
}

/// How well scores say how often they are right.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Calibration {
    /// What logits are divided by.
    pub temperature: f64,
    /// Mean score of the best label.
    pub mean_score: f64,
    /// Mean distance between score and share of right answers, over ten bins of scores with equally many images.
    pub expected_error: f64,
    /// Mean of minus the logarithm of the right label's score.
    pub log_loss: f64,
}

/// What `unknown` will do.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct UnknownReport {
    pub threshold: f64,
    /// Held-out images of the set that are called unknown.
    pub refused: Share,
    /// Draws from the backbone's background that are not called unknown: pictures of everything, as far as their mean and
    /// their covariance describe them.
    pub background_passes: Option<Share>,
    /// Images that are not called unknown when their whole class is left out: pictures of other things that are as like the
    /// set's classes as those are to each other. Of sets with three classes or more.
    pub class_passes: Option<Share>,
    /// Images of the class `none` or `unknown` that are not called unknown.
    pub none_passes: Option<Share>,
}

/// What a classifier is worth.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    pub images: usize,
    pub folds: usize,
    /// Images that get their own label when they are held out. Those of a class `none` or `unknown` are counted apart.
    pub accuracy: Share,
    /// The same for the class `none` or `unknown`, when there is one.
    pub none_accuracy: Option<Share>,
    pub classes: Vec<ClassReport>,
    /// The most frequent ones first, ten at most.
    pub confusions: Vec<Confusion>,
    /// The worst first, ten at most.
    pub suspects: Vec<Suspect>,
    pub calibration: Calibration,
    /// Strength of the penalty that did best.
    pub strength: f64,
    pub unknown: UnknownReport,
}

impl Report {
    /// What a set's file says of the set: without the images that the report names, in numbers of four digits.
    pub fn summary(&self) -> Value {
        short(json!({
            "images": self.images,
            "accuracy": self.accuracy,
            "calibration": self.calibration,
            "confusions": self.confusions,
            "unknown": self.unknown,
        }))
    }
}

/// The same with numbers of four digits behind the point, or of four that count where they are small or large.
fn short(value: Value) -> Value {
    match value {
        Value::Array(values) => values.into_iter().map(short).collect(),
        Value::Object(fields) => fields.into_iter().map(|(name, value)| (name, short(value))).collect(),
        Value::Number(number) if number.is_f64() => {
            let value = number.as_f64().unwrap_or_default();
            let digits =
                if (0.01..10.0).contains(&value.abs()) { format!("{value:.4}") } else { format!("{value:.3e}") };
            digits.parse::<f64>().map_or(Value::Number(number), Value::from)
        }
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interval_is_wilsons() {
        // Newcombe (1998), table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
        for (count, of, low, high) in
            [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)]
        {
            let share = Share::new(count, of);
            assert!((share.low - low).abs() < 1e-4 && (share.high - high).abs() < 1e-4, "{share:?}");
        }
        assert_eq!(Share::new(0, 0).high, 1.0);
    }
}
