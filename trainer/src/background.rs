//! Mean and covariance of features over images of everything: a diagonal and the directions of largest variance.

use anyhow::{Result, ensure};
use candle_core::{Device, Tensor};
use model_core::random::SplitMix64;
use model_core::weights::{Background, Covariance};

/// Rows of the factor.
const RANK: usize = 64;
/// Rounds of subspace iteration; the eigenvalues asked for are a few percent apart.
const ROUNDS: usize = 30;
/// Least variance of a feature once the factor is taken away, as a share of the mean variance: a feature that no image of
/// the background has would else make everything that has it infinitely strange.
const FLOOR: f64 = 0.01;
/// Least images for each row of the factor.
const IMAGES_PER_ROW: usize = 4;

/// The background of `features` `[images, d_model]` of images from `source`.
///
/// # Errors
/// When there are too few images.
pub fn background(features: &[f32], d_model: usize, source: &str) -> Result<Background> {
    low_rank(features, d_model, RANK, source)
}

pub(crate) fn low_rank(features: &[f32], d_model: usize, rank: usize, source: &str) -> Result<Background> {
    let images = features.len() / d_model;
    let rank = rank.min(d_model);
    let needed = (IMAGES_PER_ROW * rank).max(2);
    ensure!(images >= needed, "a background of rank {rank} needs {needed} images, and there are {images}");
    let mut mean = vec![0.0f64; d_model];
    for row in features.chunks_exact(d_model) {
        mean.iter_mut().zip(row).for_each(|(mean, value)| *mean += f64::from(*value) / images as f64);
    }
    let centred = features.iter().enumerate().map(|(i, value)| (f64::from(*value) - mean[i % d_model]) as f32);
    let centred: Vec<f32> = centred.collect();
    let mut variance = vec![0.0f64; d_model];
    for row in centred.chunks_exact(d_model) {
        variance.iter_mut().zip(row).for_each(|(sum, value)| *sum += f64::from(*value).powi(2) / (images - 1) as f64);
    }
    let centred = Tensor::from_vec(centred, (images, d_model), &Device::Cpu)?;
    let factor = largest_directions(&centred, rank)?;
    let floor = (FLOOR * variance.iter().sum::<f64>() / d_model as f64).max(f64::from(f32::MIN_POSITIVE));
    for row in factor.chunks_exact(d_model) {
        variance.iter_mut().zip(row).for_each(|(rest, value)| *rest -= f64::from(*value).powi(2));
    }
    Ok(Background {
        mean: mean.into_iter().map(|value| value as f32).collect(),
        covariance: Covariance::Diagonal {
            diagonal: variance.into_iter().map(|rest| rest.max(floor) as f32).collect(),
            factor,
        },
        source: source.to_owned(),
        images: images as u64,
    })
}

/// The eigenvectors of the covariance with the largest eigenvalues, each times the root of its own, `[rank, d_model]`.
fn largest_directions(centred: &Tensor, rank: usize) -> Result<Vec<f32>> {
    let (images, d_model) = centred.dims2()?;
    let mut rows = SplitMix64::at(1, 0).uniforms(rank * d_model, 1.0);
    let mut values = vec![0.0; rank];
    for _ in 0..ROUNDS {
        orthonormalise(&mut rows, d_model);
        let directions = Tensor::from_slice(&rows, (rank, d_model), &Device::Cpu)?;
        // Rows times the covariance.
        let shadows = directions.matmul(&centred.t()?)?;
        rows = (shadows.matmul(centred)? / (images - 1) as f64)?.flatten_all()?.to_vec1()?;
        let shadows: Vec<f32> = shadows.flatten_all()?.to_vec1()?;
        for (value, row) in values.iter_mut().zip(shadows.chunks_exact(images)) {
            *value = row.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / (images - 1) as f64;
        }
    }
    orthonormalise(&mut rows, d_model);
    for (row, value) in rows.chunks_exact_mut(d_model).zip(values) {
        row.iter_mut().for_each(|v| *v = (f64::from(*v) * value.sqrt()) as f32);
    }
    Ok(rows)
}

/// Gram-Schmidt, twice for the digits that the first pass loses. A row that depends on those before becomes zero.
fn orthonormalise(rows: &mut [f32], d_model: usize) {
    let dot = |a: &[f32], b: &[f32]| -> f64 { a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum() };
    for at in (0..rows.len()).step_by(d_model.max(1)) {
        let (before, rest) = rows.split_at_mut(at);
        let row = &mut rest[..d_model];
        let length = dot(row, row).sqrt();
        for other in before.chunks_exact(d_model).chain(before.chunks_exact(d_model)) {
            let along = dot(row, other);
            row.iter_mut().zip(other).for_each(|(v, o)| *v = (f64::from(*v) - along * f64::from(*o)) as f32);
        }
        let left = dot(row, row).sqrt();
        let scale = if left > 1e-6 * length { left.recip() } else { 0.0 };
        row.iter_mut().for_each(|v| *v = (f64::from(*v) * scale) as f32);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_directions_and_the_rest_are_the_covariance() {
        // Independent normal numbers along known directions: 9 along (1, 1, 0, 0) / sqrt(2), 4 along the third axis, and
        // 0.25 along all.
        let (count, d_model) = (4000, 4);
        let mut random = SplitMix64::at(2, 0);
        let mut features = Vec::new();
        for _ in 0..count {
            let (a, b) = (random.normals(1, 3.0)[0], random.normals(1, 2.0)[0]);
            let noise = random.normals(d_model, 0.5);
            let root = 0.5f32.sqrt();
            features.extend([a * root + 5.0 + noise[0], a * root + noise[1], b + noise[2], noise[3]]);
        }
        let got = low_rank(&features, d_model, 2, "test").unwrap();
        assert_eq!((got.images, &*got.source), (4000, "test"));
        let Covariance::Diagonal { diagonal, factor } = got.covariance else { panic!("not low rank") };
        let value = |r: usize, c: usize| {
            let low: f32 = factor.chunks_exact(d_model).map(|row| row[r] * row[c]).sum();
            low + if r == c { diagonal[r] } else { 0.0 }
        };
        let expected = [[4.75, 4.5, 0., 0.], [4.5, 4.75, 0., 0.], [0., 0., 4.25, 0.], [0., 0., 0., 0.25]];
        for (r, row) in expected.iter().enumerate() {
            for (c, expected) in row.iter().enumerate() {
                // The spread of a variance of 9 over 4000 draws is 0.2.
                assert!((value(r, c) - expected).abs() < 0.6, "{r} {c}: {} is not {expected}", value(r, c));
            }
        }
        assert!((got.mean[0] - 5.0).abs() < 0.3, "{:?}", got.mean);
        assert!(low_rank(&features[..20], d_model, 2, "test").unwrap_err().to_string().contains("needs 8 images"));
    }

    #[test]
    fn features_that_never_vary_have_some_variance_all_the_same() {
        let features: Vec<f32> = (0..40).flat_map(|i| [i as f32, 0.0, 0.0]).collect();
        let Covariance::Diagonal { diagonal, factor } = low_rank(&features, 3, 2, "test").unwrap().covariance else {
            panic!("not low rank")
        };
        assert!(diagonal.iter().all(|v| *v > 0.4), "{diagonal:?}");
        assert!(factor.iter().all(|v| v.is_finite()), "{factor:?}");
    }
}
