//! `aarch64-{ternary,int8}-i8i32-{neon,dotprod}`.
//!
//! - baseline (Cortex-A72): `smlal` adds eight i8 products to 16-bit lanes. Ternary sums stay there for
//!   [`WIDEN_EVERY`] blocks; int8 sums take two products and are widened by `sadalp`;
//! - dot product (Cortex-A76): `sdot` sums four products into each 32-bit lane, with the activations taken by lane.
//!   Its intrinsics are not stable in Rust, so it is one line of `asm!`.
//!
//! Half a panel (eight columns) at a time, so that the accumulators of a tile fit 32 registers.

use std::arch::aarch64::{
    int8x16_t, int16x8_t, int32x4_t, vaddq_s32, vdupq_n_s16, vdupq_n_s32, vget_low_s8, vld1q_s8, vld1q_s32,
    vmlal_high_s8, vmlal_s8, vmull_high_s8, vmull_s8, vpadalq_s16, vpaddq_s32, vreinterpretq_s8_s32, vst1q_s32,
};
use std::arch::asm;

use super::{Acc, GROUP_BYTES, GROUPS, Kernel, Packed, Sink, Tile};

/// Blocks of k between widenings of ternary sums. A block adds four products to a 16-bit lane, each at most
/// `2 * 128 = 256` in size, so after 32 blocks a lane is in `-128 * 256..=128 * 254`, which is `-32768..=32512`.
const WIDEN_EVERY: usize = 32;

/// Vectors of four columns in half a panel.
const QUADS: usize = 2;

/// Armv8.0.
pub(super) struct Neon;

/// With the dot product extension.
pub(super) struct NeonDot;

/// The driver for Armv8.0.
///
/// # Safety
/// The CPU has NEON; lengths are as `gemm::matmul` checks them.
#[target_feature(enable = "neon")]
pub(super) unsafe fn matmul(weights: &Packed, lhs: &[i8], m: usize, sink: &mut Sink<'_>) {
    super::drive::<Neon>(weights, lhs, m, sink);
}

/// The driver with dot products.
///
/// # Safety
/// The CPU has these features; lengths are as `gemm::matmul` checks them.
#[target_feature(enable = "neon,dotprod")]
pub(super) unsafe fn matmul_dot(weights: &Packed, lhs: &[i8], m: usize, sink: &mut Sink<'_>) {
    super::drive::<NeonDot>(weights, lhs, m, sink);
}

impl Kernel for Neon {
    const TILE_ROWS: usize = 4;
    const UNSIGNED_INT8: bool = false;

    unsafe fn dots<const TERNARY: bool>(rows: usize, tile: Tile<'_>, weights: &[u8], acc: &mut Acc) {
        // SAFETY: passed on to the caller.
        unsafe {
            match rows {
                1 => dots::<1, TERNARY>(tile, weights, acc),
                2 => dots::<2, TERNARY>(tile, weights, acc),
                3 => dots::<3, TERNARY>(tile, weights, acc),
                4 => dots::<4, TERNARY>(tile, weights, acc),
                _ => unreachable!("a tile has 1..=4 rows"),
            }
        }
    }
}

impl Kernel for NeonDot {
    const TILE_ROWS: usize = 8;
    const UNSIGNED_INT8: bool = false;

    /// Ternary weights as w + 1 are signed bytes, too.
    unsafe fn dots<const TERNARY: bool>(rows: usize, tile: Tile<'_>, weights: &[u8], acc: &mut Acc) {
        // SAFETY: passed on to the caller.
        unsafe { for_rows_dot(rows, tile, weights, acc) };
    }
}

/// Weights of four columns and four k, from group `i` of a block: columns `4 quad..4 quad + 4`.
///
/// # Safety
/// `weights` has the bytes of one block; `quad` and `i` are below 4.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn load(weights: *const u8, quad: usize, i: usize) -> int8x16_t {
    // SAFETY: a block has four groups of four quads of 16 bytes; the caller bounds `quad` and `i`.
    unsafe { vld1q_s8(weights.add(GROUP_BYTES * i + 16 * quad).cast()) }
}

