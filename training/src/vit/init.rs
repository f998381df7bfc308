//! The weights that training starts from.

use candle_core::Result;
use model_core::config::{BackboneConfig, FeedForwardKind, ViTConfig};
use model_core::random::{AngleSpread, AngleStart, SplitMix64};

use super::ViT;
use crate::parameters::Parameters;
use crate::quantize::angles_of_codes;

impl ViT {
    /// Fresh latent parameters; the same `seed` gives the same model.
    pub fn init(config: &ViTConfig, seed: u64) -> Result<Self> {
        Self::init_kind(config, FeedForwardKind::Butterfly, AngleSpread::Narrow, seed)
    }

    /// [`ViT::init`] with feed-forward layers of another kind or another spread of angles. The parameters outside the
    /// feed-forward layers are the same for every kind, and all but the angles for every spread.
    pub fn init_kind(config: &ViTConfig, kind: FeedForwardKind, spread: AngleSpread, seed: u64) -> Result<Self> {
        Self::check_size(config, kind)?;
        let mut init = Init { rng: SplitMix64::at(seed, 0), parameters: Parameters::default() };
        init.backbone(&config.backbone)?;
        init.linear("head", config.num_classes, config.backbone.d_model, 0.5)?;
        init.pos_embed(&config.backbone)?;
        let mut drawn_before = Vec::new();
        for layer in 0..config.backbone.num_layers {
            drawn_before.extend(init.feed_forward(layer, config, kind, spread)?);
        }
        let start = AngleStart { generator: AngleStart::GENERATOR.into(), seed, spread, drawn_before };
        let angle_start = (!start.drawn_before.is_empty()).then_some(start);
        Ok(Self { angle_start, ..Self::assemble(config.clone(), kind, init.parameters)? })
    }
}

/// Parameters on the way, in the order in which they are drawn: the order is part of what a seed means.
struct Init {
    rng: SplitMix64,
    parameters: Parameters,
}

impl Init {
    fn normals(&mut self, name: String, std: f64, shape: &[usize]) -> Result<()> {
        self.parameters.insert(name, self.rng.normals(shape.iter().product(), std), shape)
    }

    fn constant(&mut self, name: String, value: f32, shape: &[usize]) -> Result<()> {
        self.parameters.insert(name, vec![value; shape.iter().product()], shape)
    }

    fn linear(&mut self, name: &str, out: usize, inputs: usize, gain: f64) -> Result<()> {
        self.normals(format!("{name}.weight"), gain / (inputs as f64).sqrt(), &[out, inputs])?;
        self.constant(format!("{name}.bias"), 0.0, &[out])
    }

    fn norm(&mut self, name: &str, features: usize) -> Result<()> {
        self.constant(format!("{name}.gamma"), 1.0, &[features])?;
        self.constant(format!("{name}.beta"), 0.0, &[features])
    }

    fn backbone(&mut self, b: &BackboneConfig) -> Result<()> {
        for (i, (layer, _, channels)) in b.stem_inputs().enumerate() {
            self.linear(&format!("stem.{i}.conv"), layer.channels, layer.window_len(channels), 1.4)?;
            if layer.norm {
                self.norm(&format!("stem.{i}.norm"), layer.channels)?;
            }
        }
        for l in 0..b.num_layers {
            self.norm(&format!("blocks.{l}.norm1"), b.d_model)?;
            self.linear(&format!("blocks.{l}.attention.qkv"), 3 * b.d_model, b.d_model, 1.0)?;
            self.linear(&format!("blocks.{l}.attention.proj"), b.d_model, b.d_model, 0.5)?;
            self.norm(&format!("blocks.{l}.norm2"), b.d_model)?;
        }
        if b.has_blocks() { self.norm("norm", b.d_model) } else { Ok(()) }
    }

    fn pos_embed(&mut self, b: &BackboneConfig) -> Result<()> {
        if !b.has_blocks() {
            return Ok(());
        }
        self.normals("pos_embed".into(), 0.02, &[b.num_tokens(), b.d_model])
    }

