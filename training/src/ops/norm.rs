//! LayerNorm over the last axis, alone or with the GELU that follows it in a stem.

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor};
use model_core::kernels::vectorized;

use super::elementwise::normal;
use super::{last_dim, output, slice, tensor_like, view};
use model_core::weights::LAYER_NORM_EPS;

/// `gamma * (x - mean) / sqrt(var + eps) + beta`, biased variance over the last axis of `x`.
pub fn layer_norm(x: &Tensor, gamma: &Tensor, beta: &Tensor) -> Result<Tensor> {
    x.contiguous()?.apply_op3(&gamma.contiguous()?, &beta.contiguous()?, LayerNorm { gelu: false })
}

/// `gelu(layer_norm(x))` in one pass: the pair stands behind every convolution of a stem, on its largest tensors.
pub fn layer_norm_gelu(x: &Tensor, gamma: &Tensor, beta: &Tensor) -> Result<Tensor> {
    x.contiguous()?.apply_op3(&gamma.contiguous()?, &beta.contiguous()?, LayerNorm { gelu: true })
}

struct LayerNorm {
    gelu: bool,
}

/// Sums of `f` over pairs, in sixteen lanes, so that the compiler may vectorise what
/// strict left-to-right order forbids.
#[inline(always)]
pub(super) fn lane_sum(a: &[f32], b: &[f32], f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [0f32; 16];
    let (a_blocks, a_rest) = a.as_chunks::<16>();
    let (b_blocks, b_rest) = b.as_chunks::<16>();
    for (a, b) in a_blocks.iter().zip(b_blocks) {
        for i in 0..16 {
            lanes[i] += f(a[i], b[i]);
        }
    }
    lanes.iter().sum::<f32>() + a_rest.iter().zip(b_rest).map(|(&a, &b)| f(a, b)).sum::<f32>()
}

/// The largest value, in lanes as [`lane_sum`].
#[inline(always)]
pub(super) fn lane_max(values: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; 16];
    let (blocks, rest) = values.as_chunks::<16>();
    for block in blocks {
        for i in 0..16 {
            lanes[i] = if block[i] > lanes[i] { block[i] } else { lanes[i] };
        }
    }
    lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |max, &v| if v > max { v } else { max })
}

/// Mean and reciprocal standard deviation of a row.
#[inline(always)]
fn moments(row: &[f32]) -> (f32, f32) {
    let n = row.len() as f32;
    let mean = lane_sum(row, row, |v, _| v) / n;
    let var = lane_sum(row, row, |v, _| (v - mean) * (v - mean)) / n;
    (mean, 1.0 / (var + LAYER_NORM_EPS).sqrt())
}

impl CustomOp3 for LayerNorm {
    fn name(&self) -> &'static str {
        "layer-norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        gamma: &CpuStorage,
        gamma_layout: &Layout,
        beta: &CpuStorage,
        beta_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let n = last_dim(x_layout)?;
        let (x, gamma, beta) = (slice(x, x_layout)?, slice(gamma, gamma_layout)?, slice(beta, beta_layout)?);
        if gamma.len() != n || beta.len() != n {
            candle_core::bail!("layer-norm: {} gammas and {} betas for {n} features", gamma.len(), beta.len());
        }
        let mut y = vec![0.0; x.len()];
        vectorized(
            #[inline(always)]
            || {
                for (row, y) in x.chunks_exact(n).zip(y.chunks_exact_mut(n)) {
                    let (mean, rstd) = moments(row);
                    for (((y, v), g), b) in y.iter_mut().zip(row).zip(gamma).zip(beta) {
                        *y = (v - mean) * rstd * g + b;
                    }
                    if self.gelu {
                        y.iter_mut().for_each(|v| *v *= normal(*v).0);
                    }
                }
            },
        );
        Ok(output(y, x_layout.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        gamma: &Tensor,
        beta: &Tensor,
        _y: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        let (x_view, gamma_view, beta_view, grad_view) = (view(x)?, view(gamma)?, view(beta)?, view(&grad)?);
        let (x_values, g) = (x_view.values()?, grad_view.values()?);
        let (gamma_values, beta_values) = (gamma_view.values()?, beta_view.values()?);
        let n = gamma_values.len();
        let mut grad_x = vec![0.0; x_values.len()];
        let (mut grad_gamma, mut grad_beta, mut scaled) = (vec![0.0; n], vec![0.0; n], vec![0.0; n]);
        let mut grad_norm = vec![0.0; n];
        // xhat = (x - mean) rstd;  dx = rstd (g gamma - mean(g gamma) - xhat mean(g gamma xhat)).
        vectorized(
            #[inline(always)]
            || {
                let (grad_gamma, grad_beta, scaled) = (&mut grad_gamma[..n], &mut grad_beta[..n], &mut scaled[..n]);
                let grad_norm = &mut grad_norm[..n];
                let (gamma_values, beta_values) = (&gamma_values[..n], &beta_values[..n]);
                for ((row, g), dx) in x_values.chunks_exact(n).zip(g.chunks_exact(n)).zip(grad_x.chunks_exact_mut(n)) {
                    let (row, g, dx) = (&row[..n], &g[..n], &mut dx[..n]);
                    let (mean, rstd) = moments(row);
                    let g: &[f32] = if self.gelu {
                        for (i, out) in grad_norm.iter_mut().enumerate() {
                            let v = (row[i] - mean) * rstd * gamma_values[i] + beta_values[i];
                            let (cumulative, density) = normal(v);
                            *out = g[i] * (cumulative + v * density);
                        }
                        &grad_norm[..n]
                    } else {
                        g
                    };
                    for (scaled, (g, gamma)) in scaled.iter_mut().zip(g.iter().zip(gamma_values)) {
                        *scaled = g * gamma;
                    }
                    let mean_scaled = lane_sum(scaled, scaled, |s, _| s) / n as f32;
                    let mean_product = lane_sum(scaled, row, |s, v| s * (v - mean)) * rstd / n as f32;
                    for i in 0..n {
                        let xhat = (row[i] - mean) * rstd;
                        dx[i] = rstd * (scaled[i] - mean_scaled - xhat * mean_product);
                        grad_gamma[i] += g[i] * xhat;
                        grad_beta[i] += g[i];
                    }
                }
            },
        );
        Ok((Some(tensor_like(grad_x, x)?), Some(tensor_like(grad_gamma, gamma)?), Some(tensor_like(grad_beta, beta)?)))
    }
}
