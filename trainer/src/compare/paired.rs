//! Whether one variant is better than another: the same test images, image by image, with the same seeds.

use std::collections::BTreeMap;

use candle_core::cpu::erf::erf_f64 as erf;
use serde::Serialize;

use super::{Outcome, Variant};

/// How much more often one variant is right than another.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Paired {
    pub against: Variant,
    /// Mean difference in top-1 over images and the seeds that both were trained with.
    pub difference: f64,
    /// 95% interval of the difference for other images of the kind and these trained models.
    pub interval: [f64; 2],
    /// Probability of so large a difference, either way, if these models were equally good.
    pub p: f64,
    /// The difference of each seed.
    pub by_seed: BTreeMap<u64, f64>,
    /// 95% interval of the difference for other seeds and these images (Student's t); none for a single seed.
    pub interval_over_seeds: Option<[f64; 2]>,
}

/// Two-sided 95% quantiles of Student's t, from one degree of freedom on.
const STUDENT: [f64; 9] = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262];
/// Of the normal distribution.
const NORMAL: f64 = 1.96;

impl Paired {
    /// `variant` against `against`; none where they share no seed.
    pub fn new(outcomes: &[Outcome], variant: Variant, against: Variant) -> Option<Self> {
        let runs = |wanted: Variant| -> BTreeMap<u64, &[bool]> {
            let of_variant = outcomes.iter().filter(|outcome| outcome.variant == wanted);
            of_variant.map(|outcome| (outcome.recipe.seed, outcome.right.as_slice())).collect()
        };
        let (ours, theirs) = (runs(variant), runs(against));
        let pairs: Vec<(u64, &[bool], &[bool])> =
            ours.into_iter().filter_map(|(seed, ours)| Some((seed, ours, *theirs.get(&seed)?))).collect();
        let images = pairs.first()?.1.len();
        let one = |ours: bool, theirs: bool| f64::from(i8::from(ours) - i8::from(theirs));
        let by_image: Vec<f64> = (0..images)
            .map(|i| pairs.iter().map(|(_, ours, theirs)| one(ours[i], theirs[i])).sum::<f64>() / pairs.len() as f64)
            .collect();
        let by_seed: BTreeMap<u64, f64> = pairs
            .iter()
            .map(|(seed, ours, theirs)| {
                (*seed, ours.iter().zip(*theirs).map(|(&a, &b)| one(a, b)).sum::<f64>() / images as f64)
            })
            .collect();
        let (difference, error) = mean_and_error(&by_image)?;
        let around = |width: f64| [difference - width, difference + width];
        let over_seeds = mean_and_error(&by_seed.values().copied().collect::<Vec<f64>>())
            .filter(|_| by_seed.len() > 1)
            .map(|(_, error)| around(STUDENT[(by_seed.len() - 2).min(STUDENT.len() - 1)] * error));
        Some(Self {
            against,
            difference,
            interval: around(NORMAL * error),
            p: if error > 0.0 { 1.0 - erf(difference.abs() / error / 2f64.sqrt()) } else { 1.0 },
            by_seed,
            interval_over_seeds: over_seeds,
        })
    }
}

/// The mean of `values` and its standard error; none without values.
fn mean_and_error(values: &[f64]) -> Option<(f64, f64)> {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let variance = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / (n - 1.0).max(1.0);
    (!values.is_empty()).then(|| (mean, (variance / n).sqrt()))
}

#[cfg(test)]
mod tests {
    use model_core::config::ViTConfig;

    use super::*;
    use crate::recipe::Recipe;

    fn outcome(variant: Variant, seed: u64, right: &[bool]) -> Outcome {
        Outcome {
            variant,
            recipe: Recipe { seed, ..Recipe::scratch(ViTConfig::preset("tiny").unwrap()) },
            parameters: 0,
            top1: 0.0,
            top5: 0.0,
            right: right.to_vec(),
            routing_agreement: None,
            far_agreement: None,
            images_per_second: 0.0,
            load: Vec::new(),
            sample: None,
        }
    }

    #[test]
    fn a_difference_by_hand() {
        let (t, f) = (true, false);
        let outcomes = [
            outcome(Variant::Butterfly, 1, &[t, f, f, f]),
            outcome(Variant::Butterfly, 2, &[t, t, f, f]),
            outcome(Variant::Dense, 1, &[t, t, f, f]),
            outcome(Variant::Dense, 2, &[t, t, t, f]),
            outcome(Variant::Dense, 3, &[f, f, f, f]),
        ];
        let paired = Paired::new(&outcomes, Variant::Dense, Variant::Butterfly).unwrap();
        // Seed 3 has no partner. By image: 0, 1/2, 1/2, 0: mean 1/4, variance 1/12, standard error 1 / sqrt(48).
        assert_eq!(paired.by_seed, BTreeMap::from([(1, 0.25), (2, 0.25)]));
        assert_eq!(paired.difference, 0.25);
        let error = 1.0 / 48f64.sqrt();
        assert!((paired.interval[0] - (0.25 - 1.96 * error)).abs() < 1e-12, "{paired:?}");
        // Phi(sqrt(3)) = 0.95837: p = 2 (1 - 0.95837).
        assert!((paired.p - 0.08326).abs() < 1e-4, "{paired:?}");
        assert_eq!(paired.interval_over_seeds, Some([0.25, 0.25]), "both seeds say the same");
        assert_eq!(Paired::new(&outcomes, Variant::Tied, Variant::Butterfly), None);
        let itself = Paired::new(&outcomes, Variant::Dense, Variant::Dense).unwrap();
        assert_eq!((itself.difference, itself.p), (0.0, 1.0));
    }

    #[test]
    fn seeds_that_disagree_widen_the_interval() {
        let outcomes = [
            outcome(Variant::Butterfly, 1, &[false; 10]),
            outcome(Variant::Butterfly, 2, &[false; 10]),
            outcome(Variant::Dense, 1, &[true; 10]),
            outcome(Variant::Dense, 2, &[false; 10]),
        ];
        let paired = Paired::new(&outcomes, Variant::Dense, Variant::Butterfly).unwrap();
        assert_eq!((paired.difference, paired.interval), (0.5, [0.5, 0.5]), "all images alike");
        // Standard deviation 1 / sqrt(2) of two, standard error 1 / 2, 12.706 of them.
        let [low, high] = paired.interval_over_seeds.unwrap();
        assert!((low - (0.5 - 6.353)).abs() < 1e-9 && (high - (0.5 + 6.353)).abs() < 1e-9, "{paired:?}");
    }
}
