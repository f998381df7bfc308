//! From the exact i32 sums of a convolution to the int8 codes of its output.
//!
//! A code q of a tensor with step s and zero z stands for `s (q - z)`. The zeros of input and output, the bias and the
//! steps of weights and input all fall into one scale and one bias per feature, so that
//! ```text
//! y    = min(max(dot * scale[n] + bias[n], low), high)          the activation: ReLU6, or none with infinite bounds
//! y    = y + added * ratio                                       the residual connection, if there is one
//! code = round_half_even(min(max(y, -128), 127))
//! ```
//! in f32, each operation rounded by itself: no fused multiply-add, so that every instruction set gives the same bits.

use super::error::{KernelError, expect_finite, expect_len};
use super::isa::Isa;
use super::simd::{Simd, Work, dispatch};

/// Features that are requantised together.
pub(super) const LANES: usize = 16;

/// 1.5 * 2^23: a small f32 added to it loses its fraction, rounded half to even, and is left in the lowest bits.
const ROUND: f32 = 12_582_912.0;

/// Scale, bias and activation of a convolution whose output is int8.
#[derive(Debug, Clone)]
pub struct Requantize {
    features: usize,
    /// Padded with zeros to whole blocks.
    scale: Box<[[f32; LANES]]>,
    /// Padded with zeros to whole blocks.
    bias: Box<[[f32; LANES]]>,
    low: f32,
    high: f32,
    ratio: f32,
}

impl Requantize {
    /// See the module for what the arguments mean; `scale` and `bias` have one value a feature, `bounds` are low and
    /// high, and `ratio` multiplies the codes of a residual connection.
    ///
    /// # Errors
    /// [`KernelError`] when lengths differ, a scale, bias or ratio is not finite, or a bound is not a number.
    pub fn new(scale: &[f32], bias: &[f32], bounds: (f32, f32), ratio: f32) -> Result<Self, KernelError> {
        expect_len("bias of a convolution", bias.len(), scale.len())?;
        expect_finite("scale of a convolution", scale)?;
        expect_finite("bias of a convolution", bias)?;
        expect_finite("ratio of a residual connection", &[ratio])?;
        if let Some(index) = [bounds.0, bounds.1].iter().position(|bound| bound.is_nan()) {
            return Err(KernelError::NotFinite { what: "bound of an activation", index });
        }
        let pad = |values: &[f32]| {
            let blocks =
                values.chunks(LANES).map(|chunk| std::array::from_fn(|i| chunk.get(i).copied().unwrap_or(0.0)));
            blocks.collect()
        };
        Ok(Self { features: scale.len(), scale: pad(scale), bias: pad(bias), low: bounds.0, high: bounds.1, ratio })
    }

    /// Features of the output.
    pub fn features(&self) -> usize {
        self.features
    }

    /// Bytes on the heap.
    pub fn resident_bytes(&self) -> usize {
        size_of_val(&*self.scale) + size_of_val(&*self.bias)
    }

    /// The definition: the code of feature `n` for the sum `dot`, with the code of the residual connection.
    pub fn code(&self, n: usize, dot: i32, added: Option<i8>) -> i8 {
        let (scale, bias) = (self.scale[n / LANES][n % LANES], self.bias[n / LANES][n % LANES]);
        let y = (dot as f32 * scale + bias).max(self.low).min(self.high);
        let y = y + added.map_or(0.0, |code| f32::from(code) * self.ratio);
        y.clamp(-128.0, 127.0).round_ties_even() as i8
    }

    /// [`Requantize::code`] for the features of block `index` of every pixel. `sums` and `corrections`,
    /// which are subtracted from them, have an entry for each pixel; `out` and `added` are `[pixels, features]`.
    pub(super) fn write(
        &self,
        isa: Isa,
        index: usize,
        (sums, corrections): (&[[i32; LANES]], &[i32]),
        added: Option<&[i8]>,
        out: &mut [i8],
    ) {
        let first = index * LANES;
        let width = LANES.min(self.features - first);
        let rows = Rows { requantize: self, index, sums, corrections, out: &mut out[first..] };
        match added {
            None if width == LANES => dispatch(isa, Whole(rows)),
            _ => dispatch(isa, Any(rows, width, added.map(|added| &added[first..]))),
        }
    }
}

