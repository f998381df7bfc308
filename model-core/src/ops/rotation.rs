//! Butterfly rotation of rows, each by the angles of its own expert.
//!
//! A stage is written over whole features instead of pairs: `y[i] = c[i] x[i] + s[i] x[i ^ stride]`, with `s` negative
//! on the first half of each block, so that the short strides vectorise too. A rotation is inverted by its transpose,
//! so the backward pass walks the stages from the output and stores no intermediate.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};

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
    fn snap(self, angle: f32) -> f64 {
        match self {
            Self::Continuous => f64::from(angle),
            Self::Bits(bits) => {
                let step = std::f64::consts::TAU / f64::from(1u32 << bits);
                (f64::from(angle) / step).round_ties_even() * step
            }
        }
    }
}

/// Rotates each row of `x [rows, n]` once for every expert it is sent to.
///
/// `angles` is `[experts, stages, n / 2]` in radians; `experts` is `[rows * copies]`, and output row r is
/// `B(angles[experts[r]]) x[r / copies]`. Returns `[rows * copies, n]`.
pub fn rotate_rows(x: &Tensor, angles: &Tensor, experts: Arc<Vec<u16>>, grid: AngleGrid) -> Result<Tensor> {
    let (num_experts, stages, half) = angles.dims3()?;
    let (rows, n) = x.dims2()?;
    if n != 2 * half || n % (1 << stages) != 0 || !experts.len().is_multiple_of(rows.max(1)) {
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
struct Coefficients {
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl Coefficients {
    fn new(angles: &[f32], stages: usize, n: usize, grid: AngleGrid) -> Self {
        let mut this = Self { cos: vec![0.0; angles.len() * 2], sin: vec![0.0; angles.len() * 2] };
        let rows = angles.chunks_exact(n / 2).zip(this.cos.chunks_exact_mut(n)).zip(this.sin.chunks_exact_mut(n));
        for (row, ((angles, cos), sin)) in rows.enumerate() {
            let stride = 1 << (row % stages.max(1));
            for (pair, &angle) in angles.iter().enumerate() {
                let first = pair / stride * 2 * stride + pair % stride;
                let (s, c) = grid.snap(angle).sin_cos();
                (cos[first], cos[first + stride]) = (c as f32, c as f32);
                (sin[first], sin[first + stride]) = (-s as f32, s as f32);
            }
        }
        this
    }
}

const BLOCK: usize = 16;

/// `x[i] <- c[i] x[i] + sign s[i] x[i ^ stride]`, `sign` 1 for the rotation and -1 for its transpose.
fn stage(x: &mut [f32], cos: &[f32], sin: &[f32], stride: usize, sign: f32) {
    match stride {
        1 if x.len().is_multiple_of(BLOCK) => short_stage::<1>(x, cos, sin, sign),
        2 if x.len().is_multiple_of(BLOCK) => short_stage::<2>(x, cos, sin, sign),
        4 if x.len().is_multiple_of(BLOCK) => short_stage::<4>(x, cos, sin, sign),
        8 if x.len().is_multiple_of(BLOCK) => short_stage::<8>(x, cos, sin, sign),
        _ => {
            let blocks =
                x.chunks_exact_mut(2 * stride).zip(cos.chunks_exact(2 * stride)).zip(sin.chunks_exact(2 * stride));
            for ((x, cos), sin) in blocks {
                let (first, second) = x.split_at_mut(stride);
                for i in 0..stride {
                    let (x1, x2) = (first[i], second[i]);
                    first[i] = cos[i] * x1 + sign * sin[i] * x2;
                    second[i] = cos[i] * x2 + sign * sin[stride + i] * x1;
                }
            }
        }
    }
}

/// `v[i ^ STRIDE]` for every i, spelled out so that the compiler sees one shuffle instead of a gather.
#[inline(always)]
fn swapped<const STRIDE: usize>(v: &[f32; BLOCK]) -> [f32; BLOCK] {
    let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = *v;
    match STRIDE {
        1 => [b, a, d, c, f, e, h, g, j, i, l, k, n, m, p, o],
        2 => [c, d, a, b, g, h, e, f, k, l, i, j, o, p, m, n],
        4 => [e, f, g, h, a, b, c, d, m, n, o, p, i, j, k, l],
        8 => [i, j, k, l, m, n, o, p, a, b, c, d, e, f, g, h],
        _ => unreachable!("strides of whole blocks do not come here"),
    }
}

fn short_stage<const STRIDE: usize>(x: &mut [f32], cos: &[f32], sin: &[f32], sign: f32) {
    let blocks =
        x.as_chunks_mut::<BLOCK>().0.iter_mut().zip(cos.as_chunks::<BLOCK>().0).zip(sin.as_chunks::<BLOCK>().0);
    for ((x, cos), sin) in blocks {
        // Without this the loop vectoriser fuses blocks into gathers, eight times slower than one shuffle per block.
        let x = std::hint::black_box(x);
        let partner = swapped::<STRIDE>(x);
        for i in 0..BLOCK {
            x[i] = cos[i] * x[i] + sign * sin[i] * partner[i];
        }
    }
}

/// `sums[i] += grad[i] y[i ^ stride]`: what the angle's gradient is the pairwise difference of.
fn accumulate(sums: &mut [f32], grad: &[f32], y: &[f32], stride: usize) {
    match stride {
        1 if y.len().is_multiple_of(BLOCK) => short_accumulate::<1>(sums, grad, y),
        2 if y.len().is_multiple_of(BLOCK) => short_accumulate::<2>(sums, grad, y),
        4 if y.len().is_multiple_of(BLOCK) => short_accumulate::<4>(sums, grad, y),
        8 if y.len().is_multiple_of(BLOCK) => short_accumulate::<8>(sums, grad, y),
        _ => {
            for i in 0..y.len() {
                sums[i] += grad[i] * y[i ^ stride];
            }
        }
    }
}

fn short_accumulate<const STRIDE: usize>(sums: &mut [f32], grad: &[f32], y: &[f32]) {
    let blocks =
        sums.as_chunks_mut::<BLOCK>().0.iter_mut().zip(grad.as_chunks::<BLOCK>().0).zip(y.as_chunks::<BLOCK>().0);
    for ((sums, grad), y) in blocks {
        let y = std::hint::black_box(y);
        let partner = swapped::<STRIDE>(y);
        for i in 0..BLOCK {
            sums[i] += grad[i] * partner[i];
        }
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
        let (_, stages, half) = angles_layout.shape().dims3()?;
        let n = 2 * half;
        let (x, angles) = (slice(x, x_layout)?, slice(angles, angles_layout)?);
        let coefficients = Coefficients::new(angles, stages, n, self.grid);
        let mut y = Vec::with_capacity(self.experts.len() * n);
        for (row, &expert) in self.experts.iter().enumerate() {
            y.extend_from_slice(&x[row / self.copies * n..][..n]);
            let y = &mut y[row * n..];
            for l in 0..stages {
                let at = (usize::from(expert) * stages + l) * n;
                stage(y, &coefficients.cos[at..at + n], &coefficients.sin[at..at + n], 1 << l, 1.0);
            }
        }
        Ok(output(y, (self.experts.len(), n)))
    }

    fn bwd(&self, x: &Tensor, angles: &Tensor, y: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (_, stages, half) = angles.dims3()?;
        let n = 2 * half;
        let grad = grad.contiguous()?;
        let (angles_view, y_view, grad_view) = (view(angles)?, view(y)?, view(&grad)?);
        let angle_values = angles_view.values()?;
        let coefficients = Coefficients::new(angle_values, stages, n, self.grid);
        let mut sums = vec![0.0; angle_values.len() * 2];
        let mut grad_x = vec![0.0; x.elem_count()];
        let (mut y_row, mut g_row) = (vec![0.0; n], vec![0.0; n]);
        let rows = y_view.values()?.chunks_exact(n).zip(grad_view.values()?.chunks_exact(n)).zip(self.experts.iter());
        for (row, ((y, g), &expert)) in rows.enumerate() {
            y_row.copy_from_slice(y);
            g_row.copy_from_slice(g);
            for l in (0..stages).rev() {
                let at = (usize::from(expert) * stages + l) * n;
                let (cos, sin) = (&coefficients.cos[at..at + n], &coefficients.sin[at..at + n]);
                // dy1/dangle = -y2 and dy2/dangle = y1, in terms of this stage's output.
                accumulate(&mut sums[at..at + n], &g_row, &y_row, 1 << l);
                stage(&mut y_row, cos, sin, 1 << l, -1.0);
                stage(&mut g_row, cos, sin, 1 << l, -1.0);
            }
            let dx = &mut grad_x[row / self.copies * n..][..n];
            for (dx, g) in dx.iter_mut().zip(&g_row) {
                *dx += g;
            }
        }
        let mut grad_angles = vec![0.0; angle_values.len()];
        for (row, (sums, grads)) in sums.chunks_exact(n).zip(grad_angles.chunks_exact_mut(half)).enumerate() {
            let stride = 1 << (row % stages.max(1));
            for (pair, grad) in grads.iter_mut().enumerate() {
                let first = pair / stride * 2 * stride + pair % stride;
                *grad = sums[first + stride] - sums[first];
            }
        }
        Ok((Some(tensor_like(grad_x, x)?), Some(tensor_like(grad_angles, angles)?)))
    }
}
