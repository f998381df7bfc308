//! Every kernel on every instruction set of this CPU, at the shapes of the presets `paper` and `cifar` for one image.
//!
//! `cargo bench -p model-core --bench kernels` measures; `cargo test` runs each once. Names are
//! `kernel/shape/instruction set`, so `-- ternary` or `-- avx2` picks some. Throughput counts multiply-accumulates for
//! products (`Melem/s`) and values for the rest.

use std::hint::black_box;

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use model_core::config::ViTConfig;
use model_core::kernels::activation::gelu;
use model_core::kernels::gemm::bf16::{Mat, Scratch, Write, matmul};
use model_core::kernels::isa::Bf16;
use model_core::kernels::norm::layer_norm;
use model_core::kernels::rotation::{Coefficients, rotate};
use model_core::kernels::softmax::softmax;
use model_core::kernels::{
    Isa, LaneOrder, PackedAngles, PackedDepthwise, PackedF32, PackedInt8, PackedPointwise, PackedTernary, Requantize,
    TernaryStorage, depthwise, quantize_rows,
};

/// The sizes that kernels see in one image of a preset.
struct Shape {
    name: &'static str,
    d_model: usize,
    d_ff: usize,
    tokens: usize,
    /// Rows of `up`: a token for each of its experts.
    rows: usize,
    num_heads: usize,
    stages_hidden: usize,
    angle_bits: u32,
}

fn shapes() -> Vec<Shape> {
    let shape = |name| {
        let config = ViTConfig::preset(name).expect("a preset");
        let (backbone, experts) = (&config.backbone, &config.experts);
        Shape {
            name,
            d_model: backbone.d_model,
            d_ff: backbone.d_ff,
            tokens: backbone.num_tokens(),
            rows: backbone.num_tokens() * experts.top_k,
            num_heads: backbone.num_heads,
            stages_hidden: experts.stages_hidden,
            angle_bits: experts.angle_bits,
        }
    };
    ["paper", "cifar"].map(shape).into()
}

fn values(count: usize) -> Vec<f32> {
    (0..count).map(|i| (i * 7919 % 401) as f32 / 100.0 - 2.0).collect()
}

/// From -127 to 127: the code -128 is no weight.
fn codes(count: usize) -> Vec<i8> {
    (0..count).map(|i| ((i * 31 % 255) as i16 - 127) as i8).collect()
}

/// Times `work` for every instruction set; `prepare` packs for it.
fn every_isa<T>(
    group: &mut BenchmarkGroup<'_, WallTime>,
    shape: impl Into<String>,
    elements: usize,
    prepare: impl Fn(Isa) -> T,
    mut work: impl FnMut(Isa, &mut T),
) {
    let shape = shape.into();
    group.throughput(Throughput::Elements(elements as u64));
    for isa in Isa::available() {
        let mut prepared = prepare(isa);
        group.bench_function(BenchmarkId::new(&shape, isa), |bencher| {
            bencher.iter(|| work(isa, black_box(&mut prepared)))
        });
    }
}

fn ternary(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("ternary");
    let storages =
        [("", TernaryStorage::default()), (" five trits", TernaryStorage { five_trits: true, half_scales: true })];
    for Shape { name, d_model, d_ff, tokens, rows, .. } in shapes() {
        let products = [("up", rows, d_ff, d_model), ("down", tokens, d_model, d_ff)];
        for ((which, m, n, k), (how, storage)) in products.into_iter().flat_map(|p| storages.map(|s| (p, s))) {
            let weights: Vec<_> = (0..n * k).map(|i| (i * 7 % 3) as i8 - 1).collect();
            let (lhs, steps, mut out) = (codes(m * k), vec![0.01; m], vec![0.0; m * n]);
            let pack =
                |isa| PackedTernary::pack(isa, storage, &weights, &vec![0.125; n], [n, k]).expect("valid weights");
            every_isa(&mut group, format!("{name} {which}{how}"), m * n * k, pack, |_, packed| {
                packed.matmul(&lhs, &steps, &mut out).expect("the shapes fit");
            });
        }
    }
}

fn int8(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("int8");
    for Shape { name, d_model, tokens: m, .. } in shapes() {
        let (n, k) = (3 * d_model, d_model);
        let (weights, bias) = (values(n * k), values(n));
        let (lhs, steps, mut out) = (codes(m * k), vec![0.01; m], vec![0.0; m * n]);
        let pack = |isa| PackedInt8::pack(isa, &weights, &bias, n, k).expect("valid weights");
        every_isa(&mut group, format!("{name} qkv"), m * n * k, pack, |_, packed| {
            packed.matmul(&lhs, &steps, &mut out).expect("the shapes fit");
        });
    }
}

