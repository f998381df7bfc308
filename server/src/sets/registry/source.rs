//! The seam between the registry and whatever turns files into models.

use std::sync::Arc;

use crate::sets::descriptor::{BackboneDescriptor, Location, SetDescriptor};

/// A decoded model with the bytes it turned out to take.
#[derive(Debug)]
pub struct Loaded<T> {
    pub value: T,
    /// Bytes of the model.
    pub bytes: usize,
}

/// Turns files into models. The registry is generic over it so that its guarantees can be tested with models that
/// cost nothing to make.
pub trait Source: Send + Sync + 'static {
    type Backbone: Send + Sync + 'static;
    /// A decoded expert set, tied to its backbone.
    type Set: Send + Sync + 'static;

    /// Reads the header of a set's file again. Blocking.
    fn describe_set(&self, name: &str, version: u64, location: &Location) -> anyhow::Result<SetDescriptor>;

    /// Reads and decodes a backbone. Blocking.
    fn load_backbone(&self, descriptor: &BackboneDescriptor) -> anyhow::Result<Loaded<Self::Backbone>>;

    /// Reads and decodes an expert set. Blocking. `lender` is the set whose experts it borrows, if it does.
    fn load_set(
        &self,
        descriptor: &SetDescriptor,
        backbone: &Arc<Self::Backbone>,
        lender: Option<&Self::Set>,
    ) -> anyhow::Result<Loaded<Self::Set>>;

    /// Bytes of working memory that come with a backbone.
    fn scratch(&self, backbone: &Self::Backbone) -> usize;

    /// Most bytes by which a set makes the working memory of its backbone grow.
    fn scratch_growth(&self, set: &SetDescriptor, backbone: &BackboneDescriptor) -> usize;

    /// Gives back what sets made the working memory of a backbone grow by.
    fn shrink_scratch(backbone: &Self::Backbone);
}
