//! From latent parameters to the integer codes of an artifact, and the same rounding inside a graph.

use candle_core::{Result, Tensor};
use model_core::config::FloatFormat;
use model_core::weights::router_row;

/// Router codes of `bits` bits and one scale per row (expert): `scale = max |row| / (2^(bits - 1) - 1)`,
/// `code = round_half_even(w / scale)`; scale 1 for a row of zeros.
pub fn router_codes(w: &[f32], cols: usize, bits: u32, scales: FloatFormat) -> (Vec<i16>, Vec<f32>) {
    let mut codes = vec![0; w.len()];
    let rows = w.chunks_exact(cols).zip(codes.chunks_exact_mut(cols));
    let scales = rows.map(|(row, codes)| router_row(row, bits, scales, codes)).collect();
    (codes, scales)
}

/// The gate weights that [`router_codes`] stand for.
pub fn router_snapped(w: &[f32], cols: usize, bits: u32) -> Vec<f32> {
    let (codes, scales) = router_codes(w, cols, bits, FloatFormat::F32);
    let rows = codes.chunks_exact(cols).zip(&scales);
    rows.flat_map(|(row, scale)| row.iter().map(move |&code| f32::from(code) * scale)).collect()
}

/// Codes of angles in radians: the nearest multiple of `2 pi / 2^bits`, modulo a full turn.
pub fn angle_codes(angles: &[f32], bits: u32) -> Vec<u16> {
    let turn = f64::from(1u32 << bits);
    let code = |angle: f32| (f64::from(angle) / std::f64::consts::TAU * turn).round_ties_even().rem_euclid(turn) as u16;
    angles.iter().map(|&angle| code(angle)).collect()
}

/// Angles in radians of codes, in `[0, 2 pi)`.
pub fn angles_of_codes(codes: &[u16], bits: u32) -> Vec<f32> {
    let step = std::f64::consts::TAU / f64::from(1u32 << bits);
    codes.iter().map(|&code| (f64::from(code) * step) as f32).collect()
}

/// `snap(w)` in the forward pass, the identity in the backward pass.
///
/// # Errors
/// When `w` is not f32 on the CPU.
pub fn straight_through(w: &Tensor, snap: impl Fn(&[f32]) -> Vec<f32>) -> Result<Tensor> {
    let values = w.flatten_all()?.to_vec1::<f32>()?;
    let mut change = snap(&values);
    for (change, w) in change.iter_mut().zip(&values) {
        *change -= w;
    }
    w + Tensor::from_vec(change, w.shape(), w.device())?
}
