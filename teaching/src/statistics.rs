//! Statistics that tell a set's own images from others.

use model_core::config::FloatFormat;
use model_core::familiarity;
use model_core::projection::Projection;
use model_core::random::SplitMix64;
use model_core::weights::{Background, Covariance, Familiarity, Int4Rows, Rows};

use crate::spread::{Differences, Spread};
use crate::{Examples, TeachError};

/// Draws from the background.
pub(crate) const DRAWS: usize = 400;

/// Means and covariance of the images `chosen`, without a threshold.
pub(crate) fn fit(examples: &Examples<'_>, chosen: &[usize], rank: usize) -> Familiarity {
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
            mean.iter_mut().zip(familiarity::scaled(row)).for_each(|(mean, value)| *mean += value);
        }
        mean.iter_mut().for_each(|mean| *mean /= (images.len() * views) as f64);
        for row in rows() {
            differences.extend(familiarity::scaled(row).zip(&mean).map(|(value, mean)| (value - mean) as f32));
        }
        means.extend(mean.into_iter().map(|mean| mean as f32));
    }
    let count = means.len() / d_model;
    let rows = Differences { rows: &differences, features: d_model, views, means: count };
    let Spread { scale, factor } = rows.spread(rank);
    // Images that are all the same have no spread at all.
    let scale = scale.clamp(1e-4, 1e4) as f32;
    Familiarity {
        format: FloatFormat::F32,
        relative: false,
        means: Rows::Int4(Int4Rows::encode(&means, d_model)),
        covariance: Covariance::Even { scale, factor: Int4Rows::encode(&factor, d_model) },
        threshold: 0.0,
        pass_share: 0.0,
    }
}

/// Distances as the server measures them.
pub(crate) struct Distances(familiarity::Familiarity);

impl Distances {
    /// # Errors
    /// [`TeachError::Statistics`] when a server would refuse the statistics.
    pub(crate) fn new(statistics: &Familiarity) -> Result<Self, TeachError> {
        let ready = familiarity::Familiarity::new(statistics, None);
        ready.map(Self).map_err(|error| TeachError::Statistics(error.to_string()))
    }

    pub(crate) fn of(&self, features: &[f32]) -> f64 {
        self.0.distance(features, None)
    }

    /// Of draws from a background, by a generator with that seed, as a projection shows them.
    pub(crate) fn of_draws(&self, background: &Background, projection: Option<Projection>, seed: u64) -> Vec<f64> {
        let (mut rows, mut features) = (draws(background, seed), background.mean.len());
        if let Some(projection) = projection {
            rows = projection.rows(&rows, features);
            features = projection.features();
        }
        rows.chunks_exact(features.max(1)).map(|row| self.of(row)).collect()
    }
}

/// Features of pictures of everything, drawn from the background's mean and covariance, `[DRAWS, d_model]`. They may be below
/// zero, where features of pictures never are. Cut off at zero they would lie nearer to all means than pictures do.
fn draws(background: &Background, seed: u64) -> Vec<f32> {
    let d_model = background.mean.len();
    let mut random = SplitMix64::at(seed, 0);
    let mut rows = Vec::with_capacity(DRAWS * d_model);
    let (diagonal, factor) = match &background.covariance {
        Covariance::Diagonal { diagonal, factor } => (diagonal, factor),
        // Drawing from a triangle takes its square root, which is a cube of the features in time.
        Covariance::Packed(_) | Covariance::Background { .. } | Covariance::Even { .. } => return rows,
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

/// Where images end to be known: halfway, as a ratio, between the distance that most of the set's own images stay below and
/// the one of the nearest of `others`, if that lies further away. Pictures of another day lie further from the means than
/// those that a set was taught with, and where nothing else is near, there is room for them.
pub(crate) fn with_room(limit: f64, others: &[f64]) -> f64 {
    let nearest = others.iter().copied().fold(f64::INFINITY, f64::min);
    if limit > 0.0 && nearest > limit && nearest.is_finite() { (limit * nearest).sqrt() } else { limit }
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

    #[test]
    fn there_is_room_where_nothing_else_is_near() {
        assert_eq!(with_room(4.0, &[11.0, 9.0]), 6.0);
        assert_eq!((with_room(4.0, &[3.0, 9.0]), with_room(4.0, &[]), with_room(-1.0, &[9.0])), (4.0, 4.0, -1.0));
    }
}
