//! f32 products with weights packed in panels: stem, router, attention, head.
//!
//! `out[m, n] = sum over k of lhs[m, k] * w[n, k] (+ bias[n])`. Unlike a general GEMM, every output is one chain of
//! multiply-adds over k in ascending order, whatever m, n and the blocking: a row's result does not depend on the rows
//! beside it, which is what makes batched answers bit-identical to single ones.
//!
//! Panels of [`PANEL`] columns lie as `[k, PANEL]`, so that the micro-kernel streams them; it keeps `MR` rows times
//! two vectors in registers. The last panel is only as wide as there are columns left, or a hundred classes and eight
//! experts would take the memory of 128 and 32: there the micro-kernel's second vectors reach into the next row, and
//! what they compute is dropped.

use std::slice::ChunksExactMut;

use crate::kernels::error::{KernelError, expect_finite, expect_len};
use crate::kernels::isa::Isa;
use crate::kernels::simd::{Simd, Work, dispatch};

/// Columns of a panel: two AVX-512 registers, four of AVX2, eight of NEON.
pub const PANEL: usize = 32;

/// Rows that the micro-kernel keeps in registers: 6 x 2 accumulators, two vectors of the panel and one broadcast fit in
/// the 16 registers of AVX2.
const MR: usize = 6;

/// A layer `y = x W^T + b` in f32, packed in panels.
#[derive(Debug, Clone)]
pub struct PackedF32 {
    isa: Isa,
    rows: usize,
    cols: usize,
    panels: Box<[f32]>,
    /// Padded to whole panels.
    bias: Box<[f32]>,
}

impl PackedF32 {
    /// Packs `weight` `[rows, cols]` with `bias` `[rows]`.
    ///
    /// # Errors
    /// [`KernelError`] when lengths do not match or a value is not finite.
    pub fn pack(isa: Isa, weight: &[f32], bias: &[f32], rows: usize, cols: usize) -> Result<Self, KernelError> {
        expect_len("f32 weight", weight.len(), rows.saturating_mul(cols))?;
        expect_len("f32 bias", bias.len(), rows)?;
        expect_finite("f32 weight", weight)?;
        expect_finite("f32 bias", bias)?;
        let mut panels = vec![0.0; panels_len(rows, cols)];
        pack_panels(rows, cols, |row, col| weight[row * cols + col], &mut panels);
        let mut padded = vec![0.0; rows.next_multiple_of(PANEL)];
        padded[..rows].copy_from_slice(bias);
        Ok(Self { isa, rows, cols, panels: panels.into(), bias: padded.into() })
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Bytes on the heap.
    pub fn resident_bytes(&self) -> usize {
        size_of_val(&*self.panels) + size_of_val(&*self.bias)
    }

    /// `out[m, n] = sum over k of lhs[m, k] * w[n, k] + bias[n]`.
    ///
    /// # Errors
    /// [`KernelError::Length`] when the slices do not hold the same whole number of rows.
    pub fn matmul(&self, lhs: &[f32], out: &mut [f32]) -> Result<(), KernelError> {
        let m = out.len().checked_div(self.rows).unwrap_or(lhs.len() / self.cols.max(1));
        expect_len("f32 input", lhs.len(), m * self.cols)?;
        expect_len("f32 product", out.len(), m * self.rows)?;
        let (lhs, out) = (Rows { data: lhs, stride: self.cols }, RowsMut { data: out, stride: self.rows });
        matmul_panels(self.isa, m, lhs, &self.panels, Some(&self.bias), self.rows, self.cols, out);
        Ok(())
    }
}

/// Floats in the panels of a `[n, k]` matrix: its own, and what the micro-kernel reads beyond a narrow last panel.
pub const fn panels_len(n: usize, k: usize) -> usize {
    let beyond = if k == 0 { 0 } else { n.next_multiple_of(PANEL) - n };
    n * k + beyond
}

/// The panels of a `[n, k]` matrix, each with its first column and its width. `n` and `k` at least 1.
pub fn whole_panels_mut(n: usize, k: usize, panels: &mut [f32]) -> impl Iterator<Item = (usize, usize, &mut [f32])> {
    panels[..n * k].chunks_mut(PANEL * k).enumerate().map(move |(p, panel)| {
        let first = p * PANEL;
        (first, PANEL.min(n - first), panel)
    })
}

/// [`whole_panels_mut`] as rows of their own width.
pub fn panels_mut(n: usize, k: usize, panels: &mut [f32]) -> impl Iterator<Item = (usize, ChunksExactMut<'_, f32>)> {
    whole_panels_mut(n, k, panels).map(|(first, width, panel)| (first, panel.chunks_exact_mut(width)))
}

/// Fills the panels of a `[n, k]` matrix given elementwise.
fn pack_panels(n: usize, k: usize, weight: impl Fn(usize, usize) -> f32, panels: &mut [f32]) {
    if n == 0 || k == 0 {
        return;
    }
    for (first, rows) in panels_mut(n, k, panels) {
        for (col, values) in rows.enumerate() {
            for (i, value) in values.iter_mut().enumerate() {
                *value = weight(first + i, col);
            }
        }
    }
}

/// Rows of a row-major matrix, `stride` apart.
#[derive(Clone, Copy)]
pub struct Rows<'a> {
    /// From the first value of the first row to the last value of the last.
    pub data: &'a [f32],
    /// Values from one row to the next.
    pub stride: usize,
}

