//! AdamW (arXiv 1711.05101) over named parameters, with state that a checkpoint can hold.

use std::collections::BTreeMap;

use candle_core::{Result, Tensor};

use crate::parameters::{Parameters, is_angle, is_router};
use crate::shards::in_turn;

/// Settings that stay the same through a run; the learning rate comes with each step.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct AdamWConfig {
    /// Decay of the gradient's mean.
    pub beta1: f64,
    /// Decay of the gradient's mean square.
    pub beta2: f64,
    /// Added to the root of the mean square.
    pub eps: f64,
    /// Decoupled decay of matrices; norms, biases, embeddings and angles are not decayed.
    pub weight_decay: f64,
    /// The gradient's global norm is scaled down to this.
    pub max_grad_norm: f64,
    /// Angles move at this many times the learning rate.
    #[serde(default = "one")]
    pub angle_rate: f64,
    /// Routers move at this many times the learning rate.
    #[serde(default = "one")]
    pub router_rate: f64,
}

fn one() -> f64 {
    1.0
}

impl AdamWConfig {
    /// How many times the learning rate the parameter of that name moves at; one of rate 0 is to be frozen.
    pub fn rate_factor(&self, name: &str) -> f64 {
        match name {
            _ if is_angle(name) => self.angle_rate,
            _ if is_router(name) => self.router_rate,
            _ => 1.0,
        }
    }
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self {
            beta1: 0.9,
            beta2: 0.99,
            eps: 1e-8,
            weight_decay: 0.05,
            max_grad_norm: 1.0,
            angle_rate: 1.0,
            router_rate: 1.0,
        }
    }
}

/// First and second moments of one parameter's gradient.
#[derive(Debug, Clone, Default)]
pub struct Moments {
    pub mean: Vec<f32>,
    pub square: Vec<f32>,
}

impl Moments {
    fn zeros(len: usize) -> Self {
        Self { mean: vec![0.0; len], square: vec![0.0; len] }
    }
}

#[derive(Debug, Clone)]
pub struct AdamW {
    config: AdamWConfig,
    pub step: u64,
    /// By parameter name.
    pub moments: BTreeMap<String, Moments>,
}

/// Gradients by parameter name, flattened.
pub type Gradients = BTreeMap<String, Vec<f32>>;

impl AdamW {
    /// An optimiser that has taken no step.
    pub fn new(config: AdamWConfig) -> Self {
        Self { config, step: 0, moments: BTreeMap::new() }
    }

    /// Moves every parameter that has a gradient, on so many threads; returns the gradient's global norm before clipping.
    /// A gradient whose norm is not finite moves nothing.
    ///
    /// # Errors
    /// When a gradient's length is not its parameter's.
    pub fn step(
        &mut self,
        parameters: &Parameters,
        gradients: &Gradients,
        learning_rate: f64,
        threads: usize,
    ) -> Result<f64> {
        let square_sum = |g: &Vec<f32>| Result::Ok(g.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>());
        let norm = in_turn(threads, gradients.values().collect(), square_sum)?.iter().sum::<f64>().sqrt();
        if !norm.is_finite() {
            return Ok(norm);
        }
        self.step += 1;
        for (name, gradient) in gradients {
            self.moments.entry(name.clone()).or_insert_with(|| Moments::zeros(gradient.len()));
        }
        let update = Update::new(self.config, self.step, learning_rate, norm);
        let moments = self.moments.iter_mut();
        let moved = moments.filter_map(|(name, moments)| Some((name, gradients.get(name)?, moments))).collect();
        in_turn(threads, moved, |(name, gradient, moments)| update.apply(parameters, name, gradient, moments))?;
        Ok(norm)
    }
}

/// One step's numbers.
struct Update {
    config: AdamWConfig,
    learning_rate: f64,
    /// Gradients are multiplied by this.
    clip: f32,
    /// `1 - beta1^step`, by which the mean is too small.
    mean_correction: f64,
    /// `1 - beta2^step`, by which the mean square is too small.
    square_correction: f64,
}

impl Update {
    fn new(config: AdamWConfig, step: u64, learning_rate: f64, norm: f64) -> Self {
        let clip = if norm > config.max_grad_norm { config.max_grad_norm / norm } else { 1.0 };
        let steps = i32::try_from(step).unwrap_or(i32::MAX);
        Self {
            config,
            learning_rate,
            clip: clip as f32,
            mean_correction: 1.0 - config.beta1.powi(steps),
            square_correction: 1.0 - config.beta2.powi(steps),
        }
    }

    fn apply(&self, parameters: &Parameters, name: &str, gradient: &[f32], moments: &mut Moments) -> Result<()> {
        let c = self.config;
        let var = parameters.var(name)?;
        let mut values = var.flatten_all()?.to_vec1::<f32>()?;
        if values.len() != gradient.len() {
            candle_core::bail!("gradient of {name} has {} values, the parameter {}", gradient.len(), values.len());
        }
        let (beta1, beta2, eps) = (c.beta1 as f32, c.beta2 as f32, c.eps as f32);
        let root_correction = (1.0 / self.square_correction.sqrt()) as f32;
        let learning_rate = self.learning_rate * c.rate_factor(name);
        let rate = (learning_rate / self.mean_correction) as f32;
        let decay = if is_decayed(name) { 1.0 - (learning_rate * c.weight_decay) as f32 } else { 1.0 };
        let state = moments.mean.iter_mut().zip(&mut moments.square);
        for ((value, g), (mean, square)) in values.iter_mut().zip(gradient).zip(state) {
            let g = g * self.clip;
            *mean = beta1 * *mean + (1.0 - beta1) * g;
            *square = beta2 * *square + (1.0 - beta2) * g * g;
            *value = *value * decay - rate * *mean / (square.sqrt() * root_correction + eps);
        }
        var.set(&Tensor::from_vec(values, var.shape(), var.device())?)
    }
}

fn is_decayed(name: &str) -> bool {
    const MATRICES: [&str; 8] = ["weight", "up", "down", "router", "up_in", "up_out", "down_in", "down_out"];
    MATRICES.contains(&name.rsplit('.').next().unwrap_or_default())
}
