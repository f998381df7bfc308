//! Storing the same weights in other encodings: what rounds, rounds here.

use super::{BackboneWeights, ExpertSetWeights, Linear, Matrix, Precision};
use crate::config::{FloatFormat, TernaryPacking};

/// How weights are to be stored; what is not said stays as it is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Encodings {
    /// Of ternary codes; loses nothing.
    pub packing: Option<TernaryPacking>,
    /// Of the scales of substrates and routers.
    pub scales: Option<FloatFormat>,
    /// Of attention. The engine rounds to int8 in the same way, whatever the file holds.
    pub attention: Option<Precision>,
    /// Of the stem but its first layer, which sees pixels. The engine rounds to int8 in the same way.
    pub stem: Option<Precision>,
    /// Of router codes: 4, 8 or 16.
    pub router_bits: Option<u32>,
    pub head: Option<Precision>,
}

impl Encodings {
    /// Rounds a backbone's weights to these encodings.
    pub fn encode_backbone(&self, weights: &mut BackboneWeights) {
        let substrates = &mut weights.config.substrates;
        substrates.packing = self.packing.unwrap_or(substrates.packing);
        substrates.scales = self.scales.unwrap_or(substrates.scales);
        for layer in weights.stem.iter_mut().skip(1) {
            encode_linear(&mut layer.conv, self.stem);
        }
        for block in &mut weights.blocks {
            encode_linear(&mut block.qkv, self.attention);
            encode_linear(&mut block.proj, self.attention);
            for scale in block.up.scale.iter_mut().chain(&mut block.down.scale) {
                *scale = substrates.scales.round(*scale);
            }
        }
    }

    /// Rounds a set's weights to these encodings. A borrower's configuration follows that of its lender.
    pub fn encode_expert_set(&self, weights: &mut ExpertSetWeights) {
        let config = &mut weights.config;
        let (bits, scales) = (config.router_bits, config.router_scales);
        config.router_bits = self.router_bits.unwrap_or(bits);
        config.router_scales = self.scales.unwrap_or(scales);
        if (config.router_bits, config.router_scales) != (bits, scales) {
            for layer in &mut weights.layers {
                let cols = (layer.router.len() / layer.router_scale.len().max(1)).max(1);
                for (codes, scale) in layer.router.chunks_exact_mut(cols).zip(&mut layer.router_scale) {
                    let row: Vec<f32> = codes.iter().map(|&code| f32::from(code) * *scale).collect();
                    *scale = router_row(&row, config.router_bits, config.router_scales, codes);
                }
            }
        }
        encode_linear(&mut weights.head, self.head);
    }
}

fn encode_linear(layer: &mut Linear, precision: Option<Precision>) {
    match precision {
        Some(precision) if precision != layer.weight.precision() => {
            layer.weight = Matrix::encode(&layer.weight.to_f32(), layer.bias.len(), precision);
        }
        _ => {}
    }
}

/// Router codes of one expert's gate weights, of `bits` bits, symmetric around zero: `round_half_even(weight / scale)`.
/// Returns the scale: the largest magnitude over the largest code, rounded to `format`, and 1 for a row of zeros.
pub fn router_row(row: &[f32], bits: u32, format: FloatFormat, codes: &mut [i16]) -> f32 {
    let limit = ((1i32 << (bits - 1)) - 1) as f32;
    let max = row.iter().fold(0f32, |max, weight| max.max(weight.abs()));
    let smallest = match format {
        FloatFormat::F32 => f32::MIN_POSITIVE,
        FloatFormat::F16 => half::f16::MIN_POSITIVE_SUBNORMAL.to_f32(),
    };
    let scale = if max > 0.0 { format.round((max / limit).max(smallest)) } else { 1.0 };
    for (code, weight) in codes.iter_mut().zip(row) {
        *code = (weight / scale).round_ties_even().clamp(-limit, limit) as i16;
    }
    scale
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ViTConfig;
    use crate::random::SplitMix64;
    use crate::random_weights::{backbone_weights, expert_set_weights};

    const TIGHTEST: Encodings = Encodings {
        packing: Some(TernaryPacking::FiveTrits),
        scales: Some(FloatFormat::F16),
        attention: Some(Precision::Int8),
        stem: Some(Precision::Int8),
        router_bits: Some(4),
        head: Some(Precision::Int8),
    };

    #[test]
    fn encoding_twice_changes_nothing_more_and_keeps_values_to_half_a_step() {
        let config = ViTConfig::preset("tiny").unwrap();
        let mut random = SplitMix64::at(3, 0);
        let (mut backbone, mut set) =
            (backbone_weights(&config.backbone, &mut random), expert_set_weights(&config, &mut random));
        let before = (backbone.clone(), set.clone());
        TIGHTEST.encode_backbone(&mut backbone);
        TIGHTEST.encode_expert_set(&mut set);
        assert_eq!(backbone.blocks[0].up.codes, before.0.blocks[0].up.codes);
        for (layer, old) in set.layers.iter().zip(&before.1.layers) {
            let d_model = config.backbone.d_model;
            let rows = layer.router.chunks(d_model).zip(&layer.router_scale);
            let old_rows = old.router.chunks(d_model).zip(&old.router_scale);
            for ((codes, scale), (old_codes, old_scale)) in rows.zip(old_rows) {
                for (code, old) in codes.iter().zip(old_codes) {
                    let error = (f32::from(*code) * scale - f32::from(*old) * old_scale).abs();
                    // Half a step, or what a scale rounded down by at most 2^-11 leaves of seven steps.
                    assert!(error <= scale * (0.5 + 7.0 / 2048.0), "{error} of a step of {scale}");
                }
            }
        }
        let once = (backbone.clone(), set.clone());
        TIGHTEST.encode_backbone(&mut backbone);
        TIGHTEST.encode_expert_set(&mut set);
        assert_eq!((backbone, set), once);
        let mut same = before.clone();
        Encodings::default().encode_backbone(&mut same.0);
        Encodings::default().encode_expert_set(&mut same.1);
        assert_eq!(same, before);
    }
}
