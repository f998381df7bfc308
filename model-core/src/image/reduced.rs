//! Large JPEG and PNG files at a fraction of their scale, in a fraction of the memory. PNG is read row by row, as means of
//! square blocks; of each block of a JPEG only the coarsest coefficients are transformed, which at an eighth of the scale is
//! the mean. Both average over the same squares as the resizing that follows.

use std::io::Cursor;

use ::image::error::{DecodingError, ImageFormatHint};
use ::image::{DynamicImage, GrayAlphaImage, GrayImage, ImageBuffer, ImageFormat, RgbImage, RgbaImage};
use jpeg_decoder::{CodingProcess, PixelFormat};

use super::decode::{ImageInfo, flatten};
use super::error::ImageError;
use super::jpeg::JpegMarkers;

/// Whether rows of a PNG file come in seven passes, each over the whole image.
pub(super) fn is_interlaced(bytes: &[u8]) -> bool {
    // The last field of the header, which is always the first chunk.
    bytes.get(28).is_some_and(|&method| method != 0)
}

/// Decodes a JPEG file, whose markers are given, or a PNG file at the scale that `info` says, rounded up.
pub(super) fn decode(bytes: &[u8], jpeg: Option<&JpegMarkers>, info: &ImageInfo) -> Result<RgbImage, ImageError> {
    match jpeg {
        Some(markers) => decode_jpeg(bytes, markers, info),
        None => decode_png(bytes, info.reduction),
    }
}

fn undecodable(format: ImageFormat, error: impl std::error::Error + Send + Sync + 'static) -> ImageError {
    ImageError::Undecodable(::image::ImageError::Decoding(DecodingError::new(ImageFormatHint::Exact(format), error)))
}

fn decode_jpeg(bytes: &[u8], markers: &JpegMarkers, info: &ImageInfo) -> Result<RgbImage, ImageError> {
    let undecodable = |error: jpeg_decoder::Error| undecodable(ImageFormat::Jpeg, error);
    let mut decoder = jpeg_decoder::Decoder::new(bytes);
    decoder.read_info().map_err(undecodable)?;
    let whole = decoder.info().ok_or(ImageError::TruncatedJpeg)?;
    // The memory was granted for the frame that another decoder and our own walk over the markers found.
    let same_size = (u32::from(whole.width), u32::from(whole.height)) == (info.width, info.height);
    if !same_size || (whole.coding_process == CodingProcess::DctProgressive) != markers.progressive {
        return Err(ImageError::TruncatedJpeg);
    }
    // The decoder takes the smallest of its scales that gives a side as long as asked for.
    let part = |side: u16| u32::from(side).div_ceil(info.reduction) as u16;
    decoder.scale(part(whole.width), part(whole.height)).map_err(undecodable)?;
    let samples = decoder.decode().map_err(undecodable)?;
    let (width, height) = decoder.info().map_or((0, 0), |info| (info.width.into(), info.height.into()));
    let image = match whole.pixel_format {
        PixelFormat::RGB24 => RgbImage::from_raw(width, height, samples),
        PixelFormat::L8 => {
            GrayImage::from_raw(width, height, samples).map(|grey| DynamicImage::ImageLuma8(grey).into_rgb8())
        }
        PixelFormat::L16 | PixelFormat::CMYK32 => None,
    };
    image.ok_or(ImageError::TruncatedJpeg)
}

fn decode_png(bytes: &[u8], n: u32) -> Result<RgbImage, ImageError> {
    let undecodable = |error: png::DecodingError| undecodable(ImageFormat::Png, error);
    let mut decoder = png::Decoder::new(Cursor::new(bytes));
    decoder.set_transformations(png::Transformations::EXPAND);
    let mut reader = decoder.read_info().map_err(undecodable)?;
    let (width, height) = reader.info().size();
    let kind = reader.output_color_type();
    let (out_width, out_height) = (width.div_ceil(n), height.div_ceil(n));
    let mut out = Vec::with_capacity(3 * out_width as usize * out_height as usize);
    let mut sums = vec![0u32; 3 * out_width as usize];
    for y in 0..height {
        let row = reader.next_row().map_err(undecodable)?;
        let samples = row.map(|row| rgb_row(row.data(), width, kind)).ok_or(ImageError::TruncatedPng)??;
        for (pixel, sample) in samples.chunks_exact(3).enumerate() {
            let sums = &mut sums[3 * (pixel / n as usize)..][..3];
            sums.iter_mut().zip(sample).for_each(|(sum, &sample)| *sum += u32::from(sample));
        }
        let rows = y % n + 1;
        if rows == n || y + 1 == height {
            for (block, sums) in (0..).zip(sums.chunks_exact(3)) {
                // The last block of a row, and the last row of blocks, may be smaller.
                let count = rows * n.min(width - block * n);
                out.extend(sums.iter().map(|sum| ((sum + count / 2) / count) as u8));
            }
            sums.fill(0);
        }
    }
    RgbImage::from_raw(out_width, out_height, out).ok_or(ImageError::TruncatedPng)
}

/// A row as RGB8, by the same conversions as a whole image.
fn rgb_row(row: &[u8], width: u32, (color, depth): (png::ColorType, png::BitDepth)) -> Result<Vec<u8>, ImageError> {
    use png::{BitDepth, ColorType};
    let wide = || row.chunks_exact(2).map(|pair| u16::from_be_bytes([pair[0], pair[1]])).collect::<Vec<u16>>();
    let image = match (color, depth) {
        (ColorType::Grayscale, BitDepth::Eight) => {
            GrayImage::from_raw(width, 1, row.to_vec()).map(DynamicImage::ImageLuma8)
        }
        (ColorType::GrayscaleAlpha, BitDepth::Eight) => {
            GrayAlphaImage::from_raw(width, 1, row.to_vec()).map(DynamicImage::ImageLumaA8)
        }
        (ColorType::Rgb, BitDepth::Eight) => RgbImage::from_raw(width, 1, row.to_vec()).map(DynamicImage::ImageRgb8),
        (ColorType::Rgba, BitDepth::Eight) => RgbaImage::from_raw(width, 1, row.to_vec()).map(DynamicImage::ImageRgba8),
        (ColorType::Grayscale, _) => ImageBuffer::from_raw(width, 1, wide()).map(DynamicImage::ImageLuma16),
        (ColorType::GrayscaleAlpha, _) => ImageBuffer::from_raw(width, 1, wide()).map(DynamicImage::ImageLumaA16),
        (ColorType::Rgb, _) => ImageBuffer::from_raw(width, 1, wide()).map(DynamicImage::ImageRgb16),
        (ColorType::Rgba, _) => ImageBuffer::from_raw(width, 1, wide()).map(DynamicImage::ImageRgba16),
        (ColorType::Indexed, _) => None,
    };
    image.map(|image| flatten(image).into_raw()).ok_or(ImageError::TruncatedPng)
}
