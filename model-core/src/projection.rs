//! What the head and the statistics of a set see of the pooled features: fewer of them than the backbone has, so that each
//! row takes fewer bytes. `FORMAT.md` defines it under "Head".
//!
//! Folding adds features up, each with a sign of its own: `z[j] = sum of sign[i] * f[i] over i = j, j + K, j + 2 K, ..`. The
//! rows of that matrix have no feature in common, so it keeps lengths and products on average, as random projections
//! do (Weinberger et al., "Feature Hashing", 2009), costs an addition a feature, and no byte anywhere.

use serde::{Deserialize, Serialize};

use crate::kernels::rotation::splitmix64;

/// Most features that a set may see.
pub const MAX_FEATURES: usize = 1 << 16;

/// How features become those that a set sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "form", rename_all = "snake_case", deny_unknown_fields)]
pub enum Projection {
    Folded {
        /// How many come out; fewer than go in.
        features: usize,
    },
}

impl Projection {
    /// How many features come out.
    pub const fn features(self) -> usize {
        let Self::Folded { features } = self;
        features
    }

    /// Writes to `out`, of [`Projection::features`] values, what becomes of `features`, which are finite.
    pub fn apply(self, features: &[f32], out: &mut [f32]) {
        out.fill(0.0);
        let width = out.len().max(1);
        for (n, features) in (0u64..).zip(features.chunks(64)) {
            let signs = splitmix64(0, n);
            let first = n as usize * 64;
            for (bit, value) in features.iter().enumerate() {
                let sign = (signs >> bit & 1) << 31;
                if let Some(sum) = out.get_mut((first + bit) % width) {
                    *sum += f32::from_bits(value.to_bits() ^ sign as u32);
                }
            }
        }
    }

    /// [`Projection::apply`] to rows `[rows, d_model]`.
    pub fn rows(self, rows: &[f32], d_model: usize) -> Vec<f32> {
        let (d_model, features) = (d_model.max(1), self.features().max(1));
        let mut projected = vec![0.0; rows.len() / d_model * features];
        for (row, projected) in rows.chunks_exact(d_model).zip(projected.chunks_exact_mut(features)) {
            self.apply(row, projected);
        }
        projected
    }

    /// Of rows `[rows, features]` of weights on what comes out, those on what goes in, `[rows, d_model]`.
    pub fn unfold(self, rows: &[f32], d_model: usize) -> Vec<f32> {
        let width = self.features().max(1);
        let signs: Vec<u64> = (0..d_model.div_ceil(64) as u64).map(|n| splitmix64(0, n)).collect();
        let weight = |row: &[f32], i: usize| {
            let value = row[i % width];
            if signs[i / 64] >> (i % 64) & 1 == 1 { -value } else { value }
        };
        rows.chunks_exact(width)
            .flat_map(|row| (0..d_model).map(move |i| (row, i)))
            .map(|(row, i)| weight(row, i))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::SplitMix64;

    #[test]
    fn folding_is_the_formula_and_unfolded_rows_give_the_same_products() {
        let (d_model, features) = (200, 48);
        let (folded, mut random) = (Projection::Folded { features }, SplitMix64::at(3, 0));
        let (x, rows) = (random.normals(d_model, 1.0), random.normals(2 * features, 1.0));
        let mut z = vec![f32::NAN; features];
        folded.apply(&x, &mut z);
        for (j, z) in z.iter().enumerate() {
            let signed = (j..d_model).step_by(features).map(|i| {
                let negative = splitmix64(0, i as u64 / 64) >> (i % 64) & 1 == 1;
                if negative { -x[i] } else { x[i] }
            });
            assert_eq!(*z, signed.sum::<f32>(), "{j}");
        }
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
        let unfolded = folded.unfold(&rows, d_model);
        for (row, unfolded) in rows.chunks_exact(features).zip(unfolded.chunks_exact(d_model)) {
            assert!((dot(row, &z) - dot(unfolded, &x)).abs() < 1e-4);
        }
    }
}
