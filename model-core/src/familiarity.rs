//! How far an image's features lie from those that an expert set was fitted to: `FORMAT.md`, "Unknown".
//!
//! Distances are squared lengths of whitened differences: with `C = L L^T`, `d(f; m, C) = |L^-1 (f - m)|^2`. A covariance
//! that is a base plus `factor^T factor` is whitened by its base alone; what the factor takes away again is found in as
//! many dimensions as it has rows (Woodbury). What is kept is kept in single precision; sums are double.

use crate::artifact::ArtifactError;
use crate::weights::{self, Covariance};

/// Mean and whitening of a backbone's background.
#[derive(Debug, Clone)]
pub struct Background {
    mean: Box<[f32]>,
    whitening: Whitening,
}

/// What differences from a background's mean are whitened by.
#[derive(Debug, Clone)]
enum Whitening {
    Triangle(Cholesky),
    /// Of `diagonal + factor^T factor`. With `G` the factor whose columns are divided by the roots of the diagonal, and
    /// `1 + G G^T = L L^T`, the matrix `B = 1 + G^T (1 + L)^-1 G` has `B B^T = 1 + G^T G`, and its inverse is
    /// `1 - G^T (1 + L)^-T L^-1 G`.
    LowRank {
        /// Reciprocal square roots of the diagonal.
        roots: Box<[f32]>,
        /// G, `[rank, d_model]`.
        factor: Box<[f32]>,
        /// L.
        inner: Cholesky,
    },
}

/// Statistics of a set, ready to measure distances with.
#[derive(Debug, Clone)]
pub struct Familiarity {
    base: Base,
    /// `[means, d_model]`, whitened by the base.
    means: Box<[f32]>,
    /// `[rank, d_model]`, whitened by the base.
    factor: Box<[f32]>,
    /// Of `1 + factor factor^T`.
    inner: Cholesky,
    relative: bool,
    threshold: f32,
}

/// What differences are whitened by.
#[derive(Debug, Clone)]
enum Base {
    Own(Cholesky),
    /// The reciprocal square roots of a diagonal.
    Diagonal(Box<[f32]>),
    /// The background's, whose covariance is multiplied by the square of this.
    Background(f64),
}

/// The lower triangular L of a positive definite `L L^T`, row by row.
#[derive(Debug, Clone)]
struct Cholesky {
    lower: Box<[f32]>,
}

/// First element of a row of a triangle.
const fn row_start(row: usize) -> usize {
    row * (row + 1) / 2
}

impl Cholesky {
    /// `None` unless the matrix with this lower triangle is positive definite.
    fn new(side: usize, triangle: impl Fn(usize, usize) -> f64) -> Option<Self> {
        let mut lower = vec![0.0; row_start(side)];
        for r in 0..side {
            for c in 0..=r {
                let dot: f64 = (0..c).map(|k| lower[row_start(r) + k] * lower[row_start(c) + k]).sum();
                let rest = triangle(r, c) - dot;
                lower[row_start(r) + c] = if c < r {
                    rest / lower[row_start(c) + c]
                } else if rest > 0.0 {
                    rest.sqrt()
                } else {
                    return None;
                };
            }
        }
        Some(Self { lower: lower.into_iter().map(|v| v as f32).collect() })
    }

    /// `x = L^-1 x`.
    fn whiten(&self, x: &mut [f64]) {
        for r in 0..x.len() {
            let row = &self.lower[row_start(r)..][..=r];
            let dot: f64 = row[..r].iter().zip(&x[..r]).map(|(&l, x)| f64::from(l) * x).sum();
            x[r] = (x[r] - dot) / f64::from(row[r]);
        }
    }
}

impl Whitening {
    /// `None` unless the covariance is positive definite.
    fn new(covariance: &Covariance, d_model: usize) -> Option<Self> {
        let (diagonal, factor) = match covariance {
            Covariance::Packed(triangle) => {
                return Cholesky::new(d_model, |r, c| triangle[row_start(r) + c].into()).map(Self::Triangle);
            }
            Covariance::Diagonal { diagonal, factor } => (diagonal, factor),
            Covariance::Background { .. } => return None,
        };
        let roots: Box<[f32]> = diagonal.iter().map(|v| v.sqrt().recip()).collect();
        let scaled = factor.iter().zip(roots.iter().cycle()).map(|(v, root)| v * root);
        let factor: Box<[f32]> = scaled.collect();
        let inner = inner_cholesky(&factor, d_model)?;
        Some(Self::LowRank { roots, factor, inner })
    }

