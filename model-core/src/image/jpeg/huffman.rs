//! Bits of entropy-coded segments and Huffman codes (T.81, annexes C and F).

use super::super::error::ImageError;
use super::broken;

/// Codes up to this length are found in one look.
const LOOK_BITS: u32 = 9;

#[derive(Clone)]
pub(super) struct Table {
    /// By the next [`LOOK_BITS`] bits: length of the code (0: longer) and its symbol.
    look: Box<[(u8, u8); 1 << LOOK_BITS]>,
    /// One past the last code of each length, aligned to 16 bits.
    limit: [u32; 17],
    /// What a code of each length has to be moved by to be an index of `symbols`.
    offset: [i32; 17],
    symbols: Vec<u8>,
}

impl Table {
    /// A table from the number of codes of each length from 1 to 16 and their symbols.
    pub(super) fn new(counts: &[u8; 16], symbols: &[u8]) -> Result<Self, ImageError> {
        let (mut look, mut limit, mut offset) = (Box::new([(0, 0); 1 << LOOK_BITS]), [0; 17], [0; 17]);
        let (mut code, mut index) = (0u32, 0usize);
        for (length, &count) in (1u32..).zip(counts) {
            offset[length as usize] = index as i32 - code as i32;
            let codes = code..code + u32::from(count);
            if codes.end > 1 << length {
                return Err(broken("a Huffman table has more codes than fit"));
            }
            for code in codes.clone() {
                if length <= LOOK_BITS {
                    let free = LOOK_BITS - length;
                    look[(code << free) as usize..][..1 << free].fill((length as u8, symbols[index]));
                }
                index += 1;
            }
            limit[length as usize] = codes.end << (16 - length);
            code = codes.end << 1;
        }
        Ok(Self { look, limit, offset, symbols: symbols.to_vec() })
    }
}

/// Reads bits up to the next marker; past it come zeros, and [`Bits::overrun`] tells.
pub(super) struct Bits<'a> {
    bytes: &'a [u8],
    /// Of the next byte to go into `buffer`.
    position: usize,
    /// The next bits, the first on top.
    buffer: u64,
    /// How many there are.
    count: u32,
    /// How many of them were not in the file.
    padding: u32,
}

