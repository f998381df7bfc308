//! The few facts of a JPEG file that the decoder does not tell: whether it is all there, how many components it has,
//! and whether it is progressive. The decoder fills what a truncated file lacks with grey, which would be classified.

/// What the markers of a JPEG file say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct JpegMarkers {
    /// Components of the frame: 1 grey, 3 colour, 4 CMYK or YCCK.
    pub(super) components: u8,
    /// The coefficients of the whole image are held in memory until the last scan.
    pub(super) progressive: bool,
    /// There is an end-of-image marker after the first scan's header.
    pub(super) complete: bool,
}

const SOI: u8 = 0xD8;
const EOI: u8 = 0xD9;
const SOS: u8 = 0xDA;
const TEM: u8 = 0x01;

/// Walks the segments up to the first scan; `None` when a segment runs past the end or there is no frame header.
pub(super) fn markers(bytes: &[u8]) -> Option<JpegMarkers> {
    let mut frame = None;
    let mut rest = bytes;
    loop {
        // Any number of 0xFF may precede a marker; decoders also skip stray bytes, so we do.
        let start = rest.windows(2).position(|pair| pair[0] == 0xFF && !matches!(pair[1], 0x00 | 0xFF))?;
        let marker = rest[start + 1];
        rest = &rest[start + 2..];
        if matches!(marker, TEM | 0xD0..=EOI) {
            if marker == EOI {
                return None;
            }
            debug_assert!(marker != SOI || frame.is_none(), "a thumbnail lies inside a segment and is skipped");
            continue;
        }
        let length = usize::from(u16::from_be_bytes([*rest.first()?, *rest.get(1)?]));
        let segment = rest.get(2..length)?;
        rest = &rest[length..];
        match marker {
            // SOF0..15 without DHT (C4), JPG (C8) and DAC (CC): precision, height, width, components.
            0xC0..=0xCF if !matches!(marker, 0xC4 | 0xC8 | 0xCC) => {
                frame = Some((*segment.get(5)?, matches!(marker & 3, 2)));
            }
            SOS => break,
            _ => {}
        }
    }
    let (components, progressive) = frame?;
    // Inside entropy-coded data 0xFF is followed by a stuffed zero, so this pair can only be the marker.
    let complete = rest.windows(2).any(|pair| pair == [0xFF, EOI]);
    Some(JpegMarkers { components, progressive, complete })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Start of image, an APP1 segment that contains a whole thumbnail, frame header, scan header.
    const HEAD: [u8; 38] = [
        0xFF, 0xD8, // SOI
        0xFF, 0xE1, 0x00, 0x06, 0xFF, 0xD8, 0xFF, 0xD9, // APP1
        0xFF, 0xFF, // fill
        0xFF, 0xC0, 0x00, 0x0B, 8, 0, 1, 0, 1, 3, 1, 0x11, 0, // SOF0: 8 bits, 1x1, three components
        0xFF, 0xDA, 0x00, 0x08, 1, 1, 0, 0, 63, 0, // SOS
        0x12, 0xFF, 0x00,
    ];

    #[test]
    fn only_an_end_after_the_scan_counts() {
        let expected = JpegMarkers { components: 3, progressive: false, complete: false };
        assert_eq!(markers(&HEAD), Some(expected));
        assert_eq!(markers(&[&HEAD[..], &[0xFF, 0xD9]].concat()), Some(JpegMarkers { complete: true, ..expected }));
    }

    #[test]
    fn a_progressive_frame_is_told_apart() {
        let mut bytes = HEAD;
        bytes[13] = 0xC2;
        assert!(markers(&bytes).unwrap().progressive);
    }

    #[test]
    fn any_cut_before_the_scan_is_no_jpeg() {
        for length in 0..HEAD.len() - 3 {
            assert_eq!(markers(&HEAD[..length]), None, "{length}");
        }
    }
}
