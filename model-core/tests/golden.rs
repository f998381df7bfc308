//! Kernels and the engine's layer against golden vectors. The routing losses are checked by the crate `training`.

#[path = "common/golden.rs"]
mod golden;

use golden::{Golden, for_each_file};
use model_core::config::{BackboneShape, ExpertConfig, FloatFormat, SubstrateConfig};
use model_core::engine::MoeLayer as EngineLayer;
use model_core::kernels::activation::{gelu, gelu_scalar};
use model_core::kernels::gemm::scalar as definition;
use model_core::kernels::rotation::{Coefficients, rotate, scalar as rotation};
use model_core::kernels::router::top_k;
use model_core::kernels::{Isa, LaneOrder, PackedAngles, PackedTernary, TernaryStorage, quantize_rows};
use model_core::weights::{AngleCodes, ExpertLayerWeights, Ternary};

/// Relative L2 error of every row.
fn row_errors(got: &[f32], expected: &[f32], cols: usize) -> Vec<f32> {
    let norm = |row: &mut dyn Iterator<Item = f32>| row.map(|v| v * v).sum::<f32>().sqrt();
    let rows = got.chunks_exact(cols).zip(expected.chunks_exact(cols));
    rows.map(|(a, b)| norm(&mut a.iter().zip(b).map(|(a, b)| a - b)) / norm(&mut b.iter().copied())).collect()
}

fn largest(values: Vec<f32>) -> f32 {
    values.into_iter().fold(0.0, f32::max)
}

#[test]
fn golden_vectors_are_reproduced() {
    println!("kernels tested: {}", Isa::available().map(Isa::name).collect::<Vec<_>>().join(", "));
    for_each_file(|golden| match golden.spec["kind"].as_str() {
        Some("rotation") => check_rotation(golden),
        Some("ternary") => check_ternary(golden),
        Some("moe_layer") => check_moe_layer(golden),
        // A loss of training alone.
        Some("smoothness") => {}
        kind => panic!("{}: unknown kind {kind:?}", golden.name),
    });
}

fn angle_codes(angles: &[f32]) -> Vec<u16> {
    let code = |angle: &f32| (f64::from(*angle) * 65536.0 / std::f64::consts::TAU).round() as i64;
    angles.iter().map(|angle| code(angle).rem_euclid(65536) as u16).collect()
}

/// Rounding an angle to 16 bits turns a pair by at most pi / 65536, so a row moves by at most that share of its norm per
/// stage; the decoding adds 1e-6 per stage.
const ANGLE_ROUNDING: f32 = std::f32::consts::PI / 65536.0 + 1e-6;

fn check_rotation(golden: &Golden<'_>) {
    let (features, stages) = (golden.size("features"), golden.size("stages"));
    let (x, angles) = (golden.f32("x"), golden.f32("angles"));
    let (mut y, mut transposed) = (x.clone(), x.clone());
    for (y, transposed) in y.chunks_exact_mut(features).zip(transposed.chunks_exact_mut(features)) {
        rotation::rotate(y, &angles);
        rotation::rotate_transpose(transposed, &angles);
    }
    golden.assert_close("y", &y, &golden.f32("y"));
    golden.assert_close("y_transpose", &transposed, &golden.f32("y_transpose"));

    let order = LaneOrder::new(features);
    let packed = PackedAngles::pack(order, &angle_codes(&angles), 1, stages, 16).unwrap();
    let mut coefficients = Coefficients::new(&[order]);
    let expected = order.permute_columns(&golden.f32("y"));
    for isa in Isa::available() {
        packed.decode(isa, 0, &mut coefficients);
        let mut y = order.permute_columns(&x);
        rotate(isa, &coefficients, &mut y);
        let error = largest(row_errors(&y, &expected, features));
        assert!(error <= stages as f32 * ANGLE_ROUNDING, "{}, {isa}: {error}", golden.name);
    }
}

fn check_ternary(golden: &Golden<'_>) {
    let (rows, cols) = (golden.size("rows"), golden.size("cols"));
    let (codes, scale) = definition::ternarize(&golden.f32("w"), cols);
    assert_eq!(codes, golden.i8("q"), "{}: codes", golden.name);
    golden.assert_close("scale", &scale, &golden.f32("scale"));

    let x = golden.f32("x");
    let m = x.len() / cols;
    let mut y = vec![0.0; m * rows];
    definition::gemm_f32(&x, &codes, &scale, cols, &mut y);
    golden.assert_close("y_f32", &y, &golden.f32("y_f32"));
    for isa in Isa::available() {
        let packed = PackedTernary::pack(isa, TernaryStorage::default(), &codes, &scale, [rows, cols]).unwrap();
        let (mut quantized, mut steps) = (vec![0; x.len()], vec![0.0; m]);
        quantize_rows(isa, &x, cols, &mut quantized, &mut steps).unwrap();
        packed.matmul(&quantized, &steps, &mut y).unwrap();
        golden.assert_close("y_int8", &y, &golden.f32("y_int8"));
    }
}

