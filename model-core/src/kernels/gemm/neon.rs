//! `aarch64-{ternary,int8}-i8i32-{neon,dotprod}`.
//!
//! - baseline (Cortex-A72): `smlal` adds eight i8 products to 16-bit lanes. Ternary sums stay there for
//!   [`WIDEN_EVERY`] blocks; int8 sums take two products and are widened by `sadalp`;
//! - dot product (Cortex-A76): `sdot` sums four products into each 32-bit lane, with the activations taken by lane.
//!   Its intrinsics are not stable in Rust, so it is one line of `asm!`.
//!
//! Half a panel (eight columns) at a time, so that the accumulators of a tile fit 32 registers.

use std::arch::aarch64::{
    int8x16_t, int16x8_t, int32x4_t, vandq_u8, vdupq_n_s16, vdupq_n_s32, vdupq_n_u8, vget_low_s8, vld1q_s8, vld1q_u8,
    vmlal_high_s8, vmlal_s8, vmull_high_s8, vmull_s8, vpadalq_s16, vpaddq_s32, vreinterpretq_s8_s32,
    vreinterpretq_s8_u8, vshrq_n_u8, vst1q_s32,
};
use std::arch::asm;

use super::pack::block_bytes;
use super::{Acc, Format, K_BLOCK, Kernel, Packed, Sink, Tile};

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

    unsafe fn dots(format: Format, rows: usize, tile: Tile<'_>, panel: &[u8], acc: &mut Acc) {
        // SAFETY: passed on to the caller.
        unsafe {
            match (format, rows) {
                (Format::Ternary, 1) => dots::<1, true>(tile, panel, acc),
                (Format::Ternary, 2) => dots::<2, true>(tile, panel, acc),
                (Format::Ternary, 3) => dots::<3, true>(tile, panel, acc),
                (Format::Ternary, 4) => dots::<4, true>(tile, panel, acc),
                (Format::Int8, 1) => dots::<1, false>(tile, panel, acc),
                (Format::Int8, 2) => dots::<2, false>(tile, panel, acc),
                (Format::Int8, 3) => dots::<3, false>(tile, panel, acc),
                (Format::Int8, 4) => dots::<4, false>(tile, panel, acc),
                _ => unreachable!("a tile has 1..=4 rows"),
            }
        }
    }
}

impl Kernel for NeonDot {
    const TILE_ROWS: usize = 8;
    const UNSIGNED_INT8: bool = false;

    unsafe fn dots(format: Format, rows: usize, tile: Tile<'_>, panel: &[u8], acc: &mut Acc) {
        // SAFETY: passed on to the caller.
        unsafe {
            match format {
                Format::Ternary => for_rows_dot::<true>(rows, tile, panel, acc),
                Format::Int8 => for_rows_dot::<false>(rows, tile, panel, acc),
            }
        }
    }
}

/// Weights of four columns and four k, from group `i` (0..4) of a block: columns `4 quad..4 quad + 4`.
///
/// # Safety
/// `weights` has the bytes of one block, `quad` is below 4 and `i` below 4.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn load<const TERNARY: bool>(weights: *const u8, quad: usize, i: usize) -> int8x16_t {
    // SAFETY: a ternary block has 64 bytes, an int8 block 256; the caller bounds `quad` and `i`.
    unsafe {
        if TERNARY {
            let packed = vld1q_u8(weights.add(16 * quad));
            let shifted = match i {
                0 => packed,
                1 => vshrq_n_u8::<2>(packed),
                2 => vshrq_n_u8::<4>(packed),
                _ => vshrq_n_u8::<6>(packed),
            };
            vreinterpretq_s8_u8(vandq_u8(shifted, vdupq_n_u8(3)))
        } else {
            vld1q_s8(weights.add(64 * i + 16 * quad).cast())
        }
    }
}

