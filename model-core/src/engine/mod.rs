//! The integer forward pass that serves: int8 activations against packed substrates and int8 weights of attention and
//! stem, f32 for the stem's first layer, rotations, router, softmax, norms and head.
//!
//! Reads like [`crate::vit`], which is its float reference:
//! ```text
//! x  = stem(pixels) + pos_embed
//! for each block:  x += proj(attention(qkv(norm1(x))));  x += experts(norm2(x))
//! logits = head(mean over tokens of norm(x))
//! ```
//! All images of a batch go through every step together; rows of one expert set are made neighbours first. Buffers are
//! sized when a [`Session`](model::Session) is made, and loops over tiles of rows are shared by its threads.

mod attention;
mod linear;
mod moe;
mod pool;
mod stem;

use std::sync::Arc;

use attention::{AttentionScratch, Head};
use linear::{Linear, Quantized, TILE};
pub use moe::{ExpertLayer, Moe, MoeScratch, Span, Substrates};
use moe::{LENGTHS, MoeThread};
use pool::{Parts, PerThread};
pub use pool::{Pool, Team, Welcome};
use stem::Convolution;

use crate::config::{BackboneConfig, ExpertConfig};
use crate::kernels::combine::add_assign;
use crate::kernels::norm::layer_norm;
use crate::kernels::{Isa, PackedF32};
use crate::model::{self, ModelError};
use crate::weights::{BackboneWeights, BlockWeights, ExpertSetWeights, LAYER_NORM_EPS, Norm};

/// One image of a batch: what goes in, and where the answer goes.
#[derive(Debug)]
pub struct Row<'a> {
    /// The expert set that classifies it.
    pub set: &'a model::ExpertSet,
    /// `[image_size, image_size, 3]`, normalised.
    pub pixels: &'a [f32],
    /// One per label of the set.
    pub logits: &'a mut [f32],
    /// The chosen experts, best first, `[num_layers, tokens, top_k]`, where the caller wants them.
    pub routing: Option<&'a mut [u16]>,
}

/// The packed half of a [`model::Backbone`].
#[derive(Debug)]
pub(crate) struct Backbone {
    config: BackboneConfig,
    isa: Isa,
    stem: Vec<Convolution>,
    pos_embed: Box<[f32]>,
    blocks: Vec<Block>,
    norm: Norm,
}

#[derive(Debug)]
struct Block {
    norm1: Norm,
    qkv: Linear,
    proj: Linear,
    norm2: Norm,
    substrates: Substrates,
}

/// Checks one tensor's length.
fn expect_len(what: &'static str, got: usize, expected: usize) -> Result<(), ModelError> {
    if got == expected { Ok(()) } else { Err(ModelError::Length { what, expected, got }) }
}

fn expect_norm(what: &'static str, norm: &Norm, features: usize) -> Result<Norm, ModelError> {
    expect_len(what, norm.gamma.len(), features)?;
    expect_len(what, norm.beta.len(), features)?;
    Ok(norm.clone())
}

fn norm_bytes(norm: &Norm) -> usize {
    (norm.gamma.len() + norm.beta.len()) * size_of::<f32>()
}

impl Backbone {
    pub(crate) fn pack(weights: &BackboneWeights, isa: Isa) -> Result<Self, ModelError> {
        let config = weights.config.clone();
        config.validate()?;
        expect_len("stem layers", weights.stem.len(), config.stem.len())?;
        expect_len("blocks", weights.blocks.len(), config.num_layers)?;
        expect_len("pos_embed", weights.pos_embed.len(), config.num_tokens() * config.d_model)?;
        let mut stem = Vec::with_capacity(config.stem.len());
        for (i, (weights, shape)) in weights.stem.iter().zip(config.stem_inputs()).enumerate() {
            match &weights.norm {
                Some(norm) if shape.0.norm_gelu => _ = expect_norm("stem norm", norm, shape.0.channels)?,
                norm => expect_len("stem norm", usize::from(norm.is_some()), usize::from(shape.0.norm_gelu))?,
            }
            stem.push(Convolution::pack(isa, weights, shape, i == 0)?);
        }
        let blocks = weights.blocks.iter().map(|block| Block::pack(block, &config, isa));
        let blocks = blocks.collect::<Result<_, ModelError>>()?;
        let norm = expect_norm("norm", &weights.norm, config.d_model)?;
        Ok(Self { isa, stem, pos_embed: weights.pos_embed.clone().into(), blocks, norm, config })
    }

    pub(crate) fn config(&self) -> &BackboneConfig {
        &self.config
    }

    pub(crate) fn isa(&self) -> Isa {
        self.isa
    }

