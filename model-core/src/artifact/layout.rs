//! Which tensors an artifact has, said once: reading, writing and checking all walk the same list of [`Slot`]s.

use std::sync::Arc;

use half::f16;
use safetensors::Dtype;

use super::contents::{
    BackboneHeader, BackgroundSource, CovarianceForm, ExpertSetHeader, FamiliarityConfig, StatisticsFormat,
};
use super::error::ArtifactError;
use super::pack::{BadByte, code_row_bytes, pack_codes, pack_ternary, ternary_row_bytes, unpack_codes, unpack_ternary};
use crate::config::{BackboneConfig, BackboneShape, ExpertConfig, FloatFormat, SubstrateConfig, TernaryPacking};
use crate::weights::{
    AngleCodes, BackboneWeights, Background, BlockWeights, Covariance, ExpertLayerWeights, ExpertSetWeights,
    Familiarity, Int4Rows, Linear, Matrix, Norm, Precision, Rows, StemWeights,
};

/// Where one tensor's values live in memory, and with that how they are encoded.
pub(super) enum Values<'a> {
    /// Every value finite.
    Float(&'a mut Vec<f32>, FloatFormat),
    /// As `Float`, every value above zero.
    PositiveFloat(&'a mut Vec<f32>, FloatFormat),
    /// Half precision that stays so in memory; every value finite.
    Half(&'a mut Vec<f16>),
    /// Codes -1, 0, 1, rows along the last axis.
    Ternary(&'a mut Arc<[i8]>, TernaryPacking),
    /// Unsigned codes of that many bits, rows along the last axis.
    Codes(&'a mut Vec<u16>, u32),
    /// Signed codes of 4, 8 or 16 bits; four-bit ones are packed along the last axis.
    Signed(&'a mut Vec<i16>, u32),
    /// From -127 to 127.
    Int8(&'a mut Vec<i8>),
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
    Float(FloatFormat),
    /// Ternary weights, packed.
    Ternary(TernaryPacking),
    /// Unsigned codes of that many bits, packed.
    Codes(u32),
    /// Signed codes of that many bits.
    Signed(u32),
    Int8,
}

/// How large one tensor of an artifact is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSize {
    /// Name in the file.
    pub name: String,
    /// How its values are encoded.
    pub encoding: Encoding,
    pub elements: u64,
    /// Length of the first axis: output features, experts.
    pub rows: u64,
    /// Bytes in the file.
    pub disk_bytes: u64,
}

/// What the safetensors header must say of a tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct TensorSpec {
    pub(super) name: String,
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
}

impl TensorSpec {
    pub(super) fn bytes(&self) -> u64 {
        count(&self.shape) * self.dtype.bitsize() as u64 / 8
    }
}

/// Values of a tensor. Every axis is below 2^32 and their product far below 2^64 in a valid configuration, but it
/// may exceed 32 bits.
fn count(shape: &[usize]) -> u64 {
    shape.iter().map(|&axis| axis as u64).product()
}

impl Slot<'_> {
    fn row(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    pub(super) fn size(&self) -> TensorSize {
        TensorSize {
            name: self.name.clone(),
            encoding: match &self.values {
                Values::Float(_, format) | Values::PositiveFloat(_, format) => Encoding::Float(*format),
                Values::Half(_) => Encoding::Float(FloatFormat::F16),
                Values::Ternary(_, packing) => Encoding::Ternary(*packing),
                Values::Codes(_, bits) => Encoding::Codes(*bits),
                Values::Signed(_, bits) => Encoding::Signed(*bits),
                Values::Int8(_) => Encoding::Int8,
            },
            elements: count(&self.shape),
            rows: self.shape.first().map_or(1, |&rows| rows as u64),
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
            Values::Float(_, FloatFormat::F32) | Values::PositiveFloat(_, FloatFormat::F32) => Dtype::F32,
            Values::Float(..) | Values::PositiveFloat(..) | Values::Half(_) => Dtype::F16,
            Values::Ternary(_, packing) => packed(ternary_row_bytes(*packing, self.row())),
            Values::Codes(_, bits) => packed(code_row_bytes(self.row(), *bits)),
            Values::Signed(_, 4) => packed(code_row_bytes(self.row(), 4)),
            Values::Signed(_, 8) | Values::Int8(_) => Dtype::I8,
            Values::Signed(..) => Dtype::I16,
        };
        TensorSpec { name: self.name.clone(), dtype, shape }
    }

    /// Fills the values from the tensor's bytes, whose number agrees with [`Slot::spec`].
    pub(super) fn decode(self, bytes: &[u8]) -> Result<(), ArtifactError> {
        let row = self.row();
        let Self { name, values, .. } = self;
        let bad_byte =
            |BadByte { index, reason }| ArtifactError::Value { tensor: name.clone(), index, reason: reason.to_owned() };
        match values {
            Values::Float(out, format) => {
                *out = floats(bytes, format);
                check_floats(&name, out, format, false)?;
            }
            Values::PositiveFloat(out, format) => {
                *out = floats(bytes, format);
                check_floats(&name, out, format, true)?;
            }
            Values::Half(out) => {
                *out = halves(bytes).collect();
                check_halves(&name, out)?;
            }
            Values::Ternary(out, packing) => *out = unpack_ternary(packing, bytes, row).map_err(bad_byte)?.into(),
            Values::Codes(out, bits) => *out = unpack_codes(bytes, row, bits).map_err(bad_byte)?,
            Values::Signed(out, 4) => {
                let codes = unpack_codes(bytes, row, 4).map_err(bad_byte)?;
                // Shifted up to the sign bit and down again.
                *out = codes.into_iter().map(|code| (code << 12) as i16 >> 12).collect();
                check_codes(&name, out, 4)?;
            }
            Values::Signed(out, 8) => *out = bytes.iter().map(|&byte| i16::from(byte as i8)).collect(),
            Values::Signed(out, _) => {
                *out = bytes.chunks_exact(2).map(|pair| i16::from_le_bytes([pair[0], pair[1]])).collect();
            }
            Values::Int8(out) => {
                *out = bytes.iter().map(|&byte| byte as i8).collect();
                check_int8(&name, out)?;
            }
        }
        Ok(())
    }

    /// The tensor's bytes, after the same checks that reading makes.
    pub(super) fn encode(self) -> Result<Vec<u8>, ArtifactError> {
        let (row, expected) = (self.row(), count(&self.shape));
        let Self { name, values, .. } = self;
        let got = match &values {
            Values::Float(v, _) | Values::PositiveFloat(v, _) => v.len(),
            Values::Half(v) => v.len(),
            Values::Ternary(v, _) => v.len(),
            Values::Codes(v, _) => v.len(),
            Values::Signed(v, _) => v.len(),
            Values::Int8(v) => v.len(),
        };
        if got as u64 != expected {
            return Err(ArtifactError::Length { tensor: name, expected, got: got as u64 });
        }
        Ok(match values {
            Values::Float(values, format) => {
                check_floats(&name, values, format, false)?;
                float_bytes(values, format)
            }
            Values::PositiveFloat(values, format) => {
                check_floats(&name, values, format, true)?;
                float_bytes(values, format)
            }
            Values::Half(values) => {
                check_halves(&name, values)?;
                values.iter().flat_map(|v| v.to_le_bytes()).collect()
            }
            Values::Ternary(codes, packing) => {
                out_of_range(&name, codes.iter().position(|code| !(-1..=1).contains(code)))?;
                pack_ternary(packing, codes, row)
            }
            Values::Codes(codes, bits) => {
                out_of_range(&name, codes.iter().position(|&code| u32::from(code) >> bits != 0))?;
                pack_codes(codes, row, bits)
            }
            Values::Signed(codes, bits) => {
                check_codes(&name, codes, bits)?;
                match bits {
                    4 => pack_codes(&codes.iter().map(|&code| code as u16 & 15).collect::<Vec<_>>(), row, 4),
                    8 => codes.iter().map(|&code| code as u8).collect(),
                    _ => codes.iter().flat_map(|code| code.to_le_bytes()).collect(),
                }
            }
            Values::Int8(codes) => {
                check_int8(&name, codes)?;
                codes.iter().map(|&code| code as u8).collect()
            }
        })
    }
}

fn out_of_range(tensor: &str, index: Option<usize>) -> Result<(), ArtifactError> {
    match index {
        Some(index) => Err(bad_value(tensor, index, "the code is out of range")),
        None => Ok(()),
    }
}

fn bad_value(tensor: &str, index: usize, reason: impl Into<String>) -> ArtifactError {
    ArtifactError::Value { tensor: tensor.to_owned(), index, reason: reason.into() }
}

/// Signed codes: all that 8 and 16 bits hold, but with 4 bits only those that have a negative.
fn check_codes(tensor: &str, codes: &[i16], bits: u32) -> Result<(), ArtifactError> {
    let range = match bits {
        4 => -7..=7,
        8 => -128..=127,
        _ => i16::MIN..=i16::MAX,
    };
    out_of_range(tensor, codes.iter().position(|code| !range.contains(code)))
}

/// Eight-bit weights have a negative each, on which integer kernels rely.
fn check_int8(tensor: &str, codes: &[i8]) -> Result<(), ArtifactError> {
    out_of_range(tensor, codes.iter().position(|&code| code == i8::MIN))
}

fn halves(bytes: &[u8]) -> impl Iterator<Item = f16> + '_ {
    bytes.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]]))
}

