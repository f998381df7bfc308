//! The document of version 1: read, not written.

use serde::Deserialize;
use serde_json::Value;

use super::Parts;
use crate::artifact::contents::{
    BackboneEncoding, BackboneHeader, Contents, ExpertSetEncoding, ExpertSetHeader, StemEncoding,
};
use crate::artifact::digest::Digest;
use crate::artifact::error::ArtifactError;
use crate::config::{self, ConfigError, FloatFormat, SubstrateConfig};
use crate::image::{Preprocess, Resize, View};
use crate::weights::Precision;

#[derive(Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub(super) enum Document {
    Backbone {
        #[serde(rename = "format_version")]
        _format_version: u32,
        name: String,
        config: BackboneConfig,
        preprocess: Pixels,
        training: Value,
    },
    ExpertSet {
        #[serde(rename = "format_version")]
        _format_version: u32,
        name: String,
        config: ExpertConfig,
        backbone_config: BackboneConfig,
        backbone_digest: Digest,
        labels: Vec<String>,
        training: Value,
    },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct StemLayer {
    channels: usize,
    kernel: usize,
    stride: usize,
    padding: usize,
    norm_gelu: bool,
    residual: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct BackboneConfig {
    image_size: usize,
    stem: Vec<StemLayer>,
    d_model: usize,
    d_ff: usize,
    num_layers: usize,
    num_heads: usize,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ExpertConfig {
    num_experts: usize,
    top_k: usize,
    stages_in: usize,
    stages_hidden: usize,
    stages_out: usize,
    angle_bits: u32,
    router_bits: u32,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Pixels {
    resize: Resize,
    mean: [f32; 3],
    std: [f32; 3],
}

impl Document {
    pub(super) fn into_parts(self) -> Result<Parts, ArtifactError> {
        Ok(match self {
            Self::Backbone { name, config, preprocess: Pixels { resize, mean, std }, training, .. } => {
                let config = config::BackboneConfig::from(config);
                let encoding = BackboneEncoding {
                    stem: vec![StemEncoding::default(); config.stem.len()],
                    attention: Precision::F32,
                };
                let preprocess = Preprocess { resize, mean, std, ..Preprocess::default() };
                let header = BackboneHeader { config, encoding, preprocess, background: None, card: None };
                (name, Contents::Backbone(header.into()), training)
            }
            Self::ExpertSet { name, config, backbone_config, backbone_digest, labels, training, .. } => {
                let backbone = config::BackboneConfig::from(backbone_config);
                backbone.validate()?;
                let header = ExpertSetHeader {
                    config: config.convert()?,
                    encoding: ExpertSetEncoding::default(),
                    backbone: backbone.shape(),
                    backbone_config: Some(backbone),
                    backbone_digest,
                    borrowed_experts: None,
                    labels,
                    projection: None,
                    temperature: 1.0,
                    familiarity: None,
                    view: View::default(),
                    report: Value::Null,
                    card: None,
                };
                (name, Contents::ExpertSet(header.into()), training)
            }
        })
    }
}

impl From<BackboneConfig> for config::BackboneConfig {
    fn from(old: BackboneConfig) -> Self {
        let BackboneConfig { image_size, stem, d_model, d_ff, num_layers, num_heads } = old;
        let layer = |(i, old): (usize, StemLayer)| config::StemLayer {
            channels: old.channels,
            kernel: old.kernel,
            stride: old.stride,
            padding: [old.padding; 4],
            groups: 1,
            norm: old.norm_gelu,
            activation: if old.norm_gelu { config::Activation::Gelu } else { config::Activation::None },
            residual: old.residual.then_some(i),
        };
        let stem = stem.into_iter().enumerate().map(layer).collect();
        Self { image_size, stem, d_model, d_ff, num_layers, num_heads, substrates: SubstrateConfig::default() }
    }
}

impl ExpertConfig {
    fn convert(self) -> Result<config::ExpertConfig, ConfigError> {
        let Self { num_experts, top_k, stages_in, stages_hidden, stages_out, angle_bits, router_bits } = self;
        if router_bits == 4 {
            let reason = "4 is not 8 or 16".to_owned();
            return Err(ConfigError { field: "experts.router_bits", reason });
        }
        let angle_seed = None;
        Ok(config::ExpertConfig {
            num_experts,
            top_k,
            stages_in,
            stages_hidden,
            stages_out,
            angle_bits,
            angle_seed,
            router_bits,
            router_scales: FloatFormat::F32,
        })
    }
}