    pub(crate) fn heap_bytes(&self) -> usize {
        let stem: usize = self.stem.iter().map(|layer| size_of::<Convolution>() + layer.heap_bytes()).sum();
        let blocks: usize = self.blocks.iter().map(|block| size_of::<Block>() + block.heap_bytes()).sum();
        stem + blocks + size_of_val(&*self.pos_embed) + norm_bytes(&self.norm)
    }
}

impl Block {
    fn pack(weights: &BlockWeights, config: &BackboneConfig, isa: Isa) -> Result<Self, ModelError> {
        let BackboneConfig { d_model, d_ff, .. } = *config;
        Ok(Self {
            norm1: expect_norm("norm1", &weights.norm1, d_model)?,
            qkv: Linear::int8(isa, &weights.qkv, 3 * d_model, d_model)?,
            proj: Linear::int8(isa, &weights.proj, d_model, d_model)?,
            norm2: expect_norm("norm2", &weights.norm2, d_model)?,
            substrates: Substrates::pack(isa, &weights.up, &weights.down, d_model, d_ff)?,
        })
    }

    fn heap_bytes(&self) -> usize {
        self.qkv.heap_bytes()
            + self.proj.heap_bytes()
            + norm_bytes(&self.norm1)
            + norm_bytes(&self.norm2)
            + self.substrates.resident_bytes()
    }
}

/// The packed half of a [`model::ExpertSet`].
#[derive(Debug)]
pub(crate) struct ExpertSet {
    config: ExpertConfig,
    layers: Vec<ExpertLayer>,
    head: PackedF32,
}

impl ExpertSet {
    pub(crate) fn pack(weights: &ExpertSetWeights, backbone: &Backbone) -> Result<Self, ModelError> {
        let BackboneConfig { d_model, d_ff, num_layers, .. } = backbone.config;
        weights.vit_config(&backbone.config).validate()?;
        expect_len("layers", weights.layers.len(), num_layers)?;
        let layers = weights.layers.iter().map(|layer| ExpertLayer::pack(layer, &weights.config, d_model, d_ff));
        let layers = layers.collect::<Result<_, _>>()?;
        let (head, classes) = (&weights.head, weights.labels.len());
        let head = PackedF32::pack(backbone.isa, &head.weight, &head.bias, classes, d_model)?;
        Ok(Self { config: weights.config.clone(), layers, head })
    }

    pub(crate) fn config(&self) -> &ExpertConfig {
        &self.config
    }

    pub(crate) fn heap_bytes(&self) -> usize {
        let layers = self.layers.iter().map(|layer| size_of::<ExpertLayer>() + layer.resident_bytes());
        layers.sum::<usize>() + self.head.resident_bytes()
    }
}

/// The scratch of a [`model::Session`].
#[derive(Debug)]
pub(crate) struct Session {
    max_batch: usize,
    pool: Pool,
    /// The caller's row of each image: rows of one set are made neighbours.
    order: Vec<usize>,
    /// The batch's sets, each by the caller's row that named it first.
    sets: Vec<usize>,
    spans: Vec<Span>,
    /// Activations between stem layers, two of `[max_batch, stem_len]`.
    stem: [Vec<f32>; 2],
    stem_len: usize,
    /// `[max_batch, tokens, d_model]`, the residual stream.
    x: Vec<f32>,
    /// `[max_batch, tokens, d_model]`, normed for the experts, in lane order.
    normed: Vec<f32>,
    /// `[max_batch, tokens, 3 d_model]`.
    qkv: Vec<f32>,
    /// `[max_batch, heads, tokens, head_dim]`.
    heads: Vec<f32>,
    moe: MoeScratch,
    threads: Arc<PerThread<ThreadScratch>>,
    /// Bytes of one thread's scratch.
    thread_bytes: usize,
    /// Threads whose scratch counts as this session's: all of its own, or one of a group's.
    own_threads: usize,
}

/// Buffers of one thread.
#[derive(Debug)]
struct ThreadScratch {
    /// A tile's windows.
    windows: Vec<f32>,
    /// A tile's rows, `[TILE, d_model or stem channels]`.
    rows: Vec<f32>,
    /// As `rows`, for what comes out.
    out: Vec<f32>,
    quantized: Quantized,
    attention: AttentionScratch,
}

impl ThreadScratch {
    fn new(config: &BackboneConfig) -> Self {
        let (_, windows, outputs) = stem::scratch_sizes(config);
        let rows = outputs.max(TILE * config.d_model);
        Self {
            windows: vec![0.0; windows],
            rows: vec![0.0; rows],
            out: vec![0.0; rows],
            quantized: Quantized::new(config.d_model.max(windows / TILE)),
            attention: AttentionScratch::new(config.num_tokens(), config.head_dim()),
        }
    }