/// As [`Rows`], to be written.
pub struct RowsMut<'a> {
    /// From the first value of the first row to the last value of the last.
    pub data: &'a mut [f32],
    /// Values from one row to the next.
    pub stride: usize,
}

/// `out[i, j] = sum over l of lhs[i, l] * w[j, l] (+ bias[j])` for `m` rows, `w` `[n, k]` in panels (see
/// [`panels_mut`]) with finite values beyond them (see [`panels_len`]), `bias` padded to whole panels.
///
/// # Panics
/// When a slice is too short for the shapes.
#[expect(clippy::too_many_arguments, reason = "mirrors the BLAS signature")]
pub fn matmul_panels(
    isa: Isa,
    m: usize,
    lhs: Rows<'_>,
    panels: &[f32],
    bias: Option<&[f32]>,
    n: usize,
    k: usize,
    out: RowsMut<'_>,
) {
    if m == 0 || n == 0 {
        return;
    }
    assert!(lhs.data.len() >= (m - 1) * lhs.stride + k && lhs.stride >= k, "lhs is too short");
    assert!(out.data.len() >= (m - 1) * out.stride + n && out.stride >= n, "product is too short");
    assert!(panels.len() >= panels_len(n, k), "panels are too short");
    assert!(bias.is_none_or(|bias| bias.len() >= n.next_multiple_of(PANEL)), "bias is too short");
    dispatch(isa, Matmul { m, lhs, panels, bias, n, k, out });
}

struct Matmul<'a> {
    m: usize,
    lhs: Rows<'a>,
    panels: &'a [f32],
    bias: Option<&'a [f32]>,
    n: usize,
    k: usize,
    out: RowsMut<'a>,
}

impl Work for Matmul<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        let mut row = 0;
        while row < self.m {
            match self.m - row {
                1 => self.rows::<S, 1>(simd, row),
                2 => self.rows::<S, 2>(simd, row),
                3 => self.rows::<S, 3>(simd, row),
                4 => self.rows::<S, 4>(simd, row),
                5 => self.rows::<S, 5>(simd, row),
                _ => self.rows::<S, MR>(simd, row),
            }
            row += MR;
        }
    }
}

