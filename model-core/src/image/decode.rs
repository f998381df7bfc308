//! Untrusted bytes to RGB8, within the memory that [`probe`](super::probe) says.

use std::panic::{AssertUnwindSafe, catch_unwind};

use ::image::metadata::Orientation;
use ::image::{DynamicImage, RgbImage};

use super::error::ImageError;
use super::picture::Picture;
use super::probe::{DecodeLimits, Header, Opened};
use super::source::Stopped;
use super::{bmp, gif, jpeg, png, webp};

/// Decodes an image to RGB8, at the scale that [`probe`](super::probe) says: EXIF orientation applied, grey and palette
/// expanded, 16 bits rounded to 8, transparency flattened on black, of an animation the first frame.
///
/// # Errors
/// [`ImageError`] saying which kind of wrong the bytes are.
pub fn decode(bytes: &[u8], limits: &DecodeLimits) -> Result<RgbImage, ImageError> {
    let (rgb, orientation, _) = decode_as_stored(bytes, limits, &|| false)?;
    let mut rgb = DynamicImage::ImageRgb8(rgb);
    rgb.apply_orientation(orientation);
    Ok(rgb.into_rgb8())
}

/// As [`decode`], without ever holding two copies of the image. `stopped` is asked now and then, at least once for every
/// 64 KiB of the file and every row of a JPEG's blocks.
///
/// # Errors
/// As [`decode`], and [`ImageError::Stopped`].
pub fn decode_picture(bytes: &[u8], limits: &DecodeLimits, stopped: &dyn Fn() -> bool) -> Result<Picture, ImageError> {
    let (rgb, orientation, full_size) = decode_as_stored(bytes, limits, stopped)?;
    Ok(Picture::new(rgb, orientation, full_size))
}

/// The image before its EXIF orientation is applied, with its width and height before it was reduced.
fn decode_as_stored(
    bytes: &[u8],
    limits: &DecodeLimits,
    stopped: Stopped,
) -> Result<(RgbImage, Orientation, (u32, u32)), ImageError> {
    let Opened { header, info } = Opened::new(bytes, limits)?;
    let decode = || match &header {
        Header::Jpeg(header) => jpeg::decode(bytes, header, info.reduction, stopped),
        Header::Png(header) => png::decode(bytes, header, info.reduction, stopped),
        Header::WebP(header) => webp::decode(header, stopped),
        Header::Gif(header) => gif::decode(header, stopped),
        Header::Bmp(header) => bmp::decode(bytes, header, stopped),
    };
    // Libraries have panicked at files. All that a decoder works on goes with it.
    let rgb = catch_unwind(AssertUnwindSafe(decode)).unwrap_or(Err(ImageError::DecoderFailed))?;
    Ok((rgb, header.orientation(), (info.width, info.height)))
}
