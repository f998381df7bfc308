use proptest::prelude::*;

use super::*;

/// Steps of a 16-bit lane before any kernel widens, and past it: 256 k for AVX2, 512 k for NEON.
const LONG_COLS: [usize; 6] = [255, 256, 257, 511, 513, 1100];

const STORAGES: [TernaryStorage; 2] =
    [TernaryStorage { five_trits: false, half_scales: false }, TernaryStorage { five_trits: true, half_scales: true }];

fn product(isa: Isa, storage: TernaryStorage, codes: &[i8], lhs: &[i8], [m, n, k]: [usize; 3]) -> Vec<i32> {
    let packed = PackedTernary::pack(isa, storage, codes, &vec![1.0; n], [n, k]).unwrap();
    let mut out = vec![i32::MIN; m * n];
    packed.matmul_i32(lhs, m, &mut out).unwrap();
    out
}

fn definition(codes: &[i8], lhs: &[i8], m: usize, n: usize, k: usize) -> Vec<i32> {
    let mut out = vec![0; m * n];
    scalar::gemm_i8(lhs, codes, k, &mut out);
    out
}

fn sizes() -> impl Strategy<Value = (usize, usize, usize)> {
    let columns = prop_oneof![8 => 0usize..=70, 2 => 250usize..=280, 2 => 500usize..=560, 1 => 1010usize..=1100];
    (prop_oneof![8 => 0usize..=35, 1 => 60usize..=70, 1 => 125usize..=140], 0usize..=82, columns)
}

proptest! {
    #[test]
    fn every_isa_equals_the_definition(
        (m, n, k) in sizes(),
        seed in any::<u64>(),
    ) {
        use rand::{Rng, SeedableRng};
        let mut rng = rand::rngs::SmallRng::seed_from_u64(seed);
        let codes: Vec<i8> = (0..n * k).map(|_| rng.random_range(-1..=1)).collect();
        let lhs: Vec<i8> = (0..m * k).map(|_| rng.random_range(-128..=127)).collect();
        let expected = definition(&codes, &lhs, m, n, k);
        for (isa, storage) in Isa::available().flat_map(|isa| STORAGES.map(|storage| (isa, storage))) {
            let got = product(isa, storage, &codes, &lhs, [m, n, k]);
            prop_assert_eq!(&got, &expected, "{} {:?} {}x{}x{}", isa, storage, m, n, k);
        }
    }

    #[test]
    fn unpacking_undoes_packing((_, n, k) in sizes(), seed in any::<u64>()) {
        use rand::{Rng, SeedableRng};
        let mut rng = rand::rngs::SmallRng::seed_from_u64(seed);
        let codes: Vec<i8> = (0..n * k).map(|_| rng.random_range(-1..=1)).collect();
        for storage in STORAGES {
            let packed = PackedTernary::pack(Isa::SCALAR, storage, &codes, &vec![0.5; n], [n, k]).unwrap();
            prop_assert_eq!(packed.unpack(), &codes[..]);
            prop_assert_eq!(packed.codes_bytes(), storage.codes_bytes(n, k));
            prop_assert_eq!(packed.scales_bytes(), storage.scales_bytes(n));
        }
    }
}

#[test]
fn extreme_values_do_not_saturate_past_any_widening_interval() {
    for (isa, storage) in Isa::available().flat_map(|isa| STORAGES.map(|storage| (isa, storage))) {
        for k in LONG_COLS {
            for (activation, weight) in [(127, 1), (127, -1), (-127, 1), (-127, -1), (-128, 1), (-128, -1), (127, 0)] {
                let (m, n) = (5, 18);
                let out = product(isa, storage, &vec![weight; n * k], &vec![activation; m * k], [m, n, k]);
                let expected = i32::from(activation) * i32::from(weight) * k as i32;
                assert!(out.iter().all(|&dot| dot == expected), "{isa} k {k}: {activation} * {weight}");
            }
        }
    }
}

