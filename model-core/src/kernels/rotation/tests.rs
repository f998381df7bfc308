use proptest::prelude::*;

use super::angles::SINCOS_ERROR;
use super::*;
use crate::kernels::Isa;
use crate::kernels::activation::gelu;

fn codes(bits: u32, count: usize, seed: u64) -> Vec<u16> {
    (0..count as u64).map(|n| (splitmix64(seed, n) >> (64 - bits)) as u16).collect()
}

fn radians(codes: &[u16], bits: u32) -> Vec<f32> {
    codes.iter().map(|&code| f32::from(code) * (std::f32::consts::TAU / (1u32 << bits) as f32)).collect()
}

#[test]
fn lane_order_is_a_permutation_that_undoes_itself() {
    for features in [0, 1, 2, 7, 8, 16, 24, 32, 48, 128, 192, 256, 768, 1024] {
        let order = LaneOrder::new(features);
        let mut positions: Vec<_> = (0..features).map(|j| order.position(j)).collect();
        assert!(positions.iter().enumerate().all(|(j, &p)| order.feature(p) == j), "{features} features");
        let row: Vec<f32> = (0..features).map(|j| j as f32).collect();
        for isa in Isa::available() {
            let mut ordered = vec![f32::NAN; features];
            order.permute_row(isa, &row, &mut ordered);
            assert_eq!(ordered, order.permute_columns(&row), "{isa}, {features} features");
        }
        positions.sort_unstable();
        assert!(positions.into_iter().eq(0..features), "{features} features");
    }
}

#[test]
fn first_stages_pair_whole_registers() {
    let strides =
        |features| (0..LaneOrder::new(features).max_stages()).map(move |l| LaneOrder::new(features).stride(l));
    assert!(strides(1024).eq([16, 32, 64, 128, 256, 512, 1, 2, 4, 8]));
    assert!(strides(192).eq([16, 32, 1, 2, 4, 8]));
    assert!(strides(24).eq([1, 2, 4]));
}

#[test]
fn angles_of_a_stage_move_to_their_positions() {
    for features in [2, 8, 16, 24, 32, 48, 128, 192, 256, 1024] {
        let order = LaneOrder::new(features);
        for stage in 0..order.max_stages() {
            let natural: Vec<usize> = (0..features / 2).collect();
            let mut ordered = vec![usize::MAX; features / 2];
            order.permute_angles(stage, &natural, &mut ordered);
            for pair in natural {
                assert_eq!(ordered[order.angle_position(stage, pair)], pair, "{features} features, stage {stage}");
            }
        }
    }
}

#[test]
fn every_code_decodes_within_its_bound() {
    for bits in [4, 6, 8, 16] {
        let all: Vec<u16> = (0..=u16::MAX >> (16 - bits)).collect();
        let order = LaneOrder::new(2 * all.len());
        let packed = PackedAngles::pack(order, &all, 1, 1, bits).unwrap();
        let mut out = Coefficients::new(&[order]);
        for isa in Isa::available() {
            packed.decode(isa, 0, &mut out);
            let mut worst = 0f64;
            for (pair, &code) in all.iter().enumerate() {
                let i = order.angle_position(0, pair);
                let (sin, cos) = (f64::from(code) * std::f64::consts::TAU / f64::from(1u32 << bits)).sin_cos();
                worst = worst.max((f64::from(out.sin[i]) - sin).abs()).max((f64::from(out.cos[i]) - cos).abs());
            }
            println!("{isa}, {bits} bits: sine and cosine within {worst:.2e}");
            assert!(worst <= f64::from(SINCOS_ERROR), "{isa}, {bits} bits: {worst:e}");
            if bits < 16 {
                // Tables are exact where the angle is; the polynomial rounds there too.
                let zero = order.angle_position(0, 0);
                assert_eq!((out.cos[zero], out.sin[zero]), (1.0, 0.0), "{isa}, {bits} bits");
            }
        }
    }
}

proptest! {
    /// Every instruction set, bit width and shape against the definition, within the bound of [`rotate`] (twice:
    /// the definition rounds too).
    #[test]
    fn rotation_equals_the_definition(
        odd in 1usize..6, power in 1usize..9, bits in prop::sample::select(vec![4u32, 6, 8, 16]),
        stage_share in 0usize..=8, rows in 0usize..7, seed: u64,
    ) {
        let features = odd << power;
        let order = LaneOrder::new(features);
        let (stages, experts) = (order.max_stages() * stage_share / 8, 3);
        let codes = codes(bits, experts * stages * features / 2, seed);
        let packed = PackedAngles::pack(order, &codes, experts, stages, bits).unwrap();
        let mut out = Coefficients::new(&[order]);
        // The same property of angles from a seed, whatever share of their bits is random.
        let (codes, packed) = if seed.is_multiple_of(2) {
            let drawn = SeededAngles::new(seed, 1, 2, bits, 1 + (seed >> 32) as u32 % bits);
            (drawn.codes(experts, stages, features / 2), PackedAngles::seeded(order, drawn, stages).unwrap())
        } else {
            (codes, packed)
        };
        let expert = (seed % 3) as usize;
        let angles = radians(&codes[expert * stages * features / 2..][..stages * features / 2], bits);
        for isa in Isa::available() {
            packed.decode(isa, expert, &mut out);
            let x: Vec<f32> = (0..rows * features).map(|i| ((i * 37 + 11) % 101) as f32 / 50.0 - 1.0).collect();
            let mut fast = order.permute_columns(&x);
            rotate(isa, &out, &mut fast);
            for then in [Then::Nothing, Then::Gelu] {
                let (mut expected, mut joined) = (fast.clone(), order.permute_columns(&x));
                if then == Then::Gelu {
                    gelu(isa, &mut expected);
                }
                rotate_by(isa, &packed, expert, then, &mut Coefficients::new(&[order]), &mut joined);
                prop_assert_eq!(joined, expected, "{}, {:?}", isa, then);
            }
            for (fast, x) in fast.chunks_exact(features).zip(x.chunks_exact(features)) {
                let mut slow = x.to_vec();
                if stages > 0 {
                    scalar::rotate(&mut slow, &angles);
                }
                let norm = x.iter().map(|v| v * v).sum::<f32>().sqrt();
                // Beside the roundings of both, the definition rounds angles of up to a turn to f32.
                let per_stage = 2.0 * (2.0 * SINCOS_ERROR + 2.0 * f32::EPSILON) + std::f32::consts::TAU * f32::EPSILON;
                let bound = stages as f32 * per_stage * norm;
                for (j, slow) in slow.iter().enumerate() {
                    let fast = fast[order.position(j)];
                    prop_assert!((fast - slow).abs() <= bound, "{isa}, feature {j}: {fast} is not {slow}");
                }
            }
        }
    }
}