/// The widest layers of EfficientNet-Lite0 at 192 pixels, each way of convolving one.
fn convolutions(criterion: &mut Criterion) {
    let requantize = |n| Requantize::new(&vec![1e-3; n], &vec![0.5; n], (-128.0, 127.0), 0.0).expect("finite numbers");
    let mut group = criterion.benchmark_group("pointwise");
    for (side, k, n) in [(96, 16, 96), (24, 40, 240), (12, 112, 672), (6, 1152, 192)] {
        let m = side * side;
        let (weights, lhs, mut out) = (codes(n * k), codes(m * k), vec![0; m * n]);
        let pack = |isa| PackedPointwise::pack(isa, &weights, k, requantize(n)).expect("valid weights");
        every_isa(&mut group, format!("{side}x{side} {k} to {n}"), m * n * k, pack, |_, packed| {
            packed.forward(&lhs, m, None, &mut out).expect("the shapes fit");
        });
    }
    group.finish();

    let mut group = criterion.benchmark_group("depthwise");
    for (side, channels, kernel) in [(48, 144, 3), (12, 672, 5)] {
        let shape = depthwise::Shape { channels, kernel, stride: 1, top: kernel / 2, left: kernel / 2 };
        let (weights, plane) = (codes(channels * kernel * kernel), codes(side * side * channels));
        let input = depthwise::Input { codes: &plane, width: side, zero: -3 };
        let mut scratch = vec![0; PackedDepthwise::scratch_bytes(&shape, side)];
        let mut out = vec![0; side * channels];
        let pack = |isa| PackedDepthwise::pack(isa, &weights, shape, requantize(channels)).expect("valid weights");
        let name = format!("{side}x{side}x{channels} by {kernel}x{kernel}");
        every_isa(&mut group, name, plane.len() * kernel * kernel, pack, |_, packed| {
            for row in 0..side {
                packed.forward_row(input, row, None, &mut scratch, &mut out).expect("the shapes fit");
            }
        });
    }
    group.finish();
}

fn dense(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("dense f32");
    for Shape { name, d_model, tokens: m, num_heads, .. } in shapes() {
        let (n, k) = (m, d_model / num_heads);
        let (weights, lhs, mut out) = (values(n * k), values(m * k), vec![0.0; m * n]);
        let pack = |isa| PackedF32::pack(isa, &weights, &vec![0.0; n], n, k).expect("valid weights");
        every_isa(&mut group, format!("{name} scores"), m * n * k, pack, |_, packed| {
            packed.matmul(&lhs, &mut out).expect("the shapes fit");
        });
    }
}

fn rotation(criterion: &mut Criterion) {
    for Shape { name, d_ff, stages_hidden: stages, angle_bits, .. } in shapes() {
        let order = LaneOrder::new(d_ff);
        let angles = stages * d_ff / 2;
        let codes: Vec<_> = (0..angles).map(|i| (i * 7919 % (1 << angle_bits)) as u16).collect();
        let packed = PackedAngles::pack(order, &codes, 1, stages, angle_bits).expect("valid codes");
        let site = format!("{name} hidden");
        let mut group = criterion.benchmark_group("rotation decode");
        every_isa(&mut group, &site, angles, |_| Coefficients::new(&[order]), |isa, out| packed.decode(isa, 0, out));
        group.finish();

        // Two rows: what an expert gets on average with 64 experts, 64 tokens and top-2.
        let mut coefficients = Coefficients::new(&[order]);
        packed.decode(Isa::best(), 0, &mut coefficients);
        let mut group = criterion.benchmark_group("rotation apply");
        every_isa(&mut group, &site, 2 * d_ff, |_| values(2 * d_ff), |isa, x| rotate(isa, &coefficients, x));
        group.finish();
    }
}

fn elementwise(criterion: &mut Criterion) {
    for Shape { name, d_model, d_ff, tokens, rows, num_heads, .. } in shapes() {
        let mut group = criterion.benchmark_group("gelu");
        let x = values(rows * d_ff);
        every_isa(
            &mut group,
            name,
            x.len(),
            |_| x.clone(),
            |isa, y| {
                // From the same values every time: gelu of gelu of ... tends to zero, and its times to those of subnormals.
                y.copy_from_slice(&x);
                gelu(isa, y);
            },
        );
        group.finish();

        let mut group = criterion.benchmark_group("quantize");
        let (x, mut steps) = (values(tokens * d_ff), vec![0.0; tokens]);
        every_isa(
            &mut group,
            name,
            x.len(),
            |_| vec![0; x.len()],
            |isa, codes| {
                quantize_rows(isa, &x, d_ff, codes, &mut steps).expect("the shapes fit");
            },
        );
        group.finish();

        let mut group = criterion.benchmark_group("layer norm");
        let (x, gamma, beta) = (values(tokens * d_model), values(d_model), values(d_model));
        every_isa(&mut group, name, x.len(), |_| x.clone(), |isa, out| layer_norm(isa, &x, &gamma, &beta, 1e-6, out));
        group.finish();

        let mut group = criterion.benchmark_group("softmax");
        let x = values(num_heads * tokens * tokens);
        every_isa(
            &mut group,
            name,
            x.len(),
            |_| x.clone(),
            |isa, y| {
                y.copy_from_slice(&x);
                softmax(isa, y, tokens, tokens, 0.2);
            },
        );
        group.finish();
    }
}

/// Training's product, both factors packed each time, on a CPU that multiplies bf16.
fn bf16(criterion: &mut Criterion) {
    let Some(bf16) = Bf16::detect() else { return };
    let mut group = criterion.benchmark_group("bf16");
    for Shape { name, d_model, d_ff, tokens, .. } in shapes() {
        let (m, n, k) = (16 * tokens, d_ff, d_model);
        let (lhs, rhs, mut out) = (values(m * k), values(n * k), vec![0.0; m * n]);
        let (lhs, rhs) = (Mat::new(&lhs, m, k), Mat::new(&rhs, n, k).t());
        let mut scratch = Scratch::default();
        group.throughput(Throughput::Elements((m * n * k) as u64));
        group.bench_function(name, |bencher| {
            bencher.iter(|| matmul(bf16, lhs, rhs, 1.0, black_box(&mut out), n, Write::Set, &mut scratch))
        });
    }
}

criterion_group!(kernels, bf16, ternary, int8, convolutions, dense, rotation, elementwise);
criterion_main!(kernels);
