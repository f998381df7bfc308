//! Per-token absmax int8 quantisation of activations (`golden/reference.py: quantize_activations`).

use super::error::{KernelError, expect_len};
use super::isa::Isa;
use super::ternary::scalar;

/// Quantises every row of `x` `[rows, cols]` by itself: `step = max |x| / 127` (1 for a row of zeros),
/// `code = round_half_even(x / step)`, in -127..=127. Writes `codes` `[rows, cols]` and `steps` `[rows]`.
///
/// `x` must be finite; codes of a row that is not stay in range but mean nothing.
///
/// # Errors
/// [`KernelError::Length`] when `x` or `codes` is not `steps.len() * cols` long.
pub fn quantize_rows(isa: Isa, x: &[f32], cols: usize, codes: &mut [i8], steps: &mut [f32]) -> Result<(), KernelError> {
    expect_len("activations", x.len(), steps.len() * cols)?;
    expect_len("activation codes", codes.len(), x.len())?;
    if cols == 0 {
        steps.fill(1.0);
        return Ok(());
    }
    let _ = isa;
    for ((x, codes), step) in x.chunks_exact(cols).zip(codes.chunks_exact_mut(cols)).zip(steps) {
        *step = scalar::quantize_row(x, codes);
    }
    Ok(())
}
