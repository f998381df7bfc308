//! PNG, row by row, as means of squares of pixels where a smaller scale is asked for.
//!
//! The decoder sees the chunks that make up the image and no others. Colour profiles and text are compressed, and
//! unpacking them can take a thousand times the size of the file.

use ::image::metadata::Orientation;
use ::image::{DynamicImage, GrayAlphaImage, GrayImage, ImageBuffer, RgbImage, RgbaImage};

use super::error::ImageError;
use super::orientation;
use super::rgb::{Means, flatten};
use super::source::{Joined, Stopped};

const FORMAT: &str = "PNG";
const SIGNATURE_BYTES: usize = 8;
const TRUNCATED: ImageError = ImageError::Truncated { format: FORMAT };

/// What the header says.
#[derive(Debug, Clone, Copy)]
pub(super) struct Header {
    pub(super) width: u32,
    pub(super) height: u32,
    /// Bytes of a pixel as the decoder gives it at most.
    pixel_bytes: u64,
    /// Rows come in seven passes, each over the whole image.
    interlaced: bool,
    pub(super) orientation: Orientation,
}

impl Header {
    pub(super) fn read(bytes: &[u8]) -> Result<Self, ImageError> {
        let (kind, header, _) = Chunks::new(bytes).next().ok_or(TRUNCATED)?;
        let (b"IHDR", &[w3, w2, w1, w0, h3, h2, h1, h0, depth, color, _, _, interlacing]) = (kind, header) else {
            return Err(ImageError::broken(FORMAT, "it does not begin with its header"));
        };
        // Grey, RGB and palettes may get alpha from a chunk to come.
        let channels = if color & 2 == 0 { 2 } else { 4 };
        let mut exif = Chunks::new(bytes).filter(|(kind, ..)| *kind == b"eXIf");
        let orientation = exif.find_map(|(_, exif, _)| orientation::of_exif(exif));
        Ok(Self {
            width: u32::from_be_bytes([w3, w2, w1, w0]),
            height: u32::from_be_bytes([h3, h2, h1, h0]),
            pixel_bytes: channels * if depth == 16 { 2 } else { 1 },
            interlaced: interlacing != 0,
            orientation: orientation.unwrap_or(Orientation::NoTransforms),
        })
    }

    /// Bytes that decoding at 1/`reduction` takes, the result included; `None` for a scale that it cannot be decoded at.
    pub(super) fn bytes_upper_bound(&self, reduction: u32) -> Option<u64> {
        let (width, pixels) = (u64::from(self.width), u64::from(self.width) * u64::from(self.height));
        let (out_width, out_height) = (self.width.div_ceil(reduction), self.height.div_ceil(reduction));
        let result = 3 * u64::from(out_width) * u64::from(out_height);
        // A row as it is stored, above and in turn; expanded; as RGB; and sums.
        let rows = (8 * self.pixel_bytes + 16) * width + WINDOW_BYTES;
        match (self.interlaced, reduction) {
            (true, 1) => Some(self.pixel_bytes * pixels + result.max(4 * pixels) + rows),
            (true, _) => None,
            (false, _) => Some(result + rows),
        }
    }
}

/// Of the decompressor: 32 KiB to refer to, and what has been unpacked ahead.
const WINDOW_BYTES: u64 = 512 << 10;

