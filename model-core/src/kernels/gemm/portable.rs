//! The micro-kernel for any CPU: the same layout, plain loops. What the definitions in
//! [`scalar`](super::scalar) say, a block at a time.

use super::{Acc, GROUP_BYTES, GROUPS, K_BLOCK, Kernel, PANEL, Tile};

pub(super) struct Portable;

impl Kernel for Portable {
    const TILE_ROWS: usize = 8;
    const UNSIGNED_INT8: bool = false;

    unsafe fn dots<const TERNARY: bool>(rows: usize, tile: Tile<'_>, weights: &[u8], acc: &mut Acc) {
        tile.check(rows, weights, acc);
        if tile.first_block == 0 {
            acc[..rows].fill([0; PANEL]);
        }
        let mut block = [0i16; GROUPS * GROUP_BYTES];
        for (b, bytes) in weights.chunks_exact(GROUPS * GROUP_BYTES).take(tile.blocks).enumerate() {
            for (w, byte) in block.iter_mut().zip(bytes) {
                *w = if TERNARY { i16::from(*byte) } else { i16::from(byte.cast_signed()) };
            }
            let b = tile.first_block + b;
            for r in 0..rows {
                let lhs: &[i8; K_BLOCK] = if b < tile.cols / K_BLOCK {
                    tile.lhs[r * tile.cols + b * K_BLOCK..][..K_BLOCK].try_into().expect("the slice is one block")
                } else {
                    &tile.tail[r]
                };
                for (i, group) in block.chunks_exact(GROUP_BYTES).enumerate() {
                    for c in 0..PANEL {
                        for j in 0..4 {
                            acc[r][c] += i32::from(group[4 * c + j]) * i32::from(lhs[4 * i + j]);
                        }
                    }
                }
            }
        }
    }
}