/// The features of a block of several pixels.
struct Rows<'a> {
    requantize: &'a Requantize,
    index: usize,
    sums: &'a [[i32; LANES]],
    corrections: &'a [i32],
    /// From the block's first feature of the first pixel on.
    out: &'a mut [i8],
}

/// A whole block, to which nothing is added.
struct Whole<'a>(Rows<'a>);

/// The first features of a block, and what is added to them.
struct Any<'a>(Rows<'a>, usize, Option<&'a [i8]>);

impl Work for Whole<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let Rows { requantize, index, sums, corrections, out } = self.0;
        let block = Block::of(requantize, index);
        let mut at = 0;
        for (sums, &correction) in sums.iter().zip(corrections) {
            out[at..][..LANES].copy_from_slice(&block.bounded(block.scaled(sums, correction)));
            at += requantize.features;
        }
    }
}

impl Work for Any<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let Self(Rows { requantize, index, sums, corrections, out }, width, added) = self;
        let block = Block::of(requantize, index);
        let mut at = 0;
        for (sums, &correction) in sums.iter().zip(corrections) {
            let y = block.scaled(sums, correction);
            let codes = if let Some(added) = added {
                let mut padded = [0; LANES];
                padded[..width].copy_from_slice(&added[at..][..width]);
                block.joined(y, &padded)
            } else {
                block.bounded(y)
            };
            out[at..][..width].copy_from_slice(&codes[..width]);
            at += requantize.features;
        }
    }
}

/// What the features of one block have in common, in registers.
struct Block {
    scale: [f32; LANES],
    bias: [f32; LANES],
    low: f32,
    high: f32,
    ratio: f32,
}

impl Block {
    #[inline(always)]
    fn of(requantize: &Requantize, index: usize) -> Self {
        let Requantize { low, high, ratio, .. } = *requantize;
        Self { scale: requantize.scale[index], bias: requantize.bias[index], low, high, ratio }
    }

    /// Plain loops, here and below, which the compiler turns into vectors of whatever the caller is compiled for.
    #[inline(always)]
    fn scaled(&self, sums: &[i32; LANES], correction: i32) -> [f32; LANES] {
        let mut y = [0.0; LANES];
        for c in 0..LANES {
            // With k at most 2^16, a sum is at most 2^16 * 255 * 128 in size and its correction half of that; the difference is
            // the true sum, at most 2^16 * 127 * 128. All are below 2^31.
            y[c] = (sums[c] - correction) as f32 * self.scale[c] + self.bias[c];
        }
        y
    }

    /// The codes of scaled sums where nothing is added: bounds and range of codes in one.
    #[inline(always)]
    fn bounded(&self, y: [f32; LANES]) -> [i8; LANES] {
        let (low, high) = (self.low.clamp(-128.0, 127.0), self.high.clamp(-128.0, 127.0));
        let mut codes = [0; LANES];
        for c in 0..LANES {
            codes[c] = code(at_most(at_least(y[c], low), high));
        }
        codes
    }

    /// The codes of scaled sums with those of a residual connection.
    #[inline(always)]
    fn joined(&self, y: [f32; LANES], added: &[i8; LANES]) -> [i8; LANES] {
        let mut codes = [0; LANES];
        for c in 0..LANES {
            let y = at_most(at_least(y[c], self.low), self.high) + f32::from(added[c]) * self.ratio;
            codes[c] = code(at_most(at_least(y, -128.0), 127.0));
        }
        codes
    }
}

