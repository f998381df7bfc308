//! The substrate product with straight-through estimators for both roundings.

use std::borrow::Cow;

use candle_core::{CpuStorage, CustomOp2, Error, Layout, Result, Shape, Tensor};
use model_core::kernels::{Isa, KernelError, PackedTernary, TernaryStorage, quantize_rows, vectorized};

use super::{last_dim, output, slice, tensor_like, view};
use crate::matmul::{Mat, Products, Write, matmul};
use model_core::kernels::gemm::scalar::ternarize;

/// How the activations of a substrate product are represented.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activations {
    /// As they are: the float path.
    Float,
    /// int8 per token, the step being `max |x| / 127`: what the integer engine computes.
    #[default]
    Int8,
}

/// `x [.., in] -> [.., out]` against `Q(weight)`, the ternarised `weight [out, in]`, where `ternarize` is set; against
/// `weight` as it is (the dequantised matrix of an artifact, whose ternarisation would not give it back) where not.
///
/// The gradient treats both quantisers as the identity (straight-through): with respect to `x` it goes through
/// `Q(weight)`, and with respect to `weight` it meets the quantised activations.
pub fn ternary_linear(x: &Tensor, weight: &Tensor, ternarize: bool, activations: Activations) -> Result<Tensor> {
    x.contiguous()?.apply_op2(&weight.contiguous()?, TernaryLinear { ternarize, activations })
}

struct TernaryLinear {
    ternarize: bool,
    activations: Activations,
}

impl TernaryLinear {
    /// `Q(weight)` as a dense matrix.
    fn dense<'a>(&self, weight: &'a [f32], cols: usize) -> Cow<'a, [f32]> {
        if !self.ternarize {
            return Cow::Borrowed(weight);
        }
        Cow::Owned(ternarized(weight, cols))
    }

    /// The codes and scales of `Q(weight)`; none of a matrix that has no such codes.
    fn codes(&self, weight: &[f32], cols: usize) -> Option<(Vec<i8>, Vec<f32>)> {
        if self.ternarize {
            return Some(vectorized(
                #[inline(always)]
                || ternarize(weight, cols),
            ));
        }
        let mut scales = Vec::with_capacity(weight.len() / cols.max(1));
        for row in weight.chunks_exact(cols.max(1)) {
            let scale = row.iter().fold(0f32, |max, w| max.max(w.abs()));
            if row.iter().any(|w| *w != 0.0 && w.abs() != scale) {
                return None;
            }
            scales.push(scale);
        }
        let code = |w: &f32| i8::from(*w > 0.0) - i8::from(*w < 0.0);
        Some((weight.iter().map(code).collect(), scales))
    }

    /// The product in integers, exactly as the engine computes it; none where the factors are no codes, and where products
    /// are f32, whose runs keep their bits.
    fn integer_product(&self, x: &[f32], weight: &[f32], [n, k]: [usize; 2]) -> Result<Option<Vec<f32>>> {
        if Products::current() != Products::Bf16 || self.activations != Activations::Int8 {
            return Ok(None);
        }
        let Some((codes, scales)) = self.codes(weight, k) else { return Ok(None) };
        let failed = |error: KernelError| Error::Msg(error.to_string()).bt();
        let isa = Isa::best();
        let weight = PackedTernary::pack(isa, TernaryStorage::default(), &codes, &scales, [n, k]).map_err(failed)?;
        let m = x.len() / k;
        let mut y = vec![0.0; m * n];
        // Few rows at a time: their codes stay in the cache.
        const ROWS: usize = 256;
        let (mut codes, mut steps) = (vec![0; ROWS.min(m) * k], vec![0.0; ROWS.min(m)]);
        for (x, y) in x.chunks(ROWS * k).zip(y.chunks_mut(ROWS * n)) {
            let (codes, steps) = (&mut codes[..x.len()], &mut steps[..x.len() / k]);
            quantize_rows(isa, x, k, codes, steps).map_err(failed)?;
            weight.matmul(codes, steps, y).map_err(failed)?;
        }
        Ok(Some(y))
    }

    fn activations<'a>(&self, x: &'a [f32], cols: usize) -> Cow<'a, [f32]> {
        match self.activations {
            Activations::Float => Cow::Borrowed(x),
            Activations::Int8 => Cow::Owned(fake_quantize(x, cols)),
        }
    }
}

