//! AdamW (arXiv 1711.05101) over named parameters, with state that a checkpoint can hold.

use std::collections::BTreeMap;

use candle_core::{Result, Tensor};

use crate::parameters::{Parameters, is_angle, is_router};

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

    /// Moves every parameter that has a gradient; returns the gradient's global norm before clipping.
    ///
    /// # Errors
    /// When a gradient's length is not its parameter's.
    pub fn step(&mut self, parameters: &Parameters, gradients: &Gradients, learning_rate: f64) -> Result<f64> {
        let c = self.config;
        self.step += 1;
        let square_sum: f64 = gradients.values().map(|g| g.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>()).sum();
        let norm = square_sum.sqrt();
        let clip = if norm > c.max_grad_norm { c.max_grad_norm / norm } else { 1.0 } as f32;
        let steps = i32::try_from(self.step).unwrap_or(i32::MAX);
        let (correction1, correction2) = (1.0 - c.beta1.powi(steps), 1.0 - c.beta2.powi(steps));
        let (beta1, beta2, eps) = (c.beta1 as f32, c.beta2 as f32, c.eps as f32);
        let root_correction = (1.0 / correction2.sqrt()) as f32;
        for (name, gradient) in gradients {
            let var = parameters.var(name)?;
            let mut values = var.flatten_all()?.to_vec1::<f32>()?;
            if values.len() != gradient.len() {
                candle_core::bail!("gradient of {name} has {} values, the parameter {}", gradient.len(), values.len());
            }
            let moments = self
                .moments
                .entry(name.clone())
                .or_insert_with(|| Moments { mean: vec![0.0; gradient.len()], square: vec![0.0; gradient.len()] });
            let learning_rate = learning_rate * c.rate_factor(name);
            let rate = (learning_rate / correction1) as f32;
            let decay = if is_decayed(name) { 1.0 - (learning_rate * c.weight_decay) as f32 } else { 1.0 };
            let state = moments.mean.iter_mut().zip(&mut moments.square);
            for ((value, g), (mean, square)) in values.iter_mut().zip(gradient).zip(state) {
                let g = g * clip;
                *mean = beta1 * *mean + (1.0 - beta1) * g;
                *square = beta2 * *square + (1.0 - beta2) * g * g;
                *value = *value * decay - rate * *mean / (square.sqrt() * root_correction + eps);
            }
            var.set(&Tensor::from_vec(values, var.shape(), var.device())?)?;
        }
        Ok(norm)
    }
}

fn is_decayed(name: &str) -> bool {
    const MATRICES: [&str; 8] = ["weight", "up", "down", "router", "up_in", "up_out", "down_in", "down_out"];
    MATRICES.contains(&name.rsplit('.').next().unwrap_or_default())
}
