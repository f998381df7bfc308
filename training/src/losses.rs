//! Cross-entropy and the routing losses: load balance and smoothness (`golden/reference.py: balance_loss,
//! smoothness_loss`), and contiguity, which is smoothness relative to how much routing varies, for routers only.

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
    /// Of the routers' contiguity ratio, mean over layers.
    #[serde(default)]
    pub contiguity: f64,
}

impl Default for LossWeights {
    fn default() -> Self {
        Self { balance: 0.01, smoothness: 0.1, contiguity: 0.0 }
    }
}

/// The terms of a loss.
pub struct Losses {
    pub cross_entropy: Tensor,
    /// Mean load balance over layers; 1 when balanced.
    pub balance: Tensor,
    /// Mean spatial smoothness over layers.
    pub smoothness: Tensor,
    /// Mean contiguity ratio over layers; 0 when it has no weight.
    pub contiguity: Tensor,
    /// The weighted sum to descend.
    pub total: Tensor,
}

/// All terms for a batch with soft `targets [batch, classes]` whose rows sum to one. `heads` are the classes of each
/// softmax ([`cross_entropy`]). `loads` is [`expert_loads`] of the
/// batch, or of the larger one that it is a part of: means of shards are then the terms of the whole but for contiguity.
pub fn losses(
    output: &Output,
    loads: &[Vec<f32>],
    (targets, heads): (&Tensor, &[usize]),
    side: usize,
    weights: LossWeights,
) -> Result<Losses> {
    // Without routers all these terms are zero.
    let layers = output.routing.len().max(1) as f64;
    let mut balance = Tensor::zeros((), candle_core::DType::F32, targets.device())?;
    let (mut smoothness, mut contiguity) = (balance.clone(), balance.clone());
    for (routing, load) in output.routing.iter().zip(loads) {
        balance = (balance + balance_loss(routing, load)?)?;
        smoothness = (smoothness + ops::smoothness(&by_image(&routing.probabilities, side)?, side, side)?)?;
        if weights.contiguity > 0.0 {
            contiguity = (contiguity + contiguity_ratio(&routing.router_only_probabilities()?, side)?)?;
        }
    }
    let (balance, smoothness, contiguity) = ((balance / layers)?, (smoothness / layers)?, (contiguity / layers)?);
    let cross_entropy = cross_entropy(&output.logits, targets, heads)?;
    let mut total = ((&cross_entropy + (&balance * weights.balance)?)? + (&smoothness * weights.smoothness)?)?;
    if weights.contiguity > 0.0 {
        total = (total + (&contiguity * weights.contiguity)?)?;
    }
    Ok(Losses { cross_entropy, balance, smoothness, contiguity, total })
}

/// `[batch * side * side, experts] -> [batch, side * side, experts]`.
fn by_image(probabilities: &Tensor, side: usize) -> Result<Tensor> {
    let (tokens, experts) = probabilities.dims2()?;
    probabilities.reshape((tokens / (side * side), side * side, experts))
}

/// Geary's contiguity ratio (1954) of router `probabilities [batch * side * side, experts]`: the mean squared distance
/// between neighbouring patches ([`ops::smoothness`]) over that between any two patches of any of the images. 1 when
/// neighbours are like strangers, 0 when they are alike; above 1 when they avoid each other. Bringing all probabilities
/// closer to each other lowers the smoothness loss without changing a choice; it does not lower this. Sending all of an
/// image to the same experts does lower both.
///
/// # Errors
/// When the tokens are not whole grids.
pub fn contiguity_ratio(probabilities: &Tensor, side: usize) -> Result<Tensor> {
    let variance = probabilities.broadcast_sub(&probabilities.mean_keepdim(0)?)?.sqr()?.sum(1)?.mean_all()?;
    // For probabilities that are all the same: 0 over nearly 0.
    let between_any = ((variance * 2.0)? + 1e-12)?;
    ops::smoothness(&by_image(probabilities, side)?, side, side)? / between_any
}

/// Mean over the batch of `-sum_c target_c log softmax(logits)_c`. Several `heads`, each of so many classes, lie side by
/// side and have a softmax each: a row of `targets` is spread over those that it says something of, and gives the others no
/// gradient. None is one head over all classes.
///
/// # Errors
/// When the heads do not have as many classes as there are logits.
pub fn cross_entropy(logits: &Tensor, targets: &Tensor, heads: &[usize]) -> Result<Tensor> {
    let log_p = match heads {
        [] | [_] => log_softmax(logits)?,
        _ => {
            let starts = heads.iter().scan(0, |end, classes| {
                *end += classes;
                Some(*end - classes)
            });
            let of_head = |(start, &classes)| log_softmax(&logits.narrow(D::Minus1, start, classes)?);
            Tensor::cat(&starts.zip(heads).map(of_head).collect::<Result<Vec<_>>>()?, D::Minus1)?
        }
    };
    (log_p * targets)?.sum(D::Minus1)?.mean_all()?.neg()
}

fn log_softmax(logits: &Tensor) -> Result<Tensor> {
    let shifted = logits.broadcast_sub(&logits.max_keepdim(D::Minus1)?.detach())?;
    let log_sum = shifted.exp()?.sum_keepdim(D::Minus1)?.log()?;
    shifted.broadcast_sub(&log_sum)
}

