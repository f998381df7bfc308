//! Integer matrix products, shared by [`ternary`](super::ternary) and [`linear`](super::linear): one packed layout, one
//! tile driver, one micro-kernel per instruction set.
//!
//! ```text
//! dot[m, n] = sum over k of lhs[m, k] * w[n, k]                       lhs int8, exact in i32
//! for each tile of ROWS rows of lhs:                                  ROWS fits the register file
//!     for each panel of 16 rows of w:                                 one cache line of weights per 16 k (ternary)
//!         acc[ROWS, 16] = micro-kernel(tile, panel)                   i32, in registers over all of k
//!         out = f32(acc - offset * row_sum(lhs)) * step * scale + bias
//! ```
//!
//! Three ideas make it fast:
//! - **Columns sit in lanes, four k at a time**: a 32-bit lane holds four consecutive k of one column, which is what
//!   `vpdpbusd` and `sdot` reduce, and an activation is a broadcast of four bytes. No horizontal sums.
//! - **Ternary weights stay at two bits until they are in a register**: a byte holds the same lane of four successive
//!   k groups, so unpacking is one shift and one mask per vector, shared by all rows of the tile.
//! - **Unsigned weights**: x86 multiplies u8 by i8, so weights are stored as w + offset, and `offset * sum(lhs row)` is
//!   subtracted once per output. For ternary w + 1 in {0, 1, 2} the products are so small that `vpmaddubsw` and `smlal`
//!   sum many of them in 16 bits.
//!
//! Tried on paper and measured per instruction, and left out: table lookups (`vpermw` on the 27 sums of three
//! activations, indices straight from 1.8-bit packed weights) cost 1.3 to 1.5 cycles per 96 products on Zen 4 where
//! `vpdpbusd` takes one cycle per 64, and building the tables eats what is left of the gain.
//!
//! # Layout
//! Panels of [`PANEL`] rows of w, blocks of [`K_BLOCK`] columns, zero-padded in both directions; within a block:
//! - int8, 256 bytes: byte `64 i + 4 c + j` is `w[panel * 16 + c, block * 16 + 4 i + j]`;
//! - ternary, 64 bytes: bits `2 i..2 i + 2` of byte `4 c + j` are that element, as w + 1.
//!
//! The same bytes serve every instruction set, except that int8 weights are stored as w + 128 where the
//! kernel wants them unsigned.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;
mod pack;
mod portable;

use super::error::{KernelError, expect_len};
use super::isa::{Isa, Kind};
use super::requantize::Requantize;
pub(super) use pack::{pack_int8, pack_ternary, unpack_ternary};

/// Rows of w in a panel: one 512-bit register of 32-bit lanes.
pub(super) const PANEL: usize = 16;

/// Columns of w (k) in a block of a panel: what one cache line holds for 16 rows at two bits a weight.
pub(super) const K_BLOCK: usize = 16;

/// Most rows of a tile, over all micro-kernels.
const MAX_TILE_ROWS: usize = 16;

/// Panels whose sums are collected before they are written, so that a row of the output is written in runs of several
/// cache lines, and what is known per row is looked up once per run.
const GROUP: usize = 4;

/// The i32 sums of a tile. Micro-kernels write all 16 columns of the rows that the tile has.
type Acc = [[i32; PANEL]; MAX_TILE_ROWS];

/// How weights are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    /// Two bits, w + 1.
    Ternary,
    /// Eight bits: w, or w + 128 for kernels that multiply unsigned weights.
    Int8,
}

/// A packed matrix `[rows, cols]` and the instruction set that it was packed for.
#[derive(Debug, Clone)]
pub(super) struct Packed {
    isa: Isa,
    format: Format,
    rows: usize,
    cols: usize,
    /// Whole panels of whole blocks; see the module's layout.
    panels: Box<[u8]>,
}

impl Packed {
    pub(super) fn isa(&self) -> Isa {
        self.isa
    }

    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    pub(super) fn cols(&self) -> usize {
        self.cols
    }

    pub(super) fn resident_bytes(&self) -> usize {
        self.panels.len()
    }
}

/// Where the sums go.
pub(super) enum Sink<'a> {
    /// As they are: `out[m, n]`.
    Dots(&'a mut [i32]),
    /// `out[m, n] = (f32(dot) * steps[m]) * scale[n] (+ bias[n])`.
    Scaled {
        /// `[m, rows]`.
        out: &'a mut [f32],
        /// `[m]`.
        steps: &'a [f32],
        /// `[rows]`, padded to whole panels.
        scale: &'a [f32],
        /// `[rows]`, padded to whole panels.
        bias: Option<&'a [f32]>,
    },
    /// int8 codes: `out[m, n] = requantize(dot, added[m, n])`.
    Requantized {
        /// `[m, rows]`.
        out: &'a mut [i8],
        /// For as many features as `rows`.
        requantize: &'a Requantize,
        /// `[m, rows]`.
        added: Option<&'a [i8]>,
    },
}

