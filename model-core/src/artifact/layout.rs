//! Which tensors an artifact has, said once: reading, writing and checking all walk the same list of [`Slot`]s.

use safetensors::Dtype;

use super::error::ArtifactError;
use super::pack::{BadByte, code_row_bytes, pack_codes, pack_ternary, ternary_row_bytes, unpack_codes, unpack_ternary};
use crate::config::{BackboneConfig, ExpertConfig};
use crate::weights::{
    BackboneWeights, BlockWeights, ExpertLayerWeights, ExpertSetWeights, Linear, Norm, StemWeights, Ternary,
};

/// Where one tensor's values live in memory, and with that how they are encoded.
pub(super) enum Values<'a> {
    /// IEEE single precision; every value finite.
    Float(&'a mut Vec<f32>),
    /// As `Float`, every value above zero.
    PositiveFloat(&'a mut Vec<f32>),
    /// Codes -1, 0, 1 in two bits, rows along the last axis.
    Ternary(&'a mut Vec<i8>),
    /// Unsigned codes of that many bits, rows along the last axis.
    Codes(&'a mut Vec<u16>, u32),
    /// Signed codes of 8 or 16 bits.
    Signed(&'a mut Vec<i16>, u32),
}

/// One tensor of an artifact: its name, the shape of its values, and their place in memory.
pub(super) struct Slot<'a> {
    pub(super) name: String,
    shape: Vec<usize>,
    values: Values<'a>,
}

/// How the values of a tensor are encoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encoding {
    /// IEEE single precision.
    Float,
    /// Ternary weights, packed.
    Ternary,
    /// Unsigned codes of that many bits, packed.
    Codes(u32),
    /// Signed codes of that many bits.
    Signed(u32),
}

/// How large one tensor of an artifact is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSize {
    /// Name in the file.
    pub name: String,
    /// How its values are encoded.
    pub encoding: Encoding,
    pub elements: usize,
    /// Length of the first axis: output features, experts.
    pub rows: usize,
    /// Bytes in the file.
    pub disk_bytes: usize,
}

/// What the safetensors header must say of a tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct TensorSpec {
    pub(super) name: String,
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
}

impl TensorSpec {
    pub(super) fn bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.bitsize() / 8
    }
}

