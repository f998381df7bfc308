//! Ternary codes and angle codes as bits. Both packings are little-endian bit streams: the first code lies in the
//! lowest bits of the first byte, and every row starts on a byte. Padding bits are zero, so packing is one to one.

/// What a packed row cannot contain, with the index of the offending byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct BadByte {
    pub(super) index: usize,
    pub(super) reason: &'static str,
}

/// Bytes of a row of `cols` ternary codes: four to a byte.
pub(super) const fn ternary_row_bytes(cols: usize) -> usize {
    cols.div_ceil(4)
}

/// Packs codes -1, 0, 1 `[rows, cols]` as w + 1 in two bits each.
pub(super) fn pack_ternary(codes: &[i8], cols: usize) -> Vec<u8> {
    let pack_byte = |quad: &[i8]| quad.iter().rev().fold(0, |byte, &code| byte << 2 | (code + 1) as u8);
    codes.chunks(cols.max(1)).flat_map(|row| row.chunks(4).map(pack_byte)).collect()
}

/// Undoes [`pack_ternary`].
pub(super) fn unpack_ternary(bytes: &[u8], cols: usize) -> Result<Vec<i8>, BadByte> {
    let row_bytes = ternary_row_bytes(cols).max(1);
    let mut codes = Vec::with_capacity(bytes.len() / row_bytes * cols);
    for (r, row) in bytes.chunks_exact(row_bytes).enumerate() {
        for (b, &byte) in row.iter().enumerate() {
            let bad = |reason| BadByte { index: r * row_bytes + b, reason };
            let used = (cols - 4 * b).min(4);
            // Both bits of a pair set is the code 3, which stands for nothing.
            if byte & byte >> 1 & 0b0101_0101 != 0 {
                return Err(bad("the two-bit code 3 is not a ternary weight"));
            }
            if used < 4 && byte >> (2 * used) != 0 {
                return Err(bad("padding bits must be zero"));
            }
            codes.extend((0..used).map(|i| (byte >> (2 * i) & 3) as i8 - 1));
        }
    }
    Ok(codes)
}

/// Bytes of a row of `count` codes of `bits` bits.
pub(super) const fn code_row_bytes(count: usize, bits: u32) -> usize {
    (count * bits as usize).div_ceil(8)
}

/// Packs codes below `2^bits`, `row` of them to a row. `bits` is at most 16.
pub(super) fn pack_codes(codes: &[u16], row: usize, bits: u32) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(codes.len().div_ceil(row.max(1)) * code_row_bytes(row, bits));
    for row in codes.chunks(row.max(1)) {
        let (mut buffer, mut filled) = (0u32, 0);
        for &code in row {
            // At most 7 bits wait in the buffer when 16 more arrive.
            buffer |= u32::from(code) << filled;
            filled += bits;
            while filled >= 8 {
                bytes.push(buffer as u8);
                buffer >>= 8;
                filled -= 8;
            }
        }
        if filled > 0 {
            bytes.push(buffer as u8);
        }
    }
    bytes
}

/// Undoes [`pack_codes`].
pub(super) fn unpack_codes(bytes: &[u8], row: usize, bits: u32) -> Result<Vec<u16>, BadByte> {
    let row_bytes = code_row_bytes(row, bits).max(1);
    let mask = (1u32 << bits) - 1;
    let mut codes = Vec::with_capacity(bytes.len() / row_bytes * row);
    for (r, packed) in bytes.chunks_exact(row_bytes).enumerate() {
        let mut packed = packed.iter();
        let (mut buffer, mut filled) = (0u32, 0);
        for _ in 0..row {
            while filled < bits {
                buffer |= packed.next().map_or(0, |&byte| u32::from(byte)) << filled;
                filled += 8;
            }
            codes.push((buffer & mask) as u16);
            buffer >>= bits;
            filled -= bits;
        }
        if buffer != 0 {
            return Err(BadByte { index: (r + 1) * row_bytes - 1, reason: "padding bits must be zero" });
        }
    }
    Ok(codes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_first_code_lies_in_the_lowest_bits() {
        assert_eq!(pack_ternary(&[-1, 0, 1, 1, 1], 5), [0b10_10_01_00, 0b10]);
        assert_eq!(pack_codes(&[0x1, 0x2, 0x3], 3, 4), [0x21, 0x03]);
        assert_eq!(pack_codes(&[0b000001, 0b000010, 0b000011, 0b000100], 4, 6), [0x81, 0x30, 0x10]);
        assert_eq!(pack_codes(&[0x1234], 1, 16), [0x34, 0x12]);
    }

    #[test]
    fn code_three_and_dirty_padding_are_refused() {
        assert_eq!(unpack_ternary(&[0, 0b11], 5).unwrap_err().index, 1);
        assert_eq!(unpack_ternary(&[0, 0b0100], 5).unwrap_err().reason, "padding bits must be zero");
        assert_eq!(unpack_codes(&[0x21, 0x13], 3, 4).unwrap_err().index, 1);
    }

    proptest! {
        #[test]
        fn unpacking_undoes_packing_of_ternary_codes(cols in 1usize..40, rows in 0usize..5, seed: u64) {
            let codes: Vec<i8> = (0..rows * cols).map(|i| ((seed >> (i % 61)) % 3) as i8 - 1).collect();
            let bytes = pack_ternary(&codes, cols);
            prop_assert_eq!(bytes.len(), rows * ternary_row_bytes(cols));
            prop_assert_eq!(unpack_ternary(&bytes, cols), Ok(codes));
        }

        #[test]
        fn unpacking_undoes_packing_of_angle_codes(
            bits in prop::sample::select(vec![4u32, 6, 8, 16]),
            row in 1usize..40,
            codes in prop::collection::vec(any::<u16>(), 0..200),
        ) {
            let count = codes.len() / row * row;
            let codes: Vec<u16> = codes[..count].iter().map(|c| (u32::from(*c) & ((1 << bits) - 1)) as u16).collect();
            let bytes = pack_codes(&codes, row, bits);
            prop_assert_eq!(bytes.len(), count / row * code_row_bytes(row, bits));
            prop_assert_eq!(unpack_codes(&bytes, row, bits), Ok(codes));
        }

        #[test]
        fn any_bytes_that_unpack_pack_to_themselves(
            bits in prop::sample::select(vec![4u32, 6, 8, 16]),
            row in 1usize..20,
            bytes in prop::collection::vec(any::<u8>(), 0..200),
        ) {
            let whole = |row_bytes: usize| &bytes[..bytes.len() / row_bytes * row_bytes];
            let angles = whole(code_row_bytes(row, bits));
            if let Ok(codes) = unpack_codes(angles, row, bits) {
                prop_assert_eq!(pack_codes(&codes, row, bits), angles);
            }
            let ternary = whole(ternary_row_bytes(row));
            if let Ok(codes) = unpack_ternary(ternary, row) {
                prop_assert_eq!(pack_ternary(&codes, row), ternary);
            }
        }
    }
}