    /// What stands in place of the two matrices of a feed-forward layer; `own` is the shape of what comes once per expert.
    fn matrices(&mut self, name: &str, config: &ViTConfig, kind: FeedForwardKind, own: &[usize]) -> Result<()> {
        let (b, num_experts) = (&config.backbone, config.experts.num_experts);
        let (up, down) = ((b.d_model as f64).powf(-0.5), 0.5 * (b.d_ff as f64).powf(-0.5));
        if kind == FeedForwardKind::LowRankExperts {
            let rank = b.shape().low_rank();
            let out = (rank as f64).powf(-0.5);
            self.normals(format!("{name}.up_in"), up, &[num_experts, rank, b.d_model])?;
            self.normals(format!("{name}.up_out"), out, &[num_experts, b.d_ff, rank])?;
            self.normals(format!("{name}.down_in"), down, &[num_experts, rank, b.d_ff])?;
            return self.normals(format!("{name}.down_out"), out, &[num_experts, b.d_model, rank]);
        }
        self.normals(format!("{name}.up"), up, &[own, &[b.d_ff, b.d_model]].concat())?;
        if kind != FeedForwardKind::ButterflyTied {
            self.normals(format!("{name}.down"), down, &[own, &[b.d_model, b.d_ff]].concat())?;
        }
        Ok(())
    }

    /// The parameters of one feed-forward layer; where it has angles, how many numbers were drawn before
    /// those of each rotation.
    fn feed_forward(
        &mut self,
        layer: usize,
        config: &ViTConfig,
        kind: FeedForwardKind,
        spread: AngleSpread,
    ) -> Result<Option<[u64; 3]>> {
        let (b, e, name) = (&config.backbone, &config.experts, &format!("blocks.{layer}.moe"));
        // What experts do not share exists once per expert.
        let owns = !matches!(
            kind,
            FeedForwardKind::Butterfly
                | FeedForwardKind::ButterflyGains
                | FeedForwardKind::ButterflyTied
                | FeedForwardKind::Dense
        );
        let own = [e.num_experts];
        // One pair of substrates for all blocks has no block in its names.
        if !(b.substrates.shared && kind == FeedForwardKind::Butterfly) {
            self.matrices(name, config, kind, if owns { &own } else { &[] })?;
        } else if layer == 0 {
            self.matrices("moe", config, kind, &[])?;
        }
        if kind == FeedForwardKind::Dense {
            return Ok(None);
        }
        self.normals(format!("{name}.router"), (b.d_model as f64).powf(-0.5), &[e.num_experts, b.d_model])?;
        if owns {
            return Ok(None);
        }
        let sites =
            [("in", e.stages_in, b.d_model), ("hidden", e.stages_hidden, b.d_ff), ("out", e.stages_out, b.d_model)];
        let mut drawn_before = [0; 3];
        for (i, (site, stages, features)) in sites.into_iter().enumerate() {
            drawn_before[i] = self.rng.drawn();
            if stages > 0 || site != "out" {
                let shape = [e.num_experts, stages, features / 2];
                let angles = match e.seeded_angles(layer, i) {
                    Some(seeded) => angles_of_codes(&seeded.codes(shape[0], shape[1], shape[2]), e.angle_bits),
                    None => self.rng.angles(shape.iter().product(), spread, e.angle_bits),
                };
                self.parameters.insert(format!("{name}.rotation_{site}"), angles, &shape)?;
            }
        }
        match kind {
            FeedForwardKind::ButterflyGains => {
                self.constant(format!("{name}.gains"), 1.0, &[e.num_experts, b.d_ff])?;
            }
            FeedForwardKind::ButterflyTied => {
                // As large as a `down` of its own would be.
                let scale = 0.5 * (b.d_model as f32 / b.d_ff as f32).sqrt();
                self.constant(format!("{name}.down_scale"), scale, &[b.d_model])?;
            }
            _ => {}
        }
        Ok(Some(drawn_before))
    }
}
