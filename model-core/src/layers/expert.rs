//! The mixture of butterfly experts: router, rotations, shared substrates.

use std::sync::Arc;

use candle_core::{D, DType, Result, Tensor};

use crate::config::ExpertConfig;
use crate::kernels::router::top_k;
use crate::ops::{self, AngleGrid};
use crate::train::quantize;
use crate::vit::{Parameters, Quantizers};

/// What the router of one layer did, for the losses and the routing map.
#[derive(Debug, Clone)]
pub struct Routing {
    /// Softmax over all experts, `[batch, tokens, experts]`.
    pub probabilities: Tensor,
    /// Chosen experts, best first, `[batch * tokens * top_k]`.
    pub experts: Arc<Vec<u16>>,
}

/// One feed-forward layer: `y = sum_k w_k [B(out_i)] Down(gelu(B(hidden_i) Up(B(in_i) x)))`.
#[derive(Debug, Clone)]
pub struct ButterflyMoe {
    config: ExpertConfig,
    router: Tensor,
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
            config: config.clone(),
            router: get("router")?,
            up: get("up")?,
            down: get("down")?,
            rotation_in: get("rotation_in")?,
            rotation_hidden: get("rotation_hidden")?,
            rotation_out: if config.stages_out > 0 { Some(get("rotation_out")?) } else { None },
        })
    }

    /// `[batch, tokens, d_model] -> [batch, tokens, d_model]`, and what the router chose.
    ///
    /// # Errors
    /// When shapes do not fit.
    pub fn forward(&self, x: &Tensor, quantizers: Quantizers) -> Result<(Tensor, Routing)> {
        let (batch, tokens, d_model) = x.dims3()?;
        let rows = x.reshape((batch * tokens, d_model))?;
        let (probabilities, experts, weights) = self.route(&rows, quantizers)?;

        let grid = if quantizers.experts { AngleGrid::Bits(self.config.angle_bits) } else { AngleGrid::Continuous };
        let rotate = |x: &Tensor, angles: &Tensor| ops::rotate_rows(x, angles, experts.clone(), grid);
        let h = self.substrate(&rotate(&rows, &self.rotation_in)?, &self.up, quantizers)?;
        let a = ops::gelu(&rotate(&h, &self.rotation_hidden)?)?;
        let y = match &self.rotation_out {
            // Deviation from the paper's order: without an out rotation the weighted sum commutes with `down`, which
            // then runs on one row per token.
            None => self.substrate(&ops::combine(&a, &weights)?, &self.down, quantizers)?,
            Some(angles) => ops::combine(&rotate(&self.substrate(&a, &self.down, quantizers)?, angles)?, &weights)?,
        };
        let probabilities = probabilities.reshape((batch, tokens, self.config.num_experts))?;
        Ok((y.reshape((batch, tokens, d_model))?, Routing { probabilities, experts }))
    }

    /// Probabilities over all experts, the chosen ones `[rows * top_k]`, and their weights `[rows, top_k]`, through
    /// which the router's gradient flows.
    fn route(&self, rows: &Tensor, quantizers: Quantizers) -> Result<(Tensor, Arc<Vec<u16>>, Tensor)> {
        let (num_experts, k) = (self.config.num_experts, self.config.top_k);
        let gate = if quantizers.experts {
            quantize::straight_through(&self.router, |w| {
                quantize::router_snapped(w, rows.dims()[1], self.config.router_bits)
            })?
        } else {
            self.router.clone()
        };
        let logits = rows.matmul(&gate.t()?)?;
        let values = logits.flatten_all()?.to_vec1::<f32>()?;
        let num_rows = values.len() / num_experts;
        let mut experts = vec![0u16; num_rows * k];
        let mut scratch = vec![0f32; k];
        for (values, ids) in values.chunks_exact(num_experts).zip(experts.chunks_exact_mut(k)) {
            top_k(values, ids, &mut scratch);
        }
        let ids: Vec<u32> = experts.iter().map(|&e| u32::from(e)).collect();
        let ids = Tensor::from_vec(ids, (num_rows, k), rows.device())?.to_dtype(DType::U32)?;
        let weights = ops::softmax(&logits.gather(&ids, D::Minus1)?)?;
        Ok((ops::softmax(&logits)?, Arc::new(experts), weights))
    }

    fn substrate(&self, x: &Tensor, weight: &Tensor, quantizers: Quantizers) -> Result<Tensor> {
        ops::ternary_linear(x, weight, quantizers.substrates, quantizers.activations)
    }
}
