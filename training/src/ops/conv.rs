//! Channel-last convolution as a matrix product over unfolded windows.

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor};

use super::linear::{broadcast_bias, column_sums};
use super::{output, slice, tensor_like, view};
use crate::matmul::{Mat, Write, matmul};
use model_core::config::StemLayer;

/// `x [batch, side, side, in] -> [batch, side', side', out]`, zero padding, with
/// `weight [out, kernel * kernel * in]` (windows flattened as row, column, channel) and `bias [out]`.
pub fn conv(x: &Tensor, weight: &Tensor, bias: &Tensor, layer: StemLayer) -> Result<Tensor> {
    x.contiguous()?.apply_op3(&weight.contiguous()?, &bias.contiguous()?, Conv(layer))
}

struct Conv(StemLayer);

/// Windows of several small images share a matrix product, until there are about this many: fewer would pack the weights
/// for too little work, more would leave the cache.
const ROWS_AT_ONCE: usize = 256;

/// Sizes of one image's convolution.
#[derive(Clone, Copy)]
struct Sizes {
    side: usize,
    channels: usize,
    out_side: usize,
    window: usize,
}

impl Conv {
    fn sizes(&self, dims: &[usize]) -> Result<(usize, Sizes)> {
        let &[batch, side, width, channels] = dims else {
            candle_core::bail!("conv: input {dims:?} is not [batch, side, side, channels]")
        };
        let Some(out_side) = self.0.output_side(side).filter(|_| side == width) else {
            candle_core::bail!("conv: kernel {} does not fit {side}x{width}", self.0.kernel)
        };
        Ok((batch, Sizes { side, channels, out_side, window: self.0.kernel.pow(2) * channels }))
    }

    /// Calls `visit(window offset, image offset)` for every run of channels of every window that lies inside the
    /// image; the rest is padding.
    fn for_each_run(&self, sizes: Sizes, mut visit: impl FnMut(usize, usize)) {
        let Sizes { side, channels, out_side, window } = sizes;
        let StemLayer { kernel, stride, padding: [top, left, ..], .. } = self.0;
        for row in 0..out_side {
            for col in 0..out_side {
                let start = (row * out_side + col) * window;
                for ky in 0..kernel {
                    let Some(y) = (row * stride + ky).checked_sub(top).filter(|&y| y < side) else { continue };
                    for kx in 0..kernel {
                        let Some(x) = (col * stride + kx).checked_sub(left).filter(|&x| x < side) else { continue };
                        visit(start + (ky * kernel + kx) * channels, (y * side + x) * channels);
                    }
                }
            }
        }
    }

    /// Images that share a product.
    fn group(sizes: Sizes) -> usize {
        (ROWS_AT_ONCE / sizes.out_side.pow(2).max(1)).max(1)
    }

    /// The windows of `images`, of `windows.len()` values at most; the padding in `windows` is left alone.
    fn unfold_all(&self, sizes: Sizes, images: &[f32], windows: &mut [f32]) {
        let image_len = sizes.side.pow(2) * sizes.channels;
        let windows = windows.chunks_exact_mut(sizes.out_side.pow(2) * sizes.window);
        images.chunks_exact(image_len).zip(windows).for_each(|(image, windows)| self.unfold(sizes, image, windows));
    }

    fn unfold(&self, sizes: Sizes, image: &[f32], windows: &mut [f32]) {
        let c = sizes.channels;
        self.for_each_run(sizes, |window, pixel| windows[window..window + c].copy_from_slice(&image[pixel..pixel + c]));
    }

    fn fold(&self, sizes: Sizes, windows: &[f32], image: &mut [f32]) {
        let c = sizes.channels;
        self.for_each_run(sizes, |window, pixel| {
            for (sum, v) in image[pixel..pixel + c].iter_mut().zip(&windows[window..window + c]) {
                *sum += v;
            }
        });
    }
}

impl CustomOp3 for Conv {
    fn name(&self) -> &'static str {
        "conv"
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
        let (batch, sizes) = self.sizes(x_layout.dims())?;
        let (n, k) = weight_layout.shape().dims2()?;
        if k != sizes.window || bias_layout.dims() != [n] {
            candle_core::bail!("conv: windows of {} do not fit weight [{n}, {k}]", sizes.window);
        }
        let (x, weight, bias) = (slice(x, x_layout)?, slice(weight, weight_layout)?, slice(bias, bias_layout)?);
        let m = sizes.out_side.pow(2);
        let mut y = broadcast_bias(bias, batch * m);
        let group = Self::group(sizes);
        let mut windows = vec![0.0; group * m * k];
        let image_len = sizes.side.pow(2) * sizes.channels;
        for (images, y) in x.chunks(group * image_len).zip(y.chunks_mut(group * m * n)) {
            self.unfold_all(sizes, images, &mut windows);
            let rows = y.len() / n;
            matmul(Mat::new(&windows, rows, k), Mat::new(weight, n, k).t(), 1.0, y, n, Write::Add);
        }
        Ok(output(y, (batch, sizes.out_side, sizes.out_side, n)))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        _y: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (_, sizes) = self.sizes(x.dims())?;
        let (n, k) = weight.dims2()?;
        let grad = grad.contiguous()?;
        let (x_view, weight_view, grad_view) = (view(x)?, view(weight)?, view(&grad)?);
        let (weight_values, g) = (weight_view.values()?, grad_view.values()?);
        let m = sizes.out_side.pow(2);
        let image_len = sizes.side.pow(2) * sizes.channels;
        let mut grad_weight = vec![0.0; n * k];
        // Pixels carry no gradient, so the first layer of a stem skips the costlier half.
        let wants_input_gradient = x.track_op();
        let mut grad_x = vec![0.0; if wants_input_gradient { x.elem_count() } else { 0 }];
        let group = Self::group(sizes);
        let (mut windows, mut grad_windows) = (vec![0.0; group * m * k], vec![0.0; group * m * k]);
        let groups = x_view.values()?.chunks(group * image_len).zip(g.chunks(group * m * n));
        for (i, (images, g)) in groups.enumerate() {
            self.unfold_all(sizes, images, &mut windows);
            let rows = g.len() / n;
            matmul(Mat::new(g, rows, n).t(), Mat::new(&windows, rows, k), 1.0, &mut grad_weight, k, Write::Add);
            if wants_input_gradient {
                matmul(Mat::new(g, rows, n), Mat::new(weight_values, n, k), 1.0, &mut grad_windows, k, Write::Set);
                let grad_images = grad_x[i * group * image_len..][..images.len()].chunks_exact_mut(image_len);
                for (windows, image) in grad_windows.chunks_exact(m * k).zip(grad_images) {
                    self.fold(sizes, windows, image);
                }
            }
        }
        Ok((
            if wants_input_gradient { Some(tensor_like(grad_x, x)?) } else { None },
            Some(tensor_like(grad_weight, weight)?),
            Some(tensor_like(column_sums(g, n), bias)?),
        ))
    }
}
