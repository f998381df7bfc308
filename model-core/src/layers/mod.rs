//! The layers of the candle model, each `new(parameters, ..) -> forward`.

mod attention;
mod expert;
mod norm;
mod stem;

pub use attention::Attention;
pub use expert::{ButterflyMoe, Routing};
pub use norm::LayerNorm;
pub use stem::Stem;

use candle_core::{Result, Tensor};

use crate::ops;
use crate::vit::Parameters;

/// `y = x W^T + b`.
#[derive(Debug, Clone)]
pub struct Linear {
    weight: Tensor,
    bias: Tensor,
}

impl Linear {
    /// The layer whose parameters are `name.weight` and `name.bias`.
    ///
    /// # Errors
    /// When a parameter is missing.
    pub fn new(parameters: &Parameters, name: &str) -> Result<Self> {
        Ok(Self { weight: parameters.get(&format!("{name}.weight"))?, bias: parameters.get(&format!("{name}.bias"))? })
    }

    /// `[.., in] -> [.., out]`.
    ///
    /// # Errors
    /// When shapes do not fit.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        ops::linear(x, &self.weight, &self.bias)
    }
}
