//! Why bytes did not become an image. The variants follow the status codes a server answers with.

/// Why an image could not be decoded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// No bytes at all.
    #[error("the image is empty")]
    Empty,
    /// The bytes start like no image format.
    #[error("not an image: the first bytes are those of no JPEG, PNG, WebP, GIF or BMP file")]
    NotAnImage,
    /// An image, but in a format that is not decoded here.
    #[error("{format} images are not accepted; send JPEG, PNG, WebP, GIF or BMP")]
    UnsupportedFormat {
        /// File extension of the format.
        format: &'static str,
    },
    /// The header announces more pixels than allowed; nothing was decoded.
    #[error("the image has {width}x{height} pixels; at most {limit} are accepted")]
    TooManyPixels {
        /// Width in the header.
        width: u32,
        /// Height in the header.
        height: u32,
        limit: u64,
    },
    /// The header announces dimensions that no decoder takes.
    #[error("the image's dimensions are beyond what is decoded; at most {limit} pixels are accepted")]
    TooLarge { limit: u64 },
    /// Decoding would take more memory than allowed, at whatever scale.
    #[error("decoding the {width}x{height} image would take {needed} bytes; at most {limit} are allowed")]
    TooMuchMemory {
        /// Width in the header.
        width: u32,
        /// Height in the header.
        height: u32,
        /// Bytes at the smallest scale it can be decoded at.
        needed: u64,
        /// Most bytes allowed.
        limit: u64,
    },
    /// An image without pixels.
    #[error("the image has {width}x{height} pixels: it is empty")]
    ZeroSized {
        /// Width in the header.
        width: u32,
        /// Height in the header.
        height: u32,
    },
    /// A JPEG with four components, whose conversion to RGB depends on an ink profile.
    #[error("CMYK JPEG images are not accepted; convert to RGB")]
    Cmyk,
    /// A JPEG that ends before its end-of-image marker.
    #[error("the JPEG is truncated: it has no end-of-image marker")]
    TruncatedJpeg,
    /// A PNG with fewer rows, or shorter ones, than its header says.
    #[error("the PNG is truncated")]
    TruncatedPng,
    /// The file starts like an image but cannot be decoded.
    #[error("the image cannot be decoded: {0}")]
    Undecodable(#[source] ::image::ImageError),
}
