//! Products with int8 weights: qkv, projection, and all of the stem but its first layer.
//!
//! Defined by [`scalar::quantize_weight`] and [`scalar::gemm_i8`].

use super::pack::pack_int8;
use super::{PANEL, Packed, Sink, pad_to_panels, scalar};
use crate::kernels::error::{KernelError, expect_finite, expect_len};
use crate::kernels::isa::Isa;
use crate::kernels::scales::Scales;

/// Longest inner dimension: weights are stored as w + 128 in 1..=255, so a partial sum is at most `255 * 127 * k`,
/// and `255 * 127 * 2^16 = 2_122_383_360` is below 2^31.
pub const MAX_COLS: usize = 1 << 16;

/// A layer `y = x W^T + b` with int8 weights (absmax scale per row) and f32 bias, packed for one instruction set.
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
        expect_len("int8 weight", weight.len(), rows.saturating_mul(cols))?;
        expect_finite("int8 weight", weight)?;
        let (codes, scale) = scalar::quantize_weight(weight, rows, cols);
        Self::pack_codes(isa, &codes, &scale, bias, cols)
    }

    /// Packs `codes` `[rows, cols]` in -127..=127 with a `scale` and a `bias` per row.
    ///
    /// # Errors
    /// [`KernelError`] when lengths do not match, a code is -128, a value is not finite, or `cols` exceeds [`MAX_COLS`].
    pub fn pack_codes(isa: Isa, codes: &[i8], scale: &[f32], bias: &[f32], cols: usize) -> Result<Self, KernelError> {
        let rows = scale.len();
        check_codes(codes, rows, bias, cols)?;
        Ok(Self {
            packed: pack_int8(isa, codes, rows, cols),
            scale: Scales::new(scale, false, PANEL)?,
            bias: pad_to_panels(bias),
        })
    }

    pub fn rows(&self) -> usize {
        self.packed.rows()
    }

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
        super::matmul(&self.packed, lhs, steps.len(), &mut sink)
    }

    /// The exact sums of [`PackedInt8::matmul`], without step, scale or bias: `[m, n]` for `m` rows of `lhs`.
    ///
    /// # Errors
    /// [`KernelError::Length`] when a slice does not match `m`.
    pub fn matmul_i32(&self, lhs: &[i8], m: usize, out: &mut [i32]) -> Result<(), KernelError> {
        super::matmul(&self.packed, lhs, m, &mut Sink::Dots(out))
    }
}

/// The same layer as its rows stand in the file, without padding: a head of few classes, for one activation row at a time.
#[derive(Debug, Clone)]
pub struct Int8Rows {
    isa: Isa,
    /// Row by row, without padding.
    codes: Box<[i8]>,
    scale: Box<[f32]>,
    bias: Box<[f32]>,
    cols: usize,
}

impl Int8Rows {
    /// Rows up to which the padding to a panel is worth more than its speed.
    pub const MOST: usize = 2 * PANEL;

    /// Rows of `codes` `[rows, cols]` in -127..=127 with a `scale` and a `bias` each. Activations are to be quantised by `isa`.
    ///
    /// # Errors
    /// The same ones as of [`PackedInt8::pack_codes`].
    pub fn new(isa: Isa, codes: &[i8], scale: &[f32], bias: &[f32], cols: usize) -> Result<Self, KernelError> {
        check_codes(codes, scale.len(), bias, cols)?;
        expect_finite("int8 scale", scale)?;
        Ok(Self { isa, codes: codes.into(), scale: scale.into(), bias: bias.into(), cols })
    }

    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The instruction set that activations are quantised by.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Bytes on the heap.
    pub fn resident_bytes(&self) -> usize {
        size_of_val(&*self.codes) + size_of_val(&*self.scale) + size_of_val(&*self.bias)
    }

    /// As [`PackedInt8::matmul`], to the last bit.
    ///
    /// # Errors
    /// [`KernelError::Length`] when a slice does not match `m = steps.len()`.
    pub fn matmul(&self, lhs: &[i8], steps: &[f32], out: &mut [f32]) -> Result<(), KernelError> {
        let (rows, m) = (self.scale.len(), steps.len());
        expect_len("activation codes", lhs.len(), m.saturating_mul(self.cols))?;
        expect_len("product", out.len(), m.saturating_mul(rows))?;
        for ((lhs, step), out) in lhs.chunks_exact(self.cols.max(1)).zip(steps).zip(out.chunks_exact_mut(rows.max(1))) {
            let weights = self.codes.chunks_exact(self.cols.max(1)).zip(self.scale.iter().zip(&self.bias));
            for (out, (codes, (scale, bias))) in out.iter_mut().zip(weights) {
                let dot: i32 = lhs.iter().zip(codes).map(|(&a, &w)| i32::from(a) * i32::from(w)).sum();
                *out = dot as f32 * step * scale + bias;
            }
        }
        Ok(())
    }
}

