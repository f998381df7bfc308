//! `x86_64-depthwise-i8i32-vnni`: `vpdpbusd` sums the four products of unsigned codes and signed weights of
//! each of 16 channels.

use std::arch::x86_64::{__m512i, _mm512_dpbusd_epi32, _mm512_loadu_si512, _mm512_storeu_si512};

use super::{Kernel, LANE_BYTES, LANES, Row};

pub(super) struct Avx512;

/// The driver, compiled for AVX-512.
///
/// # Safety
/// The CPU has these features.
#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) unsafe fn row(row: &Row<'_>, scratch: &mut [u8], out: &mut [i8]) {
    row.run::<Avx512>(scratch, out);
}

impl Kernel for Avx512 {
    const UNSIGNED: bool = true;

    unsafe fn dots(columns: &[u8], step: usize, weights: &[i8], start: &[i32; LANES], sums: &mut [[i32; LANES]]) {
        // SAFETY: passed on to the caller.
        unsafe {
            match weights.len() / LANE_BYTES {
                3 => dots::<3>(columns, step, weights, start, sums),
                10 => dots::<10>(columns, step, weights, start, sums),
                _ => any_dots(columns, step, weights, start, sums),
            }
        }
    }
}

/// The 16 lanes number `i` of `bytes`.
#[inline]
#[target_feature(enable = "avx512f")]
fn load<T>(bytes: &[T], i: usize) -> __m512i {
    const { assert!(size_of::<T>() == 1) };
    let lanes = &bytes[i * LANE_BYTES..][..LANE_BYTES];
    // SAFETY: the slice has 64 bytes.
    unsafe { _mm512_loadu_si512(lanes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load_sums(sums: &[i32; LANES]) -> __m512i {
    // SAFETY: an array of 64 bytes.
    unsafe { _mm512_loadu_si512(sums.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store(sums: &mut [i32; LANES], v: __m512i) {
    // SAFETY: an array of 64 bytes.
    unsafe { _mm512_storeu_si512(sums.as_mut_ptr().cast(), v) }
}

/// With the weights of 3x3 and 5x5 windows in registers.
#[target_feature(enable = "avx512f,avx512vnni")]
fn dots<const TAPS: usize>(
    columns: &[u8],
    step: usize,
    weights: &[i8],
    start: &[i32; LANES],
    sums: &mut [[i32; LANES]],
) {
    let mut w = [load_sums(start); TAPS];
    for (i, w) in w.iter_mut().enumerate() {
        *w = load(weights, i);
    }
    let start = load_sums(start);
    for (pixel, sums) in sums.iter_mut().enumerate() {
        let columns = &columns[pixel * step * LANE_BYTES..][..TAPS * LANE_BYTES];
        let mut sum = start;
        for (i, &w) in w.iter().enumerate() {
            sum = _mm512_dpbusd_epi32(sum, load(columns, i), w);
        }
        store(sums, sum);
    }
}

#[target_feature(enable = "avx512f,avx512vnni")]
fn any_dots(columns: &[u8], step: usize, weights: &[i8], start: &[i32; LANES], sums: &mut [[i32; LANES]]) {
    for (pixel, sums) in sums.iter_mut().enumerate() {
        let columns = &columns[pixel * step * LANE_BYTES..][..weights.len()];
        let mut sum = load_sums(start);
        for i in 0..weights.len() / LANE_BYTES {
            sum = _mm512_dpbusd_epi32(sum, load(columns, i), load(weights, i));
        }
        store(sums, sum);
    }
}
