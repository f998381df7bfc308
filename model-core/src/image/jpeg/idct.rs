//! The inverse discrete cosine transform of an 8 x 8 block to 8 x 8, 4 x 4, 2 x 2 or 1 x 1 samples: the integer
//! algorithms of libjpeg ("slow", after Loeffler, Ligtenberg and Moschytz 1989), whose smaller results are the means of
//! squares of the larger. Arithmetic wraps: only broken files reach beyond 32 bits.

use std::ops::{Add, Mul, Shl, Sub};

use crate::kernels::vectorized;

/// Eight numbers, one of each column or each row of a block: all of them take the same steps, so that the compiler makes
/// vector instructions of the steps.
#[derive(Clone, Copy)]
struct Lanes([i32; 8]);

impl Add for Lanes {
    type Output = Self;

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        let mut sum = self.0;
        sum.iter_mut().zip(other.0).for_each(|(value, other)| *value = value.wrapping_add(other));
        Self(sum)
    }
}

impl Sub for Lanes {
    type Output = Self;

    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        let mut difference = self.0;
        difference.iter_mut().zip(other.0).for_each(|(value, other)| *value = value.wrapping_sub(other));
        Self(difference)
    }
}

impl Mul<i32> for Lanes {
    type Output = Self;

    #[inline(always)]
    fn mul(mut self, factor: i32) -> Self {
        self.0.iter_mut().for_each(|value| *value = value.wrapping_mul(factor));
        self
    }
}

impl Shl<usize> for Lanes {
    type Output = Self;

    #[inline(always)]
    fn shl(mut self, bits: usize) -> Self {
        self.0.iter_mut().for_each(|value| *value <<= bits);
        self
    }
}

impl Lanes {
    /// In units of `2^bits`, to the nearest.
    #[inline(always)]
    fn descale(mut self, bits: usize) -> Self {
        self.0.iter_mut().for_each(|value| *value = value.wrapping_add(1 << (bits - 1)) >> bits);
        self
    }
}

/// Fractional bits of constants.
const CONST_BITS: usize = 13;
/// Fractional bits kept between columns and rows.
const PASS1_BITS: usize = 2;

/// `value` in units of `2^-CONST_BITS`, to the nearest.
const fn fix(value: f64) -> i32 {
    (value * (1 << CONST_BITS) as f64 + 0.5) as i32
}

/// Samples are stored around 128.
#[inline(always)]
fn sample(value: i32) -> u8 {
    (value.clamp(-128, 127) + 128) as u8
}

/// Eight coefficients to eight values, with [`CONST_BITS`] more.
#[inline(always)]
fn eight(c: [Lanes; 8]) -> [Lanes; 8] {
    let z1 = (c[2] + c[6]) * fix(0.541_196_100);
    let (even2, even3) = (z1 - c[6] * fix(1.847_759_065), z1 + c[2] * fix(0.765_366_865));
    let (even0, even1) = ((c[0] + c[4]) << CONST_BITS, (c[0] - c[4]) << CONST_BITS);
    let even = [even0 + even3, even1 + even2, even1 - even2, even0 - even3];

    let z5 = (c[7] + c[3] + c[5] + c[1]) * fix(1.175_875_602);
    let z1 = (c[7] + c[1]) * -fix(0.899_976_223);
    let z2 = (c[5] + c[3]) * -fix(2.562_915_447);
    let z3 = (c[7] + c[3]) * -fix(1.961_570_560) + z5;
    let z4 = (c[5] + c[1]) * -fix(0.390_180_644) + z5;
    let odd = [
        c[1] * fix(1.501_321_110) + z1 + z4,
        c[3] * fix(3.072_711_026) + z2 + z3,
        c[5] * fix(2.053_119_869) + z2 + z4,
        c[7] * fix(0.298_631_336) + z1 + z3,
    ];
    let (sum, difference) = (|i: usize| even[i] + odd[i], |i: usize| even[i] - odd[i]);
    [sum(0), sum(1), sum(2), sum(3), difference(3), difference(2), difference(1), difference(0)]
}

/// Eight coefficients to the means of four pairs of values, with `CONST_BITS + 1` bits more.
#[inline(always)]
fn four(c: [Lanes; 8]) -> [Lanes; 4] {
    let even0 = c[0] << (CONST_BITS + 1);
    let even2 = c[2] * fix(1.847_759_065) - c[6] * fix(0.765_366_865);
    let odd0 =
        c[5] * fix(1.451_774_981) - c[7] * fix(0.211_164_243) - c[3] * fix(2.172_734_803) + c[1] * fix(1.061_594_337);
    let odd2 =
        c[3] * fix(0.899_976_223) - c[7] * fix(0.509_795_579) - c[5] * fix(0.601_344_887) + c[1] * fix(2.562_915_447);
    let (outer, inner) = (even0 + even2, even0 - even2);
    [outer + odd2, inner + odd0, inner - odd0, outer - odd2]
}

/// Eight coefficients to the means of both halves, with `CONST_BITS + 2` bits more.
#[inline(always)]
fn two(c: [Lanes; 8]) -> [Lanes; 2] {
    let even = c[0] << (CONST_BITS + 2);
    let odd =
        c[5] * fix(0.850_430_095) - c[7] * fix(0.720_959_822) - c[3] * fix(1.272_758_580) + c[1] * fix(3.624_509_785);
    [even + odd, even - odd]
}

/// A block of coefficients and what each is multiplied by, row after row.
type Quantised<'a> = (&'a [i16; 64], &'a [u16; 64]);

