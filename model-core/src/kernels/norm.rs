//! LayerNorm over rows.

use super::isa::Isa;
use super::simd::{Simd, Work, dispatch};

/// `out = (x - mean) / sqrt(variance + eps) * gamma + beta` for one row, variance biased: the definition.
pub fn layer_norm_scalar(x: &[f32], gamma: &[f32], beta: &[f32], eps: f32, out: &mut [f32]) {
    let n = x.len() as f64;
    let mean = x.iter().map(|&v| f64::from(v)).sum::<f64>() / n;
    let variance = x.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / n;
    let scale = 1.0 / (variance + f64::from(eps)).sqrt();
    for (((out, &x), &gamma), &beta) in out.iter_mut().zip(x).zip(gamma).zip(beta) {
        *out = ((f64::from(x) - mean) * scale * f64::from(gamma) + f64::from(beta)) as f32;
    }
}

/// [`layer_norm_scalar`] for every row of `x` `[rows, gamma.len()]`. The two sums of n terms round to within
/// `n * 2^-24` of the row's largest magnitude.
///
/// # Panics
/// When the lengths differ or are not a whole number of rows.
pub fn layer_norm(isa: Isa, x: &[f32], gamma: &[f32], beta: &[f32], eps: f32, out: &mut [f32]) {
    let n = gamma.len();
    assert!(beta.len() == n && x.len() == out.len() && x.len().is_multiple_of(n.max(1)), "rows of another length");
    if n > 0 {
        dispatch(isa, LayerNorm { x, gamma, beta, eps, out });
    }
}

struct LayerNorm<'a> {
    x: &'a [f32],
    gamma: &'a [f32],
    beta: &'a [f32],
    eps: f32,
    out: &'a mut [f32],
}

impl Work for LayerNorm<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let n = self.gamma.len();
        for (x, out) in self.x.chunks_exact(n).zip(self.out.chunks_exact_mut(n)) {
            layer_norm_row(simd, x, self.gamma, self.beta, self.eps, out);
        }
    }
}

/// The sum of `f(x)`; a tail shorter than a vector comes last.
#[inline(always)]
fn sum<S: Simd>(simd: S, x: &[f32], vector: impl Fn(S::V) -> S::V, scalar: impl Fn(f32) -> f32) -> f32 {
    let mut total = simd.splat(0.0);
    let chunks = x.chunks_exact(S::LANES);
    let tail: f32 = chunks.remainder().iter().map(|&v| scalar(v)).sum();
    for chunk in chunks {
        total = simd.add(total, vector(simd.load(chunk)));
    }
    simd.sum(total) + tail
}

#[inline(always)]
fn layer_norm_row<S: Simd>(simd: S, x: &[f32], gamma: &[f32], beta: &[f32], eps: f32, out: &mut [f32]) {
    let n = x.len() as f32;
    let mean = sum(simd, x, |v| v, |v| v) / n;
    let centre = simd.splat(mean);
    let square = |v| {
        let d = simd.sub(v, centre);
        simd.mul(d, d)
    };
    let variance = sum(simd, x, square, |v| (v - mean) * (v - mean)) / n;
    let scale = 1.0 / (variance + eps).sqrt();
    let factor = simd.splat(scale);
    let body = x.len() / S::LANES * S::LANES;
    for i in (0..body).step_by(S::LANES) {
        let v = simd.mul(simd.sub(simd.load(&x[i..]), centre), factor);
        simd.store(&mut out[i..], simd.mul_add(v, simd.load(&gamma[i..]), simd.load(&beta[i..])));
    }
    for i in body..x.len() {
        out[i] = (x[i] - mean) * scale * gamma[i] + beta[i];
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn layer_norm_equals_the_definition(n in 1usize..70, rows in 0usize..4, offset in -3f32..3.0, seed in 0usize..1000) {
            let value = |i: usize| ((i + seed) * 7919 % 401) as f32 / 100.0 - 2.0;
            let x: Vec<f32> = (0..rows * n).map(|i| value(i) + offset).collect();
            let (gamma, beta): (Vec<_>, Vec<_>) = (0..n).map(|i| (value(i + 5), value(i + 9))).unzip();
            for isa in Isa::available() {
                let mut fast = vec![0.0; rows * n];
                layer_norm(isa, &x, &gamma, &beta, 1e-5, &mut fast);
                for (x, fast) in x.chunks_exact(n).zip(fast.chunks_exact(n)) {
                    let mut exact = vec![0.0; n];
                    layer_norm_scalar(x, &gamma, &beta, 1e-5, &mut exact);
                    // The mean is off by at most n eps max|x|, which the division by the deviation magnifies.
                    let deviation = {
                        let mean = x.iter().sum::<f32>() / n as f32;
                        (x.iter().map(|v| (v - mean).powi(2)).sum::<f32>() / n as f32 + 1e-5).sqrt()
                    };
                    let bound = 4.0 * n as f32 * f32::EPSILON * (5.0 / deviation) * 2.0 + 1e-6;
                    for (fast, exact) in fast.iter().zip(&exact) {
                        prop_assert!((fast - exact).abs() <= bound, "{isa}: {fast} is not {exact}");
                    }
                }
            }
        }
    }
}
