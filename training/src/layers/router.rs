//! The router: which experts a token goes to, and with what weights.

use std::sync::Arc;

use candle_core::{D, DType, Result, Tensor};

use crate::ops;
use crate::parameters::Parameters;
use crate::quantize;
use model_core::config::ExpertConfig;
use model_core::kernels::router::top_k;
use model_core::random::SplitMix64;

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

/// Gumbel noise on the logits that experts are chosen by, in training only. At a scale of 1 the chosen experts are a sample
/// without replacement from the router's probabilities (arXiv 1903.06059). Weights and losses see the logits without it.
#[derive(Debug, Clone, Copy)]
pub struct RouterNoise<'a> {
    /// What the noise is multiplied by.
    pub scale: f64,
    /// One an image, so that an image's noise does not depend on what it shares a batch with.
    pub seeds: &'a [u64],
    /// Layers have noise of their own.
    pub layer: usize,
}

impl RouterNoise<'_> {
    /// To `logits [images * tokens, experts]`.
    fn add_to(&self, logits: &mut [f32]) {
        let per_image = logits.len() / self.seeds.len().max(1);
        for (image, &seed) in logits.chunks_exact_mut(per_image.max(1)).zip(self.seeds) {
            let mut stream = SplitMix64::at(seed, (self.layer * per_image) as u64);
            image.iter_mut().for_each(|logit| *logit -= (self.scale * (-stream.uniform().ln()).ln()) as f32);
        }
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
    pub fn forward(&self, rows: &Tensor, quantize: bool, noise: Option<RouterNoise<'_>>) -> Result<(Routing, Tensor)> {
        let (num_experts, d_model) = self.gate.dims2()?;
        let gate = if quantize {
            quantize::straight_through(&self.gate, |w| quantize::router_snapped(w, d_model, self.bits))?
        } else {
            self.gate.clone()
        };
        let logits = rows.matmul(&gate.t()?)?;
        let mut values = logits.flatten_all()?.to_vec1::<f32>()?;
        if let Some(noise) = noise {
            noise.add_to(&mut values);
        }
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

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn noise_of_scale_one_samples_from_the_probabilities() {
        let mut parameters = Parameters::default();
        let logits = [0.0f32, 1.0, -1.0, 0.5];
        parameters.insert("moe.router", logits.to_vec(), &[4, 1]).unwrap();
        let config = model_core::config::ViTConfig::preset("tiny").unwrap().experts;
        let router = Router::new(&parameters, "moe", &ExpertConfig { top_k: 1, ..config }).unwrap();
        let (images, tokens) = (100, 200);
        let rows = Tensor::ones((images * tokens, 1), DType::F32, &Device::Cpu).unwrap();
        let seeds: Vec<u64> = (0..images as u64).collect();
        let chosen = |noise| router.forward(&rows, false, noise).unwrap().0.experts;
        assert!(chosen(None).iter().all(|&expert| expert == 1), "without noise the largest logit wins");
        let noise = RouterNoise { scale: 1.0, seeds: &seeds, layer: 0 };
        let experts = chosen(Some(noise));
        let sum: f64 = logits.iter().map(|&logit| f64::from(logit).exp()).sum();
        for (expert, &logit) in logits.iter().enumerate() {
            let share = experts.iter().filter(|&&e| usize::from(e) == expert).count() as f64 / experts.len() as f64;
            // Four standard errors of 20,000 draws, at most 4 * 0.5 / sqrt(20000).
            assert!((share - f64::from(logit).exp() / sum).abs() < 0.015, "expert {expert}: {share}");
        }
        // An image alone has the noise that it has among others, and the next layer has another.
        let alone = rows.narrow(0, 0, tokens).unwrap();
        let of_one = |layer| {
            let noise = RouterNoise { scale: 1.0, seeds: &seeds[7..8], layer };
            router.forward(&alone, false, Some(noise)).unwrap().0.experts
        };
        assert_eq!(of_one(0)[..], experts[7 * tokens..8 * tokens]);
        assert_ne!(of_one(1), of_one(0));
    }
}
