//! Packing into the layout of [`gemm`](super), and back.

use super::{Format, K_BLOCK, PANEL, Packed};
use crate::kernels::Isa;

/// Bytes of one panel.
pub(super) fn panel_bytes(format: Format, cols: usize) -> usize {
    cols.div_ceil(K_BLOCK) * block_bytes(format)
}

/// Bytes of one block of a panel.
pub(super) const fn block_bytes(format: Format) -> usize {
    match format {
        Format::Ternary => PANEL * K_BLOCK / 4,
        Format::Int8 => PANEL * K_BLOCK,
    }
}

/// Where element (column c of the panel, k of the block) goes: which of the block's four 64-byte groups, and
/// which byte of it.
fn place(c: usize, k: usize) -> (usize, usize) {
    (k / 4, 4 * c + k % 4)
}

/// Packs ternary `codes` `[rows, cols]`, each -1, 0 or 1, at two bits.
pub(in crate::kernels) fn pack_ternary(isa: Isa, codes: &[i8], rows: usize, cols: usize) -> Packed {
    let mut panels = vec![0; rows.div_ceil(PANEL) * panel_bytes(Format::Ternary, cols)].into_boxed_slice();
    for_each(rows, cols, |panel, block, c, k, at| {
        let (group, byte) = place(c, k);
        let start = panel * panel_bytes(Format::Ternary, cols) + block * block_bytes(Format::Ternary);
        panels[start + byte] |= (codes[at] + 1).cast_unsigned() << (2 * group);
    });
    Packed { isa, format: Format::Ternary, rows, cols, panels }
}

/// The codes of a matrix that [`pack_ternary`] packed, `[rows, cols]`.
pub(in crate::kernels) fn unpack_ternary(packed: &Packed) -> Vec<i8> {
    let mut codes = vec![0; packed.rows * packed.cols];
    for_each(packed.rows, packed.cols, |panel, block, c, k, at| {
        let (group, byte) = place(c, k);
        let start = panel * panel_bytes(Format::Ternary, packed.cols) + block * block_bytes(Format::Ternary);
        codes[at] = (packed.panels[start + byte] >> (2 * group) & 3).cast_signed() - 1;
    });
    codes
}

/// Packs int8 `codes` `[rows, cols]`, as w + 128 where the kernel of `isa` wants them unsigned.
pub(in crate::kernels) fn pack_int8(isa: Isa, codes: &[i8], rows: usize, cols: usize) -> Packed {
    let mut panels = vec![0; rows.div_ceil(PANEL) * panel_bytes(Format::Int8, cols)].into_boxed_slice();
    // Adding 128 modulo 256 flips the top bit.
    let flip = if super::unsigned_int8(isa) { 0x80 } else { 0 };
    for_each(rows, cols, |panel, block, c, k, at| {
        let (group, byte) = place(c, k);
        let start = panel * panel_bytes(Format::Int8, cols) + block * block_bytes(Format::Int8);
        panels[start + 64 * group + byte] = codes[at].cast_unsigned() ^ flip;
    });
    Packed { isa, format: Format::Int8, rows, cols, panels }
}

/// Calls `visit(panel, block, column in panel, k in block, row-major index)` for every element.
fn for_each(rows: usize, cols: usize, mut visit: impl FnMut(usize, usize, usize, usize, usize)) {
    for row in 0..rows {
        for col in 0..cols {
            visit(row / PANEL, col / K_BLOCK, row % PANEL, col % K_BLOCK, row * cols + col);
        }
    }
}
