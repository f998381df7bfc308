//! The order of features in memory that lets the first stages pair whole registers.

use crate::kernels::gemm::float::{Rows, RowsMut};
use crate::kernels::isa::Isa;
use crate::kernels::transpose::transpose;

/// Lanes that the order is made for: one AVX-512 register of f32, two of AVX2, four of NEON. The same for every
/// instruction set, so that packed models do not depend on it.
const LANES: usize = 16;

/// A permutation of `features` features, chosen so that stage l of a butterfly rotation pairs features a whole number
/// of registers apart for as many stages as possible.
///
/// Let `2^v` be the largest power of two that divides `features`. Feature `o * 2^v + lane * 2^(v-4) + r` moves to
/// position `(o * 2^(v-4) + r) * 16 + lane`. Stage l then has stride `16 * 2^l` for `l < v - 4`, and pairs lanes
/// `2^(l - (v - 4))` apart after that. Every stage keeps the shape of the definition (blocks of two strides, the first
/// half paired with the second), only with another stride. With `v < 4` nothing moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LaneOrder {
    features: usize,
    /// `LANES`, or 1 where nothing moves.
    lanes: usize,
    /// Positions of one lane inside a block of `2^v` features: `2^v / lanes`.
    segment: usize,
    /// `v`: more stages than this do not divide `features`.
    max_stages: usize,
}

impl LaneOrder {
    /// The order of that many features.
    pub fn new(features: usize) -> Self {
        let max_stages = if features == 0 { 0 } else { features.trailing_zeros() as usize };
        let lanes = if max_stages >= LANES.trailing_zeros() as usize { LANES } else { 1 };
        Self { features, lanes, segment: (1 << max_stages) / lanes, max_stages }
    }

    pub fn features(&self) -> usize {
        self.features
    }

    /// Most stages that a rotation of so many features can have.
    pub fn max_stages(&self) -> usize {
        self.max_stages
    }

    /// Where feature `j` lies.
    pub fn position(&self, j: usize) -> usize {
        let (block, j) = (j / (self.segment * self.lanes), j % (self.segment * self.lanes));
        (block * self.segment + j % self.segment) * self.lanes + j / self.segment
    }

    /// The feature that lies at `position`: undoes [`LaneOrder::position`].
    pub fn feature(&self, position: usize) -> usize {
        let (register, lane) = (position / self.lanes, position % self.lanes);
        (register / self.segment * self.lanes + lane) * self.segment + register % self.segment
    }

    /// Moves one row into this order: each block is transposed, from lanes of registers to registers of lanes.
    ///
    /// # Panics
    /// When a row does not have that many features.
    pub fn permute_row(&self, isa: Isa, natural: &[f32], ordered: &mut [f32]) {
        assert!(natural.len() == self.features && ordered.len() == self.features, "rows of another length");
        let Self { lanes, segment, .. } = *self;
        let block = segment * lanes;
        for (natural, ordered) in natural.chunks_exact(block).zip(ordered.chunks_exact_mut(block)) {
            let (from, to) = (Rows { data: natural, stride: segment }, RowsMut { data: ordered, stride: lanes });
            transpose(isa, [lanes, segment], from, to);
        }
    }

    /// Distance in memory of the features that stage `stage` pairs.
    pub fn stride(&self, stage: usize) -> usize {
        self.position(1 << stage)
    }

    /// Where the angle of the pair `pair` (block by block, as the definition counts) of `stage` lies among the
    /// `features / 2` angles of that stage, so that the kernel reads angles in the order in which it meets the pairs.
    pub(super) fn angle_position(&self, stage: usize, pair: usize) -> usize {
        let first = self.position((pair >> stage << (stage + 1)) + pair % (1 << stage));
        let stride = self.stride(stage);
        first / (2 * stride) * stride + first % stride
    }

    /// Moves the angles of a stage, given in the order in which the definition counts pairs, to where
    /// [`LaneOrder::angle_position`] says: blocks of lanes by registers are transposed, without the lanes or the registers
    /// that are second of a pair.
    #[inline(always)]
    pub(super) fn permute_angles<T: Copy>(&self, stage: usize, natural: &[T], ordered: &mut [T]) {
        if self.lanes == 1 {
            ordered.copy_from_slice(natural);
            return;
        }
        let pairs_registers = 1 << stage < self.segment;
        let (lanes, block) = (if pairs_registers { LANES } else { LANES / 2 }, self.segment * LANES / 2);
        let registers = block / lanes;
        for (natural, ordered) in natural.chunks_exact(block).zip(ordered.chunks_exact_mut(block)) {
            for (r, ordered) in ordered.chunks_exact_mut(lanes).enumerate() {
                for (lane, out) in ordered.iter_mut().enumerate() {
                    *out = natural[lane * registers + r];
                }
            }
        }
    }

    /// Moves the columns of a row-major `[rows, features]` matrix into this order.
    pub fn permute_columns<T: Copy>(&self, matrix: &[T]) -> Vec<T> {
        let rows = matrix.chunks_exact(self.features.max(1));
        rows.flat_map(|row| (0..self.features).map(|position| row[self.feature(position)])).collect()
    }

    /// Moves the rows of a row-major `[features, cols]` matrix into this order.
    pub fn permute_rows<T: Copy>(&self, matrix: &[T], cols: usize) -> Vec<T> {
        (0..self.features).flat_map(|position| &matrix[self.feature(position) * cols..][..cols]).copied().collect()
    }
}
