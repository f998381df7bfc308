//! How far an image's features lie from those that an expert set was fitted to: `FORMAT.md`, "Unknown".
//!
//! Distances are squared lengths of whitened differences: with `C = L L^T`, `d(f; m, C) = |L^-1 (f - m)|^2`. A covariance
//! that is a base plus `factor^T factor` is whitened by its base alone; what the factor takes away again is found in as
//! many dimensions as it has rows (Woodbury). What is kept is kept in single precision, rows of an even covariance in the
//! four bits of the file; sums are double.

use crate::artifact::ArtifactError;
use crate::projection::Projection;
use crate::weights::{self, Covariance, Int4Rows, Rows};

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
    measure: Measure,
    /// What is measured of the features.
    projection: Option<Projection>,
    relative: bool,
    threshold: f32,
}

/// What distances are measured with.
#[derive(Debug, Clone)]
enum Measure {
    Whitened(Whitened),
    Even(Even),
}

/// Means and factor in the coordinates of a base.
#[derive(Debug, Clone)]
struct Whitened {
    base: Base,
    /// `[means, d_model]`, whitened by the base.
    means: Box<[f32]>,
    /// `[rank, d_model]`, whitened by the base.
    factor: Box<[f32]>,
    /// Of `1 + factor factor^T`.
    inner: Cholesky,
}

/// Means and factor of scaled features, of which the rest has the same variance in all directions.
#[derive(Debug, Clone)]
struct Even {
    scale: f64,
    means: Codes,
    factor: Codes,
    /// Squared length of each mean.
    lengths: Box<[f32]>,
    /// Products of means with the rows of the factor, `[means, rank]`.
    along: Box<[f32]>,
    /// Of `1 + factor factor^T / scale`.
    inner: Cholesky,
}

/// Rows of four-bit codes, two to a byte.
#[derive(Debug, Clone)]
struct Codes {
    /// `[rows, ceil(d_model / 2)]`, the first of two codes in the low half.
    packed: Box<[u8]>,
    /// What the codes of each row are multiplied by.
    scale: Box<[f32]>,
}

impl Codes {
    fn new(Int4Rows { codes, scale }: &Int4Rows) -> Self {
        let cols = (codes.len() / scale.len().max(1)).max(1);
        let byte = |pair: &[i16]| (pair[0] & 15) as u8 | (pair.get(1).map_or(0, |code| code & 15) as u8) << 4;
        let packed = codes.chunks_exact(cols).flat_map(|row| row.chunks(2).map(byte)).collect();
        Self { packed, scale: scale.clone().into() }
    }

    /// Products of the rows with `x`.
    fn products<'a>(&'a self, x: &'a [f64]) -> impl Iterator<Item = f64> + 'a {
        let rows = self.packed.chunks_exact(x.len().div_ceil(2).max(1)).zip(&self.scale);
        rows.map(|(row, &scale)| {
            let (mut low, mut high) = (0.0, 0.0);
            for (&byte, pair) in row.iter().zip(x.chunks(2)) {
                low += f64::from((byte << 4) as i8 >> 4) * pair[0];
                high += f64::from(byte as i8 >> 4) * pair.get(1).copied().unwrap_or(0.0);
            }
            (low + high) * f64::from(scale)
        })
    }

    fn heap_bytes(&self) -> usize {
        size_of_val(&*self.packed) + size_of_val(&*self.scale)
    }
}

/// Features scaled to a mean square of one; as they are if all are zero.
pub fn scaled(features: &[f32]) -> impl Iterator<Item = f64> + '_ {
    let mean = squared(features.iter().map(|&f| f64::from(f))) / features.len().max(1) as f64;
    let scale = if mean > 0.0 { mean.sqrt().recip() } else { 1.0 };
    features.iter().map(move |&f| f64::from(f) * scale)
}

impl Even {
    /// `None` unless everything is finite.
    fn new(scale: f32, means: &Int4Rows, factor: &Int4Rows) -> Option<Self> {
        let (means_packed, factor_packed) = (Codes::new(means), Codes::new(factor));
        let products = |rows: &Int4Rows, each: &mut dyn FnMut(&[f64], &[f64])| {
            let cols = (rows.codes.len() / rows.scale.len().max(1)).max(1);
            let (mut row, mut products) = (Vec::new(), Vec::new());
            for (codes, &scale) in rows.codes.chunks_exact(cols).zip(&rows.scale) {
                row.clear();
                row.extend(codes.iter().map(|&code| f64::from(code) * f64::from(scale)));
                products.clear();
                products.extend(factor_packed.products(&row));
                each(&row, &products);
            }
        };
        let mut square: Vec<f64> = Vec::new();
        products(factor, &mut |_, products| square.extend(products));
        let (rank, variance) = (factor.scale.len(), f64::from(scale));
        let one = |r, c| if r == c { 1.0 } else { 0.0 };
        let inner = Cholesky::new(rank, |r, c| square[r * rank + c] / variance + one(r, c))?;
        let mut lengths = Vec::with_capacity(means.scale.len());
        let mut along = Vec::with_capacity(means.scale.len() * rank);
        products(means, &mut |mean, products| {
            lengths.push(squared(mean.iter().copied()) as f32);
            along.extend(products.iter().map(|&product| product as f32));
        });
        let is_finite = inner.lower.iter().chain(&along).chain(&lengths).all(|value| value.is_finite());
        let (lengths, along) = (lengths.into(), along.into());
        is_finite.then_some(Self { scale: variance, means: means_packed, factor: factor_packed, lengths, along, inner })
    }