fn floats(bytes: &[u8], format: FloatFormat) -> Vec<f32> {
    match format {
        FloatFormat::F32 => bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
        FloatFormat::F16 => halves(bytes).map(f16::to_f32).collect(),
    }
}

/// Values of `format`.
fn float_bytes(values: &[f32], format: FloatFormat) -> Vec<u8> {
    match format {
        FloatFormat::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        FloatFormat::F16 => values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect(),
    }
}

fn check_floats(tensor: &str, values: &[f32], format: FloatFormat, positive: bool) -> Result<(), ArtifactError> {
    if let Some(index) = values.iter().position(|v| !v.is_finite() || (positive && *v <= 0.0)) {
        let wanted = if positive { "positive and finite" } else { "finite" };
        return Err(bad_value(tensor, index, format!("{} is not {wanted}", values[index])));
    }
    match values.iter().position(|&v| format.round(v) != v) {
        Some(index) => Err(bad_value(tensor, index, format!("{} is no value of half precision", values[index]))),
        None => Ok(()),
    }
}

fn check_halves(tensor: &str, values: &[f16]) -> Result<(), ArtifactError> {
    match values.iter().position(|v| !v.is_finite()) {
        Some(index) => Err(bad_value(tensor, index, format!("{} is not finite", values[index]))),
        None => Ok(()),
    }
}

