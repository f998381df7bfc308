//! Depthwise convolution, channel-last: every channel has a window of its own.

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor};

use super::linear::column_sums;
use super::{output, slice, tensor_like, view};
use model_core::config::StemLayer;

/// `x [batch, side, side, channels] -> [batch, side', side', channels]`, zero padding, with
/// `weight [channels, kernel * kernel]` and `bias [channels]`.
pub fn depthwise(x: &Tensor, weight: &Tensor, bias: &Tensor, layer: StemLayer) -> Result<Tensor> {
    x.contiguous()?.apply_op3(&weight.contiguous()?, &bias.contiguous()?, Depthwise(layer))
}

struct Depthwise(StemLayer);

impl Depthwise {
    /// Batch, side and channels of the input, and side of the output.
    fn sizes(&self, dims: &[usize]) -> Result<(usize, usize, usize, usize)> {
        let &[batch, side, width, channels] = dims else {
            candle_core::bail!("depthwise: input {dims:?} is not [batch, side, side, channels]")
        };
        match self.0.output_side(side).filter(|_| side == width) {
            Some(out_side) => Ok((batch, side, channels, out_side)),
            None => candle_core::bail!("depthwise: kernel {} does not fit {side}x{width}", self.0.kernel),
        }
    }

    /// Calls `visit(value of the window, pixel of the input, pixel of the output)` for all that lies inside of an image.
    fn for_each(&self, side: usize, out_side: usize, mut visit: impl FnMut(usize, usize, usize)) {
        let StemLayer { kernel, stride, padding: [top, left, ..], .. } = self.0;
        for row in 0..out_side {
            for col in 0..out_side {
                for ky in 0..kernel {
                    let Some(y) = (row * stride + ky).checked_sub(top).filter(|&y| y < side) else { continue };
                    for kx in 0..kernel {
                        let Some(x) = (col * stride + kx).checked_sub(left).filter(|&x| x < side) else { continue };
                        visit(ky * kernel + kx, y * side + x, row * out_side + col);
                    }
                }
            }
        }
    }
}

/// `[rows, cols]` as `[cols, rows]`.
fn transposed(values: &[f32], cols: usize) -> Vec<f32> {
    let rows = values.len() / cols.max(1);
    (0..cols).flat_map(|c| (0..rows).map(move |r| values[r * cols + c])).collect()
}

impl CustomOp3 for Depthwise {
    fn name(&self) -> &'static str {
        "depthwise"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
        bias: &CpuStorage,
        bias_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (batch, side, channels, out_side) = self.sizes(x_layout.dims())?;
        if weight_layout.dims() != [channels, self.0.kernel.pow(2)] || bias_layout.dims() != [channels] {
            candle_core::bail!("depthwise: weight {:?} does not fit {channels} channels", weight_layout.dims());
        }
        let (x, weight, bias) = (slice(x, x_layout)?, slice(weight, weight_layout)?, slice(bias, bias_layout)?);
        let weight = transposed(weight, self.0.kernel.pow(2));
        let mut y = bias.repeat(batch * out_side.pow(2));
        let images = x.chunks_exact(side.pow(2) * channels).zip(y.chunks_exact_mut(out_side.pow(2) * channels));
        for (x, y) in images {
            self.for_each(side, out_side, |tap, from, to| {
                let (x, w) = (&x[from * channels..][..channels], &weight[tap * channels..][..channels]);
                let y = &mut y[to * channels..][..channels];
                y.iter_mut().zip(x).zip(w).for_each(|((y, x), w)| *y += x * w);
            });
        }
        Ok(output(y, (batch, out_side, out_side, channels)))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        _y: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (_, side, channels, out_side) = self.sizes(x.dims())?;
        let grad = grad.contiguous()?;
        let (x_view, weight_view, grad_view) = (view(x)?, view(weight)?, view(&grad)?);
        let (values, g) = (x_view.values()?, grad_view.values()?);
        let window = self.0.kernel.pow(2);
        let weight_values = transposed(weight_view.values()?, window);
        let mut grad_weight = vec![0.0; window * channels];
        let mut grad_x = vec![0.0; values.len()];
        let images = values.chunks_exact(side.pow(2) * channels).zip(g.chunks_exact(out_side.pow(2) * channels));
        for ((x, g), grad_x) in images.zip(grad_x.chunks_exact_mut(side.pow(2) * channels)) {
            self.for_each(side, out_side, |tap, from, to| {
                let taps = tap * channels..(tap + 1) * channels;
                for (i, tap) in taps.enumerate() {
                    grad_weight[tap] += x[from * channels + i] * g[to * channels + i];
                    grad_x[from * channels + i] += weight_values[tap] * g[to * channels + i];
                }
            });
        }
        Ok((
            Some(tensor_like(grad_x, x)?),
            Some(tensor_like(transposed(&grad_weight, channels), weight)?),
            Some(tensor_like(column_sums(g, channels), bias)?),
        ))
    }
}
