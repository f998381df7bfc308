//! Products of f32 matrices whose factors are rounded to bf16: training's, where the CPU multiplies bf16.
//!
//! `out[m, n] (+)= scale * sum over k of bf16(lhs[m, k]) * bf16(rhs[k, n])`, summed in f32. A product of two bf16 numbers is
//! exact in f32, so that all that is lost is the rounding of the factors, 2^-9 of each at most, and what any sum in f32
//! loses. Small integers, the codes of ternary and int8 matrices among them, lose nothing.
//!
//! [`scalar`] is the definition. The packed layout and the loops:
//!
//! ```text
//! for each K_BLOCK of k:                        three panels of rhs and one of lhs share the first-level cache
//!     pack rhs: panels of 16 columns            [k / 2, 16] pairs of bf16: what one vdpbf16ps multiplies
//!     for each M_BLOCK rows of lhs:             the second-level cache
//!         pack lhs: panels of 16 rows           the same layout
//!         for each 3 panels of rhs, for each 8 rows:
//!             acc[8, 48] in registers           a pair of lhs is a broadcast, three multiply-adds use it
//!             out (+)= scale * acc
//! ```
//!
//! Nothing is packed ahead: training changes all weights in every step, and multiplies by transposes on the way back. Both
//! layouts of a factor, its transpose included, are packed with vector instructions.

pub use super::mat::{Mat, Write};
use crate::kernels::isa::Bf16;

/// Memory that products pack their factors in, kept from one to the next.
#[derive(Debug, Default)]
pub struct Scratch {
    #[cfg(target_arch = "x86_64")]
    packed: Vec<super::avx512_bf16::Lanes>,
}

/// `out (+)= scale * bf16(lhs) bf16(rhs)`, `out` row-major with rows `out_stride` apart.
///
/// # Panics
/// When the inner sizes differ or the last row of the product ends past `out`.
#[expect(clippy::too_many_arguments, reason = "mirrors the BLAS signature")]
pub fn matmul(
    bf16: Bf16,
    lhs: Mat<'_>,
    rhs: Mat<'_>,
    scale: f32,
    out: &mut [f32],
    out_stride: usize,
    write: Write,
    scratch: &mut Scratch,
) {
    let (m, n, k) = (lhs.rows(), rhs.cols(), lhs.cols());
    assert_eq!(k, rhs.rows(), "inner sizes of a product differ");
    if m == 0 || n == 0 {
        return;
    }
    assert!(out_stride >= n && (m - 1) * out_stride + n <= out.len(), "product exceeds its output");
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a `Bf16` exists only where detection found its instructions.
    unsafe {
        let _proof: Bf16 = bf16;
        super::avx512_bf16::matmul(lhs, rhs, scale, out, out_stride, write, &mut scratch.packed);
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        let (_, _) = (bf16, scratch);
        scalar(lhs, rhs, scale, out, out_stride, write);
    }
}

/// The nearest bf16 number, ties to even; numbers below the smallest normal one become 0, as the instruction has it.
pub fn round(value: f32) -> f32 {
    let rounded = half::bf16::from_f32(value).to_f32();
    if rounded.is_subnormal() || value.is_subnormal() { 0.0f32.copysign(value) } else { rounded }
}

