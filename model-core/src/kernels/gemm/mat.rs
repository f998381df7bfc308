//! Views of the f32 matrices that training multiplies.

/// A strided view of a matrix whose rows or columns are contiguous.
#[derive(Debug, Clone, Copy)]
pub struct Mat<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> Mat<'a> {
    /// A row-major matrix `[rows, cols]`.
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

    pub fn rows(&self) -> usize {
        self.rows
    }

    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Values from one row to the next. `row * row_stride + col * col_stride` lies in [`Mat::data`] for every row and column.
    pub fn row_stride(&self) -> usize {
        self.row_stride
    }

    /// Values from one column to the next.
    pub fn col_stride(&self) -> usize {
        self.col_stride
    }

    pub fn data(&self) -> &'a [f32] {
        self.data
    }
}

/// Whether a product replaces or joins what its output holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Write {
    /// `out = scale * lhs rhs`.
    Set,
    /// `out += scale * lhs rhs`.
    Add,
}
