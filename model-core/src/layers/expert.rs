//! The mixture of butterfly experts: router, rotations, shared substrates.

use candle_core::{Result, Tensor};

use super::{Router, Routing};
use crate::config::ExpertConfig;
use crate::ops::{self, AngleGrid};
use crate::vit::{Parameters, Quantizers};

/// One feed-forward layer: `y = sum_k w_k [B(out_i)] Down(gelu(B(hidden_i) Up(B(in_i) x)))`.
#[derive(Debug, Clone)]
pub struct ButterflyMoe {
    angle_bits: u32,
    router: Router,
    up: Tensor,
    down: Tensor,
    rotation_in: Tensor,
    rotation_hidden: Tensor,
    rotation_out: Option<Tensor>,
}

impl ButterflyMoe {
    /// The layer whose parameters start with `name`.
    ///
    /// # Errors
    /// When a parameter is missing.
    pub fn new(parameters: &Parameters, name: &str, config: &ExpertConfig) -> Result<Self> {
        let get = |part: &str| parameters.get(&format!("{name}.{part}"));
        Ok(Self {
            angle_bits: config.angle_bits,
            router: Router::new(parameters, name, config)?,
            up: get("up")?,
            down: get("down")?,
            rotation_in: get("rotation_in")?,
            rotation_hidden: get("rotation_hidden")?,
            rotation_out: if config.stages_out > 0 { Some(get("rotation_out")?) } else { None },
        })
    }

    /// `rows [tokens, d_model] -> [tokens, d_model]`, and what the router chose.
    ///
    /// # Errors
    /// When shapes do not fit.
    pub fn forward(&self, rows: &Tensor, quantizers: Quantizers) -> Result<(Tensor, Routing)> {
        let (routing, weights) = self.router.forward(rows, quantizers.experts)?;
        let grid = if quantizers.experts { AngleGrid::Bits(self.angle_bits) } else { AngleGrid::Continuous };
        let rotate = |x: &Tensor, angles: &Tensor| ops::rotate_rows(x, angles, routing.experts.clone(), grid);
        let h = self.substrate(&rotate(rows, &self.rotation_in)?, &self.up, quantizers)?;
        let a = ops::gelu(&rotate(&h, &self.rotation_hidden)?)?;
        let y = match &self.rotation_out {
            // Deviation from the paper's order: without an out rotation the weighted sum commutes with `down`, which
            // then runs on one row per token.
            None => self.substrate(&ops::combine(&a, &weights)?, &self.down, quantizers)?,
            Some(angles) => ops::combine(&rotate(&self.substrate(&a, &self.down, quantizers)?, angles)?, &weights)?,
        };
        Ok((y, routing))
    }

    fn substrate(&self, x: &Tensor, weight: &Tensor, quantizers: Quantizers) -> Result<Tensor> {
        ops::ternary_linear(x, weight, quantizers.substrates, quantizers.activations)
    }
}
