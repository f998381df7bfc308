//! BMP. Its pixels lie in the file as they are, or as runs.

use ::image::codecs::bmp::BmpDecoder;
use ::image::{DynamicImage, ImageError as DecoderError, RgbImage};

use super::error::ImageError;
use super::rgb::flatten;
use super::source::{Stopped, Whole};

const FORMAT: &str = "BMP";
const TRUNCATED: ImageError = ImageError::Truncated { format: FORMAT };

/// What the header says.
#[derive(Debug, Clone, Copy)]
pub(super) struct Header {
    pub(super) width: u32,
    pub(super) height: u32,
}

impl Header {
    pub(super) fn read(bytes: &[u8]) -> Result<Self, ImageError> {
        let field = |at: usize| bytes.get(at..).and_then(<[u8]>::first_chunk).copied().ok_or(TRUNCATED);
        let (width, height) = if u32::from_le_bytes(field(14)?) == 12 {
            let [w0, w1, h0, h1] = field(18)?;
            (u16::from_le_bytes([w0, w1]).into(), u16::from_le_bytes([h0, h1]).into())
        } else {
            // A negative height says that the rows start at the top.
            (i32::from_le_bytes(field(18)?), i32::from_le_bytes(field(22)?))
        };
        let width = u32::try_from(width).map_err(|_| ImageError::broken(FORMAT, "its width is negative"))?;
        Ok(Self { width, height: height.unsigned_abs() })
    }

    /// Bytes that decoding takes, the result included.
    pub(super) fn bytes_upper_bound(&self) -> u64 {
        // Up to four bytes a pixel, flattened in place; rows and a palette.
        4 * u64::from(self.width) * u64::from(self.height) + 16 * u64::from(self.width) + (64 << 10)
    }
}

pub(super) fn decode(bytes: &[u8], header: &Header, stopped: Stopped) -> Result<RgbImage, ImageError> {
    let failed = |error: DecoderError| match error {
        _ if stopped() => ImageError::Stopped,
        DecoderError::IoError(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => TRUNCATED,
        error => ImageError::broken(FORMAT, error),
    };
    let decoder = BmpDecoder::new(Whole::new(bytes, stopped)).map_err(failed)?;
    let decoded = DynamicImage::from_decoder(decoder).map_err(failed)?;
    let as_announced = (decoded.width(), decoded.height()) == (header.width, header.height);
    if as_announced { Ok(flatten(decoded)) } else { Err(ImageError::broken(FORMAT, "its header contradicts itself")) }
}
