use proptest::prelude::*;
use rand::{Rng, SeedableRng, rngs::SmallRng};

use super::*;

fn random(rng: &mut SmallRng, len: usize) -> Vec<f32> {
    (0..len).map(|_| rng.random_range(-1.0..1.0)).collect()
}

/// `[m, n]` by the definitions.
fn definition(weight: &[f32], bias: &[f32], lhs: &[i8], steps: &[f32], k: usize) -> (Vec<i32>, Vec<f32>) {
    let (m, n) = (steps.len(), bias.len());
    let (codes, scale) = scalar::quantize_weight(weight, n, k);
    let mut dots = vec![0; m * n];
    scalar::gemm_i8(lhs, &codes, m, k, &mut dots);
    let y = dots.iter().enumerate().map(|(i, &dot)| dot as f32 * steps[i / n] * scale[i % n] + bias[i % n]).collect();
    (dots, y)
}

proptest! {
    #[test]
    fn every_isa_equals_the_definition(
        m in 0usize..=35,
        n in 0usize..=37,
        k in prop_oneof![4 => 0usize..=70, 1 => 500usize..=560],
        seed in any::<u64>(),
    ) {
        let mut rng = SmallRng::seed_from_u64(seed);
        let (weight, bias, steps) = (random(&mut rng, n * k), random(&mut rng, n), random(&mut rng, m));
        let lhs: Vec<i8> = (0..m * k).map(|_| rng.random_range(-128..=127)).collect();
        let (dots, y) = definition(&weight, &bias, &lhs, &steps, k);
        for isa in Isa::available() {
            let packed = PackedInt8::pack(isa, &weight, &bias, n, k).unwrap();
            let mut out_dots = vec![i32::MIN; m * n];
            let mut out = vec![f32::NAN; m * n];
            packed.matmul_i32(&lhs, m, &mut out_dots).unwrap();
            packed.matmul(&lhs, &steps, &mut out).unwrap();
            prop_assert_eq!(&out_dots, &dots, "{} {}x{}x{}", isa, m, n, k);
            prop_assert_eq!(&out, &y, "{} {}x{}x{}", isa, m, n, k);
        }
    }
}

#[test]
fn extreme_values_neither_saturate_nor_overflow() {
    for isa in Isa::available() {
        for k in [257, 1100, MAX_COLS] {
            for (activation, weight) in [(127, 1.0), (-127, 1.0), (127, -1.0), (-127, -1.0), (-128, 1.0), (-128, -1.0)]
            {
                let (m, n) = (2, 3);
                let packed = PackedInt8::pack(isa, &vec![weight; n * k], &vec![0.0; n], n, k).unwrap();
                let mut out = vec![0; m * n];
                packed.matmul_i32(&vec![activation; m * k], m, &mut out).unwrap();
                let expected = i32::from(activation) * (weight as i32 * 127) * k as i32;
                assert!(out.iter().all(|&dot| dot == expected), "{isa} k {k}: {activation} * {weight}: {out:?}");
            }
        }
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let pack = |weight: &[f32], bias: &[f32], rows, cols| PackedInt8::pack(Isa::best(), weight, bias, rows, cols);
    assert!(matches!(pack(&[0.0; 5], &[0.0; 2], 2, 3), Err(KernelError::Length { expected: 6, got: 5, .. })));
    assert!(matches!(pack(&[0.0; 6], &[0.0; 1], 2, 3), Err(KernelError::Length { expected: 2, got: 1, .. })));
    assert!(matches!(pack(&[f32::INFINITY], &[0.0], 1, 1), Err(KernelError::NotFinite { .. })));
    assert!(matches!(pack(&[1.0], &[f32::NAN], 1, 1), Err(KernelError::NotFinite { .. })));
    assert!(matches!(pack(&[], &[], 0, MAX_COLS + 1), Err(KernelError::InnerDimension { .. })));
}