impl Slot<'_> {
    fn row(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    pub(super) fn size(&self) -> TensorSize {
        TensorSize {
            name: self.name.clone(),
            encoding: match &self.values {
                Values::Float(_) | Values::PositiveFloat(_) => Encoding::Float,
                Values::Ternary(_) => Encoding::Ternary,
                Values::Codes(_, bits) => Encoding::Codes(*bits),
                Values::Signed(_, bits) => Encoding::Signed(*bits),
            },
            elements: self.shape.iter().product(),
            rows: self.shape.first().copied().unwrap_or(1),
            disk_bytes: self.spec().bytes(),
        }
    }

    /// How the tensor appears in the header: packed tensors are bytes, their last axis counted in bytes.
    pub(super) fn spec(&self) -> TensorSpec {
        let mut shape = self.shape.clone();
        let mut packed = |row_bytes| {
            if let Some(last) = shape.last_mut() {
                *last = row_bytes;
            }
            Dtype::U8
        };
        let dtype = match &self.values {
            Values::Float(_) | Values::PositiveFloat(_) => Dtype::F32,
            Values::Ternary(_) => packed(ternary_row_bytes(self.row())),
            Values::Codes(_, bits) => packed(code_row_bytes(self.row(), *bits)),
            Values::Signed(_, 8) => Dtype::I8,
            Values::Signed(..) => Dtype::I16,
        };
        TensorSpec { name: self.name.clone(), dtype, shape }
    }

    /// Fills the values from the tensor's bytes, whose number agrees with [`Slot::spec`].
    pub(super) fn decode(self, bytes: &[u8]) -> Result<(), ArtifactError> {
        let row = self.row();
        let Self { name: tensor, values, .. } = self;
        let bad_byte = |BadByte { index, reason }: BadByte, tensor| ArtifactError::Value {
            tensor,
            index,
            reason: reason.to_owned(),
        };
        match values {
            Values::Float(out) => {
                *out = floats(bytes);
                check_floats(tensor, out, false)
            }
            Values::PositiveFloat(out) => {
                *out = floats(bytes);
                check_floats(tensor, out, true)
            }
            Values::Ternary(out) => {
                *out = unpack_ternary(bytes, row).map_err(|bad| bad_byte(bad, tensor))?;
                Ok(())
            }
            Values::Codes(out, bits) => {
                *out = unpack_codes(bytes, row, bits).map_err(|bad| bad_byte(bad, tensor))?;
                Ok(())
            }
            Values::Signed(out, 8) => {
                *out = bytes.iter().map(|&byte| i16::from(byte as i8)).collect();
                Ok(())
            }
            Values::Signed(out, _) => {
                *out = bytes.chunks_exact(2).map(|pair| i16::from_le_bytes([pair[0], pair[1]])).collect();
                Ok(())
            }
        }
    }

    /// The tensor's bytes, after the same checks that reading makes.
    pub(super) fn encode(self) -> Result<Vec<u8>, ArtifactError> {
        let (row, expected) = (self.row(), self.shape.iter().product::<usize>());
        let Self { name: tensor, values, .. } = self;
        let got = match &values {
            Values::Float(v) | Values::PositiveFloat(v) => v.len(),
            Values::Ternary(v) => v.len(),
            Values::Codes(v, _) => v.len(),
            Values::Signed(v, _) => v.len(),
        };
        if got != expected {
            return Err(ArtifactError::Length { tensor, expected, got });
        }
        let out_of_range = |tensor, index: Option<usize>| match index {
            Some(index) => Err(ArtifactError::Value { tensor, index, reason: "the code is out of range".to_owned() }),
            None => Ok(()),
        };
        Ok(match values {
            Values::Float(values) => {
                check_floats(tensor, values, false)?;
                values.iter().flat_map(|v| v.to_le_bytes()).collect()
            }
            Values::PositiveFloat(values) => {
                check_floats(tensor, values, true)?;
                values.iter().flat_map(|v| v.to_le_bytes()).collect()
            }
            Values::Ternary(codes) => {
                out_of_range(tensor, codes.iter().position(|code| !(-1..=1).contains(code)))?;
                pack_ternary(codes, row)
            }
            Values::Codes(codes, bits) => {
                out_of_range(tensor, codes.iter().position(|&code| u32::from(code) >> bits != 0))?;
                pack_codes(codes, row, bits)
            }
            Values::Signed(codes, 8) => {
                out_of_range(tensor, codes.iter().position(|&code| i8::try_from(code).is_err()))?;
                codes.iter().map(|&code| code as u8).collect()
            }
            Values::Signed(codes, _) => codes.iter().flat_map(|code| code.to_le_bytes()).collect(),
        })
    }
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

fn check_floats(tensor: String, values: &[f32], positive: bool) -> Result<(), ArtifactError> {
    let bad = values.iter().position(|v| !v.is_finite() || (positive && *v <= 0.0));
    let Some(index) = bad else { return Ok(()) };
    let wanted = if positive { "positive and finite" } else { "finite" };
    Err(ArtifactError::Value { tensor, index, reason: format!("{} is not {wanted}", values[index]) })
}

/// Sets the slots of one artifact out in the order of the forward pass.
struct Walk<'a, F> {
    visit: &'a mut F,
}