    fn whiten(&self, x: &mut [f64], taken: &mut Vec<f64>) {
        let (roots, factor, inner) = match self {
            Self::Triangle(triangle) => return triangle.whiten(x),
            Self::LowRank { roots, factor, inner } => (roots, factor, inner),
        };
        x.iter_mut().zip(roots).for_each(|(x, &root)| *x *= f64::from(root));
        let rows = factor.chunks_exact(x.len().max(1));
        taken.clear();
        taken.extend(rows.map(|row| row.iter().zip(&*x).map(|(&g, x)| f64::from(g) * x).sum::<f64>()));
        inner.whiten(taken);
        // Backwards through the transpose of 1 + L.
        for r in (0..taken.len()).rev() {
            let below = (r + 1..taken.len()).map(|k| f64::from(inner.lower[row_start(k) + r]) * taken[k]);
            taken[r] = (taken[r] - below.sum::<f64>()) / (1.0 + f64::from(inner.lower[row_start(r) + r]));
        }
        for (row, taken) in factor.chunks_exact(x.len().max(1)).zip(&*taken) {
            x.iter_mut().zip(row).for_each(|(x, &g)| *x -= f64::from(g) * taken);
        }
    }

    fn heap_bytes(&self) -> usize {
        match self {
            Self::Triangle(triangle) => size_of_val(&*triangle.lower),
            Self::LowRank { roots, factor, inner } => {
                size_of_val(&**roots) + size_of_val(&**factor) + size_of_val(&*inner.lower)
            }
        }
    }
}

/// That of `1 + factor factor^T`, for a factor `[rank, d_model]`.
fn inner_cholesky(factor: &[f32], d_model: usize) -> Option<Cholesky> {
    let row = |r: usize| &factor[r * d_model..][..d_model];
    Cholesky::new(factor.len() / d_model.max(1), |r, c| {
        let dot: f64 = row(r).iter().zip(row(c)).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
        dot + if r == c { 1.0 } else { 0.0 }
    })
}

/// Buffers of a measurement; those who measure again need not allocate again.
#[derive(Debug, Clone, Default)]
pub struct Scratch {
    /// What is whitened.
    x: Vec<f64>,
    /// What a factor of low rank takes away again.
    taken: Vec<f64>,
}

fn squared(x: impl Iterator<Item = f64>) -> f64 {
    x.map(|x| x * x).sum()
}

fn not_positive(tensor: &str) -> ArtifactError {
    let reason = "the covariance is not positive definite".to_owned();
    ArtifactError::Value { tensor: tensor.to_owned(), index: 0, reason }
}

impl Background {
    /// # Errors
    /// [`ArtifactError::Value`] when the covariance is not positive definite.
    pub fn new(background: &weights::Background) -> Result<Self, ArtifactError> {
        let weights::Background { mean, covariance, .. } = background;
        let whitening = Whitening::new(covariance, mean.len());
        let whitening = whitening.ok_or_else(|| not_positive("background.covariance"))?;
        Ok(Self { mean: mean.clone().into(), whitening })
    }

    /// Squared distance of features `[d_model]` from the mean, under the background's covariance.
    pub fn distance(&self, features: &[f32]) -> f64 {
        self.distance_in(features, &mut Scratch::default())
    }

    fn distance_in(&self, features: &[f32], Scratch { x, taken }: &mut Scratch) -> f64 {
        x.clear();
        x.extend(features.iter().zip(&self.mean).map(|(f, m)| f64::from(*f) - f64::from(*m)));
        self.whitening.whiten(x, taken);
        squared(x.iter().copied())
    }

    /// A difference `[d_model]` in coordinates in which the background is white.
    pub fn whitened(&self, difference: &[f32]) -> Vec<f32> {
        let mut x: Vec<f64> = difference.iter().map(|&v| v.into()).collect();
        self.whitening.whiten(&mut x, &mut Vec::new());
        x.into_iter().map(|v| v as f32).collect()
    }

    /// Bytes on the heap.
    pub fn heap_bytes(&self) -> usize {
        size_of_val(&*self.mean) + self.whitening.heap_bytes()
    }
}

