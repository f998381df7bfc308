//! Pictures as smaller JPEGs: thumbnails of cameras, and examples that are kept.

use bytes::Bytes;
use jpeg_encoder::{ColorType, Encoder};
use model_core::image::RgbImage;

use super::decode::{DecodeError, Decoder};

/// How small a picture becomes.
#[derive(Debug, Clone, Copy)]
pub struct Reduction {
    /// Pixels along the longer side, at most.
    pub side: u16,
    /// Of the JPEG, from 1 to 100.
    pub quality: u8,
}

impl Reduction {
    /// A JPEG, upright, of an image file.
    ///
    /// # Errors
    /// When the file cannot be decoded.
    pub async fn apply(self, decoder: &Decoder, file: Bytes) -> Result<Vec<u8>, DecodeError> {
        decoder.whole(file, self.side.into(), move |image| self.encode(&self.shrunk(&image))).await?
    }

    /// Each pixel is the mean of those it stands for.
    fn shrunk(self, image: &RgbImage) -> RgbImage {
        let most = u32::from(self.side);
        let (width, height) = image.dimensions();
        let longer = width.max(height);
        if longer <= most {
            return image.clone();
        }
        let scaled = |side: u32| (u64::from(side) * u64::from(most) / u64::from(longer)).max(1) as u32;
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

    fn encode(self, image: &RgbImage) -> Result<Vec<u8>, DecodeError> {
        let mut jpeg = Vec::new();
        // Neither side has more than `side` pixels.
        let (width, height) = (image.width() as u16, image.height() as u16);
        let encoded = Encoder::new(&mut jpeg, self.quality).encode(image.as_raw(), width, height, ColorType::Rgb);
        encoded.map_err(|error| DecodeError::Internal(error.to_string()))?;
        Ok(jpeg)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reduced_picture_keeps_its_shape() {
        let reduction = Reduction { side: 320, quality: 75 };
        for ((width, height), expected) in [
            ((640, 480), (320, 240)),
            ((480, 640), (240, 320)),
            ((16, 9), (16, 9)),
            ((321, 1), (320, 1)),
            ((2000, 3), (320, 1)),
        ] {
            let small = reduction.shrunk(&RgbImage::from_pixel(width, height, [10, 20, 30].into()));
            assert_eq!(small.dimensions(), expected);
            assert!(small.pixels().all(|pixel| pixel.0 == [10, 20, 30]));
            assert_eq!(reduction.encode(&small).unwrap()[..2], [0xff, 0xd8]);
        }
    }
}