/// A block to `N` x `N` samples that are written to rows of `out`, `stride` apart: the columns first, then the rows.
#[inline(always)]
fn transform<const N: usize>(
    (coefficients, quantization): Quantised<'_>,
    one: impl Fn([Lanes; 8]) -> [Lanes; N],
    extra: usize,
    (out, stride): (&mut [u8], usize),
) {
    let mut rows = [Lanes([0; 8]); 8];
    for (y, row) in rows.iter_mut().enumerate() {
        for (x, value) in row.0.iter_mut().enumerate() {
            *value = i32::from(coefficients[8 * y + x]).wrapping_mul(i32::from(quantization[8 * y + x]));
        }
    }
    let rows = one(rows);
    let mut columns = [Lanes([0; 8]); 8];
    for (y, row) in rows.into_iter().enumerate() {
        let row = row.descale(CONST_BITS - PASS1_BITS + extra);
        for (column, value) in columns.iter_mut().zip(row.0) {
            column.0[y] = value;
        }
    }
    let columns = one(columns);
    let mut samples = [[0; N]; N];
    for (x, column) in columns.into_iter().enumerate() {
        let column = column.descale(CONST_BITS + PASS1_BITS + 3 + extra);
        for (row, value) in samples.iter_mut().zip(column.0) {
            row[x] = sample(value);
        }
    }
    for (y, row) in samples.iter().enumerate() {
        out[y * stride..][..N].copy_from_slice(row);
    }
}

/// A block of quantised coefficients, row after row, to `size` x `size` samples; `size` is 1, 2, 4 or 8.
#[expect(
    clippy::redundant_closure,
    reason = "a function by its name is called, not inlined, and calls have no vectors"
)]
pub(super) fn block(coefficients: &[i16; 64], quantization: &[u16; 64], size: usize, out: &mut [u8], stride: usize) {
    let is_flat = coefficients[1..].iter().fold(0, |any, &c| any | c) == 0;
    if size == 1 || is_flat {
        let mean = i32::from(coefficients[0]).wrapping_mul(i32::from(quantization[0]));
        let sample = sample(mean.wrapping_add(4) >> 3);
        (0..size).for_each(|y| out[y * stride..][..size].fill(sample));
        return;
    }
    let (quantised, out) = ((coefficients, quantization), (out, stride));
    match size {
        2 => vectorized(
            #[inline(always)]
            || {
                transform(
                    quantised,
                    #[inline(always)]
                    |c| two(c),
                    2,
                    out,
                )
            },
        ),
        4 => vectorized(
            #[inline(always)]
            || {
                transform(
                    quantised,
                    #[inline(always)]
                    |c| four(c),
                    1,
                    out,
                )
            },
        ),
        _ => vectorized(
            #[inline(always)]
            || {
                transform(
                    quantised,
                    #[inline(always)]
                    |c| eight(c),
                    0,
                    out,
                )
            },
        ),
    }
}

/// Whether a block of so many samples depends on the coefficient in this row and column.
pub(super) fn needs(size: usize, (row, column): (usize, usize)) -> bool {
    let needs = |index: usize| match size {
        1 => index == 0,
        2 => index == 0 || index % 2 == 1,
        4 => index != 4,
        _ => true,
    };
    needs(row) && needs(column)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::SplitMix64;

    /// T.81, A.3.3, in floating point, and the means of squares of it.
    fn definition(coefficients: &[i16; 64], size: usize) -> Vec<f64> {
        let c = |k: usize| if k == 0 { 0.5f64.sqrt() } else { 1.0 };
        let cosine = |x: usize, u: usize| ((2 * x + 1) as f64 * u as f64 * std::f64::consts::PI / 16.0).cos();
        let whole = |x: usize, y: usize| -> f64 {
            let term =
                |i: usize| c(i / 8) * c(i % 8) * f64::from(coefficients[i]) * cosine(x, i % 8) * cosine(y, i / 8);
            (0..64).map(term).sum::<f64>() / 4.0 + 128.0
        };
        let n = 8 / size;
        let mean = |i: usize| {
            let pixels = (0..n * n).map(|k| whole(i % size * n + k % n, i / size * n + k / n));
            pixels.sum::<f64>() / (n * n) as f64
        };
        (0..size * size).map(mean).collect()
    }

    #[test]
    fn each_size_is_the_mean_of_the_whole() {
        let mut numbers = SplitMix64::at(1, 0);
        let mut random = |range: i16| (numbers.bits() % (2 * range as u64 + 1)) as i16 - range;
        for _ in 0..200 {
            let coefficients: [i16; 64] = std::array::from_fn(|i| if i == 0 { random(400) } else { random(60) });
            for size in [1, 2, 4, 8] {
                let mut out = vec![0; size * size];
                block(&coefficients, &[1; 64], size, &mut out, size);
                for (&got, exact) in out.iter().zip(definition(&coefficients, size)) {
                    // Half a step of the last rounding. Those between the passes are an eighth of a step of eight times
                    // the result, and a row adds up 1 + 7 * 1.42 of them: 0.17. A coefficient meets four constants in
                    // each pass, which are off by 2^-14 and weigh 1.42, again of eight times the result, and all
                    // coefficients together are at most 400 + 63 * 60: 0.36. Sums of both make 1.03.
                    let apart = (f64::from(got) - exact.clamp(0.0, 255.0)).abs();
                    assert!(apart <= 1.03, "{size}: {got} for {exact}");
                }
            }
        }
    }

    #[test]
    fn coefficients_that_are_not_needed_change_nothing() {
        for size in [1, 2, 4, 8] {
            for i in (0..64).filter(|&i| !needs(size, (i / 8, i % 8))) {
                let mut coefficients = [0; 64];
                coefficients[i] = 700;
                let mut out = vec![0; size * size];
                block(&coefficients, &[1; 64], size, &mut out, size);
                assert!(out.iter().all(|&sample| sample == 128), "{size}, {i}");
            }
        }
    }
}
