use proptest::prelude::*;
use rand::{Rng, SeedableRng, rngs::SmallRng};

use super::*;
use crate::kernels::requantize::tests::any_requantize;

fn codes(rng: &mut SmallRng, len: usize, lowest: i8) -> Vec<i8> {
    (0..len).map(|_| rng.random_range(lowest..=127)).collect()
}

/// A whole output of `[height, width]` by one instruction set.
fn forward(
    packed: &PackedDepthwise,
    input: Input<'_>,
    (height, width): (usize, usize),
    added: Option<&[i8]>,
) -> Vec<i8> {
    let row_len = width * packed.shape().channels;
    let mut out = vec![99; height * row_len];
    // What is left in scratch by others must not matter.
    let mut scratch = vec![0x5a; PackedDepthwise::scratch_bytes(packed.shape(), width) + 3];
    for (row, out) in out.chunks_exact_mut(row_len).enumerate() {
        let added = added.map(|added| &added[row * row_len..][..row_len]);
        packed.forward_row(input, row, added, &mut scratch, out).unwrap();
    }
    out
}

proptest! {
    /// All strides and paddings, those that reach beyond every edge included.
    #[test]
    fn every_isa_equals_the_definition(
        channels in 1usize..=37,
        kernel in prop_oneof![3 => Just(3usize), 3 => Just(5usize), 1 => 1usize..=9],
        stride in 1usize..=3,
        (top, left) in (0usize..=4, 0usize..=4),
        (input_height, input_width) in (1usize..=9, 1usize..=40),
        (height, width) in (1usize..=4, 1usize..=40),
        residual in any::<bool>(),
        seed in any::<u64>(),
    ) {
        let mut rng = SmallRng::seed_from_u64(seed);
        let shape = Shape { channels, kernel, stride, top, left };
        let weights = codes(&mut rng, channels * kernel * kernel, -127);
        let plane = codes(&mut rng, input_height * input_width * channels, -128);
        let added = residual.then(|| codes(&mut rng, height * width * channels, -128));
        let input = Input { codes: &plane, width: input_width, zero: rng.random_range(-128..=127) };
        let requantize = any_requantize(&mut rng, channels, kernel * kernel);
        let run = |isa| {
            let packed = PackedDepthwise::pack(isa, &weights, shape, requantize.clone()).unwrap();
            forward(&packed, input, (height, width), added.as_deref())
        };
        let expected = run(Isa::SCALAR);
        for isa in Isa::available() {
            prop_assert_eq!(&run(isa), &expected, "{} {:?}", isa, shape);
        }
    }
}

/// The definition itself, against sums written out: a 3x3 window of ones at a corner of a plane of 1, 2, 3 ...
#[test]
fn a_window_of_ones_sums_its_neighbourhood() {
    let shape = Shape { channels: 1, kernel: 3, stride: 1, top: 1, left: 1 };
    let requantize = Requantize::new(&[1.0], &[0.0], (f32::NEG_INFINITY, f32::INFINITY), 0.0).unwrap();
    let plane = [1, 2, 3, 4, 5, 6, 7, 8, 9];
    for isa in Isa::available() {
        let packed = PackedDepthwise::pack(isa, &[1; 9], shape, requantize.clone()).unwrap();
        let out = forward(&packed, Input { codes: &plane, width: 3, zero: 0 }, (3, 3), None);
        assert_eq!(out, [12, 21, 16, 27, 45, 33, 24, 39, 28], "{isa}");
        // Five neighbours of a corner lie outside.
        let out = forward(&packed, Input { codes: &plane, width: 3, zero: 10 }, (1, 1), None);
        assert_eq!(out, [12 + 5 * 10], "{isa}");
    }
}

#[test]
fn extreme_values_neither_saturate_nor_overflow() {
    for isa in Isa::available() {
        for kernel in [3, 5, MAX_KERNEL] {
            for (code, weight) in [(127, 127), (-128, 127), (127, -127), (-128, -127)] {
                let shape = Shape { channels: 17, kernel, stride: 1, top: 0, left: 0 };
                let dot = i32::from(code) * i32::from(weight) * (kernel * kernel) as i32;
                let scale = 100.0 / dot as f32;
                let requantize =
                    Requantize::new(&[scale; 17], &[0.0; 17], (f32::NEG_INFINITY, f32::INFINITY), 0.0).unwrap();
                let weights = vec![weight; 17 * kernel * kernel];
                let packed = PackedDepthwise::pack(isa, &weights, shape, requantize).unwrap();
                let plane = vec![code; 17 * kernel * (kernel + 2)];
                let input = Input { codes: &plane, width: kernel + 2, zero: 0 };
                assert_eq!(forward(&packed, input, (1, 3), None), [100; 51], "{isa} {kernel}: {code} * {weight}");
            }
        }
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let shape = Shape { channels: 2, kernel: 3, stride: 1, top: 1, left: 1 };
    let requantize = |n| Requantize::new(&vec![1.0; n], &vec![0.0; n], (-128.0, 127.0), 0.0).unwrap();
    let pack = |codes: &[i8], shape, n| PackedDepthwise::pack(Isa::best(), codes, shape, requantize(n));
    assert!(matches!(pack(&[0; 17], shape, 2), Err(KernelError::Length { expected: 18, got: 17, .. })));
    assert!(matches!(pack(&[0; 18], shape, 3), Err(KernelError::Length { expected: 2, got: 3, .. })));
    assert!(matches!(pack(&[-128; 18], shape, 2), Err(KernelError::Code { index: 0, .. })));
    assert!(matches!(pack(&[], Shape { kernel: 65, ..shape }, 2), Err(KernelError::InnerDimension { .. })));
    for isa in Isa::available() {
        let packed = PackedDepthwise::pack(isa, &[1; 18], shape, requantize(2)).unwrap();
        let scratch_bytes = PackedDepthwise::scratch_bytes(&shape, 4);
        let run = |input_len, added: Option<&[i8]>, scratch, out_len| {
            let input = Input { codes: &[1; 64][..input_len], width: 4, zero: 0 };
            packed.forward_row(input, 0, added, &mut vec![0; scratch], &mut vec![0; out_len])
        };
        assert!(run(16, None, scratch_bytes, 8).is_ok());
        assert!(run(15, None, scratch_bytes, 8).is_err());
        assert!(run(16, Some(&[0; 7]), scratch_bytes, 8).is_err());
        assert!(run(16, None, scratch_bytes - 1, 8).is_err());
        assert!(run(16, None, scratch_bytes, 7).is_err());
    }
}
