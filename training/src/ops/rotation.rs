//! Butterfly rotation of rows, each by the angles of its own expert.
//!
//! A stage is written over whole features instead of pairs: `y[i] = c[i] x[i] + s[i] x[i ^ stride]`, with `s` negative
//! on the first half of each block, so that the short strides vectorise too; the stages of strides up to 8 run block
//! by block, in registers. A rotation is inverted by its transpose,
//! so the backward pass walks the stages from the output and stores no intermediate.

use std::f64::consts::TAU;
use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};
use model_core::kernels::vectorized;

use super::{output, slice, tensor_like, view};

/// Which angles an artifact can hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AngleGrid {
    /// Any angle.
    Continuous,
    /// Multiples of `2 pi / 2^bits`; the gradient treats the rounding as the identity.
    Bits(u32),
}

impl AngleGrid {
    fn rotations(self) -> Rotations {
        match self {
            Self::Continuous => Rotations::Continuous,
            Self::Bits(bits) => {
                let codes = 0..1u32 << bits;
                let turn = f64::from(codes.end);
                let sin_cos = |code: u32| {
                    let (s, c) = (f64::from(code) * (TAU / turn)).sin_cos();
                    (s as f32, c as f32)
                };
                Rotations::Codes { turn, sin_cos: codes.map(sin_cos).collect() }
            }
        }
    }
}

/// Sines and cosines of angles, after rounding to their grid.
enum Rotations {
    Continuous,
    /// By code, of which `turn`, a power of two, make a full turn.
    Codes {
        turn: f64,
        sin_cos: Vec<(f32, f32)>,
    },
}

impl Rotations {
    fn sin_cos(&self, angle: f32) -> (f32, f32) {
        match self {
            Self::Continuous => {
                let (s, c) = f64::from(angle).sin_cos();
                (s as f32, c as f32)
            }
            Self::Codes { turn, sin_cos } => {
                // The rounding of `train::quantize::angle_codes`: adding 1.5 * 2^52 leaves the nearest integer, ties to
                // even, in the lowest bits, without the call that rounding is on the baseline CPU.
                let code = (f64::from(angle) / TAU * turn + 6_755_399_441_055_744.0).to_bits();
                sin_cos[code as usize & (sin_cos.len() - 1)]
            }
        }
    }
}

/// Rotates each row of `x [rows, n]` once for every expert it is sent to.
///
/// `angles` is `[experts, stages, n / 2]` in radians; `experts` is `[rows * copies]`, and output row r is
/// `B(angles[experts[r]]) x[r / copies]`. Returns `[rows * copies, n]`. Without stages `n` may be odd.
pub fn rotate_rows(x: &Tensor, angles: &Tensor, experts: Arc<Vec<u16>>, grid: AngleGrid) -> Result<Tensor> {
    let (num_experts, stages, half) = angles.dims3()?;
    let (rows, n) = x.dims2()?;
    if half != n / 2 || n % (1 << stages) != 0 || !experts.len().is_multiple_of(rows.max(1)) {
        candle_core::bail!("rotation: {rows} rows of {n} for {} experts, angles {:?}", experts.len(), angles.shape());
    }
    if experts.iter().any(|&e| usize::from(e) >= num_experts) {
        candle_core::bail!("rotation: an expert id is not below {num_experts}");
    }
    let copies = experts.len() / rows.max(1);
    x.contiguous()?.apply_op2(&angles.contiguous()?, Rotate { experts, copies, grid })
}

struct Rotate {
    experts: Arc<Vec<u16>>,
    copies: usize,
    grid: AngleGrid,
}

/// Per-feature coefficients of every stage of every expert: `[experts, stages, n]`.
pub(super) struct Coefficients {
    cos: Vec<f32>,
    sin: Vec<f32>,
    stages: usize,
    n: usize,
}

