//! The integer engine against its float reference.

#[path = "../../model-core/tests/common/mod.rs"]
mod common;

use std::sync::Arc;

use candle_core::{Device, Tensor};
use common::{expert_configs, minute_config, packed_config, relative_error};
use model_core::artifact::Digest;
use model_core::config::ViTConfig;
use model_core::engine::{Backbone, ExpertSet, Row, Session};
use model_core::image::Preprocess;
use model_core::kernels::Isa;
use training::ops::Activations;
use training::parameters::Quantizers;
use training::vit::ViT;

/// The candle model quantises the same activations except those of qkv and projection, and sums in another order. Codes
/// flip at rounding ties, and int8 attention weights are off by up to half a step in 127, so that logits agree to a few
/// percent of their norm; a wrong order, scale or sign would be off by all of it.
#[test]
fn logits_agree_with_the_candle_model() {
    let configs =
        expert_configs().into_iter().map(|experts| ViTConfig { experts, ..ViTConfig::preset("tiny").unwrap() });
    // And one whose features fill no vector of any instruction set.
    for (seed, config) in configs.chain([minute_config(), packed_config(false)]).enumerate() {
        let labels: Vec<_> = (0..config.num_classes).map(|i| format!("class {i}")).collect();
        let (backbone_weights, set_weights) = ViT::init(&config, seed as u64).unwrap().to_weights(&labels).unwrap();
        let side = config.backbone.image_size;
        let pixels: Vec<_> = (0..3 * side * side * 3).map(|i| (i * 31 % 255) as f32 / 64.0 - 2.0).collect();
        let input = Tensor::from_vec(pixels.clone(), (3, side, side, 3), &Device::Cpu).unwrap();
        let quantizers = Quantizers { activations: Activations::Int8, ..Quantizers::NONE };
        let vit = ViT::from_weights(&backbone_weights, &set_weights).unwrap();
        let expected = vit.forward(&input, quantizers).unwrap().logits.to_vec2::<f32>().unwrap();
        for isa in Isa::available() {
            let (name, digest) = ("test".to_owned(), Digest::of("backbone", &[]));
            let backbone =
                Backbone::from_weights(name.clone(), &backbone_weights, Preprocess::default(), digest, isa).unwrap();
            let set = ExpertSet::from_weights(name, set_weights.clone(), digest, &backbone).unwrap();
            let mut logits = vec![vec![f32::NAN; config.num_classes]; 3];
            let mut rows: Vec<_> = pixels
                .chunks_exact(side * side * 3)
                .zip(&mut logits)
                .map(|(pixels, logits)| Row { set: &set, pixels, logits, routing: None })
                .collect();
            Session::new(&Arc::new(backbone), 3, 1).forward(&mut rows).unwrap();
            for (logits, expected) in logits.iter().zip(&expected) {
                let error = relative_error(logits, expected);
                println!("{isa}, configuration {seed}: {error:.4}");
                assert!(error < 0.05, "{isa}, configuration {seed}: {logits:?} is not {expected:?}");
            }
        }
    }
}