impl Matmul<'_> {
    /// All columns of rows `row .. row + M`.
    #[inline(always)]
    fn rows<S: Simd, const M: usize>(&mut self, simd: S, row: usize) {
        for first in (0..self.n).step_by(PANEL) {
            let panel = &self.panels[first * self.k..];
            let width = PANEL.min(self.n - first);
            for half in (0..PANEL).step_by(2 * S::LANES) {
                let col = first + half;
                if col >= self.n {
                    break;
                }
                // SAFETY: rows `row .. row + M` lie in `lhs` with k values each; `panel` has k times `width` values and
                // then `PANEL - width` more, so that PANEL values follow each multiple of `width` below k; and
                // `half + 2 * LANES <= PANEL`. All asserted in `matmul_panels`.
                let acc = unsafe {
                    let lhs = self.lhs.data.as_ptr().add(row * self.lhs.stride);
                    micro_kernel::<S, M>(simd, self.k, lhs, self.lhs.stride, panel.as_ptr().add(half), width)
                };
                for (i, mut acc) in acc.into_iter().enumerate() {
                    if let Some(bias) = self.bias {
                        acc[0] = simd.add(acc[0], simd.load(&bias[col..]));
                        acc[1] = simd.add(acc[1], simd.load(&bias[col + S::LANES..]));
                    }
                    let out = &mut self.out.data[(row + i) * self.out.stride + col..];
                    let left = (self.n - col).min(2 * S::LANES);
                    if left == 2 * S::LANES {
                        simd.store(out, acc[0]);
                        simd.store(&mut out[S::LANES..], acc[1]);
                    } else {
                        let mut lanes = [0.0; PANEL];
                        simd.store(&mut lanes, acc[0]);
                        simd.store(&mut lanes[S::LANES..], acc[1]);
                        out[..left].copy_from_slice(&lanes[..left]);
                    }
                }
            }
        }
    }
}

/// `M` rows times two vectors of columns.
///
/// # Safety
/// `lhs` is valid for `M` rows of `k` values, `stride` apart; `panel` for two vectors at each of
/// `k` multiples of `width`.
#[inline(always)]
unsafe fn micro_kernel<S: Simd, const M: usize>(
    simd: S,
    k: usize,
    lhs: *const f32,
    stride: usize,
    panel: *const f32,
    width: usize,
) -> [[S::V; 2]; M] {
    let mut acc = [[simd.splat(0.0); 2]; M];
    for l in 0..k {
        // SAFETY: the caller vouches for k rows of the panel.
        let w = unsafe { [simd.load_ptr(panel.add(l * width)), simd.load_ptr(panel.add(l * width + S::LANES))] };
        for (i, acc) in acc.iter_mut().enumerate() {
            // SAFETY: the caller vouches for M rows of k values.
            let a = simd.splat(unsafe { *lhs.add(i * stride + l) });
            acc[0] = simd.mul_add(a, w[0], acc[0]);
            acc[1] = simd.mul_add(a, w[1], acc[1]);
        }
    }
    acc
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Against a sum in f64, within `(k + 1) * 2^-24` of the sum of magnitudes; and one row at a time, bit for bit.
        #[test]
        fn product_equals_the_definition_and_rows_do_not_depend_on_each_other(
            m in 0usize..15, n in 0usize..70, k in 0usize..40, seed in 0usize..1000,
        ) {
            let value = |i: usize| ((i + seed) * 7919 % 401) as f32 / 100.0 - 2.0;
            let lhs: Vec<f32> = (0..m * k).map(value).collect();
            let weight: Vec<f32> = (0..n * k).map(|i| value(i + 7)).collect();
            let bias: Vec<f32> = (0..n).map(|i| value(i + 3)).collect();
            for isa in Isa::available() {
                let packed = PackedF32::pack(isa, &weight, &bias, n, k).unwrap();
                let mut out = vec![0.0; m * n];
                packed.matmul(&lhs, &mut out).unwrap();
                for i in 0..m {
                    let mut alone = vec![0.0; n];
                    packed.matmul(&lhs[i * k..][..k], &mut alone).unwrap();
                    prop_assert_eq!(&alone, &out[i * n..][..n], "{}: row {}", isa, i);
                    for j in 0..n {
                        let terms = || (0..k).map(|l| f64::from(lhs[i * k + l]) * f64::from(weight[j * k + l]));
                        let exact = terms().sum::<f64>() + f64::from(bias[j]);
                        let size = terms().map(f64::abs).sum::<f64>() + f64::from(bias[j].abs());
                        let error = (f64::from(out[i * n + j]) - exact).abs();
                        prop_assert!(error <= (k + 1) as f64 * f64::from(f32::EPSILON) * size, "{isa}: {i}, {j}: {error}");
                    }
                }
            }
        }
    }
}
