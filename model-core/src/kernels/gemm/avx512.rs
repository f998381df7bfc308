//! `x86_64-{ternary,int8}-i8i32-vnni`: `vpdpbusd` sums four products of u8 weights and i8 activations into each of 16
//! 32-bit columns, without saturation.
//!
//! A tile is 16 rows: 16 accumulators, and a load of weights is shared by as many products. Activations are embedded
//! broadcasts, so they cost no instruction.

use std::arch::x86_64::{
    __m512i, _mm512_add_ps, _mm512_and_si512, _mm512_cvtepi32_ps, _mm512_dpbusd_epi32, _mm512_loadu_ps,
    _mm512_loadu_si512, _mm512_maskz_loadu_epi8, _mm512_mul_ps, _mm512_reduce_add_epi32, _mm512_set1_epi8,
    _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_ps, _mm512_setzero_si512, _mm512_srli_epi16, _mm512_storeu_ps,
    _mm512_storeu_si512,
};

use super::{Acc, GROUP_BYTES, GROUPS, Kernel, MAX_TILE_ROWS, Packed, Scaled, Sink, Tile};

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
    const SCALES: bool = true;

    /// Ternary or not, weights are unsigned bytes.
    unsafe fn dots<const TERNARY: bool>(rows: usize, tile: Tile<'_>, weights: &[u8], acc: &mut Acc) {
        // SAFETY: passed on to the caller.
        unsafe { for_rows(rows, tile, weights, acc) };
    }

    #[inline(always)]
    unsafe fn scaled_dots(rows: usize, tile: Tile<'_>, weights: &[u8], scaled: &mut Scaled<'_>) {
        // SAFETY: passed on to the caller.
        unsafe { for_rows_scaled(rows, tile, weights, scaled) };
    }

    #[inline(always)]
    unsafe fn scaled_dots_of_two_bits(rows: usize, tile: Tile<'_>, packed: &[u8], scaled: &mut Scaled<'_>) {
        // SAFETY: passed on to the caller.
        unsafe { for_rows_scaled_two_bits(rows, tile, packed, scaled) };
    }

    #[inline(always)]
    unsafe fn sum(row: &[i8]) -> i32 {
        // SAFETY: passed on to the caller.
        unsafe { sum(row) }
    }
}

/// Makes a function that turns `rows` into a constant, so that the accumulators are registers.
macro_rules! for_rows {
    ($name:ident, $dots:ident, [$($two_bits:literal)?], $out:ty) => {
        /// # Safety
        /// The CPU has these features.
        #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
        unsafe fn $name(rows: usize, tile: Tile<'_>, weights: &[u8], out: $out) {
            match rows {
                1 => $dots::<1 $(, $two_bits)?>(tile, weights, out),
                2 => $dots::<2 $(, $two_bits)?>(tile, weights, out),
                3 => $dots::<3 $(, $two_bits)?>(tile, weights, out),
                4 => $dots::<4 $(, $two_bits)?>(tile, weights, out),
                5 => $dots::<5 $(, $two_bits)?>(tile, weights, out),
                6 => $dots::<6 $(, $two_bits)?>(tile, weights, out),
                7 => $dots::<7 $(, $two_bits)?>(tile, weights, out),
                8 => $dots::<8 $(, $two_bits)?>(tile, weights, out),
                9 => $dots::<9 $(, $two_bits)?>(tile, weights, out),
                10 => $dots::<10 $(, $two_bits)?>(tile, weights, out),
                11 => $dots::<11 $(, $two_bits)?>(tile, weights, out),
                12 => $dots::<12 $(, $two_bits)?>(tile, weights, out),
                13 => $dots::<13 $(, $two_bits)?>(tile, weights, out),
                14 => $dots::<14 $(, $two_bits)?>(tile, weights, out),
                15 => $dots::<15 $(, $two_bits)?>(tile, weights, out),
                16 => $dots::<16 $(, $two_bits)?>(tile, weights, out),
                _ => unreachable!("a tile has 1..=16 rows"),
            }
        }
    };
}