/// One function with everything in it, so that the sums are registers whatever the inliner thinks of the driver.
#[inline(never)]
#[target_feature(enable = "neon")]
fn dots<const ROWS: usize, const TERNARY: bool>(tile: Tile<'_>, weights: &[u8], acc: &mut Acc) {
    tile.check(ROWS, weights, acc);
    let blocks = tile.blocks;
    for half in 0..2 {
        // Two vectors for four columns: each 32-bit lane holds half of a column's sum.
        let mut totals = [[[vdupq_n_s32(0); 2]; QUADS]; ROWS];
        let mut first = 0;
        while first < blocks {
            let last = blocks.min(first + WIDEN_EVERY);
            let mut narrow = [[[vdupq_n_s16(0); 2]; QUADS]; ROWS];
            for block in first..last {
                // SAFETY: `block < blocks`, so that `weights` holds it (checked above), and `lhs_block` has 16 bytes a row.
                unsafe {
                    let weights = weights.as_ptr().add(block * GROUPS * GROUP_BYTES);
                    let (lhs, stride) = tile.lhs_block(block);
                    if TERNARY {
                        accumulate_ternary(&mut narrow, weights, half, lhs, stride);
                    } else {
                        accumulate_int8(&mut totals, weights, half, lhs, stride);
                    }
                }
            }
            if TERNARY {
                for r in 0..ROWS {
                    for quad in 0..QUADS {
                        for part in 0..2 {
                            totals[r][quad][part] = vpadalq_s16(totals[r][quad][part], narrow[r][quad][part]);
                        }
                    }
                }
            }
            first = last;
        }
        for r in 0..ROWS {
            for quad in 0..QUADS {
                let sum = vpaddq_s32(totals[r][quad][0], totals[r][quad][1]);
                // SAFETY: a row of `acc` is 16 columns, and there are `ROWS` (checked above); this is the quad at
                // `8 half + 4 quad`.
                unsafe {
                    let total = acc[r].as_mut_ptr().add(8 * half + 4 * quad);
                    let sum = if tile.first_block > 0 { vaddq_s32(vld1q_s32(total), sum) } else { sum };
                    vst1q_s32(total, sum);
                }
            }
        }
    }
}

/// Four activations of a row, in all four 32-bit lanes.
///
/// # Safety
/// `lhs` points to four bytes.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn broadcast(lhs: *const i8) -> int8x16_t {
    // SAFETY: as the caller promises.
    vreinterpretq_s8_s32(vdupq_n_s32(unsafe { lhs.cast::<i32>().read_unaligned() }))
}

/// Adds the products of one block of k with eight columns, in 16 bits.
///
/// # Safety
/// `weights` has the 256 bytes of one block; `lhs` has 16 bytes in each of `ROWS` rows, `stride` apart; `half < 2`.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn accumulate_ternary<const ROWS: usize>(
    sums: &mut [[[int16x8_t; 2]; QUADS]; ROWS],
    weights: *const u8,
    half: usize,
    lhs: *const i8,
    stride: usize,
) {
    for i in 0..GROUPS {
        // SAFETY: `QUADS * half + quad < 4`, and `4 i + 4 <= 16`.
        unsafe {
            let w: [int8x16_t; QUADS] = [load(weights, QUADS * half, i), load(weights, QUADS * half + 1, i)];
            for r in 0..ROWS {
                let a = broadcast(lhs.add(r * stride + 4 * i));
                for quad in 0..QUADS {
                    let [low, high] = sums[r][quad];
                    sums[r][quad] =
                        [vmlal_s8(low, vget_low_s8(w[quad]), vget_low_s8(a)), vmlal_high_s8(high, w[quad], a)];
                }
            }
        }
    }
}

/// Adds the products of one block of k with eight columns; two at a time fit 16 bits: `2 * 128 * 127 = 32512`.
///
/// # Safety
/// `weights` has the 256 bytes of one block; `lhs` has 16 bytes in each of `ROWS` rows, `stride` apart; `half < 2`.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn accumulate_int8<const ROWS: usize>(
    sums: &mut [[[int32x4_t; 2]; QUADS]; ROWS],
    weights: *const u8,
    half: usize,
    lhs: *const i8,
    stride: usize,
) {
    for i in [0, 2] {
        // SAFETY: `QUADS * half + quad < 4`, and `4 (i + 1) + 4 <= 16`.
        unsafe {
            for quad in 0..QUADS {
                let w0 = load(weights, QUADS * half + quad, i);
                let w1 = load(weights, QUADS * half + quad, i + 1);
                for r in 0..ROWS {
                    let a0 = broadcast(lhs.add(r * stride + 4 * i));
                    let a1 = broadcast(lhs.add(r * stride + 4 * i + 4));
                    let low = vmull_s8(vget_low_s8(w0), vget_low_s8(a0));
                    let high = vmull_high_s8(w0, a0);
                    let low = vmlal_s8(low, vget_low_s8(w1), vget_low_s8(a1));
                    let high = vmlal_high_s8(high, w1, a1);
                    let [total_low, total_high] = sums[r][quad];
                    sums[r][quad] = [vpadalq_s16(total_low, low), vpadalq_s16(total_high, high)];
                }
            }
        }
    }
}

