//! A decoded picture, turned as its EXIF orientation says without being copied: whoever reads it steps through it.

use std::ops::Range;

use ::image::RgbImage;
use ::image::metadata::Orientation;

use super::error::ImageError;
use super::view::{Crop, Fit, Seen};

/// Pixels along a side at most where the longer side counts: weights are made for each.
const MOST_PIXELS: usize = 1 << 16;

/// A picture as it was decoded.
#[derive(Debug)]
pub struct Picture {
    image: RgbImage,
    turn: Turn,
    /// Width and height upright, before it was reduced.
    full_size: (u32, u32),
}

impl From<RgbImage> for Picture {
    fn from(image: RgbImage) -> Self {
        let full_size = image.dimensions();
        Self { image, turn: Orientation::NoTransforms.into(), full_size }
    }
}

/// An orientation as what to do: swap rows and columns, then mirror left and right, then top and bottom.
#[derive(Debug, Clone, Copy)]
pub(super) struct Turn {
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

impl Turn {
    /// Width and height once it is turned.
    pub(super) fn upright<T>(self, (width, height): (T, T)) -> (T, T) {
        if self.transpose { (height, width) } else { (width, height) }
    }
}

/// What is to become the model's square: a part of a picture on a canvas of black.
pub(super) struct Part<'a> {
    samples: &'a [u8],
    /// First sample of the first pixel, and samples from a pixel to the next one in its row and its column.
    start: isize,
    step: (isize, isize),
    /// Pixels of the part.
    size: (usize, usize),
    /// Pixels of the canvas.
    pub(super) canvas: (usize, usize),
    /// Where the part lies on the canvas.
    pub(super) at: (usize, usize),
}

impl Part<'_> {
    /// Columns and rows of the canvas, once that has `side` of each, in which nothing but the part is to be seen.
    pub(super) fn within(&self, side: usize) -> (Range<usize>, Range<usize>) {
        let range = |at: usize, size: usize, canvas: usize| {
            if size == canvas {
                return 0..side;
            }
            // Where it meets the canvas, both are mixed.
            let (first, end) = ((at * side).div_ceil(canvas) + 1, ((at + size) * side / canvas).saturating_sub(1));
            let middle = ((2 * at + size) * side / (2 * canvas)).min(side.saturating_sub(1));
            if first < end { first..end } else { middle..middle + 1 }
        };
        (range(self.at.0, self.size.0, self.canvas.0), range(self.at.1, self.size.1, self.canvas.1))
    }

    /// Rows of the part.
    pub(super) fn rows(&self) -> usize {
        self.size.1
    }

    /// A row of the part, `[width, 3]`; `buffer` is for those whose pixels lie apart.
    pub(super) fn row<'b>(&'b self, row: usize, buffer: &'b mut Vec<u8>) -> &'b [u8] {
        let start = self.start + row as isize * self.step.1;
        if self.step.0 == 3 {
            return &self.samples[start as usize..][..3 * self.size.0];
        }
        buffer.clear();
        let pixels = (0..self.size.0 as isize).map(|column| (start + column * self.step.0) as usize);
        pixels.for_each(|at| buffer.extend_from_slice(&self.samples[at..at + 3]));
        buffer
    }
}

/// A stretch of `length` pixels: the first one that a share of it takes, and how many.
fn stretch(length: usize, from: f64, share: f64) -> (usize, usize) {
    let edge = |share: f64| ((share * length as f64 + 0.5).floor().max(0.0) as usize).min(length);
    let first = edge(from).min(length.saturating_sub(1));
    (first, edge(from + share).saturating_sub(first).max(1))
}

impl Picture {
    pub(super) fn new(image: RgbImage, orientation: Orientation, full_size: (u32, u32)) -> Self {
        let turn = Turn::from(orientation);
        Self { image, turn, full_size: turn.upright(full_size) }
    }

    /// The part that is looked at, and what is seen of the picture by it.
    pub(super) fn part(&self, crop: Crop, fit: Fit) -> Result<(Part<'_>, Seen), ImageError> {
        part_of((&self.image, self.turn), crop.shares(self.full_size)?, fit)
    }
}

/// As [`Picture::part`], of an image that is upright and not reduced.
pub(super) fn part(image: &RgbImage, crop: Crop, fit: Fit) -> Result<(Part<'_>, Seen), ImageError> {
    part_of((image, Orientation::NoTransforms.into()), crop.shares(image.dimensions())?, fit)
}