/// One function with everything in it, so that the sums are registers whatever the inliner thinks of the driver.
#[inline(never)]
#[target_feature(enable = "neon")]
fn dots<const ROWS: usize, const TERNARY: bool>(tile: Tile<'_>, panel: &[u8], acc: &mut Acc) {
    let block_bytes = block_bytes(if TERNARY { Format::Ternary } else { Format::Int8 });
    let blocks = tile.blocks();
    assert!(tile.lhs.len() >= ROWS * tile.cols);
    assert!(panel.len() >= block_bytes * blocks);
    for half in 0..2 {
        // Two vectors for four columns: each 32-bit lane holds half of a column's sum.
        let mut totals = [[[vdupq_n_s32(0); 2]; QUADS]; ROWS];
        let mut first = 0;
        while first < blocks {
            let last = blocks.min(first + WIDEN_EVERY);
            let mut narrow = [[[vdupq_n_s16(0); 2]; QUADS]; ROWS];
            for block in first..last {
                // SAFETY: `block < blocks`, so the panel holds it (asserted above), and `lhs_block` has 16 bytes a row.
                unsafe {
                    let weights = panel.as_ptr().add(block * block_bytes);
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
                // SAFETY: a row of `acc` is 16 columns; this is the quad at `8 half + 4 quad`.
                unsafe { vst1q_s32(acc[r].as_mut_ptr().add(8 * half + 4 * quad), sum) };
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
/// `weights` has the 64 bytes of one block; `lhs` has 16 bytes in each of `ROWS` rows, `stride` apart; `half < 2`.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn accumulate_ternary<const ROWS: usize>(
    sums: &mut [[[int16x8_t; 2]; QUADS]; ROWS],
    weights: *const u8,
    half: usize,
    lhs: *const i8,
    stride: usize,
) {
    for i in 0..K_BLOCK / 4 {
        // SAFETY: `QUADS * half + quad < 4`, and `4 i + 4 <= 16`.
        unsafe {
            let w: [int8x16_t; QUADS] =
                [load::<true>(weights, QUADS * half, i), load::<true>(weights, QUADS * half + 1, i)];
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
                let w0 = load::<false>(weights, QUADS * half + quad, i);
                let w1 = load::<false>(weights, QUADS * half + quad, i + 1);
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
unsafe fn for_rows_dot<const TERNARY: bool>(rows: usize, tile: Tile<'_>, panel: &[u8], acc: &mut Acc) {
    match rows {
        1 => dots_dot::<1, TERNARY>(tile, panel, acc),
        2 => dots_dot::<2, TERNARY>(tile, panel, acc),
        3 => dots_dot::<3, TERNARY>(tile, panel, acc),
        4 => dots_dot::<4, TERNARY>(tile, panel, acc),
        5 => dots_dot::<5, TERNARY>(tile, panel, acc),
        6 => dots_dot::<6, TERNARY>(tile, panel, acc),
        7 => dots_dot::<7, TERNARY>(tile, panel, acc),
        8 => dots_dot::<8, TERNARY>(tile, panel, acc),
        _ => unreachable!("a tile has 1..=8 rows"),
    }
}

/// One function with everything in it, so that the sums are registers whatever the inliner thinks of the driver.
#[inline(never)]
#[target_feature(enable = "neon,dotprod")]
fn dots_dot<const ROWS: usize, const TERNARY: bool>(tile: Tile<'_>, panel: &[u8], acc: &mut Acc) {
    let block_bytes = block_bytes(if TERNARY { Format::Ternary } else { Format::Int8 });
    let blocks = tile.blocks();
    assert!(tile.lhs.len() >= ROWS * tile.cols);
    assert!(panel.len() >= block_bytes * blocks);
    for half in 0..2 {
        let mut sums = [[vdupq_n_s32(0); QUADS]; ROWS];
        for block in 0..blocks {
            // SAFETY: `block < blocks`, so the panel holds it (asserted above), and `lhs_block` has 16 bytes a row;
            // `QUADS * half + quad < 4`.
            unsafe {
                let weights = panel.as_ptr().add(block * block_bytes);
                let (lhs, stride) = tile.lhs_block(block);
                let w = |i| -> [int8x16_t; QUADS] {
                    [load::<TERNARY>(weights, QUADS * half, i), load::<TERNARY>(weights, QUADS * half + 1, i)]
                };
                let a: [int8x16_t; ROWS] = std::array::from_fn(|r| vld1q_s8(lhs.add(r * stride)));
                sdot_group::<ROWS, 0>(&mut sums, w(0), &a);
                sdot_group::<ROWS, 1>(&mut sums, w(1), &a);
                sdot_group::<ROWS, 2>(&mut sums, w(2), &a);
                sdot_group::<ROWS, 3>(&mut sums, w(3), &a);
            }
        }
        for r in 0..ROWS {
            for quad in 0..QUADS {
                // SAFETY: a row of `acc` is 16 columns; this is the quad at `8 half + 4 quad`.
                unsafe { vst1q_s32(acc[r].as_mut_ptr().add(8 * half + 4 * quad), sums[r][quad]) };
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
