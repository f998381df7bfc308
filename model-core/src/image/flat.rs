//! Pictures that show nothing: a black frame, a white one, one colour, a lens cap.

use std::ops::Range;

/// A picture is looked at in so many cells along each side, so that the noise of a sensor averages out: of a frame of 640 x
/// 480, a cell has 15 x 15 pixels.
const CELLS: usize = 32;

/// Largest difference between the means of two cells, in each channel, of 255. Noise with a standard deviation of 10 a
/// pixel stays below; the lines of a closed garage door that fills the picture do not.
const MOST_DIFFERENCE: usize = 6;

/// Whether nothing can be told apart within `rows` and `columns` of RGB8 samples `[.., side, 3]`.
pub(super) fn is_flat(samples: &[u8], side: usize, rows: Range<usize>, columns: Range<usize>) -> bool {
    let (mut least, mut most) = ([usize::MAX; 3], [0; 3]);
    for rows in cells(rows) {
        for columns in cells(columns.clone()) {
            let mut sums = [0; 3];
            for row in rows.clone() {
                for pixel in samples[3 * (row * side + columns.start)..3 * (row * side + columns.end)].chunks_exact(3) {
                    sums.iter_mut().zip(pixel).for_each(|(sum, &sample)| *sum += usize::from(sample));
                }
            }
            let count = rows.len() * columns.len();
            for channel in 0..3 {
                let mean = sums[channel] / count;
                least[channel] = least[channel].min(mean);
                most[channel] = most[channel].max(mean);
            }
        }
    }
    (0..3).all(|channel| most[channel].saturating_sub(least[channel]) <= MOST_DIFFERENCE)
}

/// A range in at most [`CELLS`] pieces, none of them empty.
fn cells(range: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let (start, length) = (range.start, range.len());
    let count = length.min(CELLS);
    (0..count).map(move |i| start + i * length / count..start + (i + 1) * length / count)
}

#[cfg(test)]
mod tests {
    use ::image::{Rgb, RgbImage};

    use super::super::{Crop, Fit, Picture, Preprocess};
    use crate::random::SplitMix64;

    fn is_flat(image: RgbImage, fit: Fit, side: usize) -> bool {
        Preprocess::default().see(&Picture::from(image), (Crop::default(), fit), side).unwrap().is_flat
    }

    /// A frame whose samples are `level` with noise of that standard deviation.
    fn noisy(level: f64, deviation: f64) -> RgbImage {
        let noise = SplitMix64::at(1, 0).normals(640 * 480 * 3, deviation);
        let samples = noise.into_iter().map(|noise| (level + f64::from(noise)).round() as u8);
        RgbImage::from_raw(640, 480, samples.collect()).unwrap()
    }

    #[test]
    fn frames_that_show_nothing_are_flat_however_they_are_seen() {
        for fit in [Fit::Crop, Fit::Pad, Fit::Stretch] {
            for side in [32, 160] {
                for colour in [[0, 0, 0], [255, 255, 255], [128, 128, 128], [30, 90, 200]] {
                    assert!(
                        is_flat(RgbImage::from_pixel(640, 480, Rgb(colour)), fit, side),
                        "{colour:?} {fit:?} {side}"
                    );
                    assert!(
                        is_flat(RgbImage::from_pixel(90, 400, Rgb(colour)), fit, side),
                        "{colour:?} {fit:?} {side}"
                    );
                }
                for (level, deviation) in [(9.0, 4.0), (12.0, 10.0), (128.0, 10.0)] {
                    assert!(is_flat(noisy(level, deviation), fit, side), "{level} {deviation} {fit:?} {side}");
                }
            }
        }
    }

    #[test]
    fn dark_and_plain_scenes_are_not() {
        // A lamp at night, no larger than a hundredth of the picture.
        let lamp = |x: u32, y: u32| (300..340).contains(&x) && (200..260).contains(&y);
        let mut night = noisy(8.0, 4.0);
        night
            .enumerate_pixels_mut()
            .filter(|(x, y, _)| lamp(*x, *y))
            .for_each(|(.., pixel)| *pixel = Rgb([90, 80, 60]));
        // A closed door that fills the picture: light panels with a darker line every 28 pixels.
        let line = |y: u32| y % 28 < 2;
        let door =
            RgbImage::from_fn(200, 170, |_, y| if line(y) { Rgb([170, 168, 160]) } else { Rgb([215, 213, 205]) });
        for side in [32, 160] {
            assert!(!is_flat(night.clone(), Fit::Crop, side), "{side}");
            assert!(!is_flat(door.clone(), Fit::Crop, side), "{side}");
        }
    }
}