impl Coefficients {
    pub(super) fn new(angles: &[f32], stages: usize, n: usize, grid: AngleGrid) -> Self {
        let (mut cos, mut sin) = (vec![0.0; angles.len() * 2], vec![0.0; angles.len() * 2]);
        let rotations = grid.rotations();
        let rows = angles.chunks_exact((n / 2).max(1)).zip(cos.chunks_exact_mut(n)).zip(sin.chunks_exact_mut(n));
        for (row, ((angles, cos), sin)) in rows.enumerate() {
            let stride = 1 << (row % stages.max(1));
            for (pair, &angle) in angles.iter().enumerate() {
                let first = pair / stride * 2 * stride + pair % stride;
                let (s, c) = rotations.sin_cos(angle);
                (cos[first], cos[first + stride]) = (c, c);
                // dy1/dangle = -y2 and dy2/dangle = y1.
                (sin[first], sin[first + stride]) = (-s, s);
            }
        }
        Self { cos, sin, stages, n }
    }

    #[inline(always)]
    pub(super) fn of(&self, expert: u16) -> Expert<'_> {
        let len = self.stages * self.n;
        let at = usize::from(expert) * len;
        Expert { cos: &self.cos[at..][..len], sin: &self.sin[at..][..len] }
    }

    /// Where [`rotate_back`] adds up what the gradients of these angles are made of.
    pub(super) fn gradient_sums(&self) -> GradientSums {
        GradientSums { sums: vec![0.0; self.cos.len()], stages: self.stages, n: self.n }
    }
}

/// `sum grad[i] y[i ^ stride]` over the rows of each expert, `[experts, stages, n]`, `y` being a stage's output.
pub(super) struct GradientSums {
    sums: Vec<f32>,
    stages: usize,
    n: usize,
}

impl GradientSums {
    #[inline(always)]
    pub(super) fn of_mut(&mut self, expert: u16) -> &mut [f32] {
        let len = self.stages * self.n;
        &mut self.sums[usize::from(expert) * len..][..len]
    }

    /// The gradients `[experts, stages, n / 2]`.
    pub(super) fn angles(&self) -> Vec<f32> {
        let mut angles = vec![0.0; self.sums.len() / 2];
        let rows = self.sums.chunks_exact(self.n).zip(angles.chunks_exact_mut((self.n / 2).max(1)));
        for (row, (sums, angles)) in rows.enumerate() {
            let stride = 1 << (row % self.stages.max(1));
            for (pair, angle) in angles.iter_mut().enumerate() {
                let first = pair / stride * 2 * stride + pair % stride;
                *angle = sums[first + stride] - sums[first];
            }
        }
        angles
    }
}

const BLOCK: usize = 16;
/// Stages whose pairs lie within a block: strides 1, 2, 4 and 8.
const BLOCK_STAGES: usize = 4;

/// The coefficients of one expert, `[stages, n]` each.
#[derive(Clone, Copy)]
pub(super) struct Expert<'a> {
    cos: &'a [f32],
    sin: &'a [f32],
}

/// `v[i ^ (1 << stage)]` for every i, spelled out so that the compiler sees one shuffle instead of a gather.
#[inline(always)]
fn partners(v: &[f32; BLOCK], stage: usize) -> [f32; BLOCK] {
    let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = *v;
    match stage {
        0 => [b, a, d, c, f, e, h, g, j, i, l, k, n, m, p, o],
        1 => [c, d, a, b, g, h, e, f, k, l, i, j, o, p, m, n],
        2 => [e, f, g, h, a, b, c, d, m, n, o, p, i, j, k, l],
        _ => [i, j, k, l, m, n, o, p, a, b, c, d, e, f, g, h],
    }
}

/// `c v + s partners(v)`.
#[inline(always)]
fn turn(v: &[f32; BLOCK], partners: &[f32; BLOCK], cos: &[f32; BLOCK], sin: &[f32; BLOCK]) -> [f32; BLOCK] {
    std::array::from_fn(|i| cos[i] * v[i] + sin[i] * partners[i])
}