/// The rows of `lhs` that one tile works on.
#[derive(Clone, Copy)]
struct Tile<'a> {
    /// `[rows, cols]`.
    lhs: &'a [i8],
    cols: usize,
    /// The last `cols % K_BLOCK` columns of every row, zero-padded, so that no kernel reads past a row's end.
    tail: &'a [[i8; K_BLOCK]; MAX_TILE_ROWS],
}

impl Tile<'_> {
    /// Blocks of k, with the tail's.
    #[inline(always)]
    fn blocks(&self) -> usize {
        self.cols.div_ceil(K_BLOCK)
    }

    /// Where the activations of block `block < blocks()` are, and the bytes from one row to the next: each row of the
    /// tile has [`K_BLOCK`] there.
    #[inline(always)]
    fn lhs_block(&self, block: usize) -> (*const i8, usize) {
        if block < self.cols / K_BLOCK {
            (self.lhs[block * K_BLOCK..].as_ptr(), self.cols)
        } else {
            (self.tail.as_flattened().as_ptr(), K_BLOCK)
        }
    }
}

/// A micro-kernel: the sums of a tile with one panel.
trait Kernel {
    /// Rows of a tile that fit its registers; at most [`MAX_TILE_ROWS`].
    const TILE_ROWS: usize;
    /// Whether int8 weights are stored as w + 128.
    const UNSIGNED_INT8: bool;

    /// Writes `acc[..rows]`, where `rows` is in `1..=TILE_ROWS` and `tile.lhs` is `[rows, tile.cols]`.
    ///
    /// # Safety
    /// The CPU has the kernel's instruction set, and `panel` holds all blocks of `tile.cols` in `format`.
    unsafe fn dots(format: Format, rows: usize, tile: Tile<'_>, panel: &[u8], acc: &mut Acc);
}

/// Whether `isa` wants int8 weights stored as w + 128.
fn unsigned_int8(isa: Isa) -> bool {
    match isa.kind() {
        Kind::Scalar => portable::Portable::UNSIGNED_INT8,
        #[cfg(target_arch = "x86_64")]
        Kind::Avx2 => avx2::Avx2::UNSIGNED_INT8,
        #[cfg(target_arch = "x86_64")]
        Kind::Avx512 => avx512::Avx512::UNSIGNED_INT8,
        #[cfg(target_arch = "aarch64")]
        Kind::Neon => neon::Neon::UNSIGNED_INT8,
        #[cfg(target_arch = "aarch64")]
        Kind::NeonDot => neon::NeonDot::UNSIGNED_INT8,
    }
}

/// Multiplies `lhs` `[m, cols]` by the packed matrix into `sink`: the dispatch point of all integer products.
///
/// # Errors
/// [`KernelError::Length`] when a slice does not match.
pub(super) fn matmul(weights: &Packed, lhs: &[i8], m: usize, sink: &mut Sink<'_>) -> Result<(), KernelError> {
    expect_len("activation codes", lhs.len(), m.saturating_mul(weights.cols))?;
    let out = match sink {
        Sink::Dots(out) => out.len(),
        Sink::Scaled { out, .. } => out.len(),
        Sink::Requantized { out, requantize, added } => {
            expect_len("features of a requantised product", requantize.features(), weights.rows)?;
            expect_len("codes of a residual connection", added.map_or(out.len(), <[i8]>::len), out.len())?;
            out.len()
        }
    };
    expect_len("product", out, m.saturating_mul(weights.rows))?;
    // SAFETY (of every call of an entry below): `weights.isa` is an `Isa`, which exists only where detection found
    // its instructions, and lengths were checked above.
    match weights.isa.kind() {
        Kind::Scalar => drive::<portable::Portable>(weights, lhs, m, sink),
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as said above.
        Kind::Avx2 => unsafe { avx2::matmul(weights, lhs, m, sink) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as said above.
        Kind::Avx512 => unsafe { avx512::matmul(weights, lhs, m, sink) },
        #[cfg(target_arch = "aarch64")]
        // SAFETY: as said above.
        Kind::Neon => unsafe { neon::matmul(weights, lhs, m, sink) },
        #[cfg(target_arch = "aarch64")]
        // SAFETY: as said above.
        Kind::NeonDot => unsafe { neon::matmul_dot(weights, lhs, m, sink) },
    }
    Ok(())
}

/// The tile loop. Inlined into an entry function per instruction set, so that row sums and scaling are compiled
/// for it as well.
#[inline(always)]
fn drive<K: Kernel>(weights: &Packed, lhs: &[i8], m: usize, sink: &mut Sink<'_>) {
    let cols = weights.cols;
    let offset = match weights.format {
        Format::Ternary => 1,
        Format::Int8 if K::UNSIGNED_INT8 => 128,
        Format::Int8 => 0,
    };
    let panel_bytes = pack::panel_bytes(weights.format, cols);
    let panels = weights.rows.div_ceil(PANEL);
    let mut acc = [[[0; PANEL]; MAX_TILE_ROWS]; GROUP];
    let mut tail = [[0; K_BLOCK]; MAX_TILE_ROWS];
    let mut first = 0;
    while first < m {
        // Tiles of nearly equal size: 17 rows run as 9 + 8, not as 16 + 1.
        let rows = (m - first).div_ceil((m - first).div_ceil(K::TILE_ROWS));
        let lhs = &lhs[first * cols..][..rows * cols];
        let mut corrections = [0; MAX_TILE_ROWS];
        for r in 0..rows {
            let row = &lhs[r * cols..][..cols];
            let rest = row.chunks_exact(K_BLOCK).remainder();
            tail[r][..rest.len()].copy_from_slice(rest);
            if offset != 0 {
                corrections[r] = offset * row.iter().map(|&a| i32::from(a)).sum::<i32>();
            }
        }
        let tile = Tile { lhs, cols, tail: &tail };
        for first_panel in (0..panels).step_by(GROUP) {
            let group = first_panel..panels.min(first_panel + GROUP);
            for (index, acc) in group.clone().zip(&mut acc) {
                // Not `chunks_exact`: with no columns a panel has no bytes, but its sums are zeros to be written.
                let panel = &weights.panels[index * panel_bytes..][..panel_bytes];
                // SAFETY: the caller of the entry vouched for the instruction set; `pack` made whole panels.
                unsafe { K::dots(weights.format, rows, tile, panel, acc) };
            }
            let columns = group.start * PANEL..weights.rows.min(group.end * PANEL);
            for r in 0..rows {
                let at = (first + r) * weights.rows + columns.start;
                let sums = Sums { acc: &acc, row: r, correction: corrections[r] };
                match sink {
                    Sink::Dots(out) => sums.write(&mut out[at..][..columns.len()]),
                    Sink::Scaled { out, steps, scale, bias } => {
                        let bias = match bias {
                            Some(bias) => &bias[columns.start..],
                            None => &[],
                        };
                        let out = &mut out[at..][..columns.len()];
                        sums.write_scaled(out, steps[first + r], &scale[columns.start..], bias);
                    }
                    Sink::Requantized { out, requantize, added } => {
                        let added = added.map(|added| &added[at..][..columns.len()]);
                        sums.write_requantized(&mut out[at..][..columns.len()], requantize, first_panel, added);
                    }
                }
            }
        }
        first += rows;
    }
}

/// One row's sums with a group of panels, on their way out. Plain inlined functions without closures: a closure is
/// compiled for the baseline CPU unless it happens to be inlined.
struct Sums<'a> {
    acc: &'a [Acc; GROUP],
    row: usize,
    /// To be subtracted from every sum.
    correction: i32,
}

impl Sums<'_> {
    #[inline(always)]
    fn panel(&self, p: usize) -> [i32; PANEL] {
        let mut dots = self.acc[p][self.row];
        for dot in &mut dots {
            // With k at most 2^16, |dot| is at most 2^16 * 255 * 128 and |correction| half of that; the difference is
            // the true sum, at most 2^16 * 127 * 128. All are below 2^31.
            *dot -= self.correction;
        }
        dots
    }

