//! Scales of rows of a matrix, in single or half precision.

use super::KernelError;
use super::error::expect_finite;

/// One scale per row, zero-padded. Read in runs, so that half precision is widened where a run is used.
#[derive(Debug, Clone)]
pub(crate) enum Scales {
    F32(Box<[f32]>),
    /// The bits of half-precision numbers.
    F16(Box<[u16]>),
}

/// 2^112: from the exponent of a half-precision number to that of a single-precision one with the same bits.
const REBIAS: f32 = f32::from_bits((127 + 112) << 23);

/// The value of a non-negative finite half-precision number; subnormal ones included, since the product is exact.
#[inline(always)]
fn widen(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 13) * REBIAS
}

/// The bits of a non-negative number as half precision, if it has the value.
fn narrow(value: f32) -> Option<u16> {
    // At most 2^-15 of a number below 2^16 remains, so that the bits fit; what is cut off shows in the comparison.
    let bits = ((value / REBIAS).to_bits() >> 13) as u16;
    (bits < 0x7c00 && widen(bits) == value).then_some(bits)
}

impl Scales {
    /// `values`, padded with zeros to a multiple of `padding`. In half precision they are values that it has.
    ///
    /// # Errors
    /// [`KernelError`] when a value is not finite, or has no half precision.
    pub(crate) fn new(values: &[f32], half: bool, padding: usize) -> Result<Self, KernelError> {
        expect_finite("scale", values)?;
        let padded = values.len().next_multiple_of(padding);
        if !half {
            let mut all = values.to_vec();
            all.resize(padded, 0.0);
            return Ok(Self::F32(all.into()));
        }
        let bits = |(index, &value): (usize, &f32)| narrow(value).ok_or(KernelError::NotHalf { index, value });
        let mut all = values.iter().enumerate().map(bits).collect::<Result<Vec<_>, _>>()?;
        all.resize(padded, 0);
        Ok(Self::F16(all.into()))
    }

    /// Number of scales, padding included.
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::F32(values) => values.len(),
            Self::F16(values) => values.len(),
        }
    }

    /// Copies the scales from `first` on into `out`, as many as there are.
    #[inline(always)]
    pub(crate) fn read(&self, first: usize, out: &mut [f32]) {
        let count = out.len().min(self.len() - first);
        match self {
            Self::F32(values) => out[..count].copy_from_slice(&values[first..first + count]),
            Self::F16(values) => {
                let values = &values[first..first + count];
                for i in 0..count {
                    out[i] = widen(values[i]);
                }
            }
        }
    }

    /// Bytes on the heap.
    pub(crate) fn resident_bytes(&self) -> usize {
        match self {
            Self::F32(values) => size_of_val(&**values),
            Self::F16(values) => size_of_val(&**values),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_half_precision_number_comes_back() {
        for bits in 0..0x7c00 {
            let value = half::f16::from_bits(bits).to_f32();
            assert_eq!(widen(bits), value);
            assert_eq!(narrow(value), Some(bits));
        }
        for value in [0.1, 65536.0, 2f32.powi(-25), f32::MIN_POSITIVE, -1.0] {
            assert_eq!(narrow(value), None, "{value}");
        }
    }
}
