//! The mixture of butterfly experts, `y = sum_k w_k [B(out_i)] Down(gelu(B(hidden_i) Up(B(in_i) x)))`.
//!
//! ```text
//! route:    logits = x . router^T; the top_k experts of every token, softmax over their logits
//! assign:   counting sort of the (token, choice) rows by (expert set, expert): a segment is one expert's rows
//! up:       for each tile of rows: for each of its segments: decode B(in_i), rotate, quantise
//!                                  one product with `up` for the whole tile, whatever experts and sets
//!                                  for each of its segments: decode B(hidden_i), rotate, gelu
//! down:     for each tile of tokens: weighted sum over k, quantise, one product with `down`, add to the residual
//! ```
//! Deviation from the reference's order: the weighted sum commutes with `down`, so without an `out` rotation it comes
//! first, and `down` runs (and quantises) one row per token instead of `top_k`. With an `out` rotation `down` runs on
//! the tiles of rows, followed by `B(out_i)`, and the weighted sum comes last, as in the reference.
//!
//! Inside the layer features lie in [`LaneOrder`], which is folded into the substrates, routers and angle codes.
//! Every row and token is computed by operations that do not see the other rows, so a row's answer does not depend on
//! what shares its batch.

use std::ops::Range;
use std::sync::Arc;

use super::linear::{Quantized, TILE};
use super::pool::{Parts, PerThread, Pool};
use crate::config::{BackboneShape, ExpertConfig, FloatFormat, MAX_EXPERTS, SubstrateConfig, TernaryPacking};
use crate::kernels::activation::gelu;
use crate::kernels::combine::{add_assign, weighted_sum};
use crate::kernels::dense::{PANEL, Rows, RowsMut, matmul_panels};
use crate::kernels::rotation::{Coefficients, rotate};
use crate::kernels::router::top_k;
use crate::kernels::{Isa, KernelError, LaneOrder, PackedAngles, PackedTernary, Scales, TernaryStorage};
use crate::weights::{ExpertLayerWeights, Ternary};

/// The substrates of one layer, in lane order.
#[derive(Debug)]
pub struct Substrates {
    isa: Isa,
    /// Order of `d_model` features at the layer's input and inside its `out` rotation.
    model: LaneOrder,
    up: PackedTernary,
    down: PackedTernary,
}