/// What holds of every layer of int8 codes.
fn check_codes(codes: &[i8], rows: usize, bias: &[f32], cols: usize) -> Result<(), KernelError> {
    if cols > MAX_COLS {
        return Err(KernelError::InnerDimension { max: MAX_COLS, got: cols });
    }
    expect_len("int8 weight", codes.len(), rows.saturating_mul(cols))?;
    expect_len("int8 bias", bias.len(), rows)?;
    expect_finite("int8 bias", bias)?;
    match codes.iter().position(|&code| code == i8::MIN) {
        Some(index) => Err(KernelError::NotSymmetric { index }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand::{Rng, SeedableRng, rngs::SmallRng};

    use super::*;

    fn random(rng: &mut SmallRng, len: usize) -> Vec<f32> {
        (0..len).map(|_| rng.random_range(-1.0..1.0)).collect()
    }

    /// `[m, n]` by the definitions.
    fn definition(weight: &[f32], bias: &[f32], lhs: &[i8], steps: &[f32], k: usize) -> (Vec<i32>, Vec<f32>) {
        let (m, n) = (steps.len(), bias.len());
        let (codes, scale) = scalar::quantize_weight(weight, n, k);
        let mut dots = vec![0; m * n];
        scalar::gemm_i8(lhs, &codes, m, k, &mut dots);
        let y =
            dots.iter().enumerate().map(|(i, &dot)| dot as f32 * steps[i / n] * scale[i % n] + bias[i % n]).collect();
        (dots, y)
    }

    proptest! {
        #[test]
        fn every_isa_equals_the_definition(
            m in 0usize..=35,
            n in prop_oneof![2 => 0usize..=37, 1 => (1usize..=5).prop_map(|panels| panels * PANEL)],
            k in prop_oneof![4 => 0usize..=70, 1 => 500usize..=560],
            seed in any::<u64>(),
        ) {
            let mut rng = SmallRng::seed_from_u64(seed);
            let (weight, bias, steps) = (random(&mut rng, n * k), random(&mut rng, n), random(&mut rng, m));
            let lhs: Vec<i8> = (0..m * k).map(|_| rng.random_range(-128..=127)).collect();
            let (dots, y) = definition(&weight, &bias, &lhs, &steps, k);
            for isa in Isa::available() {
                let packed = PackedInt8::pack(isa, &weight, &bias, n, k).unwrap();
                let mut out_dots = vec![i32::MIN; m * n];
                let mut out = vec![f32::NAN; m * n];
                packed.matmul_i32(&lhs, m, &mut out_dots).unwrap();
                packed.matmul(&lhs, &steps, &mut out).unwrap();
                prop_assert_eq!(&out_dots, &dots, "{} {}x{}x{}", isa, m, n, k);
                prop_assert_eq!(&out, &y, "{} {}x{}x{}", isa, m, n, k);
                if k > 0 {
                    let (codes, scale) = scalar::quantize_weight(&weight, n, k);
                    out.fill(f32::NAN);
                    Int8Rows::new(isa, &codes, &scale, &bias, k).unwrap().matmul(&lhs, &steps, &mut out).unwrap();
                    prop_assert_eq!(&out, &y, "rows, {}x{}x{}", m, n, k);
                }
            }
        }
    }

    #[test]
    fn extreme_values_neither_saturate_nor_overflow() {
        for isa in Isa::available() {
            for k in [257, 1100, MAX_COLS] {
                for (activation, weight) in
                    [(127, 1.0), (-127, 1.0), (127, -1.0), (-127, -1.0), (-128, 1.0), (-128, -1.0)]
                {
                    let (m, n) = (2, 3);
                    let packed = PackedInt8::pack(isa, &vec![weight; n * k], &vec![0.0; n], n, k).unwrap();
                    let mut out = vec![0; m * n];
                    packed.matmul_i32(&vec![activation; m * k], m, &mut out).unwrap();
                    let expected = i32::from(activation) * (weight as i32 * 127) * k as i32;
                    assert!(out.iter().all(|&dot| dot == expected), "{isa} k {k}: {activation} * {weight}: {out:?}");
                }
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let pack = |weight: &[f32], bias: &[f32], rows, cols| PackedInt8::pack(Isa::best(), weight, bias, rows, cols);
        assert!(matches!(pack(&[0.0; 5], &[0.0; 2], 2, 3), Err(KernelError::Length { expected: 6, got: 5, .. })));
        assert!(matches!(pack(&[0.0; 6], &[0.0; 1], 2, 3), Err(KernelError::Length { expected: 2, got: 1, .. })));
        assert!(matches!(pack(&[f32::INFINITY], &[0.0], 1, 1), Err(KernelError::NotFinite { .. })));
        assert!(matches!(pack(&[1.0], &[f32::NAN], 1, 1), Err(KernelError::NotFinite { .. })));
        assert!(matches!(pack(&[], &[], 0, MAX_COLS + 1), Err(KernelError::InnerDimension { .. })));
    }
}
