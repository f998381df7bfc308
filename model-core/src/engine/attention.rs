//! Attention of one head of one image: `softmax(q k^T / sqrt(head_dim)) v`, f32.

use super::lines::Lines;
use crate::kernels::Isa;
use crate::kernels::gemm::float::{Rows, RowsMut, matmul_panels, panels_len, panels_mut, whole_panels_mut};
use crate::kernels::softmax::softmax;
use crate::kernels::transpose::transpose;

/// Queries whose scores are held at a time.
const QUERIES: usize = 32;

#[derive(Debug)]
pub(super) struct AttentionScratch {
    /// k as the weights of a product, `[tokens, head_dim]` in panels.
    keys: Lines,
    /// v^T as the weights of a product, `[head_dim, tokens]` in panels.
    values: Lines,
    /// Scores of a few queries, `[QUERIES, tokens]`.
    scores: Lines,
}

impl AttentionScratch {
    pub(super) fn new(tokens: usize, head_dim: usize) -> Self {
        Self {
            keys: Lines::new(panels_len(tokens, head_dim)),
            values: Lines::new(panels_len(head_dim, tokens)),
            scores: Lines::new(QUERIES.min(tokens) * tokens),
        }
    }

    pub(super) fn heap_bytes(&self) -> usize {
        (self.keys.capacity() + self.values.capacity() + self.scores.capacity()) * size_of::<f32>()
    }
}

/// One head of one image; `qkv` is `[tokens, 3 d_model]`.
pub(super) struct Head<'a> {
    pub isa: Isa,
    pub qkv: &'a [f32],
    pub tokens: usize,
    pub d_model: usize,
    pub head_dim: usize,
    pub head: usize,
}

impl Head<'_> {
    /// Writes the result into `out` `[tokens, head_dim]`.
    pub(super) fn forward(&self, scratch: &mut AttentionScratch, out: &mut [f32]) {
        let Self { isa, qkv, tokens, d_model, head_dim, head } = *self;
        let stride = 3 * d_model;
        let part = |which: usize| &qkv[which * d_model + head * head_dim..];
        self.pack_keys(part(1), &mut scratch.keys);
        self.pack_values(part(2), &mut scratch.values);
        let scale = 1.0 / (head_dim as f32).sqrt();
        for first in (0..tokens).step_by(QUERIES) {
            let queries = QUERIES.min(tokens - first);
            let scores = &mut scratch.scores[..queries * tokens];
            let lhs = Rows { data: &part(0)[first * stride..], stride };
            let product = RowsMut { data: scores, stride: tokens };
            matmul_panels(isa, queries, lhs, &scratch.keys, None, tokens, head_dim, product);
            softmax(isa, scores, tokens, tokens, scale);
            let lhs = Rows { data: scores, stride: tokens };
            let product = RowsMut { data: &mut out[first * head_dim..], stride: head_dim };
            matmul_panels(isa, queries, lhs, &scratch.values, None, head_dim, tokens, product);
        }
    }

    fn pack_keys(&self, k: &[f32], panels: &mut [f32]) {
        let (head_dim, stride) = (self.head_dim, 3 * self.d_model);
        for (first, width, panel) in whole_panels_mut(self.tokens, head_dim, panels) {
            let from = Rows { data: &k[first * stride..], stride };
            transpose(self.isa, [width, head_dim], from, RowsMut { data: panel, stride: width });
        }
    }

    fn pack_values(&self, v: &[f32], panels: &mut [f32]) {
        let stride = 3 * self.d_model;
        for (first, rows) in panels_mut(self.head_dim, self.tokens, panels) {
            for (token, values) in rows.enumerate() {
                values.copy_from_slice(&v[token * stride + first..][..values.len()]);
            }
        }
    }
}
