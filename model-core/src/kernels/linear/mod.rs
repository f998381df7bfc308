//! Dense int8 layers: stem, qkv, projection and head, whose weights are not ternary.

pub mod scalar;

use super::error::{KernelError, expect_finite, expect_len};
use super::isa::Isa;

/// Longest inner dimension: weights are stored as w + 128 in 1..=255, so a partial sum is at most `255 * 127 * k`,
/// and `255 * 127 * 2^16 = 2_122_383_360` is below 2^31.
pub const MAX_COLS: usize = 1 << 16;

/// A dense layer `y = x W^T + b` with int8 weights (absmax scale per row) and f32 bias, packed for one instruction set.
#[derive(Debug, Clone)]
pub struct PackedInt8 {
    isa: Isa,
    rows: usize,
    cols: usize,
    scale: Box<[f32]>,
    bias: Box<[f32]>,
    codes: Box<[i8]>,
}

impl PackedInt8 {
    /// Quantises and packs `weight` `[rows, cols]` with `bias` `[rows]`.
    ///
    /// # Errors
    /// [`KernelError`] when lengths do not match, a value is not finite, or `cols` exceeds [`MAX_COLS`].
    pub fn pack(isa: Isa, weight: &[f32], bias: &[f32], rows: usize, cols: usize) -> Result<Self, KernelError> {
        if cols > MAX_COLS {
            return Err(KernelError::InnerDimension { max: MAX_COLS, got: cols });
        }
        expect_len("dense weight", weight.len(), rows.saturating_mul(cols))?;
        expect_len("dense bias", bias.len(), rows)?;
        expect_finite("dense weight", weight)?;
        expect_finite("dense bias", bias)?;
        let (codes, scale) = scalar::quantize_weight(weight, rows, cols);
        Ok(Self { isa, rows, cols, scale: scale.into(), bias: bias.into(), codes: codes.into() })
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

    /// Bytes on the heap: packed weights with their padding, scales and biases.
    pub fn resident_bytes(&self) -> usize {
        size_of_val(&*self.scale) + size_of_val(&*self.bias) + size_of_val(&*self.codes)
    }

    /// `out[m, n] = step[m] * scale[n] * (sum over k of lhs[m, k] * codes[n, k]) + bias[n]`; the sum is exact, the
    /// rest f32, as `(dot * step) * scale + bias`. `lhs` is int8 `[m, k]` in -127..=127.
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
            scalar::gemm_i8(&lhs[row * self.cols..][..self.cols], &self.codes, 1, self.cols, &mut dots);
            for (((out, &dot), scale), bias) in out.iter_mut().zip(&dots).zip(&self.scale).zip(&self.bias) {
                *out = dot as f32 * step * scale + bias;
            }
        }
        Ok(())
    }

    /// The exact sums of [`PackedInt8::matmul`], without step, scale or bias: `[m, n]` for `m` rows of `lhs`.
    ///
    /// # Errors
    /// [`KernelError::Length`] when a slice does not match `m`.
    pub fn matmul_i32(&self, lhs: &[i8], m: usize, out: &mut [i32]) -> Result<(), KernelError> {
        self.check(m, lhs, out.len())?;
        scalar::gemm_i8(lhs, &self.codes, m, self.cols, out);
        Ok(())
    }

    fn check(&self, m: usize, lhs: &[i8], out: usize) -> Result<(), KernelError> {
        expect_len("activation codes", lhs.len(), m.saturating_mul(self.cols))?;
        expect_len("product", out, m.saturating_mul(self.rows))
    }
}
