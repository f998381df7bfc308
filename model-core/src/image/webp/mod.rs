//! The image or first frame of a WebP file.
//!
//! The decoder behind trusts what files say about their own size. So its chunks are walked here first ([`chunks`]), and
//! what their bitstreams would make it allocate is bounded ([`lossless`], [`lossy`]); then it is given a file that holds
//! a single image with the size of its canvas, and nothing else.

mod chunks;
mod lossless;
mod lossy;

use ::image::metadata::Orientation;
use ::image::{RgbImage, imageops};
use image_webp::{DecodingError, WebPDecoder};

use super::error::ImageError;
use super::orientation;
use super::rgb::without_alpha;
use super::source::{Stopped, Whole};
use chunks::{Bitstream, File};

const FORMAT: &str = "WebP";
const TRUNCATED: ImageError = ImageError::Truncated { format: FORMAT };

fn broken(reason: &str) -> ImageError {
    ImageError::broken(FORMAT, reason)
}

/// What the chunks say.
#[derive(Debug, Clone, Copy)]
pub(super) struct Header<'a> {
    file: File<'a>,
    pub(super) orientation: Orientation,
}

impl<'a> Header<'a> {
    pub(super) fn read(bytes: &'a [u8]) -> Result<Self, ImageError> {
        let file = File::read(bytes)?;
        let orientation = file.exif.and_then(orientation::of_exif).unwrap_or(Orientation::NoTransforms);
        Ok(Self { file, orientation })
    }

    /// Pixels of the canvas.
    pub(super) fn size(&self) -> (u32, u32) {
        self.file.canvas
    }

    /// Bytes that decoding takes, the result included.
    pub(super) fn bytes_upper_bound(&self) -> u64 {
        let area = |(width, height): (u32, u32)| u64::from(width) * u64::from(height);
        let frame = &self.file.frame;
        let file_bytes = (frame.image.bytes().len() + frame.alpha.map_or(0, <[u8]>::len)) as u64;
        // RGBA, flattened in place. Beside it lossless images have a second copy and tables for squares of 4 x 4 pixels,
        // lossy ones planes, and what is lossless of them is their alpha.
        let lossless = 5 * area(frame.size) + lossless::TABLE_BYTES;
        let lossy = area((frame.size.0 + 16, frame.size.1 + 16)) * 3 / 2;
        let working = match (frame.image, frame.alpha) {
            (Bitstream::Lossless(_), _) => lossless,
            (Bitstream::Lossy(_), Some(_)) => lossy + lossless + area(frame.size),
            (Bitstream::Lossy(_), None) => lossy,
        };
        let canvas = if frame.size == self.file.canvas { 0 } else { 3 * area(self.file.canvas) };
        // The file that the decoder is given, and its copies of it.
        4 * area(frame.size) + working.max(canvas) + 4 * file_bytes + FIXED_BYTES
    }
}

const FIXED_BYTES: u64 = 512 << 10;

/// The image on a black canvas.
pub(super) fn decode(header: &Header, stopped: Stopped) -> Result<RgbImage, ImageError> {
    let File { canvas, frame, .. } = header.file;
    match frame.image {
        Bitstream::Lossless(bytes) => lossless::check(lossless::body(bytes)?, frame.size, stopped)?,
        Bitstream::Lossy(bytes) => lossy::check(bytes)?,
    }
    if let Some(alpha) = frame.alpha {
        chunks::check_alpha(alpha, frame.size, stopped)?;
    }
    let image = decode_single(&frame.to_file(), frame.size, stopped)?;
    if frame.size == canvas {
        return Ok(image);
    }
    let mut whole = RgbImage::new(canvas.0, canvas.1);
    imageops::replace(&mut whole, &image, frame.at.0.into(), frame.at.1.into());
    Ok(whole)
}

/// Decodes a file that holds an image of this size.
fn decode_single(file: &[u8], (width, height): (u32, u32), stopped: Stopped) -> Result<RgbImage, ImageError> {
    let failed = |error: DecodingError| match error {
        _ if stopped() => ImageError::Stopped,
        DecodingError::IoError(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => TRUNCATED,
        error => ImageError::broken(FORMAT, error),
    };
    let mut decoder = WebPDecoder::new(Whole::new(file, stopped)).map_err(failed)?;
    let mut samples = vec![0; decoder.output_buffer_size().ok_or(TRUNCATED)?];
    let has_alpha = decoder.has_alpha();
    decoder.read_image(&mut samples).map_err(failed)?;
    let samples = if has_alpha { without_alpha(samples) } else { samples };
    RgbImage::from_raw(width, height, samples).ok_or_else(|| broken("its size contradicts itself"))
}
