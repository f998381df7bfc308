//! `x86_64-gemm-bf16f32`: the loops of [`super::bf16`] for AVX-512 with its bf16 extension.

use std::arch::x86_64::*;
use std::ops::Range;

use super::mat::{Mat, Write};

/// Sixteen pairs of bf16: one register of a packed panel, an even k in the lower halves and the next in the upper.
pub(super) type Lanes = __m512i;

/// Rows of lhs or columns of rhs in a panel.
const PANEL: usize = 16;

/// Most k that are packed at a time: three panels of rhs and one of lhs, 32 bytes for each k and panel, fit in 32 kB
/// with room for the output.
const K_BLOCK: usize = 192;

/// Rows of lhs that are packed at a time: 48 kB.
const M_BLOCK: usize = 128;

/// Rows in registers; a panel of lhs has two tiles.
const TILE: usize = 8;

/// Panels of rhs in registers: 8 x 3 accumulators, three of rhs and a broadcast are 28 of 32 registers.
const WIDE: usize = 3;

/// `out (+)= scale * bf16(lhs) bf16(rhs)`. The caller has checked the sizes: `m` and `n` are not 0, and every row of the
/// product lies in `out`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
pub(super) fn matmul(
    lhs: Mat<'_>,
    rhs: Mat<'_>,
    scale: f32,
    out: &mut [f32],
    out_stride: usize,
    write: Write,
    packed: &mut Vec<Lanes>,
) {
    let (m, n, k) = (lhs.rows(), rhs.cols(), lhs.cols());
    // Nearly equal blocks of whole pairs; at least one, so that a product over nothing is written, too.
    let blocks = k.div_ceil(K_BLOCK).max(1);
    let k_block = k.div_ceil(blocks).next_multiple_of(2);
    let pairs = k_block / 2;
    let (rhs_len, lhs_len) = (n.div_ceil(PANEL) * pairs, m.min(M_BLOCK).div_ceil(PANEL) * pairs);
    if packed.len() < rhs_len + lhs_len {
        packed.resize(rhs_len + lhs_len, _mm512_setzero_si512());
    }
    let (rhs_packed, lhs_packed) = packed.split_at_mut(rhs_len);
    let lhs_packed = &mut lhs_packed[..lhs_len];
    let scale = _mm512_set1_ps(scale);
    for block in 0..blocks {
        let ks = (block * k_block).min(k)..((block + 1) * k_block).min(k);
        pack(rhs.t(), 0..n, ks.clone(), pairs, rhs_packed);
        let add = write == Write::Add || block > 0;
        for first_row in (0..m).step_by(M_BLOCK) {
            let rows = first_row..m.min(first_row + M_BLOCK);
            pack(lhs, rows.clone(), ks.clone(), pairs, lhs_packed);
            let mut panel = 0;
            while panel < n.div_ceil(PANEL) {
                let rhs_panels = &rhs_packed[panel * pairs..];
                // Four panels as two and two: one alone would read a pair of lhs for a single multiply-add.
                let wide = match n.div_ceil(PANEL) - panel {
                    4 => 2,
                    left => left.min(WIDE),
                };
                for row in rows.clone().step_by(TILE) {
                    let in_block = row - first_row;
                    let lhs_tile = LhsTile {
                        panel: &lhs_packed[in_block / PANEL * pairs..][..pairs],
                        half: in_block % PANEL / TILE,
                    };
                    let tile = Tile { row, rows: TILE.min(rows.end - row), col: panel * PANEL, n, stride: out_stride };
                    match wide {
                        1 => tile.run::<1>(lhs_tile, rhs_panels, scale, add, out),
                        2 => tile.run::<2>(lhs_tile, rhs_panels, scale, add, out),
                        _ => tile.run::<WIDE>(lhs_tile, rhs_panels, scale, add, out),
                    }
                }
                panel += wide;
            }
        }
    }
}

/// Eight of a panel's sixteen rows.
#[derive(Clone, Copy)]
struct LhsTile<'a> {
    panel: &'a [Lanes],
    /// The first eight or the last.
    half: usize,
}

