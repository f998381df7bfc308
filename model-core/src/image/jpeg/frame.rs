//! Marker segments and the frame header (T.81, annex B).

use super::super::error::ImageError;
use super::super::orientation;
use super::{TRUNCATED, broken};
use ::image::metadata::Orientation;

/// The second byte of a marker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Marker(u8);

impl Marker {
    pub(super) const DHT: Self = Self(0xC4);
    pub(super) const SOI: Self = Self(0xD8);
    pub(super) const EOI: Self = Self(0xD9);
    pub(super) const SOS: Self = Self(0xDA);
    pub(super) const DQT: Self = Self(0xDB);
    pub(super) const DRI: Self = Self(0xDD);
    const APP0: Self = Self(0xE0);
    const APP1: Self = Self(0xE1);
    const APP14: Self = Self(0xEE);

    /// The code of a start-of-frame marker.
    fn frame(self) -> Option<u8> {
        matches!(self.0, 0xC0..=0xCF if !matches!(self.0, 0xC4 | 0xC8 | 0xCC)).then_some(self.0)
    }

    /// TEM, RST, SOI and EOI stand alone.
    fn has_payload(self) -> bool {
        !matches!(self.0, 0x01 | 0xD0..=0xD9)
    }
}

/// A marker and what follows its length field.
pub(super) struct Segment<'a> {
    pub(super) marker: Marker,
    pub(super) payload: &'a [u8],
}

/// Walks the segments of a file. Bytes between them are skipped, as libjpeg does.
pub(super) struct Segments<'a> {
    rest: &'a [u8],
}

impl<'a> Segments<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    /// What follows the last segment.
    pub(super) fn rest(&self) -> &'a [u8] {
        self.rest
    }

    /// Passes over entropy-coded data.
    pub(super) fn pass_over(&mut self, count: usize) {
        self.rest = self.rest.get(count..).unwrap_or_default();
    }
}

impl<'a> Iterator for Segments<'a> {
    type Item = Segment<'a>;

    /// `None` at the end of the file, or where a segment runs past it.
    fn next(&mut self) -> Option<Segment<'a>> {
        // Any number of 0xFF may precede a marker.
        let start = self.rest.windows(2).position(|pair| pair[0] == 0xFF && !matches!(pair[1], 0x00 | 0xFF))?;
        let marker = Marker(self.rest[start + 1]);
        let rest = &self.rest[start + 2..];
        let length =
            if marker.has_payload() { usize::from(u16::from_be_bytes([*rest.first()?, *rest.get(1)?])) } else { 0 };
        let payload = if marker.has_payload() { rest.get(2..length)? } else { &[] };
        self.rest = &rest[length..];
        Some(Segment { marker, payload })
    }
}

/// A component as the frame header describes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Component {
    pub(super) id: u8,
    /// Sampling factors, 1 to 4.
    pub(super) h: usize,
    pub(super) v: usize,
    /// Its quantisation table, 0 to 3.
    pub(super) quantization: usize,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Frame {
    pub(super) progressive: bool,
    pub(super) width: u32,
    pub(super) height: u32,
    /// One (grey) or three.
    pub(super) components: Vec<Component>,
    /// The largest sampling factors.
    pub(super) h_max: usize,
    pub(super) v_max: usize,
}