for_rows!(for_rows, dots, [], &mut Acc);
for_rows!(for_rows_scaled, scaled_dots, [false], &mut Scaled<'_>);
for_rows!(for_rows_scaled_two_bits, scaled_dots, [true], &mut Scaled<'_>);

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
    // SAFETY: this function has the features; checked above.
    unsafe { add_dots::<ROWS, false>(tile, weights, &mut sums) };
    for r in 0..ROWS {
        // SAFETY: a row of `acc` is 64 bytes, and there are `ROWS` (checked above).
        unsafe { _mm512_storeu_si512(acc[r].as_mut_ptr().cast(), sums[r]) };
    }
}

/// The same for all of k, with the sums scaled on their way from registers to the output.
#[inline(never)]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn scaled_dots<const ROWS: usize, const TWO_BITS: bool>(tile: Tile<'_>, weights: &[u8], scaled: &mut Scaled<'_>) {
    tile.check_reads(ROWS, weights, if TWO_BITS { 4 } else { 1 });
    scaled.check(ROWS);
    let mut sums = [_mm512_setzero_si512(); ROWS];
    for r in 0..ROWS {
        // Sums wrap, so that what is to be subtracted may come first.
        sums[r] = _mm512_set1_epi32(-scaled.corrections[r]);
    }
    // SAFETY: this function has the features; checked above.
    unsafe { add_dots::<ROWS, TWO_BITS>(tile, weights, &mut sums) };
    // SAFETY: an array of sixteen floats.
    let scale = unsafe { _mm512_loadu_ps(scaled.scale.as_ptr()) };
    let (out, stride) = (scaled.out.as_mut_ptr(), scaled.stride);
    let steps = scaled.steps.as_ptr();
    let mut products = [_mm512_setzero_ps(); ROWS];
    for r in 0..ROWS {
        // SAFETY: there are `ROWS` steps (checked above).
        let step = _mm512_set1_ps(unsafe { *steps.add(r) });
        products[r] = _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(sums[r]), step), scale);
    }
    if let Some(bias) = scaled.bias {
        // SAFETY: an array of sixteen floats.
        let bias = unsafe { _mm512_loadu_ps(bias.as_ptr()) };
        for r in 0..ROWS {
            products[r] = _mm512_add_ps(products[r], bias);
        }
    }
    for r in 0..ROWS {
        // SAFETY: `out` has sixteen floats in each of `ROWS` rows (checked above).
        unsafe { _mm512_storeu_ps(out.add(r * stride), products[r]) };
    }
}

/// Adds the products of a tile, whose weights are bytes or `TWO_BITS`.
///
/// # Safety
/// The CPU has the kernel's features, and `tile` and `weights` were checked for `ROWS` rows.
#[inline(always)]
unsafe fn add_dots<const ROWS: usize, const TWO_BITS: bool>(
    tile: Tile<'_>,
    weights: &[u8],
    sums: &mut [__m512i; ROWS],
) {
    for block in 0..tile.blocks {
        let (lhs, stride) = tile.lhs_block(block);
        // SAFETY: the caller vouches for the features, and `weights` has the groups of `blocks` blocks, of 64 bytes each,
        // or 64 bytes for all groups of a block.
        let w = unsafe {
            match TWO_BITS {
                true => two_bits(weights.as_ptr().add(block * GROUP_BYTES)),
                false => bytes(weights.as_ptr().add(block * GROUPS * GROUP_BYTES)),
            }
        };
        for r in 0..ROWS {
            for (i, &w) in w.iter().enumerate() {
                // SAFETY: the caller vouches for the features, and `lhs_block` gives 16 bytes in each of `ROWS` rows; these
                // are four of row r.
                sums[r] = unsafe {
                    let a = lhs.add(r * stride + 4 * i).cast::<i32>().read_unaligned();
                    _mm512_dpbusd_epi32(sums[r], w, _mm512_set1_epi32(a))
                };
            }
        }
    }
}

/// The groups of a block.
///
/// # Safety
/// `weights` is valid for them, 64 bytes each.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn bytes(weights: *const u8) -> [__m512i; GROUPS] {
    // SAFETY: passed on to the caller.
    let load = |group: usize| unsafe { _mm512_loadu_si512(weights.add(group * GROUP_BYTES).cast()) };
    [load(0), load(1), load(2), load(3)]
}

/// The groups of a block, two bits a weight: what `pack::unpack_groups` writes.
///
/// # Safety
/// `packed` is valid for 64 bytes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn two_bits(packed: *const u8) -> [__m512i; GROUPS] {
    // SAFETY: passed on to the caller.
    let packed = unsafe { _mm512_loadu_si512(packed.cast()) };
    // Bits that cross from one byte of a lane to the other are masked.
    let mask = _mm512_set1_epi8(3);
    let group = |shifted: __m512i| _mm512_and_si512(shifted, mask);
    [
        group(packed),
        group(_mm512_srli_epi16::<2>(packed)),
        group(_mm512_srli_epi16::<4>(packed)),
        group(_mm512_srli_epi16::<6>(packed)),
    ]
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
