//! The few facts of a JPEG file that the decoder does not tell: whether it is all there, how many components it has,
//! and whether it is progressive. The decoder fills what a truncated file lacks with grey, which would be classified.

/// What the markers of a JPEG file say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct JpegMarkers {
    /// Components of the frame: 1 grey, 3 colour, 4 CMYK or YCCK.
    pub(super) components: u8,
    /// Horizontal and vertical sampling factors of the first components.
    sampling: [(u8, u8); 4],
    /// The coefficients of the whole image are held in memory until the last scan.
    pub(super) progressive: bool,
    /// There is an end-of-image marker after the first scan's header.
    pub(super) complete: bool,
}

impl JpegMarkers {
    /// Bytes of the 16-bit coefficients of an image of this size: of all components, and of the one that has most.
    pub(super) fn coefficient_bytes(&self, width: u64, height: u64) -> (u64, u64) {
        let factors = self.sampling.map(|(h, v)| (u64::from(h), u64::from(v)));
        let most = |axis: fn(&(u64, u64)) -> u64| factors.iter().map(axis).max().unwrap_or(1).max(1);
        // Units of 8 by 8 blocks for each of a component's factors.
        let units = width.div_ceil(8 * most(|f| f.0)) * height.div_ceil(8 * most(|f| f.1));
        let bytes = factors.map(|(h, v)| units * h * v * 64 * 2);
        (bytes.iter().sum(), bytes.into_iter().max().unwrap_or(0))
    }
}

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
            continue;
        }
        let length = usize::from(u16::from_be_bytes([*rest.first()?, *rest.get(1)?]));
        let segment = rest.get(2..length)?;
        rest = &rest[length..];
        match marker {
            // SOF0..15 without DHT (C4), JPG (C8) and DAC (CC): precision, height, width, components.
            0xC0..=0xCF if !matches!(marker, 0xC4 | 0xC8 | 0xCC) => {
                let mut sampling = [(0, 0); 4];
                for (factors, component) in sampling.iter_mut().zip(segment.get(6..)?.chunks_exact(3)) {
                    *factors = (component[1] >> 4, component[1] & 15);
                }
                frame = Some((*segment.get(5)?, sampling, matches!(marker & 3, 2)));
            }
            SOS => break,
            _ => {}
        }
    }
    let (components, sampling, progressive) = frame?;
    // Inside entropy-coded data 0xFF is followed by a stuffed zero, so this pair can only be the marker.
    let complete = rest.windows(2).any(|pair| pair == [0xFF, EOI]);
    Some(JpegMarkers { components, sampling, progressive, complete })
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
        let sampling = [(1, 1), (0, 0), (0, 0), (0, 0)];
        let expected = JpegMarkers { components: 3, sampling, progressive: false, complete: false };
        assert_eq!(markers(&HEAD), Some(expected));
        assert_eq!(markers(&[&HEAD[..], &[0xFF, 0xD9]].concat()), Some(JpegMarkers { complete: true, ..expected }));
    }

    #[test]
    fn coefficients_are_those_of_whole_units() {
        let sampling = [(2, 2), (1, 1), (1, 1), (0, 0)];
        let markers = JpegMarkers { components: 3, sampling, progressive: true, complete: true };
        // 17 x 16 pixels are two units of 16 x 16 in a row, each of four blocks of the first component.
        assert_eq!(markers.coefficient_bytes(17, 16), (2 * (4 + 1 + 1) * 128, 2 * 4 * 128));
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
