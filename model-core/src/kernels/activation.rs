//! Elementwise activations.

/// Exact-erf GELU, `0.5 x (1 + erf(x / sqrt 2))`, in place: the definition.
pub fn gelu_scalar(x: &mut [f32]) {
    for v in x {
        *v = (0.5
            * f64::from(*v)
            * (1.0 + candle_core::cpu::erf::erf_f64(f64::from(*v) * std::f64::consts::FRAC_1_SQRT_2)))
            as f32;
    }
}
