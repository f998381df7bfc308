//! Gradients against finite differences, and views against contiguous tensors.

use std::sync::Arc;

use candle_core::{Device, Result, Tensor, Var};

use super::*;
use crate::matmul::Products;
use model_core::config::StemLayer;

fn wave(count: usize, seed: f32) -> Vec<f32> {
    (0..count).map(|i| ((i as f32 + 1.0) * (1.7 + seed)).sin()).collect()
}

fn var(shape: &[usize], seed: f32) -> Var {
    Var::from_vec(wave(shape.iter().product(), seed), shape, &Device::Cpu).unwrap()
}

/// Checks d(sum(w * f(vars)))/d(var) of every element of every var against a central difference.
///
/// With h = 1e-2 and third derivatives of order one, truncation is about h^2 / 6 = 2e-5, and the rounding of sums of
/// a few dozen f32 terms divided by 2 h about 32 * 6e-8 / 2e-2 = 1e-4; ten times that is allowed, relative to the
/// larger of 1 and the gradient.
fn check_gradients(vars: &[&Var], f: impl Fn(&[Tensor]) -> Result<Tensor>) {
    const STEP: f32 = 1e-2;
    const TOLERANCE: f32 = 1e-3;
    let tensors: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
    let probe = |y: &Tensor| -> Result<Tensor> {
        let weights = Tensor::from_vec(wave(y.elem_count(), 0.31), y.shape(), y.device())?;
        (y * weights)?.sum_all()
    };
    let grads = probe(&f(&tensors).unwrap()).unwrap().backward().unwrap();
    for (which, var) in vars.iter().enumerate() {
        let analytic =
            grads.get(var).expect("every argument has a gradient").flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let values = var.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        for i in 0..values.len() {
            let at = |delta: f32| -> f32 {
                let mut moved = values.clone();
                moved[i] += delta;
                let mut arguments = tensors.clone();
                arguments[which] = Tensor::from_vec(moved, var.shape(), var.device()).unwrap();
                probe(&f(&arguments).unwrap()).unwrap().to_scalar::<f32>().unwrap()
            };
            let numeric = (at(STEP) - at(-STEP)) / (2.0 * STEP);
            let bound = TOLERANCE * analytic[i].abs().max(1.0);
            assert!(
                (numeric - analytic[i]).abs() <= bound,
                "argument {which}[{i}]: {} but numerically {numeric}",
                analytic[i]
            );
        }
    }
}

#[test]
fn linear_gradients() {
    check_gradients(&[&var(&[2, 3, 4], 0.1), &var(&[5, 4], 0.2), &var(&[5], 0.3)], |a| linear(&a[0], &a[1], &a[2]));
}

#[test]
fn layer_norm_gradients() {
    check_gradients(&[&var(&[3, 10], 0.1), &var(&[10], 0.2), &var(&[10], 0.3)], |a| layer_norm(&a[0], &a[1], &a[2]));
}

#[test]
fn layer_norm_gelu_gradients() {
    let f = |a: &[Tensor]| layer_norm_gelu(&a[0], &a[1], &a[2]);
    check_gradients(&[&var(&[3, 10], 0.1), &var(&[10], 0.2), &var(&[10], 0.3)], f);
}

#[test]
fn fused_ops_give_what_their_parts_give() {
    let same = |a: Result<Tensor>, b: Result<Tensor>| {
        let values = |t: Result<Tensor>| t.unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        // The same operations in the same order, but for fused multiply-adds: a few roundings of values of order one.
        values(a).iter().zip(values(b)).for_each(|(a, b)| assert!((a - b).abs() < 2e-6, "{a} and {b}"));
    };
    let (x, gamma, beta) = (var(&[3, 32], 0.1), var(&[32], 0.2), var(&[32], 0.3));
    same(layer_norm_gelu(&x, &gamma, &beta), layer_norm(&x, &gamma, &beta).and_then(|y| gelu(&y)));
    let (h, weights) = (var(&[6, 32], 0.4), var(&[3, 2], 0.5));
    let experts = Arc::new(vec![0, 2, 1, 1, 2, 0]);
    for (stages, grid) in [(2, AngleGrid::Bits(4)), (5, AngleGrid::Continuous)] {
        let angles = var(&[3, stages, 16], 0.6);
        let parts = rotate_rows(&h, &angles, experts.clone(), grid).and_then(|z| combine(&gelu(&z)?, &weights));
        same(activate(&h, &angles, &weights, experts.clone(), grid), parts);
    }
}