/// The tensors of a `moe_layer` file.
struct MoeLayer {
    d_model: usize,
    d_ff: usize,
    experts: usize,
    top_k: usize,
    stages: [usize; 3],
    x: Vec<f32>,
    gate: Vec<f32>,
    up: Ternary,
    down: Ternary,
    /// In, hidden, out.
    angles: [Vec<f32>; 3],
}

impl MoeLayer {
    fn new(golden: &Golden<'_>) -> Self {
        let stages = ["stages_in", "stages_hidden", "stages_out"].map(|key| golden.size(key));
        let ternary =
            |name: &str| Ternary { codes: golden.i8(name).into(), scale: golden.f32(&format!("{name}_scale")) };
        let out = if stages[2] > 0 { golden.f32("rotation_out") } else { Vec::new() };
        Self {
            d_model: golden.size("d_model"),
            d_ff: golden.size("d_ff"),
            experts: golden.size("experts"),
            top_k: golden.size("top_k"),
            stages,
            x: golden.f32("x"),
            gate: golden.f32("gate"),
            up: ternary("up"),
            down: ternary("down"),
            angles: [golden.f32("rotation_in"), golden.f32("rotation_hidden"), out],
        }
    }

    fn rotate(&self, site: usize, expert: usize, row: &mut [f32]) {
        let len = self.stages[site] * row.len() / 2;
        if len > 0 {
            rotation::rotate(row, &self.angles[site][expert * len..][..len]);
        }
    }

    fn substrate(&self, x: &[f32], matrix: &Ternary, int8: bool) -> Vec<f32> {
        let mut y = vec![0.0; matrix.scale.len()];
        if !int8 {
            definition::gemm_f32(x, &matrix.codes, &matrix.scale, x.len(), &mut y);
            return y;
        }
        let (mut codes, mut dots) = (vec![0; x.len()], vec![0; y.len()]);
        let step = definition::quantize_row(x, &mut codes);
        definition::gemm_i8(&codes, &matrix.codes, 1, x.len(), &mut dots);
        for ((y, dot), scale) in y.iter_mut().zip(dots).zip(&matrix.scale) {
            *y = dot as f32 * step * scale;
        }
        y
    }

    /// The definition, in the reference's order of quantisation.
    fn forward(&self, ids: &[u16], weights: &[f32], int8: bool) -> Vec<f32> {
        let mut y = vec![0.0; self.x.len()];
        for (slot, (&expert, weight)) in ids.iter().zip(weights).enumerate() {
            let (token, expert) = (slot / self.top_k, usize::from(expert));
            let mut u = self.x[token * self.d_model..][..self.d_model].to_vec();
            self.rotate(0, expert, &mut u);
            let mut h = self.substrate(&u, &self.up, int8);
            self.rotate(1, expert, &mut h);
            gelu_scalar(&mut h);
            let mut o = self.substrate(&h, &self.down, int8);
            self.rotate(2, expert, &mut o);
            for (y, o) in y[token * self.d_model..].iter_mut().zip(o) {
                *y += weight * o;
            }
        }
        y
    }

    /// `[tokens, experts]`.
    fn logits(&self) -> Vec<f32> {
        let mut logits = vec![0.0; self.x.len() / self.d_model * self.experts];
        for (x, logits) in self.x.chunks_exact(self.d_model).zip(logits.chunks_exact_mut(self.experts)) {
            for (gate, logit) in self.gate.chunks_exact(self.d_model).zip(logits) {
                *logit = gate.iter().zip(x).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>() as f32;
            }
        }
        logits
    }

    /// Which tokens choose the same experts whatever rounding the gate to 16 bits does: it moves a logit by at most
    /// half a step of the gate's row times the sum of magnitudes of x.
    fn clear_choices(&self) -> Vec<bool> {
        let step = self.gate.iter().fold(0f32, |m, v| m.max(v.abs())) / 32767.0;
        let rows = self.logits();
        let rows = rows.chunks_exact(self.experts).zip(self.x.chunks_exact(self.d_model));
        rows.map(|(logits, x)| {
            let mut logits = logits.to_vec();
            logits.sort_by(|a, b| b.total_cmp(a));
            let moved = step / 2.0 * x.iter().map(|v| v.abs()).sum::<f32>() + 1e-5;
            logits.windows(2).take(self.top_k).all(|pair| pair[0] - pair[1] > 2.0 * moved)
        })
        .collect()
    }

    fn route(&self) -> (Vec<u16>, Vec<f32>) {
        let tokens = self.x.len() / self.d_model;
        let (mut ids, mut weights) = (vec![0; tokens * self.top_k], vec![0.0; tokens * self.top_k]);
        let slots = ids.chunks_exact_mut(self.top_k).zip(weights.chunks_exact_mut(self.top_k));
        for (logits, (ids, weights)) in self.logits().chunks_exact(self.experts).zip(slots) {
            top_k(logits, ids, weights);
        }
        (ids, weights)
    }

