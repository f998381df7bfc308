//! A dense matrix in the precision in which a file stores it.

use std::borrow::Cow;

use half::f16;
use serde::{Deserialize, Serialize};

/// How the values of a dense matrix are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    #[default]
    F32,
    F16,
    /// Integers from -127 to 127 with a scale per row.
    Int8,
}

/// A dense matrix, row-major.
#[derive(Debug, Clone, PartialEq)]
pub enum Matrix {
    F32(Vec<f32>),
    F16(Vec<f16>),
    /// `value[r, c] = codes[r, c] * scale[r]`.
    Int8 {
        /// From -127 to 127.
        codes: Vec<i8>,
        /// One per row, positive and finite.
        scale: Vec<f32>,
    },
}

impl Default for Matrix {
    fn default() -> Self {
        Self::empty(Precision::F32)
    }
}

impl From<Vec<f32>> for Matrix {
    fn from(values: Vec<f32>) -> Self {
        Self::F32(values)
    }
}

impl Matrix {
    /// A matrix without values.
    pub const fn empty(precision: Precision) -> Self {
        match precision {
            Precision::F32 => Self::F32(Vec::new()),
            Precision::F16 => Self::F16(Vec::new()),
            Precision::Int8 => Self::Int8 { codes: Vec::new(), scale: Vec::new() },
        }
    }

    /// `values` of so many rows, rounded to `precision`. The scale of an int8 row is that of its largest magnitude over 127,
    /// and 1 for a row of zeros.
    pub fn encode(values: &[f32], rows: usize, precision: Precision) -> Self {
        match precision {
            Precision::F32 => Self::F32(values.to_vec()),
            Precision::F16 => Self::F16(values.iter().copied().map(f16::from_f32).collect()),
            Precision::Int8 => {
                let cols = values.len() / rows.max(1);
                let (codes, mut scale) = crate::kernels::gemm::scalar::quantize_weight(values, rows, cols);
                // A row of subnormal numbers has a step that rounds to zero.
                scale.iter_mut().for_each(|scale| *scale = scale.max(f32::MIN_POSITIVE));
                Self::Int8 { codes, scale }
            }
        }
    }

    /// How the values are stored.
    pub const fn precision(&self) -> Precision {
        match self {
            Self::F32(_) => Precision::F32,
            Self::F16(_) => Precision::F16,
            Self::Int8 { .. } => Precision::Int8,
        }
    }

    pub fn len(&self) -> usize {
        match self {
            Self::F32(values) => values.len(),
            Self::F16(values) => values.len(),
            Self::Int8 { codes, .. } => codes.len(),
        }
    }

    /// Whether there is no value.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The values that are stored.
    pub fn to_f32(&self) -> Cow<'_, [f32]> {
        match self {
            Self::F32(values) => Cow::Borrowed(values),
            Self::F16(values) => Cow::Owned(values.iter().map(|value| value.to_f32()).collect()),
            Self::Int8 { codes, scale } => {
                let cols = (codes.len() / scale.len().max(1)).max(1);
                let rows = codes.chunks_exact(cols).zip(scale);
                Cow::Owned(rows.flat_map(|(row, scale)| row.iter().map(move |&code| f32::from(code) * scale)).collect())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn encoding_keeps_values_to_half_a_step(
            rows in 1usize..5,
            cols in 1usize..9,
            values in prop::collection::vec(-1e3f32..1e3, 45),
        ) {
            let values = &values[..rows * cols];
            prop_assert_eq!(Matrix::encode(values, rows, Precision::F32), Matrix::F32(values.to_vec()));
            // Half precision has 11 significant bits, or multiples of 2^-24 below 2^-14.
            for (value, half) in values.iter().zip(&*Matrix::encode(values, rows, Precision::F16).to_f32()) {
                prop_assert!((value - half).abs() <= value.abs() * 2f32.powi(-11) + 2f32.powi(-25));
            }
            let int8 = Matrix::encode(values, rows, Precision::Int8);
            for (row, coded) in values.chunks(cols).zip(int8.to_f32().chunks(cols)) {
                let step = row.iter().fold(0f32, |m, v| m.max(v.abs())) / 127.0;
                // Half a step, and the roundings of a quotient up to 127 and of a product.
                prop_assert!(row.iter().zip(coded).all(|(a, b)| (a - b).abs() <= 0.5001 * step));
            }
        }
    }
}