fn part_of((image, turn): (&RgbImage, Turn), [x, y, w, h]: [f64; 4], fit: Fit) -> Result<(Part<'_>, Seen), ImageError> {
    let stored_width = image.width() as usize;
    let (width, height) = turn.upright((stored_width, image.height() as usize));
    let ((mut left, mut columns), (mut top, mut rows)) = (stretch(width, x, w), stretch(height, y, h));
    let (canvas, at) = match fit {
        Fit::Crop => {
            let side = columns.min(rows);
            left += (columns - side) / 2;
            top += (rows - side) / 2;
            (columns, rows) = (side, side);
            ((side, side), (0, 0))
        }
        Fit::Pad => {
            let side = columns.max(rows);
            ((side, side), ((side - columns) / 2, (side - rows) / 2))
        }
        Fit::Stretch => ((columns, rows), (0, 0)),
    };
    if fit != Fit::Crop && canvas.0.max(canvas.1) > MOST_PIXELS {
        return Err(ImageError::TooLong { most: MOST_PIXELS });
    }
    let row_step = 3 * stored_width as isize;
    let (step_x, step_y) = if turn.transpose { (row_step, 3) } else { (3, row_step) };
    let mirrored = |flip: bool, length: usize, step: isize| {
        if flip { ((length as isize - 1) * step, -step) } else { (0, step) }
    };
    let (from_x, step_x) = mirrored(turn.flip_x, width, step_x);
    let (from_y, step_y) = mirrored(turn.flip_y, height, step_y);
    let start = from_x + left as isize * step_x + from_y + top as isize * step_y;
    let share = |pixels: usize, of: usize| pixels as f64 / of as f64;
    let crop = [share(left, width), share(top, height), share(columns, width), share(rows, height)];
    let part = Part { samples: image.as_raw(), start, step: (step_x, step_y), size: (columns, rows), canvas, at };
    Ok((part, Seen { crop, fit }))
}

#[cfg(test)]
mod tests {
    use ::image::{DynamicImage, Rgb};

    use super::*;

    /// The canvas as an image, laid out pixel by pixel.
    fn drawn(picture: &Picture, crop: Crop, fit: Fit) -> RgbImage {
        let (part, _) = picture.part(crop, fit).unwrap();
        let mut image = RgbImage::new(part.canvas.0 as u32, part.canvas.1 as u32);
        let mut buffer = Vec::new();
        for row in 0..part.rows() {
            for (column, pixel) in part.row(row, &mut buffer).chunks_exact(3).enumerate() {
                let (x, y) = (part.at.0 + column, part.at.1 + row);
                image.put_pixel(x as u32, y as u32, Rgb([pixel[0], pixel[1], pixel[2]]));
            }
        }
        image
    }

    #[test]
    fn parts_are_those_of_the_turned_image() {
        let crops = [[0.0, 0.0, 1.0, 1.0], [0.25, 0.5, 0.5, 0.5], [0.1, 0.0, 0.3, 0.9], [0.999, 0.999, 0.001, 0.001]];
        for (width, height) in [(1, 1), (5, 5), (7, 4), (4, 7), (8, 5), (5, 8), (9, 1), (1, 9)] {
            let image = RgbImage::from_fn(width, height, |x, y| Rgb([x as u8, y as u8, 7]));
            for (exif, shares) in (1..=8).flat_map(|exif| crops.map(|crop| (exif, crop))) {
                let orientation = Orientation::from_exif(exif).unwrap();
                let mut whole = DynamicImage::ImageRgb8(image.clone());
                whole.apply_orientation(orientation);
                let picture = Picture::new(image.clone(), orientation, (width, height));
                let edges = |length: u32, from: f64, share: f64| {
                    let edge = |share: f64| (share * f64::from(length) + 0.5).floor() as u32;
                    let first = edge(from).min(length - 1);
                    (first, edge(from + share).min(length).saturating_sub(first).max(1))
                };
                let (x, w) = edges(whole.width(), shares[0], shares[2]);
                let (y, h) = edges(whole.height(), shares[1], shares[3]);
                let part = whole.crop_imm(x, y, w, h);
                let (least, most) = (w.min(h), w.max(h));
                let square = part.crop_imm((w - least) / 2, (h - least) / 2, least, least).into_rgb8();
                let mut padded = RgbImage::new(most, most);
                let at = (i64::from((most - w) / 2), i64::from((most - h) / 2));
                ::image::imageops::overlay(&mut padded, &part.to_rgb8(), at.0, at.1);
                for (fit, expected) in [(Fit::Crop, square), (Fit::Pad, padded), (Fit::Stretch, part.to_rgb8())] {
                    let drawn = drawn(&picture, Crop::Shares(shares), fit);
                    assert!(drawn == expected, "{width}x{height}, {orientation:?}, {shares:?}, {fit:?}");
                }
            }
        }
    }

    #[test]
    fn what_is_seen_is_seen_again() {
        let picture = Picture::from(RgbImage::new(640, 480));
        let (_, seen) = picture.part(Crop::default(), Fit::Crop).unwrap();
        assert_eq!(seen.crop, [0.125, 0.0, 0.75, 1.0]);
        for crop in [Crop::default(), Crop::Pixels([13, 17, 301, 99]), Crop::Shares([0.1, 0.2, 0.3, 0.4])] {
            for fit in [Fit::Crop, Fit::Pad, Fit::Stretch] {
                let (_, first) = picture.part(crop, fit).unwrap();
                let (_, again) = picture.part(Crop::Shares(first.crop), first.fit).unwrap();
                assert_eq!(again, first);
            }
        }
    }
}
