//! Antialiased bilinear resizing to a square, in integers: the algorithm of Pillow's
//! `Image.resize(.., Image.Resampling.BILINEAR)`, bit for bit, so that anyone can reproduce a model's input.
//!
//! Each output sample is a weighted mean of the input samples within `max(scale, 1)` of its centre, weights falling
//! off linearly. Columns first, rounded to 8 bits, then rows.

use super::picture::Part;

/// Fractional bits of a weight: 8-bit samples, 22 bits of weight and two spare make 32.
const PRECISION_BITS: u32 = 32 - 8 - 2;

/// The input samples that one output sample is made of.
struct Window {
    start: usize,
    /// Weights in units of `2^-PRECISION_BITS`; they sum to about one.
    weights: Vec<i32>,
}

impl Window {
    /// Behind the last sample.
    fn end(&self) -> usize {
        self.start + self.weights.len()
    }

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

/// The weighted means of a row of `part`, as `[columns.len(), 3]`. What lies beside the part is black and adds nothing.
fn narrow_row(row: &[u8], left: usize, columns: &[Window], narrow: &mut [u8]) {
    let right = left + row.len() / 3;
    for (window, out) in columns.iter().zip(narrow.chunks_exact_mut(3)) {
        let first = window.start.clamp(left, right);
        let weights = window.weights.get(first - window.start.min(first)..).unwrap_or_default();
        let mut sums = [HALF; 3];
        for (pixel, &weight) in row[3 * (first - left)..].chunks_exact(3).zip(weights) {
            for (sum, &sample) in sums.iter_mut().zip(pixel) {
                *sum += i32::from(sample) * weight;
            }
        }
        out.copy_from_slice(&sums.map(round));
    }
}

/// Resizes a part of a picture to `[side, side, 3]`. Rows are taken one after the other, each added to the rows of the
/// result that it is a part of, so that a part of any shape takes no more memory than its result.
pub(super) fn resize(part: &Part<'_>, side: usize) -> Vec<u8> {
    let (columns, rows) = (Window::all(part.canvas.0, side), Window::all(part.canvas.1, side));
    let stride = 3 * side;
    let (mut buffer, mut narrow) = (Vec::new(), vec![0; stride]);
    let mut sums = vec![HALF; side * stride];
    let mut first = 0;
    for row in 0..part.rows() {
        let y = part.at.1 + row;
        narrow_row(part.row(row, &mut buffer), part.at.0, &columns, &mut narrow);
        // Windows begin and end in ascending order.
        while first < side && rows[first].end() <= y {
            first += 1;
        }
        for (window, sums) in rows[first..].iter().zip(sums[first * stride..].chunks_exact_mut(stride)) {
            if window.start > y {
                break;
            }
            let weight = window.weights.get(y - window.start).copied().unwrap_or(0);
            for (sum, &sample) in sums.iter_mut().zip(&narrow) {
                *sum += i32::from(sample) * weight;
            }
        }
    }
    sums.into_iter().map(round).collect()
}
