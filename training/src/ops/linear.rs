//! `y = x W^T + b`.

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor};
use model_core::kernels::vectorized;

use super::{last_dim, output, slice, tensor_like, view};
use crate::matmul::{Mat, Write, matmul};

/// `x [.., in] -> [.., out]` with `weight [out, in]` and `bias [out]`.
pub fn linear(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
    x.contiguous()?.apply_op3(&weight.contiguous()?, &bias.contiguous()?, Linear)
}

struct Linear;

/// Fills the rows of `out` with `bias`, for a product to be added to.
pub(super) fn broadcast_bias(bias: &[f32], rows: usize) -> Vec<f32> {
    let mut out = Vec::with_capacity(bias.len() * rows);
    for _ in 0..rows {
        out.extend_from_slice(bias);
    }
    out
}

/// The sum of the rows of `grad`: the gradient of a bias.
pub(super) fn column_sums(grad: &[f32], cols: usize) -> Vec<f32> {
    let mut sums = vec![0.0; cols];
    vectorized(
        #[inline(always)]
        || {
            for row in grad.chunks_exact(cols) {
                for (sum, g) in sums.iter_mut().zip(row) {
                    *sum += g;
                }
            }
        },
    );
    sums
}

impl CustomOp3 for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
        bias: &CpuStorage,
        bias_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (n, k) = weight_layout.shape().dims2()?;
        let mut shape = x_layout.dims().to_vec();
        if last_dim(x_layout)? != k || bias_layout.dims() != [n] {
            candle_core::bail!(
                "linear: input {shape:?} and bias {:?} do not fit weight [{n}, {k}]",
                bias_layout.dims()
            );
        }
        let (x, weight, bias) = (slice(x, x_layout)?, slice(weight, weight_layout)?, slice(bias, bias_layout)?);
        let m = x.len() / k;
        let mut y = broadcast_bias(bias, m);
        matmul(Mat::new(x, m, k), Mat::new(weight, n, k).t(), 1.0, &mut y, n, Write::Add);
        if let Some(last) = shape.last_mut() {
            *last = n;
        }
        Ok(output(y, shape))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        _y: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (n, k) = weight.dims2()?;
        let grad = grad.contiguous()?;
        let (x_view, weight_view, grad_view) = (view(x)?, view(weight)?, view(&grad)?);
        let (x_values, weight_values, g) = (x_view.values()?, weight_view.values()?, grad_view.values()?);
        let m = g.len() / n;
        let grad_x = x.track_op().then(|| {
            let mut grad_x = vec![0.0; m * k];
            matmul(Mat::new(g, m, n), Mat::new(weight_values, n, k), 1.0, &mut grad_x, k, Write::Set);
            tensor_like(grad_x, x)
        });
        // Frozen weights, those of a backbone that is specialised, need none.
        let grad_weight = weight.track_op().then(|| {
            let mut grad_weight = vec![0.0; n * k];
            matmul(Mat::new(g, m, n).t(), Mat::new(x_values, m, k), 1.0, &mut grad_weight, k, Write::Set);
            tensor_like(grad_weight, weight)
        });
        let grad_bias = bias.track_op().then(|| tensor_like(column_sums(g, n), bias));
        Ok((grad_x.transpose()?, grad_weight.transpose()?, grad_bias.transpose()?))
    }
}
