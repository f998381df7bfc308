//! `x86_64-depthwise-i8i32-avx2`: `a * w = |a| * (sign(a) w)` through `vpmaddubsw`, as in `kernels/gemm`: with
//! |w| <= 127 a pair of products is at most `2 * 128 * 127 = 32512`, below 32768, and is widened at once.

use std::arch::x86_64::{
    __m256i, _mm256_abs_epi8, _mm256_add_epi32, _mm256_loadu_si256, _mm256_madd_epi16, _mm256_maddubs_epi16,
    _mm256_set1_epi16, _mm256_sign_epi8, _mm256_storeu_si256,
};

use super::{Kernel, LANE_BYTES, LANES, Row};

/// Registers of [`LANES`] lanes.
const HALVES: usize = 2;

pub(super) struct Avx2;

/// The driver, compiled for AVX2.
///
/// # Safety
/// The CPU has these features.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn row(row: &Row<'_>, scratch: &mut [u8], out: &mut [i8]) {
    row.run::<Avx2>(scratch, out);
}

impl Kernel for Avx2 {
    const UNSIGNED: bool = false;

    unsafe fn dots(columns: &[u8], step: usize, weights: &[i8], start: &[i32; LANES], sums: &mut [[i32; LANES]]) {
        // SAFETY: passed on to the caller.
        unsafe { dots(columns, step, weights, start, sums) }
    }
}

/// Register `half` of the 16 lanes number `i` of `bytes`.
#[inline]
#[target_feature(enable = "avx2")]
fn load<T>(bytes: &[T], i: usize, half: usize) -> __m256i {
    const { assert!(size_of::<T>() == 1) };
    let lanes = &bytes[i * LANE_BYTES + 32 * half..][..32];
    // SAFETY: the slice has 32 bytes.
    unsafe { _mm256_loadu_si256(lanes.as_ptr().cast()) }
}

#[target_feature(enable = "avx2")]
fn dots(columns: &[u8], step: usize, weights: &[i8], start: &[i32; LANES], sums: &mut [[i32; LANES]]) {
    let ones = _mm256_set1_epi16(1);
    for (pixel, sums) in sums.iter_mut().enumerate() {
        let columns = &columns[pixel * step * LANE_BYTES..][..weights.len()];
        for half in 0..HALVES {
            // SAFETY: `start` has 64 bytes, two halves of 32.
            let mut sum = unsafe { _mm256_loadu_si256(start.as_ptr().add(8 * half).cast()) };
            for i in 0..weights.len() / LANE_BYTES {
                let (a, w) = (load(columns, i, half), load(weights, i, half));
                let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(a), _mm256_sign_epi8(w, a));
                sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, ones));
            }
            // SAFETY: `sums` has 64 bytes, two halves of 32.
            unsafe { _mm256_storeu_si256(sums.as_mut_ptr().add(8 * half).cast(), sum) };
        }
    }
}
