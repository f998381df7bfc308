//! The substrate product: a ternary matrix against int8 activations, exact in i32.
//!
//! The definition is [`scalar`] (`golden/reference.py: ternarize, substrate`); the packed layout and the micro-kernels
//! are those of all integer products, in `kernels/gemm`.

pub mod scalar;
#[cfg(test)]
mod tests;

use super::error::{KernelError, expect_finite, expect_len};
use super::gemm::{self, Packed, Sink};
use super::isa::Isa;

/// Longest inner dimension: weights are stored as w + 1 in {0, 1, 2}, so a partial sum is at most
/// `2 * 127 * k`, and `2 * 127 * 2^16` is far below 2^31.
pub const MAX_COLS: usize = 1 << 16;

/// A ternary matrix `W[n, k] = scale[n] * codes[n, k]`, packed at two bits a weight and ready to multiply.
#[derive(Debug, Clone)]
pub struct PackedTernary {
    packed: Packed,
    /// Padded with zeros to whole panels.
    scale: Box<[f32]>,
}

impl PackedTernary {
    /// Packs `codes` `[rows, cols]`, each -1, 0 or 1, with one `scale` per row.
    ///
    /// # Errors
    /// [`KernelError`] when lengths do not match, a code is not ternary, a scale is not finite,
    /// or `cols` exceeds [`MAX_COLS`].
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
        Ok(Self { packed: gemm::pack_ternary(isa, codes, rows, cols), scale: gemm::pad_to_panels(scale) })
    }

    /// The codes that were packed, `[rows, cols]`.
    pub fn unpack(&self) -> Vec<i8> {
        gemm::unpack_ternary(&self.packed)
    }

    /// One scale per row, `[rows]`.
    pub fn scale(&self) -> &[f32] {
        &self.scale[..self.rows()]
    }

    /// Output features.
    pub fn rows(&self) -> usize {
        self.packed.rows()
    }

    /// Input features.
    pub fn cols(&self) -> usize {
        self.packed.cols()
    }

    /// The instruction set that it was packed for.
    pub fn isa(&self) -> Isa {
        self.packed.isa()
    }

    /// Bytes on the heap: packed weights with their padding, and scales.
    pub fn resident_bytes(&self) -> usize {
        size_of_val(&*self.scale) + self.packed.resident_bytes()
    }

    /// `out[m, n] = step[m] * scale[n] * (sum over k of lhs[m, k] * codes[n, k])`; the sum is exact, the two products
    /// are f32, as `(dot * step) * scale`. `lhs` is int8 `[m, k]`, row-major.
    ///
    /// # Errors
    /// [`KernelError::Length`] when a slice does not match `m = steps.len()`.
    pub fn matmul(&self, lhs: &[i8], steps: &[f32], out: &mut [f32]) -> Result<(), KernelError> {
        let mut sink = Sink::Scaled { out, steps, scale: &self.scale, bias: None };
        gemm::matmul(&self.packed, lhs, steps.len(), &mut sink)
    }

    /// The exact sums of [`PackedTernary::matmul`], without step or scale: `[m, n]` for `m` rows of `lhs`.
    ///
    /// # Errors
    /// [`KernelError::Length`] when a slice does not match `m`.
    pub fn matmul_i32(&self, lhs: &[i8], m: usize, out: &mut [i32]) -> Result<(), KernelError> {
        gemm::matmul(&self.packed, lhs, m, &mut Sink::Dots(out))
    }
}
