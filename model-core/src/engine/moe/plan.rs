//! Which rows a layer computes and in what order: spans of tokens are cut into tiles, the rows of a chunk of tiles are
//! sorted by expert, and the experts' rows are gathered into tiles again.

use std::ops::Range;
use std::sync::Arc;

use super::experts::ExpertLayer;
use super::thread::MoeThread;
use crate::config::ExpertConfig;
use crate::engine::lines::Lines;
use crate::engine::packed::TILE;
use crate::engine::parts::PerThread;

/// Consecutive tokens that go through the same expert set.
#[derive(Debug, Clone, Copy)]
pub(in crate::engine) struct Span {
    /// Which of the batch's expert sets.
    pub(in crate::engine) set: usize,
    pub(in crate::engine) first: usize,
    pub(in crate::engine) tokens: usize,
    /// First of the `tokens * top_k` slots, one per (token, choice).
    pub(in crate::engine) first_slot: usize,
}

/// At most [`TILE`] tokens of one span, worked on by one thread.
#[derive(Debug, Clone, Copy)]
pub(super) struct TokenTile {
    pub(super) set: usize,
    pub(super) first: usize,
    pub(super) tokens: usize,
    pub(super) first_slot: usize,
    pub(super) top_k: usize,
}

/// The rows that one expert of one set gets; long ones are cut at tiles.
#[derive(Debug, Clone, Copy)]
pub(super) struct Segment {
    pub(super) set: usize,
    pub(super) expert: usize,
    /// First of its rows, and how many.
    pub(super) first: usize,
    pub(super) rows: usize,
}

/// Segments worked on by one thread with one product: at most [`TILE`] rows of sets that agree on
/// having an `out` rotation.
#[derive(Debug, Clone, Copy)]
pub(super) struct RowTile {
    pub(super) first_segment: usize,
    pub(super) segments: usize,
    pub(super) first: usize,
    pub(super) rows: usize,
}

/// Most (token, choice) rows whose hidden activations are held at a time, unless one token alone has more: 4
/// MB at `d_ff` 1024.
pub(super) const CHUNK_ROWS: usize = 1024;

/// Experts that the counting sort has room for from the start.
const INITIAL_COUNTS: usize = 64;

/// Buffers of the layer, shared by all layers of a session.
#[derive(Debug)]
pub(in crate::engine) struct MoeScratch {
    pub(super) d_model: usize,
    pub(super) d_ff: usize,
    /// Tokens that there is room for without growing.
    usual_tokens: usize,
    /// Set by [`MoeScratch::plan`].
    pub(super) tiles: Vec<TokenTile>,
    /// Chosen experts and their weights, one per slot.
    pub(super) ids: Vec<u16>,
    pub(super) weights: Vec<f32>,
    /// Where a slot's row went; for the slots of the current chunk.
    pub(super) row_of_slot: Vec<u32>,
    /// The token of each row.
    pub(super) token_of_row: Vec<u32>,
    /// For counting sort, one per expert.
    pub(super) counts: Vec<u32>,
    pub(super) segments: Vec<Segment>,
    pub(super) row_tiles: Vec<RowTile>,
    /// `[rows, d_ff]` hidden activations.
    pub(super) hidden: Lines,
    /// `[rows, d_model]` outputs of experts with an `out` rotation, in lane order.
    pub(super) outputs: Vec<f32>,
    pub(super) threads: Arc<PerThread<MoeThread>>,
}

/// Lengthens a buffer that is only ever as long as the largest batch needed.
fn grow<T: Clone + Default>(buffer: &mut Vec<T>, len: usize) {
    if buffer.len() < len {
        buffer.reserve_exact(len - buffer.len());
        buffer.resize(len, T::default());
    }
}

/// Cuts a buffer down to the length that it was made with.
fn shrink<T>(buffer: &mut Vec<T>, len: usize) {
    buffer.truncate(len);
    buffer.shrink_to(len);
}

impl MoeScratch {
    /// Room for `tokens` tokens with two experts each, and so many threads; more experts grow it once.
    pub(in crate::engine) fn new(d_model: usize, d_ff: usize, tokens: usize, threads: usize) -> Self {
        let buffers = PerThread::new(threads, || MoeThread::new(d_model, d_ff));
        Self::sharing(d_model, d_ff, tokens, Arc::new(buffers))
    }

    /// As [`MoeScratch::new`], with threads' buffers that belong to a crew.
    pub(in crate::engine) fn sharing(
        d_model: usize,
        d_ff: usize,
        tokens: usize,
        buffers: Arc<PerThread<MoeThread>>,
    ) -> Self {
        let slots = 2 * tokens;
        let rows = slots.min(CHUNK_ROWS);
        Self {
            d_model,
            d_ff,
            usual_tokens: tokens,
            tiles: Vec::with_capacity(tokens),
            ids: vec![0; slots],
            weights: vec![0.0; slots],
            row_of_slot: vec![0; rows],
            token_of_row: vec![0; rows],
            counts: vec![0; INITIAL_COUNTS],
            segments: Vec::with_capacity(rows),
            row_tiles: Vec::with_capacity(rows),
            hidden: Lines::new(rows * d_ff),
            outputs: Vec::new(),
            threads: buffers,
        }
    }

