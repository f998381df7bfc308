//! What one thread needs for itself to work on a layer.

use crate::config::MAX_EXPERTS;
use crate::engine::lines::Lines;
use crate::engine::packed::{Quantized, TILE};
use crate::kernels::LaneOrder;
use crate::kernels::gemm::float::PANEL;
use crate::kernels::rotation::Coefficients;

/// Logits that a thread holds at once: those of a tile of tokens for up to 64 experts, of fewer tokens for more, and of
/// one token for [`MAX_EXPERTS`].
pub(super) const LOGITS: usize = TILE * 64;
const _: () = assert!(LOGITS >= MAX_EXPERTS);

/// Buffers of one thread.
#[derive(Debug)]
pub(in crate::engine) struct MoeThread {
    pub(super) coefficients: Coefficients,
    pub(super) quantized: Quantized,
    /// Rows on their way through an expert, `[TILE, max(d_model, d_ff)]`.
    pub(super) rows: Lines,
    /// Rows of the width of a token, `[TILE, d_model]`.
    pub(super) narrow: Lines,
    /// One decoded router panel.
    pub(super) panel: Lines,
    /// `[LOGITS / num_experts, num_experts]`.
    pub(super) logits: Vec<f32>,
}

impl MoeThread {
    pub(in crate::engine) fn new(d_model: usize, d_ff: usize) -> Self {
        Self {
            coefficients: Coefficients::new(&[LaneOrder::new(d_model), LaneOrder::new(d_ff)]),
            quantized: Quantized::new(d_model.max(d_ff)),
            rows: Lines::new(TILE * d_model.max(d_ff)),
            narrow: Lines::new(TILE * d_model),
            panel: Lines::new(PANEL * d_model),
            logits: vec![0.0; LOGITS],
        }
    }

    pub(in crate::engine) fn bytes(&self) -> usize {
        let floats = self.rows.capacity() + self.narrow.capacity() + self.panel.capacity() + self.logits.capacity();
        let buffers = self.coefficients.heap_bytes() + self.quantized.heap_bytes() + floats * size_of::<f32>();
        size_of::<Self>() + buffers
    }
}