/// `c v - s partners(v)`: the transpose, since a partner's sine has the other sign.
#[inline(always)]
fn turn_back(v: &[f32; BLOCK], partners: &[f32; BLOCK], cos: &[f32; BLOCK], sin: &[f32; BLOCK]) -> [f32; BLOCK] {
    std::array::from_fn(|i| cos[i] * v[i] - sin[i] * partners[i])
}

/// The first `STAGES` stages of a row of whole blocks, each block staying in a register from the first to the last.
#[inline(always)]
fn rotate_blocks<const STAGES: usize>(x: &mut [f32], expert: Expert<'_>) {
    let n = x.len();
    let (cos, sin) = (expert.cos.as_chunks::<BLOCK>().0, expert.sin.as_chunks::<BLOCK>().0);
    for (b, x) in x.as_chunks_mut::<BLOCK>().0.iter_mut().enumerate() {
        // Without this the loop vectoriser fuses blocks into gathers, eight times slower than one shuffle per block.
        let x = std::hint::black_box(x);
        let mut v = *x;
        for l in 0..STAGES {
            let at = l * (n / BLOCK) + b;
            v = turn(&v, &partners(&v, l), &cos[at], &sin[at]);
        }
        *x = v;
    }
}

/// From the end of the first `STAGES` stages back to their beginning: `y` and `grad` are turned back, and
/// `sums[l][i] += grad[i] y[i ^ (1 << l)]` in terms of each stage's output.
#[inline(always)]
fn return_blocks<const STAGES: usize>(y: &mut [f32], grad: &mut [f32], sums: &mut [f32], expert: Expert<'_>) {
    let n = y.len();
    let (cos, sin) = (expert.cos.as_chunks::<BLOCK>().0, expert.sin.as_chunks::<BLOCK>().0);
    let sums = sums.as_chunks_mut::<BLOCK>().0;
    let rows = y.as_chunks_mut::<BLOCK>().0.iter_mut().zip(grad.as_chunks_mut::<BLOCK>().0);
    for (b, (y, grad)) in rows.enumerate() {
        let y = std::hint::black_box(y);
        let (mut v, mut g) = (*y, *grad);
        for l in (0..STAGES).rev() {
            let at = l * (n / BLOCK) + b;
            let partner = partners(&v, l);
            for (i, sum) in sums[at].iter_mut().enumerate() {
                *sum += g[i] * partner[i];
            }
            v = turn_back(&v, &partner, &cos[at], &sin[at]);
            g = turn_back(&g, &partners(&g, l), &cos[at], &sin[at]);
        }
        (*y, *grad) = (v, g);
    }
}

/// One stage of any stride: `x[i] <- c[i] x[i] + sign s[i] x[i ^ stride]`, `sign` 1 for the rotation and
/// -1 for its transpose.
#[inline(always)]
fn stage(x: &mut [f32], cos: &[f32], sin: &[f32], stride: usize, sign: f32) {
    let blocks = x.chunks_exact_mut(2 * stride).zip(cos.chunks_exact(2 * stride)).zip(sin.chunks_exact(2 * stride));
    for ((x, cos), sin) in blocks {
        let (first, second) = x.split_at_mut(stride);
        for i in 0..stride {
            let (x1, x2) = (first[i], second[i]);
            first[i] = cos[i] * x1 + sign * sin[i] * x2;
            second[i] = cos[i + stride] * x2 + sign * sin[i + stride] * x1;
        }
    }
}

/// How many of `stages` stages of rows of `n` features go block by block.
fn stages_by_block(stages: usize, n: usize) -> usize {
    if n.is_multiple_of(BLOCK) { stages.min(BLOCK_STAGES) } else { 0 }
}

