//! From an artifact's weights to parameters and back.

use candle_core::Result;
use model_core::config::{BackboneConfig, ExpertConfig, FeedForwardKind, ViTConfig};
use model_core::kernels::gemm::scalar::ternarize;
use model_core::weights::{
    AngleCodes, BackboneWeights, BlockWeights, ExpertLayerWeights, ExpertSetWeights, Linear, Norm, StemWeights, Ternary,
};

use super::ViT;
use crate::parameters::Parameters;
use crate::quantize;

impl ViT {
    /// The values an artifact stands for. Meant for [`Quantizers::NONE`](crate::parameters::Quantizers::NONE): its substrates are already ternary.
    ///
    /// # Errors
    /// When the shapes of the weights do not fit their configuration.
    pub fn from_weights(backbone: &BackboneWeights, set: &ExpertSetWeights) -> Result<Self> {
        Self::from_weights_with(backbone, set, values, set.temperature)
    }

    /// Latent parameters that round to the artifact's values ([`ViT::to_weights`]), so that training can go on
    /// from it with [`Quantizers::ALL`](crate::parameters::Quantizers::ALL). The head is as it was before its temperature, which
    /// was fitted when training had ended.
    pub fn latent_from_weights(backbone: &BackboneWeights, set: &ExpertSetWeights) -> Result<Self> {
        Self::from_weights_with(backbone, set, latent, 1.0)
    }

    fn from_weights_with(
        backbone: &BackboneWeights,
        set: &ExpertSetWeights,
        substrate: fn(&Ternary) -> Vec<f32>,
        temperature: f32,
    ) -> Result<Self> {
        let config = set.vit_config(&backbone.config);
        // Angles of a seed take no bytes in a file, and many here.
        Self::check_size(&config, FeedForwardKind::Butterfly)?;
        let b = &config.backbone;
        if set.layers.len() != b.num_layers {
            candle_core::bail!("the set has experts for {} blocks of {}", set.layers.len(), b.num_layers);
        }
        let mut p = Parameters::default();
        for (i, layer) in backbone.stem.iter().enumerate() {
            insert_linear(&mut p, &format!("stem.{i}.conv"), &layer.conv)?;
            if let Some(layer) = &layer.norm {
                insert_norm(&mut p, &format!("stem.{i}.norm"), layer)?;
            }
        }
        // Blocks that share their codes but not their scales have matrices of their own here.
        let first = backbone.blocks.first().filter(|_| b.substrates.shared);
        let same = |first: &BlockWeights, block: &BlockWeights| block.up == first.up && block.down == first.down;
        let shared = first.filter(|first| backbone.blocks.iter().all(|block| same(first, block)));
        let substrates_of = |p: &mut Parameters, name: &str, block: &BlockWeights| -> Result<()> {
            p.insert(format!("{name}.up"), substrate(&block.up), &[b.d_ff, b.d_model])?;
            p.insert(format!("{name}.down"), substrate(&block.down), &[b.d_model, b.d_ff])
        };
        if let Some(first) = shared {
            substrates_of(&mut p, "moe", first)?;
        }
        if b.has_blocks() {
            p.insert("pos_embed", backbone.pos_embed.clone(), &[b.num_tokens(), b.d_model])?;
            insert_norm(&mut p, "norm", &backbone.norm)?;
        }
        for (l, (block, layer)) in backbone.blocks.iter().zip(&set.layers).enumerate() {
            insert_norm(&mut p, &format!("blocks.{l}.norm1"), &block.norm1)?;
            insert_linear(&mut p, &format!("blocks.{l}.attention.qkv"), &block.qkv)?;
            insert_linear(&mut p, &format!("blocks.{l}.attention.proj"), &block.proj)?;
            insert_norm(&mut p, &format!("blocks.{l}.norm2"), &block.norm2)?;
            if shared.is_none() {
                substrates_of(&mut p, &format!("blocks.{l}.moe"), block)?;
            }
            insert_experts(&mut p, l, layer, &config)?;
        }
        let scaled = |values: &[f32]| values.iter().map(|value| value / temperature).collect::<Vec<_>>();
        let (mut weight, bias) = (scaled(&set.head.weight.to_f32()), scaled(&set.head.bias));
        if let Some(projection) = set.projection {
            weight = projection.unfold(&weight, backbone.config.d_model);
        }
        insert_linear(&mut p, "head", &Linear { weight: weight.into(), bias })?;
        Self::assemble(config, FeedForwardKind::Butterfly, p)
    }

