//! Transposes: attention's keys on their way into panels, and tokens on their way into lane order.

use super::gemm::float::{Rows, RowsMut};
use super::isa::Isa;
use super::simd::{BLOCK, Simd, Work, dispatch};

/// `to[j, i] = from[i, j]` for `from` `[rows, cols]`.
///
/// # Panics
/// When a slice is too short for the shape.
pub fn transpose(isa: Isa, [rows, cols]: [usize; 2], from: Rows<'_>, to: RowsMut<'_>) {
    if rows == 0 || cols == 0 {
        return;
    }
    assert!(from.stride >= cols && from.data.len() >= (rows - 1) * from.stride + cols, "matrix is too short");
    assert!(to.stride >= rows && to.data.len() >= (cols - 1) * to.stride + rows, "transpose is too short");
    dispatch(isa, Transpose { rows, cols, from, to });
}

struct Transpose<'a> {
    rows: usize,
    cols: usize,
    from: Rows<'a>,
    to: RowsMut<'a>,
}

impl Work for Transpose<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { rows, cols, from, to } = self;
        for row in (0..rows).step_by(BLOCK) {
            for col in (0..cols).step_by(BLOCK) {
                let (height, width) = (BLOCK.min(rows - row), BLOCK.min(cols - col));
                let (from_at, to_at) = (row * from.stride + col, col * to.stride + row);
                if (height, width) == (BLOCK, BLOCK) {
                    // SAFETY: rows `row .. row + BLOCK` and columns `col .. col + BLOCK` lie in both, as `transpose` asserted.
                    unsafe {
                        let (from_at, to_at) = (from.data.as_ptr().add(from_at), to.data.as_mut_ptr().add(to_at));
                        simd.transpose_ptr(from_at, from.stride, to_at, to.stride);
                    }
                    continue;
                }
                for j in 0..width {
                    for i in 0..height {
                        to.data[to_at + j * to.stride + i] = from.data[from_at + i * from.stride + j];
                    }
                }
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
        fn every_element_moves_and_nothing_else_is_written(
            rows in 0usize..50, cols in 0usize..50, apart in 0usize..3, behind in 0usize..3,
        ) {
            let (stride, to_stride) = (cols + apart, rows + behind);
            let from: Vec<f32> = (0..rows * stride).map(|i| i as f32).collect();
            for isa in Isa::available() {
                let mut to = vec![-1.0; cols * to_stride];
                let rows_of = Rows { data: &from, stride };
                transpose(isa, [rows, cols], rows_of, RowsMut { data: &mut to, stride: to_stride });
                for (at, &v) in to.iter().enumerate() {
                    let (j, i) = (at / to_stride, at % to_stride);
                    prop_assert_eq!(v, if i < rows { from[i * stride + j] } else { -1.0 }, "{}: {}, {}", isa, j, i);
                }
            }
        }
    }
}
