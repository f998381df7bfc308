//! Gains: each row times the diagonal of its expert.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};

use super::{output, slice, tensor_like, view};

/// `gains[experts[r]] * x[r]`, elementwise: `x [rows, n]`, `gains [experts, n]`, one expert per row.
pub fn scale_rows(x: &Tensor, gains: &Tensor, experts: Arc<Vec<u16>>) -> Result<Tensor> {
    let ((rows, n), (num_experts, width)) = (x.dims2()?, gains.dims2()?);
    if n != width || rows != experts.len() || experts.iter().any(|&e| usize::from(e) >= num_experts) {
        candle_core::bail!("scale-rows: {rows} rows of {n}, {} choices, gains {:?}", experts.len(), gains.shape());
    }
    x.contiguous()?.apply_op2(&gains.contiguous()?, ScaleRows { experts })
}

struct ScaleRows {
    experts: Arc<Vec<u16>>,
}

impl CustomOp2 for ScaleRows {
    fn name(&self) -> &'static str {
        "scale-rows"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        gains: &CpuStorage,
        gains_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (_, n) = gains_layout.shape().dims2()?;
        let (x, gains) = (slice(x, x_layout)?, slice(gains, gains_layout)?);
        let mut y = Vec::with_capacity(x.len());
        for (x, &expert) in x.chunks_exact(n).zip(self.experts.iter()) {
            y.extend(x.iter().zip(&gains[usize::from(expert) * n..][..n]).map(|(x, gain)| x * gain));
        }
        Ok(output(y, x_layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, gains: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (_, n) = gains.dims2()?;
        let grad = grad.contiguous()?;
        let (x_view, gains_view, grad_view) = (view(x)?, view(gains)?, view(&grad)?);
        let (x_values, gain_values) = (x_view.values()?, gains_view.values()?);
        let mut grad_x = grad_view.values()?.to_vec();
        let mut grad_gains = vec![0.0; gain_values.len()];
        for ((g, x), &expert) in grad_x.chunks_exact_mut(n).zip(x_values.chunks_exact(n)).zip(self.experts.iter()) {
            let at = usize::from(expert) * n;
            let sums = grad_gains[at..][..n].iter_mut();
            for ((g, x), (sum, gain)) in g.iter_mut().zip(x).zip(sums.zip(&gain_values[at..][..n])) {
                *sum += *g * x;
                *g *= gain;
            }
        }
        Ok((Some(tensor_like(grad_x, x)?), Some(tensor_like(grad_gains, gains)?)))
    }
}