/// For every layer the share of (token, choice) pairs that went to each expert, over all of `outputs`.
pub fn expert_loads<'a>(outputs: impl Iterator<Item = &'a Output> + Clone) -> Vec<Vec<f32>> {
    let layers = outputs.clone().map(|output| output.routing.len()).max().unwrap_or(0);
    let load = |layer: usize| {
        let routings = outputs.clone().filter_map(move |output| output.routing.get(layer));
        let choices: usize = routings.clone().map(|routing| routing.experts.len()).sum();
        let mut load = Vec::new();
        for routing in routings {
            load.resize(routing.probabilities.dim(1).unwrap_or(0), 0f32);
            routing.experts.iter().for_each(|&expert| load[usize::from(expert)] += 1.0);
        }
        load.iter_mut().for_each(|count| *count /= choices as f32);
        load
    };
    (0..layers).map(load).collect()
}

/// `E sum_i f_i P_i`: f the fraction of (token, choice) pairs sent to expert i, P its mean probability. The gradient
/// flows through P; f is a count.
///
/// # Errors
/// When `load` is not as long as there are experts.
pub fn balance_loss(routing: &Routing, load: &[f32]) -> Result<Tensor> {
    let p = &routing.probabilities;
    let fractions = Tensor::from_slice(load, load.len(), p.device())?;
    (p.mean(0)? * fractions)?.sum_all()? * load.len() as f64
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;
    use crate::parameters::Quantizers;
    use crate::vit::ViT;
    use model_core::config::ViTConfig;

    /// Two experts on a 4 x 4 grid, the first one's probability given.
    fn ratio(first: impl Fn(usize, usize) -> f32) -> f32 {
        let values = (0..16).flat_map(|i| [first(i / 4, i % 4), 1.0 - first(i / 4, i % 4)]).collect::<Vec<_>>();
        let p = Tensor::from_vec(values, (16, 2), &Device::Cpu).unwrap();
        contiguity_ratio(&p, 4).unwrap().to_scalar().unwrap()
    }

    #[test]
    fn contiguity_by_hand() {
        // Squared distances are 2 d^2 for probabilities that differ by d; 24 pairs of neighbours.
        let side_by_side = |scale: f32| ratio(move |_, column| 0.5 + scale * if column < 2 { 1.0 } else { -1.0 });
        // Four pairs of 24 differ by 2 s, every token by s from the mean: (4 / 24) 8 s^2 over 2 (2 s^2).
        assert!((side_by_side(0.5) - 1.0 / 3.0).abs() < 1e-5, "{}", side_by_side(0.5));
        assert!((side_by_side(0.01) - 1.0 / 3.0).abs() < 1e-3, "bringing probabilities closer does not help");
        let chequered = ratio(|row, column| ((row + column) % 2) as f32);
        assert!((chequered - 2.0).abs() < 1e-5, "{chequered}");
        assert_eq!(ratio(|_, _| 0.3), 0.0);
    }

    #[test]
    fn contiguity_moves_routers_and_nothing_else() {
        let config = ViTConfig::preset("tiny").unwrap();
        let vit = ViT::init(&config, 3).unwrap();
        let pixels: Vec<f32> = (0..2 * 192).map(|i| (i as f32 * 0.37).sin()).collect();
        let pixels = Tensor::from_vec(pixels, (2, 8, 8, 3), &Device::Cpu).unwrap();
        let output = vit.forward(&pixels, Quantizers::ALL).unwrap();
        let targets = Tensor::full(0.2f32, (2, 5), &Device::Cpu).unwrap();
        let weights = LossWeights { balance: 0.0, smoothness: 0.0, contiguity: 1.0 };
        let loads = expert_loads(std::iter::once(&output));
        let losses = losses(&output, &loads, (&targets, &[]), config.backbone.grid_side(), weights).unwrap();
        let gradients = losses.contiguity.backward().unwrap();
        for (name, var) in vit.parameters().all() {
            assert_eq!(gradients.get(var).is_some(), name.ends_with(".router"), "{name}");
        }
        let value = |tensor: &Tensor| tensor.to_scalar::<f32>().unwrap();
        let difference = value(&losses.total) - value(&losses.cross_entropy) - value(&losses.contiguity);
        assert!(difference.abs() < 1e-6, "{difference}");
    }

    #[test]
    fn the_gradient_of_contiguity_is_its_slope() {
        let values: Vec<f32> = (0..2 * 9 * 3).map(|i| 0.3 + 0.2 * (i as f32 * 1.7).sin()).collect();
        let at = |values: &[f32]| Var::from_slice(values, (18, 3), &Device::Cpu).unwrap();
        let p = at(&values);
        let gradient = contiguity_ratio(&p, 3).unwrap().backward().unwrap().get(&p).unwrap().flatten_all().unwrap();
        for (i, slope) in gradient.to_vec1::<f32>().unwrap().into_iter().enumerate() {
            let moved = |by: f32| {
                let mut values = values.clone();
                values[i] += by;
                contiguity_ratio(&at(&values), 3).unwrap().to_scalar::<f32>().unwrap()
            };
            // Rounding of a value near 1 over the step: 1e-7 / 2e-2; curvature is the square of the step.
            let expected = (moved(1e-2) - moved(-1e-2)) / 2e-2;
            assert!((slope - expected).abs() < 2e-3, "{i}: {slope}, {expected}");
        }
    }
}
