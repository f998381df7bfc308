//! Applying a decoded rotation to rows.

use super::angles::TURN;
use super::{Coefficients, LaneOrder, PackedAngles};
use crate::kernels::activation::{GeluVector, gelu};
use crate::kernels::isa::Isa;
use crate::kernels::simd::{Map, Simd, Turn, Work, dispatch};

/// `x <- B x` for every row of `x` `[rows, features]`, in lane order.
///
/// Every feature passes `stages` rotations of four roundings each; the relative error of a row in the L2 norm
/// is at most `stages * (2 * SINCOS_ERROR + 4 * 2^-24)`, since a rotation with inexact coefficients grows the
/// error by no more.
///
/// # Panics
/// When `x` is not a whole number of rows.
pub fn rotate(isa: Isa, coefficients: &Coefficients, x: &mut [f32]) {
    assert!(x.len().is_multiple_of(coefficients.order.features().max(1)), "rows of another length");
    if coefficients.stages > 0 {
        dispatch(isa, Rotate { coefficients, x });
    }
}

struct Rotate<'a> {
    coefficients: &'a Coefficients,
    x: &'a mut [f32],
}

impl Work for Rotate<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Coefficients { cos, sin, order, stages, .. } = self.coefficients;
        for row in self.x.chunks_exact_mut(order.features()) {
            rotate_row(simd, *order, *stages, cos, sin, row);
        }
    }
}

/// What comes behind a rotation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Then {
    Nothing,
    Gelu,
}

/// [`PackedAngles::decode`] of one expert, [`rotate`], and what comes then, to the last bit. Where angles are cheap to
/// decode, sines and cosines stay in registers, and what comes then joins the last stages.
///
/// # Panics
/// When `x` is not a whole number of rows, there is no such expert, or `coefficients` is too small.
pub fn rotate_by(
    isa: Isa,
    angles: &PackedAngles,
    expert: usize,
    then: Then,
    coefficients: &mut Coefficients,
    x: &mut [f32],
) {
    let (order, stages) = (angles.order(), angles.stages());
    assert!(x.len().is_multiple_of(order.features().max(1)), "rows of another length");
    if let Some(codes) = angles.bytes(expert)
        && dispatch(isa, RotateBy { order, stages, codes, then, x })
    {
        return;
    }
    if stages > 0 {
        angles.decode(isa, expert, coefficients);
        rotate(isa, coefficients, x);
    }
    if then == Then::Gelu {
        gelu(isa, x);
    }
}

/// Rows that share the decoding of an angle: few enough to stay in the first-level cache between stages.
const ROWS: usize = 4;

struct RotateBy<'a> {
    order: LaneOrder,
    stages: usize,
    codes: &'a [u8],
    then: Then,
    x: &'a mut [f32],
}

impl Work for RotateBy<'_> {
    /// Whether it was done: not every rotation, nor every instruction set, is worth it.
    type Output = bool;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> bool {
        let Self { order, stages, codes, then, x } = self;
        let double = |stage| {
            let stride = order.stride(stage);
            stride.is_multiple_of(S::LANES) && order.stride(stage + 1) == 2 * stride
        };
        if !S::LOOKS_UP || stages == 0 || stages % 2 == 1 || !(0..stages).step_by(2).all(double) {
            return false;
        }
        let (features, turn) = (order.features(), &*TURN);
        for rows in x.chunks_mut(ROWS * features) {
            for stage in (0..stages).step_by(2) {
                let (stride, codes) = (order.stride(stage), &codes[stage * features / 2..][..features]);
                if then == Then::Gelu && stage + 2 == stages {
                    two_stages_by::<S, true>(simd, (stride, features), turn, codes, rows);
                } else {
                    two_stages_by::<S, false>(simd, (stride, features), turn, codes, rows);
                }
            }
        }
        true
    }
}

/// [`two_stages`] of several rows, with the codes of the angles; `GELU` says that it comes then.
#[inline(always)]
fn two_stages_by<S: Simd, const GELU: bool>(
    simd: S,
    (stride, features): (usize, usize),
    turn: &Turn,
    codes: &[u8],
    x: &mut [f32],
) {
    let (pairs, rows) = (features / 2, x.len() / features);
    assert!(stride.is_multiple_of(S::LANES) && features.is_multiple_of(4 * stride));
    assert!(codes.len() == features && x.len() == rows * features);
    let (x, codes) = (x.as_mut_ptr(), codes.as_ptr());
    for block in (0..features).step_by(4 * stride) {
        for j in (0..stride).step_by(S::LANES) {
            // SAFETY: `block + 4 * stride <= features` and `j + LANES <= stride`, so the four quarters of the block at j lie
            // in each of the rows, of which `x` has that many. The pairs of this block are `block / 2 .. block / 2 + 2 *
            // stride` in each stage, and both stages have `pairs` of them. Asserted above.
            unsafe {
                let angle = |stage: usize, half: usize| {
                    simd.cos_sin_ptr(turn, codes.add(stage * pairs + block / 2 + half * stride + j))
                };
                let angles = [angle(0, 0), angle(0, 1), angle(1, 0), angle(1, 1)];
                for row in 0..rows {
                    let at = |quarter: usize| x.add(row * features + block + quarter * stride + j);
                    let [(c, s), ..] = angles;
                    let (x0, x1) = givens(simd, c, s, simd.load_ptr(at(0)), simd.load_ptr(at(1)));
                    let [_, (c, s), ..] = angles;
                    let (x2, x3) = givens(simd, c, s, simd.load_ptr(at(2)), simd.load_ptr(at(3)));
                    let [.., (c, s), _] = angles;
                    let (x0, x2) = givens(simd, c, s, x0, x2);
                    let [.., (c, s)] = angles;
                    let (x1, x3) = givens(simd, c, s, x1, x3);
                    for (quarter, v) in [x0, x1, x2, x3].into_iter().enumerate() {
                        simd.store_ptr(at(quarter), if GELU { GeluVector.map(simd, v) } else { v });
                    }
                }
            }
        }
    }
}

