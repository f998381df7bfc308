//! Packing into the layout of [`gemm`](super), and back: whole matrices when a model is packed, and ternary panels on
//! their way into a product.

use super::{Format, GROUP_BYTES, GROUPS, K_BLOCK, PANEL, Packed};
use crate::kernels::Isa;

/// Groups of four columns in a panel of a matrix of `cols` columns.
pub(super) const fn panel_groups(cols: usize) -> usize {
    cols.div_ceil(K_BLOCK) * GROUPS
}

/// Bytes of a whole matrix.
pub(super) fn packed_bytes(format: Format, rows: usize, cols: usize) -> usize {
    (rows.div_ceil(PANEL) * panel_groups(cols)).div_ceil(per_byte(format)) * GROUP_BYTES
}

/// Groups that share their bytes.
pub(super) const fn per_byte(format: Format) -> usize {
    match format {
        Format::TwoBits => 4,
        Format::FiveTrits => 5,
        Format::Int8 => 1,
    }
}

/// Packs ternary `codes` `[rows, cols]`, each -1, 0 or 1.
pub(super) fn pack_ternary(isa: Isa, format: Format, codes: &[i8], rows: usize, cols: usize) -> Packed {
    let mut panels = vec![0; packed_bytes(format, rows, cols)];
    let per_byte = per_byte(format);
    for_each(rows, cols, |group, byte, at| {
        let code = (codes[at] + 1).cast_unsigned();
        let place = group % per_byte;
        panels[group / per_byte * GROUP_BYTES + byte] += match format {
            Format::TwoBits => code << (2 * place),
            // The first digit is the highest: it is what unpacking takes first.
            _ => code * 3u8.pow((per_byte - 1 - place) as u32),
        };
    });
    if format == Format::FiveTrits {
        panels.iter_mut().for_each(|byte| *byte = fraction(*byte));
    }
    Packed { isa, format, rows, cols, panels: panels.into() }
}

/// The codes of a matrix that [`pack_ternary`] packed, `[rows, cols]`.
pub(super) fn unpack_ternary(packed: &Packed) -> Vec<i8> {
    let mut codes = vec![0; packed.rows * packed.cols];
    let mut groups = vec![0; packed.panels.len() * per_byte(packed.format)];
    unpack_groups(packed.format, &packed.panels, &mut groups);
    for_each(packed.rows, packed.cols, |group, byte, at| {
        codes[at] = groups[group * GROUP_BYTES + byte].cast_signed() - 1;
    });
    codes
}

/// Packs int8 `codes` `[rows, cols]`, as w + 128 where the kernel of `isa` wants them unsigned.
pub(super) fn pack_int8(isa: Isa, codes: &[i8], rows: usize, cols: usize) -> Packed {
    let mut panels = vec![0; packed_bytes(Format::Int8, rows, cols)];
    // Adding 128 modulo 256 flips the top bit.
    let flip = if super::unsigned_int8(isa) { 0x80 } else { 0 };
    for_each(rows, cols, |group, byte, at| panels[group * GROUP_BYTES + byte] = codes[at].cast_unsigned() ^ flip);
    Packed { isa, format: Format::Int8, rows, cols, panels: panels.into() }
}

/// Calls `visit(group of the matrix, byte of the group, row-major index)` for every element.
fn for_each(rows: usize, cols: usize, mut visit: impl FnMut(usize, usize, usize)) {
    let panel_groups = panel_groups(cols);
    for row in 0..rows {
        for col in 0..cols {
            visit(row / PANEL * panel_groups + col / 4, 4 * (row % PANEL) + col % 4, row * cols + col);
        }
    }
}

/// Five digits of base 3, given as a number below 243, as a fraction of 256: the least one whose digits are the same.
const fn fraction(number: u8) -> u8 {
    (number as u16 * 256).div_ceil(243) as u8
}

/// Unpacks whole bytes of ternary groups: `out` takes [`per_byte`] groups for each of `packed`, w + 1 in every byte.
#[inline(always)]
pub(super) fn unpack_groups(format: Format, packed: &[u8], out: &mut [u8]) {
    match format {
        Format::TwoBits => {
            let (packed, out) = (packed.as_chunks::<GROUP_BYTES>().0, out.as_chunks_mut::<{ 4 * GROUP_BYTES }>().0);
            for i in 0..packed.len().min(out.len()) {
                unpack_bits(&packed[i], &mut out[i]);
            }
        }
        Format::FiveTrits => {
            let (packed, out) = (packed.as_chunks::<GROUP_BYTES>().0, out.as_chunks_mut::<{ 5 * GROUP_BYTES }>().0);
            for i in 0..packed.len().min(out.len()) {
                unpack_trits(&packed[i], &mut out[i]);
            }
        }
        Format::Int8 => {}
    }
}

#[inline(always)]
fn unpack_bits(packed: &[u8; GROUP_BYTES], out: &mut [u8; 4 * GROUP_BYTES]) {
    for group in 0..4 {
        for lane in 0..GROUP_BYTES {
            out[group * GROUP_BYTES + lane] = packed[lane] >> (2 * group) & 3;
        }
    }
}

/// The next digit of a fraction in base 3 is the whole part of three times it, found by two comparisons; what remains is
/// three times it modulo one, found by two additions that wrap. All in bytes, so that compilers make it one instruction
/// each for a whole register.
#[inline(always)]
fn unpack_trits(packed: &[u8; GROUP_BYTES], out: &mut [u8; 5 * GROUP_BYTES]) {
    let mut rest = *packed;
    for group in 0..5 {
        for lane in 0..GROUP_BYTES {
            let x = rest[lane];
            out[group * GROUP_BYTES + lane] = u8::from(x > 85) + u8::from(x > 170);
            rest[lane] = x.wrapping_add(x).wrapping_add(x);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_five_digits_come_back() {
        for number in 0..243u8 {
            let mut out = [0; 5 * GROUP_BYTES];
            unpack_trits(&[fraction(number); GROUP_BYTES], &mut out);
            let mut rest = number;
            for group in (0..5).rev() {
                assert_eq!(out[group * GROUP_BYTES..][..GROUP_BYTES], [rest % 3; GROUP_BYTES], "{number}");
                rest /= 3;
            }
        }
    }
}
