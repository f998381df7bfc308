//! What one caller needs to run batches, and the forward pass itself.

use std::sync::Arc;

use super::attention::{AttentionScratch, Head};
use super::backbone::{Backbone, Block};
use super::crew::{Crew, Loops, Member};
use super::expert_set::ExpertSet;
use super::lines::Lines;
use super::moe::{LENGTHS, Moe, MoeScratch, MoeThread, Span};
use super::packed::{Quantized, TILE};
use super::parts::{Parts, PerThread};
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
    caller: Member,
    pass: Pass,
}

/// The scratch of one caller's forward passes, and the passes themselves.
#[derive(Debug)]
pub(super) struct Pass {
    backbone: Arc<Backbone>,
    max_batch: usize,
    /// The caller's row of each image: rows that go through the same experts are made neighbours, whichever
    /// set they are of.
    order: Vec<usize>,
    /// The batch's experts, each by the caller's row that named them first.
    sets: Vec<usize>,
    spans: Vec<Span>,
    stem: StemScratch,
    /// `[max_batch, tokens, d_model]`, the residual stream.
    x: Lines,
    /// `[max_batch, tokens, d_model]`, normed for the experts, in lane order.
    normed: Lines,
    /// `[max_batch, tokens, 3 d_model]`.
    qkv: Lines,
    /// `[max_batch, heads, tokens, head_dim]`.
    heads: Lines,
    moe: MoeScratch,
    stem_threads: Arc<PerThread<StemThread>>,
    threads: Arc<PerThread<ThreadScratch>>,
    /// Bytes of one thread's scratch.
    thread_bytes: usize,
    /// Threads whose scratch counts as this caller's: all of its helpers, or its own in a group.
    own_threads: usize,
}

/// Buffers of one thread.
#[derive(Debug)]
struct ThreadScratch {
    /// A tile's rows, `[TILE, d_model]`.
    rows: Lines,
    /// As `rows`, for what comes out.
    out: Lines,
    quantized: Quantized,
    /// What a head sees of the features, `[d_model]` at most.
    projected: Vec<f32>,
    attention: AttentionScratch,
}

impl ThreadScratch {
    fn new(backbone: &Backbone) -> Self {
        let config = backbone.config();
        // Without blocks nothing is normed, and only the pooled features of one image come out.
        let (rows, out) = if config.has_blocks() { (TILE, TILE) } else { (0, 1) };
        Self {
            rows: Lines::new(rows * config.d_model),
            out: Lines::new(out * config.d_model),
            quantized: Quantized::new(config.d_model),
            projected: vec![0.0; config.d_model],
            attention: AttentionScratch::new(block_tokens(config), config.head_dim()),
        }
    }

    fn bytes(&self) -> usize {
        let rows = (self.rows.capacity() + self.out.capacity() + self.projected.capacity()) * size_of::<f32>();
        let buffers = self.quantized.heap_bytes() + self.attention.heap_bytes();
        size_of::<Self>() + rows + buffers
    }
}

/// The scratch of every thread of a crew.
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
        let caller = Member::with_helpers(threads);
        let threads = caller.numbers();
        let pass = Pass::with(backbone, max_batch, threads, &Threads::new(backbone, threads));
        Self { caller, pass }
    }

    /// The backbone that it runs.
    pub fn backbone(&self) -> &Arc<Backbone> {
        &self.pass.backbone
    }

    /// Most rows of one [`Session::forward`].
    pub fn max_batch(&self) -> usize {
        self.pass.max_batch
    }

    /// Most bytes by which batches with sets like `experts` make the scratch of a new session grow, once: none for up to 64
    /// experts, two of which are chosen, without an `out` rotation.
    pub fn growth(backbone: &BackboneConfig, max_batch: usize, experts: &ExpertConfig) -> usize {
        MoeScratch::growth(backbone.d_model, backbone.d_ff, max_batch * block_tokens(backbone), experts)
    }

    /// Gives back what batches made it grow by.
    pub fn shrink(&mut self) {
        self.pass.shrink();
    }

    pub fn resident_bytes(&self) -> usize {
        size_of::<Member>() + self.pass.resident_bytes()
    }

    /// Classifies every row: writes its logits and, where asked for, which experts its patches went to.
    ///
    /// # Errors
    /// Nothing is computed when there are more rows than [`Session::max_batch`], a slice has the wrong length, or a
    /// set belongs to another backbone.
    pub fn forward(&mut self, rows: &mut [Row<'_>]) -> Result<(), ModelError> {
        self.pass.forward(&mut self.caller, rows)
    }

    /// What the stem alone makes of one image: normalised `pixels [image_size, image_size, 3]` to `tokens [tokens, d_model]`.
    ///
    /// # Errors
    /// When a slice has the wrong length.
    pub fn stem(&mut self, pixels: &[f32], tokens: &mut [f32]) -> Result<(), ModelError> {
        self.pass.stem(&mut self.caller, pixels, tokens)
    }
}

