//! What the first bytes of a file say about decoding it: format, size, memory and scale. Nothing is allocated here that
//! depends on what they say.

use ::image::metadata::Orientation;

use super::error::ImageError;
use super::format::Format;
use super::picture::Turn;
use super::preprocess::Preprocess;
use super::view::Crop;
use super::{bmp, gif, jpeg, png, webp};

/// The largest image that is decoded.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DecodeLimits {
    /// Most pixels of an image, whatever its shape.
    pub max_pixels: u64,
    /// Most bytes a decoding may take; JPEG and PNG files that would take more are decoded at a reduced scale.
    pub max_bytes: u64,
    /// Pixels of the shorter side that are detail enough: JPEG and PNG files with more are decoded at a reduced scale that
    /// leaves at least so many, which takes less time and memory.
    pub detail: u32,
    /// The part whose sides count for the detail.
    pub crop: Crop,
}

impl DecodeLimits {
    /// The same, with detail enough for a model whose input has this side and comes out of `preprocess`: with a reduction
    /// of 8, each of its pixels is a weighted mean of 16 x 16, and moves by a sixteenth of the range of samples at the very
    /// most along each side.
    #[must_use]
    pub fn for_input(self, preprocess: &Preprocess, side: usize) -> Self {
        // The cast saturates.
        Self { detail: (f64::from(preprocess.reduction) * side as f64).ceil() as u32, ..self }
    }
}

impl Default for DecodeLimits {
    /// 16 Mi pixels: a 4096 x 4096 image, or any photo of a 16-megapixel camera; in whatever memory that takes,
    /// at its own scale.
    fn default() -> Self {
        Self { max_pixels: 16 << 20, max_bytes: u64::MAX, detail: u32::MAX, crop: Crop::default() }
    }
}

/// What the header of an image says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImageInfo {
    /// Pixels across, before EXIF orientation.
    pub width: u32,
    /// Pixels down, before EXIF orientation.
    pub height: u32,
    /// Pixels in a row of the file for each that is decoded.
    pub reduction: u32,
    /// No call of [`decode_picture`](super::decode_picture) on these bytes holds more memory than this at any moment,
    /// the result included and the encoded bytes not. [`decode`](super::decode) holds an image twice while it turns it
    /// by a right angle.
    pub decode_bytes_upper_bound: u64,
}

/// Reads the header of an image.
///
/// # Errors
/// [`ImageError`]: everything [`decode`](super::decode) reports that shows in the header.
pub fn probe(bytes: &[u8], limits: &DecodeLimits) -> Result<ImageInfo, ImageError> {
    Ok(Opened::new(bytes, limits)?.info)
}

/// Pixels across and down of an image as it is to be seen, EXIF orientation included.
///
/// # Errors
/// [`ImageError`] when there is no header of an image.
pub fn upright_size(bytes: &[u8]) -> Result<(u32, u32), ImageError> {
    let header = Header::read(bytes)?;
    Ok(Turn::from(header.orientation()).upright(header.size()))
}

/// A header, by format.
pub(super) enum Header<'a> {
    Jpeg(jpeg::Header),
    Png(png::Header),
    WebP(webp::Header<'a>),
    Gif(gif::Header<'a>),
    Bmp(bmp::Header),
}

impl<'a> Header<'a> {
    fn read(bytes: &'a [u8]) -> Result<Self, ImageError> {
        Ok(match Format::of(bytes)? {
            Format::Jpeg => Self::Jpeg(jpeg::Header::read(bytes)?),
            Format::Png => Self::Png(png::Header::read(bytes)?),
            Format::WebP => Self::WebP(webp::Header::read(bytes)?),
            Format::Gif => Self::Gif(gif::Header::read(bytes)?),
            Format::Bmp => Self::Bmp(bmp::Header::read(bytes)?),
        })
    }

    fn size(&self) -> (u32, u32) {
        match self {
            Self::Jpeg(header) => header.size(),
            Self::Png(header) => (header.width, header.height),
            Self::WebP(header) => header.size(),
            Self::Gif(header) => (header.width, header.height),
            Self::Bmp(header) => (header.width, header.height),
        }
    }

    /// The largest image within the file.
    fn largest(&self) -> (u32, u32) {
        match self {
            Self::Gif(header) => [self.size(), header.frame].into_iter().max_by_key(pixels).unwrap_or_default(),
            _ => self.size(),
        }
    }

    pub(super) fn orientation(&self) -> Orientation {
        match self {
            Self::Jpeg(header) => header.orientation,
            Self::Png(header) => header.orientation,
            Self::WebP(header) => header.orientation,
            Self::Gif(_) | Self::Bmp(_) => Orientation::NoTransforms,
        }
    }

    /// At 1/`n` of the scale, if the file can be decoded so.
    fn bytes_upper_bound(&self, n: u32) -> Option<u64> {
        match self {
            Self::Jpeg(header) => Some(jpeg::bytes_upper_bound(header, n)),
            Self::Png(header) => header.bytes_upper_bound(n),
            Self::WebP(header) => (n == 1).then(|| header.bytes_upper_bound()),
            Self::Gif(header) => (n == 1).then(|| header.bytes_upper_bound()),
            Self::Bmp(header) => (n == 1).then(|| header.bytes_upper_bound()),
        }
    }
}

fn pixels(&(width, height): &(u32, u32)) -> u64 {
    u64::from(width) * u64::from(height)
}

/// A file whose header has been read and found acceptable.
pub(super) struct Opened<'a> {
    pub(super) header: Header<'a>,
    pub(super) info: ImageInfo,
}

impl<'a> Opened<'a> {
    pub(super) fn new(bytes: &'a [u8], limits: &DecodeLimits) -> Result<Self, ImageError> {
        let header = Header::read(bytes)?;
        let (width, height) = header.size();
        if width == 0 || height == 0 {
            return Err(ImageError::ZeroSized { width, height });
        }
        let largest = header.largest();
        if pixels(&largest) > limits.max_pixels {
            return Err(ImageError::TooManyPixels { width: largest.0, height: largest.1, limit: limits.max_pixels });
        }
        let scales = [1, 2, 4, 8].map(|n| header.bytes_upper_bound(n).map(|bytes| (n, bytes)));
        let scales: Vec<(u32, u64)> = scales.into_iter().flatten().collect();
        let upright = Turn::from(header.orientation()).upright((width, height));
        let [_, _, w, h] = limits.crop.shares(upright)?;
        let shorter = (w * f64::from(upright.0)).min(h * f64::from(upright.1));
        let enough = |&(n, _): &(u32, u64)| n == 1 || shorter >= f64::from(n) * f64::from(limits.detail);
        // The smallest that is detail enough, or where memory is short a smaller one still.
        let start = scales.iter().rposition(enough).unwrap_or(0);
        let fitting = scales[start..].iter().find(|(_, bytes)| *bytes <= limits.max_bytes);
        let &(reduction, decode_bytes_upper_bound) = fitting.ok_or(ImageError::TooMuchMemory {
            width,
            height,
            needed: scales.last().map_or(0, |(_, bytes)| *bytes),
            limit: limits.max_bytes,
        })?;
        let info = ImageInfo { width, height, reduction, decode_bytes_upper_bound };
        Ok(Self { header, info })
    }
}
