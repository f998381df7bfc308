//! The layers of the candle model, each `new(parameters, ..) -> forward`.

mod attention;
mod dense;
mod expert;
mod norm;
mod router;
mod stem;

pub use attention::Attention;
pub use dense::{Dense, DenseExperts, LowRankExperts};
pub use expert::ButterflyMoe;
pub use norm::LayerNorm;
pub use router::{Router, RouterNoise, Routing};
pub use stem::Stem;

use candle_core::{Result, Tensor};

use crate::ops;
use crate::parameters::{Parameters, Quantizers};
use model_core::config::{ExpertConfig, FeedForwardKind};

/// The second half of a block, of one of the kinds.
#[derive(Debug, Clone)]
pub enum FeedForward {
    /// [`FeedForwardKind::Butterfly`] and its variants.
    Butterfly(ButterflyMoe),
    /// [`FeedForwardKind::DenseExperts`] and its variants of fewer bits.
    DenseExperts(DenseExperts),
    LowRankExperts(LowRankExperts),
    Dense(Dense),
}

impl FeedForward {
    /// The layer of that kind whose parameters start with `name`.
    pub fn new(parameters: &Parameters, name: &str, kind: FeedForwardKind, experts: &ExpertConfig) -> Result<Self> {
        Ok(match kind {
            FeedForwardKind::Butterfly | FeedForwardKind::ButterflyGains | FeedForwardKind::ButterflyTied => {
                Self::Butterfly(ButterflyMoe::new(parameters, name, kind, experts)?)
            }
            FeedForwardKind::DenseExperts
            | FeedForwardKind::TernaryExperts
            | FeedForwardKind::Int4Experts
            | FeedForwardKind::Int8Experts => Self::DenseExperts(DenseExperts::new(parameters, name, kind, experts)?),
            FeedForwardKind::LowRankExperts => Self::LowRankExperts(LowRankExperts::new(parameters, name, experts)?),
            FeedForwardKind::Dense => Self::Dense(Dense::new(parameters, name)?),
        })
    }

    /// `[batch, tokens, d_model] -> [batch, tokens, d_model]`, and what the router chose where there is one. Kinds in
    /// fp32 stay so whatever `quantizers` says.
    pub fn forward(
        &self,
        x: &Tensor,
        quantizers: Quantizers,
        noise: Option<RouterNoise<'_>>,
    ) -> Result<(Tensor, Option<Routing>)> {
        let (batch, tokens, d_model) = x.dims3()?;
        let rows = x.reshape((batch * tokens, d_model))?;
        let (y, routing) = match self {
            Self::Butterfly(experts) => {
                experts.forward(&rows, quantizers, noise).map(|(y, routing)| (y, Some(routing)))?
            }
            Self::DenseExperts(experts) => {
                experts.forward(&rows, quantizers, noise).map(|(y, routing)| (y, Some(routing)))?
            }
            Self::LowRankExperts(experts) => experts.forward(&rows, noise).map(|(y, routing)| (y, Some(routing)))?,
            Self::Dense(dense) => (dense.forward(&rows)?, None),
        };
        Ok((y.reshape((batch, tokens, d_model))?, routing))
    }
}

/// `y = x W^T + b`.
#[derive(Debug, Clone)]
pub struct Linear {
    weight: Tensor,
    bias: Tensor,
}

impl Linear {
    /// The layer whose parameters are `name.weight` and `name.bias`.
    pub fn new(parameters: &Parameters, name: &str) -> Result<Self> {
        Ok(Self { weight: parameters.get(&format!("{name}.weight"))?, bias: parameters.get(&format!("{name}.bias"))? })
    }

    /// `[.., in] -> [.., out]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        ops::linear(x, &self.weight, &self.bias)
    }
}
