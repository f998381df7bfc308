//! The micro-kernel for any CPU: the same layout, plain loops. What the definitions in
//! [`ternary::scalar`](crate::kernels::ternary::scalar) say, a block at a time.

use super::pack::block_bytes;
use super::{Acc, Format, K_BLOCK, Kernel, PANEL, Tile};

pub(super) struct Portable;

impl Kernel for Portable {
    const TILE_ROWS: usize = 8;
    const UNSIGNED_INT8: bool = false;

    unsafe fn dots(format: Format, rows: usize, tile: Tile<'_>, panel: &[u8], acc: &mut Acc) {
        acc[..rows].fill([0; PANEL]);
        let mut block = [[0i16; 4 * PANEL]; K_BLOCK / 4];
        for (b, bytes) in panel.chunks_exact(block_bytes(format)).enumerate() {
            for (i, group) in block.iter_mut().enumerate() {
                for (at, w) in group.iter_mut().enumerate() {
                    *w = match format {
                        Format::Ternary => i16::from(bytes[at] >> (2 * i) & 3),
                        Format::Int8 => i16::from(bytes[64 * i + at].cast_signed()),
                    };
                }
            }
            for r in 0..rows {
                let lhs: &[i8; K_BLOCK] = if b < tile.cols / K_BLOCK {
                    tile.lhs[r * tile.cols + b * K_BLOCK..][..K_BLOCK].try_into().expect("the slice is one block")
                } else {
                    &tile.tail[r]
                };
                for (i, group) in block.iter().enumerate() {
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