#[inline(always)]
fn rotate_row<S: Simd>(simd: S, order: LaneOrder, stages: usize, cos: &[f32], sin: &[f32], row: &mut [f32]) {
    let pairs = row.len() / 2;
    let mut stage = 0;
    while stage < stages {
        let (cos, sin) = (&cos[stage * pairs..], &sin[stage * pairs..]);
        let stride = order.stride(stage);
        // Two stages at a time halve the loads and stores, where the second stride is twice the first.
        if stride.is_multiple_of(S::LANES) && stage + 1 < stages && order.stride(stage + 1) == 2 * stride {
            two_stages(simd, stride, &cos[..2 * pairs], &sin[..2 * pairs], row);
            stage += 2;
            continue;
        }
        let (cos, sin) = (&cos[..pairs], &sin[..pairs]);
        match stride {
            _ if stride.is_multiple_of(S::LANES) => one_stage(simd, stride, cos, sin, row),
            8 => lane_stage::<8>(cos, sin, row),
            4 => lane_stage::<4>(cos, sin, row),
            2 => lane_stage::<2>(cos, sin, row),
            _ => lane_stage::<1>(cos, sin, row),
        }
        stage += 1;
    }
}

/// `(c x1 - s x2, s x1 + c x2)`.
#[inline(always)]
fn givens<S: Simd>(simd: S, c: S::V, s: S::V, x1: S::V, x2: S::V) -> (S::V, S::V) {
    (simd.neg_mul_add(s, x2, simd.mul(c, x1)), simd.mul_add(s, x1, simd.mul(c, x2)))
}

/// One stage whose stride is a whole number of registers.
#[inline(always)]
fn one_stage<S: Simd>(simd: S, stride: usize, cos: &[f32], sin: &[f32], row: &mut [f32]) {
    let angles = cos.chunks_exact(stride).zip(sin.chunks_exact(stride));
    for (block, (cos, sin)) in row.chunks_exact_mut(2 * stride).zip(angles) {
        let (first, second) = block.split_at_mut(stride);
        for j in (0..stride).step_by(S::LANES) {
            let (c, s) = (simd.load(&cos[j..]), simd.load(&sin[j..]));
            let (y1, y2) = givens(simd, c, s, simd.load(&first[j..]), simd.load(&second[j..]));
            simd.store(&mut first[j..], y1);
            simd.store(&mut second[j..], y2);
        }
    }
}

/// Two stages with strides `stride` and `2 * stride`, a whole number of registers; `cos` and `sin` hold the angles of
/// the first, then those of the second.
#[inline(always)]
fn two_stages<S: Simd>(simd: S, stride: usize, cos: &[f32], sin: &[f32], row: &mut [f32]) {
    let pairs = row.len() / 2;
    assert!(stride.is_multiple_of(S::LANES) && row.len().is_multiple_of(4 * stride));
    assert!(cos.len() == 2 * pairs && sin.len() == 2 * pairs);
    let (x, cos, sin) = (row.as_mut_ptr(), cos.as_ptr(), sin.as_ptr());
    for block in (0..2 * pairs).step_by(4 * stride) {
        for j in (0..stride).step_by(S::LANES) {
            // SAFETY: `block + 4 * stride <= row.len()` and `j + LANES <= stride`, so the four quarters of the block at
            // j lie in the row. The pairs of this block are `block / 2 .. block / 2 + 2 * stride` in each stage, and
            // both stages have `pairs` of them.
            unsafe {
                let at = |quarter: usize| x.add(block + quarter * stride + j);
                let angle = |stage: usize, half: usize| {
                    let i = stage * pairs + block / 2 + half * stride + j;
                    (simd.load_ptr(cos.add(i)), simd.load_ptr(sin.add(i)))
                };
                let (c, s) = angle(0, 0);
                let (x0, x1) = givens(simd, c, s, simd.load_ptr(at(0)), simd.load_ptr(at(1)));
                let (c, s) = angle(0, 1);
                let (x2, x3) = givens(simd, c, s, simd.load_ptr(at(2)), simd.load_ptr(at(3)));
                let (c, s) = angle(1, 0);
                let (x0, x2) = givens(simd, c, s, x0, x2);
                let (c, s) = angle(1, 1);
                let (x1, x3) = givens(simd, c, s, x1, x3);
                simd.store_ptr(at(0), x0);
                simd.store_ptr(at(1), x1);
                simd.store_ptr(at(2), x2);
                simd.store_ptr(at(3), x3);
            }
        }
    }
}

/// One stage that pairs lanes of a register; only long rotations of short rows have such stages.
#[inline(always)]
fn lane_stage<const STRIDE: usize>(cos: &[f32], sin: &[f32], row: &mut [f32]) {
    let blocks = row.as_chunks_mut::<STRIDE>().0.as_chunks_mut::<2>().0;
    let angles = cos.as_chunks::<STRIDE>().0.iter().zip(sin.as_chunks::<STRIDE>().0);
    for ([first, second], (cos, sin)) in blocks.iter_mut().zip(angles) {
        for j in 0..STRIDE {
            let (x1, x2) = (first[j], second[j]);
            first[j] = cos[j] * x1 - sin[j] * x2;
            second[j] = sin[j] * x1 + cos[j] * x2;
        }
    }
}