/// Where a tile of the product goes.
#[derive(Clone, Copy)]
struct Tile {
    row: usize,
    /// At least one, at most [`TILE`].
    rows: usize,
    col: usize,
    /// Columns of the whole product.
    n: usize,
    stride: usize,
}

impl Tile {
    /// `TILE` rows times `N` panels.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    fn run<const N: usize>(self, lhs: LhsTile<'_>, rhs: &[Lanes], scale: __m512, add: bool, out: &mut [f32]) {
        let pairs = lhs.panel.len();
        assert!(rhs.len() >= N * pairs && lhs.half < PANEL / TILE && self.rows <= TILE);
        let mut acc = [[_mm512_setzero_ps(); N]; TILE];
        let lhs_from = lhs.panel.as_ptr().cast::<i32>();
        for pair in 0..pairs {
            // SAFETY: `rhs` has N panels of `pairs` registers, asserted above.
            let b: [__m512bh; N] = std::array::from_fn(|j| unsafe { bf16s(*rhs.as_ptr().add(j * pairs + pair)) });
            for (i, acc) in acc.iter_mut().enumerate() {
                // SAFETY: the panel has `pairs` registers of 16 lanes, and `half * TILE + i` is below 16.
                let a = unsafe { *lhs_from.add(pair * PANEL + lhs.half * TILE + i) };
                let a = bf16s(_mm512_set1_epi32(a));
                for (acc, b) in acc.iter_mut().zip(b) {
                    *acc = _mm512_dpbf16_ps(*acc, a, b);
                }
            }
        }
        for (i, acc) in acc.into_iter().enumerate().take(self.rows) {
            let out = &mut out[(self.row + i) * self.stride + self.col..];
            for (j, acc) in acc.into_iter().enumerate() {
                let first = j * PANEL;
                let left = (self.n - self.col).saturating_sub(first).min(PANEL);
                let Some(out) = out.get_mut(first..first + left) else { break };
                let mask = lane_mask(left);
                // SAFETY: lanes below `left` lie in `out`; others are neither read nor written.
                unsafe {
                    let sum = if add {
                        _mm512_fmadd_ps(acc, scale, _mm512_maskz_loadu_ps(mask, out.as_ptr()))
                    } else {
                        _mm512_mul_ps(acc, scale)
                    };
                    _mm512_mask_storeu_ps(out.as_mut_ptr(), mask, sum);
                }
            }
        }
    }
}

/// The first `lanes` of sixteen.
#[inline(always)]
fn lane_mask(lanes: usize) -> __mmask16 {
    ((1u32 << lanes.min(PANEL)) - 1) as __mmask16
}

#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn bf16s(pairs: Lanes) -> __m512bh {
    // SAFETY: both are 64 bytes of any value.
    unsafe { std::mem::transmute(pairs) }
}

/// Packs columns `ks` of rows `rows` of `from`: panels of 16 rows, each `[pairs, 16]`, zeros where there is nothing.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn pack(from: Mat<'_>, rows: Range<usize>, ks: Range<usize>, pairs: usize, to: &mut [Lanes]) {
    for (panel, to) in to.chunks_exact_mut(pairs.max(1)).take(rows.len().div_ceil(PANEL)).enumerate() {
        let first = rows.start + panel * PANEL;
        let count = PANEL.min(rows.end - first);
        if from.col_stride() == 1 {
            pack_rows(from, first, count, ks.clone(), to);
        } else {
            pack_columns(from, first, count, ks.clone(), to);
        }
    }
}

/// One panel whose rows are contiguous: 32 columns of 16 rows at a time, turned by a transposition in registers.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn pack_rows(from: Mat<'_>, first: usize, count: usize, ks: Range<usize>, to: &mut [Lanes]) {
    for (group, to) in to.chunks_mut(PANEL).enumerate() {
        let k = ks.start + group * 2 * PANEL;
        let left = ks.end.saturating_sub(k);
        let (low, high) = (lane_mask(left), lane_mask(left.saturating_sub(PANEL)));
        let rows: [Lanes; PANEL] = std::array::from_fn(|i| {
            if i >= count || left == 0 {
                return _mm512_setzero_si512();
            }
            let row = &from.data()[(first + i) * from.row_stride() + k..];
            assert!(row.len() >= left.min(2 * PANEL));
            // SAFETY: `row` has a value for every lane of both masks; others are not read. An offset within 32 floats of a
            // slice's pointer does not wrap.
            unsafe {
                let even = _mm512_maskz_loadu_ps(low, row.as_ptr());
                let odd = _mm512_maskz_loadu_ps(high, row.as_ptr().wrapping_add(PANEL));
                std::mem::transmute(_mm512_cvtne2ps_pbh(odd, even))
            }
        });
        for (to, lanes) in to.iter_mut().zip(transpose(rows)) {
            *to = lanes;
        }
    }
}