    /// The smallest squared distance of features from a mean.
    fn nearest(&self, features: &[f32], Scratch { x, taken, along, .. }: &mut Scratch) -> f64 {
        x.clear();
        x.extend(scaled(features));
        along.clear();
        along.extend(self.factor.products(x));
        let (length, rank) = (squared(x.iter().copied()), along.len());
        let mut nearest = f64::INFINITY;
        for (mean, product) in self.means.products(x).enumerate() {
            let own = &self.along[mean * rank..][..rank];
            taken.clear();
            taken.extend(along.iter().zip(own).map(|(a, &b)| (a - f64::from(b)) / self.scale));
            self.inner.whiten(taken);
            let apart = length - 2.0 * product + f64::from(self.lengths[mean]);
            nearest = nearest.min(apart / self.scale - squared(taken.iter().copied()));
        }
        nearest
    }

    fn heap_bytes(&self) -> usize {
        self.means.heap_bytes()
            + self.factor.heap_bytes()
            + size_of_val(&*self.along)
            + size_of_val(&*self.inner.lower)
            + size_of_val(&*self.lengths)
    }
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
            Covariance::Background { .. } | Covariance::Even { .. } => return None,
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
    /// Products with the rows of a factor.
    along: Vec<f64>,
    /// What a projection makes of features.
    projected: Vec<f32>,
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

    fn distance_in(&self, features: &[f32], Scratch { x, taken, .. }: &mut Scratch) -> f64 {
        x.clear();
        x.extend(features.iter().zip(&self.mean).map(|(f, m)| f64::from(*f) - f64::from(*m)));
        self.whitening.whiten(x, taken);
        squared(x.iter().copied())
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
        if let (Covariance::Even { scale, factor }, Rows::Int4(means)) = (covariance, means) {
            let even = Even::new(*scale, means, factor).ok_or_else(|| not_positive("familiarity.factor"))?;
            return Ok(Self { measure: Measure::Even(even), projection: None, relative: false, threshold: *threshold });
        }
        let means = means.to_f32();
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
            Covariance::Even { .. } => {
                let reason = "means of an even covariance are four-bit codes".to_owned();
                return Err(ArtifactError::Field { field: "familiarity", reason });
            }
        };
        let rows = |rows: &[f32]| -> Box<[f32]> {
            let mut rows: Vec<f64> = rows.iter().map(|&v| v.into()).collect();
            let mut taken = Vec::new();
            rows.chunks_exact_mut(d_model.max(1)).for_each(|row| base.whiten(row, background, &mut taken));
            rows.into_iter().map(|v| v as f32).collect()
        };
        let (means, factor) = (rows(&means), rows(factor));
        let inner = inner_cholesky(&factor, d_model).ok_or_else(|| not_positive("familiarity.factor"))?;
        let measure = Measure::Whitened(Whitened { base, means, factor, inner });
        Ok(Self { measure, projection: None, relative: *relative, threshold: *threshold })
    }

    /// The same, measured on what a projection makes of the features.
    pub fn of_projected(self, projection: Option<Projection>) -> Self {
        Self { projection, ..self }
    }

    /// The smallest squared distance of features `[d_model]` from a mean, less their distance from the background if the
    /// set is relative to it. `background` is the one of [`Familiarity::new`].
    pub fn distance(&self, features: &[f32], background: Option<&Background>) -> f64 {
        self.distance_in(features, background, &mut Scratch::default())
    }

    /// As [`Familiarity::distance`], with buffers of the caller's.
    pub fn distance_in(&self, features: &[f32], background: Option<&Background>, scratch: &mut Scratch) -> f64 {
        // First, since the buffers are the same.
        let far = background.filter(|_| self.relative).map_or(0.0, |far| far.distance_in(features, scratch));
        let nearest = match &self.measure {
            Measure::Whitened(whitened) => whitened.nearest(features, background, scratch),
            Measure::Even(even) => match self.projection {
                None => even.nearest(features, scratch),
                Some(projection) => {
                    let mut projected = std::mem::take(&mut scratch.projected);
                    projected.resize(projection.features(), 0.0);
                    projection.apply(features, &mut projected);
                    let nearest = even.nearest(&projected, scratch);
                    scratch.projected = projected;
                    nearest
                }
            },
        };
        nearest - far
    }

    /// Whether an image with that distance is unknown.
    pub fn is_unknown(&self, distance: f64) -> bool {
        distance > f64::from(self.threshold)
    }

    /// Bytes on the heap.
    pub fn heap_bytes(&self) -> usize {
        match &self.measure {
            Measure::Whitened(whitened) => whitened.heap_bytes(),
            Measure::Even(even) => even.heap_bytes(),
        }
    }
}

impl Whitened {
    /// The smallest squared distance of features from a mean.
    fn nearest(&self, features: &[f32], background: Option<&Background>, scratch: &mut Scratch) -> f64 {
        let d_model = features.len();
        let Scratch { x, taken, .. } = scratch;
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
        self.means.chunks_exact(d_model).map(&mut distance).fold(f64::INFINITY, f64::min)
    }

    fn heap_bytes(&self) -> usize {
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
