//! Codes as bytes: ternary ones as digits of a number, angle and router codes as bits. The first code lies in the lowest
//! place of the first byte, and every row starts on a byte. Unused places are zero, so packing is one to one.

use crate::config::TernaryPacking;

/// What a packed row cannot contain, with the index of the offending byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct BadByte {
    pub(super) index: usize,
    pub(super) reason: &'static str,
}

/// Bytes of a row of `cols` ternary codes.
pub(super) const fn ternary_row_bytes(packing: TernaryPacking, cols: usize) -> usize {
    cols.div_ceil(codes_per_byte(packing))
}

const fn codes_per_byte(packing: TernaryPacking) -> usize {
    match packing {
        TernaryPacking::TwoBits => 4,
        TernaryPacking::FiveTrits => 5,
    }
}

/// What a code is multiplied by in the next place of a byte.
const fn base(packing: TernaryPacking) -> u8 {
    match packing {
        TernaryPacking::TwoBits => 4,
        TernaryPacking::FiveTrits => 3,
    }
}

/// Packs codes -1, 0, 1 `[rows, cols]` as w + 1, the first of a byte in its lowest place.
pub(super) fn pack_ternary(packing: TernaryPacking, codes: &[i8], cols: usize) -> Vec<u8> {
    let base = base(packing);
    let pack_byte = |codes: &[i8]| codes.iter().rev().fold(0, |byte, &code| byte * base + (code + 1) as u8);
    let rows = codes.chunks(cols.max(1));
    rows.flat_map(|row| row.chunks(codes_per_byte(packing)).map(pack_byte)).collect()
}

/// Undoes [`pack_ternary`].
pub(super) fn unpack_ternary(packing: TernaryPacking, bytes: &[u8], cols: usize) -> Result<Vec<i8>, BadByte> {
    let (row_bytes, per_byte, base) = (ternary_row_bytes(packing, cols).max(1), codes_per_byte(packing), base(packing));
    let mut codes = Vec::with_capacity(bytes.len() / row_bytes * cols);
    for (r, row) in bytes.chunks_exact(row_bytes).enumerate() {
        for (b, &byte) in row.iter().enumerate() {
            let bad = |reason| BadByte { index: r * row_bytes + b, reason };
            let mut rest = byte;
            for _ in 0..(cols - per_byte * b).min(per_byte) {
                match rest % base {
                    3 => return Err(bad("the two-bit code 3 is not a ternary weight")),
                    code => codes.push(code as i8 - 1),
                }
                rest /= base;
            }
            if rest != 0 {
                return Err(bad(match packing {
                    TernaryPacking::FiveTrits if byte > 242 => "five ternary weights make at most 242",
                    TernaryPacking::FiveTrits => "unused places must be zero",
                    TernaryPacking::TwoBits => "padding bits must be zero",
                }));
            }
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

    use super::TernaryPacking::{FiveTrits, TwoBits};
    use super::*;

    #[test]
    fn the_first_code_lies_in_the_lowest_bits() {
        assert_eq!(pack_ternary(TwoBits, &[-1, 0, 1, 1, 1], 5), [0b10_10_01_00, 0b10]);
        // 0 + 1 * 3 + 2 * 9 + 2 * 27 + 2 * 81, and all five ones.
        assert_eq!(pack_ternary(FiveTrits, &[-1, 0, 1, 1, 1, 0], 6), [237, 1]);
        assert_eq!(pack_ternary(FiveTrits, &[1; 5], 5), [242]);
        assert_eq!(pack_codes(&[0x1, 0x2, 0x3], 3, 4), [0x21, 0x03]);
        assert_eq!(pack_codes(&[0b000001, 0b000010, 0b000011, 0b000100], 4, 6), [0x81, 0x30, 0x10]);
        assert_eq!(pack_codes(&[0x1234], 1, 16), [0x34, 0x12]);
    }

    #[test]
    fn code_three_and_dirty_padding_are_refused() {
        assert_eq!(unpack_ternary(TwoBits, &[0, 0b11], 5).unwrap_err().index, 1);
        assert_eq!(unpack_ternary(TwoBits, &[0, 0b0100], 5).unwrap_err().reason, "padding bits must be zero");
        assert_eq!(unpack_ternary(FiveTrits, &[242, 3], 6).unwrap_err().reason, "unused places must be zero");
        for byte in 243..=255 {
            let bad = unpack_ternary(FiveTrits, &[0, byte], 10).unwrap_err();
            assert_eq!((bad.index, bad.reason), (1, "five ternary weights make at most 242"));
        }
        assert_eq!(unpack_codes(&[0x21, 0x13], 3, 4).unwrap_err().index, 1);
    }

    proptest! {
        #[test]
        fn unpacking_undoes_packing_of_ternary_codes(
            packing in prop::sample::select(vec![TwoBits, FiveTrits]),
            cols in 1usize..40,
            rows in 0usize..5,
            seed: u64,
        ) {
            let codes: Vec<i8> = (0..rows * cols).map(|i| ((seed >> (i % 61)) % 3) as i8 - 1).collect();
            let bytes = pack_ternary(packing, &codes, cols);
            prop_assert_eq!(bytes.len(), rows * ternary_row_bytes(packing, cols));
            prop_assert_eq!(unpack_ternary(packing, &bytes, cols), Ok(codes));
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
            for packing in [TwoBits, FiveTrits] {
                let ternary = whole(ternary_row_bytes(packing, row));
                if let Ok(codes) = unpack_ternary(packing, ternary, row) {
                    prop_assert_eq!(pack_ternary(packing, &codes, row), ternary);
                }
            }
        }
    }
}