    fn bytes(&self) -> usize {
        let floats = self.windows.capacity() + self.rows.capacity() + self.out.capacity();
        let buffers = floats * size_of::<f32>() + self.quantized.heap_bytes() + self.attention.heap_bytes();
        size_of::<Self>() + buffers
    }
}

/// The scratch of every thread of a pool or of a group of pools.
struct Threads {
    rest: Arc<PerThread<ThreadScratch>>,
    moe: Arc<PerThread<MoeThread>>,
    /// Of one thread.
    bytes: usize,
}

impl Threads {
    fn new(backbone: &Backbone, count: usize) -> Self {
        let config = &backbone.config;
        let (rest, moe) = (|| ThreadScratch::new(config), || MoeThread::new(config.d_model, config.d_ff));
        let bytes = rest().bytes() + moe().bytes();
        Self { rest: Arc::new(PerThread::new(count, rest)), moe: Arc::new(PerThread::new(count, moe)), bytes }
    }
}

impl Session {
    pub(crate) fn new(backbone: &Backbone, max_batch: usize, threads: usize) -> Self {
        let pool = Pool::new(threads);
        let own_threads = pool.seats();
        Self::with(backbone, max_batch, pool, own_threads, &Threads::new(backbone, own_threads))
    }

    /// `count` sessions whose callers may help each other, with scratch for as many threads.
    pub(crate) fn group(backbone: &Backbone, max_batch: usize, count: usize) -> Vec<Self> {
        let threads = Threads::new(backbone, count);
        Pool::group(count).into_iter().map(|pool| Self::with(backbone, max_batch, pool, 1, &threads)).collect()
    }

    fn with(backbone: &Backbone, max_batch: usize, pool: Pool, own_threads: usize, threads: &Threads) -> Self {
        let config = &backbone.config;
        let (d_model, d_ff, tokens) = (config.d_model, config.d_ff, config.num_tokens());
        let (stem_len, ..) = stem::scratch_sizes(config);
        let moe_threads = Arc::clone(&threads.moe);
        Self {
            max_batch,
            order: Vec::with_capacity(max_batch),
            sets: Vec::with_capacity(max_batch),
            spans: Vec::with_capacity(max_batch),
            stem: [vec![0.0; max_batch * stem_len], vec![0.0; max_batch * stem_len]],
            stem_len,
            x: vec![0.0; max_batch * tokens * d_model],
            normed: vec![0.0; max_batch * tokens * d_model],
            qkv: vec![0.0; max_batch * tokens * 3 * d_model],
            heads: vec![0.0; max_batch * tokens * d_model],
            moe: MoeScratch::sharing(d_model, d_ff, max_batch * tokens, moe_threads),
            threads: Arc::clone(&threads.rest),
            thread_bytes: threads.bytes,
            own_threads,
            pool,
        }
    }

    /// [`MoeScratch::growth`] of a session for `max_batch` images.
    pub(crate) fn growth(backbone: &BackboneConfig, max_batch: usize, experts: &ExpertConfig) -> usize {
        MoeScratch::growth(backbone.d_model, backbone.d_ff, max_batch * backbone.num_tokens(), experts)
    }

    pub(crate) fn max_batch(&self) -> usize {
        self.max_batch
    }

    pub(crate) fn team(&self) -> Team {
        self.pool.team()
    }

    pub(crate) fn help(&mut self, team: &Team, leave: impl Fn() -> bool) {
        self.pool.help(team, leave);
    }

    pub(crate) fn heap_bytes(&self) -> usize {
        let floats = self.stem[0].capacity()
            + self.stem[1].capacity()
            + self.x.capacity()
            + self.normed.capacity()
            + self.qkv.capacity()
            + self.heads.capacity();
        floats * size_of::<f32>()
            + (self.order.capacity() + self.sets.capacity()) * size_of::<usize>()
            + self.spans.capacity() * size_of::<Span>()
            + self.moe.heap_bytes()
            + self.own_threads * self.thread_bytes
    }

