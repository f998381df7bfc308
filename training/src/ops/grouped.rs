//! Products with a matrix per expert: rows are sorted by expert, so that each expert runs one matrix product.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};

use super::{output, slice, tensor_like, view};
use crate::matmul::{Mat, Write, matmul};

/// Sends each row of `x [rows, in]` to its experts: output row r is `weight[experts[r]] x[r / copies]`, with `weight
/// [experts, out, in]` and `experts [rows * copies]`. Returns `[rows * copies, out]`.
pub fn expert_linear(x: &Tensor, weight: &Tensor, experts: Arc<Vec<u16>>) -> Result<Tensor> {
    let ((num_experts, _, k), (rows, width)) = (weight.dims3()?, x.dims2()?);
    if width != k || !experts.len().is_multiple_of(rows.max(1)) {
        candle_core::bail!("expert-linear: {rows} rows of {width}, {} choices, weight {k} wide", experts.len());
    }
    if experts.iter().any(|&e| usize::from(e) >= num_experts) {
        candle_core::bail!("expert-linear: an expert id is not below {num_experts}");
    }
    let copies = experts.len() / rows.max(1);
    x.contiguous()?
        .apply_op2(&weight.contiguous()?, ExpertLinear { groups: Groups::new(&experts, num_experts), copies })
}

struct ExpertLinear {
    groups: Groups,
    copies: usize,
}

struct Groups {
    /// Row numbers, those of expert 0 first.
    order: Vec<usize>,
    /// Rows of each expert.
    counts: Vec<usize>,
}

impl Groups {
    fn new(experts: &[u16], num_experts: usize) -> Self {
        let mut order: Vec<usize> = (0..experts.len()).collect();
        // Stable, so that the order of summation is that of the rows.
        order.sort_by_key(|&row| experts[row]);
        let mut counts = vec![0; num_experts];
        experts.iter().for_each(|&e| counts[usize::from(e)] += 1);
        Self { order, counts }
    }

    /// (expert, its rows among the sorted ones) of every expert that has any.
    fn iter(&self) -> impl Iterator<Item = (usize, std::ops::Range<usize>)> + '_ {
        let mut end = 0;
        let ranges = self.counts.iter().map(move |&count| {
            end += count;
            end - count..end
        });
        ranges.enumerate().filter(|(_, range)| !range.is_empty())
    }

    /// The rows of `from`, `width` wide, in sorted order; row r is taken from `from[r / copies]`.
    fn gather(&self, from: &[f32], width: usize, copies: usize) -> Vec<f32> {
        let mut sorted = Vec::with_capacity(self.order.len() * width);
        for row in &self.order {
            sorted.extend_from_slice(&from[row / copies * width..][..width]);
        }
        sorted
    }
}

impl CustomOp2 for ExpertLinear {
    fn name(&self) -> &'static str {
        "expert-linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (_, n, k) = weight_layout.shape().dims3()?;
        let (x, weight) = (slice(x, x_layout)?, slice(weight, weight_layout)?);
        let sorted = self.groups.gather(x, k, self.copies);
        let rows = self.groups.order.len();
        let (mut products, mut y) = (vec![0.0; rows * n], vec![0.0; rows * n]);
        for (expert, range) in self.groups.iter() {
            let (m, start) = (range.len(), range.start);
            let matrix = Mat::new(&weight[expert * n * k..], n, k).t();
            matmul(Mat::new(&sorted[start * k..], m, k), matrix, 1.0, &mut products[start * n..], n, Write::Set);
        }
        for (product, row) in products.chunks_exact(n).zip(&self.groups.order) {
            y[row * n..][..n].copy_from_slice(product);
        }
        Ok(output(y, (rows, n)))
    }

    fn bwd(&self, x: &Tensor, weight: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (_, n, k) = weight.dims3()?;
        let grad = grad.contiguous()?;
        let (x_view, weight_view, grad_view) = (view(x)?, view(weight)?, view(&grad)?);
        let weight_values = weight_view.values()?;
        let sorted = self.groups.gather(x_view.values()?, k, self.copies);
        let g = self.groups.gather(grad_view.values()?, n, 1);
        let mut sorted_grad_x = vec![0.0; sorted.len()];
        let mut grad_weight = vec![0.0; weight_values.len()];
        for (expert, range) in self.groups.iter() {
            let (m, start) = (range.len(), range.start);
            let (g, x) = (Mat::new(&g[start * n..], m, n), Mat::new(&sorted[start * k..], m, k));
            let matrix = Mat::new(&weight_values[expert * n * k..], n, k);
            matmul(g, matrix, 1.0, &mut sorted_grad_x[start * k..], k, Write::Set);
            matmul(g.t(), x, 1.0, &mut grad_weight[expert * n * k..], k, Write::Set);
        }
        let mut grad_x = vec![0.0; x.elem_count()];
        for (gradient, row) in sorted_grad_x.chunks_exact(k).zip(&self.groups.order) {
            for (sum, g) in grad_x[row / self.copies * k..][..k].iter_mut().zip(gradient) {
                *sum += g;
            }
        }
        Ok((Some(tensor_like(grad_x, x)?), Some(tensor_like(grad_weight, weight)?)))
    }
}
