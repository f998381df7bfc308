//! candle `CustomOp`s with their own backward, where candle's composed ops would spend most of a training step on
//! allocations and single-threaded elementwise passes. Each op takes contiguous f32 tensors on the CPU; the public
//! functions make their arguments contiguous first, so views are welcome.
//!
//! No op starts threads: training runs one shard of the batch per core instead (see [`crate::step`]).

use std::ops::Deref;

use candle_core::{CpuStorage, Error, Layout, Result, Shape, Storage, Tensor};

mod activate;
mod attention;
mod conv;
mod depthwise;
mod elementwise;
mod grouped;
mod linear;
mod norm;
mod rotation;
mod routing;
mod scale;
mod ternary;

pub use activate::activate;
pub use attention::attention;
pub use conv::conv;
pub use depthwise::depthwise;
pub use elementwise::gelu;
pub use grouped::expert_linear;
pub use linear::linear;
pub use norm::{layer_norm, layer_norm_gelu};
pub use rotation::{AngleGrid, rotate_rows};
pub use routing::{combine, smoothness, softmax};
pub use scale::scale_rows;
pub use ternary::{Activations, fake_quantize, ternarized, ternary_linear};

/// The f32 values of an op's argument.
fn slice<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    let (start, end) =
        layout.contiguous_offsets().ok_or_else(|| Error::Msg("custom ops take contiguous tensors".into()).bt())?;
    Ok(&storage.as_slice::<f32>()?[start..end])
}

/// The values of a contiguous CPU tensor, borrowed. `G` is candle's lock guard.
struct View<G> {
    storage: G,
    range: (usize, usize),
}

fn view(tensor: &Tensor) -> Result<View<impl Deref<Target = Storage>>> {
    let (storage, layout) = tensor.storage_and_layout();
    let range =
        layout.contiguous_offsets().ok_or_else(|| Error::Msg("custom ops take contiguous tensors".into()).bt())?;
    Ok(View { storage, range })
}

impl<G: Deref<Target = Storage>> View<G> {
    fn values(&self) -> Result<&[f32]> {
        match &*self.storage {
            Storage::Cpu(storage) => Ok(&storage.as_slice::<f32>()?[self.range.0..self.range.1]),
            _ => Err(Error::Msg("custom ops run on the CPU".into()).bt()),
        }
    }
}

fn output(values: Vec<f32>, shape: impl Into<Shape>) -> (CpuStorage, Shape) {
    (CpuStorage::F32(values), shape.into())
}

/// A tensor of `values` with the shape of `like`.
fn tensor_like(values: Vec<f32>, like: &Tensor) -> Result<Tensor> {
    Tensor::from_vec(values, like.shape(), like.device())
}

fn last_dim(layout: &Layout) -> Result<usize> {
    layout.dims().last().copied().ok_or_else(|| Error::Msg("a scalar has no last dimension".into()).bt())
}

#[cfg(test)]
mod tests;