#[test]
fn scaled_products_are_the_same_floats_on_every_isa() {
    let (m, n, k) = (33, 37, 300);
    let codes: Vec<i8> = (0..n * k).map(|i| (i * 7 % 3) as i8 - 1).collect();
    let lhs: Vec<i8> = (0..m * k).map(|i| (i * 31 % 255) as u8 as i8).collect();
    // Values that half precision has, too.
    let scale: Vec<f32> = (0..n).map(|i| (i + 5) as f32 / 1024.0).collect();
    let steps: Vec<f32> = (0..m).map(|i| 0.02 + i as f32 * 0.001).collect();
    let dots = definition(&codes, &lhs, m, n, k);
    let expected: Vec<f32> =
        dots.iter().enumerate().map(|(i, &dot)| dot as f32 * steps[i / n] * scale[i % n]).collect();
    for (isa, storage) in Isa::available().flat_map(|isa| STORAGES.map(|storage| (isa, storage))) {
        let packed = PackedTernary::pack(isa, storage, &codes, &scale, [n, k]).unwrap();
        let mut out = vec![f32::NAN; m * n];
        packed.matmul(&lhs, &steps, &mut out).unwrap();
        assert_eq!(out, expected, "{isa} {storage:?}");
        let doubled: Vec<f32> = scale.iter().map(|scale| 2.0 * scale).collect();
        packed.with_scale(&doubled).unwrap().matmul(&lhs, &steps, &mut out).unwrap();
        assert!(out.iter().zip(&expected).all(|(got, expected)| *got == 2.0 * expected), "{isa} {storage:?}");
    }
}

#[test]
fn rows_in_a_batch_equal_the_same_rows_alone() {
    let (n, k) = (40, 100);
    let codes: Vec<i8> = (0..n * k).map(|i| (i * 5 % 3) as i8 - 1).collect();
    let lhs: Vec<i8> = (0..50 * k).map(|i| (i * 17 % 251) as u8 as i8).collect();
    for (isa, storage) in Isa::available().flat_map(|isa| STORAGES.map(|storage| (isa, storage))) {
        let all = product(isa, storage, &codes, &lhs, [50, n, k]);
        for (row, expected) in lhs.chunks(k).zip(all.chunks(n)) {
            assert_eq!(product(isa, storage, &codes, row, [1, n, k]), expected, "{isa}");
        }
    }
}

#[test]
fn two_bits_or_a_fifth_of_a_byte_a_weight_in_memory() {
    let bytes = |storage| {
        let packed = PackedTernary::pack(Isa::best(), storage, &[1; 1024 * 256], &[1.0; 1024], [1024, 256]).unwrap();
        (packed.codes_bytes(), packed.scales_bytes())
    };
    assert_eq!(bytes(STORAGES[0]), (1024 * 256 / 4, 1024 * 4));
    // 52,428.8, in whole groups of 64 bytes.
    assert_eq!(bytes(STORAGES[1]), (820 * 64, 1024 * 2));
}

#[test]
fn what_does_not_fit_is_refused() {
    let pack = |codes: &[i8], scale: &[f32], rows, cols| {
        PackedTernary::pack(Isa::best(), STORAGES[1], codes, scale, [rows, cols])
    };
    assert!(matches!(pack(&[0; 5], &[1.0; 2], 2, 3), Err(KernelError::Length { expected: 6, got: 5, .. })));
    assert!(matches!(pack(&[0; 6], &[1.0; 3], 2, 3), Err(KernelError::Length { expected: 2, got: 3, .. })));
    assert!(matches!(pack(&[0, 2], &[1.0], 1, 2), Err(KernelError::NotTernary { index: 1, value: 2 })));
    assert!(matches!(pack(&[0], &[f32::NAN], 1, 1), Err(KernelError::NotFinite { .. })));
    assert!(matches!(pack(&[], &[], 0, MAX_COLS + 1), Err(KernelError::InnerDimension { .. })));
    assert!(matches!(pack(&[0], &[0.1], 1, 1), Err(KernelError::NotHalf { index: 0, .. })));
    let packed = pack(&[0; 6], &[1.0; 2], 2, 3).unwrap();
    assert!(packed.with_scale(&[1.0; 3]).is_err() && packed.with_scale(&[0.1; 2]).is_err());
    assert!(packed.matmul(&[0; 5], &[1.0; 2], &mut [0.0; 4]).is_err());
    assert!(packed.matmul(&[0; 6], &[1.0; 2], &mut [0.0; 5]).is_err());
    assert!(packed.matmul(&[], &[], &mut []).is_ok());
}
