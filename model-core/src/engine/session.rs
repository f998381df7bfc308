//! What one caller needs to run batches, and the forward pass itself.

use std::sync::Arc;

use super::attention::{AttentionScratch, Head};
use super::backbone::{Backbone, Block};
use super::expert_set::ExpertSet;
use super::moe::{LENGTHS, Moe, MoeScratch, MoeThread, Span};
use super::packed::{Quantized, TILE};
use super::pool::{Parts, PerThread, Pool, Team};
use super::stem::{StemScratch, StemThread};
use crate::config::{BackboneConfig, ExpertConfig};
use crate::error::{ModelError, expect_len};
use crate::kernels::combine::add_assign;
use crate::kernels::norm::layer_norm;
use crate::weights::{LAYER_NORM_EPS, Norm};

/// One image of a batch: what goes in, and where the answer goes.
#[derive(Debug)]
pub struct Row<'a> {
    /// The expert set that classifies it.
    pub set: &'a ExpertSet,
    /// `[image_size, image_size, 3]`, normalised.
    pub pixels: &'a [f32],
    /// One per label of the set.
    pub logits: &'a mut [f32],
    /// The chosen experts, best first, `[num_layers, tokens, top_k]`, where the caller wants them.
    pub routing: Option<&'a mut [u16]>,
    /// What the head sees, `[d_model]`, where the caller wants it.
    pub features: Option<&'a mut [f32]>,
}

/// Everything one caller needs to run batches: scratch for `max_batch` images and, above one, helper threads.
///
/// All scratch is allocated here; a forward allocates nothing, except the first time it meets an expert set whose
/// `top_k` exceeds what the scratch was made for.
#[derive(Debug)]
pub struct Session {
    backbone: Arc<Backbone>,
    max_batch: usize,
    pool: Pool,
    /// The caller's row of each image: rows that go through the same experts are made neighbours, whichever
    /// set they are of.
    order: Vec<usize>,
    /// The batch's experts, each by the caller's row that named them first.
    sets: Vec<usize>,
    spans: Vec<Span>,
    stem: StemScratch,
    /// `[max_batch, tokens, d_model]`, the residual stream.
    x: Vec<f32>,
    /// `[max_batch, tokens, d_model]`, normed for the experts, in lane order.
    normed: Vec<f32>,
    /// `[max_batch, tokens, 3 d_model]`.
    qkv: Vec<f32>,
    /// `[max_batch, heads, tokens, head_dim]`.
    heads: Vec<f32>,
    moe: MoeScratch,
    stem_threads: Arc<PerThread<StemThread>>,
    threads: Arc<PerThread<ThreadScratch>>,
    /// Bytes of one thread's scratch.
    thread_bytes: usize,
    /// Threads whose scratch counts as this session's: all of its own, or one of a group's.
    own_threads: usize,
}

/// Buffers of one thread.
#[derive(Debug)]
struct ThreadScratch {
    /// A tile's rows, `[TILE, d_model]`.
    rows: Vec<f32>,
    /// As `rows`, for what comes out.
    out: Vec<f32>,
    quantized: Quantized,
    attention: AttentionScratch,
}

impl ThreadScratch {
    fn new(backbone: &Backbone) -> Self {
        let config = backbone.config();
        // Without blocks nothing is normed, and only the pooled features of one image come out.
        let (rows, out) = if config.has_blocks() { (TILE, TILE) } else { (0, 1) };
        Self {
            rows: vec![0.0; rows * config.d_model],
            out: vec![0.0; out * config.d_model],
            quantized: Quantized::new(config.d_model),
            attention: AttentionScratch::new(block_tokens(config), config.head_dim()),
        }
    }

    fn bytes(&self) -> usize {
        let rows = (self.rows.capacity() + self.out.capacity()) * size_of::<f32>();
        let buffers = self.quantized.heap_bytes() + self.attention.heap_bytes();
        size_of::<Self>() + rows + buffers
    }
}

/// The scratch of every thread of a pool or of a group of pools.
struct Threads {
    stem: Arc<PerThread<StemThread>>,
    rest: Arc<PerThread<ThreadScratch>>,
    moe: Arc<PerThread<MoeThread>>,
    bytes: usize,
}

impl Threads {
    fn new(backbone: &Backbone, count: usize) -> Self {
        let config = backbone.config();
        // Without blocks nobody goes through experts.
        let (d_model, d_ff) = if config.has_blocks() { (config.d_model, config.d_ff) } else { (1, 1) };
        let (rest, moe) = (|| ThreadScratch::new(backbone), || MoeThread::new(d_model, d_ff));
        let stem = || StemThread::new(&backbone.stem);
        let bytes = size_of::<StemThread>() + stem().heap_bytes() + rest().bytes() + moe().bytes();
        let stem = Arc::new(PerThread::new(count, stem));
        Self { stem, rest: Arc::new(PerThread::new(count, rest)), moe: Arc::new(PerThread::new(count, moe)), bytes }
    }
}