impl Substrates {
    /// Packs `up` `[d_ff, d_model]` and `down` `[d_model, d_ff]`.
    ///
    /// # Errors
    /// [`KernelError`] when lengths do not fit, or codes or scales are not valid.
    pub fn pack(isa: Isa, config: &BackboneShape, up: &Ternary, down: &Ternary) -> Result<Self, KernelError> {
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
    pub fn with_scales(&self, up: &[f32], down: &[f32]) -> Result<Self, KernelError> {
        let ff = LaneOrder::new(self.up.rows());
        if up.len() != ff.features() {
            return Err(KernelError::Length { what: "up", expected: ff.features(), got: up.len() });
        }
        let up = self.up.with_scale(&ff.permute_rows(up, 1))?;
        Ok(Self { isa: self.isa, model: self.model, up, down: self.down.with_scale(down)? })
    }

    /// The order in which the layer wants its input.
    pub fn input_order(&self) -> LaneOrder {
        self.model
    }

    /// Bytes on the heap. Layers that share their codes have those once.
    pub fn resident_bytes(&self) -> usize {
        self.up.codes_bytes() + self.down.codes_bytes() + self.scales_bytes()
    }

    /// Bytes of the scales on the heap.
    pub(super) fn scales_bytes(&self) -> usize {
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

/// Router codes in panels of experts as `dense` has them, with the bits of the artifact's.
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
pub struct ExpertLayer {
    num_experts: usize,
    top_k: usize,
    router: RouterCodes,
    router_scale: Scales,
    rotation_in: PackedAngles,
    rotation_hidden: PackedAngles,
    rotation_out: PackedAngles,
}

impl ExpertLayer {
    /// Packs the weights of layer `layer`.
    ///
    /// # Errors
    /// [`KernelError`] when a tensor does not fit the configuration.
    pub fn pack(
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
    pub fn resident_bytes(&self) -> usize {
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
    fn logits(&self, isa: Isa, tokens: &[f32], d_model: usize, panel: &mut [f32], logits: &mut [f32]) {
        for first in (0..self.num_experts).step_by(PANEL) {
            // Scaled before the product, as the definition has it: gate weight = code * scale.
            let n = PANEL.min(self.num_experts - first);
            let codes = first * d_model..(first + n) * d_model;
            let mut scales = [0.0; PANEL];
            self.router_scale.read(first, &mut scales);
            let scale = &scales[..n];
            match &self.router {
                RouterCodes::Bits4(all) => {
                    let half = d_model.div_ceil(2);
                    decode_nibbles(&all[first * half..][..n * half], scale, &mut panel[..n * d_model]);
                }
                RouterCodes::Bits8(all) => decode_router(&all[codes], scale, panel),
                RouterCodes::Bits16(all) => decode_router(&all[codes], scale, panel),
            }
            let lhs = Rows { data: tokens, stride: d_model };
            let out = RowsMut { data: &mut logits[first..], stride: self.num_experts };
            matmul_panels(isa, tokens.len() / d_model, lhs, panel, None, n, d_model, out);
        }
    }
}

fn decode_router<T: Copy + Into<f32>>(codes: &[T], scale: &[f32], panel: &mut [f32]) {
    let width = scale.len();
    for (out, codes) in panel.chunks_exact_mut(width).zip(codes.chunks_exact(width)) {
        for ((out, &code), scale) in out.iter_mut().zip(codes).zip(scale) {
            *out = code.into() * scale;
        }
    }
}

/// One panel of [`RouterCodes::Bits4`].
fn decode_nibbles(codes: &[u8], scale: &[f32], panel: &mut [f32]) {
    let width = scale.len();
    let (low, high) = panel.split_at_mut(codes.len());
    let rows = |out: &mut [f32], value: fn(u8) -> i8| {
        for (out, codes) in out.chunks_exact_mut(width).zip(codes.chunks_exact(width)) {
            for ((out, &code), scale) in out.iter_mut().zip(codes).zip(scale) {
                *out = f32::from(value(code)) * scale;
            }
        }
    };
    // Shifts of signed numbers keep the sign.
    rows(low, |code| (code << 4).cast_signed() >> 4);
    rows(high, |code| code.cast_signed() >> 4);
}

/// Consecutive tokens that go through the same expert set.
#[derive(Debug, Clone, Copy)]
pub struct Span {
    /// Which of the batch's expert sets.
    pub set: usize,
    pub first: usize,
    pub tokens: usize,
    /// First of the `tokens * top_k` slots, one per (token, choice).
    pub first_slot: usize,
}

/// At most [`TILE`] tokens of one span, worked on by one thread.
#[derive(Debug, Clone, Copy)]
struct TokenTile {
    set: usize,
    first: usize,
    tokens: usize,
    first_slot: usize,
    top_k: usize,
}

/// The rows that one expert of one set gets; long ones are cut at tiles.
#[derive(Debug, Clone, Copy)]
struct Segment {
    set: usize,
    expert: usize,
    /// First of its rows, and how many.
    first: usize,
    rows: usize,
}

/// Segments worked on by one thread with one product: at most [`TILE`] rows of sets that agree on
/// having an `out` rotation.
#[derive(Debug, Clone, Copy)]
struct RowTile {
    first_segment: usize,
    segments: usize,
    first: usize,
    rows: usize,
}

/// Most (token, choice) rows whose hidden activations are held at a time, unless one token alone has more: 4
/// MB at `d_ff` 1024.
const CHUNK_ROWS: usize = 1024;

/// Experts that the counting sort has room for from the start.
const INITIAL_COUNTS: usize = 64;

/// Buffers of the layer, shared by all layers of a session.
#[derive(Debug)]
pub struct MoeScratch {
    d_model: usize,
    d_ff: usize,
    /// Set by [`MoeScratch::plan`].
    tiles: Vec<TokenTile>,
    /// Chosen experts and their weights, one per slot.
    ids: Vec<u16>,
    weights: Vec<f32>,
    /// Where a slot's row went; for the slots of the current chunk.
    row_of_slot: Vec<u32>,
    /// The token of each row.
    token_of_row: Vec<u32>,
    /// For counting sort, one per expert.
    counts: Vec<u32>,
    segments: Vec<Segment>,
    row_tiles: Vec<RowTile>,
    /// `[rows, d_ff]` hidden activations.
    hidden: Vec<f32>,
    /// `[rows, d_model]` outputs of experts with an `out` rotation, in lane order.
    outputs: Vec<f32>,
    threads: Arc<PerThread<MoeThread>>,
}

/// Logits that a thread holds at once: those of a tile of tokens for up to 64 experts, of fewer tokens for more, and of
/// one token for [`MAX_EXPERTS`].
const LOGITS: usize = TILE * 64;
const _: () = assert!(LOGITS >= MAX_EXPERTS);

/// Buffers of one thread.
#[derive(Debug)]
pub(super) struct MoeThread {
    coefficients: Coefficients,
    quantized: Quantized,
    /// `[TILE, max(d_model, d_ff)]`.
    rows: Vec<f32>,
    /// `[TILE, d_model]`.
    narrow: Vec<f32>,
    /// One decoded router panel.
    panel: Vec<f32>,
    /// `[LOGITS / num_experts, num_experts]`.
    logits: Vec<f32>,
}

impl MoeThread {
    pub(super) fn new(d_model: usize, d_ff: usize) -> Self {
        Self {
            coefficients: Coefficients::new(&[LaneOrder::new(d_model), LaneOrder::new(d_ff)]),
            quantized: Quantized::new(d_model.max(d_ff)),
            rows: vec![0.0; TILE * d_model.max(d_ff)],
            narrow: vec![0.0; TILE * d_model],
            panel: vec![0.0; PANEL * d_model],
            logits: vec![0.0; LOGITS],
        }
    }

    pub(super) fn bytes(&self) -> usize {
        let floats = self.rows.capacity() + self.narrow.capacity() + self.panel.capacity() + self.logits.capacity();
        let buffers = self.coefficients.heap_bytes() + self.quantized.heap_bytes() + floats * size_of::<f32>();
        size_of::<Self>() + buffers
    }
}

/// Lengthens a buffer that is only ever as long as the largest batch needed.
fn grow<T: Clone + Default>(buffer: &mut Vec<T>, len: usize) {
    if buffer.len() < len {
        buffer.reserve_exact(len - buffer.len());
        buffer.resize(len, T::default());
    }
}

impl MoeScratch {
    /// Room for `tokens` tokens with two experts each, and so many threads; more experts grow it once.
    pub fn new(d_model: usize, d_ff: usize, tokens: usize, threads: usize) -> Self {
        let buffers = PerThread::new(threads, || MoeThread::new(d_model, d_ff));
        Self::sharing(d_model, d_ff, tokens, Arc::new(buffers))
    }

    /// As [`MoeScratch::new`], with threads' buffers that belong to a group of pools.
    pub(super) fn sharing(d_model: usize, d_ff: usize, tokens: usize, buffers: Arc<PerThread<MoeThread>>) -> Self {
        let slots = 2 * tokens;
        let rows = slots.min(CHUNK_ROWS);
        Self {
            d_model,
            d_ff,
            tiles: Vec::with_capacity(tokens),
            ids: vec![0; slots],
            weights: vec![0.0; slots],
            row_of_slot: vec![0; rows],
            token_of_row: vec![0; rows],
            counts: vec![0; INITIAL_COUNTS],
            segments: Vec::with_capacity(rows),
            row_tiles: Vec::with_capacity(rows),
            hidden: vec![0.0; rows * d_ff],
            outputs: Vec::new(),
            threads: buffers,
        }
    }

    /// Most bytes by which batches of up to `tokens` tokens of sets like `config` grow what [`MoeScratch::sharing`] made.
    pub(super) fn growth(d_model: usize, d_ff: usize, tokens: usize, config: &ExpertConfig) -> usize {
        let ExpertConfig { num_experts, top_k, stages_out, .. } = *config;
        let slots = top_k.saturating_sub(2) * tokens;
        // A chunk has one token at least.
        let rows = (top_k * tokens).min(CHUNK_ROWS.max(top_k));
        let more_rows = rows.saturating_sub((2 * tokens).min(CHUNK_ROWS));
        let floats = more_rows * d_ff + if stages_out > 0 { rows * d_model } else { 0 };
        let words = slots + 2 * more_rows + num_experts.saturating_sub(INITIAL_COUNTS) + floats;
        let per_row = size_of::<Segment>() + size_of::<RowTile>();
        words * size_of::<u32>() + slots * size_of::<u16>() + more_rows * per_row
    }

    /// Bytes on the heap, without those of threads.
    pub(super) fn heap_bytes(&self) -> usize {
        let words = self.weights.capacity()
            + self.row_of_slot.capacity()
            + self.token_of_row.capacity()
            + self.counts.capacity()
            + self.hidden.capacity()
            + self.outputs.capacity();
        words * size_of::<u32>()
            + self.ids.capacity() * size_of::<u16>()
            + self.tiles.capacity() * size_of::<TokenTile>()
            + self.segments.capacity() * size_of::<Segment>()
            + self.row_tiles.capacity() * size_of::<RowTile>()
    }

    /// The experts of each slot, as the last [`Moe::route`] chose them.
    pub fn ids(&self) -> &[u16] {
        &self.ids
    }

    /// The weights of each slot.
    pub fn weights(&self) -> &[f32] {
        &self.weights
    }
}

/// One layer at work on a batch.
pub struct Moe<'a, F> {
    pub substrates: &'a Substrates,
    /// The sets' half: the layer's experts of the set with that index.
    pub experts: F,
    /// How tokens belong to sets, in order and without gaps.
    pub spans: &'a [Span],
}

impl<'a, F: Fn(usize) -> &'a ExpertLayer + Sync> Moe<'a, F> {
    /// Cuts the spans into tiles, the same for every layer of a forward. Call it before [`Moe::route`] and
    /// [`Moe::forward`] whenever the spans changed.
    ///
    /// # Panics
    /// When the spans overlap or leave gaps.
    pub fn plan(&self, threads: usize, scratch: &mut MoeScratch) {
        let all: usize = self.spans.iter().map(|span| span.tokens).sum();
        let share = all.div_ceil(threads).clamp(8, TILE);
        scratch.tiles.clear();
        let (mut tokens, mut slots, mut experts) = (0, 0, 0);
        for span in self.spans {
            let layer = (self.experts)(span.set);
            // Tiles are worked on at the same time, each with its part of the buffers.
            assert_eq!((span.first, span.first_slot), (tokens, slots), "spans lie one behind the other");
            let most = share.min(CHUNK_ROWS / layer.top_k).max(1);
            for offset in (0..span.tokens).step_by(most) {
                scratch.tiles.push(TokenTile {
                    set: span.set,
                    first: span.first + offset,
                    tokens: most.min(span.tokens - offset),
                    first_slot: span.first_slot + offset * layer.top_k,
                    top_k: layer.top_k,
                });
            }
            tokens += span.tokens;
            slots += span.tokens * layer.top_k;
            experts = experts.max(layer.num_experts);
        }
        grow(&mut scratch.ids, slots);
        grow(&mut scratch.weights, slots);
        grow(&mut scratch.counts, experts);
    }

    /// Chooses the experts of every token. `x` is `[tokens, d_model]` in lane order.
    pub fn route(&self, x: &[f32], pool: &mut Pool, scratch: &mut MoeScratch) {
        let (d_model, isa) = (scratch.d_model, self.substrates.isa);
        let (ids, weights) = (Parts::new(&mut scratch.ids), Parts::new(&mut scratch.weights));
        let (threads, tiles) = (&*scratch.threads, &scratch.tiles);
        pool.run(tiles.len(), |thread, item| {
            let tile = tiles[item];
            let layer = (self.experts)(tile.set);
            let k = layer.top_k;
            assert_eq!(k, tile.top_k, "planned for other experts");
            // SAFETY: a thread number is used by one call at a time, and tiles have slots of their own.
            let (thread, ids, weights) = unsafe {
                let slots = tile.tokens * k;
                (threads.of(thread), ids.part(tile.first_slot, slots), weights.part(tile.first_slot, slots))
            };
            let rows = LOGITS / layer.num_experts;
            let tokens = &x[tile.first * d_model..][..tile.tokens * d_model];
            let choices = ids.chunks_mut(rows * k).zip(weights.chunks_mut(rows * k));
            for (tokens, (ids, weights)) in tokens.chunks(rows * d_model).zip(choices) {
                let logits = &mut thread.logits[..tokens.len() / d_model * layer.num_experts];
                layer.logits(isa, tokens, d_model, &mut thread.panel, logits);
                for (logits, (ids, weights)) in
                    logits.chunks_exact(layer.num_experts).zip(ids.chunks_exact_mut(k).zip(weights.chunks_exact_mut(k)))
                {
                    top_k(logits, ids, weights);
                }
            }
        });
    }

    /// `residual += experts(x)` with the choices of [`Moe::route`]; `x` `[tokens, d_model]` is in lane order,
    /// `residual` `[tokens, d_model]` is not.
    pub fn forward(&self, x: &[f32], residual: &mut [f32], pool: &mut Pool, scratch: &mut MoeScratch) {
        let mut first = 0;
        while first < scratch.tiles.len() {
            let mut slots = 0;
            let mut end = first;
            while end < scratch.tiles.len() {
                let more = scratch.tiles[end].tokens * (self.experts)(scratch.tiles[end].set).top_k;
                if end > first && slots + more > CHUNK_ROWS {
                    break;
                }
                slots += more;
                end += 1;
            }
            self.assign(first..end, slots, pool.threads(), scratch);
            self.run_rows(x, pool, scratch);
            self.run_tokens(first..end, residual, pool, scratch);
            first = end;
        }
    }

    /// Sorts the rows of a chunk by set and expert, and cuts them into tiles.
    fn assign(&self, tiles: std::ops::Range<usize>, slots: usize, threads: usize, scratch: &mut MoeScratch) {
        grow(&mut scratch.row_of_slot, slots);
        grow(&mut scratch.token_of_row, slots);
        grow(&mut scratch.hidden, slots * scratch.d_ff);
        scratch.segments.clear();
        scratch.segments.reserve_exact(slots);
        let base_slot = scratch.tiles[tiles.start].first_slot;
        let most = slots.div_ceil(threads).clamp(16, TILE);
        let (mut first_row, mut at) = (0, tiles.start);
        while at < tiles.end {
            // Tiles of one set are neighbours.
            let set = scratch.tiles[at].set;
            let group =
                at..tiles.end.min(at + scratch.tiles[at..tiles.end].iter().take_while(|t| t.set == set).count());
            let layer = (self.experts)(set);
            let counts = &mut scratch.counts[..layer.num_experts];
            counts.fill(0);
            let slots_of = |t: &TokenTile| t.first_slot..t.first_slot + t.tokens * layer.top_k;
            let begin = slots_of(&scratch.tiles[group.start]).start;
            let end = slots_of(&scratch.tiles[group.end - 1]).end;
            let first_token = scratch.tiles[group.start].first;
            for &id in &scratch.ids[begin..end] {
                counts[usize::from(id)] += 1;
            }
            for (expert, count) in counts.iter_mut().enumerate() {
                let rows = *count as usize;
                *count = first_row as u32;
                for offset in (0..rows).step_by(most) {
                    let rows = most.min(rows - offset);
                    scratch.segments.push(Segment { set, expert, first: first_row + offset, rows });
                }
                first_row += rows;
            }
            for (i, &id) in scratch.ids[begin..end].iter().enumerate() {
                let row = &mut counts[usize::from(id)];
                scratch.row_of_slot[begin + i - base_slot] = *row;
                scratch.token_of_row[*row as usize] = (first_token + i / layer.top_k) as u32;
                *row += 1;
            }
            at = group.end;
        }
        self.cut_row_tiles(most, scratch);
    }

    fn cut_row_tiles(&self, most: usize, scratch: &mut MoeScratch) {
        scratch.row_tiles.clear();
        scratch.row_tiles.reserve_exact(scratch.segments.len());
        let rotates_out = |segment: &Segment| (self.experts)(segment.set).rotation_out.stages() > 0;
        for (i, segment) in scratch.segments.iter().enumerate() {
            match scratch.row_tiles.last_mut() {
                Some(tile)
                    if tile.rows + segment.rows <= most
                        && rotates_out(&scratch.segments[tile.first_segment]) == rotates_out(segment) =>
                {
                    tile.segments += 1;
                    tile.rows += segment.rows;
                }
                _ => scratch.row_tiles.push(RowTile {
                    first_segment: i,
                    segments: 1,
                    first: segment.first,
                    rows: segment.rows,
                }),
            }
        }
        if scratch.segments.iter().any(rotates_out) {
            let rows = scratch.segments.last().map_or(0, |last| last.first + last.rows);
            grow(&mut scratch.outputs, rows * scratch.d_model);
        }
    }

    /// From tokens to the hidden activations of their experts, and with an `out` rotation on to the experts' outputs.
    fn run_rows(&self, x: &[f32], pool: &mut Pool, scratch: &mut MoeScratch) {
        let Substrates { isa, model, up, down, .. } = self.substrates;
        let (d_model, d_ff) = (scratch.d_model, scratch.d_ff);
        let MoeScratch { row_tiles, segments, token_of_row, hidden, outputs, threads, .. } = scratch;
        let (hidden, outputs) = (Parts::new(hidden), Parts::new(outputs));
        pool.run(row_tiles.len(), |thread, item| {
            let tile = row_tiles[item];
            let segments = &segments[tile.first_segment..][..tile.segments];
            let first = tile.first;
            // SAFETY: a thread number is used by one call at a time, and tiles have rows of their own.
            let (thread, hidden) = unsafe { (threads.of(thread), hidden.part(first * d_ff, tile.rows * d_ff)) };
            let MoeThread { coefficients, quantized, rows, narrow, .. } = thread;

            let rows = &mut rows[..tile.rows * d_model];
            for (row, &token) in rows.chunks_exact_mut(d_model).zip(&token_of_row[first..]) {
                row.copy_from_slice(&x[token as usize * d_model..][..d_model]);
            }
            for segment in segments {
                let rows = &mut rows[(segment.first - first) * d_model..][..segment.rows * d_model];
                apply(*isa, &(self.experts)(segment.set).rotation_in, segment.expert, coefficients, rows);
            }
            let (codes, steps) = quantized.rows(*isa, rows, d_model).expect(LENGTHS);
            up.matmul(codes, steps, hidden).expect(LENGTHS);
            for segment in segments {
                let rows = &mut hidden[(segment.first - first) * d_ff..][..segment.rows * d_ff];
                apply(*isa, &(self.experts)(segment.set).rotation_hidden, segment.expert, coefficients, rows);
                gelu(*isa, rows);
            }
            if (self.experts)(segments[0].set).rotation_out.stages() == 0 {
                return;
            }
            // SAFETY: tiles have rows of their own.
            let outputs = unsafe { outputs.part(first * d_model, tile.rows * d_model) };
            let (codes, steps) = quantized.rows(*isa, hidden, d_ff).expect(LENGTHS);
            let narrow = &mut narrow[..tile.rows * d_model];
            down.matmul(codes, steps, narrow).expect(LENGTHS);
            for (ordered, natural) in outputs.chunks_exact_mut(d_model).zip(narrow.chunks_exact(d_model)) {
                model.permute_row(natural, ordered);
            }
            for segment in segments {
                let rows = &mut outputs[(segment.first - first) * d_model..][..segment.rows * d_model];
                apply(*isa, &(self.experts)(segment.set).rotation_out, segment.expert, coefficients, rows);
            }
        });
    }

    /// The weighted sums, and what remains of `down`.
    fn run_tokens(
        &self,
        tiles: std::ops::Range<usize>,
        residual: &mut [f32],
        pool: &mut Pool,
        scratch: &mut MoeScratch,
    ) {
        let Substrates { isa, model, down, .. } = self.substrates;
        let (d_model, d_ff) = (scratch.d_model, scratch.d_ff);
        let base_slot = scratch.tiles[tiles.start].first_slot;
        let MoeScratch { tiles: all_tiles, weights, row_of_slot, hidden, outputs, threads, .. } = scratch;
        let (residual, tiles) = (Parts::new(residual), &all_tiles[tiles]);
        pool.run(tiles.len(), |thread, item| {
            let tile = tiles[item];
            let layer = (self.experts)(tile.set);
            // SAFETY: a thread number is used by one call at a time, and tiles have tokens of their own.
            let (thread, residual) =
                unsafe { (threads.of(thread), residual.part(tile.first * d_model, tile.tokens * d_model)) };
            let MoeThread { quantized, rows, narrow, .. } = thread;
            let rotates_out = layer.rotation_out.stages() > 0;
            let (source, width) = if rotates_out { (&**outputs, d_model) } else { (&**hidden, d_ff) };
            let sums = &mut rows[..tile.tokens * width];
            for (token, sum) in sums.chunks_exact_mut(width).enumerate() {
                let slot = tile.first_slot + token * layer.top_k;
                let rows = &row_of_slot[slot - base_slot..][..layer.top_k];
                weighted_sum(*isa, source, rows, &weights[slot..][..layer.top_k], sum);
            }
            if rotates_out {
                for (residual, sum) in residual.chunks_exact_mut(d_model).zip(sums.chunks_exact(d_model)) {
                    for (j, residual) in residual.iter_mut().enumerate() {
                        *residual += sum[model.position(j)];
                    }
                }
            } else {
                let (codes, steps) = quantized.rows(*isa, sums, d_ff).expect(LENGTHS);
                let narrow = &mut narrow[..tile.tokens * d_model];
                down.matmul(codes, steps, narrow).expect(LENGTHS);
                add_assign(*isa, residual, narrow);
            }
        });
    }
}

/// Why the kernels called here cannot refuse.
pub(super) const LENGTHS: &str = "buffers are sized by the configuration that the weights were packed with";

/// Rotates the rows of one expert.
fn apply(isa: Isa, angles: &PackedAngles, expert: usize, coefficients: &mut Coefficients, rows: &mut [f32]) {
    if angles.stages() > 0 {
        angles.decode(isa, expert, coefficients);
        rotate(isa, coefficients, rows);
    }
}
