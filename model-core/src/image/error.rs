//! Why bytes did not become an image. The variants follow the status codes a server answers with.

/// Why an image could not be decoded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// No bytes at all.
    #[error("the image is empty")]
    Empty,
    /// The bytes start like nothing that is known.
    #[error("not an image: the first bytes are those of no JPEG, PNG, WebP, GIF or BMP file")]
    NotAnImage,
    /// A file of a kind that is known and not decoded.
    #[error("{format} is not accepted; send JPEG, PNG, WebP, GIF or BMP")]
    UnsupportedFormat {
        /// As people call the format.
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
    /// What is to be looked at is not in the picture.
    #[error("the crop {},{},{},{} reaches outside of the picture, which has {width}x{height} pixels", crop[0], crop[1], crop[2], crop[3])]
    Crop {
        /// Left edge, top edge, width and height, in pixels.
        crop: [u64; 4],
        /// Width of the upright picture.
        width: u32,
        /// Height of the upright picture.
        height: u32,
    },
    /// A picture too long to be padded or stretched.
    #[error("the part of the picture is longer than {most} pixels, which is too long for `pad` and `stretch`")]
    TooLong { most: usize },
    /// A JPEG with four components, whose conversion to RGB depends on an ink profile.
    #[error("CMYK JPEG images are not accepted; convert to RGB")]
    Cmyk,
    /// A file that ends before its image does.
    #[error("the {format} is truncated")]
    Truncated {
        /// As people call the format.
        format: &'static str,
    },
    /// A JPEG with too little data between two markers.
    #[error("the JPEG is truncated: {done} of the {all} units of blocks of a scan are there")]
    MissingBlocks {
        /// Units of blocks that were decoded.
        done: usize,
        /// Units of blocks that the frame header announces.
        all: usize,
    },
    /// A file that starts like an image but cannot be decoded.
    #[error("the {format} cannot be decoded: {reason}")]
    Broken {
        /// As people call the format.
        format: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// The decoder met a case that its authors did not think of.
    #[error("the image cannot be decoded: its decoder failed")]
    DecoderFailed,
    /// The caller wanted the image no more.
    #[error("decoding was stopped")]
    Stopped,
}

impl ImageError {
    pub(super) fn broken(format: &'static str, reason: impl ToString) -> Self {
        Self::Broken { format, reason: reason.to_string() }
    }
}
