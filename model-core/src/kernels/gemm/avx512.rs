//! `x86_64-{ternary,int8}-i8i32-vnni`: `vpdpbusd` sums four products of u8 weights and i8 activations into each of 16
//! 32-bit columns, without saturation.
//!
//! A tile is 16 rows: 16 accumulators, and a load of weights is shared by as many products. Activations are embedded
//! broadcasts, so they cost no instruction.

use std::arch::x86_64::{
    __m512i, _mm512_dpbusd_epi32, _mm512_loadu_si512, _mm512_maskz_loadu_epi8, _mm512_reduce_add_epi32,
    _mm512_set1_epi8, _mm512_set1_epi32, _mm512_setzero_si512, _mm512_storeu_si512,
};

use super::{Acc, GROUP_BYTES, GROUPS, Kernel, MAX_TILE_ROWS, Packed, Sink, Tile};

pub(super) struct Avx512;

/// The driver, compiled for AVX-512.
///
/// # Safety
/// The CPU has these features; lengths are as `gemm::matmul` checks them.
#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) unsafe fn matmul(weights: &Packed, lhs: &[i8], m: usize, sink: &mut Sink<'_>) {
    super::drive::<Avx512>(weights, lhs, m, sink);
}

impl Kernel for Avx512 {
    const TILE_ROWS: usize = MAX_TILE_ROWS;
    const UNSIGNED_INT8: bool = true;

    /// Ternary or not, weights are unsigned bytes.
    unsafe fn dots<const TERNARY: bool>(rows: usize, tile: Tile<'_>, weights: &[u8], acc: &mut Acc) {
        // SAFETY: passed on to the caller.
        unsafe { for_rows(rows, tile, weights, acc) };
    }

    #[inline(always)]
    unsafe fn sum(row: &[i8]) -> i32 {
        // SAFETY: passed on to the caller.
        unsafe { sum(row) }
    }
}

/// Turns `rows` into a constant, so that the accumulators are registers.
///
/// # Safety
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn for_rows(rows: usize, tile: Tile<'_>, weights: &[u8], acc: &mut Acc) {
    match rows {
        1 => dots::<1>(tile, weights, acc),
        2 => dots::<2>(tile, weights, acc),
        3 => dots::<3>(tile, weights, acc),
        4 => dots::<4>(tile, weights, acc),
        5 => dots::<5>(tile, weights, acc),
        6 => dots::<6>(tile, weights, acc),
        7 => dots::<7>(tile, weights, acc),
        8 => dots::<8>(tile, weights, acc),
        9 => dots::<9>(tile, weights, acc),
        10 => dots::<10>(tile, weights, acc),
        11 => dots::<11>(tile, weights, acc),
        12 => dots::<12>(tile, weights, acc),
        13 => dots::<13>(tile, weights, acc),
        14 => dots::<14>(tile, weights, acc),
        15 => dots::<15>(tile, weights, acc),
        16 => dots::<16>(tile, weights, acc),
        _ => unreachable!("a tile has 1..=16 rows"),
    }
}

/// One function with everything in it, so that `sums` are registers whatever the inliner thinks of the driver.
#[inline(never)]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn dots<const ROWS: usize>(tile: Tile<'_>, weights: &[u8], acc: &mut Acc) {
    tile.check(ROWS, weights, acc);
    let mut sums = [_mm512_setzero_si512(); ROWS];
    if tile.first_block > 0 {
        for r in 0..ROWS {
            // SAFETY: a row of `acc` is 64 bytes, and there are `ROWS` (checked above).
            sums[r] = unsafe { _mm512_loadu_si512(acc[r].as_ptr().cast()) };
        }
    }
    for block in 0..tile.blocks {
        let (lhs, stride) = tile.lhs_block(block);
        // SAFETY: `weights` has the groups of `blocks` blocks (checked above), of 64 bytes each.
        let load = |group: usize| unsafe {
            _mm512_loadu_si512(weights.as_ptr().add((block * GROUPS + group) * GROUP_BYTES).cast())
        };
        let w: [__m512i; GROUPS] = [load(0), load(1), load(2), load(3)];
        for r in 0..ROWS {
            for (i, &w) in w.iter().enumerate() {
                // SAFETY: `lhs_block` gives 16 bytes in each of `ROWS` rows (checked above); these are four of row r.
                let a = unsafe { lhs.add(r * stride + 4 * i).cast::<i32>().read_unaligned() };
                sums[r] = _mm512_dpbusd_epi32(sums[r], w, _mm512_set1_epi32(a));
            }
        }
    }
    for r in 0..ROWS {
        // SAFETY: a row of `acc` is 64 bytes, and there are `ROWS` (checked above).
        unsafe { _mm512_storeu_si512(acc[r].as_mut_ptr().cast(), sums[r]) };
    }
}

/// Products with ones: four codes an instruction and lane.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn sum(row: &[i8]) -> i32 {
    let ones = _mm512_set1_epi8(1);
    let (whole, rest) = row.as_chunks::<64>();
    let mut sums = _mm512_setzero_si512();
    for codes in whole {
        // SAFETY: an array of 64 bytes.
        sums = _mm512_dpbusd_epi32(sums, ones, unsafe { _mm512_loadu_si512(codes.as_ptr().cast()) });
    }
    // SAFETY: bytes that the mask leaves out are not read.
    let rest = unsafe { _mm512_maskz_loadu_epi8((1 << rest.len()) - 1, rest.as_ptr()) };
    _mm512_reduce_add_epi32(_mm512_dpbusd_epi32(sums, ones, rest))
}
