//! Antialiased bilinear reduction of a square to a square, in integers: the algorithm of Pillow's
//! `Image.resize(.., Image.Resampling.BILINEAR)`, bit for bit, so that anyone can reproduce a model's input.
//!
//! Each output sample is a weighted mean of the input samples within `max(scale, 1)` of its centre, weights falling
//! off linearly. Columns first, rounded to 8 bits, then rows.

/// Fractional bits of a weight: 8-bit samples, 22 bits of weight and two spare make 32.
const PRECISION_BITS: u32 = 32 - 8 - 2;

/// The input samples that one output sample is made of.
struct Window {
    start: usize,
    /// Weights in units of `2^-PRECISION_BITS`; they sum to about one.
    weights: Vec<i32>,
}

impl Window {
    /// The windows of all `output` samples over `input` samples.
    fn all(input: usize, output: usize) -> Vec<Self> {
        let scale = input as f64 / output as f64;
        // Enlarging interpolates between neighbours; reducing averages over the whole area.
        let support = scale.max(1.0);
        let window = |i: usize| {
            let center = (i as f64 + 0.5) * scale;
            let start = (center - support + 0.5).max(0.0) as usize;
            let end = ((center + support + 0.5) as usize).min(input);
            let weight = |x: usize| (1.0 - ((x as f64 - center + 0.5) * (1.0 / support)).abs()).max(0.0);
            let weights: Vec<f64> = (start..end).map(weight).collect();
            let sum: f64 = weights.iter().sum();
            let fixed = |w: f64| (0.5 + w / sum * f64::from(1 << PRECISION_BITS)) as i32;
            Self { start, weights: weights.into_iter().map(fixed).collect() }
        };
        (0..output).map(window).collect()
    }
}

fn round(sum: i32) -> u8 {
    (sum >> PRECISION_BITS).clamp(0, 255) as u8
}

/// Half a unit, so that [`round`] rounds to nearest.
const HALF: i32 = 1 << (PRECISION_BITS - 1);

/// Resizes the square of side `side` whose top left corner is (`left`, `top`) of an RGB8 image `width` pixels wide to
/// `out_side`, as `[out_side, out_side, 3]`.
pub(super) fn resize_square(
    samples: &[u8],
    width: usize,
    (left, top): (usize, usize),
    side: usize,
    out_side: usize,
) -> Vec<u8> {
    let row = |y: usize| &samples[3 * ((top + y) * width + left)..][..3 * side];
    if side == out_side {
        return (0..side).flat_map(row).copied().collect();
    }
    let windows = Window::all(side, out_side);
    // [side, out_side, 3]: as many rows as the input, as many columns as the output.
    let mut narrow = Vec::with_capacity(side * out_side * 3);
    for y in 0..side {
        let row = row(y);
        for window in &windows {
            let pixels = row[3 * window.start..].chunks_exact(3);
            let mut sums = [HALF; 3];
            for (pixel, &weight) in pixels.zip(&window.weights) {
                for (sum, &sample) in sums.iter_mut().zip(pixel) {
                    *sum += i32::from(sample) * weight;
                }
            }
            narrow.extend(sums.map(round));
        }
    }
    let stride = 3 * out_side;
    let mut out = Vec::with_capacity(out_side * stride);
    let mut sums = vec![0; stride];
    for window in &windows {
        sums.fill(HALF);
        for (row, &weight) in narrow[window.start * stride..].chunks_exact(stride).zip(&window.weights) {
            for (sum, &sample) in sums.iter_mut().zip(row) {
                *sum += i32::from(sample) * weight;
            }
        }
        out.extend(sums.iter().copied().map(round));
    }
    out
}