impl<F: FnMut(Slot<'_>) -> Result<(), ArtifactError>> Walk<'_, F> {
    fn slot(&mut self, name: String, shape: &[usize], values: Values<'_>) -> Result<(), ArtifactError> {
        (self.visit)(Slot { name, shape: shape.to_vec(), values })
    }

    /// `shape` is `[out_features, inputs ..]`.
    fn linear(&mut self, name: &str, shape: &[usize], linear: &mut Linear) -> Result<(), ArtifactError> {
        self.slot(format!("{name}.weight"), shape, Values::Float(&mut linear.weight))?;
        self.slot(format!("{name}.bias"), &shape[..1], Values::Float(&mut linear.bias))
    }

    fn norm(&mut self, name: &str, features: usize, norm: &mut Norm) -> Result<(), ArtifactError> {
        self.slot(format!("{name}.gamma"), &[features], Values::Float(&mut norm.gamma))?;
        self.slot(format!("{name}.beta"), &[features], Values::Float(&mut norm.beta))
    }

    fn ternary(&mut self, name: &str, shape: [usize; 2], ternary: &mut Ternary) -> Result<(), ArtifactError> {
        self.slot(format!("{name}.codes"), &shape, Values::Ternary(&mut ternary.codes))?;
        self.slot(format!("{name}.scale"), &shape[..1], Values::PositiveFloat(&mut ternary.scale))
    }
}

/// Hands every tensor of a backbone to `visit`. The numbers of stem layers and blocks must agree with
/// the configuration: see [`empty_backbone`].
pub(super) fn visit_backbone(
    weights: &mut BackboneWeights,
    mut visit: impl FnMut(Slot<'_>) -> Result<(), ArtifactError>,
) -> Result<(), ArtifactError> {
    let BackboneWeights { config, stem, pos_embed, blocks, norm } = weights;
    let (d_model, d_ff) = (config.d_model, config.d_ff);
    let mut walk = Walk { visit: &mut visit };
    for (i, ((layer, _, channels), weights)) in config.stem_inputs().zip(stem).enumerate() {
        let shape = [layer.channels, layer.kernel, layer.kernel, channels];
        walk.linear(&format!("stem.{i}.conv"), &shape, &mut weights.conv)?;
        if layer.norm_gelu {
            walk.norm(&format!("stem.{i}.norm"), layer.channels, weights.norm.get_or_insert_default())?;
        }
    }
    walk.slot("pos_embed".to_owned(), &[config.num_tokens(), d_model], Values::Float(pos_embed))?;
    for (i, block) in blocks.iter_mut().enumerate() {
        walk.norm(&format!("blocks.{i}.norm1"), d_model, &mut block.norm1)?;
        walk.linear(&format!("blocks.{i}.attention.qkv"), &[3 * d_model, d_model], &mut block.qkv)?;
        walk.linear(&format!("blocks.{i}.attention.proj"), &[d_model, d_model], &mut block.proj)?;
        walk.norm(&format!("blocks.{i}.norm2"), d_model, &mut block.norm2)?;
        walk.ternary(&format!("blocks.{i}.moe.up"), [d_ff, d_model], &mut block.up)?;
        walk.ternary(&format!("blocks.{i}.moe.down"), [d_model, d_ff], &mut block.down)?;
    }
    walk.norm("norm", d_model, norm)
}

/// Hands every tensor of an expert set to `visit`. The numbers of layers and labels must agree with the backbone and
/// the document: see [`empty_expert_set`].
pub(super) fn visit_expert_set(
    weights: &mut ExpertSetWeights,
    backbone: &BackboneConfig,
    mut visit: impl FnMut(Slot<'_>) -> Result<(), ArtifactError>,
) -> Result<(), ArtifactError> {
    let ExpertSetWeights { config, layers, head, labels } = weights;
    let (d_model, d_ff, experts) = (backbone.d_model, backbone.d_ff, config.num_experts);
    let mut walk = Walk { visit: &mut visit };
    for (i, layer) in layers.iter_mut().enumerate() {
        let name = |site: &str| format!("blocks.{i}.moe.{site}");
        let router = Values::Signed(&mut layer.router, config.router_bits);
        walk.slot(name("router"), &[experts, d_model], router)?;
        walk.slot(name("router_scale"), &[experts], Values::PositiveFloat(&mut layer.router_scale))?;
        let sites = [
            ("rotation_in", config.stages_in, d_model, &mut layer.rotation_in),
            ("rotation_hidden", config.stages_hidden, d_ff, &mut layer.rotation_hidden),
            ("rotation_out", config.stages_out, d_model, &mut layer.rotation_out),
        ];
        for (site, stages, features, angles) in sites {
            // A rotation without stages is the identity and has no tensor.
            if stages > 0 {
                let codes = Values::Codes(&mut angles.codes, config.angle_bits);
                walk.slot(name(site), &[experts, stages, features / 2], codes)?;
            }
        }
    }
    walk.linear("head", &[labels.len(), d_model], head)
}

/// Weights with the right number of layers and no values.
pub(super) fn empty_backbone(config: BackboneConfig) -> BackboneWeights {
    BackboneWeights {
        stem: vec![StemWeights::default(); config.stem.len()],
        pos_embed: Vec::new(),
        blocks: vec![BlockWeights::default(); config.num_layers],
        norm: Norm::default(),
        config,
    }
}

/// Weights with the right number of layers and no values.
pub(super) fn empty_expert_set(
    config: ExpertConfig,
    backbone: &BackboneConfig,
    labels: Vec<String>,
) -> ExpertSetWeights {
    ExpertSetWeights {
        config,
        layers: vec![ExpertLayerWeights::default(); backbone.num_layers],
        head: Linear::default(),
        labels,
    }
}

/// Sorts tensors into their order in the file: that of the safetensors library, larger elements first and then by
/// name, so that any writer that uses the library produces it.
pub(super) fn sort_by_place<T>(tensors: &mut [T], spec: impl Fn(&T) -> &TensorSpec) {
    tensors.sort_by(|a, b| {
        let (a, b) = (spec(a), spec(b));
        b.dtype.cmp(&a.dtype).then_with(|| a.name.cmp(&b.name))
    });
}
