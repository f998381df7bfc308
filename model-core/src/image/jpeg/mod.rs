//! JPEG, baseline and progressive, at 1, 1/2, 1/4 or 1/8 of its scale, equal to libjpeg-turbo's pixels to the last bit.
//!
//! No library met all of what a server needs (figures in `docs/security.md`): every order of scans and sampling factors
//! decoded right, an error when a single block is missing, memory that the header fixes, and a way to stop. The parts
//! follow ITU-T T.81: [`frame`] reads marker segments, [`huffman`] codes, [`scan`] the entropy-coded blocks, [`idct`]
//! turns coefficients into samples and [`output`] samples into RGB.
//!
//! A reduced scale transforms each block of 8 x 8 into the means of squares of its samples. Sequential files are
//! transformed as their blocks are read; progressive files keep the coefficients that the scale needs (one of 64 at an
//! eighth), and of the others only whether they are zero, which the scans refer to.

mod frame;
mod huffman;
mod idct;
mod output;
mod scan;

use ::image::RgbImage;

use super::error::ImageError;
pub(super) use frame::Header;
use frame::{Marker, Segments};
use scan::{Blocks, Scan, Tables};

const FORMAT: &str = "JPEG";
const TRUNCATED: ImageError = ImageError::Truncated { format: FORMAT };

fn broken(reason: &str) -> ImageError {
    ImageError::broken(FORMAT, reason)
}

/// Scans of a progressive file at most. Encoders write about ten; each may cost as much as a whole sequential file.
const MAX_SCANS: usize = 100;

/// Of eight Huffman tables and the lists of components and segments.
const TABLE_BYTES: u64 = 32 << 10;

/// Bytes that decoding at 1/`reduction` takes, the result included.
pub(super) fn bytes_upper_bound(header: &Header, reduction: u32) -> u64 {
    let layouts = Blocks::layout(&header.frame, reduction);
    let planes: u64 = layouts.iter().map(scan::Layout::plane_bytes).sum();
    let coefficients: u64 = layouts.iter().map(scan::Layout::coefficient_bytes).sum();
    let (width, height) = output::size(&header.frame, reduction);
    let result = 3 * u64::from(width) * u64::from(height);
    // Coefficients go when their samples are there.
    let largest = if header.frame.progressive { coefficients.max(result) } else { result };
    planes + largest + output::row_bytes(width) + TABLE_BYTES
}

/// Decodes a file whose header has been read, rounding its size up; `stopped` is asked for every row of blocks.
///
/// # Errors
/// [`ImageError::Truncated`] and [`ImageError::MissingBlocks`] when a block of any component is missing,
/// [`ImageError::Broken`] for broken data, [`ImageError::Stopped`].
pub(super) fn decode(
    bytes: &[u8],
    header: &Header,
    reduction: u32,
    stopped: &dyn Fn() -> bool,
) -> Result<RgbImage, ImageError> {
    let frame = &header.frame;
    let (mut tables, mut blocks) = (Tables::new(frame), Blocks::new(frame, reduction));
    let (mut segments, mut scans, mut ended) = (Segments::new(bytes), 0, false);
    // Once complete, the rest of the file is of no interest: another image, a trailer, the end marker itself.
    while !ended && !blocks.is_final() {
        let Some(segment) = segments.next() else { break };
        match segment.marker {
            Marker::DHT => tables.define_huffman(segment.payload)?,
            Marker::DQT => tables.define_quantization(segment.payload)?,
            Marker::DRI => tables.define_restart(segment.payload)?,
            Marker::EOI => ended = true,
            Marker::SOS => {
                scans += 1;
                if scans > MAX_SCANS {
                    return Err(broken("it has more than 100 scans"));
                }
                let scan = Scan::parse(segment.payload, frame)?;
                blocks.begin(&scan, frame, &tables)?;
                let end = blocks.read(&scan, &tables, segments.rest(), stopped)?;
                segments.pass_over(end);
            }
            // Another image has begun.
            Marker::SOI if scans > 0 => break,
            _ => {}
        }
    }
    // Encoders may leave out details; a file that just stops may have lost them.
    if !(blocks.is_final() || ended && blocks.is_begun()) {
        return Err(TRUNCATED);
    }
    output::rgb(&blocks.into_planes(stopped)?, header, reduction, stopped)
}