/// Rounds what lies in the range of codes: the low byte of the sum is the code.
#[inline(always)]
fn code(y: f32) -> i8 {
    (y + ROUND).to_bits() as i8
}

/// `f32::max` for numbers, which is one instruction.
#[inline(always)]
fn at_least(y: f32, low: f32) -> f32 {
    if y > low { y } else { low }
}

/// `f32::min` for numbers, which is one instruction.
#[inline(always)]
fn at_most(y: f32, high: f32) -> f32 {
    if y < high { y } else { high }
}

#[cfg(test)]
pub(super) mod tests {
    use rand::{Rng, rngs::SmallRng};

    use super::*;

    /// One whose codes reach all of int8 and both bounds, for sums over `k` products.
    pub(in crate::kernels) fn any_requantize(rng: &mut SmallRng, features: usize, k: usize) -> Requantize {
        let size = 100.0 / (4000.0 * (k.max(1) as f32).sqrt());
        let scale: Vec<f32> = (0..features).map(|_| size * rng.random_range(0.1..2.0)).collect();
        let bias: Vec<f32> = (0..features).map(|_| rng.random_range(-90.0..90.0)).collect();
        let bounds = match rng.random_range(0..3) {
            0 => (f32::NEG_INFINITY, f32::INFINITY),
            1 => (-128.0, 100.25),
            _ => (-60.5, 70.0),
        };
        Requantize::new(&scale, &bias, bounds, rng.random_range(-2.0..2.0)).unwrap()
    }

    /// As the vectors make it.
    fn vector_code(requantize: &Requantize, dot: i32, added: Option<i8>) -> i8 {
        let mut out = [0; 1];
        let added = added.map(|added| [added]);
        requantize.write(Isa::best(), 0, (&[[dot; LANES]], &[0]), added.as_ref().map(|added| &added[..]), &mut out);
        out[0]
    }

    #[test]
    fn ties_round_to_even_and_codes_stay_in_range() {
        let requantize = Requantize::new(&[0.5], &[0.0], (f32::NEG_INFINITY, f32::INFINITY), 0.5).unwrap();
        for (dot, code) in
            [(1, 0), (3, 2), (5, 2), (-1, 0), (-3, -2), (-5, -2), (253, 126), (255, 127), (i32::MIN, -128)]
        {
            assert_eq!(requantize.code(0, dot, None), code, "{dot}");
            assert_eq!(vector_code(&requantize, dot, None), code, "{dot}");
        }
        assert_eq!(requantize.code(0, 10, Some(-3)), 4);
        assert_eq!(vector_code(&requantize, 10, Some(-3)), 4);
    }

    /// Without what is added, or ReLU6 would cut the sum instead of the convolution.
    #[test]
    fn the_activation_bounds_the_convolution_alone() {
        let requantize = Requantize::new(&[1.0], &[0.0], (0.0, 6.0), 1.0).unwrap();
        assert_eq!(requantize.code(0, 50, Some(20)), 26);
        assert_eq!(vector_code(&requantize, 50, Some(20)), 26);
        assert_eq!(requantize.code(0, -50, Some(-20)), -20);
    }

    #[test]
    fn what_is_not_a_number_is_refused() {
        let new = |scale, bias, low, ratio| Requantize::new(&[scale], &[bias], (low, 1.0), ratio);
        assert!(new(1.0, 1.0, f32::NEG_INFINITY, 1.0).is_ok());
        for (scale, bias, low, ratio) in [
            (f32::NAN, 1.0, 0.0, 1.0),
            (1.0, f32::INFINITY, 0.0, 1.0),
            (1.0, 1.0, f32::NAN, 1.0),
            (1.0, 1.0, 0.0, f32::INFINITY),
        ] {
            assert!(matches!(new(scale, bias, low, ratio), Err(KernelError::NotFinite { .. })));
        }
        assert!(Requantize::new(&[1.0; 2], &[1.0], (0.0, 1.0), 1.0).is_err());
    }
}
