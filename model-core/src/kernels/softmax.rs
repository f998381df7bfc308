//! Softmax over rows, for attention.

use super::isa::Isa;
use super::simd::{Map, Simd, Work, dispatch};

/// `row <- exp(scale * row - max) / sum` for every row of `x` `[rows, cols]`, rows `stride` apart: the definition.
pub fn softmax_scalar(x: &mut [f32], cols: usize, stride: usize, scale: f32) {
    for row in x.chunks_mut(stride.max(1)) {
        let row = &mut row[..cols];
        let max = row.iter().fold(f32::NEG_INFINITY, |m, &v| m.max(scale * v));
        let sum: f64 = row.iter().map(|&v| f64::from(scale * v - max).exp()).sum();
        for v in row {
            *v = (f64::from(scale * *v - max).exp() / sum) as f32;
        }
    }
}

/// Relative error of the exponential for arguments in -87..=0: `f * 2^-24`-sized roundings of the reduction (at most
/// 2^-22 in all) and 3e-7 of the polynomial with its evaluation; doubled by the division by a sum with the same error.
/// An argument below -87 counts as -87, which is 1.6e-38 instead of less.
pub const SOFTMAX_ERROR: f32 = 2e-6;

/// [`softmax_scalar`] within a relative error of [`SOFTMAX_ERROR`] (plus `2^-23 * |scale * row|`, the rounding of the
/// argument itself, and `cols * 2^-24` for the sum). `scale` must not be negative.
///
/// # Panics
/// When `cols` exceeds `stride`, or `x` is not a whole number of rows.
pub fn softmax(isa: Isa, x: &mut [f32], cols: usize, stride: usize, scale: f32) {
    assert!(cols <= stride && x.len().is_multiple_of(stride.max(1)), "rows of another length");
    if cols > 0 {
        dispatch(isa, Softmax { x, cols, stride, scale });
    }
}

struct Softmax<'a> {
    x: &'a mut [f32],
    cols: usize,
    stride: usize,
    scale: f32,
}

impl Work for Softmax<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for row in self.x.chunks_exact_mut(self.stride) {
            softmax_row(simd, &mut row[..self.cols], self.scale);
        }
    }
}

#[inline(always)]
fn softmax_row<S: Simd>(simd: S, row: &mut [f32], scale: f32) {
    let (body, tail) = row.split_at_mut(row.len() / S::LANES * S::LANES);
    let mut max = simd.splat(f32::NEG_INFINITY);
    for chunk in body.chunks_exact(S::LANES) {
        max = simd.max(max, simd.load(chunk));
    }
    let max = tail.iter().copied().fold(simd.max_lane(max), f32::max);
    let (scale, shift) = (simd.splat(scale), simd.splat(-max * scale));
    let mut sum = simd.splat(0.0);
    for chunk in body.chunks_exact_mut(S::LANES) {
        let e = ShiftedExp::<S> { scale, shift }.map(simd, simd.load(chunk));
        sum = simd.add(sum, e);
        simd.store(chunk, e);
    }
    let mut total = simd.sum(sum);
    if !tail.is_empty() {
        simd.map_in_place(tail, ShiftedExp::<S> { scale, shift });
        total += tail.iter().sum::<f32>();
    }
    simd.map_in_place(row, Times::<S>(simd.splat(1.0 / total)));
}

/// `exp(scale * v + shift)`.
struct ShiftedExp<S: Simd> {
    scale: S::V,
    shift: S::V,
}

impl<S: Simd> Map<S> for ShiftedExp<S> {
    #[inline(always)]
    fn map(&self, simd: S, v: S::V) -> S::V {
        exp_vector(simd, simd.mul_add(v, self.scale, self.shift))
    }
}

/// `self.0 * v`.
struct Times<S: Simd>(S::V);

impl<S: Simd> Map<S> for Times<S> {
    #[inline(always)]
    fn map(&self, simd: S, v: S::V) -> S::V {
        simd.mul(v, self.0)
    }
}

/// Taylor coefficients of `exp` from the sixth power down, enough on `|f| <= ln(2) / 2`: the next term is below 1.2e-7.
const EXP: [f32; 7] = [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0];

/// `exp(x)` for `x <= 0`; below -87 it is `exp(-87)`.
#[inline(always)]
fn exp_vector<S: Simd>(simd: S, x: S::V) -> S::V {
    /// Adding this leaves the nearest integer in the lowest bits.
    const ROUND: f32 = 1.5 * (1 << 23) as f32;
    /// ln 2 in two parts, the first with few enough bits that its product with the integer is exact.
    const LN2: (f32, f32) = (0.693_359_4, -2.121_944_4e-4);
    let x = simd.min(simd.max(x, simd.splat(-87.0)), simd.splat(0.0));
    let shifted = simd.mul_add(x, simd.splat(std::f32::consts::LOG2_E), simd.splat(ROUND));
    let n = simd.sub(shifted, simd.splat(ROUND));
    let f = simd.neg_mul_add(n, simd.splat(LN2.0), x);
    let f = simd.neg_mul_add(n, simd.splat(LN2.1), f);
    let mut p = simd.splat(EXP[0]);
    for &coefficient in &EXP[1..] {
        p = simd.mul_add(p, f, simd.splat(coefficient));
    }
    simd.mul_pow2(p, shifted)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn softmax_equals_the_definition(
            cols in 1usize..70, rows in 0usize..4, pad in 0usize..3, scale in 0f32..2.0, seed in 0usize..1000,
        ) {
            let stride = cols + pad;
            let x: Vec<f32> = (0..rows * stride).map(|i| ((i + seed) * 7919 % 401) as f32 / 10.0 - 20.0).collect();
            let mut exact = x.clone();
            softmax_scalar(&mut exact, cols, stride, scale);
            for isa in Isa::available() {
                let mut fast = x.clone();
                softmax(isa, &mut fast, cols, stride, scale);
                for (i, (fast, exact)) in fast.iter().zip(&exact).enumerate() {
                    let bound = SOFTMAX_ERROR + 2.0 * scale * 20.0 * f32::EPSILON + cols as f32 * f32::EPSILON;
                    prop_assert!((fast - exact).abs() <= bound * exact.abs() + 1e-37, "{isa}, {i}: {fast} is not {exact}");
                }
            }
        }
    }
}
