//! How many parameters a model has, before any is made.

use candle_core::Result;
use model_core::config::{FeedForwardKind, ViTConfig};

use super::ViT;

impl ViT {
    /// Most parameters of a model here. In training each takes 20 bytes: its value, its gradient, two moments and a moving
    /// average of the value.
    pub const MAX_PARAMETERS: u64 = 1 << 29;

    /// The parameters of [`ViT::init_kind`] of a valid configuration.
    pub fn num_parameters(config: &ViTConfig, kind: FeedForwardKind) -> u64 {
        let (b, e) = (&config.backbone, &config.experts);
        let [d, f, experts, layers] = [b.d_model, b.d_ff, e.num_experts, b.num_layers].map(|size| size as u64);
        let linear = |out: u64, inputs: u64| out * inputs + out;
        let stem: u64 = b
            .stem_inputs()
            .map(|(layer, _, channels)| {
                let out = layer.channels as u64;
                linear(out, layer.window_len(channels) as u64) + if layer.norm { 2 * out } else { 0 }
            })
            .sum();
        let attention = linear(3 * d, d) + linear(d, d) + 4 * d;
        let around = if b.has_blocks() { b.num_tokens() as u64 * d + 2 * d } else { 0 };
        let router = experts * d;
        let pair = 2 * d * f;
        let rotated = router + experts * e.angles_per_expert(&b.shape()) as u64;
        let shares = b.substrates.shared && kind == FeedForwardKind::Butterfly && b.has_blocks();
        let feed_forward = match kind {
            FeedForwardKind::Butterfly => rotated + if shares { 0 } else { pair },
            FeedForwardKind::ButterflyGains => rotated + pair + experts * f,
            FeedForwardKind::ButterflyTied => rotated + d * f + d,
            FeedForwardKind::Dense => pair,
            FeedForwardKind::LowRankExperts => router + experts * 2 * b.shape().low_rank() as u64 * (d + f),
            FeedForwardKind::DenseExperts
            | FeedForwardKind::TernaryExperts
            | FeedForwardKind::Int4Experts
            | FeedForwardKind::Int8Experts => router + experts * pair,
        };
        let head = linear(config.num_classes as u64, d);
        stem + around + layers * (attention + feed_forward) + if shares { pair } else { 0 } + head
    }

    /// Refuses a model that no memory holds.
    ///
    /// # Errors
    /// When the configuration is invalid, or has more than [`ViT::MAX_PARAMETERS`].
    pub fn check_size(config: &ViTConfig, kind: FeedForwardKind) -> Result<()> {
        config.validate().map_err(super::invalid)?;
        let parameters = Self::num_parameters(config, kind);
        if parameters > Self::MAX_PARAMETERS {
            candle_core::bail!(
                "the model has {parameters} parameters, more than {}; take a smaller d_model, d_ff, num_experts, \
                 num_classes or num_layers",
                Self::MAX_PARAMETERS
            );
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use model_core::config::{ExpertConfig, MAX_DEPTH, MAX_EXPERTS, MAX_SIZE, StemLayer};
    use model_core::random::AngleSpread;

    const KINDS: [FeedForwardKind; 9] = [
        FeedForwardKind::Butterfly,
        FeedForwardKind::ButterflyGains,
        FeedForwardKind::ButterflyTied,
        FeedForwardKind::DenseExperts,
        FeedForwardKind::Dense,
        FeedForwardKind::TernaryExperts,
        FeedForwardKind::Int4Experts,
        FeedForwardKind::Int8Experts,
        FeedForwardKind::LowRankExperts,
    ];

    #[test]
    fn the_number_is_that_of_the_parameters_made() {
        let mut shared = ViTConfig::preset("tiny").unwrap();
        shared.backbone.substrates.shared = true;
        shared.experts.stages_out = 0;
        let mut stem_alone = shared.clone();
        stem_alone.backbone.num_layers = 0;
        for config in [ViTConfig::preset("tiny").unwrap(), shared, stem_alone] {
            for kind in KINDS {
                let made = ViT::init_kind(&config, kind, AngleSpread::Narrow, 1).unwrap();
                let made: usize = made.parameters().all().values().map(|var| var.elem_count()).sum();
                assert_eq!(ViT::num_parameters(&config, kind), made as u64, "{kind:?}");
            }
        }
    }

    #[test]
    fn the_largest_valid_configuration_is_counted_and_refused() {
        let mut config = ViTConfig::preset("tiny").unwrap();
        config.num_classes = MAX_SIZE;
        let backbone = &mut config.backbone;
        (backbone.d_model, backbone.d_ff, backbone.num_layers) = (MAX_SIZE, MAX_SIZE, MAX_DEPTH);
        backbone.stem = vec![StemLayer::patch(MAX_SIZE, 2)];
        config.experts = ExpertConfig {
            num_experts: MAX_EXPERTS,
            stages_in: 16,
            stages_hidden: 16,
            stages_out: 16,
            ..config.experts
        };
        for kind in KINDS {
            let said = ViT::init_kind(&config, kind, AngleSpread::Narrow, 1).unwrap_err().to_string();
            assert!(said.contains("parameters, more than 536870912"), "{kind:?}: {said}");
        }
    }
}