impl<'a> Bits<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, position: 0, buffer: 0, count: 0, padding: 0 }
    }

    /// More bits were taken than there were.
    pub(super) fn overrun(&self) -> bool {
        self.count < self.padding
    }

    /// Position of the marker that ends the data, or of the end of the file.
    pub(super) fn end(&self) -> usize {
        let rest = &self.bytes[self.position..];
        let marker = rest.windows(2).position(|pair| pair[0] == 0xFF && !matches!(pair[1], 0x00 | 0xFF));
        self.position + marker.unwrap_or(rest.len())
    }

    /// Passes over the restart marker of this number, which has to come next.
    pub(super) fn restart(&mut self, number: u8) -> bool {
        // Bits that fill up the last byte remain at most, or what a careless encoder left before the marker.
        let end = self.end();
        let found = self.bytes.get(end + 1) == Some(&(0xD0 + number));
        if found {
            *self = Self { position: end + 2, ..Self::new(self.bytes) };
        }
        found
    }

    /// Makes at least 48 bits available.
    #[inline]
    fn fill(&mut self) {
        if let Some(next) = self.bytes.get(self.position..self.position + 8) {
            let word = u64::from_be_bytes(next.try_into().expect("eight bytes"));
            let has_ff = (!word).wrapping_sub(0x0101_0101_0101_0101) & word & 0x8080_8080_8080_8080 != 0;
            if !has_ff {
                let bytes = (63 - self.count) / 8;
                let mask = !(u64::MAX.checked_shr(8 * bytes).unwrap_or(0));
                self.buffer |= (word & mask) >> self.count;
                self.position += bytes as usize;
                self.count += 8 * bytes;
                return;
            }
        }
        self.fill_slowly();
    }

    #[cold]
    fn fill_slowly(&mut self) {
        while self.count <= 55 {
            let byte = match self.bytes.get(self.position..) {
                Some([0xFF, 0x00, ..]) => {
                    self.position += 2;
                    0xFF
                }
                Some([0xFF, ..]) | Some([]) | None => {
                    self.padding += 8;
                    0
                }
                Some([byte, ..]) => {
                    self.position += 1;
                    *byte
                }
            };
            self.buffer |= u64::from(byte) << (56 - self.count);
            self.count += 8;
        }
    }

    #[inline]
    fn drop(&mut self, count: u32) {
        self.buffer <<= count;
        self.count -= count;
    }

    /// The next `count` bits, at most 16.
    #[inline]
    pub(super) fn take(&mut self, count: u32) -> u32 {
        if self.count < count {
            self.fill();
        }
        // Two shifts, because there may be none to take.
        let value = (self.buffer >> 1 >> (63 - count)) as u32;
        self.drop(count);
        value
    }

    #[inline]
    pub(super) fn bit(&mut self) -> bool {
        self.take(1) == 1
    }

    /// A signed number of so many bits, at most 16 (T.81, F.2.2.1).
    #[inline]
    pub(super) fn signed(&mut self, count: u32) -> i32 {
        let value = self.take(count) as i32;
        if count > 0 && value >> (count - 1) == 0 { value - (1 << count) + 1 } else { value }
    }

    #[inline(always)]
    pub(super) fn symbol(&mut self, table: &Table) -> Result<u8, ImageError> {
        if self.count < 16 {
            self.fill();
        }
        let (length, symbol) = table.look[(self.buffer >> (64 - LOOK_BITS)) as usize];
        if length > 0 {
            self.drop(length.into());
            return Ok(symbol);
        }
        self.long_symbol(table)
    }

    /// A symbol whose code is longer than [`LOOK_BITS`].
    #[cold]
    fn long_symbol(&mut self, table: &Table) -> Result<u8, ImageError> {
        let next = (self.buffer >> 48) as u32;
        let longer = LOOK_BITS as usize + 1..17;
        let length = longer.into_iter().find(|&length| next < table.limit[length]);
        let length = length.ok_or_else(|| broken("it holds a Huffman code that no table has"))?;
        self.drop(length as u32);
        let index = (next >> (16 - length)) as i32 + table.offset[length];
        // A code below those of its length is the prefix of a shorter one, which the look would have found.
        table.symbols.get(index as usize).copied().ok_or_else(|| broken("it holds a Huffman code that no table has"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_end_at_a_marker_and_overrun_is_told() {
        let mut bits = Bits::new(&[0xAB, 0xFF, 0x00, 0x12, 0xFF, 0xD9]);
        assert_eq!((bits.take(8), bits.take(8), bits.take(8)), (0xAB, 0xFF, 0x12));
        assert!(!bits.overrun());
        assert_eq!(bits.take(1), 0);
        assert!(bits.overrun());
        assert_eq!(bits.end(), 4);
    }

    #[test]
    fn codes_of_every_length_are_found() {
        // One code of each length: 0, 10, 110, ..
        let symbols: Vec<u8> = (1..=16).collect();
        let table = Table::new(&[1; 16], &symbols).unwrap();
        for length in 1..=16u32 {
            let word = !(u64::MAX >> (length - 1));
            // No byte of it is followed by a marker: 0xFF is stuffed.
            let bytes: Vec<u8> =
                word.to_be_bytes().iter().flat_map(|&b| if b == 0xFF { vec![b, 0] } else { vec![b] }).collect();
            assert_eq!(Bits::new(&bytes).symbol(&table).unwrap(), length as u8);
        }
        let ones: Vec<u8> = [0xFF, 0x00].repeat(8);
        assert!(Bits::new(&ones).symbol(&table).is_err());
    }

    #[test]
    fn a_table_with_too_many_codes_is_refused() {
        let mut counts = [0; 16];
        counts[0] = 3;
        assert!(Table::new(&counts, &[1, 2, 3]).is_err());
    }
}
