//! What a file is, by its first bytes. Names and declared media types say little: they are not looked at.

use super::error::ImageError;

/// A format that is decoded here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    Jpeg,
    Png,
    WebP,
    Gif,
    Bmp,
}

impl Format {
    /// Looks at the first bytes of a file.
    ///
    /// # Errors
    /// [`ImageError::UnsupportedFormat`] with the name of what it is instead, or [`ImageError::NotAnImage`].
    pub(super) fn of(bytes: &[u8]) -> Result<Self, ImageError> {
        match bytes {
            [] => Err(ImageError::Empty),
            [0xFF, 0xD8, 0xFF, ..] => Ok(Self::Jpeg),
            [0x89, b'P', b'N', b'G', b'\r', b'\n', 0x1A, b'\n', ..] => Ok(Self::Png),
            [b'R', b'I', b'F', b'F', _, _, _, _, b'W', b'E', b'B', b'P', ..] => Ok(Self::WebP),
            [b'G', b'I', b'F', b'8', b'7' | b'9', b'a', ..] => Ok(Self::Gif),
            [b'B', b'M', ..] => Ok(Self::Bmp),
            _ => Err(other(bytes).map_or(ImageError::NotAnImage, |format| ImageError::UnsupportedFormat { format })),
        }
    }
}

/// The name of a format that people send and that is not decoded here.
fn other(bytes: &[u8]) -> Option<&'static str> {
    const STARTS: [(&[u8], &str); 14] = [
        (b"II*\0", "TIFF"),
        (b"MM\0*", "TIFF"),
        (b"II+\0", "BigTIFF"),
        (b"MM\0+", "BigTIFF"),
        (b"\xFF\x0A", "JPEG XL"),
        (b"\0\0\0\x0CJXL \r\n\x87\n", "JPEG XL"),
        (b"\0\0\0\x0CjP  \r\n\x87\n", "JPEG 2000"),
        (b"\xFF\x4F\xFF\x51", "JPEG 2000"),
        (b"%PDF-", "PDF"),
        (b"8BPS", "a Photoshop document"),
        (b"\0\0\x01\0", "ICO"),
        (b"qoif", "QOI"),
        (b"PK\x03\x04", "a ZIP archive"),
        (b"\x1F\x8B", "gzip"),
    ];
    let by_start = STARTS.iter().find(|(start, _)| bytes.starts_with(start)).map(|(_, name)| *name);
    by_start.or_else(|| media_brand(bytes)).or_else(|| markup(bytes))
}

/// ISO media files name their kind in a first box `ftyp`: its brand and those it is compatible with.
fn media_brand(bytes: &[u8]) -> Option<&'static str> {
    let length = u32::from_be_bytes(*bytes.first_chunk()?) as usize;
    let brands = bytes.get(4..)?.strip_prefix(b"ftyp")?;
    let brands = &brands[..brands.len().min(length.saturating_sub(8)).min(256)];
    let has = |names: &[&[u8]]| brands.chunks_exact(4).any(|brand| names.contains(&brand));
    if has(&[b"avif", b"avis"]) {
        Some("AVIF")
    } else if has(&[b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"]) {
        Some("HEIC")
    } else {
        Some("a video")
    }
}

/// Text with angle brackets, after a byte order mark, white space, declarations and comments.
fn markup(bytes: &[u8]) -> Option<&'static str> {
    let text = String::from_utf8_lossy(&bytes[..bytes.len().min(1024)]).to_ascii_lowercase();
    let text = text.trim_start_matches('\u{FEFF}').trim_start();
    if !text.starts_with('<') {
        return None;
    }
    let names = [("<svg", "SVG"), ("<!doctype svg", "SVG"), ("<!doctype html", "HTML"), ("<html", "HTML")];
    let first = names.iter().filter_map(|(start, name)| Some((text.find(start)?, *name))).min();
    first.map(|(_, name)| name).or(text.starts_with("<?xml").then_some("XML"))
}
