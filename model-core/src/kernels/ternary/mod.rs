//! The substrate product: a ternary matrix against int8 activations, exact in i32.
//!
//! The definition is [`scalar`] (`golden/reference.py: ternarize, substrate`); the packed layout and the micro-kernels
//! are those of all integer products, in `kernels/gemm`.

pub mod scalar;
#[cfg(test)]
mod tests;

use super::Scales;
use super::error::{KernelError, expect_len};
use super::gemm::{self, Format, PANEL, Packed, Sink};
use super::isa::Isa;

/// Longest inner dimension: weights are stored as w + 1 in {0, 1, 2}, so a partial sum is at most
/// `2 * 127 * k`, and `2 * 127 * 2^16` is far below 2^31.
pub const MAX_COLS: usize = 1 << 16;

/// How a packed ternary matrix rests in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TernaryStorage {
    /// Five codes a byte instead of four.
    pub five_trits: bool,
    /// Scales in half precision, whose values they must be, instead of single.
    pub half_scales: bool,
}

impl TernaryStorage {
    /// Bytes of the codes of a matrix `[rows, cols]`, padding included.
    pub fn codes_bytes(self, rows: usize, cols: usize) -> usize {
        gemm::packed_bytes(self.format(), rows, cols)
    }

    /// Bytes of the scales of so many rows, padding included.
    pub fn scales_bytes(self, rows: usize) -> usize {
        rows.next_multiple_of(PANEL) * if self.half_scales { size_of::<u16>() } else { size_of::<f32>() }
    }

    fn format(self) -> Format {
        if self.five_trits { Format::FiveTrits } else { Format::TwoBits }
    }
}

/// A ternary matrix `W[n, k] = scale[n] * codes[n, k]`, packed and ready to multiply.
#[derive(Debug, Clone)]
pub struct PackedTernary {
    packed: Packed,
    /// Padded with zeros to whole panels.
    scale: Scales,
}

impl PackedTernary {
    /// Packs `codes` `[rows, cols]`, each -1, 0 or 1, with one `scale` per row.
    ///
    /// # Errors
    /// [`KernelError`] when lengths do not match, a code is not ternary, a scale is not finite or not of the storage's
    /// precision, or `cols` exceeds [`MAX_COLS`].
    pub fn pack(
        isa: Isa,
        storage: TernaryStorage,
        codes: &[i8],
        scale: &[f32],
        [rows, cols]: [usize; 2],
    ) -> Result<Self, KernelError> {
        if cols > MAX_COLS {
            return Err(KernelError::InnerDimension { max: MAX_COLS, got: cols });
        }
        expect_len("ternary codes", codes.len(), rows.saturating_mul(cols))?;
        expect_len("ternary scales", scale.len(), rows)?;
        if let Some(index) = codes.iter().position(|code| !(-1..=1).contains(code)) {
            return Err(KernelError::NotTernary { index, value: codes[index] });
        }
        let scale = Scales::new(scale, storage.half_scales, PANEL)?;
        Ok(Self { packed: gemm::pack_ternary(isa, storage.format(), codes, rows, cols), scale })
    }

    /// A matrix with the same codes, which stay where they are, and other scales.
    ///
    /// # Errors
    /// [`KernelError`] when lengths do not match, or a scale is not finite or not of the storage's precision.
    pub fn with_scale(&self, scale: &[f32]) -> Result<Self, KernelError> {
        expect_len("ternary scales", scale.len(), self.rows())?;
        let half = matches!(self.scale, Scales::F16(_));
        Ok(Self { packed: self.packed.clone(), scale: Scales::new(scale, half, PANEL)? })
    }

    /// The codes that were packed, `[rows, cols]`.
    pub fn unpack(&self) -> Vec<i8> {
        gemm::unpack_ternary(&self.packed)
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

    /// Bytes of the packed codes on the heap, padding included. Matrices that share them have them once.
    pub fn codes_bytes(&self) -> usize {
        self.packed.resident_bytes()
    }

    /// Bytes of the scales on the heap, padding included.
    pub fn scales_bytes(&self) -> usize {
        self.scale.resident_bytes()
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
