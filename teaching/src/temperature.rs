//! The temperature of a set: what its logits are divided by, so that it is as sure as it is right (Guo et al., "On Calibration of
//! Modern Neural Networks", 2017).

use crate::logistic::log_sum_exp;

/// Temperatures, between which the best one is looked for.
const TEMPERATURES: (f64, f64) = (0.02, 50.0);

/// Mean loss of logits over a temperature. Labels are as certain as so many images can say (Platt, 1999): a classifier that
/// is right about all of sixty images may still be wrong about the next.
fn loss_at(held: &[(&[f64], usize)], temperature: f64) -> f64 {
    let mut sum = 0.0;
    for (logits, label) in held {
        let scaled: Vec<f64> = logits.iter().map(|logit| logit / temperature).collect();
        let doubt = 1.0 / (held.len() + 2) as f64;
        let total = log_sum_exp(&scaled);
        let others = scaled.iter().sum::<f64>() - scaled[*label];
        let others = others / (scaled.len() - 1).max(1) as f64;
        sum += total - (1.0 - doubt) * scaled[*label] - doubt * others;
    }
    sum / held.len().max(1) as f64
}

/// The temperature of least loss, and that loss: a golden-section search over its logarithm, in which the loss has one
/// valley (it is convex in the reciprocal). `held` are logits of held-out images, and the label of each.
pub fn best_temperature(held: &[(&[f64], usize)]) -> (f64, f64) {
    let golden = (5f64.sqrt() - 1.0) / 2.0;
    let (mut low, mut high) = (TEMPERATURES.0.ln(), TEMPERATURES.1.ln());
    for _ in 0..40 {
        let (a, b) = (high - golden * (high - low), low + golden * (high - low));
        if loss_at(held, a.exp()) < loss_at(held, b.exp()) { high = b } else { low = a }
    }
    let temperature = ((low + high) / 2.0).exp();
    (temperature, loss_at(held, temperature))
}
