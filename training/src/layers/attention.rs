//! Multi-head self-attention over a grid of tokens.

use candle_core::{Result, Tensor};

use super::Linear;
use crate::ops;
use crate::parameters::Parameters;

/// `proj(concat over heads of softmax(q k^T / sqrt(head_dim)) v)`.
#[derive(Debug, Clone)]
pub struct Attention {
    qkv: Linear,
    proj: Linear,
    num_heads: usize,
}

impl Attention {
    /// The layer whose parameters start with `name`.
    pub fn new(parameters: &Parameters, name: &str, num_heads: usize) -> Result<Self> {
        Ok(Self {
            qkv: Linear::new(parameters, &format!("{name}.qkv"))?,
            proj: Linear::new(parameters, &format!("{name}.proj"))?,
            num_heads,
        })
    }

    /// `[batch, tokens, d_model] -> [batch, tokens, d_model]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.proj.forward(&ops::attention(&self.qkv.forward(x)?, self.num_heads)?)
    }
}
