//! The RIFF container: which chunks hold the image, and whether their sizes agree.

use super::super::error::ImageError;
use super::super::source::Stopped;
use super::{TRUNCATED, broken, lossless, lossy};

/// The data of an image.
#[derive(Debug, Clone, Copy)]
pub(super) enum Bitstream<'a> {
    Lossy(&'a [u8]),
    Lossless(&'a [u8]),
}

impl<'a> Bitstream<'a> {
    pub(super) fn bytes(self) -> &'a [u8] {
        let (Self::Lossy(bytes) | Self::Lossless(bytes)) = self;
        bytes
    }

    fn size(self) -> Result<(u32, u32), ImageError> {
        match self {
            Self::Lossy(bytes) => lossy::size(bytes),
            Self::Lossless(bytes) => lossless::size(bytes),
        }
    }
}

/// An image on the canvas.
#[derive(Debug, Clone, Copy)]
pub(super) struct Frame<'a> {
    /// Its left upper corner.
    pub(super) at: (u32, u32),
    /// Pixels across and down, as its bitstream says.
    pub(super) size: (u32, u32),
    pub(super) image: Bitstream<'a>,
    /// The alpha of a lossy image.
    pub(super) alpha: Option<&'a [u8]>,
}

#[derive(Debug, Clone, Copy)]
pub(super) struct File<'a> {
    /// Pixels across and down.
    pub(super) canvas: (u32, u32),
    pub(super) frame: Frame<'a>,
    pub(super) exif: Option<&'a [u8]>,
}

impl<'a> File<'a> {
    /// # Errors
    /// When there is no image, or its size is not that of its frame.
    pub(super) fn read(bytes: &'a [u8]) -> Result<Self, ImageError> {
        const EXTENDED: &[u8; 4] = b"VP8X";
        let mut chunks = Chunks { rest: bytes.get(12..).ok_or(TRUNCATED)? };
        let start = chunks.rest;
        let Some((EXTENDED, header)) = chunks.next() else {
            let frame = Frame::find(Chunks { rest: start })?;
            return Ok(Self { canvas: frame.size, frame, exif: None });
        };
        let &[flags, _, _, _, w0, w1, w2, h0, h1, h2] = header else { return Err(broken("its header is broken")) };
        let canvas = (1 + u24([w0, w1, w2]), 1 + u24([h0, h1, h2]));
        let animated = flags & 2 != 0;
        let frame = if animated {
            let first = Chunks { rest: chunks.rest }.find(|(kind, _)| *kind == b"ANMF");
            let (_, frame) = first.ok_or(TRUNCATED)?;
            Frame::of_animation(frame)?
        } else {
            Frame::find(Chunks { rest: chunks.rest })?
        };
        let fits = |at: u32, size: u32, canvas: u32| at.checked_add(size).is_some_and(|end| end <= canvas);
        let inside = fits(frame.at.0, frame.size.0, canvas.0) && fits(frame.at.1, frame.size.1, canvas.1);
        if !inside || !animated && frame.size != canvas {
            return Err(broken("its image does not fit its canvas"));
        }
        let exif = chunks.find(|(kind, _)| *kind == b"EXIF").map(|(_, exif)| exif);
        Ok(Self { canvas, frame, exif })
    }
}

impl<'a> Frame<'a> {
    /// The first image among chunks, with the alpha before it.
    fn find(chunks: Chunks<'a>) -> Result<Self, ImageError> {
        let mut alpha = None;
        for (kind, content) in chunks {
            let image = match kind {
                b"ALPH" => {
                    alpha = alpha.or(Some(content));
                    continue;
                }
                b"VP8 " => Bitstream::Lossy(content),
                b"VP8L" => Bitstream::Lossless(content),
                _ => continue,
            };
            let alpha = alpha.filter(|_| matches!(image, Bitstream::Lossy(_)));
            return Ok(Self { at: (0, 0), size: image.size()?, image, alpha });
        }
        Err(TRUNCATED)
    }

    /// The content of an `ANMF` chunk.
    fn of_animation(content: &'a [u8]) -> Result<Self, ImageError> {
        let (header, rest) = content.split_first_chunk::<16>().ok_or(TRUNCATED)?;
        let field = |at: usize| u24([header[at], header[at + 1], header[at + 2]]);
        let frame = Self { at: (2 * field(0), 2 * field(3)), ..Self::find(Chunks { rest })? };
        let announced = (1 + field(6), 1 + field(9));
        if frame.size == announced { Ok(frame) } else { Err(broken("an image has another size than its frame")) }
    }

    /// A file that holds this image alone.
    pub(super) fn to_file(self) -> Vec<u8> {
        let (kind, image) = match self.image {
            Bitstream::Lossy(bytes) => (b"VP8 ", bytes),
            Bitstream::Lossless(bytes) => (b"VP8L", bytes),
        };
        let mut file = Vec::with_capacity(12 + 18 + 2 * 9 + image.len() + self.alpha.map_or(0, <[u8]>::len));
        file.extend(b"RIFF\0\0\0\0WEBP");
        if let Some(alpha) = self.alpha {
            let mut header = vec![0x10, 0, 0, 0];
            header.extend(&(self.size.0 - 1).to_le_bytes()[..3]);
            header.extend(&(self.size.1 - 1).to_le_bytes()[..3]);
            push_chunk(&mut file, b"VP8X", &header);
            push_chunk(&mut file, b"ALPH", alpha);
        }
        push_chunk(&mut file, kind, image);
        let size = (file.len() - 8) as u32;
        file[4..8].copy_from_slice(&size.to_le_bytes());
        file
    }
}

fn push_chunk(file: &mut Vec<u8>, kind: &[u8; 4], content: &[u8]) {
    file.extend(kind);
    file.extend((content.len() as u32).to_le_bytes());
    file.extend(content);
    file.extend(&[0][..content.len() % 2]);
}

/// Whether an `ALPH` chunk has a value for each pixel.
pub(super) fn check_alpha(content: &[u8], size: (u32, u32), stopped: Stopped) -> Result<(), ImageError> {
    let (&flags, values) = content.split_first().ok_or(TRUNCATED)?;
    match flags & 3 {
        0 if (values.len() as u64) < u64::from(size.0) * u64::from(size.1) => Err(TRUNCATED),
        0 => Ok(()),
        1 => lossless::check(values, size, stopped),
        _ => Err(broken("its alpha is compressed in an unknown way")),
    }
}

fn u24([low, middle, high]: [u8; 3]) -> u32 {
    u32::from_le_bytes([low, middle, high, 0])
}

/// Walks chunks; the last may be cut short.
#[derive(Clone, Copy)]
struct Chunks<'a> {
    rest: &'a [u8],
}

impl<'a> Iterator for Chunks<'a> {
    type Item = (&'a [u8; 4], &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let (kind, rest) = self.rest.split_first_chunk()?;
        let (length, rest) = rest.split_first_chunk()?;
        let length = u32::from_le_bytes(*length) as usize;
        let content = &rest[..length.min(rest.len())];
        // Of odd length, a chunk is filled up by a byte.
        self.rest = rest.get(length.saturating_add(length % 2)..).unwrap_or_default();
        Some((kind, content))
    }
}
