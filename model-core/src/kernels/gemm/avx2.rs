//! `x86_64-{ternary,int8}-i8i32-avx2`: `vpmaddubsw` multiplies u8 by i8 and adds pairs into 16 bits, saturating; what
//! follows keeps every sum below saturation.
//!
//! - ternary: w + 1 is at most 2, so pairs are added up in 16 bits and widened every [`WIDEN_EVERY`] steps;
//! - int8: weights stay signed, and `a * w = |a| * (sign(a) w)`; with |w| <= 127 a pair is at most
//!   `2 * 128 * 127 = 32512`, below 32768, and is widened at once.

use std::arch::x86_64::{
    __m256i, _mm256_abs_epi8, _mm256_add_epi16, _mm256_add_epi32, _mm256_and_si256, _mm256_loadu_si256,
    _mm256_madd_epi16, _mm256_maddubs_epi16, _mm256_set1_epi8, _mm256_set1_epi16, _mm256_set1_epi32,
    _mm256_setzero_si256, _mm256_sign_epi8, _mm256_srli_epi16, _mm256_storeu_si256,
};

use super::pack::block_bytes;
use super::{Acc, Format, K_BLOCK, Kernel, Packed, Sink, Tile};

/// Blocks of k between widenings. A block adds four steps to a 16-bit lane, a step at most `2 * 2 * 128 = 512` in
/// size, so after 16 blocks a lane is in `-64 * 512..=64 * 508`, which is `-32768..=32512`.
const WIDEN_EVERY: usize = 16;

/// Eight columns each.
const HALVES: usize = 2;

pub(super) struct Avx2;

/// The driver, compiled for AVX2.
///
/// # Safety
/// The CPU has these features; lengths are as `gemm::matmul` checks them.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn matmul(weights: &Packed, lhs: &[i8], m: usize, sink: &mut Sink<'_>) {
    super::drive::<Avx2>(weights, lhs, m, sink);
}

impl Kernel for Avx2 {
    const TILE_ROWS: usize = 4;
    const UNSIGNED_INT8: bool = false;

    unsafe fn dots(format: Format, rows: usize, tile: Tile<'_>, panel: &[u8], acc: &mut Acc) {
        // SAFETY: passed on to the caller.
        unsafe {
            match format {
                Format::Ternary => for_rows::<true>(rows, tile, panel, acc),
                Format::Int8 => for_rows::<false>(rows, tile, panel, acc),
            }
        }
    }
}

/// Turns `rows` into a constant, so that the accumulators are registers.
///
/// # Safety
/// As [`Kernel::dots`].
#[target_feature(enable = "avx2")]
unsafe fn for_rows<const TERNARY: bool>(rows: usize, tile: Tile<'_>, panel: &[u8], acc: &mut Acc) {
    match rows {
        1 => dots::<1, TERNARY>(tile, panel, acc),
        2 => dots::<2, TERNARY>(tile, panel, acc),
        3 => dots::<3, TERNARY>(tile, panel, acc),
        4 => dots::<4, TERNARY>(tile, panel, acc),
        _ => unreachable!("a tile has 1..=4 rows"),
    }
}

#[target_feature(enable = "avx2")]
fn dots<const ROWS: usize, const TERNARY: bool>(tile: Tile<'_>, panel: &[u8], acc: &mut Acc) {
    let block_bytes = block_bytes(if TERNARY { Format::Ternary } else { Format::Int8 });
    let full = tile.full_blocks();
    let blocks = full + usize::from(tile.has_tail());
    assert!(tile.lhs.len() >= ROWS * tile.cols);
    assert!(panel.len() >= block_bytes * blocks);
    let mut totals = [[_mm256_setzero_si256(); HALVES]; ROWS];
    let mut first = 0;
    while first < blocks {
        let last = blocks.min(first + WIDEN_EVERY);
        // 16-bit sums for ternary weights, 32-bit ones for int8.
        let mut sums = [[_mm256_setzero_si256(); HALVES]; ROWS];
        for block in first..last.min(full) {
            // SAFETY: `block < full`, so the panel holds this block, and every row at stride `cols` holds 16 bytes
            // from column `16 * block` (both asserted above).
            unsafe {
                accumulate::<ROWS, TERNARY>(
                    &mut sums,
                    panel.as_ptr().add(block * block_bytes),
                    tile.lhs.as_ptr().add(block * K_BLOCK),
                    tile.cols,
                );
            }
        }
        if last > full {
            // SAFETY: the panel holds the block after the full ones (asserted above); `tail` holds 16 rows of 16 bytes.
            unsafe {
                accumulate::<ROWS, TERNARY>(
                    &mut sums,
                    panel.as_ptr().add(full * block_bytes),
                    tile.tail.as_ptr().cast(),
                    K_BLOCK,
                );
            }
        }
        for r in 0..ROWS {
            for half in 0..HALVES {
                let wide = if TERNARY { _mm256_madd_epi16(sums[r][half], _mm256_set1_epi16(1)) } else { sums[r][half] };
                totals[r][half] = _mm256_add_epi32(totals[r][half], wide);
            }
        }
        first = last;
    }
    for r in 0..ROWS {
        for half in 0..HALVES {
            // SAFETY: a row of `acc` is 64 bytes, two halves of 32.
            unsafe { _mm256_storeu_si256(acc[r].as_mut_ptr().add(8 * half).cast(), totals[r][half]) };
        }
    }
}

/// Adds the products of one block of k.
///
/// # Safety
/// `weights` has the bytes of one block; `lhs` has 16 bytes in each of `ROWS` rows, `stride` apart.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn accumulate<const ROWS: usize, const TERNARY: bool>(
    sums: &mut [[__m256i; HALVES]; ROWS],
    weights: *const u8,
    lhs: *const i8,
    stride: usize,
) {
    // SAFETY: `offset` is 0 or 32 in the 64 bytes of a ternary block, below 256 - 32 in those of an int8 block.
    let load = |offset: usize| unsafe { _mm256_loadu_si256(weights.add(offset).cast()) };
    let mask = _mm256_set1_epi8(3);
    let mut packed = [load(0), load(32)];
    for i in 0..K_BLOCK / 4 {
        let w: [__m256i; HALVES] = if TERNARY {
            // Bits that a 16-bit shift drags in from the neighbouring byte fall outside the mask.
            let w = [_mm256_and_si256(packed[0], mask), _mm256_and_si256(packed[1], mask)];
            packed = [_mm256_srli_epi16::<2>(packed[0]), _mm256_srli_epi16::<2>(packed[1])];
            w
        } else {
            [load(64 * i), load(64 * i + 32)]
        };
        for r in 0..ROWS {
            // SAFETY: bytes 4 i..4 i + 4 of the 16 that row r has.
            let a = _mm256_set1_epi32(unsafe { lhs.add(r * stride + 4 * i).cast::<i32>().read_unaligned() });
            for half in 0..HALVES {
                sums[r][half] = if TERNARY {
                    _mm256_add_epi16(sums[r][half], _mm256_maddubs_epi16(w[half], a))
                } else {
                    let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(a), _mm256_sign_epi8(w[half], a));
                    _mm256_add_epi32(sums[r][half], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
                };
            }
        }
    }
}
