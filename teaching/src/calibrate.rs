//! What a classifier that was trained elsewhere lacks: its temperature, and the statistics of unknown images.

use crate::examples::Examples;
use crate::fit::{Held, report, unknown_images};
use crate::statistics::{Distances, fit as fit_statistics};
use crate::temperature::best_temperature;
use crate::{Calibrated, Options, TeachError};
use model_core::weights::Background;

/// Least images that must be held out: of fewer than 19 none may be called unknown where 95% are to be known.
const FEWEST_HELD_OUT: usize = 19;

/// Fits temperature and statistics of a classifier that learned from all `examples` but those `held_out`, which has given
/// these the `logits [held_out, classes]`. Means and covariance come of what it learned from, everything else of what was held
/// out. `background` is that of the backbone.
///
/// # Errors
/// [`TeachError`] when the examples are too few, too many or unfit.
pub fn calibrate(
    examples: &Examples<'_>,
    (held_out, logits): (&[usize], &[f32]),
    background: Option<&Background>,
    options: &Options,
) -> Result<Calibrated, TeachError> {
    examples.check()?;
    let classes = examples.classes.len();
    if logits.len() != held_out.len() * classes {
        return Err(TeachError::Length { what: "logits", expected: held_out.len() * classes, got: logits.len() });
    }
    if held_out.len() < FEWEST_HELD_OUT {
        return Err(TeachError::FewHeldOut { images: held_out.len(), needed: FEWEST_HELD_OUT });
    }
    let mut learned = vec![true; examples.labels.len()];
    for &image in held_out {
        *learned.get_mut(image).ok_or(TeachError::Length {
            what: "images",
            expected: image + 1,
            got: examples.labels.len(),
        })? = false;
    }
    let inside: Vec<usize> = (0..learned.len()).filter(|&image| learned[image]).collect();
    let mut statistics = fit_statistics(examples, &inside, options.rank);
    let distances = Distances::new(&statistics)?;
    let held = held_out.iter().zip(logits.chunks_exact(classes)).map(|(&image, logits)| Held {
        image,
        logits: vec![logits.iter().copied().map(f64::from).collect()],
        distance: distances.of(examples.plain(image)),
    });
    let held: Vec<Held> = held.collect();
    let of_held: Vec<(&[f64], usize)> =
        held.iter().map(|held| (&*held.logits[0], examples.labels[held.image])).collect();
    let (temperature, _) = best_temperature(&of_held);
    let unknown = unknown_images(examples, &mut statistics, &held, (background, None), options, &|| false)?;
    let report = report(examples, (&held, 0), (0.0, temperature), 1, unknown);
    Ok(Calibrated { temperature: temperature as f32, familiarity: statistics, report })
}

#[cfg(test)]
mod tests {
    use super::*;
    use model_core::random::SplitMix64;

    /// Three classes of 40 images whose features lie about a corner of their own; every fourth image is held out.
    fn classes(seed: u64) -> (Vec<f32>, Vec<usize>, Vec<usize>) {
        let labels: Vec<usize> = (0..120).map(|image| image % 3).collect();
        let mut random = SplitMix64::at(seed, 0);
        let features = labels.iter().flat_map(|&label| {
            let mut row = random.normals(8, 0.3);
            row[label] += 4.0;
            row
        });
        (features.collect(), labels, (0..120).step_by(4).collect())
    }

    #[test]
    fn logits_that_are_too_sure_get_their_temperature_and_strangers_are_known() {
        let (features, labels, held) = classes(1);
        let names = ["a", "b", "c"].map(String::from);
        let examples = Examples { features: &features, views: 1, d_model: 8, labels: &labels, classes: &names };
        // Four of five are right, whose score should be 0.8: a difference of ln 8 to each other logit.
        let logits = held.iter().enumerate().flat_map(|(i, &image)| {
            let taken = if i % 5 == 0 { (labels[image] + 1) % 3 } else { labels[image] };
            (0..3).map(move |class| if class == taken { 5.0 * 8f32.ln() } else { 0.0 })
        });
        let logits: Vec<f32> = logits.collect();
        let got = calibrate(&examples, (&held, &logits), None, &Options::default()).unwrap();
        // A label counts for less than one by Platt's doubt, 1 of 32, so the temperature is above five.
        assert!((5.0..5.8).contains(&got.temperature), "{}", got.temperature);
        assert_eq!((got.report.images, got.report.accuracy.count), (30, 24));
        assert!(got.report.unknown.refused.count <= 2, "{:?}", got.report.unknown);
        let distances = Distances::new(&got.familiarity).unwrap();
        assert!(distances.of(&[0.0, 0.0, 0.0, 0.0, 0.0, 4.0, 0.0, 0.0]) > f64::from(got.familiarity.threshold));
        assert!(distances.of(&[4.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]) < f64::from(got.familiarity.threshold));
    }

    #[test]
    fn what_does_not_belong_together_is_named() {
        let (features, labels, held) = classes(2);
        let names = ["a", "b", "c"].map(String::from);
        let examples = Examples { features: &features, views: 1, d_model: 8, labels: &labels, classes: &names };
        let refused = |held: &[usize], logits: usize| {
            calibrate(&examples, (held, &vec![0.0; logits]), None, &Options::default()).unwrap_err().to_string()
        };
        assert_eq!(refused(&held[..18], 54), "18 images were held out, and 19 are needed at least");
        assert_eq!(refused(&held, 54), "logits: 54 where 90 are due");
        let beyond: Vec<usize> = (101..121).collect();
        assert_eq!(refused(&beyond, 60), "images: 120 where 121 are due");
    }
}
