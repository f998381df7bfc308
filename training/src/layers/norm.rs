//! LayerNorm with learned gain and offset.

use candle_core::{Result, Tensor};

use crate::ops;
use crate::parameters::Parameters;

/// LayerNorm over the last axis.
#[derive(Debug, Clone)]
pub struct LayerNorm {
    gamma: Tensor,
    beta: Tensor,
}

impl LayerNorm {
    /// The layer whose parameters are `name.gamma` and `name.beta`.
    pub fn new(parameters: &Parameters, name: &str) -> Result<Self> {
        Ok(Self { gamma: parameters.get(&format!("{name}.gamma"))?, beta: parameters.get(&format!("{name}.beta"))? })
    }

    /// `[.., features] -> [.., features]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        ops::layer_norm(x, &self.gamma, &self.beta)
    }

    /// [`LayerNorm::forward`], then GELU.
    pub fn forward_gelu(&self, x: &Tensor) -> Result<Tensor> {
        ops::layer_norm_gelu(x, &self.gamma, &self.beta)
    }
}
