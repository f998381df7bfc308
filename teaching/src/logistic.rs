//! Multinomial logistic regression with an L2 penalty.
//!
//! The loss is convex and smooth, so a limited-memory BFGS (Nocedal and Wright, algorithm 7.4) with a backtracking line
//! search finds its minimum from anywhere: some eighty lines, where an optimiser's library would bring its own arrays and
//! linear algebra into the server.

use std::collections::VecDeque;

use crate::TeachError;

/// Steps whose curvature is remembered.
const HISTORY: usize = 10;
/// Most steps of one fit.
const MOST_STEPS: usize = 150;
/// Halvings of a step before the minimum counts as reached.
const MOST_HALVINGS: usize = 30;
/// Of the largest component of the gradient, at which a fit ends. Weights of examples sum to one.
const GRADIENT: f64 = 2e-5;
/// Share of the slope that a step must win (Armijo).
const ARMIJO: f64 = 1e-4;

/// Rows to fit to.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rows<'a> {
    /// One example a row, `[rows, features]`.
    pub(crate) values: &'a [f32],
    pub(crate) features: usize,
    /// Class of each row.
    pub(crate) labels: &'a [usize],
    /// How much each row counts; they sum to one.
    pub(crate) weights: &'a [f64],
    pub(crate) classes: usize,
}

/// Sum of products in sixteen lanes, which the compiler turns into vectors.
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    const LANES: usize = 16;
    let mut sums = [0.0f32; LANES];
    let (a_chunks, b_chunks) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let rest: f32 = a_chunks.remainder().iter().zip(b_chunks.remainder()).map(|(a, b)| a * b).sum();
    for (a, b) in a_chunks.zip(b_chunks) {
        for lane in 0..LANES {
            sums[lane] += a[lane] * b[lane];
        }
    }
    rest + sums.iter().sum::<f32>()
}

fn dot64(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
}

fn add_scaled(out: &mut [f32], scale: f32, x: &[f32]) {
    out.iter_mut().zip(x).for_each(|(out, x)| *out += scale * x);
}

/// The logarithm of the sum of exponentials, without overflow.
pub(crate) fn log_sum_exp(logits: &[f64]) -> f64 {
    let max = logits.iter().fold(f64::NEG_INFINITY, |max, &logit| max.max(logit));
    max + logits.iter().map(|logit| (logit - max).exp()).sum::<f64>().ln()
}

/// Logits of a row under parameters `[classes, features + 1]`, the bias last.
pub(crate) fn logits(parameters: &[f32], row: &[f32]) -> Vec<f64> {
    let of = |class: &[f32]| f64::from(dot(&class[..row.len()], row) + class[row.len()]);
    parameters.chunks_exact(row.len() + 1).map(of).collect()
}

impl Rows<'_> {
    /// How many parameters a fit has.
    pub(crate) fn parameters(&self) -> usize {
        self.classes * (self.features + 1)
    }

    /// The loss, and its gradient.
    fn loss(&self, strength: f64, parameters: &[f32], gradient: &mut [f32]) -> f64 {
        gradient.fill(0.0);
        let mut loss = 0.0;
        let rows = self.values.chunks_exact(self.features).zip(self.labels).zip(self.weights);
        for ((row, &label), &weight) in rows {
            let logits = logits(parameters, row);
            let total = log_sum_exp(&logits);
            loss += weight * (total - logits[label]);
            for (class, logit) in logits.iter().enumerate() {
                let error = weight * ((logit - total).exp() - if class == label { 1.0 } else { 0.0 });
                let out = &mut gradient[class * (self.features + 1)..][..self.features + 1];
                add_scaled(&mut out[..self.features], error as f32, row);
                out[self.features] += error as f32;
            }
        }
        let classes = gradient.chunks_exact_mut(self.features + 1).zip(parameters.chunks_exact(self.features + 1));
        for (gradient, parameters) in classes {
            // The bias is free.
            let weights = &parameters[..self.features];
            loss += 0.5 * strength * dot64(weights, weights);
            add_scaled(&mut gradient[..self.features], strength as f32, weights);
        }
        loss
    }

    /// Moves `parameters` `[classes, features + 1]` to the minimum of the mean cross-entropy plus half of `strength` times
    /// the sum of squared weights.
    ///
    /// # Errors
    /// [`TeachError::Cancelled`] soon after `cancelled` says so.
    pub(crate) fn fit(
        &self,
        strength: f64,
        parameters: &mut Vec<f32>,
        cancelled: &dyn Fn() -> bool,
    ) -> Result<(), TeachError> {
        let mut gradient = vec![0.0; parameters.len()];
        let mut loss = self.loss(strength, parameters, &mut gradient);
        let mut history: VecDeque<(Vec<f32>, Vec<f32>, f64)> = VecDeque::with_capacity(HISTORY);
        for _ in 0..MOST_STEPS {
            if cancelled() {
                return Err(TeachError::Cancelled);
            }
            if gradient.iter().all(|g| f64::from(g.abs()) < GRADIENT) {
                break;
            }
            let direction = direction(&history, &gradient);
            let slope = dot64(&direction, &gradient);
            let mut step = if history.is_empty() { (1.0 / dot64(&gradient, &gradient).sqrt()).min(1.0) } else { 1.0 };
            let (mut next, mut next_gradient) = (vec![0.0; parameters.len()], vec![0.0; parameters.len()]);
            let mut found = false;
            for _ in 0..MOST_HALVINGS {
                next.copy_from_slice(parameters);
                add_scaled(&mut next, step as f32, &direction);
                let next_loss = self.loss(strength, &next, &mut next_gradient);
                if next_loss <= loss + ARMIJO * step * slope {
                    (found, loss) = (true, next_loss);
                    break;
                }
                step *= 0.5;
            }
            if !found {
                // What is left to win is below the precision of the sums.
                break;
            }
            let moved: Vec<f32> = next.iter().zip(&*parameters).map(|(a, b)| a - b).collect();
            let turned: Vec<f32> = next_gradient.iter().zip(&gradient).map(|(a, b)| a - b).collect();
            let curvature = dot64(&moved, &turned);
            // Positive for a convex loss, up to rounding.
            if curvature > 1e-12 {
                if history.len() == HISTORY {
                    history.pop_front();
                }
                history.push_back((moved, turned, curvature));
            }
            std::mem::swap(parameters, &mut next);
            gradient = next_gradient;
        }
        Ok(())
    }
}

