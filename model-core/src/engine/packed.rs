//! A layer `y = x W^T + b` of the backbone or head as the engine holds it, and the per-thread buffers that the layer needs.

use crate::kernels::{Int8Rows, Isa, KernelError, PackedF32, PackedInt8, quantize_rows};
use crate::weights::{self, Matrix};

/// A layer as held in memory.
#[derive(Debug, Clone)]
pub(super) enum PackedLayer {
    /// int8 weights and activations: qkv, projection, and all of the stem but its first layer.
    Int8(PackedInt8),
    /// A head of few classes, whose rows are not padded.
    Rows(Int8Rows),
    /// f32 throughout: what sees pixels.
    F32(PackedF32),
}

/// Rows that a thread works on at a time: enough to spread the unpacking of weights over, few enough that a tile's
/// activations stay in the second-level cache.
pub(super) const TILE: usize = 64;

/// int8 codes of a tile's rows, with their steps.
#[derive(Debug)]
pub(super) struct Quantized {
    codes: Vec<i8>,
    steps: Vec<f32>,
}

impl Quantized {
    /// Room for [`TILE`] rows of up to `cols` values.
    pub(super) fn new(cols: usize) -> Self {
        Self { codes: vec![0; TILE * cols], steps: vec![0.0; TILE] }
    }

    /// Quantises rows of `cols` values, and returns their codes and steps.
    pub(super) fn rows(&mut self, isa: Isa, x: &[f32], cols: usize) -> Result<(&[i8], &[f32]), KernelError> {
        let m = x.len() / cols;
        let (codes, steps) = (&mut self.codes[..x.len()], &mut self.steps[..m]);
        quantize_rows(isa, x, cols, codes, steps)?;
        Ok((codes, steps))
    }

    pub(super) fn heap_bytes(&self) -> usize {
        self.codes.capacity() + self.steps.capacity() * size_of::<f32>()
    }
}

impl PackedLayer {
    pub(super) fn int8(isa: Isa, layer: &weights::Linear, rows: usize, cols: usize) -> Result<Self, KernelError> {
        Ok(Self::Int8(match &layer.weight {
            Matrix::Int8 { codes, scale } if scale.len() == rows => {
                PackedInt8::pack_codes(isa, codes, scale, &layer.bias, cols)?
            }
            weight => PackedInt8::pack(isa, &weight.to_f32(), &layer.bias, rows, cols)?,
        }))
    }

    /// An int8 head: of few classes as rows, which [`PackedInt8`] would pad to a panel.
    pub(super) fn head(isa: Isa, layer: &weights::Linear, rows: usize, cols: usize) -> Result<Self, KernelError> {
        match &layer.weight {
            Matrix::Int8 { codes, scale } if scale.len() == rows && rows <= Int8Rows::MOST => {
                Ok(Self::Rows(Int8Rows::new(isa, codes, scale, &layer.bias, cols)?))
            }
            _ => Self::int8(isa, layer, rows, cols),
        }
    }

    pub(super) fn f32(isa: Isa, layer: &weights::Linear, rows: usize, cols: usize) -> Result<Self, KernelError> {
        Ok(Self::F32(PackedF32::pack(isa, &layer.weight.to_f32(), &layer.bias, rows, cols)?))
    }

    pub(super) fn heap_bytes(&self) -> usize {
        match self {
            Self::Int8(layer) => layer.resident_bytes(),
            Self::Rows(layer) => layer.resident_bytes(),
            Self::F32(layer) => layer.resident_bytes(),
        }
    }

    /// `out = x W^T + b` for at most [`TILE`] rows.
    pub(super) fn forward(&self, x: &[f32], quantized: &mut Quantized, out: &mut [f32]) -> Result<(), KernelError> {
        match self {
            Self::Int8(layer) => {
                let (codes, steps) = quantized.rows(layer.isa(), x, layer.cols())?;
                layer.matmul(codes, steps, out)
            }
            Self::Rows(layer) => {
                let (codes, steps) = quantized.rows(layer.isa(), x, layer.cols())?;
                layer.matmul(codes, steps, out)
            }
            Self::F32(layer) => layer.matmul(x, out),
        }
    }
}