    /// The codes that latent parameters round to, ready for an artifact.
    ///
    /// # Errors
    /// When the number of `labels` is not the number of classes, or the feed-forward layers are of a kind that
    /// artifacts do not hold.
    pub fn to_weights(&self, labels: &[String]) -> Result<(BackboneWeights, ExpertSetWeights)> {
        let (b, e) = (&self.config.backbone, &self.config.experts);
        if labels.len() != self.config.num_classes {
            candle_core::bail!("{} labels for {} classes", labels.len(), self.config.num_classes);
        }
        if self.kind != FeedForwardKind::Butterfly {
            candle_core::bail!("artifacts hold butterfly experts, not {:?}", self.kind);
        }
        let p = &self.parameters;
        let stem = b.stem.iter().enumerate().map(|(i, layer)| {
            Ok(StemWeights {
                conv: linear(p, &format!("stem.{i}.conv"))?,
                norm: if layer.norm { Some(norm(p, &format!("stem.{i}.norm"))?) } else { None },
                step: None,
            })
        });
        let shared =
            if b.substrates.shared && p.values("moe.up").is_ok() { Some(substrates(p, "moe", b)?) } else { None };
        if b.substrates.shared && shared.is_none() {
            candle_core::bail!("the blocks are to share substrates that were trained apart");
        }
        let blocks = (0..b.num_layers).map(|l| {
            let (up, down) = match &shared {
                Some(pair) => pair.clone(),
                None => substrates(p, &format!("blocks.{l}.moe"), b)?,
            };
            Ok(BlockWeights {
                norm1: norm(p, &format!("blocks.{l}.norm1"))?,
                qkv: linear(p, &format!("blocks.{l}.attention.qkv"))?,
                proj: linear(p, &format!("blocks.{l}.attention.proj"))?,
                norm2: norm(p, &format!("blocks.{l}.norm2"))?,
                up,
                down,
            })
        });
        let backbone = BackboneWeights {
            config: b.clone(),
            stem: stem.collect::<Result<_>>()?,
            pos_embed: if b.has_blocks() { p.values("pos_embed")? } else { Vec::new() },
            blocks: blocks.collect::<Result<_>>()?,
            norm: if b.has_blocks() { norm(p, "norm")? } else { Norm::default() },
            background: None,
        };
        let set = ExpertSetWeights {
            config: e.clone(),
            layers: (0..b.num_layers).map(|l| experts(p, &format!("blocks.{l}.moe"), b, e)).collect::<Result<_>>()?,
            head: linear(p, "head")?,
            labels: labels.to_vec(),
            projection: None,
            temperature: 1.0,
            familiarity: None,
        };
        Ok((backbone, set))
    }
}

fn insert_linear(p: &mut Parameters, name: &str, layer: &Linear) -> Result<()> {
    let out = layer.bias.len();
    let weight = layer.weight.to_f32().into_owned();
    p.insert(format!("{name}.weight"), weight, &[out, layer.weight.len() / out.max(1)])?;
    p.insert(format!("{name}.bias"), layer.bias.clone(), &[out])
}

fn insert_norm(p: &mut Parameters, name: &str, layer: &Norm) -> Result<()> {
    p.insert(format!("{name}.gamma"), layer.gamma.clone(), &[layer.gamma.len()])?;
    p.insert(format!("{name}.beta"), layer.beta.clone(), &[layer.beta.len()])
}