    /// What the engine's layer adds to a residual of zeros, with angles and gate rounded to 16-bit codes; and
    /// what its router chose.
    fn engine(&self, isa: Isa, threads: usize) -> (Vec<f32>, Vec<u16>, Vec<f32>) {
        let config = ExpertConfig {
            num_experts: self.experts,
            top_k: self.top_k,
            stages_in: self.stages[0],
            stages_hidden: self.stages[1],
            stages_out: self.stages[2],
            angle_bits: 16,
            angle_seed: None,
            router_bits: 16,
            router_scales: FloatFormat::F32,
        };
        let gates = self.gate.chunks_exact(self.d_model);
        let scales: Vec<_> =
            gates.clone().map(|gate| gate.iter().fold(0f32, |m, v| m.max(v.abs())) / 32767.0).collect();
        let codes = gates.zip(&scales).flat_map(|(gate, scale)| gate.iter().map(move |v| (v / scale).round() as i16));
        let angles = |site: usize| AngleCodes { codes: angle_codes(&self.angles[site]) };
        let layer = ExpertLayerWeights {
            router: codes.collect(),
            router_scale: scales.clone(),
            rotation_in: angles(0),
            rotation_hidden: angles(1),
            rotation_out: angles(2),
        };
        let shape = BackboneShape {
            d_model: self.d_model,
            d_ff: self.d_ff,
            num_layers: 1,
            substrates: SubstrateConfig::default(),
        };
        let substrates = (&self.up, &self.down);
        let mut layer = EngineLayer::new(isa, &shape, substrates, (&layer, &config), &self.x, threads).unwrap();
        let mut y = vec![0.0; self.x.len()];
        layer.run(&mut y);
        let (ids, weights) = layer.choices();
        (y, ids.to_vec(), weights.to_vec())
    }
}

fn check_moe_layer(golden: &Golden<'_>) {
    let layer = MoeLayer::new(golden);
    let (ids, weights) = layer.route();
    let as_i32: Vec<_> = ids.iter().map(|&id| i32::from(id)).collect();
    assert_eq!(as_i32, golden.i32("expert_ids"), "{}: chosen experts", golden.name);
    golden.assert_close("expert_weights", &weights, &golden.f32("expert_weights"));

    golden.assert_close("y_f32", &layer.forward(&ids, &weights, false), &golden.f32("y_f32"));
    let error = largest(row_errors(&layer.forward(&ids, &weights, true), &golden.f32("y_int8"), layer.d_model));
    assert!(error < 1e-2, "{}: y_int8 is off by {error}", golden.name);

    // The engine rounds angles and gate to 16 bits, and quantises once per token where the reference does per expert.
    // Against the float answer it makes two quantisations. One has steps of max|row| / 127 and errors uniform in half a
    // step either way, so relative to the row's norm the error is (max|row| / rms) / (127 sqrt(12)) in the mean: below
    // 1% for a peak of 4.4 rms. After GELU, which leaves a few large values, the peak is at most twice that. Products
    // with a random substrate keep the ratio. Three standard deviations of both: 3 * sqrt(1% ^ 2 + 2% ^ 2) = 6.7%. A
    // wrong expert, angle or scale is off by more than half.
    let (clear, y_f32) = (layer.clear_choices(), golden.f32("y_f32"));
    for isa in Isa::available() {
        for threads in [1, 2] {
            let (y, engine_ids, engine_weights) = layer.engine(isa, threads);
            let (mut got, mut expected) = (Vec::new(), Vec::new());
            for token in (0..clear.len()).filter(|&token| clear[token]) {
                let slots = token * layer.top_k..(token + 1) * layer.top_k;
                assert_eq!(engine_ids[slots.clone()], ids[slots.clone()], "{}, {isa}: chosen experts", golden.name);
                for (got, expected) in engine_weights[slots.clone()].iter().zip(&weights[slots]) {
                    assert!((got - expected).abs() < 1e-3, "{}, {isa}: weight {got} is not {expected}", golden.name);
                }
                let row = token * layer.d_model..(token + 1) * layer.d_model;
                got.extend_from_slice(&y[row.clone()]);
                expected.extend_from_slice(&y_f32[row]);
            }
            let error = largest(row_errors(&got, &expected, layer.d_model));
            println!("  {isa}, {threads} threads: relative error of the engine's layer {error:.4}");
            assert!(error < 0.067, "{}, {isa}: the engine's layer is off by {error}", golden.name);
        }
    }

    let mut exact: Vec<f32> = layer.x.clone();
    gelu_scalar(&mut exact);
    for isa in Isa::available() {
        let mut fast = layer.x.clone();
        gelu(isa, &mut fast);
        golden.assert_close("gelu", &fast, &exact);
    }
}
