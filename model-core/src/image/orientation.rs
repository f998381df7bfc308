//! The EXIF orientation of all formats. EXIF is a TIFF file: a byte order, then directories of numbered fields.

use ::image::metadata::Orientation;

/// What precedes EXIF in JPEG, and in files of other formats by programs that copy it.
const PREFIX: &[u8] = b"Exif\0\0";
/// The field that says how to turn an image.
const ORIENTATION: u16 = 0x0112;

/// The orientation in the first directory of EXIF data, if it says one. Broken EXIF is no reason to refuse a photo.
pub(super) fn of_exif(exif: &[u8]) -> Option<Orientation> {
    let tiff = Tiff::new(exif.strip_prefix(PREFIX).unwrap_or(exif))?;
    let directory = tiff.u32(4)? as usize;
    let fields = usize::from(tiff.u16(directory)?);
    // Twelve bytes each: number, type, count, value.
    let field = (0..fields).map_while(|index| {
        let at = directory.checked_add(2 + 12 * index)?;
        Some((tiff.u16(at)?, at))
    });
    let (_, at) = { field }.find(|(number, _)| *number == ORIENTATION)?;
    let value = match tiff.u16(at + 2)? {
        // BYTE, SHORT, LONG and the signed ones.
        1 | 6 => u32::from(*tiff.bytes.get(at + 8)?),
        3 | 8 => u32::from(tiff.u16(at + 8)?),
        4 | 9 => tiff.u32(at + 8)?,
        _ => return None,
    };
    Orientation::from_exif(value.try_into().ok()?)
}

struct Tiff<'a> {
    bytes: &'a [u8],
    big_endian: bool,
}

impl<'a> Tiff<'a> {
    fn new(bytes: &'a [u8]) -> Option<Self> {
        let tiff = Self { bytes, big_endian: bytes.starts_with(b"MM") };
        (tiff.big_endian || bytes.starts_with(b"II")).then_some(())?;
        (tiff.u16(2)? == 42).then_some(tiff)
    }

    fn u16(&self, at: usize) -> Option<u16> {
        let bytes = *self.bytes.get(at..)?.first_chunk()?;
        Some(if self.big_endian { u16::from_be_bytes(bytes) } else { u16::from_le_bytes(bytes) })
    }

    fn u32(&self, at: usize) -> Option<u32> {
        let bytes = *self.bytes.get(at..)?.first_chunk()?;
        Some(if self.big_endian { u32::from_be_bytes(bytes) } else { u32::from_le_bytes(bytes) })
    }
}
