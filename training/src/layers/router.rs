//! The router: which experts a token goes to, and with what weights.

use std::sync::Arc;

use candle_core::{D, DType, Result, Tensor};

use crate::ops;
use crate::parameters::Parameters;
use crate::quantize;
use model_core::config::ExpertConfig;
use model_core::kernels::router::top_k;

/// What the router of one layer did, for the losses and the routing map.
#[derive(Debug, Clone)]
pub struct Routing {
    /// Softmax over all experts, `[tokens, experts]`.
    pub probabilities: Tensor,
    /// Chosen experts, best first, `[tokens * top_k]`.
    pub experts: Arc<Vec<u16>>,
    rows: Tensor,
    gate: Tensor,
}

impl Routing {
    /// The routed tokens, `[tokens, d_model]`.
    pub fn rows(&self) -> &Tensor {
        &self.rows
    }

    /// The probabilities once more, with a gradient that moves the router and not what it looks at.
    ///
    /// # Errors
    /// Never for a routing that a router made.
    pub fn router_only_probabilities(&self) -> Result<Tensor> {
        ops::softmax(&self.rows.detach().matmul(&self.gate.t()?)?)
    }
}

/// A linear gate, softmax over its `top_k` largest logits.
#[derive(Debug, Clone)]
pub struct Router {
    gate: Tensor,
    top_k: usize,
    bits: u32,
}

impl Router {
    /// The router of the layer whose parameters start with `name`.
    pub fn new(parameters: &Parameters, name: &str, config: &ExpertConfig) -> Result<Self> {
        let gate = parameters.get(&format!("{name}.router"))?;
        Ok(Self { gate, top_k: config.top_k, bits: config.router_bits })
    }

    /// Routes `rows [tokens, d_model]`. The weights `[tokens, top_k]` of the chosen experts carry the gradient.
    pub fn forward(&self, rows: &Tensor, quantize: bool) -> Result<(Routing, Tensor)> {
        let (num_experts, d_model) = self.gate.dims2()?;
        let gate = if quantize {
            quantize::straight_through(&self.gate, |w| quantize::router_snapped(w, d_model, self.bits))?
        } else {
            self.gate.clone()
        };
        let logits = rows.matmul(&gate.t()?)?;
        let values = logits.flatten_all()?.to_vec1::<f32>()?;
        let tokens = values.len() / num_experts;
        let mut experts = vec![0u16; tokens * self.top_k];
        let mut scratch = vec![0f32; self.top_k];
        for (values, ids) in values.chunks_exact(num_experts).zip(experts.chunks_exact_mut(self.top_k)) {
            top_k(values, ids, &mut scratch);
        }
        let ids: Vec<u32> = experts.iter().map(|&e| u32::from(e)).collect();
        let ids = Tensor::from_vec(ids, (tokens, self.top_k), rows.device())?.to_dtype(DType::U32)?;
        let weights = ops::softmax(&logits.gather(&ids, D::Minus1)?)?;
        let probabilities = ops::softmax(&logits)?;
        Ok((Routing { probabilities, experts: Arc::new(experts), rows: rows.clone(), gate }, weights))
    }
}