/// `Q(weight)` with its scales, as dense f32 values.
pub fn ternarized(weight: &[f32], cols: usize) -> Vec<f32> {
    let mut dense = vec![0.0; weight.len()];
    vectorized(
        #[inline(always)]
        || {
            let (codes, scales) = ternarize(weight, cols);
            let rows = codes.chunks_exact(cols).zip(&scales);
            for (dense, (codes, scale)) in dense.chunks_exact_mut(cols).zip(rows) {
                for (dense, &code) in dense.iter_mut().zip(codes) {
                    *dense = f32::from(code) * scale;
                }
            }
        },
    );
    dense
}

/// `x` after int8 quantisation and back, row by row: each row's step is `max |x| / 127`.
pub fn fake_quantize(x: &[f32], cols: usize) -> Vec<f32> {
    let mut out = vec![0.0; x.len()];
    vectorized(
        #[inline(always)]
        || {
            for (row, out) in x.chunks_exact(cols).zip(out.chunks_exact_mut(cols)) {
                let max = lane_max(row);
                let step = if max == 0.0 { 1.0 } else { max / 127.0 };
                let inverse = 1.0 / step;
                for (out, v) in out.iter_mut().zip(row) {
                    *out = (v * inverse).round_ties_even() * step;
                }
            }
        },
    );
    out
}

/// `max |x|`, in sixteen lanes, since the compiler keeps the order of a single running maximum.
#[inline(always)]
fn lane_max(x: &[f32]) -> f32 {
    let mut lanes = [0f32; 16];
    let (blocks, rest) = x.as_chunks::<16>();
    for block in blocks {
        for i in 0..16 {
            lanes[i] = if block[i].abs() > lanes[i] { block[i].abs() } else { lanes[i] };
        }
    }
    lanes.iter().chain(rest).fold(0f32, |m, v| m.max(v.abs()))
}

impl CustomOp2 for TernaryLinear {
    fn name(&self) -> &'static str {
        "ternary-linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (n, k) = weight_layout.shape().dims2()?;
        let mut shape = x_layout.dims().to_vec();
        if last_dim(x_layout)? != k {
            candle_core::bail!("ternary-linear: input {shape:?} does not fit weight [{n}, {k}]");
        }
        let (x, weight) = (slice(x, x_layout)?, slice(weight, weight_layout)?);
        let y = match self.integer_product(x, weight, [n, k])? {
            Some(y) => y,
            None => {
                let (x, weight) = (self.activations(x, k), self.dense(weight, k));
                let m = x.len() / k;
                let mut y = vec![0.0; m * n];
                matmul(Mat::new(&x, m, k), Mat::new(&weight, n, k).t(), 1.0, &mut y, n, Write::Set);
                y
            }
        };
        if let Some(last) = shape.last_mut() {
            *last = n;
        }
        Ok(output(y, shape))
    }

    fn bwd(&self, x: &Tensor, weight: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (n, k) = weight.dims2()?;
        let grad = grad.contiguous()?;
        let (x_view, weight_view, grad_view) = (view(x)?, view(weight)?, view(&grad)?);
        let g = grad_view.values()?;
        let m = g.len() / n;
        let grad_x = x.track_op().then(|| {
            let mut grad_x = vec![0.0; m * k];
            let dense = self.dense(weight_view.values()?, k);
            matmul(Mat::new(g, m, n), Mat::new(&dense, n, k), 1.0, &mut grad_x, k, Write::Set);
            tensor_like(grad_x, x)
        });
        // A frozen substrate needs none.
        let grad_weight = weight.track_op().then(|| {
            let x_values = self.activations(x_view.values()?, k);
            let mut grad_weight = vec![0.0; n * k];
            matmul(Mat::new(g, m, n).t(), Mat::new(&x_values, m, k), 1.0, &mut grad_weight, k, Write::Set);
            tensor_like(grad_weight, weight)
        });
        Ok((grad_x.transpose()?, grad_weight.transpose()?))
    }
}
