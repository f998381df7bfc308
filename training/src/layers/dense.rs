//! What butterfly experts replace: experts with matrices of their own behind the same router, in fp32, in few bits or of
//! low rank, and a single dense layer. Without biases, like the substrates.

use candle_core::{Result, Tensor};

use super::{Router, RouterNoise, Routing};
use crate::ops::{self, Activations};
use crate::parameters::{Parameters, Quantizers};
use crate::quantize;
use model_core::config::{ExpertConfig, FeedForwardKind};

/// What the matrices of an expert are rounded to, row by row.
#[derive(Debug, Clone, Copy)]
enum Grid {
    /// Nothing; activations and router, too, stay as they are.
    Float,
    /// -1, 0 and 1 times a scale, as a substrate.
    Ternary,
    /// Signed integers of so many bits times a scale.
    Bits(u32),
}

/// `y = sum_k w_k Down_k(gelu(Up_k x))`, every expert with matrices of its own.
#[derive(Debug, Clone)]
pub struct DenseExperts {
    router: Router,
    up: Tensor,
    down: Tensor,
    grid: Grid,
}

impl DenseExperts {
    /// The layer whose parameters start with `name`.
    pub fn new(parameters: &Parameters, name: &str, kind: FeedForwardKind, config: &ExpertConfig) -> Result<Self> {
        let get = |part: &str| parameters.get(&format!("{name}.{part}"));
        let grid = match kind {
            FeedForwardKind::TernaryExperts => Grid::Ternary,
            FeedForwardKind::Int4Experts => Grid::Bits(4),
            FeedForwardKind::Int8Experts => Grid::Bits(8),
            _ => Grid::Float,
        };
        Ok(Self { router: Router::new(parameters, name, config)?, up: get("up")?, down: get("down")?, grid })
    }

    /// `rows [tokens, d_model] -> [tokens, d_model]`, and what the router chose.
    pub fn forward(
        &self,
        rows: &Tensor,
        quantizers: Quantizers,
        noise: Option<RouterNoise<'_>>,
    ) -> Result<(Tensor, Routing)> {
        let rounds = !matches!(self.grid, Grid::Float);
        let (routing, weights) = self.router.forward(rows, rounds && quantizers.experts, noise)?;
        let product = |x: &Tensor, weight: &Tensor| {
            let (_, _, k) = weight.dims3()?;
            let x = match quantizers.activations {
                Activations::Int8 if rounds => quantize::straight_through(x, |x| ops::fake_quantize(x, k))?,
                _ => x.clone(),
            };
            let weight = match self.grid {
                Grid::Ternary if quantizers.substrates => {
                    quantize::straight_through(weight, |w| ops::ternarized(w, k))?
                }
                Grid::Bits(bits) if quantizers.substrates => {
                    quantize::straight_through(weight, |w| quantize::router_snapped(w, k, bits))?
                }
                _ => weight.clone(),
            };
            ops::expert_linear(&x, &weight, routing.experts.clone())
        };
        let o = product(&ops::gelu(&product(rows, &self.up)?)?, &self.down)?;
        Ok((ops::combine(&o, &weights)?, routing))
    }
}

/// [`DenseExperts`] in fp32 whose matrices are products of two factors each.
#[derive(Debug, Clone)]
pub struct LowRankExperts {
    router: Router,
    /// Applied in this order, a GELU in the middle.
    factors: [Tensor; 4],
}

impl LowRankExperts {
    /// The layer whose parameters start with `name`.
    pub fn new(parameters: &Parameters, name: &str, config: &ExpertConfig) -> Result<Self> {
        let get = |part: &str| parameters.get(&format!("{name}.{part}"));
        let factors = [get("up_in")?, get("up_out")?, get("down_in")?, get("down_out")?];
        Ok(Self { router: Router::new(parameters, name, config)?, factors })
    }

    /// `rows [tokens, d_model] -> [tokens, d_model]`, and what the router chose.
    pub fn forward(&self, rows: &Tensor, noise: Option<RouterNoise<'_>>) -> Result<(Tensor, Routing)> {
        let (routing, weights) = self.router.forward(rows, false, noise)?;
        let product = |x: &Tensor, factor: &Tensor| ops::expert_linear(x, factor, routing.experts.clone());
        let [up_in, up_out, down_in, down_out] = &self.factors;
        let a = ops::gelu(&product(&product(rows, up_in)?, up_out)?)?;
        let o = product(&product(&a, down_in)?, down_out)?;
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
