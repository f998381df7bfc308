//! Multi-head self-attention over fused queries, keys and values.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};
use model_core::kernels::vectorized;

use super::routing::{softmax_gradient, softmax_row};
use super::{output, slice, tensor_like, view};
use crate::matmul::{Mat, Write, matmul};

/// `softmax(q k^T / sqrt(head_dim)) v` per head: `qkv [batch, tokens, 3 d_model] -> [batch, tokens, d_model]`.
/// The last axis holds q, then k, then v, each head by head. The backward pass recomputes the probabilities.
pub fn attention(qkv: &Tensor, num_heads: usize) -> Result<Tensor> {
    qkv.contiguous()?.apply_op1(Attention { num_heads })
}

struct Attention {
    num_heads: usize,
}

#[derive(Clone, Copy)]
struct Sizes {
    batch: usize,
    tokens: usize,
    d_model: usize,
    head_dim: usize,
}

impl Sizes {
    fn scale(self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }

    /// The `[tokens, head_dim]` matrix of one head; `part` is 0, 1, 2 for q, k, v.
    fn head(self, image: &[f32], part: usize, head: usize) -> Mat<'_> {
        Mat::strided(&image[part * self.d_model + head * self.head_dim..], self.tokens, self.head_dim, 3 * self.d_model)
    }

    /// The attention probabilities `[tokens, tokens]` of one head.
    fn probabilities(self, image: &[f32], head: usize, out: &mut [f32]) {
        let (q, k) = (self.head(image, 0, head), self.head(image, 1, head));
        matmul(q, k.t(), self.scale(), out, self.tokens, Write::Set);
        vectorized(
            #[inline(always)]
            || {
                for row in out.chunks_exact_mut(self.tokens) {
                    softmax_row(row);
                }
            },
        );
    }
}

impl Attention {
    fn sizes(&self, dims: &[usize]) -> Result<Sizes> {
        let &[batch, tokens, width] = dims else {
            candle_core::bail!("attention: input {dims:?} is not [batch, tokens, 3 d_model]")
        };
        if width % (3 * self.num_heads) != 0 {
            candle_core::bail!("attention: {} heads do not divide a width of {width}", self.num_heads);
        }
        Ok(Sizes { batch, tokens, d_model: width / 3, head_dim: width / 3 / self.num_heads })
    }
}

impl CustomOp1 for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(&self, qkv: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let sizes = self.sizes(layout.dims())?;
        let Sizes { batch, tokens, d_model, head_dim } = sizes;
        let qkv = slice(qkv, layout)?;
        let mut y = vec![0.0; batch * tokens * d_model];
        let mut p = vec![0.0; tokens * tokens];
        for (image, y) in qkv.chunks_exact(tokens * 3 * d_model).zip(y.chunks_exact_mut(tokens * d_model)) {
            for head in 0..self.num_heads {
                sizes.probabilities(image, head, &mut p);
                let v = sizes.head(image, 2, head);
                matmul(Mat::new(&p, tokens, tokens), v, 1.0, &mut y[head * head_dim..], d_model, Write::Set);
            }
        }
        Ok(output(y, (batch, tokens, d_model)))
    }

    fn bwd(&self, qkv: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let sizes = self.sizes(qkv.dims())?;
        let Sizes { tokens, d_model, head_dim, .. } = sizes;
        let grad = grad.contiguous()?;
        let (qkv_view, grad_view) = (view(qkv)?, view(&grad)?);
        let mut grad_qkv = vec![0.0; qkv.elem_count()];
        let (mut p, mut dp) = (vec![0.0; tokens * tokens], vec![0.0; tokens * tokens]);
        let stride = 3 * d_model;
        let images = qkv_view.values()?.chunks_exact(tokens * stride);
        for ((image, dy), dqkv) in images
            .zip(grad_view.values()?.chunks_exact(tokens * d_model))
            .zip(grad_qkv.chunks_exact_mut(tokens * stride))
        {
            for head in 0..self.num_heads {
                sizes.probabilities(image, head, &mut p);
                let dy = Mat::strided(&dy[head * head_dim..], tokens, head_dim, d_model);
                let [q, k, v] = [0, 1, 2].map(|part| sizes.head(image, part, head));
                let at = |part: usize| part * d_model + head * head_dim;
                matmul(Mat::new(&p, tokens, tokens).t(), dy, 1.0, &mut dqkv[at(2)..], stride, Write::Set);
                matmul(dy, v.t(), 1.0, &mut dp, tokens, Write::Set);
                vectorized(
                    #[inline(always)]
                    || {
                        for (p, dp) in p.chunks_exact(tokens).zip(dp.chunks_exact_mut(tokens)) {
                            softmax_gradient(p, dp);
                        }
                    },
                );
                let ds = Mat::new(&dp, tokens, tokens);
                matmul(ds, k, sizes.scale(), &mut dqkv[at(0)..], stride, Write::Set);
                matmul(ds.t(), q, sizes.scale(), &mut dqkv[at(1)..], stride, Write::Set);
            }
        }
        Ok(Some(tensor_like(grad_qkv, qkv)?))
    }
}
