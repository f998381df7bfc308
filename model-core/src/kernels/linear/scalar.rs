//! The definition.

/// Per-row absmax int8 quantisation of `weight` `[rows, cols]`, each row as an activation row is quantised:
/// returns (codes `[rows, cols]` in -127..=127, scale `[rows]`).
pub fn quantize_weight(weight: &[f32], rows: usize, cols: usize) -> (Vec<i8>, Vec<f32>) {
    let mut codes = vec![0; rows * cols];
    let mut scale = vec![1.0; rows];
    if cols > 0 {
        for ((row, codes), scale) in weight.chunks_exact(cols).zip(codes.chunks_exact_mut(cols)).zip(&mut scale) {
            *scale = crate::kernels::ternary::scalar::quantize_row(row, codes);
        }
    }
    (codes, scale)
}

/// `out[m, n] = sum over k of lhs[m, k] * codes[n, k]`, exact. Both int8, `[m, k]` and `[n, k]`; `n = out.len() / m`.
pub fn gemm_i8(lhs: &[i8], codes: &[i8], m: usize, k: usize, out: &mut [i32]) {
    let n = out.len() / m.max(1);
    for (i, out) in out.iter_mut().enumerate() {
        let (lhs, row) = (&lhs[i / n * k..][..k], &codes[i % n * k..][..k]);
        *out = lhs.iter().zip(row).map(|(&a, &w)| i32::from(a) * i32::from(w)).sum();
    }
}
