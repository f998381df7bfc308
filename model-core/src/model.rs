//! The facade that server and trainer see: artifact bytes in, logits out.
//!
//! A [`Backbone`] is loaded once and shared; an [`ExpertSet`] is bound to one backbone and small; a [`Session`] is
//! the scratch of one compute thread (or one small team of threads). Pixels are f32, channel-last `[H, W, 3]`,
//! normalised by [`Backbone::preprocess`].
//!
//! Rows of a batch may belong to different expert sets of the session's backbone. Every row's answer is bit for bit
//! what it would be alone: all sums run in an order that does not depend on the other rows.

use std::sync::Arc;

use candle_core::{Device, Tensor};

use crate::artifact::{ArtifactError, BackboneArtifact, Digest, ExpertSetArtifact, read_backbone, read_expert_set};
use crate::config::{BackboneConfig, ConfigError, ExpertConfig};
use crate::engine;
use crate::image::Preprocess;
use crate::kernels::{Isa, KernelError};
use crate::vit::{Quantizers, ViT};
use crate::weights::{BackboneWeights, ExpertSetWeights};

pub use crate::engine::{Row, Team, Welcome};

/// Why a model could not be built or run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// The file is not a valid artifact of the expected kind.
    #[error(transparent)]
    Artifact(#[from] ArtifactError),
    /// The configuration describes no model.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A kernel refused a shape or value.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The float path could not be built or run.
    #[error("float path: {0}")]
    Float(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// A tensor, or a slice handed to [`Session::forward`], does not have the size that the configuration asks for.
    #[error("{what}: expected {expected} values, got {got}")]
    Length {
        /// Which one.
        what: &'static str,
        /// Values that the configuration asks for.
        expected: usize,
        /// Values that it has.
        got: usize,
    },
    /// A row's expert set is bound to another backbone than the session's.
    #[error("the expert set is bound to backbone {expected}, but the session runs {got}")]
    ForeignSet {
        /// The backbone that the set names.
        expected: Digest,
        /// The session's.
        got: Digest,
    },
    /// More rows than the session has scratch for.
    #[error("{rows} rows are more than the session's {max_batch}")]
    BatchTooLarge {
        /// Rows handed in.
        rows: usize,
        /// What the session was made for.
        max_batch: usize,
    },
}

/// A backbone packed for this CPU, with everything that expert sets share.
#[derive(Debug)]
pub struct Backbone {
    name: String,
    digest: Digest,
    preprocess: Preprocess,
    engine: engine::Backbone,
}

impl Backbone {
    /// Reads, checks and packs a backbone artifact for the best instruction set (or the one `BVIT_ISA` names).
    ///
    /// # Errors
    /// [`ModelError::Artifact`] naming what is wrong with the file; [`ModelError::Kernel`] when `BVIT_ISA` names an
    /// instruction set that this CPU does not have.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, ModelError> {
        let BackboneArtifact { name, weights, preprocess, digest, .. } = read_backbone(bytes)?;
        Self::from_weights(name, &weights, preprocess, digest, Isa::from_env()?)
    }

    /// Packs weights for `isa`. The digest is what expert sets will be checked against.
    ///
    /// # Errors
    /// [`ModelError::Config`] or [`ModelError::Length`] when the weights are not those of a valid configuration.
    pub fn from_weights(
        name: String,
        weights: &BackboneWeights,
        preprocess: Preprocess,
        digest: Digest,
        isa: Isa,
    ) -> Result<Self, ModelError> {
        Ok(Self { name, digest, preprocess, engine: engine::Backbone::pack(weights, isa)? })
    }

    /// The name that its maker gave it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Identity of document and tensors; expert sets name their backbone by it.
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// Shapes.
    pub fn config(&self) -> &BackboneConfig {
        self.engine.config()
    }

    /// How an image becomes pixels.
    pub fn preprocess(&self) -> &Preprocess {
        &self.preprocess
    }

    /// The instruction set that it was packed for.
    pub fn isa(&self) -> Isa {
        self.engine.isa()
    }

    /// Bytes that it occupies in memory.
    pub fn resident_bytes(&self) -> usize {
        size_of::<Self>() + self.name.len() + self.engine.heap_bytes()
    }

    /// Values of one image's pixels, `image_size * image_size * 3`.
    pub fn pixels_len(&self) -> usize {
        self.config().image_size.pow(2) * 3
    }
}

/// One task's experts, routers, head and labels, packed for one [`Backbone`]. Angles and router weights stay integer
/// codes in memory.
#[derive(Debug)]
pub struct ExpertSet {
    name: String,
    digest: Digest,
    backbone_digest: Digest,
    labels: Vec<String>,
    engine: engine::ExpertSet,
}

