//! What the router adds to a layer: softmax, the weighted sum over chosen experts, and the smoothness of its choices.

use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Tensor};
use model_core::kernels::vectorized;

use super::elementwise::exp_nonpositive;
use super::norm::{lane_max, lane_sum};
use super::{last_dim, output, slice, tensor_like, view};

/// Softmax over the last axis.
pub fn softmax(x: &Tensor) -> Result<Tensor> {
    x.contiguous()?.apply_op1(Softmax)
}

struct Softmax;

#[inline(always)]
pub(super) fn softmax_row(row: &mut [f32]) {
    let max = lane_max(row);
    for v in row.iter_mut() {
        *v = exp_nonpositive(*v - max);
    }
    let scale = 1.0 / lane_sum(row, row, |v, _| v);
    for v in row.iter_mut() {
        *v *= scale;
    }
}

/// From the gradient of a row's probabilities `p` to that of its logits: `d <- p (d - sum(p d))`.
#[inline(always)]
pub(super) fn softmax_gradient(p: &[f32], d: &mut [f32]) {
    let dot = lane_sum(p, d, |p, d| p * d);
    for (d, p) in d.iter_mut().zip(p) {
        *d = p * (*d - dot);
    }
}

impl CustomOp1 for Softmax {
    fn name(&self) -> &'static str {
        "softmax"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let mut y = slice(x, layout)?.to_vec();
        let n = last_dim(layout)?;
        vectorized(
            #[inline(always)]
            || {
                for row in y.chunks_exact_mut(n) {
                    softmax_row(row);
                }
            },
        );
        Ok(output(y, layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let n = x.dim(candle_core::D::Minus1)?;
        let grad = grad.contiguous()?;
        let (y_view, grad_view) = (view(y)?, view(&grad)?);
        let mut grad_x = grad_view.values()?.to_vec();
        let y_values = y_view.values()?;
        vectorized(
            #[inline(always)]
            || {
                for (p, d) in y_values.chunks_exact(n).zip(grad_x.chunks_exact_mut(n)) {
                    softmax_gradient(p, d);
                }
            },
        );
        Ok(Some(tensor_like(grad_x, x)?))
    }
}

/// `sum_k weights[t, k] x[t * top_k + k]`: `x [tokens * top_k, n]`, `weights [tokens, top_k] -> [tokens, n]`.
pub fn combine(x: &Tensor, weights: &Tensor) -> Result<Tensor> {
    let ((rows, _), (tokens, top_k)) = (x.dims2()?, weights.dims2()?);
    if rows != tokens * top_k {
        candle_core::bail!("combine: {rows} rows for {tokens} tokens and top-{top_k}");
    }
    x.contiguous()?.apply_op2(&weights.contiguous()?, Combine)
}

struct Combine;

impl CustomOp2 for Combine {
    fn name(&self) -> &'static str {
        "combine"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weights: &CpuStorage,
        weights_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let n = last_dim(x_layout)?;
        let (tokens, top_k) = weights_layout.shape().dims2()?;
        let (x, weights) = (slice(x, x_layout)?, slice(weights, weights_layout)?);
        let mut y = vec![0.0; tokens * n];
        vectorized(
            #[inline(always)]
            || {
                for (row, (x, w)) in x.chunks_exact(n).zip(weights).enumerate() {
                    for (y, x) in y[row / top_k * n..][..n].iter_mut().zip(x) {
                        *y += w * x;
                    }
                }
            },
        );
        Ok(output(y, (tokens, n)))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weights: &Tensor,
        _y: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (n, top_k) = (x.dim(1)?, weights.dim(1)?);
        let grad = grad.contiguous()?;
        let (x_view, weights_view, grad_view) = (view(x)?, view(weights)?, view(&grad)?);
        let (x_values, weight_values, g) = (x_view.values()?, weights_view.values()?, grad_view.values()?);
        let mut grad_x = vec![0.0; x_values.len()];
        let mut grad_weights = vec![0.0; weight_values.len()];
        vectorized(
            #[inline(always)]
            || {
                let rows = x_values.chunks_exact(n).zip(weight_values);
                let grads = grad_x.chunks_exact_mut(n).zip(&mut grad_weights);
                for (row, ((x, w), (dx, dw))) in rows.zip(grads).enumerate() {
                    let g = &g[row / top_k * n..][..n];
                    for (dx, g) in dx.iter_mut().zip(g) {
                        *dx = w * g;
                    }
                    *dw = lane_sum(g, x, |g, x| g * x);
                }
            },
        );
        Ok((Some(tensor_like(grad_x, x)?), Some(tensor_like(grad_weights, weights)?)))
    }
}

/// Spatial smoothness (`golden/reference.py: smoothness_loss`): the mean over 4-neighbour patch pairs of the squared
/// distance between their router probabilities. `probabilities [batch, height * width, experts]` to a scalar, 0 for
/// a grid without neighbours.
pub fn smoothness(probabilities: &Tensor, height: usize, width: usize) -> Result<Tensor> {
    let (_, tokens, _) = probabilities.dims3()?;
    if tokens != height * width {
        candle_core::bail!("smoothness: {tokens} tokens are not a {height}x{width} grid");
    }
    probabilities.contiguous()?.apply_op1(Smoothness { height, width })
}

struct Smoothness {
    height: usize,
    width: usize,
}

impl Smoothness {
    /// Pairs of neighbouring patches (indices into the grid), across then down.
    fn pairs(&self) -> impl Iterator<Item = (usize, usize)> + '_ {
        let (height, width) = (self.height, self.width);
        let across = (0..height * width).filter(move |p| p % width + 1 < width).map(|p| (p, p + 1));
        let down = (0..height.saturating_sub(1) * width).map(move |p| (p, p + width));
        across.chain(down)
    }
}

impl CustomOp1 for Smoothness {
    fn name(&self) -> &'static str {
        "smoothness"
    }

    fn cpu_fwd(&self, p: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let experts = last_dim(layout)?;
        let (mut sum, mut count) = (0.0, 0usize);
        for image in slice(p, layout)?.chunks_exact(self.height * self.width * experts) {
            for (a, b) in self.pairs() {
                let (a, b) = (&image[a * experts..][..experts], &image[b * experts..][..experts]);
                sum += a.iter().zip(b).map(|(a, b)| f64::from((a - b) * (a - b))).sum::<f64>();
                count += 1;
            }
        }
        Ok(output(vec![(sum / count.max(1) as f64) as f32], ()))
    }

    fn bwd(&self, p: &Tensor, _loss: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let (batch, tokens, experts) = p.dims3()?;
        let view = view(p)?;
        let scale = 2.0 * grad.to_scalar::<f32>()? / (batch * self.pairs().count()).max(1) as f32;
        let mut grad_p = vec![0.0; p.elem_count()];
        let len = tokens * experts;
        let p_values = view.values()?;
        vectorized(
            #[inline(always)]
            || {
                for (p, d) in p_values.chunks_exact(len).zip(grad_p.chunks_exact_mut(len)) {
                    for (a, b) in self.pairs() {
                        // The first of a pair comes first in the grid.
                        let (until_b, from_b) = d.split_at_mut(b * experts);
                        let (da, db) = (&mut until_b[a * experts..][..experts], &mut from_b[..experts]);
                        let (pa, pb) = (&p[a * experts..][..experts], &p[b * experts..][..experts]);
                        for e in 0..experts {
                            let g = scale * (pa[e] - pb[e]);
                            da[e] += g;
                            db[e] -= g;
                        }
                    }
                }
            },
        );
        Ok(Some(tensor_like(grad_p, p)?))
    }
}
