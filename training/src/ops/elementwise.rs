//! GELU with the exact error function.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};
use model_core::kernels::vectorized;

use super::{output, slice, tensor_like, view};

/// `x Phi(x)`, Phi the normal distribution function.
pub fn gelu(x: &Tensor) -> Result<Tensor> {
    x.contiguous()?.apply_op1(Gelu)
}

struct Gelu;

/// `(Phi(x), phi(x))`: the normal distribution function and its density, without a branch so that loops vectorise.
///
/// erfc by Abramowitz and Stegun 7.1.26, absolute error below 1.5e-7, plus a few f32 roundings.
#[inline(always)]
pub(super) fn normal(x: f32) -> (f32, f32) {
    let z = x.abs() * std::f32::consts::FRAC_1_SQRT_2;
    let gauss = exp_nonpositive(-z * z);
    let t = 1.0 / (1.0 + 0.327_591_1 * z);
    let poly = t * (0.254_829_6 + t * (-0.284_496_74 + t * (1.421_413_8 + t * (-1.453_152_1 + t * 1.061_405_4))));
    let tail = 0.5 * poly * gauss;
    let phi = if x >= 0.0 { 1.0 - tail } else { tail };
    (phi, gauss * 0.398_942_3)
}

/// `e^x` for `x <= 0`, relative error below 2e-7 down to the smallest normal number, 0 below it. Cephes' `expf`.
///
/// Additions of 1.5 * 2^23 round to the nearest integer, ties to even, and leave it in the lowest bits: a rounding function
/// and a conversion that saturates keep the compiler from vectorising loops, six times slower.
#[inline(always)]
pub(super) fn exp_nonpositive(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0;
    let clamped = if x > -87.0 { x } else { -87.0 };
    let shifted = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = clamped - n * 0.693_359_4 - n * -2.121_944_4e-4;
    let poly = 1.987_569_1e-4;
    let poly = poly * r + 1.398_199_9e-3;
    let poly = poly * r + 8.333_452e-3;
    let poly = poly * r + 4.166_579_6e-2;
    let poly = poly * r + 1.666_666_5e-1;
    let poly = poly * r + 0.5;
    let mantissa = poly * r * r + r + 1.0;
    // n is in -126..=0, so the exponent field stays in 1..=127.
    let power = f32::from_bits(shifted.to_bits().wrapping_add(127) << 23);
    if x < -87.0 { 0.0 } else { mantissa * power }
}

impl CustomOp1 for Gelu {
    fn name(&self) -> &'static str {
        "gelu"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = slice(x, layout)?;
        let mut y = vec![0.0; x.len()];
        vectorized(
            #[inline(always)]
            || {
                for (y, &v) in y.iter_mut().zip(x) {
                    *y = v * normal(v).0;
                }
            },
        );
        Ok(output(y, layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let grad = grad.contiguous()?;
        let (x_view, grad_view) = (view(x)?, view(&grad)?);
        let (x_values, g) = (x_view.values()?, grad_view.values()?);
        let mut grad_x = vec![0.0; x_values.len()];
        vectorized(
            #[inline(always)]
            || {
                for ((dx, &v), g) in grad_x.iter_mut().zip(x_values).zip(g) {
                    let (cumulative, density) = normal(v);
                    *dx = g * (cumulative + v * density);
                }
            },
        );
        Ok(Some(tensor_like(grad_x, x)?))
    }
}