/// Minus the gradient, times the inverse of the curvature as far as the last steps tell it.
fn direction(history: &VecDeque<(Vec<f32>, Vec<f32>, f64)>, gradient: &[f32]) -> Vec<f32> {
    let mut q: Vec<f32> = gradient.iter().map(|g| -g).collect();
    let mut shares = Vec::with_capacity(history.len());
    for (moved, turned, curvature) in history.iter().rev() {
        let share = dot64(moved, &q) / curvature;
        add_scaled(&mut q, -share as f32, turned);
        shares.push(share);
    }
    if let Some((_, turned, curvature)) = history.back() {
        let scale = (curvature / dot64(turned, turned)) as f32;
        q.iter_mut().for_each(|q| *q *= scale);
    }
    for ((moved, turned, curvature), share) in history.iter().zip(shares.iter().rev()) {
        let back = dot64(turned, &q) / curvature;
        add_scaled(&mut q, (share - back) as f32, moved);
    }
    q
}

#[cfg(test)]
mod tests {
    use model_core::random::SplitMix64;

    use super::*;

    fn example(rows: usize, features: usize, classes: usize) -> (Vec<f32>, Vec<usize>, Vec<f64>) {
        let mut random = SplitMix64::at(3, 0);
        let labels: Vec<usize> = (0..rows).map(|row| row % classes).collect();
        let mut values = random.normals(rows * features, 1.0);
        for (row, &label) in values.chunks_exact_mut(features).zip(&labels) {
            row[label % features] += 1.0;
        }
        (values, labels, vec![1.0 / rows as f64; rows])
    }

    #[test]
    fn the_gradient_is_that_of_the_loss() {
        let (values, labels, weights) = example(12, 5, 3);
        let rows = Rows { values: &values, features: 5, labels: &labels, weights: &weights, classes: 3 };
        let mut parameters = SplitMix64::at(4, 0).normals(rows.parameters(), 0.5);
        let (mut gradient, mut unused) = (vec![0.0; parameters.len()], vec![0.0; parameters.len()]);
        rows.loss(0.1, &parameters, &mut gradient);
        for i in 0..parameters.len() {
            let at = parameters[i];
            let mut loss = |value: f32| {
                parameters[i] = value;
                rows.loss(0.1, &parameters, &mut unused)
            };
            let slope = (loss(at + 1e-2) - loss(at - 1e-2)) / 2e-2;
            parameters[i] = at;
            assert!((slope - f64::from(gradient[i])).abs() < 1e-3, "{i}: {slope} is not {}", gradient[i]);
        }
    }

    #[test]
    fn the_minimum_is_found_whatever_the_start() {
        let (values, labels, weights) = example(60, 7, 4);
        let rows = Rows { values: &values, features: 7, labels: &labels, weights: &weights, classes: 4 };
        for strength in [1e-1, 1e-3] {
            let minima = [0.0, 3.0].map(|spread| {
                let mut parameters = SplitMix64::at(5, 0).normals(rows.parameters(), spread);
                rows.fit(strength, &mut parameters, &|| false).unwrap();
                let mut gradient = vec![0.0; parameters.len()];
                let loss = rows.loss(strength, &parameters, &mut gradient);
                assert!(gradient.iter().all(|g| g.abs() < 1e-3), "{gradient:?}");
                loss
            });
            assert!((minima[0] - minima[1]).abs() < 1e-4, "{minima:?}");
        }
        let mut parameters = vec![0.0; rows.parameters()];
        assert!(matches!(rows.fit(0.1, &mut parameters, &|| true), Err(TeachError::Cancelled)));
    }
}
