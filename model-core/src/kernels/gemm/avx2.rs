//! `x86_64-{ternary,int8}-i8i32-avx2`: `vpmaddubsw` multiplies u8 by i8 and adds pairs into 16 bits, saturating; what
//! follows keeps every sum below saturation.
//!
//! - ternary: w + 1 is at most 2, so pairs are added up in 16 bits and widened every [`WIDEN_EVERY`] steps;
//! - int8: weights stay signed, and `a * w = |a| * (sign(a) w)`; with |w| <= 127 a pair is at most
//!   `2 * 128 * 127 = 32512`, below 32768, and is widened at once.

use std::arch::x86_64::{
    __m256i, _mm256_abs_epi8, _mm256_add_epi16, _mm256_add_epi32, _mm256_loadu_si256, _mm256_madd_epi16,
    _mm256_maddubs_epi16, _mm256_set1_epi16, _mm256_set1_epi32, _mm256_setzero_si256, _mm256_sign_epi8,
    _mm256_storeu_si256,
};

use super::{Acc, GROUP_BYTES, GROUPS, Kernel, PANEL, Packed, Sink, Tile};

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

    unsafe fn dots<const TERNARY: bool>(rows: usize, tile: Tile<'_>, weights: &[u8], acc: &mut Acc) {
        // SAFETY: passed on to the caller.
        unsafe { for_rows::<TERNARY>(rows, tile, weights, acc) };
    }
}

/// Turns `rows` into a constant, so that the accumulators are registers.
///
/// # Safety
#[target_feature(enable = "avx2")]
unsafe fn for_rows<const TERNARY: bool>(rows: usize, tile: Tile<'_>, weights: &[u8], acc: &mut Acc) {
    match rows {
        1 => dots::<1, TERNARY>(tile, weights, acc),
        2 => dots::<2, TERNARY>(tile, weights, acc),
        3 => dots::<3, TERNARY>(tile, weights, acc),
        4 => dots::<4, TERNARY>(tile, weights, acc),
        _ => unreachable!("a tile has 1..=4 rows"),
    }
}

/// One function with everything in it, so that `sums` are registers whatever the inliner thinks of the driver.
#[inline(never)]
#[target_feature(enable = "avx2")]
fn dots<const ROWS: usize, const TERNARY: bool>(tile: Tile<'_>, weights: &[u8], acc: &mut Acc) {
    tile.check(ROWS, weights, acc);
    let blocks = tile.blocks;
    let ones = _mm256_set1_epi16(1);
    if tile.first_block == 0 {
        acc[..ROWS].fill([0; PANEL]);
    }
    let mut first = 0;
    while first < blocks {
        let last = blocks.min(first + WIDEN_EVERY);
        // 16-bit sums for ternary weights, 32-bit ones for int8.
        let mut sums = [[_mm256_setzero_si256(); HALVES]; ROWS];
        for block in first..last {
            let (lhs, stride) = tile.lhs_block(block);
            for i in 0..GROUPS {
                // SAFETY: `weights` has the groups of `blocks` blocks (checked above), of two halves of 32 bytes each.
                let load = |half: usize| unsafe {
                    let at = (block * GROUPS + i) * GROUP_BYTES + 32 * half;
                    _mm256_loadu_si256(weights.as_ptr().add(at).cast())
                };
                let w: [__m256i; HALVES] = [load(0), load(1)];
                for r in 0..ROWS {
                    // SAFETY: `lhs_block` gives 16 bytes in each of `ROWS` rows (checked above); four of row r.
                    let a = unsafe { lhs.add(r * stride + 4 * i).cast::<i32>().read_unaligned() };
                    let a = _mm256_set1_epi32(a);
                    for half in 0..HALVES {
                        sums[r][half] = if TERNARY {
                            _mm256_add_epi16(sums[r][half], _mm256_maddubs_epi16(w[half], a))
                        } else {
                            let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(a), _mm256_sign_epi8(w[half], a));
                            _mm256_add_epi32(sums[r][half], _mm256_madd_epi16(pairs, ones))
                        };
                    }
                }
            }
        }
        for r in 0..ROWS {
            for half in 0..HALVES {
                let wide = if TERNARY { _mm256_madd_epi16(sums[r][half], ones) } else { sums[r][half] };
                // SAFETY: a row of `acc` is 64 bytes, two halves of 32, and there are `ROWS` (checked above).
                unsafe {
                    let total = acc[r].as_mut_ptr().add(8 * half).cast();
                    _mm256_storeu_si256(total, _mm256_add_epi32(_mm256_loadu_si256(total), wide));
                }
            }
        }
        first = last;
    }
}
