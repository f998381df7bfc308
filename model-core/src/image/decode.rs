//! Untrusted bytes to RGB8: header first, dimensions checked before anything is allocated from them.

use std::io::Cursor;

use ::image::metadata::Orientation;
use ::image::{ColorType, DynamicImage, ImageDecoder, ImageFormat, ImageReader, Limits, RgbImage};

use super::error::ImageError;
use super::jpeg::{self, JpegMarkers};
use super::{reduced, turned};

/// The largest image that is decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DecodeLimits {
    /// Most pixels of an image, whatever its shape.
    pub max_pixels: u64,
    /// Most bytes a decoding may take; JPEG and PNG files that would take more are decoded at a reduced scale.
    pub max_bytes: u64,
    /// Pixels of the shorter side that are detail enough: JPEG and PNG files with more are decoded at a reduced scale that
    /// leaves at least so many, which takes less time and memory.
    pub detail: u32,
}

impl DecodeLimits {
    /// Pixels decoded for each that a model sees, along a side. Each of the model's is then a weighted mean of 16 x 16,
    /// and moves by a sixteenth of the range of samples at the very most along each side.
    const OVERSAMPLING: u32 = 8;

    /// The same, with detail enough for a model whose input has this side.
    #[must_use]
    pub fn for_side(self, side: usize) -> Self {
        Self { detail: u32::try_from(side).unwrap_or(u32::MAX).saturating_mul(Self::OVERSAMPLING), ..self }
    }
}

impl Default for DecodeLimits {
    /// 16 Mi pixels: a 4096 x 4096 image, or any photo of a 16-megapixel camera; in whatever memory that takes,
    /// at its own scale.
    fn default() -> Self {
        Self { max_pixels: 16 << 20, max_bytes: u64::MAX, detail: u32::MAX }
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
    /// No call of [`decode_square`] on these bytes holds more memory than this at any moment, the result included and
    /// the encoded bytes not. [`decode`] holds an image twice while it turns it by a right angle.
    pub decode_bytes_upper_bound: u64,
}

/// Reads the header of an image, allocating nothing that depends on its dimensions.
///
/// # Errors
/// [`ImageError`]: everything [`decode`] reports that shows in the header.
pub fn probe(bytes: &[u8], limits: &DecodeLimits) -> Result<ImageInfo, ImageError> {
    Ok(Opened::new(bytes, limits)?.info)
}

/// Decodes an image to RGB8, at the scale that [`probe`] says: EXIF orientation applied, grey and palette expanded, 16
/// bits rounded to 8, transparency flattened on black, of an animation the first frame.
///
/// # Errors
/// [`ImageError`] saying which kind of wrong the bytes are.
pub fn decode(bytes: &[u8], limits: &DecodeLimits) -> Result<RgbImage, ImageError> {
    let (rgb, orientation) = decode_as_stored(bytes, limits)?;
    let mut rgb = DynamicImage::ImageRgb8(rgb);
    rgb.apply_orientation(orientation);
    Ok(rgb.into_rgb8())
}

/// The largest centred square of what [`decode`] gives, without ever holding two copies of the image.
///
/// # Errors
/// As [`decode`].
pub fn decode_square(bytes: &[u8], limits: &DecodeLimits) -> Result<RgbImage, ImageError> {
    let (rgb, orientation) = decode_as_stored(bytes, limits)?;
    Ok(turned::square(rgb, orientation))
}

/// The image before its EXIF orientation is applied.
fn decode_as_stored(bytes: &[u8], limits: &DecodeLimits) -> Result<(RgbImage, Orientation), ImageError> {
    let Opened { mut decoder, jpeg, info, orientation } = Opened::new(bytes, limits)?;
    if info.reduction > 1 {
        return Ok((reduced::decode(bytes, jpeg.as_ref(), &info)?, orientation));
    }
    let mut allocations = Limits::no_limits();
    allocations.max_alloc = Some(info.decode_bytes_upper_bound);
    decoder.set_limits(allocations).map_err(ImageError::Undecodable)?;
    let decoded = DynamicImage::from_decoder(decoder).map_err(ImageError::Undecodable)?;
    Ok((flatten(decoded), orientation))
}

/// A decoder whose header has been read and found acceptable.
struct Opened<'a> {
    decoder: Box<dyn ImageDecoder + 'a>,
    jpeg: Option<JpegMarkers>,
    info: ImageInfo,
    orientation: Orientation,
}

