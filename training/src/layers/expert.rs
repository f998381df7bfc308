//! The mixture of butterfly experts: router, rotations, shared substrates.

use candle_core::{Result, Tensor};

use super::{Router, RouterNoise, Routing};
use crate::ops::{self, Activations, AngleGrid};
use crate::parameters::{Parameters, Quantizers};
use crate::quantize;
use model_core::config::{ExpertConfig, FeedForwardKind};

#[derive(Debug, Clone)]
enum Down {
    /// A matrix of its own.
    Own(Tensor),
    /// The transpose of `up`, with this scale per row.
    Tied(Tensor),
}

/// One feed-forward layer: `y = sum_k w_k [B(out_i)] Down(gelu(B(hidden_i) Up(B(in_i) x)))`.
#[derive(Debug, Clone)]
pub struct ButterflyMoe {
    angle_bits: u32,
    router: Router,
    up: Tensor,
    down: Down,
    /// `[experts, d_ff]`, of [`FeedForwardKind::ButterflyGains`] only.
    gains: Option<Tensor>,
    rotation_in: Tensor,
    rotation_hidden: Tensor,
    rotation_out: Option<Tensor>,
}

impl ButterflyMoe {
    /// The layer whose parameters start with `name`.
    pub fn new(parameters: &Parameters, name: &str, kind: FeedForwardKind, config: &ExpertConfig) -> Result<Self> {
        let get = |part: &str| parameters.get(&format!("{name}.{part}"));
        Ok(Self {
            angle_bits: config.angle_bits,
            router: Router::new(parameters, name, config)?,
            up: parameters.substrate(name, "up")?,
            down: match kind {
                FeedForwardKind::ButterflyTied => Down::Tied(get("down_scale")?),
                _ => Down::Own(parameters.substrate(name, "down")?),
            },
            gains: if kind == FeedForwardKind::ButterflyGains { Some(get("gains")?) } else { None },
            rotation_in: get("rotation_in")?,
            rotation_hidden: get("rotation_hidden")?,
            rotation_out: if config.stages_out > 0 { Some(get("rotation_out")?) } else { None },
        })
    }

    /// `rows [tokens, d_model] -> [tokens, d_model]`, and what the router chose.
    pub fn forward(
        &self,
        rows: &Tensor,
        quantizers: Quantizers,
        noise: Option<RouterNoise<'_>>,
    ) -> Result<(Tensor, Routing)> {
        let (routing, weights) = self.router.forward(rows, quantizers.experts, noise)?;
        let grid = if quantizers.experts { AngleGrid::Bits(self.angle_bits) } else { AngleGrid::Continuous };
        let rotate = |x: &Tensor, angles: &Tensor| ops::rotate_rows(x, angles, routing.experts.clone(), grid);
        let mut h = self.substrate(&rotate(rows, &self.rotation_in)?, &self.up, quantizers)?;
        if let Some(gains) = &self.gains {
            h = ops::scale_rows(&h, gains, routing.experts.clone())?;
        }
        let y = match &self.rotation_out {
            // Deviation from the paper's order: without an out rotation the weighted sum commutes with `down`, which
            // then runs on one row per token.
            None => {
                let a = ops::activate(&h, &self.rotation_hidden, &weights, routing.experts.clone(), grid)?;
                self.down(&a, quantizers)?
            }
            Some(angles) => {
                let a = ops::gelu(&rotate(&h, &self.rotation_hidden)?)?;
                ops::combine(&rotate(&self.down(&a, quantizers)?, angles)?, &weights)?
            }
        };
        Ok((y, routing))
    }

    fn down(&self, a: &Tensor, quantizers: Quantizers) -> Result<Tensor> {
        match &self.down {
            Down::Own(down) => self.substrate(a, down, quantizers),
            Down::Tied(scale) => {
                let (d_ff, d_model) = self.up.dims2()?;
                let up = match quantizers.substrates {
                    true => quantize::straight_through(&self.up, |w| ops::ternarized(w, d_model))?,
                    false => self.up.clone(),
                };
                let a = match quantizers.activations {
                    Activations::Int8 => quantize::straight_through(a, |a| ops::fake_quantize(a, d_ff))?,
                    Activations::Float => a.clone(),
                };
                a.matmul(&up)?.broadcast_mul(scale)
            }
        }
    }

    fn substrate(&self, x: &Tensor, weight: &Tensor, quantizers: Quantizers) -> Result<Tensor> {
        ops::ternary_linear(x, weight, quantizers.substrates, quantizers.activations)
    }
}