/// Decodes a file whose header has been read, rounding its size up.
pub(super) fn decode(bytes: &[u8], header: &Header, reduction: u32, stopped: Stopped) -> Result<RgbImage, ImageError> {
    let failed = |error: png::DecodingError| match error {
        _ if stopped() => ImageError::Stopped,
        png::DecodingError::IoError(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => TRUNCATED,
        error => ImageError::broken(FORMAT, error),
    };
    let mut decoder = png::Decoder::new(Joined::new(critical(bytes), stopped));
    decoder.set_transformations(png::Transformations::EXPAND);
    decoder.set_limits(png::Limits { bytes: header.bytes_upper_bound(reduction).unwrap_or(0) as usize });
    let mut reader = decoder.read_info().map_err(failed)?;
    let kind = reader.output_color_type();
    if header.interlaced {
        let mut samples = vec![0; reader.output_buffer_size().ok_or(TRUNCATED)?];
        reader.next_frame(&mut samples).map_err(failed)?;
        return to_rgb(samples, header.width, header.height, kind);
    }
    let mut means = Means::new(header.width, header.height, reduction);
    for _ in 0..header.height {
        let row = reader.next_row().map_err(failed)?.ok_or(TRUNCATED)?;
        means.push(&to_rgb(row.data().to_vec(), header.width, 1, kind)?);
    }
    means.finish().ok_or(TRUNCATED)
}

/// The slices of a file without the chunks that the image does not need. An end is put where it is missing.
fn critical(bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    const END: &[u8] = b"\0\0\0\0IEND\xAE\x42\x60\x82";
    let chunks = Chunks::new(bytes).filter(|(kind, ..)| matches!(*kind, b"IHDR" | b"PLTE" | b"tRNS" | b"IDAT"));
    std::iter::once(&bytes[..SIGNATURE_BYTES]).chain(chunks.map(|(.., whole)| whole)).chain(std::iter::once(END))
}

/// Walks chunks: kind, content, and the chunk with its length and checksum. The last may be cut short.
struct Chunks<'a> {
    rest: &'a [u8],
}

impl<'a> Chunks<'a> {
    fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes.get(SIGNATURE_BYTES..).unwrap_or_default() }
    }
}

impl<'a> Iterator for Chunks<'a> {
    type Item = (&'a [u8; 4], &'a [u8], &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let (length, rest) = self.rest.split_first_chunk()?;
        let (kind, content) = rest.split_first_chunk()?;
        let length = u32::from_be_bytes(*length) as usize;
        let content = &content[..length.min(content.len())];
        let (whole, rest) = self.rest.split_at(length.saturating_add(12).min(self.rest.len()));
        self.rest = rest;
        Some((kind, content, whole))
    }
}

/// Rows of samples as RGB8.
fn to_rgb(
    samples: Vec<u8>,
    width: u32,
    height: u32,
    (color, depth): (png::ColorType, png::BitDepth),
) -> Result<RgbImage, ImageError> {
    use png::{BitDepth, ColorType};
    let wide =
        |samples: &[u8]| samples.as_chunks().0.iter().map(|&pair| u16::from_be_bytes(pair)).collect::<Vec<u16>>();
    let image = match (color, depth) {
        (ColorType::Grayscale, BitDepth::Eight) => {
            GrayImage::from_raw(width, height, samples).map(DynamicImage::ImageLuma8)
        }
        (ColorType::GrayscaleAlpha, BitDepth::Eight) => {
            GrayAlphaImage::from_raw(width, height, samples).map(DynamicImage::ImageLumaA8)
        }
        (ColorType::Rgb, BitDepth::Eight) => RgbImage::from_raw(width, height, samples).map(DynamicImage::ImageRgb8),
        (ColorType::Rgba, BitDepth::Eight) => RgbaImage::from_raw(width, height, samples).map(DynamicImage::ImageRgba8),
        (ColorType::Grayscale, _) => {
            ImageBuffer::from_raw(width, height, wide(&samples)).map(DynamicImage::ImageLuma16)
        }
        (ColorType::GrayscaleAlpha, _) => {
            ImageBuffer::from_raw(width, height, wide(&samples)).map(DynamicImage::ImageLumaA16)
        }
        (ColorType::Rgb, _) => ImageBuffer::from_raw(width, height, wide(&samples)).map(DynamicImage::ImageRgb16),
        (ColorType::Rgba, _) => ImageBuffer::from_raw(width, height, wide(&samples)).map(DynamicImage::ImageRgba16),
        (ColorType::Indexed, _) => None,
    };
    image.map(flatten).ok_or(TRUNCATED)
}