/// The definition of [`matmul`], k in ascending order.
pub fn scalar(lhs: Mat<'_>, rhs: Mat<'_>, scale: f32, out: &mut [f32], out_stride: usize, write: Write) {
    for (i, out) in out.chunks_mut(out_stride.max(1)).take(lhs.rows()).enumerate() {
        for (j, out) in out[..rhs.cols()].iter_mut().enumerate() {
            let sum: f32 = (0..lhs.cols())
                .map(|l| {
                    let a = lhs.data()[i * lhs.row_stride() + l * lhs.col_stride()];
                    round(a) * round(rhs.data()[l * rhs.row_stride() + j * rhs.col_stride()])
                })
                .sum();
            let before = if write == Write::Add { *out } else { 0.0 };
            *out = before + scale * sum;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// `rows * cols` values and the view of them, stored by rows or by columns, with a gap between those.
    fn storage(values: &[f32], rows: usize, cols: usize, transposed: bool, gap: usize) -> Vec<f32> {
        let (lines, len) = if transposed { (cols, rows) } else { (rows, cols) };
        let mut data = vec![f32::NAN; lines * (len + gap)];
        for i in 0..rows {
            for j in 0..cols {
                let at = if transposed { j * (len + gap) + i } else { i * (len + gap) + j };
                data[at] = values[i * cols + j];
            }
        }
        data
    }

    fn view(data: &[f32], rows: usize, cols: usize, transposed: bool, gap: usize) -> Mat<'_> {
        if transposed {
            Mat::strided(data, cols, rows, rows + gap).t()
        } else {
            Mat::strided(data, rows, cols, cols + gap)
        }
    }

    proptest! {
        /// Against the sum in f64 of the rounded factors. A sum of k terms loses at most `2^-24` of the magnitudes with each
        /// term and, as the instruction adds two products at once, one more with each pair; then comes the scale, and
        /// what is added to: `(2 k + 3) 2^-24`.
        #[test]
        fn products_equal_the_definition(
            (m, n, k) in prop_oneof![(0usize..40, 0usize..70, 0usize..80), (1usize..5, 1usize..20, 180usize..900),
                (60usize..150, 1usize..4, 1usize..4)],
            (lhs_t, rhs_t, add) in any::<(bool, bool, bool)>(),
            (gap, scale) in (0usize..3, -2.0f32..2.0),
            seed in 0usize..1000,
        ) {
            let Some(bf16) = Bf16::detect() else { return Ok(()) };
            let value = |i: usize| ((i + seed) * 7919 % 4001) as f32 / 1000.0 - 2.0;
            let lhs: Vec<f32> = (0..m * k).map(value).collect();
            let rhs: Vec<f32> = (0..k * n).map(|i| value(i + 7)).collect();
            let (lhs_data, rhs_data) = (storage(&lhs, m, k, lhs_t, gap), storage(&rhs, k, n, rhs_t, gap));
            let before: Vec<f32> = (0..m * (n + gap)).map(|i| value(i + 3)).collect();
            let (mut out, write) = (before.clone(), if add { Write::Add } else { Write::Set });
            let (lhs_view, rhs_view) = (view(&lhs_data, m, k, lhs_t, gap), view(&rhs_data, k, n, rhs_t, gap));
            let mut defined = before.clone();
            scalar(lhs_view, rhs_view, scale, &mut defined, n + gap, write);
            matmul(bf16, lhs_view, rhs_view, scale, &mut out, n + gap, write, &mut Scratch::default());
            for i in 0..m {
                for j in 0..n + gap {
                    let at = i * (n + gap) + j;
                    if j >= n {
                        prop_assert_eq!(out[at], before[at], "the gap between rows is left alone");
                        continue;
                    }
                    let terms = || (0..k).map(|l| f64::from(round(lhs[i * k + l])) * f64::from(round(rhs[l * n + j])));
                    let old = if add { f64::from(before[at]) } else { 0.0 };
                    let exact = old + f64::from(scale) * terms().sum::<f64>();
                    let size = old.abs() + f64::from(scale.abs()) * terms().map(f64::abs).sum::<f64>();
                    let bound = (2 * k + 3) as f64 * 2f64.powi(-24) * size;
                    for got in [out[at], defined[at]] {
                        prop_assert!((f64::from(got) - exact).abs() <= bound, "{i}, {j}: {got}, {exact}");
                    }
                }
            }
        }

        /// Codes and ternary weights are bf16 numbers, and sums below 2^24 are exact in any order.
        #[test]
        fn products_of_codes_are_exact(m in 1usize..20, n in 1usize..40, k in 1usize..600, seed in 0usize..1000) {
            let Some(bf16) = Bf16::detect() else { return Ok(()) };
            let lhs: Vec<f32> = (0..m * k).map(|i| ((i + seed) * 7919 % 255) as f32 - 127.0).collect();
            let rhs: Vec<f32> = (0..n * k).map(|i| ((i + seed) * 31 % 3) as f32 - 1.0).collect();
            let (lhs, rhs) = (Mat::new(&lhs, m, k), Mat::new(&rhs, n, k).t());
            let (mut out, mut defined) = (vec![0.0; m * n], vec![0.0; m * n]);
            matmul(bf16, lhs, rhs, 1.0, &mut out, n, Write::Set, &mut Scratch::default());
            scalar(lhs, rhs, 1.0, &mut defined, n, Write::Set);
            prop_assert_eq!(out, defined);
        }
    }

    #[test]
    fn rounding_is_to_nearest_even_and_drops_the_subnormal() {
        assert_eq!(round(1.0 + 2f32.powi(-8)), 1.0);
        assert_eq!(round(1.0 + 3.0 * 2f32.powi(-8)), 1.0 + 2f32.powi(-6));
        assert_eq!(round(127.0), 127.0);
        assert_eq!(round(1e-40).to_bits(), 0);
        assert_eq!(round(-1e-40).to_bits(), (-0.0f32).to_bits());
    }
}
