//! Dense int8 layers: stem, qkv, projection and head, whose weights are not ternary.
//!
//! The definition is [`scalar`]; the packed layout and the micro-kernels are those of all
//! integer products, in `kernels/gemm`.

pub mod scalar;
#[cfg(test)]
mod tests;

use super::Scales;
use super::error::{KernelError, expect_finite, expect_len};
use super::gemm::{self, PANEL, Packed, Sink};
use super::isa::Isa;

/// Longest inner dimension: weights are stored as w + 128 in 1..=255, so a partial sum is at most `255 * 127 * k`,
/// and `255 * 127 * 2^16 = 2_122_383_360` is below 2^31.
pub const MAX_COLS: usize = 1 << 16;

/// A dense layer `y = x W^T + b` with int8 weights (absmax scale per row) and f32 bias, packed for one instruction set.
#[derive(Debug, Clone)]
pub struct PackedInt8 {
    packed: Packed,
    /// Padded with zeros to whole panels.
    scale: Scales,
    /// Padded with zeros to whole panels.
    bias: Box<[f32]>,
}

impl PackedInt8 {
    /// Quantises and packs `weight` `[rows, cols]` with `bias` `[rows]`.
    ///
    /// # Errors
    /// [`KernelError`] when lengths do not match, a value is not finite, or `cols` exceeds [`MAX_COLS`].
    pub fn pack(isa: Isa, weight: &[f32], bias: &[f32], rows: usize, cols: usize) -> Result<Self, KernelError> {
        expect_len("dense weight", weight.len(), rows.saturating_mul(cols))?;
        expect_finite("dense weight", weight)?;
        let (codes, scale) = scalar::quantize_weight(weight, rows, cols);
        Self::pack_codes(isa, &codes, &scale, bias, cols)
    }

    /// Packs `codes` `[rows, cols]` in -127..=127 with a `scale` and a `bias` per row.
    ///
    /// # Errors
    /// [`KernelError`] when lengths do not match, a code is -128, a value is not finite, or `cols` exceeds [`MAX_COLS`].
    pub fn pack_codes(isa: Isa, codes: &[i8], scale: &[f32], bias: &[f32], cols: usize) -> Result<Self, KernelError> {
        let rows = scale.len();
        if cols > MAX_COLS {
            return Err(KernelError::InnerDimension { max: MAX_COLS, got: cols });
        }
        expect_len("dense weight", codes.len(), rows.saturating_mul(cols))?;
        expect_len("dense bias", bias.len(), rows)?;
        expect_finite("dense bias", bias)?;
        if let Some(index) = codes.iter().position(|&code| code == i8::MIN) {
            return Err(KernelError::NotSymmetric { index });
        }
        Ok(Self {
            packed: gemm::pack_int8(isa, codes, rows, cols),
            scale: Scales::new(scale, false, PANEL)?,
            bias: gemm::pad_to_panels(bias),
        })
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

    /// Bytes on the heap: packed weights with their padding, scales and biases.
    pub fn resident_bytes(&self) -> usize {
        self.scale.resident_bytes() + size_of_val(&*self.bias) + self.packed.resident_bytes()
    }

    /// `out[m, n] = step[m] * scale[n] * (sum over k of lhs[m, k] * codes[n, k]) + bias[n]`; the sum is exact, the
    /// rest f32, as `(dot * step) * scale + bias`. `lhs` is int8 `[m, k]`, row-major.
    ///
    /// # Errors
    /// [`KernelError::Length`] when a slice does not match `m = steps.len()`.
    pub fn matmul(&self, lhs: &[i8], steps: &[f32], out: &mut [f32]) -> Result<(), KernelError> {
        let mut sink = Sink::Scaled { out, steps, scale: &self.scale, bias: Some(&self.bias) };
        gemm::matmul(&self.packed, lhs, steps.len(), &mut sink)
    }

    /// The exact sums of [`PackedInt8::matmul`], without step, scale or bias: `[m, n]` for `m` rows of `lhs`.
    ///
    /// # Errors
    /// [`KernelError::Length`] when a slice does not match `m`.
    pub fn matmul_i32(&self, lhs: &[i8], m: usize, out: &mut [i32]) -> Result<(), KernelError> {
        gemm::matmul(&self.packed, lhs, m, &mut Sink::Dots(out))
    }
}
