//! The definition (`golden/reference.py: rotate`): stage l pairs features j and j + 2^l inside blocks of 2^(l+1).

/// Rotates one token in place: `x <- B(angles) x`.
///
/// `x` is `[features]`, `angles` is `[stages, features / 2]` in radians; the angle of pair (block b, offset j) of
/// stage l is `angles[l][b * 2^l + j]`. `features` must be a multiple of `2^stages`.
pub fn rotate(x: &mut [f32], angles: &[f32]) {
    let half_features = x.len() / 2;
    for (stage, angles) in angles.chunks_exact(half_features.max(1)).enumerate() {
        rotate_stage(x, angles, 1 << stage, 1.0);
    }
}

/// Undoes [`rotate`]: the stages backwards, with negated angles. `x <- B(angles)^T x`.
pub fn rotate_transpose(x: &mut [f32], angles: &[f32]) {
    let half_features = x.len() / 2;
    let stages = angles.chunks_exact(half_features.max(1)).len();
    for stage in (0..stages).rev() {
        rotate_stage(x, &angles[stage * half_features..][..half_features], 1 << stage, -1.0);
    }
}

fn rotate_stage(x: &mut [f32], angles: &[f32], stride: usize, sign: f32) {
    for (block, angles) in x.chunks_exact_mut(2 * stride).zip(angles.chunks_exact(stride)) {
        let (first, second) = block.split_at_mut(stride);
        for ((x1, x2), angle) in first.iter_mut().zip(second).zip(angles) {
            let (s, c) = (sign * angle).sin_cos();
            (*x1, *x2) = (c * *x1 - s * *x2, s * *x1 + c * *x2);
        }
    }
}
