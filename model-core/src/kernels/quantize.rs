//! Per-token absmax int8 quantisation of activations (`golden/reference.py: quantize_activations`).
//!
//! The definition is [`scalar::quantize_row`]. The fast row below gives the same codes bit for bit. It rounds by adding
//! 1.5 * 2^23, where an f32 has no bits left for a fraction: the sum rounds half to even, and its low byte is the code.
//! It multiplies by the inverse of the step first, and divides as the definition does only in rows where a quotient is so
//! close to the middle of two codes that the two might differ.

use super::error::{KernelError, expect_len};
use super::gemm::scalar;
use super::isa::Isa;
use super::simd::{Simd, Work, dispatch};

/// Quantises every row of `x` `[rows, cols]` by itself: `step = max |x| / 127` (1 for a row of zeros),
/// `code = round_half_even(x / step)`, in -127..=127. Writes `codes` `[rows, cols]` and `steps` `[rows]`.
///
/// `x` must be finite; codes of a row that is not stay in range but mean nothing.
///
/// # Errors
/// [`KernelError::Length`] when `x` or `codes` is not `steps.len() * cols` long.
pub fn quantize_rows(isa: Isa, x: &[f32], cols: usize, codes: &mut [i8], steps: &mut [f32]) -> Result<(), KernelError> {
    expect_len("activations", x.len(), steps.len().saturating_mul(cols))?;
    expect_len("activation codes", codes.len(), x.len())?;
    if cols == 0 {
        steps.fill(1.0);
        return Ok(());
    }
    if isa == Isa::SCALAR {
        for ((x, codes), step) in x.chunks_exact(cols).zip(codes.chunks_exact_mut(cols)).zip(steps) {
            *step = scalar::quantize_row(x, codes);
        }
    } else {
        dispatch(isa, Rows { x, cols, codes, steps });
    }
    Ok(())
}

/// The arguments of [`quantize_rows`], checked.
struct Rows<'a> {
    x: &'a [f32],
    cols: usize,
    codes: &'a mut [i8],
    steps: &'a mut [f32],
}

impl Work for Rows<'_> {
    type Output = ();

    /// Plain loops, which the compiler turns into vectors of whatever this is compiled for: `S` is not asked.
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let rows = self.x.chunks_exact(self.cols).zip(self.codes.chunks_exact_mut(self.cols));
        for ((x, codes), step) in rows.zip(self.steps) {
            *step = row(x, codes);
        }
    }
}

/// Below this a step could be subnormal, and `x / step` no longer be close to 127 at most.
const SMALLEST_MAX: f32 = 1e-30;

/// 1.5 * 2^23.
const ROUND: f32 = 12_582_912.0;

#[inline(always)]
fn row(x: &[f32], codes: &mut [i8]) -> f32 {
    // Magnitudes order like their bits; unlike `f32::max`, an integer maximum is a vector instruction.
    let max = f32::from_bits(x.iter().fold(0, |max, v| max.max(v.to_bits() & !(1 << 31))));
    if !(SMALLEST_MAX..=f32::MAX).contains(&max) {
        return scalar::quantize_row(x, codes);
    }
    let step = max / 127.0;
    let inverse = 1.0 / step;
    let mut farthest = 0;
    for (code, v) in codes.iter_mut().zip(x) {
        let quotient = v * inverse;
        let rounded = quotient + ROUND;
        *code = rounded.to_bits() as i8;
        let distance = quotient - (rounded - ROUND);
        farthest = farthest.max(distance.to_bits() & !(1 << 31));
    }
    if f32::from_bits(farthest) > CLEAR {
        for (code, v) in codes.iter_mut().zip(x) {
            *code = (v / step + ROUND).to_bits() as i8;
        }
    }
    step
}

/// Quotients no farther than this from a code round to it, whether divided or multiplied by the inverse: steps and inverses
/// are normal, so that the quotient, at most 127.00002, is off by 2^-24 of it if divided and by 2^-23 and a little if
/// multiplied, together 2.3e-5 at most, and 2^-15 is 3.1e-5.
const CLEAR: f32 = 0.5 - 1.0 / (1 << 15) as f32;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn expect_definition(x: &[f32], cols: usize) {
        let rows = x.len() / cols;
        let (mut codes, mut steps) = (vec![0; x.len()], vec![0.0; rows]);
        for ((x, codes), step) in x.chunks(cols).zip(codes.chunks_mut(cols)).zip(&mut steps) {
            *step = scalar::quantize_row(x, codes);
        }
        for isa in Isa::available() {
            let (mut got_codes, mut got_steps) = (vec![99; x.len()], vec![f32::NAN; rows]);
            quantize_rows(isa, x, cols, &mut got_codes, &mut got_steps).unwrap();
            assert_eq!(got_codes, codes, "{isa}: {x:?}");
            let bits = |steps: &[f32]| steps.iter().map(|s| s.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&got_steps), bits(&steps), "{isa}: {x:?}");
        }
    }

    proptest! {
        /// Any bits at all: subnormal, infinite and not-a-number rows included.
        #[test]
        fn every_isa_equals_the_definition(x in prop::collection::vec(prop::num::f32::ANY, 1..80)) {
            expect_definition(&x, x.len());
        }

        /// Quotients that lie at or next to the middle of two codes.
        #[test]
        fn near_ties_too(codes in prop::collection::vec((-127i32..127, -3i32..=3), 1..70), step in 1e-3f32..1e3) {
            let near = |(code, ulps): (i32, i32)| {
                let tie = (code as f32 + 0.5) * step;
                f32::from_bits(tie.to_bits().wrapping_add_signed(ulps))
            };
            let x: Vec<f32> = codes.into_iter().map(near).chain([127.0 * step]).collect();
            expect_definition(&x, x.len());
        }

        #[test]
        fn ordinary_rows_too(
            x in prop::collection::vec(-4.0f32..4.0, 36..300),
            exponent in -40i32..38,
        ) {
            let x: Vec<f32> = x.iter().map(|v| v * 10f32.powi(exponent)).collect();
            expect_definition(&x[..x.len() / 18 * 18], 18);
        }
    }

    #[test]
    fn ties_round_to_even_and_extremes_reach_127() {
        // The step is 1, so the codes are the rounded values.
        let x = [127.0, -127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, -0.0, 0.0];
        let (mut codes, mut step) = ([0; 11], [0.0]);
        for isa in Isa::available() {
            quantize_rows(isa, &x, 11, &mut codes, &mut step).unwrap();
            assert_eq!(codes, [127, -127, 0, 2, 2, 0, -2, -2, 126, 0, 0], "{isa}");
            assert_eq!(step, [1.0]);
        }
        expect_definition(&[0.0; 40], 20);
        expect_definition(&[-0.0; 7], 7);
        expect_definition(&[f32::MAX, f32::MIN, 1.0], 3);
        expect_definition(&[1e-45, -3e-45, 0.0], 3);
    }

    #[test]
    fn lengths_are_checked() {
        let isa = Isa::best();
        assert!(quantize_rows(isa, &[0.0; 6], 3, &mut [0; 6], &mut [0.0; 3]).is_err());
        assert!(quantize_rows(isa, &[0.0; 6], 3, &mut [0; 5], &mut [0.0; 2]).is_err());
        assert!(quantize_rows(isa, &[], 3, &mut [], &mut []).is_ok());
        let mut steps = [0.0; 2];
        quantize_rows(isa, &[], 0, &mut [], &mut steps).unwrap();
        assert_eq!(steps, [1.0; 2]);
    }
}