impl Frame {
    fn parse(code: u8, payload: &[u8]) -> Result<Self, ImageError> {
        match code {
            0xC0..=0xC2 => {}
            0xC3 | 0xC7 | 0xCB | 0xCF => return Err(broken("it is a lossless JPEG")),
            0xC5 | 0xC6 | 0xCD | 0xCE => return Err(broken("it is a hierarchical JPEG")),
            _ => return Err(broken("it is coded arithmetically; Huffman codes are read")),
        }
        let &[precision, h1, h0, w1, w0, count, ref components @ ..] = payload else {
            return Err(broken("its frame header is too short"));
        };
        if precision != 8 {
            return Err(broken("its samples have not 8 bits"));
        }
        match count {
            1 | 3 => {}
            4 => return Err(ImageError::Cmyk),
            _ => return Err(broken("it has neither one nor three components")),
        }
        let parsed = components.chunks_exact(3).take(count.into()).map(|field| {
            let (h, v) = (usize::from(field[1] >> 4), usize::from(field[1] & 15));
            let valid = (1..=4).contains(&h) && (1..=4).contains(&v) && field[2] < 4;
            valid.then_some(Component { id: field[0], h, v, quantization: field[2].into() })
        });
        let components: Option<Vec<Component>> = parsed.collect();
        let components = components
            .filter(|components| components.len() == usize::from(count))
            .ok_or_else(|| broken("its frame header is broken"))?;
        let most = |factor: fn(&Component) -> usize| components.iter().map(factor).max().unwrap_or(1);
        let (h_max, v_max) = (most(|c| c.h), most(|c| c.v));
        if components.iter().any(|c| h_max % c.h != 0 || v_max % c.v != 0) {
            return Err(broken("the sampling factors of its components are no multiples of each other"));
        }
        let side = |high, low| u32::from(u16::from_be_bytes([high, low]));
        Ok(Self { progressive: code == 0xC2, width: side(w1, w0), height: side(h1, h0), components, h_max, v_max })
    }
}

/// What precedes the first scan.
#[derive(Debug, Clone)]
pub(in crate::image) struct Header {
    pub(super) frame: Frame,
    /// Components are luma and two differences of colour, not red, green and blue.
    pub(super) ycc: bool,
    pub(in crate::image) orientation: Orientation,
}

impl Header {
    /// Reads the segments up to the first scan; the pixels need not be there.
    ///
    /// # Errors
    /// [`ImageError::MissingBlocks`], [`ImageError::Cmyk`], or [`ImageError::Broken`] for what is not decoded.
    pub(in crate::image) fn read(bytes: &[u8]) -> Result<Self, ImageError> {
        let (mut frame, mut jfif, mut adobe, mut orientation) = (None, false, None, None);
        for (index, segment) in Segments::new(bytes).enumerate() {
            let payload = segment.payload;
            match segment.marker {
                Marker::SOS => {
                    let frame: Frame = frame.ok_or_else(|| broken("a scan comes before the frame header"))?;
                    let ycc = is_ycc(&frame, jfif, adobe);
                    let orientation = orientation.unwrap_or(Orientation::NoTransforms);
                    return Ok(Self { frame, ycc, orientation });
                }
                Marker::SOI if index > 0 => return Err(broken("a second image begins within its header")),
                Marker::EOI => break,
                Marker::APP0 => jfif |= payload.starts_with(b"JFIF\0"),
                Marker::APP14 if payload.starts_with(b"Adobe") => adobe = payload.get(11).copied(),
                // Cameras write several; the first that says anything counts.
                Marker::APP1 if payload.starts_with(b"Exif\0\0") => {
                    orientation = orientation.or_else(|| orientation::of_exif(payload));
                }
                marker => {
                    if let Some(code) = marker.frame() {
                        if frame.is_some() {
                            return Err(broken("it has two frame headers"));
                        }
                        frame = Some(Frame::parse(code, payload)?);
                    }
                }
            }
        }
        Err(TRUNCATED)
    }

    /// Pixels across and down.
    pub(in crate::image) fn size(&self) -> (u32, u32) {
        (self.frame.width, self.frame.height)
    }
}

/// The rules of libjpeg: what JFIF or Adobe say, or else the components' identifiers.
fn is_ycc(frame: &Frame, jfif: bool, adobe: Option<u8>) -> bool {
    let ids = frame.components.iter().map(|component| component.id);
    match adobe {
        _ if jfif => true,
        Some(transform) => transform != 0,
        None => !ids.eq(*b"RGB"),
    }
}
