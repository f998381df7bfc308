//! How memory grows with the number of experts, measured on artifacts that are really written and loaded.

use anyhow::Result;
use model_core::artifact::{Header, read_backbone, write_backbone, write_expert_set};
use model_core::config::ViTConfig;
use model_core::engine::{Backbone, ExpertSet};
use model_core::footprint::{components, runtime_compression};
use model_core::image::Preprocess;
use model_core::weights::StemWeights;
use serde::Serialize;
use serde_json::Value;
use training::vit::ViT;

/// What one number of experts takes, all layers together.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct ExpertMemory {
    /// Experts in each layer.
    pub num_experts: usize,
    /// Dense fp32 experts with router; computed.
    pub dense_bytes: f64,
    /// Substrates, their scales, angle codes and routers as the engine holds them: counted over the artifacts' tensors.
    pub feed_forward_bytes: u64,
    /// Length of the expert set's file.
    pub set_file_bytes: usize,
    /// What the loaded expert set occupies, head and labels included.
    pub set_resident_bytes: usize,
    /// Length of the backbone's file.
    pub backbone_file_bytes: usize,
    /// What the loaded backbone occupies.
    pub backbone_resident_bytes: usize,
}

/// Doubling from few to many.
const NUMBERS: [usize; 6] = [8, 16, 32, 64, 128, 256];

/// Writes and loads a random model of this shape, behind `stem` where there is one, for every number of experts.
pub(super) fn by_number_of_experts(config: &ViTConfig, stem: Option<&[StemWeights]>) -> Result<Vec<ExpertMemory>> {
    let labels: Vec<String> = (0..config.num_classes).map(|class| format!("class {class}")).collect();
    let measure = |num_experts| {
        let mut config = config.clone();
        config.experts.num_experts = num_experts;
        config.experts.top_k = config.experts.top_k.min(num_experts);
        let (mut backbone, set) = ViT::init(&config, 1)?.to_weights(&labels)?;
        backbone.stem = stem.map_or(backbone.stem, <[StemWeights]>::to_vec);
        let backbone_file = write_backbone("random", &backbone, &Preprocess::default(), &Value::Null)?;
        let digest = read_backbone(&backbone_file)?.digest;
        let set_file = write_expert_set("random", &set, (&config.backbone, digest), &Value::Null)?;
        let loaded_backbone = Backbone::from_bytes(&backbone_file)?;
        let loaded_set = ExpertSet::from_bytes(&set_file, &loaded_backbone)?;
        let feed_forward = |file: &[u8]| -> Result<u64> {
            let parts = components(&Header::from_bytes(file)?.contents, file.len() as u64).into_iter();
            let parts = parts.filter(|part| FEED_FORWARD.contains(&part.name));
            Ok(parts.map(|part| part.resident_bytes).sum())
        };
        let layers = config.backbone.num_layers as f64;
        Ok(ExpertMemory {
            num_experts,
            dense_bytes: layers * runtime_compression(&config.backbone.shape(), &config.experts).dense_bytes,
            feed_forward_bytes: feed_forward(&backbone_file)? + feed_forward(&set_file)?,
            set_file_bytes: set_file.len(),
            set_resident_bytes: loaded_set.resident_bytes(),
            backbone_file_bytes: backbone_file.len(),
            backbone_resident_bytes: loaded_backbone.resident_bytes(),
        })
    };
    NUMBERS.into_iter().map(measure).collect()
}

/// Components of [`model_core::footprint`] that dense experts would replace.
const FEED_FORWARD: [&str; 4] = ["substrates", "substrate scales", "angle codes", "routers"];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn measured_bytes_grow_with_the_experts_and_agree_with_the_accounting() {
        let config = ViTConfig::preset("tiny").unwrap();
        let points = by_number_of_experts(&config, None).unwrap();
        assert_eq!(points.iter().map(|p| p.num_experts).collect::<Vec<_>>(), NUMBERS);
        for pair in points.windows(2) {
            assert!(pair[0].set_file_bytes < pair[1].set_file_bytes, "{pair:?}");
            assert!(pair[0].set_resident_bytes < pair[1].set_resident_bytes, "{pair:?}");
            assert_eq!(pair[0].backbone_file_bytes, pair[1].backbone_file_bytes);
        }
        let eight =
            ViTConfig { experts: model_core::config::ExpertConfig { num_experts: 8, ..config.experts }, ..config };
        let counted = runtime_compression(&eight.backbone.shape(), &eight.experts).butterfly_bytes;
        assert_eq!(points[0].feed_forward_bytes as f64, counted * eight.backbone.num_layers as f64);
    }
}
