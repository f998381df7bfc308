//! The covariance of features about the means of their classes, for many features and few images.
//!
//! A sample covariance S of few images is singular. Ledoit and Wolf (2004, "A well-conditioned estimator for
//! large-dimensional covariance matrices") shrink it: `(1 - r) S + r m I`, with m the mean of its eigenvalues and r from the
//! spread of the samples themselves. Of S the largest directions
//! are kept; the others give their mean variance to what stands for all directions.
//!
//! All of it follows from the products of rows with each other. With unit eigenvectors `a` of those, `[rows, rows]`, a
//! direction of S is the sum of rows times `a`.

use model_core::random::SplitMix64;

use crate::logistic::dot;

/// Rows that are compared with each other at most; of more, every so many is taken.
const MOST_ROWS: usize = 1024;
/// Rounds of subspace iteration.
const ROUNDS: usize = 30;

/// `scale` times the identity, plus `factor^T factor`.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Spread {
    pub(crate) scale: f64,
    /// `[rank, features]`, the largest direction first.
    pub(crate) factor: Vec<f32>,
}

/// Rows of differences from the means of their classes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Differences<'a> {
    /// One difference a row, `[rows, features]`.
    pub(crate) rows: &'a [f32],
    pub(crate) features: usize,
    /// Rows that show the same image, and so are no samples of their own.
    pub(crate) views: usize,
    pub(crate) means: usize,
}

impl Differences<'_> {
    /// Their covariance with a factor of up to `rank` rows.
    pub(crate) fn spread(&self, rank: usize) -> Spread {
        let Self { features, views, means, .. } = *self;
        let count = self.rows.len() / features;
        let every = count.div_ceil(MOST_ROWS).max(1);
        let rows: Vec<&[f32]> = self.rows.chunks_exact(features).step_by(every).collect();
        let n = rows.len();
        // A mean takes a degree of freedom from each of its views; all of them, of subsampled rows, in proportion.
        let freedom = (n as f64 * (1.0 - (means * views) as f64 / count as f64)).max(1.0);
        let mut gram = vec![0.0f32; n * n];
        for r in 0..n {
            for c in 0..=r {
                let product = dot(rows[r], rows[c]);
                (gram[r * n + c], gram[c * n + r]) = (product, product);
            }
        }
        let lengths: Vec<f64> = (0..n).map(|i| f64::from(gram[i * n + i])).collect();
        let d = features as f64;
        let trace = lengths.iter().sum::<f64>() / freedom;
        let norm = gram.iter().map(|&g| f64::from(g).powi(2)).sum::<f64>() / freedom.powi(2) / d;
        let mean = trace / d;
        let away = norm - mean * mean;
        let fourth = lengths.iter().map(|l| l * l).sum::<f64>();
        let noise = views as f64 * (fourth / freedom.powi(2) / d - norm / freedom);
        let shrinkage = if away > 0.0 { (noise / away).clamp(0.0, 1.0) } else { 1.0 };

        let rank = rank.min(n).min(features.saturating_sub(1));
        let largest = largest(&gram, n, rank);
        let kept: f64 = largest.iter().map(|(value, _)| value / freedom).sum();
        let rest = ((trace - kept) / (features - rank).max(1) as f64).max(0.0);
        let scale = shrinkage * mean + (1.0 - shrinkage) * rest;
        let mut factor = Vec::with_capacity(rank * features);
        for (value, shares) in &largest {
            let along = value / freedom;
            let weight = ((1.0 - shrinkage) * (along - rest)).max(0.0);
            let length = if *value > 0.0 { (weight / value).sqrt() } else { 0.0 };
            let mut direction = vec![0.0f32; features];
            for (share, row) in shares.iter().zip(&rows) {
                let share = (f64::from(*share) * length) as f32;
                direction.iter_mut().zip(*row).for_each(|(sum, value)| *sum += share * value);
            }
            factor.extend(direction);
        }
        Spread { scale, factor }
    }
}

/// The largest eigenvalues of a symmetric positive matrix `[n, n]` with their unit eigenvectors, largest first.
fn largest(matrix: &[f32], n: usize, count: usize) -> Vec<(f64, Vec<f32>)> {
    let mut random = SplitMix64::at(23, 0);
    // A few more than asked for: the last of a subspace is the slowest to turn.
    let mut vectors: Vec<Vec<f32>> = (0..(count + 4).min(n)).map(|_| random.normals(n, 1.0)).collect();
    let times = |v: &[f32]| -> Vec<f32> { matrix.chunks_exact(n).map(|row| dot(row, v)).collect() };
    if count == 0 {
        return Vec::new();
    }
    for _ in 0..ROUNDS {
        orthonormalise(&mut vectors);
        vectors.iter_mut().for_each(|v| *v = times(v));
    }
    orthonormalise(&mut vectors);
    let mut found: Vec<(f64, Vec<f32>)> =
        vectors.into_iter().map(|v| (f64::from(dot(&v, &times(&v))).max(0.0), v)).collect();
    found.sort_by(|a, b| b.0.total_cmp(&a.0));
    found.truncate(count);
    found
}

/// Gram-Schmidt, twice for the digits that the first pass loses. What depends on those before becomes zero.
fn orthonormalise(vectors: &mut [Vec<f32>]) {
    for i in 0..vectors.len() {
        let (before, rest) = vectors.split_at_mut(i);
        let v = &mut rest[0];
        let length = dot(v, v).sqrt();
        for other in before.iter().chain(&*before) {
            let along = dot(v, other);
            v.iter_mut().zip(other).for_each(|(v, o)| *v -= along * o);
        }
        let left = dot(v, v).sqrt();
        let scale = if left > 1e-5 * length { left.recip() } else { 0.0 };
        v.iter_mut().for_each(|v| *v *= scale);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_variances_are_found_and_the_rest_is_even() {
        // Variance 25 along the first axis, 1 along the nine others.
        let (count, features) = (4000, 10);
        let mut rows = SplitMix64::at(1, 0).normals(count * features, 1.0);
        rows.chunks_exact_mut(features).for_each(|row| row[0] *= 5.0);
        let differences = Differences { rows: &rows, features, views: 1, means: 1 };
        let Spread { scale, factor } = differences.spread(1);
        assert!((scale - 1.0).abs() < 0.1, "{scale}");
        assert!((f64::from(factor[0]).powi(2) + scale - 25.0).abs() < 2.0, "{factor:?}");
        assert!(factor[1..].iter().all(|v| v.abs() < 0.3), "{factor:?}");
    }

    #[test]
    fn few_samples_of_noise_shrink_to_even_variances() {
        let (count, features) = (8, 200);
        let rows = SplitMix64::at(2, 0).normals(count * features, 2.0);
        let Spread { scale, factor } = Differences { rows: &rows, features, views: 1, means: 1 }.spread(4);
        assert!((scale - 4.0).abs() < 1.0, "{scale}");
        // Of the sample covariance, each direction had a variance of about 100; at most a quarter is left beside the even one.
        for row in factor.chunks_exact(features) {
            assert!(dot(row, row) < 25.0, "{}", dot(row, row));
        }
        let zero = vec![0.0; 40];
        let flat = Differences { rows: &zero, features: 10, views: 2, means: 2 }.spread(3);
        assert!(flat.scale == 0.0 && flat.factor.iter().all(|v| *v == 0.0), "{flat:?}");
    }
}