/// One panel whose columns are contiguous: two columns make a register.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn pack_columns(from: Mat<'_>, first: usize, count: usize, ks: Range<usize>, to: &mut [Lanes]) {
    assert!(from.row_stride() == 1, "rows or columns of a matrix are contiguous");
    let mask = lane_mask(count);
    // Word 2 i of the result is lane i of the even column, word 2 i + 1 of the odd one.
    let words: [i16; 32] = std::array::from_fn(|word| (word % 2 * PANEL + word / 2) as i16);
    // SAFETY: an array of 64 bytes.
    let interleave = unsafe { _mm512_loadu_si512(words.as_ptr().cast()) };
    let column = |k: usize| {
        if k >= ks.end {
            return _mm512_setzero_ps();
        }
        let column = &from.data()[k * from.col_stride() + first..][..count];
        // SAFETY: `column` has a value for every lane of the mask; others are not read.
        unsafe { _mm512_maskz_loadu_ps(mask, column.as_ptr()) }
    };
    for (pair, to) in to.iter_mut().enumerate() {
        let (even, odd) = (column(ks.start + 2 * pair), column(ks.start + 2 * pair + 1));
        // SAFETY: both are 64 bytes of any value.
        let both: Lanes = unsafe { std::mem::transmute(_mm512_cvtne2ps_pbh(odd, even)) };
        *to = _mm512_permutexvar_epi16(interleave, both);
    }
}

/// Lane j of row i becomes lane i of row j.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn transpose(r: [Lanes; PANEL]) -> [Lanes; PANEL] {
    // Within lanes of 128 bits, 4 x 4 at a time; then the lanes of 128 bits themselves, twice.
    let mut fours = [_mm512_setzero_si512(); PANEL];
    for i in (0..PANEL).step_by(4) {
        let (a, b) = (_mm512_unpacklo_epi32(r[i], r[i + 1]), _mm512_unpackhi_epi32(r[i], r[i + 1]));
        let (c, d) = (_mm512_unpacklo_epi32(r[i + 2], r[i + 3]), _mm512_unpackhi_epi32(r[i + 2], r[i + 3]));
        // fours[i + j]: columns j, j + 4, j + 8 and j + 12 of rows i to i + 3.
        fours[i] = _mm512_unpacklo_epi64(a, c);
        fours[i + 1] = _mm512_unpackhi_epi64(a, c);
        fours[i + 2] = _mm512_unpacklo_epi64(b, d);
        fours[i + 3] = _mm512_unpackhi_epi64(b, d);
    }
    let mut out = [_mm512_setzero_si512(); PANEL];
    for j in 0..4 {
        let [a, b, c, d] = [fours[j], fours[4 + j], fours[8 + j], fours[12 + j]];
        // Columns j and j + 8, then j + 4 and j + 12, of rows 0 to 7 and of rows 8 to 15.
        let (even, odd) = (_mm512_shuffle_i32x4::<0b10_00_10_00>(a, b), _mm512_shuffle_i32x4::<0b11_01_11_01>(a, b));
        let (even2, odd2) = (_mm512_shuffle_i32x4::<0b10_00_10_00>(c, d), _mm512_shuffle_i32x4::<0b11_01_11_01>(c, d));
        out[j] = _mm512_shuffle_i32x4::<0b10_00_10_00>(even, even2);
        out[j + 8] = _mm512_shuffle_i32x4::<0b11_01_11_01>(even, even2);
        out[j + 4] = _mm512_shuffle_i32x4::<0b10_00_10_00>(odd, odd2);
        out[j + 12] = _mm512_shuffle_i32x4::<0b11_01_11_01>(odd, odd2);
    }
    out
}
