//! Samples of any kind to RGB8, and squares of pixels to their means.

use ::image::{DynamicImage, RgbImage};

/// Any colour type to RGB8; 16-bit samples round to the nearest of 8 bits, and alpha blends with black.
pub(super) fn flatten(image: DynamicImage) -> RgbImage {
    if !image.color().has_alpha() {
        return image.into_rgb8();
    }
    let rgba = image.into_rgba8();
    let (width, height) = rgba.dimensions();
    let samples = without_alpha(rgba.into_raw());
    RgbImage::from_raw(width, height, samples).expect("three samples a pixel were kept")
}

/// RGBA8 on black, in place.
pub(super) fn without_alpha(mut samples: Vec<u8>) -> Vec<u8> {
    let pixels = samples.len() / 4;
    // Three samples are written where four were read.
    for pixel in 0..pixels {
        let alpha = samples[4 * pixel + 3];
        for channel in 0..3 {
            samples[3 * pixel + channel] = on_black(samples[4 * pixel + channel], alpha);
        }
    }
    samples.truncate(3 * pixels);
    samples
}

/// `round(sample * alpha / 255)`, halves up.
fn on_black(sample: u8, alpha: u8) -> u8 {
    ((u32::from(sample) * u32::from(alpha) * 2 + 255) / 510) as u8
}

/// Takes the rows of an image, and gives the means of its squares of `n` by `n` pixels.
pub(super) struct Means {
    n: u32,
    width: u32,
    height: u32,
    rows: u32,
    /// Of the squares in progress, red, green and blue.
    sums: Vec<u32>,
    out: Vec<u8>,
}

impl Means {
    pub(super) fn new(width: u32, height: u32, n: u32) -> Self {
        let (out_width, out_height) = (width.div_ceil(n) as usize, height.div_ceil(n) as usize);
        let out = Vec::with_capacity(3 * out_width * out_height);
        Self { n, width, height, rows: 0, sums: vec![0; 3 * out_width], out }
    }

    /// Adds a row of RGB8.
    pub(super) fn push(&mut self, row: &[u8]) {
        self.rows += 1;
        if self.n == 1 {
            self.out.extend_from_slice(row);
            return;
        }
        for (pixel, sample) in row.chunks_exact(3).enumerate() {
            let sums = &mut self.sums[3 * (pixel / self.n as usize)..][..3];
            sums.iter_mut().zip(sample).for_each(|(sum, &sample)| *sum += u32::from(sample));
        }
        let rows = (self.rows - 1) % self.n + 1;
        if rows == self.n || self.rows == self.height {
            for (square, sums) in (0..).zip(self.sums.chunks_exact(3)) {
                // The last square of a row, and the last row of squares, may be smaller.
                let count = rows * self.n.min(self.width - square * self.n);
                self.out.extend(sums.iter().map(|sum| ((sum + count / 2) / count) as u8));
            }
            self.sums.fill(0);
        }
    }

    /// `None` when rows are missing.
    pub(super) fn finish(self) -> Option<RgbImage> {
        RgbImage::from_raw(self.width.div_ceil(self.n), self.height.div_ceil(self.n), self.out)
    }
}

#[cfg(test)]
mod tests {
    use ::image::{ImageBuffer, Luma};

    use super::*;

    #[test]
    fn alpha_blends_with_black_to_the_nearest() {
        for sample in 0..=255u8 {
            for alpha in 0..=255u8 {
                let exact = f64::from(sample) * f64::from(alpha) / 255.0;
                assert_eq!(f64::from(on_black(sample, alpha)), (exact + 0.5).floor(), "{sample} at {alpha}");
            }
        }
    }

    #[test]
    fn sixteen_bits_round_to_the_nearest_of_eight() {
        let all = ImageBuffer::<Luma<u16>, _>::from_raw(256, 256, (0..=u16::MAX).collect()).unwrap();
        let rgb = flatten(DynamicImage::ImageLuma16(all));
        for (wide, pixel) in (0..=u16::MAX).zip(rgb.pixels()) {
            let nearest = ((u32::from(wide) * 255 + 32767) / 65535) as u8;
            assert_eq!(pixel.0, [nearest; 3], "{wide}");
        }
    }
}
