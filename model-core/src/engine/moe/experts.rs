//! The two halves of a layer as they rest in memory: the backbone's substrates, and a set's experts and router.

use std::ops::Range;

use crate::config::{BackboneShape, ExpertConfig, FloatFormat, SubstrateConfig, TernaryPacking};
use crate::kernels::gemm::float::{PANEL, Rows, RowsMut, matmul_panels};
use crate::kernels::{Isa, KernelError, LaneOrder, PackedAngles, PackedTernary, Scales, TernaryStorage, vectorized};
use crate::weights::{ExpertLayerWeights, Ternary};

/// Why the kernels called here cannot refuse.
pub(in crate::engine) const LENGTHS: &str = "buffers are sized by the configuration that the weights were packed with";

/// The substrates of one layer, in lane order.
#[derive(Debug)]
pub(in crate::engine) struct Substrates {
    pub(super) isa: Isa,
    /// Order of `d_model` features at the layer's input and inside its `out` rotation.
    pub(super) model: LaneOrder,
    pub(super) up: PackedTernary,
    pub(super) down: PackedTernary,
}

impl Substrates {
    /// Packs `up` `[d_ff, d_model]` and `down` `[d_model, d_ff]`.
    ///
    /// # Errors
    /// [`KernelError`] when lengths do not fit, or codes or scales are not valid.
    pub(in crate::engine) fn pack(
        isa: Isa,
        config: &BackboneShape,
        up: &Ternary,
        down: &Ternary,
    ) -> Result<Self, KernelError> {
        let BackboneShape { d_model, d_ff, substrates, .. } = *config;
        let storage = storage(substrates);
        let (model, ff) = (LaneOrder::new(d_model), LaneOrder::new(d_ff));
        for (what, matrix, rows) in [("up", up, d_ff), ("down", down, d_model)] {
            let expected = d_model * d_ff;
            if matrix.codes.len() != expected || matrix.scale.len() != rows {
                return Err(KernelError::Length { what, expected, got: matrix.codes.len() });
            }
        }
        let up_codes = ff.permute_rows(&model.permute_columns(&up.codes), d_model);
        let up_scale = ff.permute_rows(&up.scale, 1);
        let down_codes = ff.permute_columns(&down.codes);
        Ok(Self {
            isa,
            model,
            up: PackedTernary::pack(isa, storage, &up_codes, &up_scale, [d_ff, d_model])?,
            down: PackedTernary::pack(isa, storage, &down_codes, &down.scale, [d_model, d_ff])?,
        })
    }

    /// Those of another layer that has the same codes.
    ///
    /// # Errors
    /// [`KernelError`] when lengths do not fit, or scales are not valid.
    pub(in crate::engine) fn with_scales(&self, up: &[f32], down: &[f32]) -> Result<Self, KernelError> {
        let ff = LaneOrder::new(self.up.rows());
        if up.len() != ff.features() {
            return Err(KernelError::Length { what: "up", expected: ff.features(), got: up.len() });
        }
        let up = self.up.with_scale(&ff.permute_rows(up, 1))?;
        Ok(Self { isa: self.isa, model: self.model, up, down: self.down.with_scale(down)? })
    }

    /// The order in which the layer wants its input.
    pub(in crate::engine) fn input_order(&self) -> LaneOrder {
        self.model
    }

    /// Bytes on the heap. Layers that share their codes have those once.
    pub(in crate::engine) fn resident_bytes(&self) -> usize {
        self.up.codes_bytes() + self.down.codes_bytes() + self.scales_bytes()
    }

    /// Bytes of the scales on the heap.
    pub(in crate::engine) fn scales_bytes(&self) -> usize {
        self.up.scales_bytes() + self.down.scales_bytes()
    }
}

/// How the kernels keep substrates that are stored so.
pub(crate) fn storage(substrates: SubstrateConfig) -> TernaryStorage {
    TernaryStorage {
        five_trits: substrates.packing == TernaryPacking::FiveTrits,
        half_scales: substrates.scales == FloatFormat::F16,
    }
}

/// Router codes in panels of experts as f32 weights lie, with the bits of the artifact's.
#[derive(Debug)]
enum RouterCodes {
    /// A panel is `[ceil(d_model / 2), experts]` bytes: features of the first half in the low four bits, those of the
    /// second in the high ones.
    Bits4(Box<[u8]>),
    Bits8(Box<[i8]>),
    Bits16(Box<[i16]>),
}

/// The experts and router of one layer of a set, as they rest in memory: integer codes.
#[derive(Debug)]
pub(in crate::engine) struct ExpertLayer {
    pub(super) num_experts: usize,
    pub(super) top_k: usize,
    router: RouterCodes,
    router_scale: Scales,
    pub(super) rotation_in: PackedAngles,
    pub(super) rotation_hidden: PackedAngles,
    pub(super) rotation_out: PackedAngles,
}

