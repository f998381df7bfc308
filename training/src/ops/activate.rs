//! The steps between the two substrate products of an expert layer, in one pass over the rows: the hidden rotation,
//! GELU, and the weighted sum over a token's experts. As three ops, the layer's largest tensors would go through memory
//! a dozen times; here a row stays in the nearest cache, and the backward pass rotates it again.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor};
use model_core::kernels::vectorized;

use super::elementwise::normal;
use super::norm::lane_sum;
use super::rotation::{AngleGrid, Coefficients, rotate, rotate_back};
use super::{output, slice, tensor_like, view};

/// `sum_k weights[t, k] gelu(B(angles[experts[t, k]]) h[t, k])`: `h [tokens * top_k, n]`, `angles [experts, stages, n / 2]`
/// in radians, `weights [tokens, top_k] -> [tokens, n]`.
pub fn activate(
    h: &Tensor,
    angles: &Tensor,
    weights: &Tensor,
    experts: Arc<Vec<u16>>,
    grid: AngleGrid,
) -> Result<Tensor> {
    let ((num_experts, stages, half), (rows, n), (tokens, top_k)) = (angles.dims3()?, h.dims2()?, weights.dims2()?);
    if half != n / 2 || n % (1 << stages) != 0 || rows != tokens * top_k || rows != experts.len() {
        candle_core::bail!("activate: {rows} rows of {n}, {} choices, angles {:?}", experts.len(), angles.shape());
    }
    if experts.iter().any(|&e| usize::from(e) >= num_experts) {
        candle_core::bail!("activate: an expert id is not below {num_experts}");
    }
    h.contiguous()?.apply_op3(&angles.contiguous()?, &weights.contiguous()?, Activate { experts, grid })
}

struct Activate {
    experts: Arc<Vec<u16>>,
    grid: AngleGrid,
}

impl CustomOp3 for Activate {
    fn name(&self) -> &'static str {
        "activate"
    }

    fn cpu_fwd(
        &self,
        h: &CpuStorage,
        h_layout: &Layout,
        angles: &CpuStorage,
        angles_layout: &Layout,
        weights: &CpuStorage,
        weights_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let ((_, stages, _), (_, n)) = (angles_layout.shape().dims3()?, h_layout.shape().dims2()?);
        let (tokens, top_k) = weights_layout.shape().dims2()?;
        let (h, angles, weights) =
            (slice(h, h_layout)?, slice(angles, angles_layout)?, slice(weights, weights_layout)?);
        let coefficients = Coefficients::new(angles, stages, n, self.grid);
        let (mut y, mut z) = (vec![0.0; tokens * n], vec![0.0; n]);
        vectorized(
            #[inline(always)]
            || {
                let z = &mut z[..n];
                for (row, ((h, &w), &expert)) in h.chunks_exact(n).zip(weights).zip(self.experts.iter()).enumerate() {
                    z.copy_from_slice(h);
                    rotate(z, coefficients.of(expert), stages);
                    for (y, &z) in y[row / top_k * n..][..n].iter_mut().zip(&*z) {
                        *y += w * (z * normal(z).0);
                    }
                }
            },
        );
        Ok(output(y, (tokens, n)))
    }

    fn bwd(
        &self,
        h: &Tensor,
        angles: &Tensor,
        weights: &Tensor,
        _y: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let ((_, stages, _), (_, n), (_, top_k)) = (angles.dims3()?, h.dims2()?, weights.dims2()?);
        let grad = grad.contiguous()?;
        let (h_view, angles_view, weights_view, grad_view) = (view(h)?, view(angles)?, view(weights)?, view(&grad)?);
        let (h_values, weight_values, g) = (h_view.values()?, weights_view.values()?, grad_view.values()?);
        let coefficients = Coefficients::new(angles_view.values()?, stages, n, self.grid);
        let mut sums = coefficients.gradient_sums();
        let mut grad_h = vec![0.0; h_values.len()];
        let mut grad_weights = vec![0.0; weight_values.len()];
        let (mut z, mut a) = (vec![0.0; n], vec![0.0; n]);
        vectorized(
            #[inline(always)]
            || {
                let (z, a) = (&mut z[..n], &mut a[..n]);
                let rows = h_values.chunks_exact(n).zip(weight_values).zip(self.experts.iter());
                let grads = grad_h.chunks_exact_mut(n).zip(&mut grad_weights);
                for (row, (((h, &w), &expert), (dz, dw))) in rows.zip(grads).enumerate() {
                    let (g, dz) = (&g[row / top_k * n..][..n], &mut dz[..n]);
                    z.copy_from_slice(h);
                    rotate(z, coefficients.of(expert), stages);
                    for i in 0..n {
                        let (cumulative, density) = normal(z[i]);
                        a[i] = z[i] * cumulative;
                        dz[i] = w * g[i] * (cumulative + z[i] * density);
                    }
                    *dw = lane_sum(g, a, |g, a| g * a);
                    rotate_back(z, dz, sums.of_mut(expert), coefficients.of(expert), stages);
                }
            },
        );
        let grad_angles = sums.angles();
        Ok((
            Some(tensor_like(grad_h, h)?),
            Some(tensor_like(grad_angles, angles)?),
            Some(tensor_like(grad_weights, weights)?),
        ))
    }
}