/// Sets the slots of one artifact out in the order of the forward pass.
struct Walk<'a, F> {
    visit: &'a mut F,
}

impl<F: FnMut(Slot<'_>) -> Result<(), ArtifactError>> Walk<'_, F> {
    fn slot(&mut self, name: String, shape: &[usize], values: Values<'_>) -> Result<(), ArtifactError> {
        (self.visit)(Slot { name, shape: shape.to_vec(), values })
    }

    fn float(&mut self, name: String, shape: &[usize], values: &mut Vec<f32>) -> Result<(), ArtifactError> {
        self.slot(name, shape, Values::Float(values, FloatFormat::F32))
    }

    /// `shape` is `[out_features, inputs ..]`.
    fn linear(&mut self, name: &str, shape: &[usize], linear: &mut Linear) -> Result<(), ArtifactError> {
        let weight = format!("{name}.weight");
        match &mut linear.weight {
            Matrix::F32(values) => self.float(weight, shape, values)?,
            Matrix::F16(values) => self.slot(weight, shape, Values::Half(values))?,
            Matrix::Int8 { codes, scale } => {
                self.slot(weight, shape, Values::Int8(codes))?;
                let scale = Values::PositiveFloat(scale, FloatFormat::F32);
                self.slot(format!("{name}.weight_scale"), &shape[..1], scale)?;
            }
        }
        self.float(format!("{name}.bias"), &shape[..1], &mut linear.bias)
    }

    fn norm(&mut self, name: &str, features: usize, norm: &mut Norm) -> Result<(), ArtifactError> {
        self.float(format!("{name}.gamma"), &[features], &mut norm.gamma)?;
        self.float(format!("{name}.beta"), &[features], &mut norm.beta)
    }

    fn stem(&mut self, config: &BackboneConfig, stem: &mut [StemWeights]) -> Result<(), ArtifactError> {
        for (i, ((layer, _, channels), weights)) in config.stem_inputs().zip(stem).enumerate() {
            let shape = [layer.channels, layer.kernel, layer.kernel, channels / layer.groups];
            self.linear(&format!("stem.{i}.conv"), &shape, &mut weights.conv)?;
            if layer.norm {
                self.norm(&format!("stem.{i}.norm"), layer.channels, weights.norm.get_or_insert_default())?;
            }
            if let Some(step) = &mut weights.step {
                let mut values = vec![*step];
                let visited = Values::PositiveFloat(&mut values, FloatFormat::F32);
                self.slot(format!("stem.{i}.step"), &[1], visited)?;
                *step = values.first().copied().unwrap_or(*step);
            }
        }
        Ok(())
    }

    /// The substrates of all blocks, whose codes are those of the first one where they are shared.
    fn substrates(&mut self, config: &BackboneConfig, blocks: &mut [BlockWeights]) -> Result<(), ArtifactError> {
        let BackboneConfig { d_model, d_ff, substrates: SubstrateConfig { shared, packing, scales }, .. } = *config;
        let sites = [("up", [d_ff, d_model]), ("down", [d_model, d_ff])];
        for (i, block) in blocks.iter_mut().enumerate() {
            for ((site, shape), matrix) in sites.into_iter().zip([&mut block.up, &mut block.down]) {
                let block = format!("blocks.{i}.moe.{site}");
                let codes = Values::Ternary(&mut matrix.codes, packing);
                match (shared, i) {
                    (false, _) => self.slot(format!("{block}.codes"), &shape, codes)?,
                    (true, 0) => self.slot(format!("moe.{site}.codes"), &shape, codes)?,
                    (true, _) => {}
                }
                let scale = Values::PositiveFloat(&mut matrix.scale, scales);
                self.slot(format!("{block}.scale"), &shape[..1], scale)?;
            }
        }
        let [first, rest @ ..] = blocks else { return Ok(()) };
        for block in rest.iter_mut().filter(|_| shared) {
            block.up.codes = Arc::clone(&first.up.codes);
            block.down.codes = Arc::clone(&first.down.codes);
        }
        Ok(())
    }

    fn familiarity(
        &mut self,
        config: &FamiliarityConfig,
        d_model: usize,
        statistics: &mut Familiarity,
    ) -> Result<(), ArtifactError> {
        let format = config.format.float();
        match &mut statistics.means {
            Rows::Float(means) => {
                let means = Values::Float(means, format);
                self.slot("familiarity.means".to_owned(), &[config.means, d_model], means)?;
            }
            Rows::Int4(means) => self.int4("familiarity.means", [config.means, d_model], means)?,
        }
        let factor = match &mut statistics.covariance {
            Covariance::Packed(values) => {
                let values = Values::Float(values, format);
                return self.slot("familiarity.covariance".to_owned(), &[triangle(d_model)], values);
            }
            Covariance::Diagonal { diagonal, factor } => {
                let diagonal = Values::PositiveFloat(diagonal, format);
                self.slot("familiarity.diagonal".to_owned(), &[d_model], diagonal)?;
                factor
            }
            Covariance::Background { factor, .. } => factor,
            Covariance::Even { factor, .. } => {
                return match config.covariance {
                    CovarianceForm::Even { rank, .. } if rank > 0 => {
                        self.int4("familiarity.factor", [rank, d_model], factor)
                    }
                    _ => Ok(()),
                };
            }
        };
        match config.covariance {
            CovarianceForm::Diagonal { rank: 0 } | CovarianceForm::Background { rank: 0, .. } => Ok(()),
            CovarianceForm::Diagonal { rank } | CovarianceForm::Background { rank, .. } => {
                self.slot("familiarity.factor".to_owned(), &[rank, d_model], Values::Float(factor, format))
            }
            CovarianceForm::Packed | CovarianceForm::Even { .. } => Ok(()),
        }
    }

    fn int4(&mut self, name: &str, shape: [usize; 2], rows: &mut Int4Rows) -> Result<(), ArtifactError> {
        self.slot(format!("{name}.codes"), &shape, Values::Signed(&mut rows.codes, 4))?;
        let scale = Values::PositiveFloat(&mut rows.scale, FloatFormat::F32);
        self.slot(format!("{name}.scale"), &shape[..1], scale)
    }
}

/// Values of the lower triangle of a matrix of that side. Below 2^32, so that no product of it with a value's size can
/// pass for a smaller one.
fn triangle(side: usize) -> usize {
    usize::try_from(side as u64 * (side as u64 + 1) / 2).unwrap_or(usize::MAX)
}

/// Hands every tensor of a backbone to `visit`. The numbers of stem layers and blocks must agree with
/// the configuration: see [`empty_backbone`]. `rank` is that of the background.
pub(super) fn visit_backbone(
    weights: &mut BackboneWeights,
    rank: Option<usize>,
    mut visit: impl FnMut(Slot<'_>) -> Result<(), ArtifactError>,
) -> Result<(), ArtifactError> {
    let BackboneWeights { config, stem, pos_embed, blocks, norm, background } = weights;
    let d_model = config.d_model;
    let mut walk = Walk { visit: &mut visit };
    walk.stem(config, stem)?;
    if config.has_blocks() {
        walk.float("pos_embed".to_owned(), &[config.num_tokens(), d_model], pos_embed)?;
    }
    for (i, block) in blocks.iter_mut().enumerate() {
        walk.norm(&format!("blocks.{i}.norm1"), d_model, &mut block.norm1)?;
        walk.linear(&format!("blocks.{i}.attention.qkv"), &[3 * d_model, d_model], &mut block.qkv)?;
        walk.linear(&format!("blocks.{i}.attention.proj"), &[d_model, d_model], &mut block.proj)?;
        walk.norm(&format!("blocks.{i}.norm2"), d_model, &mut block.norm2)?;
    }
    walk.substrates(config, blocks)?;
    if config.has_blocks() {
        walk.norm("norm", d_model, norm)?;
    }
    let Some(Background { mean, covariance, .. }) = background else { return Ok(()) };
    walk.float("background.mean".to_owned(), &[d_model], mean)?;
    match covariance {
        Covariance::Packed(values) => walk.float("background.covariance".to_owned(), &[triangle(d_model)], values),
        Covariance::Diagonal { diagonal, factor } => {
            let positive = Values::PositiveFloat(diagonal, FloatFormat::F32);
            walk.slot("background.diagonal".to_owned(), &[d_model], positive)?;
            match rank.unwrap_or(0) {
                0 => Ok(()),
                rank => walk.float("background.factor".to_owned(), &[rank, d_model], factor),
            }
        }
        Covariance::Background { .. } | Covariance::Even { .. } => {
            let reason = "a background's covariance is a triangle, or a diagonal and a factor".to_owned();
            Err(ArtifactError::Field { field: "background", reason })
        }
    }
}

/// Hands every tensor of an expert set to `visit`. The numbers of layers and labels must agree with the backbone and
/// the document: see [`empty_expert_set`].
pub(super) fn visit_expert_set(
    weights: &mut ExpertSetWeights,
    header: &ExpertSetHeader,
    mut visit: impl FnMut(Slot<'_>) -> Result<(), ArtifactError>,
) -> Result<(), ArtifactError> {
    let (BackboneShape { d_model, d_ff, .. }, features) = (header.backbone, header.features());
    let experts = weights.config.num_experts;
    let mut walk = Walk { visit: &mut visit };
    for (i, layer) in weights.layers.iter_mut().enumerate() {
        let name = |site: &str| format!("blocks.{i}.moe.{site}");
        let router = Values::Signed(&mut layer.router, weights.config.router_bits);
        walk.slot(name("router"), &[experts, d_model], router)?;
        let scale = Values::PositiveFloat(&mut layer.router_scale, weights.config.router_scales);
        walk.slot(name("router_scale"), &[experts], scale)?;
        let ExpertConfig { stages_in, stages_hidden, stages_out, angle_bits, angle_seed, .. } = weights.config;
        let sites = [
            ("rotation_in", stages_in, d_model, &mut layer.rotation_in),
            ("rotation_hidden", stages_hidden, d_ff, &mut layer.rotation_hidden),
            ("rotation_out", stages_out, d_model, &mut layer.rotation_out),
        ];
        for (site, stages, features, AngleCodes { codes }) in sites {
            // A rotation without stages is the identity and has no tensor; nor has one whose angles come from a seed.
            if stages > 0 && angle_seed.is_none() {
                walk.slot(name(site), &[experts, stages, features / 2], Values::Codes(codes, angle_bits))?;
            }
        }
    }
    walk.linear("head", &[weights.labels.len(), features], &mut weights.head)?;
    match (&header.familiarity, &mut weights.familiarity) {
        (Some(config), Some(statistics)) => walk.familiarity(config, features, statistics),
        _ => Ok(()),
    }
}

fn empty_linear(precision: Precision) -> Linear {
    Linear { weight: Matrix::empty(precision), bias: Vec::new() }
}

/// Weights with the right number of layers and no values.
pub(super) fn empty_backbone(header: &BackboneHeader) -> BackboneWeights {
    let BackboneHeader { config, encoding, background, .. } = header;
    let stem = encoding.stem.iter().map(|layer| StemWeights {
        conv: empty_linear(layer.weights),
        norm: None,
        // Any number that reading replaces.
        step: layer.calibrated.then_some(1.0),
    });
    let block = BlockWeights {
        qkv: empty_linear(encoding.attention),
        proj: empty_linear(encoding.attention),
        ..BlockWeights::default()
    };
    BackboneWeights {
        stem: stem.collect(),
        pos_embed: Vec::new(),
        blocks: vec![block; config.num_layers],
        norm: Norm::default(),
        background: background.as_ref().map(|BackgroundSource { source, images, rank }| Background {
            mean: Vec::new(),
            covariance: match rank {
                None => Covariance::Packed(Vec::new()),
                Some(_) => Covariance::Diagonal { diagonal: Vec::new(), factor: Vec::new() },
            },
            source: source.clone(),
            images: *images,
        }),
        config: config.clone(),
    }
}

/// Weights with the right number of layers, none when experts are borrowed, and no values.
pub(super) fn empty_expert_set(header: &ExpertSetHeader) -> ExpertSetWeights {
    let ExpertSetHeader { config, encoding, backbone, borrowed_experts, labels, projection, temperature, .. } = header;
    let num_layers = if borrowed_experts.is_some() { 0 } else { backbone.num_layers };
    let covariance = |form| match form {
        CovarianceForm::Packed => Covariance::Packed(Vec::new()),
        CovarianceForm::Diagonal { .. } => Covariance::Diagonal { diagonal: Vec::new(), factor: Vec::new() },
        CovarianceForm::Background { scale, .. } => Covariance::Background { scale, factor: Vec::new() },
        CovarianceForm::Even { scale, .. } => Covariance::Even { scale, factor: Int4Rows::default() },
    };
    ExpertSetWeights {
        config: config.clone(),
        layers: vec![ExpertLayerWeights::default(); num_layers],
        head: empty_linear(encoding.head),
        labels: labels.clone(),
        projection: *projection,
        temperature: *temperature,
        familiarity: header.familiarity.as_ref().map(|config| Familiarity {
            format: config.format.float(),
            relative: config.relative,
            means: match config.format {
                StatisticsFormat::Int4 => Rows::Int4(Int4Rows::default()),
                StatisticsFormat::F32 | StatisticsFormat::F16 => Rows::Float(Vec::new()),
            },
            covariance: covariance(config.covariance),
            threshold: config.threshold,
            pass_share: config.pass_share,
        }),
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
