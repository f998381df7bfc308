//! The substrate product: a ternary matrix against int8 activations.

pub mod scalar;

use super::error::{KernelError, expect_finite, expect_len};
use super::isa::Isa;

/// Longest inner dimension: weights are stored as w + 1 in {0, 1, 2}, so a partial sum is at most
/// `2 * 127 * k`, and `2 * 127 * 2^16` is far below 2^31.
pub const MAX_COLS: usize = 1 << 16;

/// A ternary matrix `W[n, k] = scale[n] * codes[n, k]`, packed for one instruction set and ready to multiply.
#[derive(Debug, Clone)]
pub struct PackedTernary {
    isa: Isa,
    rows: usize,
    cols: usize,
    scale: Box<[f32]>,
    codes: Box<[i8]>,
}

impl PackedTernary {
    /// Packs `codes` `[rows, cols]`, each -1, 0 or 1, with one `scale` per row.
    ///
    /// # Errors
    /// [`KernelError`] when lengths do not match, a code is not ternary, a scale is not finite, or `cols` exceeds
    /// [`MAX_COLS`].
    pub fn pack(isa: Isa, codes: &[i8], scale: &[f32], rows: usize, cols: usize) -> Result<Self, KernelError> {
        if cols > MAX_COLS {
            return Err(KernelError::InnerDimension { max: MAX_COLS, got: cols });
        }
        expect_len("ternary codes", codes.len(), rows.saturating_mul(cols))?;
        expect_len("ternary scales", scale.len(), rows)?;
        expect_finite("ternary scale", scale)?;
        if let Some(index) = codes.iter().position(|code| !(-1..=1).contains(code)) {
            return Err(KernelError::NotTernary { index, value: codes[index] });
        }
        Ok(Self { isa, rows, cols, scale: scale.into(), codes: codes.into() })
    }

    /// Output features.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input features.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The instruction set that it was packed for.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Bytes on the heap: packed weights with their padding, and scales.
    pub fn resident_bytes(&self) -> usize {
        size_of_val(&*self.scale) + size_of_val(&*self.codes)
    }

    /// `out[m, n] = step[m] * scale[n] * (sum over k of lhs[m, k] * codes[n, k])`; the sum is exact, the two products
    /// are f32, left to right over `(dot * step) * scale`. `lhs` is int8 `[m, k]` in -127..=127.
    ///
    /// # Errors
    /// [`KernelError::Length`] when a slice does not match `m = steps.len()`.
    pub fn matmul(&self, lhs: &[i8], steps: &[f32], out: &mut [f32]) -> Result<(), KernelError> {
        self.check(steps.len(), lhs, out.len())?;
        if self.rows == 0 {
            return Ok(());
        }
        let mut dots = vec![0; self.rows];
        for (row, (out, &step)) in out.chunks_exact_mut(self.rows).zip(steps).enumerate() {
            scalar::gemm_i8(&lhs[row * self.cols..][..self.cols], &self.codes, self.cols, &mut dots);
            for ((out, &dot), scale) in out.iter_mut().zip(&dots).zip(&self.scale) {
                *out = dot as f32 * step * scale;
            }
        }
        Ok(())
    }

    /// The exact sums of [`PackedTernary::matmul`], without step or scale: `[m, n]` for `m` rows of `lhs`.
    ///
    /// # Errors
    /// [`KernelError::Length`] when a slice does not match `m`.
    pub fn matmul_i32(&self, lhs: &[i8], m: usize, out: &mut [i32]) -> Result<(), KernelError> {
        self.check(m, lhs, out.len())?;
        scalar::gemm_i8(lhs, &self.codes, self.cols, out);
        Ok(())
    }

    fn check(&self, m: usize, lhs: &[i8], out: usize) -> Result<(), KernelError> {
        expect_len("activation codes", lhs.len(), m.saturating_mul(self.cols))?;
        expect_len("product", out, m.saturating_mul(self.rows))
    }
}
