//! One task's half of a model, packed for one backbone.

use std::sync::Arc;

use super::backbone::Backbone;
use super::moe::ExpertLayer;
use super::packed::PackedLayer;
use crate::artifact::{Digest, ExpertSetArtifact, Lender, read_expert_set};
use crate::config::{BackboneConfig, ExpertConfig};
use crate::error::{ModelError, expect_len};
use crate::familiarity::Familiarity;
use crate::image::View;
use crate::projection::Projection;
use crate::weights::{ExpertSetWeights, Precision};

/// One task's experts, routers, head and labels, packed for one [`Backbone`]. Angles and router weights stay
/// integer codes in memory.
#[derive(Debug)]
pub struct ExpertSet {
    name: String,
    digest: Digest,
    backbone_digest: Digest,
    labels: Vec<String>,
    config: ExpertConfig,
    /// Of the set itself, or of the one that lends them.
    pub(super) layers: Arc<[ExpertLayer]>,
    borrowed_experts: Option<Digest>,
    pub(super) head: PackedLayer,
    /// What the head sees of the pooled features.
    pub(super) projection: Option<Projection>,
    pub(super) temperature: f32,
    familiarity: Option<Familiarity>,
    view: View,
}

impl ExpertSet {
    /// Reads and checks the artifact of an expert set with experts of its own for `backbone`.
    ///
    /// # Errors
    /// [`ModelError::Artifact`] naming what is wrong with the file, or that it is bound to another backbone
    /// or borrows its experts.
    pub fn from_bytes(bytes: &[u8], backbone: &Backbone) -> Result<Self, ModelError> {
        Self::from_artifact(read_expert_set(bytes)?, backbone, None)
    }

    /// Packs an artifact that was read, for `backbone`. `lender` is the set whose digest it names, if it borrows experts;
    /// they stay where they are.
    ///
    /// # Errors
    /// [`ModelError::Artifact`] when it is bound to another backbone,
    /// or may not borrow from `lender` ([`ExpertSetArtifact::check_lender`]).
    pub fn from_artifact(
        artifact: ExpertSetArtifact,
        backbone: &Backbone,
        lender: Option<&Self>,
    ) -> Result<Self, ModelError> {
        artifact.check_backbone(backbone.config(), backbone.digest())?;
        artifact.check_lender(lender.map(Self::as_lender))?;
        let ExpertSetArtifact { name, weights, digest, borrowed_experts, view, .. } = artifact;
        let set = match lender.filter(|_| borrowed_experts.is_some()) {
            None => Self::from_weights(name, weights, digest, backbone),
            Some(lender) => {
                Self::with_layers(name, weights, digest, backbone, (Arc::clone(&lender.layers), borrowed_experts))
            }
        }?;
        Ok(Self { view, ..set })
    }

    fn as_lender(&self) -> Lender<'_> {
        Lender {
            digest: self.digest,
            borrows: self.borrowed_experts.is_some(),
            config: &self.config,
            backbone_digest: self.backbone_digest,
        }
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
        let layers = weights.layers.iter().enumerate();
        let layers = layers.map(|(i, layer)| ExpertLayer::pack(layer, &weights.config, i, [d_model, d_ff]));
        let layers = layers.collect::<Result<_, _>>()?;
        Self::with_layers(name, weights, digest, backbone, (layers, None))
    }

    fn with_layers(
        name: String,
        weights: ExpertSetWeights,
        digest: Digest,
        backbone: &Backbone,
        (layers, borrowed_experts): (Arc<[ExpertLayer]>, Option<Digest>),
    ) -> Result<Self, ModelError> {
        let (head, classes) = (&weights.head, weights.labels.len());
        let features = weights.projection.map_or(backbone.config().d_model, Projection::features);
        let head = match head.weight.precision() {
            Precision::Int8 => PackedLayer::head(backbone.isa(), head, classes, features)?,
            Precision::F32 | Precision::F16 => PackedLayer::f32(backbone.isa(), head, classes, features)?,
        };
        let statistics = weights.familiarity.as_ref();
        let familiarity =
            statistics.map(|statistics| Familiarity::new(statistics, backbone.background())).transpose()?;
        let familiarity = familiarity.map(|familiarity| familiarity.of_projected(weights.projection));
        Ok(Self {
            name,
            digest,
            backbone_digest: backbone.digest(),
            labels: weights.labels,
            config: weights.config,
            layers,
            borrowed_experts,
            head,
            projection: weights.projection,
            temperature: weights.temperature,
            familiarity,
            view: View::default(),
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

    /// What tells images of its kind from others, if it has the statistics.
    pub fn familiarity(&self) -> Option<&Familiarity> {
        self.familiarity.as_ref()
    }

    /// The part of a picture that it looks at, unless a request says otherwise.
    pub fn view(&self) -> View {
        self.view
    }

    /// The set whose experts it uses, if it has none of its own.
    pub fn borrowed_experts(&self) -> Option<Digest> {
        self.borrowed_experts
    }

    /// Bytes that it occupies in memory, without those of experts that it borrows.
    pub fn resident_bytes(&self) -> usize {
        let labels: usize = self.labels.iter().map(|label| size_of::<String>() + label.len()).sum();
        let familiarity = self.familiarity.as_ref().map_or(0, Familiarity::heap_bytes);
        let own = if self.borrowed_experts.is_none() { &self.layers[..] } else { &[] };
        let layers = own.iter().map(|layer| size_of::<ExpertLayer>() + layer.resident_bytes());
        size_of::<Self>() + self.name.len() + labels + layers.sum::<usize>() + self.head.heap_bytes() + familiarity
    }
}
