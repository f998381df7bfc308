//! The substrate product: a ternary matrix against int8 activations, exact in i32.
//!
//! Defined by [`scalar::ternarize`](super::scalar::ternarize) and [`scalar::gemm_i8`](super::scalar::gemm_i8).

use super::pack::{pack_ternary, packed_bytes, unpack_ternary};
use super::{Format, PANEL, Packed, Sink};
use crate::kernels::error::{KernelError, expect_len};
use crate::kernels::isa::Isa;
use crate::kernels::scales::Scales;

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
        packed_bytes(self.format(), rows, cols)
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
        Ok(Self { packed: pack_ternary(isa, storage.format(), codes, rows, cols), scale })
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
        unpack_ternary(&self.packed)
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
        super::matmul(&self.packed, lhs, steps.len(), &mut sink)
    }

    /// The exact sums of [`PackedTernary::matmul`], without step or scale: `[m, n]` for `m` rows of `lhs`.
    ///
    /// # Errors
    /// [`KernelError::Length`] when a slice does not match `m`.
    pub fn matmul_i32(&self, lhs: &[i8], m: usize, out: &mut [i32]) -> Result<(), KernelError> {
        super::matmul(&self.packed, lhs, m, &mut Sink::Dots(out))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::scalar;
    use super::*;

    /// Steps of a 16-bit lane before any kernel widens, and past it: 256 k for AVX2, 512 k for NEON.
    const LONG_COLS: [usize; 6] = [255, 256, 257, 511, 513, 1100];

    const STORAGES: [TernaryStorage; 2] = [
        TernaryStorage { five_trits: false, half_scales: false },
        TernaryStorage { five_trits: true, half_scales: true },
    ];

    fn product(isa: Isa, storage: TernaryStorage, codes: &[i8], lhs: &[i8], [m, n, k]: [usize; 3]) -> Vec<i32> {
        let packed = PackedTernary::pack(isa, storage, codes, &vec![1.0; n], [n, k]).unwrap();
        let mut out = vec![i32::MIN; m * n];
        packed.matmul_i32(lhs, m, &mut out).unwrap();
        out
    }

    fn definition(codes: &[i8], lhs: &[i8], m: usize, n: usize, k: usize) -> Vec<i32> {
        let mut out = vec![0; m * n];
        scalar::gemm_i8(lhs, codes, m, k, &mut out);
        out
    }

    fn sizes() -> impl Strategy<Value = (usize, usize, usize)> {
        let columns = prop_oneof![8 => 0usize..=70, 2 => 250usize..=280, 2 => 500usize..=560, 1 => 1010usize..=1100];
        (prop_oneof![8 => 0usize..=35, 1 => 60usize..=70, 1 => 125usize..=140], 0usize..=82, columns)
    }

    proptest! {
        #[test]
        fn every_isa_equals_the_definition(
            (m, n, k) in sizes(),
            seed in any::<u64>(),
        ) {
            use rand::{Rng, SeedableRng};
            let mut rng = rand::rngs::SmallRng::seed_from_u64(seed);
            let codes: Vec<i8> = (0..n * k).map(|_| rng.random_range(-1..=1)).collect();
            let lhs: Vec<i8> = (0..m * k).map(|_| rng.random_range(-128..=127)).collect();
            let expected = definition(&codes, &lhs, m, n, k);
            for (isa, storage) in Isa::available().flat_map(|isa| STORAGES.map(|storage| (isa, storage))) {
                let got = product(isa, storage, &codes, &lhs, [m, n, k]);
                prop_assert_eq!(&got, &expected, "{} {:?} {}x{}x{}", isa, storage, m, n, k);
            }
        }

        #[test]
        fn unpacking_undoes_packing((_, n, k) in sizes(), seed in any::<u64>()) {
            use rand::{Rng, SeedableRng};
            let mut rng = rand::rngs::SmallRng::seed_from_u64(seed);
            let codes: Vec<i8> = (0..n * k).map(|_| rng.random_range(-1..=1)).collect();
            for storage in STORAGES {
                let packed = PackedTernary::pack(Isa::SCALAR, storage, &codes, &vec![0.5; n], [n, k]).unwrap();
                prop_assert_eq!(packed.unpack(), &codes[..]);
                prop_assert_eq!(packed.codes_bytes(), storage.codes_bytes(n, k));
                prop_assert_eq!(packed.scales_bytes(), storage.scales_bytes(n));
            }
        }
    }

    #[test]
    fn extreme_values_do_not_saturate_past_any_widening_interval() {
        for (isa, storage) in Isa::available().flat_map(|isa| STORAGES.map(|storage| (isa, storage))) {
            for k in LONG_COLS {
                for (activation, weight) in
                    [(127, 1), (127, -1), (-127, 1), (-127, -1), (-128, 1), (-128, -1), (127, 0)]
                {
                    let (m, n) = (5, 18);
                    let out = product(isa, storage, &vec![weight; n * k], &vec![activation; m * k], [m, n, k]);
                    let expected = i32::from(activation) * i32::from(weight) * k as i32;
                    assert!(out.iter().all(|&dot| dot == expected), "{isa} k {k}: {activation} * {weight}");
                }
            }
        }
    }

    #[test]
    fn scaled_products_are_the_same_floats_on_every_isa() {
        // Whole panels, and not; fewer columns than a block has, whole blocks, and more than a segment has.
        for [m, n, k] in [[33, 37, 300], [33, 48, 300], [1, 16, 5], [130, 32, 64], [70, 16, 1100]] {
            let codes: Vec<i8> = (0..n * k).map(|i| (i * 7 % 3) as i8 - 1).collect();
            let lhs: Vec<i8> = (0..m * k).map(|i| (i * 31 % 255) as u8 as i8).collect();
            // Values that half precision has, too.
            let scale: Vec<f32> = (0..n).map(|i| (i + 5) as f32 / 1024.0).collect();
            let steps: Vec<f32> = (0..m).map(|i| 0.02 + i as f32 * 0.001).collect();
            let dots = definition(&codes, &lhs, m, n, k);
            let expected: Vec<f32> =
                dots.iter().enumerate().map(|(i, &dot)| dot as f32 * steps[i / n] * scale[i % n]).collect();
            for (isa, storage) in Isa::available().flat_map(|isa| STORAGES.map(|storage| (isa, storage))) {
                let packed = PackedTernary::pack(isa, storage, &codes, &scale, [n, k]).unwrap();
                let mut out = vec![f32::NAN; m * n];
                packed.matmul(&lhs, &steps, &mut out).unwrap();
                assert_eq!(out, expected, "{isa} {storage:?} {m}x{n}x{k}");
                let doubled: Vec<f32> = scale.iter().map(|scale| 2.0 * scale).collect();
                packed.with_scale(&doubled).unwrap().matmul(&lhs, &steps, &mut out).unwrap();
                let doubles = out.iter().zip(&expected).all(|(got, expected)| *got == 2.0 * expected);
                assert!(doubles, "{isa} {storage:?} {m}x{n}x{k}");
            }
        }
    }

    #[test]
    fn rows_in_a_batch_equal_the_same_rows_alone() {
        let (n, k) = (40, 100);
        let codes: Vec<i8> = (0..n * k).map(|i| (i * 5 % 3) as i8 - 1).collect();
        let lhs: Vec<i8> = (0..50 * k).map(|i| (i * 17 % 251) as u8 as i8).collect();
        for (isa, storage) in Isa::available().flat_map(|isa| STORAGES.map(|storage| (isa, storage))) {
            let all = product(isa, storage, &codes, &lhs, [50, n, k]);
            for (row, expected) in lhs.chunks(k).zip(all.chunks(n)) {
                assert_eq!(product(isa, storage, &codes, row, [1, n, k]), expected, "{isa}");
            }
        }
    }

    #[test]
    fn two_bits_or_a_fifth_of_a_byte_a_weight_in_memory() {
        let bytes = |storage| {
            let packed =
                PackedTernary::pack(Isa::best(), storage, &[1; 1024 * 256], &[1.0; 1024], [1024, 256]).unwrap();
            (packed.codes_bytes(), packed.scales_bytes())
        };
        assert_eq!(bytes(STORAGES[0]), (1024 * 256 / 4, 1024 * 4));
        // 52,428.8, in whole groups of 64 bytes.
        assert_eq!(bytes(STORAGES[1]), (820 * 64, 1024 * 2));
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let pack = |codes: &[i8], scale: &[f32], rows, cols| {
            PackedTernary::pack(Isa::best(), STORAGES[1], codes, scale, [rows, cols])
        };
        assert!(matches!(pack(&[0; 5], &[1.0; 2], 2, 3), Err(KernelError::Length { expected: 6, got: 5, .. })));
        assert!(matches!(pack(&[0; 6], &[1.0; 3], 2, 3), Err(KernelError::Length { expected: 2, got: 3, .. })));
        assert!(matches!(pack(&[0, 2], &[1.0], 1, 2), Err(KernelError::NotTernary { index: 1, value: 2 })));
        assert!(matches!(pack(&[0], &[f32::NAN], 1, 1), Err(KernelError::NotFinite { .. })));
        assert!(matches!(pack(&[], &[], 0, MAX_COLS + 1), Err(KernelError::InnerDimension { .. })));
        assert!(matches!(pack(&[0], &[0.1], 1, 1), Err(KernelError::NotHalf { index: 0, .. })));
        let packed = pack(&[0; 6], &[1.0; 2], 2, 3).unwrap();
        assert!(packed.with_scale(&[1.0; 3]).is_err() && packed.with_scale(&[0.1; 2]).is_err());
        assert!(packed.matmul(&[0; 5], &[1.0; 2], &mut [0.0; 4]).is_err());
        assert!(packed.matmul(&[0; 6], &[1.0; 2], &mut [0.0; 5]).is_err());
        assert!(packed.matmul(&[], &[], &mut []).is_ok());
    }
}
