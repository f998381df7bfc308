//! One layer without the rest of a model, to be timed and to be held against a definition.

use super::experts::{ExpertLayer, Substrates};
use super::forward::Moe;
use super::plan::{MoeScratch, Span};
use crate::config::{BackboneShape, ExpertConfig};
use crate::engine::crew::{Loops, Member};
use crate::kernels::{Isa, KernelError};
use crate::weights::{ExpertLayerWeights, Ternary};

/// A mixture-of-experts layer of one expert set, with scratch for the tokens that it was made with.
#[derive(Debug)]
pub struct MoeLayer {
    substrates: Substrates,
    experts: ExpertLayer,
    caller: Member,
    scratch: MoeScratch,
    tokens: usize,
    /// `[tokens, d_model]`, in lane order.
    x: Vec<f32>,
}

impl MoeLayer {
    /// Packs `up` `[d_ff, d_model]`, `down` `[d_model, d_ff]` and the experts of a first layer for `isa`, to be run by
    /// `threads` threads on the tokens `x` `[tokens, d_model]`.
    ///
    /// # Errors
    /// [`KernelError`] when lengths do not fit, or codes or scales are not valid.
    pub fn new(
        isa: Isa,
        shape: &BackboneShape,
        (up, down): (&Ternary, &Ternary),
        (experts, config): (&ExpertLayerWeights, &ExpertConfig),
        x: &[f32],
        threads: usize,
    ) -> Result<Self, KernelError> {
        let BackboneShape { d_model, d_ff, .. } = *shape;
        let substrates = Substrates::pack(isa, shape, up, down)?;
        let experts = ExpertLayer::pack(experts, config, 0, [d_model, d_ff])?;
        let tokens = x.len() / d_model.max(1);
        let caller = Member::with_helpers(threads);
        let mut scratch = MoeScratch::new(d_model, d_ff, tokens, caller.numbers());
        let x = substrates.input_order().permute_columns(x);
        let spans = Self::spans(tokens);
        Moe { substrates: &substrates, experts: |_| &experts, spans: &spans }.plan(caller.threads(), &mut scratch);
        Ok(Self { substrates, experts, caller, scratch, tokens, x })
    }

    fn spans(tokens: usize) -> [Span; 1] {
        [Span { set: 0, first: 0, tokens, first_slot: 0 }]
    }

    /// Routes the tokens, and adds what their experts answer to `residual` `[tokens, d_model]`.
    pub fn run(&mut self, residual: &mut [f32]) {
        let Self { substrates, experts, caller, scratch, tokens, x } = self;
        let spans = Self::spans(*tokens);
        let moe = Moe { substrates, experts: |_| &*experts, spans: &spans };
        moe.route(x, caller, scratch);
        moe.forward(x, residual, caller, scratch);
    }

    /// The experts that the last [`MoeLayer::run`] chose for every token, best first, and their weights: `[tokens, top_k]`.
    pub fn choices(&self) -> (&[u16], &[f32]) {
        let slots = self.tokens * self.experts.top_k;
        (&self.scratch.ids()[..slots], &self.scratch.weights()[..slots])
    }

    /// Bytes of substrates, experts and router.
    pub fn resident_bytes(&self) -> usize {
        self.substrates.resident_bytes() + self.experts.resident_bytes()
    }
}
