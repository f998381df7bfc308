//! The first frame of a GIF. The decoder sees nothing but that frame: comments and colour profiles are left out.

use ::image::RgbImage;

use super::error::ImageError;
use super::source::{Joined, Stopped};

const FORMAT: &str = "GIF";
const TRUNCATED: ImageError = ImageError::Truncated { format: FORMAT };

const HEADER_BYTES: usize = 13;
const IMAGE: u8 = 0x2C;
const EXTENSION: u8 = 0x21;
const GRAPHIC_CONTROL: u8 = 0xF9;

/// The parts of a file that its first frame needs.
#[derive(Debug, Clone, Copy)]
pub(super) struct Header<'a> {
    pub(super) width: u32,
    pub(super) height: u32,
    /// Pixels of the first frame, which may be smaller than the screen.
    pub(super) frame: (u32, u32),
    /// Signature, screen and palette.
    start: &'a [u8],
    /// Says which colour is transparent.
    control: &'a [u8],
    /// The frame, and all that follows.
    image: &'a [u8],
}

impl<'a> Header<'a> {
    pub(super) fn read(bytes: &'a [u8]) -> Result<Self, ImageError> {
        let header: &[u8; HEADER_BYTES] = bytes.first_chunk().ok_or(TRUNCATED)?;
        let side = |at: usize| u32::from(u16::from_le_bytes([header[at], header[at + 1]]));
        let (width, height) = (side(6), side(8));
        let palette = if header[10] & 0x80 != 0 { 3 << ((header[10] & 7) + 1) } else { 0 };
        let (start, mut rest) = bytes.split_at_checked(HEADER_BYTES + palette).ok_or(TRUNCATED)?;
        let mut control: &[u8] = &[];
        loop {
            match *rest {
                [IMAGE, _, _, _, _, w0, w1, h0, h1, ..] => {
                    let side = |low, high| u32::from(u16::from_le_bytes([low, high]));
                    let frame = (side(w0, w1), side(h0, h1));
                    return Ok(Self { width, height, frame, start, control, image: rest });
                }
                [EXTENSION, label, ..] => {
                    let (extension, after) = rest.split_at(2 + blocks_length(&rest[2..]).ok_or(TRUNCATED)?);
                    if label == GRAPHIC_CONTROL {
                        control = extension;
                    }
                    rest = after;
                }
                [IMAGE, ..] | [EXTENSION] | [] => return Err(TRUNCATED),
                _ => return Err(ImageError::broken(FORMAT, "it has no frame")),
            }
        }
    }

    /// Bytes that decoding takes, the result included: a byte for each pixel of the frame.
    pub(super) fn bytes_upper_bound(&self) -> u64 {
        let (width, height) = (u64::from(self.width), u64::from(self.height));
        3 * width * height + self.frame_bytes() + FIXED_BYTES
    }

    fn frame_bytes(&self) -> u64 {
        u64::from(self.frame.0) * u64::from(self.frame.1)
    }
}

/// Tables and buffers of the decoder.
const FIXED_BYTES: u64 = 256 << 10;

/// Bytes of blocks up to the empty one that ends them.
fn blocks_length(bytes: &[u8]) -> Option<usize> {
    let mut at = 0;
    loop {
        let length = usize::from(*bytes.get(at)?);
        at += 1 + length;
        if length == 0 {
            return Some(at);
        }
    }
}

/// The frame on a black screen.
pub(super) fn decode(header: &Header, stopped: Stopped) -> Result<RgbImage, ImageError> {
    let failed = |error: gif::DecodingError| match error {
        _ if stopped() => ImageError::Stopped,
        gif::DecodingError::UnexpectedEof => TRUNCATED,
        error => ImageError::broken(FORMAT, error),
    };
    let mut options = gif::DecodeOptions::new();
    options.set_color_output(gif::ColorOutput::Indexed);
    let most = header.frame_bytes().max(1 << 16).try_into().map_err(|_| TRUNCATED)?;
    options.set_memory_limit(gif::MemoryLimit::Bytes(most));
    let source = Joined::new([header.start, header.control, header.image], stopped);
    let mut decoder = options.read_info(source).map_err(failed)?;
    let screen = decoder.global_palette().map(<[u8]>::to_vec);
    let frame = decoder.read_next_frame().map_err(failed)?.ok_or(TRUNCATED)?;
    let palette = frame.palette.as_ref().or(screen.as_ref());
    let palette = palette.ok_or(ImageError::broken(FORMAT, "it has no palette"))?;
    let mut out = RgbImage::new(header.width, header.height);
    let (left, top, width) = (u32::from(frame.left), u32::from(frame.top), usize::from(frame.width));
    for (y, row) in (top..header.height).zip(frame.buffer.chunks_exact(width.max(1))) {
        for (x, &index) in (left..header.width).zip(row) {
            let color = palette.get(3 * usize::from(index)..).and_then(<[u8]>::first_chunk);
            if let Some(color) = color.filter(|_| frame.transparent != Some(index)) {
                out.get_pixel_mut(x, y).0 = *color;
            }
        }
    }
    Ok(out)
}