    pub(crate) fn forward(&mut self, backbone: &Backbone, rows: &mut [Row<'_>]) -> Result<(), ModelError> {
        check_rows(backbone, self.max_batch, rows)?;
        self.arrange(backbone, rows);
        self.run_stem(backbone, rows);
        for (layer, block) in backbone.blocks.iter().enumerate() {
            self.run_attention(backbone, block, rows.len());
            self.run_experts(backbone, layer, rows);
        }
        self.run_head(backbone, rows);
        Ok(())
    }

    /// Makes rows of one set neighbours, and notes which tokens go through which set.
    fn arrange(&mut self, backbone: &Backbone, rows: &[Row<'_>]) {
        let tokens = backbone.config.num_tokens();
        let Self { order, sets, spans, .. } = self;
        order.clear();
        sets.clear();
        spans.clear();
        let mut first_slot = 0;
        for (i, row) in rows.iter().enumerate() {
            if sets.iter().any(|&set| std::ptr::eq(rows[set].set, row.set)) {
                continue;
            }
            let first = order.len();
            order.extend((i..rows.len()).filter(|&j| std::ptr::eq(rows[j].set, row.set)));
            let span_tokens = (order.len() - first) * tokens;
            spans.push(Span { set: sets.len(), first: first * tokens, tokens: span_tokens, first_slot });
            first_slot += span_tokens * row.set.config().top_k;
            sets.push(i);
        }
        let experts = |set: usize| &rows[sets[set]].set.engine().layers[0];
        Moe { substrates: &backbone.blocks[0].substrates, experts, spans }.plan(self.pool.threads(), &mut self.moe);
    }

    fn run_stem(&mut self, backbone: &Backbone, rows: &[Row<'_>]) {
        let (isa, d_model) = (backbone.isa, backbone.config.d_model);
        let image_len = backbone.config.num_tokens() * d_model;
        let (order, stem_len) = (&self.order, self.stem_len);
        let [mut from, mut to] = self.stem.each_mut();
        for (layer, convolution) in backbone.stem.iter().enumerate() {
            let (is_first, is_last) = (layer == 0, layer + 1 == backbone.stem.len());
            let threads = &*self.threads;
            let (target, target_len) = if is_last { (&mut self.x, image_len) } else { (&mut *to, stem_len) };
            let target = Parts::new(target);
            let (windows, channels) = (convolution.windows(), convolution.channels());
            let tiles = windows.div_ceil(TILE);
            let input: &[f32] = from;
            self.pool.run(rows.len() * tiles, |thread, item| {
                let (image, first) = (item / tiles, item % tiles * TILE);
                let len = TILE.min(windows - first) * channels;
                // SAFETY: a thread number is used by one call at a time, and tiles have outputs of their own.
                let (thread, out) =
                    unsafe { (threads.of(thread), target.part(image * target_len + first * channels, len)) };
                let input = if is_first { rows[order[image]].pixels } else { &input[image * stem_len..][..stem_len] };
                let buffers = (&mut thread.windows[..], &mut thread.rows[..], &mut thread.quantized);
                convolution.forward(isa, input, first, buffers, out).expect(LENGTHS);
                if is_last {
                    add_assign(isa, out, &backbone.pos_embed[first * channels..][..len]);
                }
            });
            std::mem::swap(&mut from, &mut to);
        }
    }

    /// `x += proj(attention(qkv(norm1(x))))`, then `normed = norm2(x)`.
    fn run_attention(&mut self, backbone: &Backbone, block: &Block, images: usize) {
        let BackboneConfig { d_model, num_heads, .. } = backbone.config;
        let (isa, tokens, head_dim) = (backbone.isa, backbone.config.num_tokens(), backbone.config.head_dim());
        let all = images * tokens;
        let tile = all.div_ceil(self.pool.threads()).clamp(8, TILE);
        let tiles = all.div_ceil(tile);
        let range = |item: usize| (item * tile, tile.min(all - item * tile));
        let threads = &*self.threads;

        let (x, qkv) = (&self.x, Parts::new(&mut self.qkv));
        self.pool.run(tiles, |thread, item| {
            let (first, rows) = range(item);
            // SAFETY: a thread number is used by one call at a time, and tiles have rows of their own.
            let (thread, qkv) = unsafe { (threads.of(thread), qkv.part(first * 3 * d_model, rows * 3 * d_model)) };
            let normed = &mut thread.rows[..rows * d_model];
            let Norm { gamma, beta } = &block.norm1;
            layer_norm(isa, &x[first * d_model..][..rows * d_model], gamma, beta, LAYER_NORM_EPS, normed);
            block.qkv.forward(normed, &mut thread.quantized, qkv).expect(LENGTHS);
        });

        let (qkv, heads) = (&self.qkv, Parts::new(&mut self.heads));
        self.pool.run(images * num_heads, |thread, item| {
            let (image, head) = (item / num_heads, item % num_heads);
            // SAFETY: a thread number is used by one call at a time, and heads have outputs of their own.
            let (thread, out) =
                unsafe { (threads.of(thread), heads.part(item * tokens * head_dim, tokens * head_dim)) };
            let qkv = &qkv[image * tokens * 3 * d_model..][..tokens * 3 * d_model];
            Head { isa, qkv, tokens, d_model, head_dim, head }.forward(&mut thread.attention, out);
        });

        let (x, normed, heads) = (Parts::new(&mut self.x), Parts::new(&mut self.normed), &self.heads);
        let order = block.substrates.input_order();
        self.pool.run(tiles, |thread, item| {
            let (first, rows) = range(item);
            let (start, len) = (first * d_model, rows * d_model);
            // SAFETY: a thread number is used by one call at a time, and tiles have rows of their own.
            let (thread, x, normed) = unsafe { (threads.of(thread), x.part(start, len), normed.part(start, len)) };
            let (mixed, out) = (&mut thread.rows[..len], &mut thread.out[..len]);
            for (row, mixed) in mixed.chunks_exact_mut(d_model).enumerate() {
                let (image, token) = ((first + row) / tokens, (first + row) % tokens);
                for (head, mixed) in mixed.chunks_exact_mut(head_dim).enumerate() {
                    mixed.copy_from_slice(
                        &heads[((image * num_heads + head) * tokens + token) * head_dim..][..head_dim],
                    );
                }
            }
            block.proj.forward(mixed, &mut thread.quantized, out).expect(LENGTHS);
            add_assign(isa, x, out);
            let Norm { gamma, beta } = &block.norm2;
            layer_norm(isa, x, gamma, beta, LAYER_NORM_EPS, out);
            for (natural, ordered) in out.chunks_exact(d_model).zip(normed.chunks_exact_mut(d_model)) {
                order.permute_row(natural, ordered);
            }
        });
    }

    /// `x += experts(normed)`.
    fn run_experts(&mut self, backbone: &Backbone, layer: usize, rows: &mut [Row<'_>]) {
        let tokens = backbone.config.num_tokens();
        let Self { sets, spans, moe, pool, normed, x, order, .. } = self;
        let experts = |set: usize| &rows[sets[set]].set.engine().layers[layer];
        let block = Moe { substrates: &backbone.blocks[layer].substrates, experts, spans };
        block.route(normed, pool, moe);
        block.forward(normed, x, pool, moe);
        for span in spans.iter() {
            for image in span.first / tokens..(span.first + span.tokens) / tokens {
                let row = &mut rows[order[image]];
                let len = tokens * row.set.config().top_k;
                if let Some(routing) = &mut row.routing {
                    let slot = span.first_slot + (image - span.first / tokens) * len;
                    routing[layer * len..][..len].copy_from_slice(&moe.ids()[slot..][..len]);
                }
            }
        }
    }

    /// `logits = head(mean over tokens of norm(x))`.
    fn run_head(&mut self, backbone: &Backbone, rows: &mut [Row<'_>]) {
        let (isa, d_model, tokens) = (backbone.isa, backbone.config.d_model, backbone.config.num_tokens());
        // SAFETY: outside of loops the session's number is its caller's, who has the session exclusively.
        let ThreadScratch { rows: normed, out: pooled, .. } = unsafe { self.threads.of(self.pool.own()) };
        let pooled = &mut pooled[..d_model];
        for (image, &row) in self.order.iter().enumerate() {
            pooled.fill(0.0);
            let x = &self.x[image * tokens * d_model..][..tokens * d_model];
            for x in x.chunks(TILE * d_model) {
                let normed = &mut normed[..x.len()];
                layer_norm(isa, x, &backbone.norm.gamma, &backbone.norm.beta, LAYER_NORM_EPS, normed);
                for token in normed.chunks_exact(d_model) {
                    add_assign(isa, pooled, token);
                }
            }
            for v in pooled.iter_mut() {
                *v /= tokens as f32;
            }
            let row = &mut rows[row];
            row.set.engine().head.matmul(pooled, row.logits).expect(LENGTHS);
        }
    }
}

fn check_rows(backbone: &Backbone, max_batch: usize, rows: &[Row<'_>]) -> Result<(), ModelError> {
    if rows.len() > max_batch {
        return Err(ModelError::BatchTooLarge { rows: rows.len(), max_batch });
    }
    let config = &backbone.config;
    for row in rows {
        let set = row.set;
        expect_len("pixels", row.pixels.len(), config.image_size.pow(2) * 3)?;
        expect_len("logits", row.logits.len(), set.labels().len())?;
        if let Some(routing) = &row.routing {
            let expected = config.num_layers * config.num_tokens() * set.config().top_k;
            expect_len("routing", routing.len(), expected)?;
        }
    }
    Ok(())
}
