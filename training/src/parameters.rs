//! Named parameters, and which roundings a forward pass applies to them.

use std::collections::{BTreeMap, BTreeSet};

use candle_core::{Device, Result, Tensor, Var};

use crate::ops::Activations;

/// Which roundings the forward pass applies to parameters and activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Quantizers {
    /// Substrates are latent matrices, to be ternarised.
    pub substrates: bool,
    /// Angles and routers are latent values, to be rounded to their codes.
    pub experts: bool,
    /// Activations that meet a substrate.
    pub activations: Activations,
}

impl Quantizers {
    /// Parameters as they are: the float path over an artifact's values.
    pub const NONE: Self = Self { substrates: false, experts: false, activations: Activations::Float };
    /// Training from scratch: every rounding the integer engine makes.
    pub const ALL: Self = Self { substrates: true, experts: true, activations: Activations::Int8 };
    /// Training an expert set on the substrates of an artifact.
    pub const EXPERTS: Self = Self { substrates: false, experts: true, activations: Activations::Int8 };
}

/// Named parameters; the names are those of `FORMAT.md`.
#[derive(Debug, Clone, Default)]
pub struct Parameters {
    vars: BTreeMap<String, Var>,
    frozen: BTreeSet<String>,
}

impl Parameters {
    /// The tensor of that name: part of the graph unless frozen.
    pub fn get(&self, name: &str) -> Result<Tensor> {
        let var = self.var(name)?;
        Ok(if self.frozen.contains(name) { var.as_detached_tensor() } else { var.as_tensor().clone() })
    }

    /// The substrate `part` (`up` or `down`) of the layer `name`; one that all layers share has no layer in its name.
    pub fn substrate(&self, name: &str, part: &str) -> Result<Tensor> {
        self.get(&format!("moe.{part}")).or_else(|_| self.get(&format!("{name}.{part}")))
    }

    /// The variable of that name.
    pub fn var(&self, name: &str) -> Result<&Var> {
        self.vars.get(name).ok_or_else(|| candle_core::Error::Msg(format!("no parameter is named {name}")).bt())
    }

    /// Every parameter, by name.
    pub fn all(&self) -> &BTreeMap<String, Var> {
        &self.vars
    }

    /// The parameters that training moves.
    pub fn trainable(&self) -> impl Iterator<Item = (&String, &Var)> {
        self.vars.iter().filter(|(name, _)| !self.frozen.contains(*name))
    }

    /// Replaces a parameter's values.
    ///
    /// # Errors
    /// When there is no such parameter or the number of values differs.
    pub fn set(&self, name: &str, values: &[f32]) -> Result<()> {
        let var = self.var(name)?;
        var.set(&Tensor::from_slice(values, var.shape(), var.device())?)
    }

    /// The same parameters with those for which `frozen` is true left out of the graph.
    pub(crate) fn freeze(mut self, frozen: impl Fn(&str) -> bool) -> Self {
        self.frozen = self.vars.keys().filter(|name| frozen(name)).cloned().collect();
        self
    }

    /// Adds a parameter, or replaces one.
    ///
    /// # Errors
    /// When `values` do not fill `shape`.
    pub fn insert(&mut self, name: impl Into<String>, values: Vec<f32>, shape: &[usize]) -> Result<()> {
        self.vars.insert(name.into(), Var::from_vec(values, shape, &Device::Cpu)?);
        Ok(())
    }

    pub(crate) fn values(&self, name: &str) -> Result<Vec<f32>> {
        self.var(name)?.flatten_all()?.to_vec1()
    }
}

/// Whether a parameter belongs to the expert set (the rest is backbone).
pub fn is_expert_set_parameter(name: &str) -> bool {
    name.starts_with("head.") || name.contains(".moe.r")
}

/// Whether a parameter is the angles of a rotation.
pub fn is_angle(name: &str) -> bool {
    name.contains(".moe.rotation_")
}

/// Whether a parameter is a router's gate.
pub fn is_router(name: &str) -> bool {
    name.ends_with(".moe.router")
}
