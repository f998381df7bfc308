//! Elementwise activations.

use super::isa::Isa;
use super::simd::{Map, Simd, Work, dispatch};

/// Exact-erf GELU, `0.5 x (1 + erf(x / sqrt 2))`, in place: the definition.
pub fn gelu_scalar(x: &mut [f32]) {
    for v in x {
        let x = f64::from(*v);
        *v = (0.5 * x * (1.0 + erf(x * std::f64::consts::FRAC_1_SQRT_2))) as f32;
    }
}

/// `erf(x) = 2 / sqrt(pi) exp(-x^2) sum over n of 2^n x^(2n+1) / (1 * 3 * .. * (2n+1))` (Abramowitz and Stegun 7.1.6).
/// All terms have one sign, so that nothing cancels.
fn erf(x: f64) -> f64 {
    // 1 - erf(6) is 2e-17, less than f64 tells from 1.
    if x.abs() >= 6.0 {
        return x.signum();
    }
    let (mut term, mut sum, mut n) = (x, x, 0.0);
    while term.abs() > sum.abs() * f64::EPSILON / 4.0 {
        n += 1.0;
        term *= 2.0 * x * x / (2.0 * n + 1.0);
        sum += term;
    }
    std::f64::consts::FRAC_2_SQRT_PI * (-x * x).exp() * sum
}

/// Absolute error of [`gelu`] beyond the rounding of its last subtraction, `2^-24 |x|`: 5.2e-7 of the polynomial,
/// 4e-7 past `GELU_END` where it is held, and the roundings of Horner's rule, whose last steps see values below 0.5.
pub const GELU_ERROR: f32 = 1e-6;

/// Where the polynomial ends; `gelu(x) - max(x, 0)` is below 4e-7 from here on.
const GELU_END: f32 = 5.25;

/// `a * (1 - cdf(a))` for `a` in 0..=[`GELU_END`] as a polynomial in `t = 2 a / GELU_END - 1`, minimax. A monomial in
/// `a^2` for the erf itself would cancel digits away; centred on the interval, no coefficient exceeds 0.6.
const GELU_TAIL: [f32; 15] = [
    0.011_373_176,
    -0.076_302_65,
    0.214_338_02,
    -0.291_149_44,
    0.082_953_624,
    0.358_764_7,
    -0.582_568,
    0.252_602_4,
    0.297_140_27,
    -0.398_080_05,
    0.028_023_87,
    0.188_784_4,
    -0.069_487_885,
    -0.034_619_737,
    0.018_227_138,
];

/// [`gelu_scalar`] within [`GELU_ERROR`]: `gelu(x) = max(x, 0) - |x| (1 - cdf(|x|))`, the second term a polynomial.
pub fn gelu(isa: Isa, x: &mut [f32]) {
    dispatch(isa, Gelu(x));
}

struct Gelu<'a>(&'a mut [f32]);

impl Work for Gelu<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        simd.map_in_place(self.0, GeluVector);
    }
}

struct GeluVector;

impl<S: Simd> Map<S> for GeluVector {
    #[inline(always)]
    fn map(&self, simd: S, x: S::V) -> S::V {
        let a = simd.min(simd.abs(x), simd.splat(GELU_END));
        let t = simd.mul_add(a, simd.splat(2.0 / GELU_END), simd.splat(-1.0));
        let mut tail = simd.splat(GELU_TAIL[14]);
        for &coefficient in GELU_TAIL[..14].iter().rev() {
            tail = simd.mul_add(tail, t, simd.splat(coefficient));
        }
        simd.sub(simd.max(x, simd.splat(0.0)), tail)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn erf_has_the_values_of_the_tables() {
        // Abramowitz and Stegun, table 7.1; 16 digits.
        let table = [
            (0.0, 0.0),
            (0.1, 0.112_462_916_018_284_89),
            (0.5, 0.520_499_877_813_046_5),
            (1.0, 0.842_700_792_949_714_9),
            (2.0, 0.995_322_265_018_952_7),
            (5.9, 1.0),
        ];
        for (x, expected) in table {
            for sign in [1.0, -1.0] {
                let error = (erf(sign * x) - sign * expected).abs();
                assert!(error < 1e-14, "erf({x}) is off by {error}");
            }
        }
        assert_eq!((erf(f64::INFINITY), erf(-1e300)), (1.0, -1.0));
    }

    #[test]
    fn gelu_is_within_its_bound_of_the_definition() {
        let x: Vec<f32> = (-200_000..=200_003).map(|i| i as f32 * 5e-5).chain([-1e6, -50.0, 50.0, 1e6]).collect();
        let mut exact = x.clone();
        gelu_scalar(&mut exact);
        for isa in Isa::available() {
            let mut fast = x.clone();
            gelu(isa, &mut fast);
            let mut worst = 0f32;
            for ((fast, exact), x) in fast.iter().zip(&exact).zip(&x) {
                let error = (fast - exact).abs();
                assert!(error <= GELU_ERROR + x.abs() * f32::EPSILON, "{isa}: gelu({x}) = {fast}, not {exact}");
                worst = worst.max(error);
            }
            println!("{isa}: gelu within {worst:.2e}");
        }
    }

    #[test]
    fn gelu_takes_any_length() {
        for isa in Isa::available() {
            for len in 0..40 {
                let mut x = vec![1.0; len];
                gelu(isa, &mut x);
                assert!(x.iter().all(|v| (v - 0.841_344_7).abs() < 2e-6), "{isa}, {len}");
            }
        }
    }
}