#[test]
fn activation_gradients_for_short_and_long_strides() {
    for (n, stages) in [(16, 2), (32, 5), (12, 2)] {
        let experts = Arc::new(vec![0, 2, 1, 1, 2, 0]);
        check_gradients(&[&var(&[6, n], 0.1), &var(&[3, stages, n / 2], 0.2), &var(&[3, 2], 0.3)], |a| {
            activate(&a[0], &a[1], &a[2], experts.clone(), AngleGrid::Continuous)
        });
    }
}

#[test]
fn scale_gradients() {
    let experts = Arc::new(vec![2, 0, 2]);
    check_gradients(&[&var(&[3, 5], 0.1), &var(&[4, 5], 0.2)], |a| scale_rows(&a[0], &a[1], experts.clone()));
}

#[test]
fn gelu_gradients() {
    check_gradients(&[&var(&[4, 9], 0.4)], |a| gelu(&(&a[0] * 3.0)?));
}

#[test]
fn softmax_gradients() {
    check_gradients(&[&var(&[3, 7], 0.4)], |a| softmax(&a[0]));
}

#[test]
fn attention_gradients() {
    check_gradients(&[&var(&[2, 3, 24], 0.1)], |a| attention(&a[0], 2));
}

#[test]
fn depthwise_gradients() {
    for (kernel, stride, padding) in [(3, 1, [1; 4]), (3, 2, [0, 0, 1, 1]), (5, 2, [1, 1, 2, 2])] {
        let layer = StemLayer { kernel, stride, padding, groups: 3, ..StemLayer::patch(3, 1) };
        let weight = var(&[3, kernel * kernel], 0.2);
        check_gradients(&[&var(&[2, 4, 4, 3], 0.1), &weight, &var(&[3], 0.3)], |a| {
            depthwise(&a[0], &a[1], &a[2], layer)
        });
    }
}

#[test]
fn convolution_gradients() {
    for layer in [StemLayer::conv3(3, 2), StemLayer::residual3(3, 0), StemLayer::patch(3, 2)] {
        let weight = var(&[3, layer.kernel.pow(2) * 2], 0.2);
        check_gradients(&[&var(&[2, 4, 4, 2], 0.1), &weight, &var(&[3], 0.3)], |a| conv(&a[0], &a[1], &a[2], layer));
    }
}

#[test]
fn rotation_gradients_for_short_and_long_strides() {
    for (n, stages) in [(16, 4), (32, 5), (12, 2)] {
        let experts = Arc::new(vec![0, 2, 1, 1, 2, 0]);
        check_gradients(&[&var(&[3, n], 0.1), &var(&[3, stages, n / 2], 0.2)], |a| {
            rotate_rows(&a[0], &a[1], experts.clone(), AngleGrid::Continuous)
        });
    }
}

#[test]
fn expert_linear_gradients_with_an_idle_expert_and_two_copies() {
    let experts = Arc::new(vec![2, 0, 0, 3, 3, 2]);
    check_gradients(&[&var(&[3, 5], 0.1), &var(&[4, 2, 5], 0.2)], |a| expert_linear(&a[0], &a[1], experts.clone()));
}

#[test]
fn expert_linear_multiplies_each_row_by_its_own_matrix() {
    let (x, w) = (var(&[2, 5], 0.1), var(&[3, 4, 5], 0.2));
    let experts = [1u16, 2, 2, 0];
    let y = expert_linear(&x, &w, Arc::new(experts.to_vec())).unwrap();
    for (row, &expert) in experts.iter().enumerate() {
        let matrix = w.get(usize::from(expert)).unwrap();
        let expected = x.narrow(0, row / 2, 1).unwrap().matmul(&matrix.t().unwrap()).unwrap();
        let difference = (y.narrow(0, row, 1).unwrap() - expected).unwrap().abs().unwrap().max_all().unwrap();
        // Five-term f32 sums in another order.
        assert!(difference.to_scalar::<f32>().unwrap() < 1e-5, "row {row}");
    }
}

#[test]
fn combine_gradients() {
    check_gradients(&[&var(&[6, 5], 0.1), &var(&[3, 2], 0.2)], |a| combine(&a[0], &a[1]));
}

#[test]
fn smoothness_gradients() {
    check_gradients(&[&var(&[2, 9, 4], 0.1)], |a| smoothness(&a[0], 3, 3));
}