impl Session {
    /// Scratch for batches of up to `max_batch` images on `backbone`, computed by `threads` threads: the caller's and
    /// `threads - 1` helpers that live as long as the session. Zeros count as one.
    pub fn new(backbone: &Arc<Backbone>, max_batch: usize, threads: usize) -> Self {
        let pool = Pool::new(threads);
        let own_threads = pool.seats();
        Self::with(backbone, max_batch, pool, own_threads, &Threads::new(backbone, own_threads))
    }

    /// The sessions of a [`SessionGroup`](super::SessionGroup). The scratch of each thread serves in all of them.
    pub(super) fn group(backbone: &Arc<Backbone>, max_batch: usize, count: usize) -> Vec<Self> {
        let threads = Threads::new(backbone, count);
        Pool::group(count).into_iter().map(|pool| Self::with(backbone, max_batch, pool, 1, &threads)).collect()
    }

    fn with(backbone: &Arc<Backbone>, max_batch: usize, pool: Pool, own_threads: usize, threads: &Threads) -> Self {
        let (config, max_batch) = (backbone.config(), max_batch.max(1));
        let (d_model, d_ff, tokens) = (config.d_model, config.d_ff, block_tokens(config));
        let moe_threads = Arc::clone(&threads.moe);
        Self {
            backbone: Arc::clone(backbone),
            max_batch,
            order: Vec::with_capacity(max_batch),
            sets: Vec::with_capacity(max_batch),
            spans: Vec::with_capacity(max_batch),
            stem: StemScratch::new(&backbone.stem, config, max_batch),
            x: vec![0.0; max_batch * config.num_tokens() * d_model],
            normed: vec![0.0; max_batch * tokens * d_model],
            qkv: vec![0.0; max_batch * tokens * 3 * d_model],
            heads: vec![0.0; max_batch * tokens * d_model],
            moe: MoeScratch::sharing(d_model, d_ff, max_batch * tokens, moe_threads),
            stem_threads: Arc::clone(&threads.stem),
            threads: Arc::clone(&threads.rest),
            thread_bytes: threads.bytes,
            own_threads,
            pool,
        }
    }

    /// Where others of its group may help.
    pub(super) fn team(&self) -> Team {
        self.pool.team()
    }

    /// Shares the forward passes of another session of its group for as long as helpers are welcome there and `leave`,
    /// which is asked every few microseconds, says no.
    pub(super) fn help(&mut self, team: &Team, leave: impl Fn() -> bool) {
        self.pool.help(team, leave);
    }

    /// The backbone that it runs.
    pub fn backbone(&self) -> &Arc<Backbone> {
        &self.backbone
    }

    /// Most rows of one [`Session::forward`].
    pub fn max_batch(&self) -> usize {
        self.max_batch
    }

    /// Most bytes by which batches with sets like `experts` make the scratch of a new session grow, once: none for up to 64
    /// experts, two of which are chosen, without an `out` rotation.
    pub fn growth(backbone: &BackboneConfig, max_batch: usize, experts: &ExpertConfig) -> usize {
        MoeScratch::growth(backbone.d_model, backbone.d_ff, max_batch * block_tokens(backbone), experts)
    }

    /// Gives back what batches made it grow by.
    pub fn shrink(&mut self) {
        self.moe.shrink();
    }

    pub fn resident_bytes(&self) -> usize {
        let floats = self.x.capacity() + self.normed.capacity() + self.qkv.capacity() + self.heads.capacity();
        let buffers = floats * size_of::<f32>()
            + self.stem.heap_bytes()
            + (self.order.capacity() + self.sets.capacity()) * size_of::<usize>()
            + self.spans.capacity() * size_of::<Span>()
            + self.moe.heap_bytes();
        size_of::<Self>() + buffers + self.own_threads * self.thread_bytes
    }