impl Pass {
    /// Those of a [`SessionGroup`](super::SessionGroup), by the number of the member whose passes they are. The scratch of
    /// each thread serves in all of them.
    pub(super) fn group(backbone: &Arc<Backbone>, max_batch: usize, crew: &Crew) -> Vec<Self> {
        let threads = Threads::new(backbone, crew.size());
        (0..crew.size()).map(|_| Self::with(backbone, max_batch, 1, &threads)).collect()
    }

    fn with(backbone: &Arc<Backbone>, max_batch: usize, own_threads: usize, threads: &Threads) -> Self {
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
            x: Lines::new(max_batch * config.num_tokens() * d_model),
            normed: Lines::new(max_batch * tokens * d_model),
            qkv: Lines::new(max_batch * tokens * 3 * d_model),
            heads: Lines::new(max_batch * tokens * d_model),
            moe: MoeScratch::sharing(d_model, d_ff, max_batch * tokens, moe_threads),
            stem_threads: Arc::clone(&threads.stem),
            threads: Arc::clone(&threads.rest),
            thread_bytes: threads.bytes,
            own_threads,
        }
    }

    pub(super) fn shrink(&mut self) {
        self.moe.shrink();
    }

    pub(super) fn resident_bytes(&self) -> usize {
        let floats = self.x.capacity() + self.normed.capacity() + self.qkv.capacity() + self.heads.capacity();
        let buffers = floats * size_of::<f32>()
            + self.stem.heap_bytes()
            + (self.order.capacity() + self.sets.capacity()) * size_of::<usize>()
            + self.spans.capacity() * size_of::<Span>()
            + self.moe.heap_bytes();
        size_of::<Self>() + buffers + self.own_threads * self.thread_bytes
    }

    /// [`Session::forward`] on the threads of `loops`, whose numbers are those of this scratch.
    pub(super) fn forward(&mut self, loops: &mut dyn Loops, rows: &mut [Row<'_>]) -> Result<(), ModelError> {
        if let Some(row) = rows.iter().find(|row| row.set.backbone_digest() != self.backbone.digest()) {
            return Err(ModelError::ForeignSet { expected: row.set.backbone_digest(), got: self.backbone.digest() });
        }
        let backbone = &*Arc::clone(&self.backbone);
        check_rows(backbone, self.max_batch, rows)?;
        self.arrange(backbone, loops.threads(), rows);
        self.run_stem(backbone, loops, rows);
        for (layer, block) in backbone.blocks.iter().enumerate() {
            self.run_attention(backbone, block, loops, rows.len());
            self.run_experts(backbone, layer, loops, rows);
        }
        self.run_head(backbone, loops, rows);
        Ok(())
    }

    /// Makes rows of one set neighbours, and notes which tokens go through which set.
    fn arrange(&mut self, backbone: &Backbone, threads: usize, rows: &[Row<'_>]) {
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
        Moe { substrates: &block.substrates, experts, spans }.plan(threads, &mut self.moe);
    }

    fn stem(&mut self, loops: &mut dyn Loops, pixels: &[f32], tokens: &mut [f32]) -> Result<(), ModelError> {
        let config = self.backbone.config();
        expect_len("pixels", pixels.len(), config.image_size.pow(2) * 3)?;
        expect_len("tokens", tokens.len(), config.num_tokens() * config.d_model)?;
        self.backbone.stem.forward(|_| pixels, loops, (&mut self.stem, &self.stem_threads), (1, tokens));
        Ok(())
    }

    fn run_stem(&mut self, backbone: &Backbone, loops: &mut dyn Loops, rows: &[Row<'_>]) {
        let image_len = backbone.config().num_tokens() * backbone.config().d_model;
        let Self { order, stem, stem_threads, x, .. } = self;
        let x = &mut x[..rows.len() * image_len];
        backbone.stem.forward(|image| rows[order[image]].pixels, loops, (stem, stem_threads), (rows.len(), x));
        if backbone.config().has_blocks() {
            x.chunks_exact_mut(image_len).for_each(|x| add_assign(backbone.isa(), x, &backbone.pos_embed));
        }
    }

    /// `x += proj(attention(qkv(norm1(x))))`, then `normed = norm2(x)`.
    fn run_attention(&mut self, backbone: &Backbone, block: &Block, loops: &mut dyn Loops, images: usize) {
        let BackboneConfig { d_model, num_heads, .. } = *backbone.config();
        let (isa, tokens, head_dim) = (backbone.isa(), backbone.config().num_tokens(), backbone.config().head_dim());
        let all = images * tokens;
        let tile = all.div_ceil(loops.threads()).clamp(8, TILE);
        let tiles = all.div_ceil(tile);
        let range = |item: usize| (item * tile, tile.min(all - item * tile));
        let threads = &*self.threads;

        let (x, qkv) = (&self.x, Parts::new(&mut self.qkv));
        loops.run(tiles, &|thread, item| {
            let (first, rows) = range(item);
            // SAFETY: a thread number is used by one call at a time, and tiles have rows of their own.
            let (thread, qkv) = unsafe { (threads.of(thread), qkv.part(first * 3 * d_model, rows * 3 * d_model)) };
            let normed = &mut thread.rows[..rows * d_model];
            let Norm { gamma, beta } = &block.norm1;
            layer_norm(isa, &x[first * d_model..][..rows * d_model], gamma, beta, LAYER_NORM_EPS, normed);
            block.qkv.forward(normed, &mut thread.quantized, qkv).expect(LENGTHS);
        });

        let (qkv, heads) = (&self.qkv, Parts::new(&mut self.heads));
        loops.run(images * num_heads, &|thread, item| {
            let (image, head) = (item / num_heads, item % num_heads);
            // SAFETY: a thread number is used by one call at a time, and heads have outputs of their own.
            let (thread, out) =
                unsafe { (threads.of(thread), heads.part(item * tokens * head_dim, tokens * head_dim)) };
            let qkv = &qkv[image * tokens * 3 * d_model..][..tokens * 3 * d_model];
            Head { isa, qkv, tokens, d_model, head_dim, head }.forward(&mut thread.attention, out);
        });

        let (x, normed, heads) = (Parts::new(&mut self.x), Parts::new(&mut self.normed), &self.heads);
        let order = block.substrates.input_order();
        loops.run(tiles, &|thread, item| {
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
                order.permute_row(isa, natural, ordered);
            }
        });
    }

    /// `x += experts(normed)`.
    fn run_experts(&mut self, backbone: &Backbone, layer: usize, loops: &mut dyn Loops, rows: &mut [Row<'_>]) {
        let tokens = backbone.config().num_tokens();
        let Self { sets, spans, moe, normed, x, order, .. } = self;
        let experts = |set: usize| &rows[sets[set]].set.layers[layer];
        let block = Moe { substrates: &backbone.blocks[layer].substrates, experts, spans };
        block.route(normed, loops, moe);
        block.forward(normed, x, loops, moe);
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
    fn run_head(&mut self, backbone: &Backbone, loops: &mut dyn Loops, rows: &mut [Row<'_>]) {
        let (isa, d_model, tokens) = (backbone.isa(), backbone.config().d_model, backbone.config().num_tokens());
        // SAFETY: outside of loops the caller's number is its own, and `loops` is borrowed exclusively.
        let ThreadScratch { rows: normed, out: pooled, quantized, projected, .. } =
            unsafe { self.threads.of(loops.own()) };
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
            let seen = match row.set.projection {
                None => &*pooled,
                Some(projection) => {
                    let projected = &mut projected[..projection.features()];
                    projection.apply(pooled, projected);
                    &*projected
                }
            };
            row.set.head.forward(seen, quantized, row.logits).expect(LENGTHS);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::artifact::Digest;
    use crate::config::ViTConfig;
    use crate::image::Preprocess;
    use crate::kernels::Isa;
    use crate::random::SplitMix64;
    use crate::random_weights::{backbone_weights, expert_set_weights};

    /// Three threads at their worst: items in any order, each by any thread.
    struct Anyhow(SplitMix64);

    // SAFETY: there is one thread, so a number is used by one call at a time, and by nobody else.
    unsafe impl Loops for Anyhow {
        fn own(&self) -> usize {
            1
        }

        fn numbers(&self) -> usize {
            3
        }

        fn threads(&self) -> usize {
            3
        }

        fn run(&mut self, items: usize, body: &(dyn Fn(usize, usize) + Sync)) {
            let mut left: Vec<usize> = (0..items).collect();
            while !left.is_empty() {
                let item = left.swap_remove(self.0.bits() as usize % left.len());
                body(self.0.bits() as usize % 3, item);
            }
        }
    }

    #[test]
    fn no_answer_depends_on_which_thread_runs_an_item_and_when() {
        let config = ViTConfig::preset("tiny").unwrap();
        let mut random = SplitMix64::at(7, 0);
        let weights = backbone_weights(&config.backbone, &mut random);
        let set = expert_set_weights(&config, &mut random);
        let digest = Digest::of("b", &[]);
        for isa in Isa::available() {
            let backbone = Backbone::from_weights("b".into(), &weights, Preprocess::default(), digest, isa).unwrap();
            let backbone = Arc::new(backbone);
            let set = ExpertSet::from_weights("s".into(), set.clone(), digest, &backbone).unwrap();
            let pixels = random.uniforms(2 * backbone.pixels_len(), 1.0);
            let logits = |forward: &mut dyn FnMut(&mut [Row<'_>])| {
                let mut logits = vec![0.0; 2 * set.labels().len()];
                let images = logits.chunks_exact_mut(set.labels().len()).zip(pixels.chunks_exact(pixels.len() / 2));
                let row = |(logits, pixels)| Row { set: &set, pixels, logits, routing: None, features: None };
                forward(&mut images.map(row).collect::<Vec<_>>());
                logits
            };
            let alone = logits(&mut |rows| Session::new(&backbone, 2, 1).forward(rows).unwrap());
            let mut pass = Pass::with(&backbone, 2, 3, &Threads::new(&backbone, 3));
            for seed in 0..3 {
                let mut loops = Anyhow(SplitMix64::at(seed, 0));
                assert_eq!(logits(&mut |rows| pass.forward(&mut loops, rows).unwrap()), alone, "{isa}, seed {seed}");
            }
        }
    }
}
