//! The definitions of integer products and of the codes they multiply (`golden/reference.py: ternarize,
//! quantize_activations, substrate`).

/// Per-row absmean quantisation of `w` `[rows, cols]`: `scale = max(mean |row|, 1e-5)`,
/// `code = clamp(round_half_even(w / scale), -1, 1)`. Returns (codes `[rows, cols]`, scale `[rows]`).
/// Computed in f64, so that codes do not depend on the order of the sum.
#[inline(always)]
pub fn ternarize(w: &[f32], cols: usize) -> (Vec<i8>, Vec<f32>) {
    let mut codes = Vec::with_capacity(w.len());
    let mut scales = Vec::with_capacity(w.len() / cols.max(1));
    for row in w.chunks_exact(cols.max(1)) {
        let mean = row.iter().map(|v| f64::from(v.abs())).sum::<f64>() / cols as f64;
        let scale = mean.max(1e-5);
        codes.extend(row.iter().map(|&v| (f64::from(v) / scale).round_ties_even().clamp(-1.0, 1.0) as i8));
        scales.push(scale as f32);
    }
    (codes, scales)
}

/// Per-token absmax int8 quantisation of one row: `step = max |x| / 127` (1 for a row of zeros),
/// `code = round_half_even(x / step)`, in -127..=127. Returns the step.
pub fn quantize_row(x: &[f32], codes: &mut [i8]) -> f32 {
    let max = x.iter().fold(0f32, |m, v| m.max(v.abs()));
    let step = if max == 0.0 { 1.0 } else { max / 127.0 };
    for (code, v) in codes.iter_mut().zip(x) {
        *code = (v / step).round_ties_even().clamp(-127.0, 127.0) as i8;
    }
    step
}

/// Per-row absmax int8 quantisation of `weight` `[rows, cols]`, each row as an activation row is quantised:
/// returns (codes `[rows, cols]` in -127..=127, scale `[rows]`).
pub fn quantize_weight(weight: &[f32], rows: usize, cols: usize) -> (Vec<i8>, Vec<f32>) {
    let mut codes = vec![0; rows * cols];
    let mut scale = vec![1.0; rows];
    if cols > 0 {
        for ((row, codes), scale) in weight.chunks_exact(cols).zip(codes.chunks_exact_mut(cols)).zip(&mut scale) {
            *scale = quantize_row(row, codes);
        }
    }
    (codes, scale)
}

/// `out[m, n] = sum over k of lhs[m, k] * codes[n, k]`, exact. `lhs` is int8 `[m, k]`, `codes` int8 or ternary `[n, k]`;
/// `n = out.len() / m`.
pub fn gemm_i8(lhs: &[i8], codes: &[i8], m: usize, k: usize, out: &mut [i32]) {
    let n = out.len() / m.max(1);
    for (i, out) in out.iter_mut().enumerate() {
        let (lhs, row) = (&lhs[i / n * k..][..k], &codes[i % n * k..][..k]);
        *out = lhs.iter().zip(row).map(|(&a, &w)| i32::from(a) * i32::from(w)).sum();
    }
}

/// `out[m, n] = scale[n] * sum over k of lhs[m, k] * codes[n, k]`, f32 activations.
pub fn gemm_f32(lhs: &[f32], codes: &[i8], scale: &[f32], k: usize, out: &mut [f32]) {
    let n = scale.len();
    for (lhs, out) in lhs.chunks_exact(k.max(1)).zip(out.chunks_exact_mut(n.max(1))) {
        for ((row, scale), out) in codes.chunks_exact(k.max(1)).zip(scale).zip(out) {
            *out = scale * lhs.iter().zip(row).map(|(&a, &w)| a * f32::from(w)).sum::<f32>();
        }
    }
}