    /// Most bytes by which batches of up to `tokens` tokens of sets like `config` grow what [`MoeScratch::sharing`] made.
    pub(in crate::engine) fn growth(d_model: usize, d_ff: usize, tokens: usize, config: &ExpertConfig) -> usize {
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

    /// Gives back what batches made it grow by.
    pub(in crate::engine) fn shrink(&mut self) {
        let slots = 2 * self.usual_tokens;
        let rows = slots.min(CHUNK_ROWS);
        shrink(&mut self.ids, slots);
        shrink(&mut self.weights, slots);
        shrink(&mut self.row_of_slot, rows);
        shrink(&mut self.token_of_row, rows);
        shrink(&mut self.counts, INITIAL_COUNTS);
        shrink(&mut self.segments, rows);
        shrink(&mut self.row_tiles, rows);
        self.hidden.shrink(rows * self.d_ff);
        shrink(&mut self.outputs, 0);
    }

    /// Bytes on the heap, without those of threads.
    pub(in crate::engine) fn heap_bytes(&self) -> usize {
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

    /// The experts of each slot, as the last `Moe::route` chose them.
    pub(in crate::engine) fn ids(&self) -> &[u16] {
        &self.ids
    }

    /// The weights of each slot.
    pub(in crate::engine) fn weights(&self) -> &[f32] {
        &self.weights
    }

    /// Cuts `spans` into tiles, the same for every layer of a forward; `experts` are a layer's of the set with that index.
    ///
    /// # Panics
    /// When the spans overlap or leave gaps.
    pub(super) fn plan<'a>(&mut self, spans: &[Span], threads: usize, experts: &impl Fn(usize) -> &'a ExpertLayer) {
        let all: usize = spans.iter().map(|span| span.tokens).sum();
        let share = all.div_ceil(threads).clamp(8, TILE);
        self.tiles.clear();
        let (mut tokens, mut slots, mut most_experts) = (0, 0, 0);
        for span in spans {
            let layer = experts(span.set);
            // Tiles are worked on at the same time, each with its part of the buffers.
            assert_eq!((span.first, span.first_slot), (tokens, slots), "spans lie one behind the other");
            let most = share.min(CHUNK_ROWS / layer.top_k).max(1);
            for offset in (0..span.tokens).step_by(most) {
                self.tiles.push(TokenTile {
                    set: span.set,
                    first: span.first + offset,
                    tokens: most.min(span.tokens - offset),
                    first_slot: span.first_slot + offset * layer.top_k,
                    top_k: layer.top_k,
                });
            }
            tokens += span.tokens;
            slots += span.tokens * layer.top_k;
            most_experts = most_experts.max(layer.num_experts);
        }
        grow(&mut self.ids, slots);
        grow(&mut self.weights, slots);
        grow(&mut self.counts, most_experts);
    }

    /// Sorts the rows of a chunk by set and expert, and cuts them into tiles.
    pub(super) fn assign<'a>(
        &mut self,
        tiles: Range<usize>,
        slots: usize,
        threads: usize,
        experts: &impl Fn(usize) -> &'a ExpertLayer,
    ) {
        grow(&mut self.row_of_slot, slots);
        grow(&mut self.token_of_row, slots);
        self.hidden.grow(slots * self.d_ff);
        self.segments.clear();
        self.segments.reserve_exact(slots);
        let base_slot = self.tiles[tiles.start].first_slot;
        let most = slots.div_ceil(threads).clamp(16, TILE);
        let (mut first_row, mut at) = (0, tiles.start);
        while at < tiles.end {
            // Tiles of one set are neighbours.
            let set = self.tiles[at].set;
            let group = at..tiles.end.min(at + self.tiles[at..tiles.end].iter().take_while(|t| t.set == set).count());
            let layer = experts(set);
            let counts = &mut self.counts[..layer.num_experts];
            counts.fill(0);
            let slots_of = |t: &TokenTile| t.first_slot..t.first_slot + t.tokens * layer.top_k;
            let begin = slots_of(&self.tiles[group.start]).start;
            let end = slots_of(&self.tiles[group.end - 1]).end;
            let first_token = self.tiles[group.start].first;
            for &id in &self.ids[begin..end] {
                counts[usize::from(id)] += 1;
            }
            for (expert, count) in counts.iter_mut().enumerate() {
                let rows = *count as usize;
                *count = first_row as u32;
                for offset in (0..rows).step_by(most) {
                    let rows = most.min(rows - offset);
                    self.segments.push(Segment { set, expert, first: first_row + offset, rows });
                }
                first_row += rows;
            }
            for (i, &id) in self.ids[begin..end].iter().enumerate() {
                let row = &mut counts[usize::from(id)];
                self.row_of_slot[begin + i - base_slot] = *row;
                self.token_of_row[*row as usize] = (first_token + i / layer.top_k) as u32;
                *row += 1;
            }
            at = group.end;
        }
        self.cut_row_tiles(most, experts);
    }

    fn cut_row_tiles<'a>(&mut self, most: usize, experts: &impl Fn(usize) -> &'a ExpertLayer) {
        self.row_tiles.clear();
        self.row_tiles.reserve_exact(self.segments.len());
        let rotates_out = |segment: &Segment| experts(segment.set).rotation_out.stages() > 0;
        for (i, segment) in self.segments.iter().enumerate() {
            match self.row_tiles.last_mut() {
                Some(tile)
                    if tile.rows + segment.rows <= most
                        && rotates_out(&self.segments[tile.first_segment]) == rotates_out(segment) =>
                {
                    tile.segments += 1;
                    tile.rows += segment.rows;
                }
                _ => self.row_tiles.push(RowTile {
                    first_segment: i,
                    segments: 1,
                    first: segment.first,
                    rows: segment.rows,
                }),
            }
        }
        if self.segments.iter().any(rotates_out) {
            let rows = self.segments.last().map_or(0, |last| last.first + last.rows);
            grow(&mut self.outputs, rows * self.d_model);
        }
    }
}
