//! Convolutions whose input and output are int8, as products over windows: a 1x1 convolution's windows are the pixels
//! themselves; of a wider one the caller gathers them.
//!
//! `code[m, n] = requantize(sum over k of lhs[m, k] * w[n, k])`: the products that all integer formats share, and the last step of
//! [`requantize`](crate::kernels::requantize) while the sums are in cache.

use super::int8::MAX_COLS;
use super::pack::pack_int8;
use super::{Packed, Sink};
use crate::kernels::error::{KernelError, expect_codes, expect_len};
use crate::kernels::isa::Isa;
use crate::kernels::requantize::Requantize;

/// Weights of such a convolution, packed for one instruction set.
#[derive(Debug, Clone)]
pub struct PackedPointwise {
    packed: Packed,
    requantize: Requantize,
}

impl PackedPointwise {
    /// Packs `codes` `[requantize.features(), cols]`, each in -127..=127.
    ///
    /// # Errors
    /// [`KernelError`] when lengths do not match, a code is -128, or `cols` exceeds [`MAX_COLS`].
    pub fn pack(isa: Isa, codes: &[i8], cols: usize, requantize: Requantize) -> Result<Self, KernelError> {
        if cols > MAX_COLS {
            return Err(KernelError::InnerDimension { max: MAX_COLS, got: cols });
        }
        expect_len("weights of a convolution", codes.len(), requantize.features().saturating_mul(cols))?;
        expect_codes("weights of a convolution", codes)?;
        Ok(Self { packed: pack_int8(isa, codes, requantize.features(), cols), requantize })
    }

    /// Values of a window.
    pub fn cols(&self) -> usize {
        self.packed.cols()
    }

    /// Bytes on the heap.
    pub fn resident_bytes(&self) -> usize {
        self.packed.resident_bytes() + self.requantize.resident_bytes()
    }

    /// Codes `[m, features]` of the `m` windows `lhs` `[m, cols]`; `added` are the codes of a residual connection, as
    /// many as `out` has.
    ///
    /// # Errors
    /// [`KernelError::Length`] when a slice does not match `m`.
    pub fn forward(&self, lhs: &[i8], m: usize, added: Option<&[i8]>, out: &mut [i8]) -> Result<(), KernelError> {
        super::matmul(&self.packed, lhs, m, &mut Sink::Requantized { out, requantize: &self.requantize, added })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand::{Rng, SeedableRng, rngs::SmallRng};

    use super::*;
    use crate::kernels::gemm::scalar::gemm_i8;
    use crate::kernels::requantize::tests::any_requantize;

    proptest! {
        #[test]
        fn every_isa_equals_the_definition(
            m in 0usize..=35,
            n in 1usize..=37,
            k in prop_oneof![4 => 0usize..=70, 1 => 500usize..=560],
            residual in any::<bool>(),
            seed in any::<u64>(),
        ) {
            let mut rng = SmallRng::seed_from_u64(seed);
            let requantize = any_requantize(&mut rng, n, k);
            let codes: Vec<i8> = (0..n * k).map(|_| rng.random_range(-127..=127)).collect();
            let lhs: Vec<i8> = (0..m * k).map(|_| rng.random_range(-128..=127)).collect();
            let added: Option<Vec<i8>> = residual.then(|| (0..m * n).map(|_| rng.random_range(-128..=127)).collect());
            let mut dots = vec![0; m * n];
            gemm_i8(&lhs, &codes, m, k, &mut dots);
            let added_code = |i| added.as_ref().map(|added| added[i]);
            let expected: Vec<i8> =
                dots.iter().enumerate().map(|(i, &dot)| requantize.code(i % n, dot, added_code(i))).collect();
            for isa in Isa::available() {
                let packed = PackedPointwise::pack(isa, &codes, k, requantize.clone()).unwrap();
                let mut out = vec![99; m * n];
                packed.forward(&lhs, m, added.as_deref(), &mut out).unwrap();
                prop_assert_eq!(&out, &expected, "{} {}x{}x{}", isa, m, n, k);
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let requantize = Requantize::new(&[1.0; 2], &[0.0; 2], (-128.0, 127.0), 0.0).unwrap();
        let pack = |codes: &[i8], cols| PackedPointwise::pack(Isa::best(), codes, cols, requantize.clone());
        assert!(matches!(pack(&[0; 5], 3), Err(KernelError::Length { expected: 6, got: 5, .. })));
        assert!(matches!(pack(&[0, 0, -128, 0], 2), Err(KernelError::Code { index: 2, .. })));
        assert!(matches!(pack(&[], MAX_COLS + 1), Err(KernelError::InnerDimension { .. })));
        let packed = pack(&[1; 6], 3).unwrap();
        assert!(packed.forward(&[0; 6], 2, None, &mut [0; 4]).is_ok());
        assert!(packed.forward(&[0; 5], 2, None, &mut [0; 4]).is_err());
        assert!(packed.forward(&[0; 6], 2, None, &mut [0; 5]).is_err());
        assert!(packed.forward(&[0; 6], 2, Some(&[0; 3]), &mut [0; 4]).is_err());
    }
}
