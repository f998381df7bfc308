//! What a kernel refuses.

/// A kernel was handed something that it cannot work on.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum KernelError {
    /// A slice does not have the length that the shapes ask for.
    #[error("{what} has {got} elements, expected {expected}")]
    Length {
        what: &'static str,
        /// Elements that the shapes ask for.
        expected: usize,
        /// Elements that it has.
        got: usize,
    },
    /// A ternary code is not -1, 0 or 1.
    #[error("ternary code {index} is {value}, not -1, 0 or 1")]
    NotTernary {
        /// Position in the row-major codes.
        index: usize,
        value: i8,
    },
    /// An int8 weight is -128: its magnitude is no int8.
    #[error("{what}: code {index} is -128, below -127")]
    Code { what: &'static str, index: usize },
    /// A weight, scale or bias is infinite or not a number.
    #[error("{what} {index} is not finite")]
    NotFinite { what: &'static str, index: usize },
    /// An int8 weight has no negative in int8.
    #[error("int8 weight {index} is -128, which has no negative")]
    NotSymmetric {
        /// Position in the row-major weights.
        index: usize,
    },
    /// A scale that is to be kept in half precision has a value that half precision does not have.
    #[error("scale {index} is {value}, no value of half precision")]
    NotHalf {
        /// Position among the scales.
        index: usize,
        value: f32,
    },
    /// The inner dimension is so long that an i32 sum could overflow.
    #[error("inner dimension {got} is more than {max}")]
    InnerDimension {
        /// Longest that is exact.
        max: usize,
        /// What was asked for.
        got: usize,
    },
    /// An instruction set that this CPU or build does not have.
    #[error("instruction set `{asked}` is not available; this CPU has {available}")]
    IsaUnavailable {
        /// The name that was asked for.
        asked: String,
        /// The names there are.
        available: String,
    },
}

pub(super) fn expect_len(what: &'static str, got: usize, expected: usize) -> Result<(), KernelError> {
    if got == expected { Ok(()) } else { Err(KernelError::Length { what, expected, got }) }
}

/// Checks that all values are finite.
pub(super) fn expect_finite(what: &'static str, values: &[f32]) -> Result<(), KernelError> {
    match values.iter().position(|v| !v.is_finite()) {
        None => Ok(()),
        Some(index) => Err(KernelError::NotFinite { what, index }),
    }
}

/// Checks that all weights are in -127..=127.
pub(super) fn expect_codes(what: &'static str, codes: &[i8]) -> Result<(), KernelError> {
    match codes.iter().position(|&code| code == i8::MIN) {
        None => Ok(()),
        Some(index) => Err(KernelError::Code { what, index }),
    }
}