/// Router and angles of block `l`.
fn insert_experts(p: &mut Parameters, l: usize, layer: &ExpertLayerWeights, config: &ViTConfig) -> Result<()> {
    let (b, e) = (&config.backbone, &config.experts);
    let rows = layer.router.chunks_exact(b.d_model).zip(&layer.router_scale);
    let router = rows.flat_map(|(row, scale)| row.iter().map(move |&code| f32::from(code) * scale)).collect();
    p.insert(format!("blocks.{l}.moe.router"), router, &[e.num_experts, b.d_model])?;
    let sites = [
        ("in", e.stages_in, b.d_model, &layer.rotation_in),
        ("hidden", e.stages_hidden, b.d_ff, &layer.rotation_hidden),
        ("out", e.stages_out, b.d_model, &layer.rotation_out),
    ];
    for (i, (site, stages, features, AngleCodes { codes })) in sites.into_iter().enumerate() {
        let shape = [e.num_experts, stages, features / 2];
        let angles = match e.seeded_angles(l, i) {
            Some(seeded) => quantize::angles_of_codes(&seeded.codes(shape[0], shape[1], shape[2]), e.angle_bits),
            None => quantize::angles_of_codes(codes, e.angle_bits),
        };
        if stages > 0 || site != "out" {
            p.insert(format!("blocks.{l}.moe.rotation_{site}"), angles, &shape)?;
        }
    }
    Ok(())
}

fn linear(p: &Parameters, name: &str) -> Result<Linear> {
    Ok(Linear { weight: p.values(&format!("{name}.weight"))?.into(), bias: p.values(&format!("{name}.bias"))? })
}

fn norm(p: &Parameters, name: &str) -> Result<Norm> {
    Ok(Norm { gamma: p.values(&format!("{name}.gamma"))?, beta: p.values(&format!("{name}.beta"))? })
}

fn substrates(p: &Parameters, name: &str, b: &BackboneConfig) -> Result<(Ternary, Ternary)> {
    let ternary = |part: &str, cols: usize| -> Result<Ternary> {
        let (codes, scale) = ternarize(&p.values(&format!("{name}.{part}"))?, cols);
        let scale = scale.into_iter().map(|scale| b.substrates.scales.round(scale)).collect();
        Ok(Ternary { codes: codes.into(), scale })
    };
    Ok((ternary("up", b.d_model)?, ternary("down", b.d_ff)?))
}

fn experts(p: &Parameters, name: &str, b: &BackboneConfig, e: &ExpertConfig) -> Result<ExpertLayerWeights> {
    let values = |part: &str| p.values(&format!("{name}.{part}"));
    let codes = |part: &str| -> Result<AngleCodes> {
        // Those of a seed are drawn again by whoever reads the artifact.
        if e.angle_seed.is_some() {
            return Ok(AngleCodes::default());
        }
        Ok(AngleCodes { codes: quantize::angle_codes(&values(part)?, e.angle_bits) })
    };
    let (router, router_scale) = quantize::router_codes(&values("router")?, b.d_model, e.router_bits, e.router_scales);
    Ok(ExpertLayerWeights {
        router,
        router_scale,
        rotation_in: codes("rotation_in")?,
        rotation_hidden: codes("rotation_hidden")?,
        rotation_out: if e.stages_out > 0 { codes("rotation_out")? } else { AngleCodes::default() },
    })
}

/// The values that codes stand for.
fn values(matrix: &Ternary) -> Vec<f32> {
    let cols = matrix.codes.len() / matrix.scale.len().max(1);
    let rows = matrix.codes.chunks_exact(cols.max(1)).zip(&matrix.scale);
    rows.flat_map(|(row, scale)| row.iter().map(move |&code| f32::from(code) * scale)).collect()
}

/// Rounding takes the mean magnitude of a row for its scale. That of `code * scale` is smaller by the share of codes
/// that are not zero.
fn latent(matrix: &Ternary) -> Vec<f32> {
    let cols = (matrix.codes.len() / matrix.scale.len().max(1)).max(1);
    let rows = matrix.codes.chunks_exact(cols).zip(&matrix.scale);
    let latents = rows.flat_map(|(row, scale)| {
        let nonzero = row.iter().filter(|&&code| code != 0).count().max(1);
        let value = (f64::from(*scale) * cols as f64 / nonzero as f64) as f32;
        row.iter().map(move |&code| f32::from(code) * value)
    });
    latents.collect()
}
