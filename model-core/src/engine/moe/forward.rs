//! One layer at work on a batch.

use std::ops::Range;

use super::experts::{ExpertLayer, LENGTHS, Substrates};
use super::plan::{CHUNK_ROWS, MoeScratch, Span};
use super::thread::{LOGITS, MoeThread};
use crate::engine::crew::Loops;
use crate::engine::parts::Parts;
use crate::kernels::combine::{add_assign, weighted_sum};
use crate::kernels::rotation::{Then, rotate_by};
use crate::kernels::router::choose;

/// One layer at work on a batch.
pub(in crate::engine) struct Moe<'a, F> {
    pub(in crate::engine) substrates: &'a Substrates,
    /// The sets' half: the layer's experts of the set with that index.
    pub(in crate::engine) experts: F,
    /// How tokens belong to sets, in order and without gaps.
    pub(in crate::engine) spans: &'a [Span],
}

impl<'a, F: Fn(usize) -> &'a ExpertLayer + Sync> Moe<'a, F> {
    /// [`MoeScratch::plan`] for the spans. Call it before [`Moe::route`] and [`Moe::forward`] whenever the spans changed.
    pub(in crate::engine) fn plan(&self, threads: usize, scratch: &mut MoeScratch) {
        scratch.plan(self.spans, threads, &self.experts);
    }

    /// Chooses the experts of every token. `x` is `[tokens, d_model]` in lane order.
    pub(in crate::engine) fn route(&self, x: &[f32], loops: &mut dyn Loops, scratch: &mut MoeScratch) {
        let (d_model, isa) = (scratch.d_model, self.substrates.isa);
        let (ids, weights) = (Parts::new(&mut scratch.ids), Parts::new(&mut scratch.weights));
        let (threads, tiles) = (&*scratch.threads, &scratch.tiles);
        loops.run(tiles.len(), &|thread, item| {
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
                    choose(isa, logits, ids, weights);
                }
            }
        });
    }

    /// `residual += experts(x)` with the choices of [`Moe::route`]; `x` `[tokens, d_model]` is in lane order,
    /// `residual` `[tokens, d_model]` is not.
    pub(in crate::engine) fn forward(
        &self,
        x: &[f32],
        residual: &mut [f32],
        loops: &mut dyn Loops,
        scratch: &mut MoeScratch,
    ) {
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
            scratch.assign(first..end, slots, loops.threads(), &self.experts);
            self.run_rows(x, loops, scratch);
            self.run_tokens(first..end, residual, loops, scratch);
            first = end;
        }
    }

    /// From tokens to the hidden activations of their experts, and with an `out` rotation on to the experts' outputs.
    fn run_rows(&self, x: &[f32], loops: &mut dyn Loops, scratch: &mut MoeScratch) {
        let Substrates { isa, model, up, down, .. } = self.substrates;
        let (d_model, d_ff) = (scratch.d_model, scratch.d_ff);
        let MoeScratch { row_tiles, segments, token_of_row, hidden, outputs, threads, .. } = scratch;
        let (hidden, outputs) = (Parts::new(hidden), Parts::new(outputs));
        loops.run(row_tiles.len(), &|thread, item| {
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
                let angles = &(self.experts)(segment.set).rotation_in;
                rotate_by(*isa, angles, segment.expert, Then::Nothing, coefficients, rows);
            }
            let (codes, steps) = quantized.rows(*isa, rows, d_model).expect(LENGTHS);
            up.matmul(codes, steps, hidden).expect(LENGTHS);
            for segment in segments {
                let rows = &mut hidden[(segment.first - first) * d_ff..][..segment.rows * d_ff];
                let angles = &(self.experts)(segment.set).rotation_hidden;
                rotate_by(*isa, angles, segment.expert, Then::Gelu, coefficients, rows);
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
                model.permute_row(*isa, natural, ordered);
            }
            for segment in segments {
                let rows = &mut outputs[(segment.first - first) * d_model..][..segment.rows * d_model];
                let angles = &(self.experts)(segment.set).rotation_out;
                rotate_by(*isa, angles, segment.expert, Then::Nothing, coefficients, rows);
            }
        });
    }

    /// The weighted sums, and what remains of `down`.
    fn run_tokens(&self, tiles: Range<usize>, residual: &mut [f32], loops: &mut dyn Loops, scratch: &mut MoeScratch) {
        let Substrates { isa, model, down, .. } = self.substrates;
        let (d_model, d_ff) = (scratch.d_model, scratch.d_ff);
        let base_slot = scratch.tiles[tiles.start].first_slot;
        let MoeScratch { tiles: all_tiles, weights, row_of_slot, hidden, outputs, threads, .. } = scratch;
        let (residual, tiles) = (Parts::new(residual), &all_tiles[tiles]);
        loops.run(tiles.len(), &|thread, item| {
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
