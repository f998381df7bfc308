//! f32 matrix product, through the `gemm` crate: one thread, any strides.

use gemm::Parallelism;

/// A strided view of a matrix.
#[derive(Clone, Copy)]
pub struct Mat<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> Mat<'a> {
    /// Row-major `[rows, cols]`.
    ///
    /// # Panics
    /// When `data` is shorter than `rows * cols`.
    pub fn new(data: &'a [f32], rows: usize, cols: usize) -> Self {
        Self::strided(data, rows, cols, cols)
    }

    /// `rows` rows of `cols` values, `row_stride` apart.
    ///
    /// # Panics
    /// When the last row ends past `data`.
    pub fn strided(data: &'a [f32], rows: usize, cols: usize, row_stride: usize) -> Self {
        assert!(rows == 0 || (rows - 1) * row_stride + cols <= data.len(), "matrix exceeds its slice");
        Self { data, rows, cols, row_stride, col_stride: 1 }
    }

    /// The transpose, without moving anything.
    pub fn t(self) -> Self {
        Self { rows: self.cols, cols: self.rows, row_stride: self.col_stride, col_stride: self.row_stride, ..self }
    }
}

/// Whether the product replaces or joins what `out` holds.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Write {
    /// `out = scale * lhs rhs`.
    Set,
    /// `out += scale * lhs rhs`.
    Add,
}

/// `out (+)= scale * lhs rhs`, `out` row-major with rows `out_stride` apart.
///
/// # Panics
/// When the inner sizes differ or the last row of the product ends past `out`.
pub fn matmul(lhs: Mat<'_>, rhs: Mat<'_>, scale: f32, out: &mut [f32], out_stride: usize, write: Write) {
    let (m, n, k) = (lhs.rows, rhs.cols, lhs.cols);
    assert_eq!(k, rhs.rows, "inner sizes of a product differ");
    if m == 0 || n == 0 {
        return;
    }
    assert!(out_stride >= n && (m - 1) * out_stride + n <= out.len(), "product exceeds its output");
    let add = write == Write::Add;
    // SAFETY: `Mat` guarantees that every (row, col) of `lhs` and `rhs` lies in its slice (checked when built; `t`
    // swaps both sizes and strides), and the assertion above that every (row, col) of the m x n product lies in
    // `out`, whose rows do not overlap since `out_stride >= n`. `out` is borrowed mutably, so it aliases neither.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
            1,
            out_stride as isize,
            add,
            lhs.data.as_ptr(),
            lhs.col_stride as isize,
            lhs.row_stride as isize,
            rhs.data.as_ptr(),
            rhs.col_stride as isize,
            rhs.row_stride as isize,
            1.0,
            scale,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transposed_and_accumulated_products_match_the_definition() {
        let (m, n, k) = (5, 7, 3);
        let a: Vec<f32> = (0..m * k).map(|i| (i as f32 * 0.7).sin()).collect();
        let b: Vec<f32> = (0..n * k).map(|i| (i as f32 * 1.3).cos()).collect();
        let mut out = vec![1.0; m * n];
        matmul(Mat::new(&a, m, k), Mat::new(&b, n, k).t(), 2.0, &mut out, n, Write::Add);
        for i in 0..m {
            for j in 0..n {
                let dot: f32 = (0..k).map(|l| a[i * k + l] * b[j * k + l]).sum();
                // Two roundings per term of a sum of k terms of magnitude at most 1.
                assert!((out[i * n + j] - (1.0 + 2.0 * dot)).abs() <= 4.0 * k as f32 * f32::EPSILON);
            }
        }
    }
}
