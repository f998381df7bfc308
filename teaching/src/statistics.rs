//! Statistics that tell a set's own images from others.

use model_core::config::FloatFormat;
use model_core::familiarity;
use model_core::random::SplitMix64;
use model_core::weights::{Background, Covariance, Familiarity};

use crate::spread::{Differences, Spread};
use crate::{Examples, TeachError};

/// Draws from the background.
pub(crate) const DRAWS: usize = 400;

/// Scale of the covariance from which distances are not taken relative to the background. Far from everything a relative
/// distance grows as `1 / scale - 1`: where the set's images spread as widely as those of the background, what is unlike
/// both would look familiar.
const WIDE: f32 = 0.95;

/// Whether distances of a set with these statistics should be relative to the background.
pub(crate) fn is_narrow(statistics: &Familiarity) -> bool {
    matches!(statistics.covariance, Covariance::Background { scale, .. } if scale < WIDE)
}

/// Means and covariance of the images `chosen`, without a threshold.
pub(crate) fn fit(
    examples: &Examples<'_>,
    chosen: &[usize],
    background: Option<&familiarity::Background>,
    (rank, relative): (usize, bool),
) -> Familiarity {
    let (d_model, views, none) = (examples.d_model, examples.views, examples.none_class());
    let mut means = Vec::new();
    let mut differences = Vec::with_capacity(chosen.len() * views * d_model);
    for class in (0..examples.classes.len()).filter(|&class| Some(class) != none) {
        let images: Vec<usize> = chosen.iter().copied().filter(|&image| examples.labels[image] == class).collect();
        // A class of which every image is held out has no mean; its images are then as strange as they are.
        if images.is_empty() {
            continue;
        }
        let mut mean = vec![0.0f64; d_model];
        let rows = || images.iter().flat_map(|&image| examples.image(image).chunks_exact(d_model));
        for row in rows() {
            mean.iter_mut().zip(row).for_each(|(mean, &value)| *mean += f64::from(value));
        }
        mean.iter_mut().for_each(|mean| *mean /= (images.len() * views) as f64);
        for row in rows() {
            differences.extend(row.iter().zip(&mean).map(|(&value, mean)| (f64::from(value) - mean) as f32));
        }
        means.extend(mean.into_iter().map(|mean| mean as f32));
    }
    let count = means.len() / d_model;
    let rows = Differences { rows: &differences, features: d_model, views, means: count };
    let Spread { scale, factor } = rows.spread(background, rank);
    // Images that are all the same have no spread at all.
    let scale = scale.clamp(1e-4, 1e4);
    let largest = means.iter().chain(&factor).fold(scale, |most, &value| most.max(f64::from(value.abs())));
    // Far from where half precision ends on either side.
    let format = if largest < 3e4 { FloatFormat::F16 } else { FloatFormat::F32 };
    let round = |values: Vec<f32>| values.into_iter().map(|value| format.round(value)).collect::<Vec<f32>>();
    let (means, factor) = (round(means), round(factor));
    let covariance = match background {
        Some(_) => Covariance::Background { scale: scale as f32, factor },
        None => Covariance::Diagonal { diagonal: round(vec![scale as f32; d_model]), factor },
    };
    Familiarity {
        format,
        relative: relative && background.is_some(),
        means,
        covariance,
        threshold: 0.0,
        pass_share: 0.0,
    }
}

/// Distances as the server measures them.
pub(crate) struct Distances<'a> {
    ready: familiarity::Familiarity,
    background: Option<&'a familiarity::Background>,
}

impl<'a> Distances<'a> {
    /// # Errors
    /// [`TeachError::Statistics`] when a server would refuse the statistics.
    pub(crate) fn new(
        statistics: &Familiarity,
        background: Option<&'a familiarity::Background>,
    ) -> Result<Self, TeachError> {
        let ready = familiarity::Familiarity::new(statistics, background)
            .map_err(|error| TeachError::Statistics(error.to_string()))?;
        Ok(Self { ready, background })
    }

    pub(crate) fn of(&self, features: &[f32]) -> f64 {
        self.ready.distance(features, self.background)
    }
}

/// Features of pictures of everything, drawn from the background's mean and covariance, `[DRAWS, d_model]`. Features that the
/// last activation keeps at zero or above are not drawn below.
pub(crate) fn draws(background: &Background) -> Vec<f32> {
    let d_model = background.mean.len();
    let mut random = SplitMix64::at(24, 0);
    let mut rows = Vec::with_capacity(DRAWS * d_model);
    let (diagonal, factor) = match &background.covariance {
        Covariance::Diagonal { diagonal, factor } => (diagonal, factor),
        // Drawing from a triangle takes its square root, which is a cube of the features in time.
        Covariance::Packed(_) | Covariance::Background { .. } => return rows,
    };
    for _ in 0..DRAWS {
        let mut row = random.normals(d_model, 1.0);
        row.iter_mut().zip(diagonal).for_each(|(value, variance)| *value *= variance.sqrt());
        for direction in factor.chunks_exact(d_model.max(1)) {
            let along = random.normals(1, 1.0)[0];
            row.iter_mut().zip(direction).for_each(|(value, d)| *value += along * d);
        }
        rows.extend(row.iter().zip(&background.mean).map(|(value, mean)| value + mean));
    }
    rows
}

/// The distance that a share of `distances` does not exceed: of n the `ceil((n + 1) share)`-th smallest, so that the next image
/// of the same kind stays below it with that probability; the largest one when there are too few for that.
pub(crate) fn threshold(distances: &mut [f64], share: f64) -> f64 {
    distances.sort_by(f64::total_cmp);
    let rank = ((distances.len() + 1) as f64 * share).ceil() as usize;
    distances.get(rank.clamp(1, distances.len().max(1)) - 1).copied().unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_threshold_leaves_the_share_below() {
        let mut distances: Vec<f64> = (1..=60).rev().map(f64::from).collect();
        assert_eq!(threshold(&mut distances, 0.95), 58.0);
        assert_eq!(threshold(&mut distances[..4], 0.95), 4.0);
        assert_eq!(threshold(&mut [], 0.95), 0.0);
    }
}
