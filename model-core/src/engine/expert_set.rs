//! One task's half of a model, packed for one backbone.

use super::Backbone;
use super::expect_len;
use super::moe::ExpertLayer;
use crate::artifact::{Digest, ExpertSetArtifact, read_expert_set};
use crate::config::{BackboneConfig, ExpertConfig};
use crate::error::ModelError;
use crate::kernels::PackedF32;
use crate::weights::ExpertSetWeights;

/// One task's experts, routers, head and labels, packed for one [`Backbone`]. Angles and router weights stay
/// integer codes in memory.
#[derive(Debug)]
pub struct ExpertSet {
    name: String,
    digest: Digest,
    backbone_digest: Digest,
    labels: Vec<String>,
    config: ExpertConfig,
    pub(super) layers: Vec<ExpertLayer>,
    pub(super) head: PackedF32,
}

impl ExpertSet {
    /// Reads and checks an expert-set artifact for `backbone`.
    ///
    /// # Errors
    /// [`ModelError::Artifact`] naming what is wrong with the file, or that it is bound to another backbone.
    pub fn from_bytes(bytes: &[u8], backbone: &Backbone) -> Result<Self, ModelError> {
        let artifact = read_expert_set(bytes)?;
        artifact.check_backbone(backbone.config(), backbone.digest())?;
        let ExpertSetArtifact { name, weights, digest, .. } = artifact;
        Self::from_weights(name, weights, digest, backbone)
    }

    /// Packs weights for `backbone`.
    ///
    /// # Errors
    /// [`ModelError::Config`] or [`ModelError::Length`] when the weights do not fit the backbone.
    pub fn from_weights(
        name: String,
        weights: ExpertSetWeights,
        digest: Digest,
        backbone: &Backbone,
    ) -> Result<Self, ModelError> {
        let BackboneConfig { d_model, d_ff, num_layers, .. } = *backbone.config();
        weights.vit_config(backbone.config()).validate()?;
        expect_len("layers", weights.layers.len(), num_layers)?;
        let layers = weights.layers.iter().map(|layer| ExpertLayer::pack(layer, &weights.config, d_model, d_ff));
        let layers = layers.collect::<Result<_, _>>()?;
        let (head, classes) = (&weights.head, weights.labels.len());
        let head = PackedF32::pack(backbone.isa(), &head.weight, &head.bias, classes, d_model)?;
        Ok(Self {
            name,
            digest,
            backbone_digest: backbone.digest(),
            labels: weights.labels,
            config: weights.config,
            layers,
            head,
        })
    }

    /// The name that its maker gave it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Identity of document and tensors.
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// Identity of the backbone that it runs on.
    pub fn backbone_digest(&self) -> Digest {
        self.backbone_digest
    }

    /// One per class, in the order of the logits.
    pub fn labels(&self) -> &[String] {
        &self.labels
    }

    pub fn config(&self) -> &ExpertConfig {
        &self.config
    }

    /// Bytes that it occupies in memory.
    pub fn resident_bytes(&self) -> usize {
        let labels: usize = self.labels.iter().map(|label| size_of::<String>() + label.len()).sum();
        let layers = self.layers.iter().map(|layer| size_of::<ExpertLayer>() + layer.resident_bytes());
        size_of::<Self>() + self.name.len() + labels + layers.sum::<usize>() + self.head.resident_bytes()
    }
}
