//! The definition: plain loops, never optimised.

use super::{Input, Shape};

/// The exact sum of channel `c` at `row, col` of the output:
/// `sum over ky, kx of input[row * stride + ky - top, col * stride + kx - left, c] * window[ky, kx]`, where the input's
/// zero stands beyond its edges.
pub fn dot(window: &[i8], shape: &Shape, input: Input<'_>, (row, col, c): (usize, usize, usize)) -> i32 {
    let Shape { channels, kernel, stride, top, left } = *shape;
    let height = input.codes.len() / (input.width * channels);
    let code = |ky: usize, kx: usize| {
        let y = (row * stride + ky).checked_sub(top).filter(|&y| y < height);
        let x = (col * stride + kx).checked_sub(left).filter(|&x| x < input.width);
        match (y, x) {
            (Some(y), Some(x)) => input.codes[(y * input.width + x) * channels + c],
            _ => input.zero,
        }
    };
    let products = window.iter().enumerate().map(|(i, &w)| i32::from(code(i / kernel, i % kernel)) * i32::from(w));
    products.sum()
}