impl ExpertSet {
    /// Reads and checks an expert-set artifact for `backbone`.
    ///
    /// # Errors
    /// [`ModelError::Artifact`] naming what is wrong with the file, or that it is bound to another backbone.
    pub fn from_bytes(bytes: &[u8], backbone: &Backbone) -> Result<Self, ModelError> {
        let artifact = read_expert_set(bytes)?;
        artifact.check_backbone(backbone.config(), backbone.digest)?;
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
        let engine = engine::ExpertSet::pack(&weights, &backbone.engine)?;
        Ok(Self { name, digest, backbone_digest: backbone.digest, labels: weights.labels, engine })
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

    /// Shapes.
    pub fn config(&self) -> &ExpertConfig {
        self.engine.config()
    }

    /// Bytes that it occupies in memory.
    pub fn resident_bytes(&self) -> usize {
        let labels: usize = self.labels.iter().map(|label| size_of::<String>() + label.len()).sum();
        size_of::<Self>() + self.name.len() + labels + self.engine.heap_bytes()
    }

    pub(crate) fn engine(&self) -> &engine::ExpertSet {
        &self.engine
    }
}

/// Everything one caller needs to run batches: scratch for `max_batch` images and, above one, helper threads.
///
/// All scratch is allocated here; a forward allocates nothing, except the first time it meets an expert set whose
/// `top_k` exceeds what the scratch was made for.
#[derive(Debug)]
pub struct Session {
    backbone: Arc<Backbone>,
    engine: engine::Session,
}

impl Session {
    /// Scratch for batches of up to `max_batch` images on `backbone`, computed by `threads` threads: the caller's and
    /// `threads - 1` helpers that live as long as the session. Zeros count as one.
    pub fn new(backbone: &Arc<Backbone>, max_batch: usize, threads: usize) -> Self {
        let engine = engine::Session::new(&backbone.engine, max_batch.max(1), threads.max(1));
        Self { backbone: Arc::clone(backbone), engine }
    }

    /// `count` sessions for as many callers, without threads of their own: a caller that has nothing to do may
    /// [`help`](Session::help) another. The scratch of each thread serves in all of them.
    pub fn group(backbone: &Arc<Backbone>, max_batch: usize, count: usize) -> Vec<Self> {
        let sessions = engine::Session::group(&backbone.engine, max_batch.max(1), count);
        sessions.into_iter().map(|engine| Self { backbone: Arc::clone(backbone), engine }).collect()
    }

    /// Where others of its group may help.
    pub fn team(&self) -> Team {
        self.engine.team()
    }

    /// Shares the forward passes of another session of its group for as long as helpers are welcome there and `leave`,
    /// which is asked every few microseconds, says no.
    pub fn help(&mut self, team: &Team, leave: impl Fn() -> bool) {
        self.engine.help(team, leave);
    }

    /// The backbone that it runs.
    pub fn backbone(&self) -> &Arc<Backbone> {
        &self.backbone
    }

    /// Most rows of one [`Session::forward`].
    pub fn max_batch(&self) -> usize {
        self.engine.max_batch()
    }

    /// Most bytes by which batches with sets like `experts` make the scratch of a new session grow, once: none for up to 64
    /// experts, two of which are chosen, without an `out` rotation.
    pub fn growth(backbone: &Backbone, max_batch: usize, experts: &ExpertConfig) -> usize {
        engine::Session::growth(backbone.config(), max_batch, experts)
    }

    /// Bytes of scratch.
    pub fn resident_bytes(&self) -> usize {
        size_of::<Self>() + self.engine.heap_bytes()
    }

    /// Classifies every row: writes its logits and, where asked for, which experts its patches went to.
    ///
    /// # Errors
    /// Nothing is computed when there are more rows than [`Session::max_batch`], a slice has the wrong length, or a
    /// set belongs to another backbone.
    pub fn forward(&mut self, rows: &mut [Row<'_>]) -> Result<(), ModelError> {
        if let Some(row) = rows.iter().find(|row| row.set.backbone_digest != self.backbone.digest) {
            return Err(ModelError::ForeignSet { expected: row.set.backbone_digest, got: self.backbone.digest });
        }
        self.engine.forward(&self.backbone.engine, rows)
    }
}

/// The float path: an artifact's dequantised values with float activations, as a reader written from `FORMAT.md`
/// computes them. Some hundred times slower than a [`Session`], and the measure of what its roundings cost.
#[derive(Debug)]
pub struct FloatModel {
    vit: ViT,
}

impl FloatModel {
    /// Reads and checks a backbone artifact and an expert set that is bound to it.
    ///
    /// # Errors
    /// [`ModelError::Artifact`] naming what is wrong with a file, or that the two do not belong together.
    pub fn from_bytes(backbone: &[u8], set: &[u8]) -> Result<Self, ModelError> {
        let (backbone, set) = (read_backbone(backbone)?, read_expert_set(set)?);
        set.check_backbone(&backbone.weights.config, backbone.digest)?;
        // Frozen, so that a forward pass keeps no graph.
        let vit = ViT::from_weights(&backbone.weights, &set.weights).and_then(|vit| vit.freeze(|_| true));
        Ok(Self { vit: vit.map_err(float_error)? })
    }

    /// The logits of one image's `pixels [image_size, image_size, 3]`, normalised.
    ///
    /// # Errors
    /// [`ModelError::Length`] when there are more or fewer pixels.
    pub fn logits(&self, pixels: &[f32]) -> Result<Vec<f32>, ModelError> {
        let side = self.vit.config().backbone.image_size;
        let expected = side * side * 3;
        if pixels.len() != expected {
            return Err(ModelError::Length { what: "pixels", expected, got: pixels.len() });
        }
        let logits = Tensor::from_slice(pixels, (1, side, side, 3), &Device::Cpu)
            .and_then(|pixels| self.vit.forward(&pixels, Quantizers::NONE)?.logits.flatten_all()?.to_vec1());
        logits.map_err(float_error)
    }
}

fn float_error(error: candle_core::Error) -> ModelError {
    ModelError::Float(Box::new(error))
}
