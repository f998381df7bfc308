//! Variations of one image that keep its label: crop, flip, RandAugment-like operations, erasing.
//!
//! Images stay bytes throughout, `[side, side, 3]`. RandAugment (arXiv 1909.13719) draws each operation's strength
//! uniformly below a common magnitude, as TrivialAugment (arXiv 2103.10158) showed to work as well as a tuned one; the
//! geometric ranges are RandAugment's narrow ones, for short training runs.

use rand::Rng;

/// What to vary, and how much.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Augment {
    /// Pixels added on every side before a crop of the original size; 0 for no crop.
    pub crop_padding: usize,
    /// The padding mirrors the image; otherwise it is black.
    pub reflect: bool,
    /// Mirror left and right half the time. Wrong for digits and text.
    pub flip: bool,
    /// RandAugment operations for each image.
    pub operations: usize,
    /// Upper end of the operations' strength, in 0..=1.
    pub magnitude: f32,
    /// Probability that a rectangle of noise replaces part of the image.
    pub erase: f32,
}

impl Augment {
    /// Leaves images as they are.
    pub const NONE: Self =
        Self { crop_padding: 0, reflect: false, flip: false, operations: 0, magnitude: 0.0, erase: 0.0 };

    /// Writes a variation of `image` to `out`; both `[side, side, 3]`.
    pub fn apply(&self, image: &[u8], side: usize, rng: &mut impl Rng, out: &mut [u8]) {
        self.crop_and_flip(image, side, rng, out);
        for _ in 0..self.operations {
            let op = OPERATIONS[rng.random_range(0..OPERATIONS.len())];
            // In -magnitude..=magnitude; operations without a direction take the absolute value.
            let strength = self.magnitude * rng.random_range(-1.0..=1.0f32);
            op.apply(out, side, strength);
        }
        if self.erase > 0.0 && rng.random::<f32>() < self.erase {
            erase(out, side, rng);
        }
    }

    fn crop_and_flip(&self, image: &[u8], side: usize, rng: &mut impl Rng, out: &mut [u8]) {
        // Mirroring needs the padding to fit inside the image.
        let padding = self.crop_padding.min(side - 1);
        let shift_y = rng.random_range(0..=2 * padding) as isize - padding as isize;
        let shift_x = rng.random_range(0..=2 * padding) as isize - padding as isize;
        let flip = self.flip && rng.random::<bool>();
        for y in 0..side {
            let from_y = self.source(y as isize + shift_y, side);
            for x in 0..side {
                let seen = if flip { side - 1 - x } else { x };
                let from_x = self.source(seen as isize + shift_x, side);
                let target = &mut out[(y * side + x) * 3..][..3];
                match (from_y, from_x) {
                    (Some(y), Some(x)) => target.copy_from_slice(&image[(y * side + x) * 3..][..3]),
                    _ => target.fill(0),
                }
            }
        }
    }