impl<'a> Opened<'a> {
    fn new(bytes: &'a [u8], limits: &DecodeLimits) -> Result<Self, ImageError> {
        if bytes.is_empty() {
            return Err(ImageError::Empty);
        }
        let format = ::image::guess_format(bytes).map_err(|_| ImageError::NotAnImage)?;
        let jpeg = match format {
            ImageFormat::Jpeg => Some(check_jpeg(bytes)?),
            ImageFormat::Png | ImageFormat::WebP | ImageFormat::Gif | ImageFormat::Bmp => None,
            other => {
                let format = other.extensions_str().first().copied().unwrap_or("such");
                return Err(ImageError::UnsupportedFormat { format });
            }
        };
        let reader = ImageReader::with_format(Cursor::new(bytes), format);
        let mut decoder = reader.into_decoder().map_err(|error| match error {
            // The decoder's own ceiling, met before the header is handed over.
            ::image::ImageError::Limits(_) => ImageError::TooLarge { limit: limits.max_pixels },
            error => ImageError::Undecodable(error),
        })?;
        let (width, height) = decoder.dimensions();
        if width == 0 || height == 0 {
            return Err(ImageError::ZeroSized { width, height });
        }
        let pixels = u64::from(width) * u64::from(height);
        if pixels > limits.max_pixels {
            return Err(ImageError::TooManyPixels { width, height, limit: limits.max_pixels });
        }
        // Broken EXIF is no reason to refuse a photo.
        let orientation = decoder.orientation().unwrap_or(Orientation::NoTransforms);
        let job = Job {
            format,
            jpeg,
            interlaced: format == ImageFormat::Png && reduced::is_interlaced(bytes),
            color: decoder.color_type(),
            width: width.into(),
            height: height.into(),
            file_bytes: bytes.len() as u64,
        };
        let scales = [1, 2, 4, 8].map(|n| job.bytes_upper_bound(n).map(|bytes| (n, bytes)));
        let scales: Vec<(u32, u64)> = scales.into_iter().flatten().collect();
        let enough = |&(n, _): &(u32, u64)| n == 1 || width.min(height) / n >= limits.detail;
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
        Ok(Self { decoder: Box::new(decoder), jpeg, info, orientation })
    }
}

/// Refuses what the decoder would let pass.
fn check_jpeg(bytes: &[u8]) -> Result<JpegMarkers, ImageError> {
    match jpeg::markers(bytes) {
        Some(markers) if markers.components == 4 => Err(ImageError::Cmyk),
        Some(markers) if markers.complete => Ok(markers),
        _ => Err(ImageError::TruncatedJpeg),
    }
}

/// What the memory of a decoding depends on.
struct Job {
    format: ImageFormat,
    jpeg: Option<JpegMarkers>,
    interlaced: bool,
    color: ColorType,
    width: u64,
    height: u64,
    file_bytes: u64,
}

impl Job {
    /// Tables, rows in flight and windows of the decompressors, whatever the image.
    const FIXED_BYTES: u64 = 1 << 20;
    /// Bytes a decoder keeps per pixel of width: JPEG holds a few rows of 16x16 blocks, others less.
    const BYTES_PER_COLUMN: u64 = 512;

    /// At 1/`n` of the scale, if the file can be decoded so.
    fn bytes_upper_bound(&self, n: u32) -> Option<u64> {
        if n == 1 { Some(self.whole_bytes_upper_bound()) } else { self.reduced_bytes_upper_bound(n) }
    }

