//! Initial weights.

use candle_core::Result;
use model_core::config::{FeedForwardKind, ViTConfig};
use model_core::random::{AngleSpread, AngleStart, SplitMix64};

use super::{ViT, invalid};
use crate::parameters::Parameters;

impl ViT {
    /// Fresh latent parameters; the same `seed` gives the same model.
    pub fn init(config: &ViTConfig, seed: u64) -> Result<Self> {
        Self::init_kind(config, FeedForwardKind::Butterfly, AngleSpread::Narrow, seed)
    }

    /// [`ViT::init`] with feed-forward layers of another kind or another spread of angles. The parameters outside the
    /// feed-forward layers are the same for every kind, and all but the angles for every spread.
    pub fn init_kind(config: &ViTConfig, kind: FeedForwardKind, spread: AngleSpread, seed: u64) -> Result<Self> {
        config.validate().map_err(invalid)?;
        let mut rng = SplitMix64::at(seed, 0);
        let mut drawn_before = Vec::new();
        let mut p = Parameters::default();
        let (b, e) = (&config.backbone, &config.experts);
        let mut linear = |p: &mut Parameters, name: &str, out: usize, inputs: usize, gain: f64| -> Result<()> {
            p.insert(
                format!("{name}.weight"),
                rng.normals(out * inputs, gain / (inputs as f64).sqrt()),
                &[out, inputs],
            )?;
            p.insert(format!("{name}.bias"), vec![0.0; out], &[out])
        };
        let norm = |p: &mut Parameters, name: &str, n: usize| -> Result<()> {
            p.insert(format!("{name}.gamma"), vec![1.0; n], &[n])?;
            p.insert(format!("{name}.beta"), vec![0.0; n], &[n])
        };
        for (i, (layer, _, channels)) in b.stem_inputs().enumerate() {
            linear(&mut p, &format!("stem.{i}.conv"), layer.channels, layer.window_len(channels), 1.4)?;
            if layer.norm {
                norm(&mut p, &format!("stem.{i}.norm"), layer.channels)?;
            }
        }
        for l in 0..b.num_layers {
            norm(&mut p, &format!("blocks.{l}.norm1"), b.d_model)?;
            linear(&mut p, &format!("blocks.{l}.attention.qkv"), 3 * b.d_model, b.d_model, 1.0)?;
            linear(&mut p, &format!("blocks.{l}.attention.proj"), b.d_model, b.d_model, 0.5)?;
            norm(&mut p, &format!("blocks.{l}.norm2"), b.d_model)?;
        }
        norm(&mut p, "norm", b.d_model)?;
        linear(&mut p, "head", config.num_classes, b.d_model, 0.5)?;
        p.insert("pos_embed", rng.normals(b.num_tokens() * b.d_model, 0.02), &[b.num_tokens(), b.d_model])?;
        for l in 0..b.num_layers {
            let shared = b.substrates.shared && kind == FeedForwardKind::Butterfly;
            let mut matrix = |part: &str, std: f64, shape: &[usize]| {
                // One pair of substrates for all blocks has no block in its names.
                let substrate = shared && matches!(part, "up" | "down");
                if substrate && l > 0 {
                    return Ok(());
                }
                let name = if substrate { format!("moe.{part}") } else { format!("blocks.{l}.moe.{part}") };
                p.insert(name, rng.normals(shape.iter().product(), std), shape)
            };
            // What experts do not share exists once per expert.
            let owns = !matches!(
                kind,
                FeedForwardKind::Butterfly
                    | FeedForwardKind::ButterflyGains
                    | FeedForwardKind::ButterflyTied
                    | FeedForwardKind::Dense
            );
            let own: &[usize] = if owns { &[e.num_experts] } else { &[] };
            let (up, down) = ((b.d_model as f64).powf(-0.5), 0.5 * (b.d_ff as f64).powf(-0.5));
            if kind == FeedForwardKind::LowRankExperts {
                let rank = b.shape().low_rank();
                matrix("up_in", up, &[e.num_experts, rank, b.d_model])?;
                matrix("up_out", (rank as f64).powf(-0.5), &[e.num_experts, b.d_ff, rank])?;
                matrix("down_in", down, &[e.num_experts, rank, b.d_ff])?;
                matrix("down_out", (rank as f64).powf(-0.5), &[e.num_experts, b.d_model, rank])?;
            } else {
                matrix("up", up, &[own, &[b.d_ff, b.d_model]].concat())?;
                if kind != FeedForwardKind::ButterflyTied {
                    matrix("down", down, &[own, &[b.d_model, b.d_ff]].concat())?;
                }
            }
            if kind == FeedForwardKind::Dense {
                continue;
            }
            matrix("router", (b.d_model as f64).powf(-0.5), &[e.num_experts, b.d_model])?;
            if owns {
                continue;
            }
            let sites =
                [("in", e.stages_in, b.d_model), ("hidden", e.stages_hidden, b.d_ff), ("out", e.stages_out, b.d_model)];
            drawn_before.push([0; 3]);
            for (i, (site, stages, features)) in sites.into_iter().enumerate() {
                drawn_before[l][i] = rng.drawn();
                if stages > 0 || site != "out" {
                    let shape = [e.num_experts, stages, features / 2];
                    let angles = match e.seeded_angles(l, i) {
                        Some(seeded) => {
                            crate::quantize::angles_of_codes(&seeded.codes(shape[0], shape[1], shape[2]), e.angle_bits)
                        }
                        None => rng.angles(shape.iter().product(), spread, e.angle_bits),
                    };
                    p.insert(format!("blocks.{l}.moe.rotation_{site}"), angles, &shape)?;
                }
            }
            match kind {
                FeedForwardKind::ButterflyGains => {
                    let name = format!("blocks.{l}.moe.gains");
                    p.insert(name, vec![1.0; e.num_experts * b.d_ff], &[e.num_experts, b.d_ff])?;
                }
                FeedForwardKind::ButterflyTied => {
                    // As large as a `down` of its own would be.
                    let scale = 0.5 * (b.d_model as f32 / b.d_ff as f32).sqrt();
                    p.insert(format!("blocks.{l}.moe.down_scale"), vec![scale; b.d_model], &[b.d_model])?;
                }
                _ => {}
            }
        }
        let start = AngleStart { generator: AngleStart::GENERATOR.into(), seed, spread, drawn_before };
        let angle_start = (!start.drawn_before.is_empty()).then_some(start);
        Ok(Self { angle_start, ..Self::assemble(config.clone(), kind, p)? })
    }
}
