//! The centred square of an image, turned as its EXIF orientation says, in the memory of the image alone.

use ::image::RgbImage;
use ::image::metadata::Orientation;

/// An orientation as what to do: swap rows and columns, then mirror left and right, then top and bottom.
struct Turn {
    transpose: bool,
    flip_x: bool,
    flip_y: bool,
}

impl From<Orientation> for Turn {
    fn from(orientation: Orientation) -> Self {
        let (transpose, flip_x, flip_y) = match orientation {
            Orientation::NoTransforms => (false, false, false),
            Orientation::FlipHorizontal => (false, true, false),
            Orientation::FlipVertical => (false, false, true),
            Orientation::Rotate180 => (false, true, true),
            Orientation::Rotate90FlipH => (true, false, false),
            Orientation::Rotate90 => (true, true, false),
            Orientation::Rotate270 => (true, false, true),
            Orientation::Rotate270FlipH => (true, true, true),
        };
        Self { transpose, flip_x, flip_y }
    }
}

/// The largest centred square of the turned image.
pub(super) fn square(image: RgbImage, orientation: Orientation) -> RgbImage {
    let turn = Turn::from(orientation);
    let (width, height) = (image.width() as usize, image.height() as usize);
    let side = width.min(height);
    // The margin that is left over is cut in halves, the smaller one first, as the turned image has them.
    let (over_x, over_y) = if turn.transpose { (height - side, width - side) } else { (width - side, height - side) };
    let corner = |over: usize, flip: bool| if flip { over - over / 2 } else { over / 2 };
    let (x, y) = (corner(over_x, turn.flip_x), corner(over_y, turn.flip_y));
    let (left, top) = if turn.transpose { (y, x) } else { (x, y) };

    let mut samples = image.into_raw();
    for row in 0..side {
        let start = 3 * ((top + row) * width + left);
        samples.copy_within(start..start + 3 * side, 3 * row * side);
    }
    samples.truncate(3 * side * side);
    let (pixels, _) = samples.as_chunks_mut::<3>();
    if turn.transpose {
        for row in 0..side {
            for column in row + 1..side {
                pixels.swap(row * side + column, column * side + row);
            }
        }
    }
    if turn.flip_x {
        pixels.chunks_exact_mut(side).for_each(<[_]>::reverse);
    }
    if turn.flip_y {
        for row in 0..side / 2 {
            let (upper, lower) = pixels.split_at_mut((side - 1 - row) * side);
            upper[row * side..][..side].swap_with_slice(&mut lower[..side]);
        }
    }
    RgbImage::from_raw(side as u32, side as u32, samples).expect("three samples a pixel were kept")
}

#[cfg(test)]
mod tests {
    use ::image::{DynamicImage, Rgb};

    use super::*;

    #[test]
    fn it_is_the_square_of_the_turned_image() {
        for (width, height) in [(1, 1), (5, 5), (7, 4), (4, 7), (8, 5), (5, 8), (9, 1), (1, 9)] {
            let image = RgbImage::from_fn(width, height, |x, y| Rgb([x as u8, y as u8, 7]));
            for exif in 1..=8 {
                let orientation = Orientation::from_exif(exif).unwrap();
                let mut whole = DynamicImage::ImageRgb8(image.clone());
                whole.apply_orientation(orientation);
                let side = width.min(height);
                let corner = ((whole.width() - side) / 2, (whole.height() - side) / 2);
                let expected = whole.crop_imm(corner.0, corner.1, side, side).into_rgb8();
                assert!(square(image.clone(), orientation) == expected, "{width}x{height}, {orientation:?}");
            }
        }
    }
}