#[test]
fn substrate_gradients_pass_straight_through_the_rounding() {
    // Rounding has no useful derivative of its own, so the reference is the same product with the rounded values
    // held constant: grad_x = g Q(w), grad_w = g^T x.
    let (x, w) = (var(&[3, 8], 0.1), var(&[5, 8], 0.2));
    let (codes, scale) =
        model_core::kernels::gemm::scalar::ternarize(&w.flatten_all().unwrap().to_vec1::<f32>().unwrap(), 8);
    let dense: Vec<f32> =
        codes.chunks_exact(8).zip(&scale).flat_map(|(r, s)| r.iter().map(move |&c| f32::from(c) * s)).collect();
    let dense = Var::from_vec(dense, (5, 8), &Device::Cpu).unwrap();
    let expected = x.matmul(&dense.t().unwrap()).unwrap();
    let y = ternary_linear(&x, &w, true, Activations::Float).unwrap();
    let loss = |y: &Tensor| y.sqr().unwrap().sum_all().unwrap().backward().unwrap();
    let (ours, reference) = (loss(&y), loss(&expected));
    let close = |a: &Tensor, b: &Tensor| {
        let difference = (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        // Eight-term f32 sums in another order.
        assert!(difference < 1e-4, "differ by {difference}");
    };
    close(&y, &expected);
    close(ours.get(&x).unwrap(), reference.get(&x).unwrap());
    close(ours.get(&w).unwrap(), reference.get(&dense).unwrap());
}

#[test]
fn ops_take_transposed_and_offset_views() {
    let base = var(&[6, 8], 0.1);
    let transposed = base.t().unwrap();
    let offset = base.narrow(0, 2, 3).unwrap();
    for view in [transposed, offset] {
        let copy = view.contiguous().unwrap();
        let n = view.dims()[1];
        let (gamma, beta, weight) = (var(&[n], 0.2), var(&[n], 0.3), var(&[n, n], 0.4));
        let same = |a: Result<Tensor>, b: Result<Tensor>| {
            let values = |t: Result<Tensor>| t.unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert_eq!(values(a), values(b));
        };
        same(gelu(&view), gelu(&copy));
        same(softmax(&view), softmax(&copy));
        same(layer_norm(&view, &gamma, &beta), layer_norm(&copy, &gamma, &beta));
        same(linear(&view, &weight, &beta), linear(&copy, &weight, &beta));
        same(
            ternary_linear(&view, &weight, true, Activations::Int8),
            ternary_linear(&copy, &weight, true, Activations::Int8),
        );
    }
}

/// The integer product is exact; the f32 one sums k products of a code and a sign, each rounded to 2^-24 of the sum of
/// magnitudes, and multiplies step and scale in before.
#[test]
fn the_substrate_product_in_integers_equals_the_one_in_f32() {
    for (m, n, k) in [(1, 1, 1), (5, 7, 12), (300, 48, 130)] {
        let x = Tensor::from_vec(wave(m * k, 0.2), (m, k), &Device::Cpu).unwrap();
        let latent = wave(n * k, 0.4);
        let dense = ternarized(&latent, k);
        for (weight, ternarize) in [(latent, true), (dense, false)] {
            let weight = Tensor::from_vec(weight, (n, k), &Device::Cpu).unwrap();
            let product = |products: Products| {
                let y = products.scope(|| ternary_linear(&x, &weight, ternarize, Activations::Int8)).unwrap();
                y.flatten_all().unwrap().to_vec1::<f32>().unwrap()
            };
            for (got, expected) in product(Products::fastest()).into_iter().zip(product(Products::F32)) {
                let bound = (k + 4) as f32 * 1.2e-7 * k as f32;
                assert!((got - expected).abs() <= bound, "{m} {n} {k}: {got}, {expected}");
            }
        }
    }
}

/// A matrix that is no scale times signs has no codes, and is multiplied as it is.
#[test]
fn a_dense_matrix_has_no_integer_product() {
    let x = Tensor::from_vec(wave(6, 0.2), (2, 3), &Device::Cpu).unwrap();
    let weight = Tensor::from_vec(vec![1.0f32, 0.5, 0.0], (1, 3), &Device::Cpu).unwrap();
    let y = Products::fastest().scope(|| ternary_linear(&x, &weight, false, Activations::Int8)).unwrap();
    let expected = ternary_linear(&x, &weight, false, Activations::Int8).unwrap();
    let values = |y: &Tensor| y.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    for (got, expected) in values(&y).into_iter().zip(values(&expected)) {
        // Both factors of two terms of magnitude at most 1 lose 2^-9.
        assert!((got - expected).abs() <= 4.0 * 2f32.powi(-9), "{got}, {expected}");
    }
}
