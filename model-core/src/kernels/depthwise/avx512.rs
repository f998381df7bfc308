//! `x86_64-depthwise-i8i32-vnni`: `vpdpbusd` sums the four products of unsigned codes and signed weights of
//! each of 16 channels.

use std::arch::x86_64::{
    __m128i, __m512i, _mm_loadu_si128, _mm_setr_epi8, _mm512_broadcast_i32x4, _mm512_castsi128_si512,
    _mm512_dpbusd_epi32, _mm512_inserti32x4, _mm512_loadu_si512, _mm512_permutexvar_epi32, _mm512_set1_epi8,
    _mm512_setr_epi32, _mm512_shuffle_epi8, _mm512_storeu_si512, _mm512_xor_si512,
};

use super::{GROUP, Kernel, LANE_BYTES, LANES, Line, Row};

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

    unsafe fn interleave(lines: &[Line<'_>; GROUP], columns: &mut [[u8; LANE_BYTES]], lanes: usize) {
        // SAFETY: passed on to the caller.
        unsafe { interleave(lines, columns, lanes) }
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

/// Four by four: the lanes of the four pixels, then the bytes of each lane.
#[target_feature(enable = "avx512f,avx512bw")]
fn interleave(lines: &[Line<'_>; GROUP], columns: &mut [[u8; LANE_BYTES]], lanes: usize) {
    // Pixels that have all of their codes in every line; the block's last ones may lack what belongs to no channel.
    let mut whole = columns.len().div_ceil(lanes);
    for line in lines {
        let last = line.codes.len().checked_sub(LANES);
        whole = whole.min(last.map_or(0, |last| last.checked_div(line.step).map_or(usize::MAX, |pixels| pixels + 1)));
    }
    let [mut a, mut b, mut c, mut d] = [0, 1, 2, 3].map(|i| lines[i].codes.as_ptr());
    for column in columns.iter_mut().step_by(lanes).take(whole) {
        // SAFETY: 16 codes from each pointer on are in its line, as `whole` counted.
        let pixels = unsafe { [load_pixel(a), load_pixel(b), load_pixel(c), load_pixel(d)] };
        join(pixels, column);
        a = a.wrapping_add(lines[0].step);
        b = b.wrapping_add(lines[1].step);
        c = c.wrapping_add(lines[2].step);
        d = d.wrapping_add(lines[3].step);
    }
    for (x, column) in columns.iter_mut().step_by(lanes).enumerate().skip(whole) {
        let pixels = [0, 1, 2, 3].map(|i| lines[i].pixel(x));
        // SAFETY: arrays of 16 bytes.
        let pixels = unsafe { [0, 1, 2, 3].map(|i| load_pixel(pixels[i].as_ptr())) };
        join(pixels, column);
    }
}

/// # Safety
/// `pixel` is valid for reading 16 bytes.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn load_pixel(pixel: *const i8) -> __m128i {
    // SAFETY: passed on to the caller.
    unsafe { _mm_loadu_si128(pixel.cast()) }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn join(pixels: [__m128i; GROUP], column: &mut [u8; LANE_BYTES]) {
    let order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    let bytes = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    let v = _mm512_inserti32x4::<1>(_mm512_castsi128_si512(pixels[0]), pixels[1]);
    let v = _mm512_inserti32x4::<3>(_mm512_inserti32x4::<2>(v, pixels[2]), pixels[3]);
    let v = _mm512_shuffle_epi8(_mm512_permutexvar_epi32(order, v), bytes);
    // SAFETY: an array of 64 bytes.
    unsafe { _mm512_storeu_si512(column.as_mut_ptr().cast(), _mm512_xor_si512(v, _mm512_set1_epi8(i8::MIN))) }
}
