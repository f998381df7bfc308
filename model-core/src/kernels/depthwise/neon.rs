//! `aarch64-depthwise-i8i32-{neon,dotprod}`.
//!
//! - baseline (Cortex-A72): `smull` and `smlal` put two products into a 16-bit lane, `2 * 128 * 127 = 32512` at most,
//!   and `sadalp` widens pairs of lanes;
//! - dot product (Cortex-A76): `sdot` sums the four products of each channel. Its intrinsic is not stable in Rust.

use std::arch::aarch64::{
    int8x16_t, int32x4_t, vaddq_s32, vdupq_n_s8, vdupq_n_s32, vget_low_s8, vld1q_s8, vld1q_s32, vmlal_high_s8,
    vmlal_s8, vmull_high_s8, vmull_s8, vpadalq_s16, vpaddq_s32, vst1q_s32,
};
use std::arch::asm;

use super::{Kernel, LANE_BYTES, LANES, Row};

/// Registers of [`LANES`] lanes.
const QUADS: usize = 4;

/// Armv8.0.
pub(super) struct Neon;

/// With the dot product extension.
pub(super) struct NeonDot;

/// The driver for Armv8.0.
///
/// # Safety
/// The CPU has NEON.
#[target_feature(enable = "neon")]
pub(super) unsafe fn row(row: &Row<'_>, scratch: &mut [u8], out: &mut [i8]) {
    row.run::<Neon>(scratch, out);
}

/// The driver with dot products.
///
/// # Safety
/// The CPU has these features.
#[target_feature(enable = "neon,dotprod")]
pub(super) unsafe fn row_dot(row: &Row<'_>, scratch: &mut [u8], out: &mut [i8]) {
    row.run::<NeonDot>(scratch, out);
}

impl Kernel for Neon {
    const UNSIGNED: bool = false;

    unsafe fn dots(columns: &[u8], step: usize, weights: &[i8], start: &[i32; LANES], sums: &mut [[i32; LANES]]) {
        // SAFETY: passed on to the caller.
        unsafe { dots(columns, step, weights, start, sums) }
    }
}

impl Kernel for NeonDot {
    const UNSIGNED: bool = false;

    unsafe fn dots(columns: &[u8], step: usize, weights: &[i8], start: &[i32; LANES], sums: &mut [[i32; LANES]]) {
        // SAFETY: passed on to the caller.
        unsafe { dots_dot(columns, step, weights, start, sums) }
    }
}

/// Register `quad` of the 16 lanes number `i` of `bytes`.
#[inline]
#[target_feature(enable = "neon")]
fn load<T>(bytes: &[T], i: usize, quad: usize) -> int8x16_t {
    const { assert!(size_of::<T>() == 1) };
    let lanes = &bytes[i * LANE_BYTES + 16 * quad..][..16];
    // SAFETY: the slice has 16 bytes.
    unsafe { vld1q_s8(lanes.as_ptr().cast()) }
}

/// Register `quad` of `sums`.
#[inline]
#[target_feature(enable = "neon")]
fn load_sums(sums: &[i32; LANES], quad: usize) -> int32x4_t {
    let lanes = &sums[4 * quad..][..4];
    // SAFETY: the slice has four sums.
    unsafe { vld1q_s32(lanes.as_ptr()) }
}

#[inline]
#[target_feature(enable = "neon")]
fn store(sums: &mut [i32; LANES], quad: usize, v: int32x4_t) {
    let lanes = &mut sums[4 * quad..][..4];
    // SAFETY: the slice has four sums.
    unsafe { vst1q_s32(lanes.as_mut_ptr(), v) }
}

#[target_feature(enable = "neon")]
fn dots(columns: &[u8], step: usize, weights: &[i8], start: &[i32; LANES], sums: &mut [[i32; LANES]]) {
    let taps = weights.len() / LANE_BYTES;
    for (pixel, sums) in sums.iter_mut().enumerate() {
        let columns = &columns[pixel * step * LANE_BYTES..][..weights.len()];
        for quad in 0..QUADS {
            // Half a channel's sum in each 32-bit lane: channels 0 and 1, channels 2 and 3.
            let mut halves = [vdupq_n_s32(0); 2];
            for i in (0..taps).step_by(2) {
                let (a, w) = (load(columns, i, quad), load(weights, i, quad));
                let (b, v) = if i + 1 < taps {
                    (load(columns, i + 1, quad), load(weights, i + 1, quad))
                } else {
                    (vdupq_n_s8(0), vdupq_n_s8(0))
                };
                let low = vmlal_s8(vmull_s8(vget_low_s8(a), vget_low_s8(w)), vget_low_s8(b), vget_low_s8(v));
                let high = vmlal_high_s8(vmull_high_s8(a, w), b, v);
                halves = [vpadalq_s16(halves[0], low), vpadalq_s16(halves[1], high)];
            }
            store(sums, quad, vaddq_s32(load_sums(start, quad), vpaddq_s32(halves[0], halves[1])));
        }
    }
}

#[target_feature(enable = "neon,dotprod")]
fn dots_dot(columns: &[u8], step: usize, weights: &[i8], start: &[i32; LANES], sums: &mut [[i32; LANES]]) {
    for (pixel, sums) in sums.iter_mut().enumerate() {
        let columns = &columns[pixel * step * LANE_BYTES..][..weights.len()];
        let mut quads = [vdupq_n_s32(0); QUADS];
        for (quad, sum) in quads.iter_mut().enumerate() {
            *sum = load_sums(start, quad);
        }
        for i in 0..weights.len() / LANE_BYTES {
            for (quad, sum) in quads.iter_mut().enumerate() {
                *sum = sdot(*sum, load(columns, i, quad), load(weights, i, quad));
            }
        }
        for (quad, &sum) in quads.iter().enumerate() {
            store(sums, quad, sum);
        }
    }
}

/// `sum + a . w` in each 32-bit lane: `vdotq_s32`, whose intrinsic is not stable.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn sdot(mut sum: int32x4_t, a: int8x16_t, w: int8x16_t) -> int32x4_t {
    // SAFETY: the feature is enabled for this function; registers in, register out, no memory and no flags.
    unsafe {
        asm!(
            "sdot {sum:v}.4s, {a:v}.16b, {w:v}.16b",
            sum = inout(vreg) sum,
            a = in(vreg) a,
            w = in(vreg) w,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sum
}