impl Familiarity {
    /// The statistics of a set on a backbone with that background.
    ///
    /// # Errors
    /// [`ArtifactError`] when a covariance is not positive definite,
    /// or the set needs a background that the backbone does not have.
    pub fn new(statistics: &weights::Familiarity, background: Option<&Background>) -> Result<Self, ArtifactError> {
        let weights::Familiarity { relative, means, covariance, threshold, .. } = statistics;
        let needs_background = *relative || matches!(covariance, Covariance::Background { .. });
        if needs_background && background.is_none() {
            let reason = "it needs a background, which the backbone does not have".to_owned();
            return Err(ArtifactError::Field { field: "familiarity", reason });
        }
        let (base, factor, d_model) = match covariance {
            Covariance::Packed(triangle) => {
                // The side of a triangle of so many values.
                let side = ((8 * triangle.len() + 1).isqrt() - 1) / 2;
                let own = Cholesky::new(side, |r, c| triangle[row_start(r) + c].into());
                (Base::Own(own.ok_or_else(|| not_positive("familiarity.covariance"))?), &[][..], side)
            }
            Covariance::Diagonal { diagonal, factor } => {
                let roots = diagonal.iter().map(|v| v.sqrt().recip());
                (Base::Diagonal(roots.collect()), &factor[..], diagonal.len())
            }
            Covariance::Background { scale, factor } => {
                let side = background.map_or(0, |background| background.mean.len());
                (Base::Background(f64::from(*scale).sqrt()), &factor[..], side)
            }
        };
        let rows = |rows: &[f32]| -> Box<[f32]> {
            let mut rows: Vec<f64> = rows.iter().map(|&v| v.into()).collect();
            let mut taken = Vec::new();
            rows.chunks_exact_mut(d_model.max(1)).for_each(|row| base.whiten(row, background, &mut taken));
            rows.into_iter().map(|v| v as f32).collect()
        };
        let (means, factor) = (rows(means), rows(factor));
        let inner = inner_cholesky(&factor, d_model).ok_or_else(|| not_positive("familiarity.factor"))?;
        Ok(Self { base, means, factor, inner, relative: *relative, threshold: *threshold })
    }

    /// The smallest squared distance of features `[d_model]` from a mean, less their distance from the background if the
    /// set is relative to it. `background` is the one of [`Familiarity::new`].
    pub fn distance(&self, features: &[f32], background: Option<&Background>) -> f64 {
        self.distance_in(features, background, &mut Scratch::default())
    }

    /// As [`Familiarity::distance`], with buffers of the caller's.
    pub fn distance_in(&self, features: &[f32], background: Option<&Background>, scratch: &mut Scratch) -> f64 {
        let d_model = features.len();
        // First, since the buffers are the same.
        let far = background.filter(|_| self.relative).map_or(0.0, |far| far.distance_in(features, scratch));
        let Scratch { x, taken } = scratch;
        x.clear();
        x.extend(features.iter().map(|&v| f64::from(v)));
        self.base.whiten(x, background, taken);
        let mut distance = |mean: &[f32]| {
            let difference = || x.iter().zip(mean).map(|(x, &mean)| x - f64::from(mean));
            let factor = self.factor.chunks_exact(d_model);
            taken.clear();
            taken.extend(factor.map(|row| row.iter().zip(difference()).map(|(&a, b)| f64::from(a) * b).sum::<f64>()));
            self.inner.whiten(taken);
            squared(difference()) - squared(taken.iter().copied())
        };
        let nearest = self.means.chunks_exact(d_model).map(&mut distance).fold(f64::INFINITY, f64::min);
        nearest - far
    }

    /// Whether an image with that distance is unknown.
    pub fn is_unknown(&self, distance: f64) -> bool {
        distance > f64::from(self.threshold)
    }

    /// Bytes on the heap.
    pub fn heap_bytes(&self) -> usize {
        let base = match &self.base {
            Base::Own(own) => size_of_val(&*own.lower),
            Base::Diagonal(roots) => size_of_val(&**roots),
            Base::Background(_) => 0,
        };
        base + size_of_val(&*self.means) + size_of_val(&*self.factor) + size_of_val(&*self.inner.lower)
    }
}

impl Base {
    fn whiten(&self, x: &mut [f64], background: Option<&Background>, taken: &mut Vec<f64>) {
        match self {
            Self::Own(own) => own.whiten(x),
            Self::Diagonal(roots) => x.iter_mut().zip(roots).for_each(|(x, &root)| *x *= f64::from(root)),
            Self::Background(scale) => {
                background.iter().for_each(|background| background.whitening.whiten(x, taken));
                x.iter_mut().for_each(|x| *x /= scale);
            }
        }
    }
}