    /// Classifies every row: writes its logits and, where asked for, which experts its patches went to.
    ///
    /// # Errors
    /// Nothing is computed when there are more rows than [`Session::max_batch`], a slice has the wrong length, or a
    /// set belongs to another backbone.
    pub fn forward(&mut self, rows: &mut [Row<'_>]) -> Result<(), ModelError> {
        if let Some(row) = rows.iter().find(|row| row.set.backbone_digest() != self.backbone.digest()) {
            return Err(ModelError::ForeignSet { expected: row.set.backbone_digest(), got: self.backbone.digest() });
        }
        let backbone = &*Arc::clone(&self.backbone);
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
        let tokens = backbone.config().num_tokens();
        let Self { order, sets, spans, .. } = self;
        order.clear();
        sets.clear();
        spans.clear();
        let mut first_slot = 0;
        for (i, row) in rows.iter().enumerate() {
            let same = |other: usize| Arc::ptr_eq(&rows[other].set.layers, &row.set.layers);
            if sets.iter().any(|&set| same(set)) {
                continue;
            }
            let first = order.len();
            order.extend((i..rows.len()).filter(|&j| same(j)));
            let span_tokens = (order.len() - first) * tokens;
            spans.push(Span { set: sets.len(), first: first * tokens, tokens: span_tokens, first_slot });
            first_slot += span_tokens * row.set.config().top_k;
            sets.push(i);
        }
        let Some(block) = backbone.blocks.first() else { return };
        let experts = |set: usize| &rows[sets[set]].set.layers[0];
        Moe { substrates: &block.substrates, experts, spans }.plan(self.pool.threads(), &mut self.moe);
    }

    fn run_stem(&mut self, backbone: &Backbone, rows: &[Row<'_>]) {
        let image_len = backbone.config().num_tokens() * backbone.config().d_model;
        let Self { order, stem, stem_threads, pool, x, .. } = self;
        let x = &mut x[..rows.len() * image_len];
        backbone.stem.forward(|image| rows[order[image]].pixels, pool, (stem, stem_threads), (rows.len(), x));
        if backbone.config().has_blocks() {
            x.chunks_exact_mut(image_len).for_each(|x| add_assign(backbone.isa(), x, &backbone.pos_embed));
        }
    }

    /// `x += proj(attention(qkv(norm1(x))))`, then `normed = norm2(x)`.
    fn run_attention(&mut self, backbone: &Backbone, block: &Block, images: usize) {
        let BackboneConfig { d_model, num_heads, .. } = *backbone.config();
        let (isa, tokens, head_dim) = (backbone.isa(), backbone.config().num_tokens(), backbone.config().head_dim());
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
        let tokens = backbone.config().num_tokens();
        let Self { sets, spans, moe, pool, normed, x, order, .. } = self;
        let experts = |set: usize| &rows[sets[set]].set.layers[layer];
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
        let (isa, d_model, tokens) = (backbone.isa(), backbone.config().d_model, backbone.config().num_tokens());
        // SAFETY: outside of loops the session's number is its caller's, who has the session exclusively.
        let ThreadScratch { rows: normed, out: pooled, quantized, .. } = unsafe { self.threads.of(self.pool.own()) };
        let pooled = &mut pooled[..d_model];
        for (image, &row) in self.order.iter().enumerate() {
            pooled.fill(0.0);
            let x = &self.x[image * tokens * d_model..][..tokens * d_model];
            for x in x.chunks(TILE * d_model) {
                let Norm { gamma, beta } = &backbone.norm;
                let tokens = match backbone.config().has_blocks() {
                    true => {
                        let normed = &mut normed[..x.len()];
                        layer_norm(isa, x, gamma, beta, LAYER_NORM_EPS, normed);
                        &*normed
                    }
                    false => x,
                };
                for token in tokens.chunks_exact(d_model) {
                    add_assign(isa, pooled, token);
                }
            }
            for v in pooled.iter_mut() {
                *v /= tokens as f32;
            }
            let row = &mut rows[row];
            if let Some(features) = &mut row.features {
                features.copy_from_slice(pooled);
            }
            row.set.head.forward(pooled, quantized, row.logits).expect(LENGTHS);
            row.logits.iter_mut().for_each(|logit| *logit /= row.set.temperature);
        }
    }
}

/// Tokens of an image that go through blocks.
fn block_tokens(config: &BackboneConfig) -> usize {
    if config.has_blocks() { config.num_tokens() } else { 0 }
}

fn check_rows(backbone: &Backbone, max_batch: usize, rows: &[Row<'_>]) -> Result<(), ModelError> {
    if rows.len() > max_batch {
        return Err(ModelError::BatchTooLarge { rows: rows.len(), max_batch });
    }
    let config = backbone.config();
    for row in rows {
        let set = row.set;
        expect_len("pixels", row.pixels.len(), config.image_size.pow(2) * 3)?;
        expect_len("logits", row.logits.len(), set.labels().len())?;
        if let Some(routing) = &row.routing {
            let expected = config.num_layers * config.num_tokens() * set.config().top_k;
            expect_len("routing", routing.len(), expected)?;
        }
        if let Some(features) = &row.features {
            expect_len("features", features.len(), config.d_model)?;
        }
    }
    Ok(())
}
