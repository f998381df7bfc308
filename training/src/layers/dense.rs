//! What butterfly experts replace: dense fp32 experts behind the same router, and a single dense layer. Without biases,
//! like the substrates.

use candle_core::{Result, Tensor};

use super::{Router, Routing};
use crate::ops::{self, Activations};
use crate::parameters::Parameters;
use model_core::config::ExpertConfig;

/// `y = sum_k w_k Down_k(gelu(Up_k x))`, every expert with matrices of its own.
#[derive(Debug, Clone)]
pub struct DenseExperts {
    router: Router,
    up: Tensor,
    down: Tensor,
}

impl DenseExperts {
    /// The layer whose parameters start with `name`.
    pub fn new(parameters: &Parameters, name: &str, config: &ExpertConfig) -> Result<Self> {
        let get = |part: &str| parameters.get(&format!("{name}.{part}"));
        Ok(Self { router: Router::new(parameters, name, config)?, up: get("up")?, down: get("down")? })
    }

    /// `rows [tokens, d_model] -> [tokens, d_model]`, and what the router chose.
    pub fn forward(&self, rows: &Tensor) -> Result<(Tensor, Routing)> {
        let (routing, weights) = self.router.forward(rows, false)?;
        let a = ops::gelu(&ops::expert_linear(rows, &self.up, routing.experts.clone())?)?;
        let o = ops::expert_linear(&a, &self.down, routing.experts.clone())?;
        Ok((ops::combine(&o, &weights)?, routing))
    }
}

/// `y = Down(gelu(Up x))`.
#[derive(Debug, Clone)]
pub struct Dense {
    up: Tensor,
    down: Tensor,
}

impl Dense {
    /// The layer whose parameters start with `name`.
    pub fn new(parameters: &Parameters, name: &str) -> Result<Self> {
        let get = |part: &str| parameters.get(&format!("{name}.{part}"));
        Ok(Self { up: get("up")?, down: get("down")? })
    }

    /// `rows [tokens, d_model] -> [tokens, d_model]`.
    pub fn forward(&self, rows: &Tensor) -> Result<Tensor> {
        let product = |x: &Tensor, weight: &Tensor| ops::ternary_linear(x, weight, false, Activations::Float);
        product(&ops::gelu(&product(rows, &self.up)?)?, &self.down)
    }
}
