//! VP8 key frames (RFC 6386): the sizes in a header that a decoder allocates from.

use super::super::error::ImageError;
use super::{TRUNCATED, broken};

const HEADER_BYTES: usize = 10;

/// Pixels across and down.
pub(super) fn size(bytes: &[u8]) -> Result<(u32, u32), ImageError> {
    let header: &[u8; HEADER_BYTES] = bytes.first_chunk().ok_or(TRUNCATED)?;
    if header[0] & 1 != 0 || header[3..6] != [0x9D, 0x01, 0x2A] {
        return Err(broken("its image is no VP8 key frame"));
    }
    let side = |at: usize| u32::from(u16::from_le_bytes([header[at], header[at + 1]]) & 0x3FFF);
    Ok((side(6), side(8)))
}

/// Whether all partitions lie within the data.
pub(super) fn check(bytes: &[u8]) -> Result<(), ImageError> {
    let (header, rest) = bytes.split_first_chunk::<HEADER_BYTES>().ok_or(TRUNCATED)?;
    let first = (u32::from_le_bytes([header[0], header[1], header[2], 0]) >> 5) as usize;
    let (first, rest) = rest.split_at_checked(first).ok_or(TRUNCATED)?;
    let others = partitions(first) - 1;
    let (sizes, rest) = rest.split_at_checked(3 * others).ok_or(TRUNCATED)?;
    let size = |field: &[u8]| u64::from(u32::from_le_bytes([field[0], field[1], field[2], 0]));
    let total: u64 = sizes.chunks_exact(3).map(size).sum();
    if total > rest.len() as u64 { Err(TRUNCATED) } else { Ok(()) }
}

/// Partitions of coefficients, which the frame header (section 9) says after how to segment and filter.
fn partitions(first: &[u8]) -> usize {
    let mut bits = Bool::new(first);
    let _color_space_and_clamping = bits.literal(2);
    if bits.flag() {
        let (update_map, update_data) = (bits.flag(), bits.flag());
        if update_data {
            let _absolute = bits.flag();
            (0..4).for_each(|_| bits.optional(7 + 1));
            (0..4).for_each(|_| bits.optional(6 + 1));
        }
        if update_map {
            (0..3).for_each(|_| bits.optional(8));
        }
    }
    let _filter_kind_level_and_sharpness = bits.literal(1 + 6 + 3);
    if bits.flag() && bits.flag() {
        (0..8).for_each(|_| bits.optional(6 + 1));
    }
    1 << bits.literal(2)
}

/// The boolean decoder of section 7, for bits of even odds.
struct Bool<'a> {
    bytes: &'a [u8],
    value: u32,
    range: u32,
    /// Bits of `value` that were shifted out.
    shifted: u32,
}

impl<'a> Bool<'a> {
    fn new(bytes: &'a [u8]) -> Self {
        let mut new = Self { bytes, value: 0, range: 255, shifted: 0 };
        new.value = u32::from(new.next()) << 8 | u32::from(new.next());
        new
    }

    /// Zeros follow the end.
    fn next(&mut self) -> u8 {
        let Some((&byte, rest)) = self.bytes.split_first() else { return 0 };
        self.bytes = rest;
        byte
    }

    fn flag(&mut self) -> bool {
        let split = 1 + (((self.range - 1) * 128) >> 8);
        let set = self.value >= split << 8;
        if set {
            (self.range, self.value) = (self.range - split, self.value - (split << 8));
        } else {
            self.range = split;
        }
        while self.range < 128 {
            (self.range, self.value, self.shifted) = (self.range << 1, self.value << 1, self.shifted + 1);
            if self.shifted == 8 {
                self.shifted = 0;
                self.value |= u32::from(self.next());
            }
        }
        set
    }

    fn literal(&mut self, count: u32) -> u32 {
        (0..count).fold(0, |value, _| value << 1 | u32::from(self.flag()))
    }

    /// A flag, and a number of so many bits if it is set.
    fn optional(&mut self, count: u32) {
        if self.flag() {
            self.literal(count);
        }
    }
}