impl ExpertLayer {
    /// Packs the weights of layer `layer`.
    ///
    /// # Errors
    /// [`KernelError`] when a tensor does not fit the configuration.
    pub(in crate::engine) fn pack(
        weights: &ExpertLayerWeights,
        config: &ExpertConfig,
        layer: usize,
        [d_model, d_ff]: [usize; 2],
    ) -> Result<Self, KernelError> {
        let (model, ff) = (LaneOrder::new(d_model), LaneOrder::new(d_ff));
        let ExpertConfig { num_experts, top_k, angle_bits, .. } = *config;
        for (what, got, expected) in [
            ("router", weights.router.len(), num_experts * d_model),
            ("router scales", weights.router_scale.len(), num_experts),
        ] {
            if got != expected {
                return Err(KernelError::Length { what, expected, got });
            }
        }
        let angles = |site, codes: &[u16], order, stages| match config.seeded_angles(layer, site) {
            Some(angles) => PackedAngles::seeded(order, angles, stages),
            None => PackedAngles::pack(order, codes, num_experts, stages, angle_bits),
        };
        let panels = |positions: Range<usize>| {
            (0..num_experts).step_by(PANEL).flat_map(move |first| {
                let experts = first..num_experts.min(first + PANEL);
                positions.clone().flat_map(move |position| experts.clone().map(move |expert| (expert, position)))
            })
        };
        let code = |(expert, position)| weights.router[expert * d_model + model.feature(position)];
        let half = d_model.div_ceil(2);
        let nibbles = |(expert, position)| {
            let high = if half + position < d_model { code((expert, half + position)) } else { 0 };
            (code((expert, position)) & 15 | high << 4) as u8
        };
        Ok(Self {
            num_experts,
            top_k,
            router: match config.router_bits {
                // Codes are in range: the reader checks, and training rounds to them.
                4 => RouterCodes::Bits4(panels(0..half).map(nibbles).collect()),
                8 => RouterCodes::Bits8(panels(0..d_model).map(|at| code(at).clamp(-128, 127) as i8).collect()),
                _ => RouterCodes::Bits16(panels(0..d_model).map(code).collect()),
            },
            router_scale: Scales::new(&weights.router_scale, config.router_scales == FloatFormat::F16, 1)?,
            rotation_in: angles(0, &weights.rotation_in.codes, model, config.stages_in)?,
            rotation_hidden: angles(1, &weights.rotation_hidden.codes, ff, config.stages_hidden)?,
            rotation_out: angles(2, &weights.rotation_out.codes, model, config.stages_out)?,
        })
    }

    /// Bytes on the heap.
    pub(in crate::engine) fn resident_bytes(&self) -> usize {
        let router = match &self.router {
            RouterCodes::Bits4(codes) => size_of_val(&**codes),
            RouterCodes::Bits8(codes) => size_of_val(&**codes),
            RouterCodes::Bits16(codes) => size_of_val(&**codes),
        };
        let angles = [&self.rotation_in, &self.rotation_hidden, &self.rotation_out];
        router + self.router_scale.resident_bytes() + angles.map(PackedAngles::resident_bytes).iter().sum::<usize>()
    }

    /// Logits of `tokens` `[rows, d_model]` in lane order, `[rows, num_experts]`. `panel` has room
    /// for one decoded panel.
    pub(super) fn logits(&self, isa: Isa, tokens: &[f32], d_model: usize, panel: &mut [f32], logits: &mut [f32]) {
        for first in (0..self.num_experts).step_by(PANEL) {
            // Scaled before the product, as the definition has it: gate weight = code * scale.
            let n = PANEL.min(self.num_experts - first);
            let codes = first * d_model..(first + n) * d_model;
            let mut scales = [0.0; PANEL];
            self.router_scale.read(first, &mut scales);
            let scale = &scales[..n];
            vectorized(
                #[inline(always)]
                || match &self.router {
                    RouterCodes::Bits4(all) => {
                        let half = d_model.div_ceil(2);
                        decode_nibbles(&all[first * half..][..n * half], scale, &mut panel[..n * d_model]);
                    }
                    RouterCodes::Bits8(all) => decode_router(&all[codes], scale, panel),
                    RouterCodes::Bits16(all) => decode_router(&all[codes], scale, panel),
                },
            );
            let lhs = Rows { data: tokens, stride: d_model };
            let out = RowsMut { data: &mut logits[first..], stride: self.num_experts };
            matmul_panels(isa, tokens.len() / d_model, lhs, panel, None, n, d_model, out);
        }
    }
}

#[inline(always)]
fn decode_router<T: Copy + Into<f32>>(codes: &[T], scale: &[f32], panel: &mut [f32]) {
    let width = scale.len();
    for (out, codes) in panel.chunks_exact_mut(width).zip(codes.chunks_exact(width)) {
        for ((out, &code), scale) in out.iter_mut().zip(codes).zip(scale) {
            *out = code.into() * scale;
        }
    }
}

/// One panel of [`RouterCodes::Bits4`].
#[inline(always)]
fn decode_nibbles(codes: &[u8], scale: &[f32], panel: &mut [f32]) {
    let (low, high) = panel.split_at_mut(codes.len());
    decode_half::<false>(codes, scale, low);
    decode_half::<true>(codes, scale, high);
}

#[inline(always)]
fn decode_half<const HIGH: bool>(codes: &[u8], scale: &[f32], out: &mut [f32]) {
    let width = scale.len();
    for (out, codes) in out.chunks_exact_mut(width).zip(codes.chunks_exact(width)) {
        for ((out, &code), scale) in out.iter_mut().zip(codes).zip(scale) {
            // Shifts of signed numbers keep the sign.
            let code = if HIGH { code } else { code << 4 };
            *out = f32::from(code.cast_signed() >> 4) * scale;
        }
    }
}