    /// Row or column of the image that padded coordinate `i` shows.
    fn source(&self, i: isize, side: usize) -> Option<usize> {
        let last = side as isize - 1;
        match i {
            _ if (0..=last).contains(&i) => Some(i as usize),
            _ if !self.reflect => None,
            _ if i < 0 => Some(-i as usize),
            _ => Some((2 * last - i) as usize),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Operation {
    Identity,
    ShearX,
    ShearY,
    TranslateX,
    TranslateY,
    Rotate,
    Brightness,
    Contrast,
    Saturation,
    Sharpness,
    Posterize,
    Solarize,
    AutoContrast,
    Equalize,
}

const OPERATIONS: [Operation; 14] = [
    Operation::Identity,
    Operation::ShearX,
    Operation::ShearY,
    Operation::TranslateX,
    Operation::TranslateY,
    Operation::Rotate,
    Operation::Brightness,
    Operation::Contrast,
    Operation::Saturation,
    Operation::Sharpness,
    Operation::Posterize,
    Operation::Solarize,
    Operation::AutoContrast,
    Operation::Equalize,
];

impl Operation {
    /// Applies the operation in place; `strength` is in -1..=1, and 0 changes nothing (except for the last two,
    /// which have no strength).
    fn apply(self, image: &mut [u8], side: usize, strength: f32) {
        let factor = 1.0 + 0.9 * strength;
        match self {
            Self::Identity => {}
            Self::ShearX => affine(image, side, [1.0, 0.3 * strength, 0.0, 1.0], [0.0, 0.0]),
            Self::ShearY => affine(image, side, [1.0, 0.0, 0.3 * strength, 1.0], [0.0, 0.0]),
            Self::TranslateX => affine(image, side, IDENTITY, [0.3 * strength * side as f32, 0.0]),
            Self::TranslateY => affine(image, side, IDENTITY, [0.0, 0.3 * strength * side as f32]),
            Self::Rotate => {
                let (sin, cos) = (30.0 * strength).to_radians().sin_cos();
                affine(image, side, [cos, -sin, sin, cos], [0.0, 0.0]);
            }
            Self::Brightness => image.iter_mut().for_each(|v| *v = blend(0.0, f32::from(*v), factor)),
            Self::Contrast => {
                let mean = image.chunks_exact(3).map(grey).sum::<f32>() / (side * side) as f32;
                image.iter_mut().for_each(|v| *v = blend(mean, f32::from(*v), factor));
            }
            Self::Saturation => {
                for pixel in image.chunks_exact_mut(3) {
                    let grey = grey(pixel);
                    pixel.iter_mut().for_each(|v| *v = blend(grey, f32::from(*v), factor));
                }
            }
            Self::Sharpness => sharpen(image, side, factor),
            Self::Posterize => {
                let dropped = (4.0 * strength.abs()).round() as u32;
                image.iter_mut().for_each(|v| *v &= 0xff << dropped);
            }
            Self::Solarize => {
                let threshold = 255.0 * (1.0 - strength.abs());
                for v in image.iter_mut().filter(|v| f32::from(**v) > threshold) {
                    *v = 255 - *v;
                }
            }
            Self::AutoContrast => each_channel(image, |histogram| {
                let low = histogram.iter().position(|&n| n > 0).unwrap_or(0);
                let high = histogram.iter().rposition(|&n| n > 0).unwrap_or(255);
                let span = (high - low).max(1);
                let flat = high == low;
                move |v| if flat { v } else { ((usize::from(v).clamp(low, high) - low) * 255 / span) as u8 }
            }),
            Self::Equalize => each_channel(image, |histogram| {
                let total: u32 = histogram.iter().sum();
                let mut below = 0;
                let table: [u8; 256] = histogram.map(|n| {
                    // Half of the bin's own count on either side keeps a flat channel in the middle.
                    let value = (below + n / 2) * 255 / total.max(1);
                    below += n;
                    value as u8
                });
                move |v| table[usize::from(v)]
            }),
        }
    }
}

const IDENTITY: [f32; 4] = [1.0, 0.0, 0.0, 1.0];
/// Shown where a geometric operation looks outside the image.
const FILL: f32 = 128.0;

/// `from + factor * (to - from)`, as a byte.
fn blend(from: f32, to: f32, factor: f32) -> u8 {
    (from + factor * (to - from)).round().clamp(0.0, 255.0) as u8
}

/// ITU-R 601 luma.
fn grey(pixel: &[u8]) -> f32 {
    0.299 * f32::from(pixel[0]) + 0.587 * f32::from(pixel[1]) + 0.114 * f32::from(pixel[2])
}

/// Shows at (x, y) what was at `m (x, y) + t`, coordinates from the centre, interpolating linearly.
fn affine(image: &mut [u8], side: usize, m: [f32; 4], t: [f32; 2]) {
    let original = image.to_vec();
    let centre = (side as f32 - 1.0) / 2.0;
    let at = |x: isize, y: isize, c: usize| {
        let inside = (0..side as isize).contains(&x) && (0..side as isize).contains(&y);
        if inside { f32::from(original[(y as usize * side + x as usize) * 3 + c]) } else { FILL }
    };
    for (i, pixel) in image.chunks_exact_mut(3).enumerate() {
        let (x, y) = ((i % side) as f32 - centre, (i / side) as f32 - centre);
        let from_x = m[0] * x + m[1] * y + t[0] + centre;
        let from_y = m[2] * x + m[3] * y + t[1] + centre;
        let (left, top) = (from_x.floor(), from_y.floor());
        let (fx, fy) = (from_x - left, from_y - top);
        let (left, top) = (left as isize, top as isize);
        for (c, v) in pixel.iter_mut().enumerate() {
            let upper = at(left, top, c) * (1.0 - fx) + at(left + 1, top, c) * fx;
            let lower = at(left, top + 1, c) * (1.0 - fx) + at(left + 1, top + 1, c) * fx;
            *v = (upper * (1.0 - fy) + lower * fy).round().clamp(0.0, 255.0) as u8;
        }
    }
}

/// Blends away from (`factor` above 1) or towards the image smoothed by `[1 1 1; 1 5 1; 1 1 1] / 13`. The border stays.
fn sharpen(image: &mut [u8], side: usize, factor: f32) {
    let original = image.to_vec();
    for y in 1..side.saturating_sub(1) {
        for x in 1..side - 1 {
            for c in 0..3 {
                let at = |y: usize, x: usize| u32::from(original[(y * side + x) * 3 + c]);
                let box_sum: u32 = (y - 1..=y + 1).flat_map(|y| (x - 1..=x + 1).map(move |x| at(y, x))).sum();
                let smooth = (box_sum + 4 * at(y, x)) as f32 / 13.0;
                image[(y * side + x) * 3 + c] = blend(smooth, at(y, x) as f32, factor);
            }
        }
    }
}

/// Maps every channel through the function that `make` builds from its histogram.
fn each_channel<F: Fn(u8) -> u8>(image: &mut [u8], make: impl Fn([u32; 256]) -> F) {
    for c in 0..3 {
        let mut histogram = [0; 256];
        image.iter().skip(c).step_by(3).for_each(|&v| histogram[usize::from(v)] += 1);
        let map = make(histogram);
        image.iter_mut().skip(c).step_by(3).for_each(|v| *v = map(*v));
    }
}

/// Noise over a rectangle of 2% to 25% of the area (random erasing, arXiv 1708.04896).
fn erase(image: &mut [u8], side: usize, rng: &mut impl Rng) {
    let area = rng.random_range(0.02..0.25f32) * (side * side) as f32;
    let ratio = rng.random_range(-1.2..1.2f32).exp();
    let height = ((area * ratio).sqrt().round() as usize).clamp(1, side);
    let width = ((area / ratio).sqrt().round() as usize).clamp(1, side);
    let (top, left) = (rng.random_range(0..=side - height), rng.random_range(0..=side - width));
    for y in top..top + height {
        rng.fill(&mut image[(y * side + left) * 3..][..width * 3]);
    }
}

#[cfg(test)]
mod tests {
    use super::super::random::{Purpose, rng};
    use super::*;

    const SIDE: usize = 8;

    fn gradient() -> Vec<u8> {
        (0..SIDE * SIDE * 3).map(|i| (i * 37 % 251) as u8).collect()
    }

    fn vary(augment: Augment, index: u64) -> Vec<u8> {
        let mut out = vec![0; SIDE * SIDE * 3];
        augment.apply(&gradient(), SIDE, &mut rng(1, Purpose::Image, 0, index), &mut out);
        out
    }

    #[test]
    fn no_augmentation_is_the_identity() {
        assert_eq!(vary(Augment::NONE, 0), gradient());
    }

    #[test]
    fn flips_come_half_the_time_and_mirror_rows() {
        let flipped: Vec<u8> = gradient()
            .chunks_exact(SIDE * 3)
            .flat_map(|row| row.chunks_exact(3).rev().flatten().copied().collect::<Vec<_>>())
            .collect();
        let augment = Augment { flip: true, ..Augment::NONE };
        let count = (0..200).filter(|&i| vary(augment, i) == flipped).count();
        assert!((70..130).contains(&count), "{count}");
    }

    #[test]
    fn crops_are_windows_of_the_padded_image() {
        // Every crop of an image with constant rows has constant rows, and with reflection no black pixel.
        let image: Vec<u8> = (0..SIDE).flat_map(|y| vec![y as u8 + 1; SIDE * 3]).collect();
        let mut shifts = std::collections::BTreeSet::new();
        for index in 0..200 {
            let mut out = vec![0; image.len()];
            let augment = Augment { crop_padding: 2, reflect: true, ..Augment::NONE };
            augment.apply(&image, SIDE, &mut rng(1, Purpose::Image, 0, index), &mut out);
            assert!(out.chunks_exact(SIDE * 3).all(|row| row.iter().all(|v| *v == row[0] && *v > 0)));
            shifts.insert(out[3 * SIDE * 3] + 2 - 4);
            let black = Augment { reflect: false, ..augment };
            black.apply(&image, SIDE, &mut rng(1, Purpose::Image, 0, index), &mut out);
            assert!(out.iter().all(|v| *v <= SIDE as u8));
        }
        assert_eq!(shifts.into_iter().collect::<Vec<_>>(), [0, 1, 2, 3, 4]);
    }

    #[test]
    fn operations_without_strength_change_nothing() {
        for op in OPERATIONS.iter().filter(|op| !matches!(op, Operation::AutoContrast | Operation::Equalize)) {
            let mut image = gradient();
            op.apply(&mut image, SIDE, 0.0);
            assert_eq!(image, gradient(), "{op:?}");
        }
    }

    #[test]
    fn operations_with_strength_change_the_image_and_survive_tiny_ones() {
        for op in OPERATIONS.iter().filter(|op| **op != Operation::Identity) {
            let mut image = gradient();
            op.apply(&mut image, SIDE, 0.9);
            assert_ne!(image, gradient(), "{op:?}");
            op.apply(&mut [7; 3], 1, -1.0);
        }
    }

    #[test]
    fn rotation_by_its_inverse_comes_back_in_the_middle() {
        let mut image: Vec<u8> = (0..SIDE * SIDE).flat_map(|i| [(i % SIDE * 20) as u8; 3]).collect();
        let original = image.clone();
        Operation::Rotate.apply(&mut image, SIDE, 0.3);
        Operation::Rotate.apply(&mut image, SIDE, -0.3);
        let middle = (3 * SIDE + 3) * 3;
        assert!(image[middle].abs_diff(original[middle]) <= 2);
    }

    #[test]
    fn everything_at_once_is_decided_by_its_numbers() {
        let augment = Augment { crop_padding: 2, reflect: true, flip: true, operations: 2, magnitude: 1.0, erase: 0.5 };
        assert_eq!(vary(augment, 3), vary(augment, 3));
        assert_ne!(vary(augment, 3), vary(augment, 4));
    }
}
