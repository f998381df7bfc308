//! `x86_64-{ternary,int8}-i8i32-vnni`: `vpdpbusd` sums four products of u8 weights and i8 activations into each of 16
//! 32-bit columns, without saturation.
//!
//! A tile is 16 rows: 16 accumulators, and unpacking two-bit weights (seven operations for four vectors) is shared by
//! 64 products. Activations are embedded broadcasts, so they cost no instruction.

use std::arch::x86_64::{
    __m512i, _mm512_and_si512, _mm512_dpbusd_epi32, _mm512_loadu_si512, _mm512_set1_epi8, _mm512_set1_epi32,
    _mm512_setzero_si512, _mm512_srli_epi16, _mm512_storeu_si512,
};

use super::pack::block_bytes;
use super::{Acc, Format, Kernel, MAX_TILE_ROWS, Packed, Sink, Tile};

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
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn for_rows<const TERNARY: bool>(rows: usize, tile: Tile<'_>, panel: &[u8], acc: &mut Acc) {
    match rows {
        1 => dots::<1, TERNARY>(tile, panel, acc),
        2 => dots::<2, TERNARY>(tile, panel, acc),
        3 => dots::<3, TERNARY>(tile, panel, acc),
        4 => dots::<4, TERNARY>(tile, panel, acc),
        5 => dots::<5, TERNARY>(tile, panel, acc),
        6 => dots::<6, TERNARY>(tile, panel, acc),
        7 => dots::<7, TERNARY>(tile, panel, acc),
        8 => dots::<8, TERNARY>(tile, panel, acc),
        9 => dots::<9, TERNARY>(tile, panel, acc),
        10 => dots::<10, TERNARY>(tile, panel, acc),
        11 => dots::<11, TERNARY>(tile, panel, acc),
        12 => dots::<12, TERNARY>(tile, panel, acc),
        13 => dots::<13, TERNARY>(tile, panel, acc),
        14 => dots::<14, TERNARY>(tile, panel, acc),
        15 => dots::<15, TERNARY>(tile, panel, acc),
        16 => dots::<16, TERNARY>(tile, panel, acc),
        _ => unreachable!("a tile has 1..=16 rows"),
    }
}

/// One function with everything in it, so that `sums` are registers whatever the inliner thinks of the driver.
#[inline(never)]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn dots<const ROWS: usize, const TERNARY: bool>(tile: Tile<'_>, panel: &[u8], acc: &mut Acc) {
    let block_bytes = block_bytes(if TERNARY { Format::Ternary } else { Format::Int8 });
    assert!(tile.lhs.len() >= ROWS * tile.cols);
    assert!(panel.len() >= block_bytes * tile.blocks());
    let mask = _mm512_set1_epi8(3);
    let mut sums = [_mm512_setzero_si512(); ROWS];
    for block in 0..tile.blocks() {
        let (lhs, stride) = tile.lhs_block(block);
        // SAFETY: the panel holds `blocks()` blocks (asserted above), so 64 bytes can be read at each offset below the
        // block's bytes.
        let load = |offset| unsafe { _mm512_loadu_si512(panel.as_ptr().add(block * block_bytes + offset).cast()) };
        let w: [__m512i; 4] = if TERNARY {
            let packed = load(0);
            // Bits that a 16-bit shift drags in from the neighbouring byte fall outside the mask.
            [
                _mm512_and_si512(packed, mask),
                _mm512_and_si512(_mm512_srli_epi16::<2>(packed), mask),
                _mm512_and_si512(_mm512_srli_epi16::<4>(packed), mask),
                _mm512_and_si512(_mm512_srli_epi16::<6>(packed), mask),
            ]
        } else {
            [load(0), load(64), load(128), load(192)]
        };
        for r in 0..ROWS {
            for (i, &w) in w.iter().enumerate() {
                // SAFETY: `lhs_block` gives 16 bytes in each of `ROWS` rows (asserted above); these are four of row r.
                let a = unsafe { lhs.add(r * stride + 4 * i).cast::<i32>().read_unaligned() };
                sums[r] = _mm512_dpbusd_epi32(sums[r], w, _mm512_set1_epi32(a));
            }
        }
    }
    for r in 0..ROWS {
        // SAFETY: a row of `acc` is 64 bytes.
        unsafe { _mm512_storeu_si512(acc[r].as_mut_ptr().cast(), sums[r]) };
    }
}
