//! The half of a model that expert sets share, packed for this CPU.

use super::moe::Substrates;
use super::packed::PackedLayer;
use super::stem::Stem;
use crate::artifact::{ArtifactError, BackboneArtifact, Digest, read_backbone};
use crate::config::BackboneConfig;
use crate::error::{ModelError, expect_len};
use crate::familiarity::Background;
use crate::image::Preprocess;
use crate::kernels::Isa;
use crate::weights::{BackboneWeights, BlockWeights, Norm};

/// A backbone packed for this CPU, with everything that expert sets share.
#[derive(Debug)]
pub struct Backbone {
    name: String,
    digest: Digest,
    preprocess: Preprocess,
    isa: Isa,
    config: BackboneConfig,
    pub(super) stem: Stem,
    pub(super) pos_embed: Box<[f32]>,
    pub(super) blocks: Vec<Block>,
    pub(super) norm: Norm,
    background: Option<Background>,
}

/// One transformer block without its experts.
#[derive(Debug)]
pub(super) struct Block {
    pub(super) norm1: Norm,
    pub(super) qkv: PackedLayer,
    pub(super) proj: PackedLayer,
    pub(super) norm2: Norm,
    pub(super) substrates: Substrates,
}

fn expect_norm(what: &'static str, norm: &Norm, features: usize) -> Result<Norm, ModelError> {
    expect_len(what, norm.gamma.len(), features)?;
    expect_len(what, norm.beta.len(), features)?;
    Ok(norm.clone())
}

fn norm_bytes(norm: &Norm) -> usize {
    (norm.gamma.len() + norm.beta.len()) * size_of::<f32>()
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
    /// [`ModelError`] when the weights are not those of a valid configuration that the engine can run.
    pub fn from_weights(
        name: String,
        weights: &BackboneWeights,
        preprocess: Preprocess,
        digest: Digest,
        isa: Isa,
    ) -> Result<Self, ModelError> {
        let config = weights.config.clone();
        config.validate()?;
        expect_len("blocks", weights.blocks.len(), config.num_layers)?;
        let features = if config.has_blocks() { config.d_model } else { 0 };
        expect_len("pos_embed", weights.pos_embed.len(), config.num_tokens() * features)?;
        if let Some(block) = weights.unshared_block() {
            return Err(ArtifactError::NotShared { block }.into());
        }
        let stem = Stem::pack(isa, weights, &preprocess)?;
        let mut blocks: Vec<Block> = Vec::with_capacity(config.num_layers);
        for block in &weights.blocks {
            let lender = blocks.first().filter(|_| config.substrates.shared).map(|block| &block.substrates);
            blocks.push(Block::pack(block, &config, isa, lender)?);
        }
        let norm = expect_norm("norm", &weights.norm, features)?;
        let pos_embed = weights.pos_embed.clone().into();
        let background = weights.background.as_ref().map(Background::new).transpose()?;
        Ok(Self { name, digest, preprocess, isa, stem, pos_embed, blocks, norm, background, config })
    }

    /// The name that its maker gave it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Identity of document and tensors; expert sets name their backbone by it.
    pub fn digest(&self) -> Digest {
        self.digest
    }

    pub fn config(&self) -> &BackboneConfig {
        &self.config
    }

    /// How an image becomes pixels.
    pub fn preprocess(&self) -> &Preprocess {
        &self.preprocess
    }

    /// The instruction set that it was packed for.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Features of images of everything, if it has them.
    pub fn background(&self) -> Option<&Background> {
        self.background.as_ref()
    }

    /// Bytes that it occupies in memory.
    pub fn resident_bytes(&self) -> usize {
        let stem = self.stem.heap_bytes();
        let blocks = self.blocks.iter().enumerate().map(|(i, block)| {
            let shared = self.config.substrates.shared && i > 0;
            size_of::<Block>() + block.heap_bytes(shared)
        });
        let blocks: usize = blocks.sum();
        let tensors = stem + blocks + size_of_val(&*self.pos_embed) + norm_bytes(&self.norm);
        size_of::<Self>() + self.name.len() + tensors + self.background.as_ref().map_or(0, Background::heap_bytes)
    }

    /// Values of one image's pixels, `image_size * image_size * 3`.
    pub fn pixels_len(&self) -> usize {
        self.config.image_size.pow(2) * 3
    }
}

impl Block {
    /// `lender` has the codes, where they are shared.
    fn pack(
        weights: &BlockWeights,
        config: &BackboneConfig,
        isa: Isa,
        lender: Option<&Substrates>,
    ) -> Result<Self, ModelError> {
        let d_model = config.d_model;
        Ok(Self {
            norm1: expect_norm("norm1", &weights.norm1, d_model)?,
            qkv: PackedLayer::int8(isa, &weights.qkv, 3 * d_model, d_model)?,
            proj: PackedLayer::int8(isa, &weights.proj, d_model, d_model)?,
            norm2: expect_norm("norm2", &weights.norm2, d_model)?,
            substrates: match lender {
                Some(lender) => lender.with_scales(&weights.up.scale, &weights.down.scale)?,
                None => Substrates::pack(isa, &config.shape(), &weights.up, &weights.down)?,
            },
        })
    }

    /// `shared`: another block has the codes of the substrates.
    fn heap_bytes(&self, shared: bool) -> usize {
        let substrates = if shared { self.substrates.scales_bytes() } else { self.substrates.resident_bytes() };
        self.qkv.heap_bytes() + self.proj.heap_bytes() + norm_bytes(&self.norm1) + norm_bytes(&self.norm2) + substrates
    }
}