/// `x <- B x`.
#[inline(always)]
pub(super) fn rotate(x: &mut [f32], expert: Expert<'_>, stages: usize) {
    let n = x.len();
    let by_block = stages_by_block(stages, n);
    match by_block {
        0 => {}
        1 => rotate_blocks::<1>(x, expert),
        2 => rotate_blocks::<2>(x, expert),
        3 => rotate_blocks::<3>(x, expert),
        _ => rotate_blocks::<BLOCK_STAGES>(x, expert),
    }
    for l in by_block..stages {
        stage(x, &expert.cos[l * n..][..n], &expert.sin[l * n..][..n], 1 << l, 1.0);
    }
}

/// Undoes [`rotate`] for its output `y` and for the gradient `grad` of that output, adding to `sums [stages, n]` what
/// the gradients of the angles are differences of.
#[inline(always)]
pub(super) fn rotate_back(y: &mut [f32], grad: &mut [f32], sums: &mut [f32], expert: Expert<'_>, stages: usize) {
    let n = y.len();
    let by_block = stages_by_block(stages, n);
    for l in (by_block..stages).rev() {
        let stride = 1 << l;
        let (cos, sin) = (&expert.cos[l * n..][..n], &expert.sin[l * n..][..n]);
        for (i, sum) in sums[l * n..][..n].iter_mut().enumerate() {
            *sum += grad[i] * y[i ^ stride];
        }
        stage(y, cos, sin, stride, -1.0);
        stage(grad, cos, sin, stride, -1.0);
    }
    match by_block {
        0 => {}
        1 => return_blocks::<1>(y, grad, sums, expert),
        2 => return_blocks::<2>(y, grad, sums, expert),
        3 => return_blocks::<3>(y, grad, sums, expert),
        _ => return_blocks::<BLOCK_STAGES>(y, grad, sums, expert),
    }
}

impl CustomOp2 for Rotate {
    fn name(&self) -> &'static str {
        "rotate-rows"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        angles: &CpuStorage,
        angles_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let ((_, stages, _), (_, n)) = (angles_layout.shape().dims3()?, x_layout.shape().dims2()?);
        let (x, angles) = (slice(x, x_layout)?, slice(angles, angles_layout)?);
        let coefficients = Coefficients::new(angles, stages, n, self.grid);
        let mut y = Vec::with_capacity(self.experts.len() * n);
        vectorized(
            #[inline(always)]
            || {
                for (row, &expert) in self.experts.iter().enumerate() {
                    y.extend_from_slice(&x[row / self.copies * n..][..n]);
                    rotate(&mut y[row * n..], coefficients.of(expert), stages);
                }
            },
        );
        Ok(output(y, (self.experts.len(), n)))
    }

    fn bwd(&self, x: &Tensor, angles: &Tensor, y: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let ((_, stages, _), (_, n)) = (angles.dims3()?, x.dims2()?);
        let grad = grad.contiguous()?;
        let (angles_view, y_view, grad_view) = (view(angles)?, view(y)?, view(&grad)?);
        let coefficients = Coefficients::new(angles_view.values()?, stages, n, self.grid);
        let mut sums = coefficients.gradient_sums();
        let mut grad_x = vec![0.0; x.elem_count()];
        let (mut y_row, mut g_row) = (vec![0.0; n], vec![0.0; n]);
        let rows = y_view.values()?.chunks_exact(n).zip(grad_view.values()?.chunks_exact(n)).zip(self.experts.iter());
        vectorized(
            #[inline(always)]
            || {
                for (row, ((y, g), &expert)) in rows.enumerate() {
                    y_row.copy_from_slice(y);
                    g_row.copy_from_slice(g);
                    rotate_back(&mut y_row, &mut g_row, sums.of_mut(expert), coefficients.of(expert), stages);
                    let dx = &mut grad_x[row / self.copies * n..][..n];
                    for (dx, g) in dx.iter_mut().zip(&g_row) {
                        *dx += g;
                    }
                }
            },
        );
        let grad_angles = sums.angles();
        Ok((Some(tensor_like(grad_x, x)?), Some(tensor_like(grad_angles, angles)?)))
    }
}
