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

/// Absolute error of [`gelu`] beyond the rounding of its last subtraction, `2^-24 |x|`: 5.2e-7 of the polynomial or
/// 2.2e-7 of its pieces, 4e-7 past `GELU_END` where it is held, and the roundings of Horner's rule, whose last steps
/// see values below 0.5.
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

/// Distance of the middles of [`GELU_PIECES`]: 15.5 of it lie past [`GELU_END`].
const GELU_PIECE: f32 = 0.34;

/// The same in pieces, for CPUs that look coefficients up in a register: near `n * GELU_PIECE` a polynomial of
/// degree 4 in `a / GELU_PIECE - n`, minimax for each n, within 2.2e-7. By power, then by n.
const GELU_PIECES: [[f32; 16]; 5] = [
    [
        0.0,
        0.124_755_6,
        0.168_811_51,
        0.156_941_52,
        0.118_204_355,
        0.075_761_29,
        0.042_177_33,
        0.020_602_036,
        0.008_878_338,
        0.003_386_455_1,
        0.001_145_559_5,
        3.441_181e-4,
        9.187_304e-5,
        2.181_301_2e-5,
        4.607_558_4e-6,
        8.661_598_4e-7,
    ],
    [
        0.170_000_14,
        0.081_229_486,
        0.011_211_554_5,
        -0.029_922_163,
        -0.043_611_888,
        -0.039_208_744,
        -0.027_512_567,
        -0.016_066_26,
        -0.008_019_223,
        -0.003_468_123_7,
        -0.001_309_814_3,
        -4.341_263_3e-4,
        -1.266_895e-4,
        -3.262_732_2e-5,
        -7.427_855e-6,
        -1.497_030_4e-6,
    ],
    [
        -0.046_119_65,
        -0.041_011_292,
        -0.028_136_726,
        -0.013_152_978,
        -0.001_375_936_3,
        0.004_837_869,
        0.006_222_104,
        0.004_975_599_7,
        0.003_080_191,
        0.001_572_756_6,
        6.808_881e-4,
        2.536_185_5e-4,
        8.199_6e-5,
        2.314_163_6e-5,
        5.724_015_4e-6,
        1.242_767_1e-6,
    ],
    [
        9.438_482e-6,
        0.003_232_363_1,
        0.004_955_603_3,
        0.004_667_510_7,
        0.003_028_476_8,
        0.001_172_757_6,
        -9.502_149_6e-5,
        -6.014_888_6e-4,
        -5.949_588_4e-4,
        -3.976_168_2e-4,
        -2.086_848_4e-4,
        -9.053_652e-5,
        -3.326_637e-5,
        -1.049_45e-5,
        -2.866_847e-6,
        -6.789_220_5e-7,
    ],
    [
        8.725_073_4e-4,
        6.674_449_5e-4,
        1.728_907_1e-4,
        -2.863_534e-4,
        -4.827_591_5e-4,
        -4.107_866_8e-4,
        -2.171_221e-4,
        -4.796_705_6e-5,
        3.715_454_7e-5,
        5.334_389_8e-5,
        3.888_484_2e-5,
        2.083_938_3e-5,
        8.968_697e-6,
        3.215_130_2e-6,
        9.786_512e-7,
        2.659_159e-7,
    ],
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

/// [`gelu`] of a vector.
pub(super) struct GeluVector;

impl<S: Simd> Map<S> for GeluVector {
    #[inline(always)]
    fn map(&self, simd: S, x: S::V) -> S::V {
        let a = simd.min(simd.abs(x), simd.splat(GELU_END));
        let positive = simd.max(x, simd.splat(0.0));
        if S::LOOKS_UP {
            return simd.sub(positive, pieces(simd, a));
        }
        let t = simd.mul_add(a, simd.splat(2.0 / GELU_END), simd.splat(-1.0));
        let mut tail = simd.splat(GELU_TAIL[14]);
        for &coefficient in GELU_TAIL[..14].iter().rev() {
            tail = simd.mul_add(tail, t, simd.splat(coefficient));
        }
        simd.sub(positive, tail)
    }
}

/// [`GELU_PIECES`] of `a` in 0..=[`GELU_END`].
#[inline(always)]
fn pieces<S: Simd>(simd: S, a: S::V) -> S::V {
    /// Adding this leaves the nearest integer in the lowest bits.
    const ROUND: f32 = 1.5 * (1 << 23) as f32;
    let pieces = simd.splat(1.0 / GELU_PIECE);
    let shifted = simd.mul_add(a, pieces, simd.splat(ROUND));
    let f = simd.mul_add(a, pieces, simd.sub(simd.splat(ROUND), shifted));
    let mut tail = simd.look_up(&GELU_PIECES[4], shifted);
    for coefficients in GELU_PIECES[..4].iter().rev() {
        tail = simd.mul_add(tail, f, simd.look_up(coefficients, shifted));
    }
    tail
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