    /// `(dot * step) * scale + bias`, without the last when there is no bias.
    #[inline(always)]
    fn scaled_panel(&self, p: usize, step: f32, scale: &[[f32; PANEL]], bias: &[[f32; PANEL]]) -> [f32; PANEL] {
        let dots = self.panel(p);
        let mut y = [0.0; PANEL];
        for c in 0..PANEL {
            y[c] = dots[c] as f32 * step * scale[p][c];
        }
        if !bias.is_empty() {
            for c in 0..PANEL {
                y[c] += bias[p][c];
            }
        }
        y
    }

    #[inline(always)]
    fn write(&self, out: &mut [i32]) {
        let (whole, rest) = out.as_chunks_mut::<PANEL>();
        for p in 0..whole.len() {
            whole[p] = self.panel(p);
        }
        if !rest.is_empty() {
            rest.copy_from_slice(&self.panel(whole.len())[..rest.len()]);
        }
    }

    #[inline(always)]
    fn write_scaled(&self, out: &mut [f32], step: f32, scale: &[f32], bias: &[f32]) {
        let (scale, _) = scale.as_chunks();
        let (bias, _) = bias.as_chunks();
        let (whole, rest) = out.as_chunks_mut::<PANEL>();
        for p in 0..whole.len() {
            whole[p] = self.scaled_panel(p, step, scale, bias);
        }
        if !rest.is_empty() {
            rest.copy_from_slice(&self.scaled_panel(whole.len(), step, scale, bias)[..rest.len()]);
        }
    }

    /// As codes, which begin with the features of panel `first`.
    #[inline(always)]
    fn write_requantized(&self, out: &mut [i8], requantize: &Requantize, first: usize, added: Option<&[i8]>) {
        for (p, out) in out.chunks_mut(PANEL).enumerate() {
            let added = added.map(|added| &added[p * PANEL..][..out.len()]);
            requantize.write(first + p, &self.panel(p), added, out);
        }
    }
}

/// `values` zero-padded to whole panels, as [`Sink::Scaled`] wants scale and bias.
pub(super) fn pad_to_panels(values: &[f32]) -> Box<[f32]> {
    let mut padded = values.to_vec();
    padded.resize(values.len().next_multiple_of(PANEL), 0.0);
    padded.into()
}
