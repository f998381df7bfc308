//! Vectors of f32 for kernels that are the same on every instruction set: written once over [`Simd`], compiled once
//! per instruction set by [`dispatch`].
//!
//! A [`Simd`] value is a token like [`Isa`]: it exists only inside the `#[target_feature]` functions of [`dispatch`],
//! so its methods may use the instructions. Everything below them must be `#[inline(always)]`, or it would be
//! compiled without those instructions.
//!
//! On Arm the portable vector is the NEON one: NEON is part of the baseline there, and the compiler turns arrays of
//! four floats into its registers.

use super::isa::Isa;
#[cfg(target_arch = "x86_64")]
use super::isa::Kind;

/// Vector operations of one instruction set, holding only what the kernels use.
pub(super) trait Simd: Copy {
    type V: Copy;
    /// Floats in a vector; a power of two, at most [`MAX_LANES`].
    const LANES: usize;

    fn splat(self, value: f32) -> Self::V;
    /// # Safety
    /// `from` is valid for reading [`Simd::LANES`] floats.
    unsafe fn load_ptr(self, from: *const f32) -> Self::V;
    /// # Safety
    /// `to` is valid for writing [`Simd::LANES`] floats.
    unsafe fn store_ptr(self, to: *mut f32, v: Self::V);
    /// # Safety
    /// `from` is valid for reading [`Simd::LANES`] values.
    unsafe fn load_i16_ptr(self, from: *const i16) -> Self::V;

    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`, fused where the hardware does.
    fn mul_add(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// `c - a * b`, fused where the hardware does.
    fn neg_mul_add(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    fn abs(self, a: Self::V) -> Self::V;
    /// `a * 2^n` for `n` given as `shifted = n + 1.5 * 2^23`, whose lowest bits are the integer n. Both `a` and the
    /// product must be normal.
    fn mul_pow2(self, a: Self::V, shifted: Self::V) -> Self::V;

    /// Whether [`Simd::look_up`] is one instruction.
    const LOOKS_UP: bool = false;

    /// Elements of `table`, each chosen by the lowest four bits of a float's pattern.
    #[inline(always)]
    fn look_up(self, table: &[f32; 16], indices: Self::V) -> Self::V {
        let mut lanes = self.to_array(indices, 0.0);
        for lane in &mut lanes {
            *lane = table[(lane.to_bits() & 15) as usize];
        }
        self.load(&lanes)
    }

    /// Cosines and sines of the first [`Simd::LANES`] of `codes`, by whatever way of reading `turn` is fastest.
    ///
    /// # Safety
    /// `codes` is valid for reading [`Simd::LANES`] bytes.
    unsafe fn cos_sin_ptr(self, turn: &Turn, codes: *const u8) -> (Self::V, Self::V);

    /// Writes the transpose of [`BLOCK`] rows of as many floats, whose rows are `stride` and `to_stride` apart.
    ///
    /// # Safety
    /// `from` is valid for reading those rows, and `to` for writing as many.
    #[inline(always)]
    unsafe fn transpose_ptr(self, from: *const f32, stride: usize, to: *mut f32, to_stride: usize) {
        for j in 0..BLOCK {
            for i in 0..BLOCK {
                // SAFETY: row i of the one and row j of the other, for which the caller vouches.
                unsafe { *to.add(j * to_stride + i) = *from.add(i * stride + j) };
            }
        }
    }

    /// The first [`Simd::LANES`] floats of `from`.
    #[inline(always)]
    fn load(self, from: &[f32]) -> Self::V {
        assert!(from.len() >= Self::LANES);
        // SAFETY: the slice has LANES floats.
        unsafe { self.load_ptr(from.as_ptr()) }
    }

    /// Writes the first [`Simd::LANES`] floats of `to`.
    #[inline(always)]
    fn store(self, to: &mut [f32], v: Self::V) {
        assert!(to.len() >= Self::LANES);
        // SAFETY: the slice has LANES floats.
        unsafe { self.store_ptr(to.as_mut_ptr(), v) }
    }

    /// The first [`Simd::LANES`] values of `from`, as floats.
    #[inline(always)]
    fn load_i16(self, from: &[i16]) -> Self::V {
        assert!(from.len() >= Self::LANES);
        // SAFETY: the slice has LANES values.
        unsafe { self.load_i16_ptr(from.as_ptr()) }
    }

    /// Cosines and sines of the first [`Simd::LANES`] of `codes`.
    #[inline(always)]
    fn cos_sin(self, turn: &Turn, codes: &[u8]) -> (Self::V, Self::V) {
        assert!(codes.len() >= Self::LANES);
        // SAFETY: the slice has LANES codes.
        unsafe { self.cos_sin_ptr(turn, codes.as_ptr()) }
    }

    /// `v` as an array; lanes past [`Simd::LANES`] are `fill`.
    #[inline(always)]
    fn to_array(self, v: Self::V, fill: f32) -> [f32; MAX_LANES] {
        let mut lanes = [fill; MAX_LANES];
        self.store(&mut lanes, v);
        lanes
    }

    /// The sum of the lanes, in lane order.
    #[inline(always)]
    fn sum(self, v: Self::V) -> f32 {
        self.to_array(v, 0.0)[..Self::LANES].iter().sum()
    }

    /// The largest lane, where all are numbers.
    #[inline(always)]
    fn max_lane(self, v: Self::V) -> f32 {
        self.to_array(v, f32::NEG_INFINITY).iter().copied().fold(f32::NEG_INFINITY, f32::max)
    }

    /// `x <- f(x)` elementwise; a tail shorter than a vector is padded with zeros.
    #[inline(always)]
    fn map_in_place(self, x: &mut [f32], f: impl Map<Self>) {
        let mut chunks = x.chunks_exact_mut(Self::LANES);
        for chunk in &mut chunks {
            let v = f.map(self, self.load(chunk));
            self.store(chunk, v);
        }
        let tail = chunks.into_remainder();
        if !tail.is_empty() {
            let mut lanes = [0.0; MAX_LANES];
            lanes[..tail.len()].copy_from_slice(tail);
            let v = f.map(self, self.load(&lanes));
            self.store(&mut lanes, v);
            tail.copy_from_slice(&lanes[..tail.len()]);
        }
    }
}

/// Rows and columns of what [`Simd::transpose_ptr`] transposes.
pub(super) const BLOCK: usize = 16;

/// Most floats in any [`Simd::V`].
pub(super) const MAX_LANES: usize = 16;

/// Cosine and sine of every 256th of a turn.
pub(super) struct Turn {
    /// `(cos, sin)` by code: one load gives both.
    pairs: [[f32; 2]; 256],
    /// The same by digit, for lookups in a register: `[cos, sin]` of `16 digit` and of `digit`.
    #[cfg(target_arch = "x86_64")]
    digits: [[[f32; 16]; 2]; 2],
}

impl Turn {
    pub(super) fn new() -> Self {
        let pair = |code: usize| {
            let (sin, cos) = (code as f64 * std::f64::consts::TAU / 256.0).sin_cos();
            [cos as f32, sin as f32]
        };
        Self {
            pairs: std::array::from_fn(pair),
            #[cfg(target_arch = "x86_64")]
            digits: [16, 1].map(|unit| [0, 1].map(|part| std::array::from_fn(|digit| pair(unit * digit)[part]))),
        }
    }
}

/// An elementwise function of vectors. A trait and not a closure, because `map` must be `#[inline(always)]`, which a
/// closure cannot be told to be: left out of line, it is compiled without the instructions.
pub(super) trait Map<S: Simd> {
    fn map(&self, simd: S, v: S::V) -> S::V;
}

/// Work to be compiled for every instruction set. `run` must be `#[inline(always)]`.
pub(super) trait Work {
    type Output;
    fn run<S: Simd>(self, simd: S) -> Self::Output;
}

/// Runs `work` with the vectors of `isa`.
#[inline]
pub(super) fn dispatch<W: Work>(isa: Isa, work: W) -> W::Output {
    match isa.kind() {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: an `Isa` of this kind proves the features.
        Kind::Avx512 => unsafe { x86::run_avx512(work) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Kind::Avx2 => unsafe { x86::run_avx2(work) },
        _ => work.run(Portable),
    }
}

/// Runs `work` compiled for the widest vectors of this CPU. Simple loops are vectorised by the compiler, once it may use
/// the instructions; they do the same operations in the same order on every CPU.
///
/// `work` must be an `#[inline(always)]` closure, and so must be what it calls: anything left out of line is
/// compiled for the baseline.
#[inline]
pub fn vectorized<R>(work: impl FnOnce() -> R) -> R {
    dispatch(Isa::best(), Plain(work))
}

/// A closure as [`Work`] that asks for no vectors.
struct Plain<F>(F);

impl<R, F: FnOnce() -> R> Work for Plain<F> {
    type Output = R;

    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> R {
        (self.0)()
    }
}

/// Arrays of four floats: the definition of every operation.
#[derive(Clone, Copy)]
pub(super) struct Portable;

impl Portable {
    #[inline(always)]
    fn zip(a: [f32; 4], b: [f32; 4], f: impl Fn(f32, f32) -> f32) -> [f32; 4] {
        [f(a[0], b[0]), f(a[1], b[1]), f(a[2], b[2]), f(a[3], b[3])]
    }
}

/// Fused only where the baseline CPU has the instruction; elsewhere `f32::mul_add` would be a library call.
#[inline(always)]
fn mul_add(a: f32, b: f32, c: f32) -> f32 {
    if cfg!(target_arch = "aarch64") { a.mul_add(b, c) } else { a * b + c }
}

impl Simd for Portable {
    type V = [f32; 4];
    const LANES: usize = 4;

    #[inline(always)]
    fn splat(self, value: f32) -> [f32; 4] {
        [value; 4]
    }
    #[inline(always)]
    unsafe fn load_ptr(self, from: *const f32) -> [f32; 4] {
        // SAFETY: the caller vouches for four floats; the read is unaligned.
        unsafe { from.cast::<[f32; 4]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store_ptr(self, to: *mut f32, v: [f32; 4]) {
        // SAFETY: the caller vouches for four floats; the write is unaligned.
        unsafe { to.cast::<[f32; 4]>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn load_i16_ptr(self, from: *const i16) -> [f32; 4] {
        // SAFETY: the caller vouches for four values; the read is unaligned.
        unsafe { from.cast::<[i16; 4]>().read_unaligned() }.map(f32::from)
    }
    #[inline(always)]
    unsafe fn cos_sin_ptr(self, turn: &Turn, codes: *const u8) -> ([f32; 4], [f32; 4]) {
        // SAFETY: the caller vouches for four codes; a byte needs no alignment.
        let codes = unsafe { codes.cast::<[u8; 4]>().read() };
        let pairs = codes.map(|code| turn.pairs[usize::from(code)]);
        (pairs.map(|[cos, _]| cos), pairs.map(|[_, sin]| sin))
    }
    #[inline(always)]
    fn add(self, a: [f32; 4], b: [f32; 4]) -> [f32; 4] {
        Self::zip(a, b, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, a: [f32; 4], b: [f32; 4]) -> [f32; 4] {
        Self::zip(a, b, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, a: [f32; 4], b: [f32; 4]) -> [f32; 4] {
        Self::zip(a, b, |a, b| a * b)
    }
    #[inline(always)]
    fn mul_add(self, a: [f32; 4], b: [f32; 4], c: [f32; 4]) -> [f32; 4] {
        [mul_add(a[0], b[0], c[0]), mul_add(a[1], b[1], c[1]), mul_add(a[2], b[2], c[2]), mul_add(a[3], b[3], c[3])]
    }
    #[inline(always)]
    fn neg_mul_add(self, a: [f32; 4], b: [f32; 4], c: [f32; 4]) -> [f32; 4] {
        self.mul_add(a.map(|v| -v), b, c)
    }
    #[inline(always)]
    fn min(self, a: [f32; 4], b: [f32; 4]) -> [f32; 4] {
        Self::zip(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    fn max(self, a: [f32; 4], b: [f32; 4]) -> [f32; 4] {
        Self::zip(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn abs(self, a: [f32; 4]) -> [f32; 4] {
        a.map(f32::abs)
    }
    #[inline(always)]
    fn mul_pow2(self, a: [f32; 4], shifted: [f32; 4]) -> [f32; 4] {
        Self::zip(a, shifted, |a, n| f32::from_bits(a.to_bits().wrapping_add(n.to_bits() << 23)))
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{BLOCK, Simd, Turn, Work};

    /// Reached only through [`run_avx2`]; the private field keeps other modules from making one.
    #[derive(Clone, Copy)]
    pub(super) struct Avx2(());

    /// Reached only through [`run_avx512`].
    #[derive(Clone, Copy)]
    pub(super) struct Avx512(());

    #[target_feature(enable = "avx2,fma")]
    pub(super) fn run_avx2<W: Work>(work: W) -> W::Output {
        work.run(Avx2(()))
    }

    #[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    pub(super) fn run_avx512<W: Work>(work: W) -> W::Output {
        work.run(Avx512(()))
    }

    /// One operation without pointers: the token in `self` proves the features it needs.
    macro_rules! value_op {
        ($name:ident($($arg:ident),*) -> $v:ty = $body:expr) => {
            #[inline(always)]
            fn $name(self, $($arg: $v),*) -> $v {
                // SAFETY: a token of this type exists only below the function that enables its features.
                unsafe { $body }
            }
        };
    }

    impl Simd for Avx2 {
        type V = __m256;
        const LANES: usize = 8;

        #[inline(always)]
        fn splat(self, value: f32) -> __m256 {
            // SAFETY: the token proves AVX2.
            unsafe { _mm256_set1_ps(value) }
        }
        #[inline(always)]
        unsafe fn load_ptr(self, from: *const f32) -> __m256 {
            // SAFETY: the token proves AVX2; the caller vouches for eight floats; the load is unaligned.
            unsafe { _mm256_loadu_ps(from) }
        }
        #[inline(always)]
        unsafe fn store_ptr(self, to: *mut f32, v: __m256) {
            // SAFETY: as in `load_ptr`.
            unsafe { _mm256_storeu_ps(to, v) }
        }
        #[inline(always)]
        unsafe fn load_i16_ptr(self, from: *const i16) -> __m256 {
            // SAFETY: the token proves AVX2; the caller vouches for eight values of 16 bits.
            unsafe { _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(_mm_loadu_si128(from.cast()))) }
        }
        #[inline(always)]
        unsafe fn cos_sin_ptr(self, turn: &Turn, codes: *const u8) -> (__m256, __m256) {
            // SAFETY: the token proves AVX2; the caller vouches for eight codes; the table has all 256.
            unsafe {
                let pair = |i: usize| turn.pairs.as_ptr().add(usize::from(*codes.add(i))).cast::<f64>();
                let two = |i: usize| _mm_castpd_ps(_mm_loadh_pd(_mm_load_sd(pair(i)), pair(i + 1)));
                // Lanes 0, 1 and 4, 5 in one register and 2, 3 and 6, 7 in the other, as shuffles work in halves.
                let (first, second) = (_mm256_set_m128(two(4), two(0)), _mm256_set_m128(two(6), two(2)));
                (_mm256_shuffle_ps::<0b10_00_10_00>(first, second), _mm256_shuffle_ps::<0b11_01_11_01>(first, second))
            }
        }
        value_op!(add(a, b) -> __m256 = _mm256_add_ps(a, b));
        value_op!(sub(a, b) -> __m256 = _mm256_sub_ps(a, b));
        value_op!(mul(a, b) -> __m256 = _mm256_mul_ps(a, b));
        value_op!(mul_add(a, b, c) -> __m256 = _mm256_fmadd_ps(a, b, c));
        value_op!(neg_mul_add(a, b, c) -> __m256 = _mm256_fnmadd_ps(a, b, c));
        value_op!(min(a, b) -> __m256 = _mm256_min_ps(a, b));
        value_op!(max(a, b) -> __m256 = _mm256_max_ps(a, b));
        value_op!(abs(a) -> __m256 = _mm256_andnot_ps(_mm256_set1_ps(-0.0), a));
        value_op!(mul_pow2(a, shifted) -> __m256 = _mm256_castsi256_ps(_mm256_add_epi32(
            _mm256_castps_si256(a),
            _mm256_slli_epi32::<23>(_mm256_castps_si256(shifted)),
        )));
    }

    impl Simd for Avx512 {
        type V = __m512;
        const LANES: usize = 16;
        const LOOKS_UP: bool = true;

        #[inline(always)]
        fn look_up(self, table: &[f32; 16], indices: __m512) -> __m512 {
            // SAFETY: the token proves AVX-512F; the table has sixteen floats, and the lookup sees the lowest four bits of
            // an index only.
            unsafe { _mm512_permutexvar_ps(_mm512_castps_si512(indices), _mm512_loadu_ps(table.as_ptr())) }
        }
        #[inline(always)]
        fn splat(self, value: f32) -> __m512 {
            // SAFETY: the token proves AVX-512F.
            unsafe { _mm512_set1_ps(value) }
        }
        #[inline(always)]
        unsafe fn load_ptr(self, from: *const f32) -> __m512 {
            // SAFETY: the token proves AVX-512F; the caller vouches for sixteen floats; the load is unaligned.
            unsafe { _mm512_loadu_ps(from) }
        }
        #[inline(always)]
        unsafe fn store_ptr(self, to: *mut f32, v: __m512) {
            // SAFETY: as in `load_ptr`.
            unsafe { _mm512_storeu_ps(to, v) }
        }
        #[inline(always)]
        unsafe fn load_i16_ptr(self, from: *const i16) -> __m512 {
            // SAFETY: the token proves AVX-512F; the caller vouches for sixteen values of 16 bits.
            unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm256_loadu_si256(from.cast()))) }
        }
        #[inline(always)]
        unsafe fn cos_sin_ptr(self, turn: &Turn, codes: *const u8) -> (__m512, __m512) {
            // SAFETY: the token proves AVX-512F; the caller vouches for sixteen codes; tables of digits have 16 floats.
            unsafe {
                let codes = _mm512_cvtepu8_epi32(_mm_loadu_si128(codes.cast()));
                // A lookup sees the lowest four bits of an index only.
                let digits = [_mm512_srli_epi32::<4>(codes), codes];
                let lookup = |digit: usize, part: usize| {
                    _mm512_permutexvar_ps(digits[digit], _mm512_loadu_ps(turn.digits[digit][part].as_ptr()))
                };
                let ([c1, s1], [c2, s2]) = ([lookup(0, 0), lookup(0, 1)], [lookup(1, 0), lookup(1, 1)]);
                (_mm512_fnmadd_ps(s1, s2, _mm512_mul_ps(c1, c2)), _mm512_fmadd_ps(s1, c2, _mm512_mul_ps(c1, s2)))
            }
        }
        /// In four steps: floats of two rows, then pairs of them change places in each quarter of a register, and then
        /// the quarters do so twice.
        #[inline(always)]
        unsafe fn transpose_ptr(self, from: *const f32, stride: usize, to: *mut f32, to_stride: usize) {
            // SAFETY: the token proves AVX-512F; the caller vouches for sixteen floats in each of sixteen rows.
            unsafe {
                let (mut pairs, mut fours) = ([_mm512_setzero_ps(); BLOCK], [_mm512_setzero_pd(); BLOCK]);
                for i in (0..BLOCK).step_by(2) {
                    let (a, b) = (_mm512_loadu_ps(from.add(i * stride)), _mm512_loadu_ps(from.add((i + 1) * stride)));
                    (pairs[i], pairs[i + 1]) = (_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
                }
                for i in (0..BLOCK).step_by(4) {
                    for half in 0..2 {
                        let (a, b) = (_mm512_castps_pd(pairs[i + half]), _mm512_castps_pd(pairs[i + half + 2]));
                        fours[i + 2 * half] = _mm512_unpacklo_pd(a, b);
                        fours[i + 2 * half + 1] = _mm512_unpackhi_pd(a, b);
                    }
                }
                for column in 0..4 {
                    let (a, b) = (_mm512_castpd_ps(fours[column]), _mm512_castpd_ps(fours[column + 4]));
                    let (c, d) = (_mm512_castpd_ps(fours[column + 8]), _mm512_castpd_ps(fours[column + 12]));
                    let even = (_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0x88>(c, d));
                    let odd = (_mm512_shuffle_f32x4::<0xdd>(a, b), _mm512_shuffle_f32x4::<0xdd>(c, d));
                    let at = |quarter: usize| to.add((4 * quarter + column) * to_stride);
                    _mm512_storeu_ps(at(0), _mm512_shuffle_f32x4::<0x88>(even.0, even.1));
                    _mm512_storeu_ps(at(1), _mm512_shuffle_f32x4::<0x88>(odd.0, odd.1));
                    _mm512_storeu_ps(at(2), _mm512_shuffle_f32x4::<0xdd>(even.0, even.1));
                    _mm512_storeu_ps(at(3), _mm512_shuffle_f32x4::<0xdd>(odd.0, odd.1));
                }
            }
        }
        #[inline(always)]
        fn max_lane(self, v: __m512) -> f32 {
            // SAFETY: the token proves AVX-512F.
            unsafe { _mm512_reduce_max_ps(v) }
        }
        value_op!(add(a, b) -> __m512 = _mm512_add_ps(a, b));
        value_op!(sub(a, b) -> __m512 = _mm512_sub_ps(a, b));
        value_op!(mul(a, b) -> __m512 = _mm512_mul_ps(a, b));
        value_op!(mul_add(a, b, c) -> __m512 = _mm512_fmadd_ps(a, b, c));
        value_op!(neg_mul_add(a, b, c) -> __m512 = _mm512_fnmadd_ps(a, b, c));
        value_op!(min(a, b) -> __m512 = _mm512_min_ps(a, b));
        value_op!(max(a, b) -> __m512 = _mm512_max_ps(a, b));
        value_op!(abs(a) -> __m512 = _mm512_abs_ps(a));
        value_op!(mul_pow2(a, shifted) -> __m512 = _mm512_castsi512_ps(_mm512_add_epi32(
            _mm512_castps_si512(a),
            _mm512_slli_epi32::<23>(_mm512_castps_si512(shifted)),
        )));
    }
}
