//! Cross-entropy and the two routing losses (`golden/reference.py: balance_loss, smoothness_loss`).

use candle_core::{D, Result, Tensor};

use crate::layers::Routing;
use crate::ops;
use crate::vit::Output;

/// How much each routing loss adds to cross-entropy.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct LossWeights {
    /// Of the load balance, mean over layers.
    pub balance: f64,
    /// Of the spatial smoothness, mean over layers.
    pub smoothness: f64,
}

impl Default for LossWeights {
    fn default() -> Self {
        Self { balance: 0.01, smoothness: 0.1 }
    }
}

/// The terms of a loss.
pub struct Losses {
    /// Cross-entropy alone.
    pub cross_entropy: Tensor,
    /// Mean load balance over layers; 1 when balanced.
    pub balance: Tensor,
    /// Mean spatial smoothness over layers.
    pub smoothness: Tensor,
    /// The weighted sum to descend.
    pub total: Tensor,
}

/// All terms for a batch with soft `targets [batch, classes]` whose rows sum to one.
///
/// # Errors
/// When shapes do not fit.
pub fn losses(output: &Output, targets: &Tensor, side: usize, weights: LossWeights) -> Result<Losses> {
    // Without routers both terms are zero.
    let layers = output.routing.len().max(1) as f64;
    let mut balance = Tensor::zeros((), candle_core::DType::F32, targets.device())?;
    let mut smoothness = balance.clone();
    for routing in &output.routing {
        balance = (balance + balance_loss(routing)?)?;
        smoothness = (smoothness + ops::smoothness(&by_image(&routing.probabilities, side)?, side)?)?;
    }
    let (balance, smoothness) = ((balance / layers)?, (smoothness / layers)?);
    let cross_entropy = cross_entropy(&output.logits, targets)?;
    let total = ((&cross_entropy + (&balance * weights.balance)?)? + (&smoothness * weights.smoothness)?)?;
    Ok(Losses { cross_entropy, balance, smoothness, total })
}

/// `[batch * side * side, experts] -> [batch, side * side, experts]`.
fn by_image(probabilities: &Tensor, side: usize) -> Result<Tensor> {
    let (tokens, experts) = probabilities.dims2()?;
    probabilities.reshape((tokens / (side * side), side * side, experts))
}

/// Mean over the batch of `-sum_c target_c log softmax(logits)_c`.
///
/// # Errors
/// When shapes differ.
pub fn cross_entropy(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    let shifted = logits.broadcast_sub(&logits.max_keepdim(D::Minus1)?.detach())?;
    let log_sum = shifted.exp()?.sum_keepdim(D::Minus1)?.log()?;
    let log_p = shifted.broadcast_sub(&log_sum)?;
    (log_p * targets)?.sum(D::Minus1)?.mean_all()?.neg()
}

/// `E sum_i f_i P_i`: f the fraction of (token, choice) pairs sent to expert i, P its mean probability. The gradient
/// flows through P; f is a count.
fn balance_loss(routing: &Routing) -> Result<Tensor> {
    let p = &routing.probabilities;
    let num_experts = p.dim(1)?;
    let mut fractions = vec![0f32; num_experts];
    for &expert in routing.experts.iter() {
        fractions[usize::from(expert)] += 1.0 / routing.experts.len() as f32;
    }
    let fractions = Tensor::from_vec(fractions, num_experts, p.device())?;
    (p.mean(0)? * fractions)?.sum_all()? * num_experts as f64
}

/// The load balance of plain values: `probabilities [tokens, experts]` and the chosen experts of all tokens.
pub fn balance_of_slice(probabilities: &[f32], chosen: &[u16], experts: usize) -> f64 {
    let tokens = probabilities.len() / experts;
    let mut fractions = vec![0f64; experts];
    for &expert in chosen {
        fractions[usize::from(expert)] += 1.0 / chosen.len() as f64;
    }
    let mean =
        |e: usize| probabilities.iter().skip(e).step_by(experts).map(|&p| f64::from(p)).sum::<f64>() / tokens as f64;
    experts as f64 * (0..experts).map(|e| fractions[e] * mean(e)).sum::<f64>()
}
