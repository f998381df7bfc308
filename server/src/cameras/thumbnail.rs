//! A frame as a small JPEG.

use bytes::Bytes;
use jpeg_encoder::{ColorType, Encoder};
use model_core::image::RgbImage;

use crate::compute::decode::{DecodeError, Decoder};

/// Pixels along the longer side.
const SIDE: u32 = 320;
/// Of the JPEG, from 1 to 100.
const QUALITY: u8 = 75;

/// A small JPEG of an image file.
///
/// # Errors
/// When the file cannot be decoded.
pub async fn thumbnail(decoder: &Decoder, frame: Bytes) -> Result<Vec<u8>, DecodeError> {
    decoder.whole(frame, SIDE, |image| encode(&shrunk(&image))).await?
}

/// At most [`SIDE`] pixels along the longer side; each is the mean of those it stands for.
fn shrunk(image: &RgbImage) -> RgbImage {
    let (width, height) = image.dimensions();
    let longer = width.max(height);
    if longer <= SIDE {
        return image.clone();
    }
    let scaled = |side: u32| (u64::from(side) * u64::from(SIDE) / u64::from(longer)).max(1) as u32;
    let (small_width, small_height) = (scaled(width), scaled(height));
    let range = |at: u32, small: u32, large: u32| {
        let edge = |at: u32| (u64::from(at) * u64::from(large) / u64::from(small)) as u32;
        edge(at)..edge(at + 1).max(edge(at) + 1)
    };
    RgbImage::from_fn(small_width, small_height, |x, y| {
        let (columns, rows) = (range(x, small_width, width), range(y, small_height, height));
        let count = columns.len() as u64 * rows.len() as u64;
        let mut sums = [0_u64; 3];
        for row in rows {
            for column in columns.clone() {
                let pixel = image.get_pixel(column, row).0;
                sums.iter_mut().zip(pixel).for_each(|(sum, value)| *sum += u64::from(value));
            }
        }
        sums.map(|sum| (sum / count) as u8).into()
    })
}

fn encode(image: &RgbImage) -> Result<Vec<u8>, DecodeError> {
    let mut jpeg = Vec::new();
    // Neither side has more than `SIDE` pixels.
    let (width, height) = (image.width() as u16, image.height() as u16);
    let encoded = Encoder::new(&mut jpeg, QUALITY).encode(image.as_raw(), width, height, ColorType::Rgb);
    encoded.map_err(|error| DecodeError::Internal(error.to_string()))?;
    Ok(jpeg)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thumbnail_keeps_the_shape_of_its_picture() {
        for ((width, height), expected) in [
            ((640, 480), (320, 240)),
            ((480, 640), (240, 320)),
            ((16, 9), (16, 9)),
            ((321, 1), (320, 1)),
            ((2000, 3), (320, 1)),
        ] {
            let small = shrunk(&RgbImage::from_pixel(width, height, [10, 20, 30].into()));
            assert_eq!(small.dimensions(), expected);
            assert!(small.pixels().all(|pixel| pixel.0 == [10, 20, 30]));
            assert_eq!(encode(&small).unwrap()[..2], [0xff, 0xd8]);
        }
    }
}