    fn whole_bytes_upper_bound(&self) -> u64 {
        let (pixels, file_bytes) = (self.width * self.height, self.file_bytes);
        let native = pixels * u64::from(self.color.bytes_per_pixel());
        // Beside the output: JPEG keeps a copy of the file, and progressive files 16-bit coefficients of up to three
        // components; WebP holds a frame of 4 bytes a pixel beside its planes; GIF composes one.
        let working = match self.format {
            ImageFormat::Jpeg => {
                2 * file_bytes + if self.jpeg.is_some_and(|jpeg| jpeg.progressive) { 7 * pixels } else { 0 }
            }
            ImageFormat::WebP => 8 * pixels + file_bytes,
            ImageFormat::Gif => 5 * pixels,
            _ => 0,
        };
        let converting = match self.color {
            ColorType::Rgb8 | ColorType::Rgba8 => 0,
            _ if self.color.has_alpha() => 4 * pixels,
            _ => 3 * pixels,
        };
        let peak = (native + working).max(native + converting);
        peak + Self::FIXED_BYTES + self.width * Self::BYTES_PER_COLUMN
    }

    fn reduced_bytes_upper_bound(&self, n: u32) -> Option<u64> {
        let (width, height) = (self.width.div_ceil(n.into()), self.height.div_ceil(n.into()));
        // The result, and rows of the file in the forms they take on the way.
        let common = 3 * width * height + Self::FIXED_BYTES + self.width * Self::BYTES_PER_COLUMN;
        match (self.format, &self.jpeg) {
            (ImageFormat::Png, _) if !self.interlaced => Some(common + 64 * self.width),
            (ImageFormat::Jpeg, Some(jpeg)) => {
                // Planes of up to three components, filled up to whole units of at most 32 x 32 pixels, what else the file
                // carries, and of progressive files the coefficients; those of one component twice, if they never
                // become final.
                let planes = 3 * (width + 32) * (height + 32);
                let (all, largest) = jpeg.coefficient_bytes(self.width, self.height);
                let coefficients = if jpeg.progressive { all + largest } else { 0 };
                Some(common + planes + self.file_bytes + coefficients)
            }
            _ => None,
        }
    }
}

/// Any colour type to RGB8; 16-bit samples round to the nearest of 8 bits, and alpha blends with black.
pub(super) fn flatten(image: DynamicImage) -> RgbImage {
    if !image.color().has_alpha() {
        return image.into_rgb8();
    }
    let rgba = image.into_rgba8();
    let (width, height) = rgba.dimensions();
    let mut samples = rgba.into_raw();
    let pixels = samples.len() / 4;
    // In place: three samples are written where four were read.
    for pixel in 0..pixels {
        let alpha = samples[4 * pixel + 3];
        for channel in 0..3 {
            samples[3 * pixel + channel] = on_black(samples[4 * pixel + channel], alpha);
        }
    }
    samples.truncate(3 * pixels);
    RgbImage::from_raw(width, height, samples).expect("three samples a pixel were kept")
}

/// `round(sample * alpha / 255)`, halves up.
fn on_black(sample: u8, alpha: u8) -> u8 {
    ((u32::from(sample) * u32::from(alpha) * 2 + 255) / 510) as u8
}

#[cfg(test)]
mod tests {
    use ::image::{ImageBuffer, Luma};

    use super::*;

    #[test]
    fn alpha_blends_with_black_to_the_nearest() {
        for sample in 0..=255u8 {
            for alpha in 0..=255u8 {
                let exact = f64::from(sample) * f64::from(alpha) / 255.0;
                assert_eq!(f64::from(on_black(sample, alpha)), (exact + 0.5).floor(), "{sample} at {alpha}");
            }
        }
    }

    #[test]
    fn sixteen_bits_round_to_the_nearest_of_eight() {
        let all = ImageBuffer::<Luma<u16>, _>::from_raw(256, 256, (0..=u16::MAX).collect()).unwrap();
        let rgb = flatten(DynamicImage::ImageLuma16(all));
        for (wide, pixel) in (0..=u16::MAX).zip(rgb.pixels()) {
            let nearest = ((u32::from(wide) * 255 + 32767) / 65535) as u8;
            assert_eq!(pixel.0, [nearest; 3], "{wide}");
        }
    }
}