/// Turns `rows` into a constant, so that the accumulators are registers.
///
/// # Safety
#[target_feature(enable = "neon,dotprod")]
unsafe fn for_rows_dot(rows: usize, tile: Tile<'_>, weights: &[u8], acc: &mut Acc) {
    match rows {
        1 => dots_dot::<1>(tile, weights, acc),
        2 => dots_dot::<2>(tile, weights, acc),
        3 => dots_dot::<3>(tile, weights, acc),
        4 => dots_dot::<4>(tile, weights, acc),
        5 => dots_dot::<5>(tile, weights, acc),
        6 => dots_dot::<6>(tile, weights, acc),
        7 => dots_dot::<7>(tile, weights, acc),
        8 => dots_dot::<8>(tile, weights, acc),
        _ => unreachable!("a tile has 1..=8 rows"),
    }
}

/// One function with everything in it, so that the sums are registers whatever the inliner thinks of the driver.
#[inline(never)]
#[target_feature(enable = "neon,dotprod")]
fn dots_dot<const ROWS: usize>(tile: Tile<'_>, weights: &[u8], acc: &mut Acc) {
    tile.check(ROWS, weights, acc);
    let blocks = tile.blocks;
    for half in 0..2 {
        let mut sums = [[vdupq_n_s32(0); QUADS]; ROWS];
        for block in 0..blocks {
            // SAFETY: `block < blocks`, so that `weights` holds it (checked above), and `lhs_block` has 16 bytes a row;
            // `QUADS * half + quad < 4`.
            unsafe {
                let weights = weights.as_ptr().add(block * GROUPS * GROUP_BYTES);
                let (lhs, stride) = tile.lhs_block(block);
                let w =
                    |i| -> [int8x16_t; QUADS] { [load(weights, QUADS * half, i), load(weights, QUADS * half + 1, i)] };
                let a: [int8x16_t; ROWS] = std::array::from_fn(|r| vld1q_s8(lhs.add(r * stride)));
                sdot_group::<ROWS, 0>(&mut sums, w(0), &a);
                sdot_group::<ROWS, 1>(&mut sums, w(1), &a);
                sdot_group::<ROWS, 2>(&mut sums, w(2), &a);
                sdot_group::<ROWS, 3>(&mut sums, w(3), &a);
            }
        }
        for r in 0..ROWS {
            for quad in 0..QUADS {
                // SAFETY: as above.
                unsafe {
                    let total = acc[r].as_mut_ptr().add(8 * half + 4 * quad);
                    let sum = sums[r][quad];
                    let sum = if tile.first_block > 0 { vaddq_s32(vld1q_s32(total), sum) } else { sum };
                    vst1q_s32(total, sum);
                }
            }
        }
    }
}

/// Adds the products of four k, number `I` of the block's four, with eight columns.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn sdot_group<const ROWS: usize, const I: usize>(
    sums: &mut [[int32x4_t; QUADS]; ROWS],
    w: [int8x16_t; QUADS],
    a: &[int8x16_t; ROWS],
) {
    for r in 0..ROWS {
        for quad in 0..QUADS {
            sums[r][quad] = sdot_lane::<I>(sums[r][quad], w[quad], a[r]);
        }
    }
}

/// `sum + w . a[4 I..4 I + 4]` in each 32-bit lane: `vdotq_laneq_s32`, whose intrinsic is not stable.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn sdot_lane<const I: usize>(mut sum: int32x4_t, w: int8x16_t, a: int8x16_t) -> int32x4_t {
    // SAFETY: the feature is enabled for this function; registers in, register out, no memory and no flags.
    unsafe {
        asm!(
            "sdot {sum:v}.4s, {w:v}.16b, {a:v}.4b[{i}]",
            sum = inout(vreg) sum,
            w = in(vreg) w,
            a = in(vreg) a,
            i = const I,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sum
}
