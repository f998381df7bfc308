//! Rows of four-bit codes.

use std::borrow::Cow;

const LARGEST: f32 = 7.0;

/// Rows of signed codes with a scale each: `value[r, c] = codes[r, c] * scale[r]`.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Int4Rows {
    /// From -7 to 7, row-major.
    pub codes: Vec<i16>,
    /// One a row, positive and finite.
    pub scale: Vec<f32>,
}

impl Int4Rows {
    /// Finite `values` of rows of so many columns, rounded to the nearest codes.
    pub fn encode(values: &[f32], cols: usize) -> Self {
        let (mut codes, mut scale) = (Vec::with_capacity(values.len()), Vec::new());
        for row in values.chunks_exact(cols.max(1)) {
            let most = row.iter().fold(0.0f32, |most, value| most.max(value.abs()));
            // A row of zeros, or of numbers that are as good as zero, has any scale.
            let step = if most > f32::MIN_POSITIVE * LARGEST { most / LARGEST } else { 1.0 };
            codes.extend(row.iter().map(|value| (value / step).round() as i16));
            scale.push(step);
        }
        Self { codes, scale }
    }

    pub fn to_f32(&self) -> Vec<f32> {
        let cols = (self.codes.len() / self.scale.len().max(1)).max(1);
        let rows = self.codes.chunks_exact(cols).zip(&self.scale);
        rows.flat_map(|(row, scale)| row.iter().map(move |&code| f32::from(code) * scale)).collect()
    }
}

/// Rows of values, as a file stores them.
#[derive(Debug, Clone, PartialEq)]
pub enum Rows {
    /// Of the format that is said elsewhere, row-major.
    Float(Vec<f32>),
    Int4(Int4Rows),
}

impl From<Vec<f32>> for Rows {
    fn from(values: Vec<f32>) -> Self {
        Self::Float(values)
    }
}

impl Rows {
    /// How many values there are.
    pub fn len(&self) -> usize {
        match self {
            Self::Float(values) => values.len(),
            Self::Int4(rows) => rows.codes.len(),
        }
    }

    /// Whether there is no value.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn to_f32(&self) -> Cow<'_, [f32]> {
        match self {
            Self::Float(values) => Cow::Borrowed(values),
            Self::Int4(rows) => Cow::Owned(rows.to_f32()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_keep_values_to_half_a_step() {
        let values = [0.7, -0.3, 0.14, 0.0, 0.0, 0.0, -21.0, 3.1, 1e-3];
        let rows = Int4Rows::encode(&values, 3);
        assert_eq!(rows.scale.len(), 3);
        assert!(rows.codes.iter().all(|code| (-7..=7).contains(code)));
        for (at, (value, got)) in values.iter().zip(rows.to_f32()).enumerate() {
            assert!((value - got).abs() <= 0.5001 * rows.scale[at / 3], "{value} became {got}");
        }
        // Nothing that is finite ends beyond the codes.
        for value in [f32::MAX, f32::MIN_POSITIVE, 1e-45] {
            let rows = Int4Rows::encode(&[value, -value], 2);
            assert!(rows.scale[0] > 0.0 && rows.codes.iter().all(|code| (-7..=7).contains(code)), "{rows:?}");
        }
    }
}
