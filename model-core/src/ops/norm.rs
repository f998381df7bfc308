//! LayerNorm over the last axis.

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor};

use super::{last_dim, output, slice, tensor_like, view};
use crate::weights::LAYER_NORM_EPS;

/// `gamma * (x - mean) / sqrt(var + eps) + beta`, biased variance over the last axis of `x`.
pub fn layer_norm(x: &Tensor, gamma: &Tensor, beta: &Tensor) -> Result<Tensor> {
    x.contiguous()?.apply_op3(&gamma.contiguous()?, &beta.contiguous()?, LayerNorm)
}

struct LayerNorm;

/// Sums in eight lanes, so that the compiler may vectorise what strict left-to-right order forbids.
fn lane_sum(values: impl Iterator<Item = f32>) -> f32 {
    let mut lanes = [0f32; 8];
    for (i, v) in values.enumerate() {
        lanes[i % 8] += v;
    }
    lanes.iter().sum()
}

/// Mean and reciprocal standard deviation of a row.
fn moments(row: &[f32]) -> (f32, f32) {
    let n = row.len() as f32;
    let mean = lane_sum(row.iter().copied()) / n;
    let var = lane_sum(row.iter().map(|v| (v - mean) * (v - mean))) / n;
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
        let mut y = Vec::with_capacity(x.len());
        for row in x.chunks_exact(n) {
            let (mean, rstd) = moments(row);
            y.extend(row.iter().zip(gamma).zip(beta).map(|((v, g), b)| (v - mean) * rstd * g + b));
        }
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
        let (x_view, gamma_view, grad_view) = (view(x)?, view(gamma)?, view(&grad)?);
        let (x_values, gamma_values, g) = (x_view.values()?, gamma_view.values()?, grad_view.values()?);
        let n = gamma_values.len();
        let mut grad_x = vec![0.0; x_values.len()];
        let (mut grad_gamma, mut grad_beta) = (vec![0.0; n], vec![0.0; n]);
        // xhat = (x - mean) rstd;  dx = rstd (g gamma - mean(g gamma) - xhat mean(g gamma xhat)).
        for ((row, g), dx) in x_values.chunks_exact(n).zip(g.chunks_exact(n)).zip(grad_x.chunks_exact_mut(n)) {
            let (mean, rstd) = moments(row);
            let scaled = || g.iter().zip(gamma_values).map(|(g, gamma)| g * gamma);
            let mean_scaled = lane_sum(scaled()) / n as f32;
            let mean_product = lane_sum(scaled().zip(row).map(|(s, v)| s * (v - mean) * rstd)) / n as f32;
            for i in 0..n {
                let xhat = (row[i] - mean) * rstd;
                dx[i] = rstd * (g[i] * gamma_values[i] - mean_scaled - xhat * mean_product);
                grad_gamma[i] += g[i] * xhat;
                grad_beta[i] += g[i];
            }
        }
        Ok((Some(tensor_like(grad_x, x)?), Some(tensor_like(grad_gamma, gamma)?), Some(tensor_like(grad_beta, beta)?)))
    }
}
