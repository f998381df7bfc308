//! Matrix products `out[m, n] = sum over k of lhs[m, k] * w[n, k]` with weights packed ahead, in three formats,
//! and [`scalar`] defines them:
//!
//! | weights | file | activations | used by |
//! | --- | --- | --- | --- |
//! | ternary, two bits or five to a byte | [`ternary`] | int8 | substrates |
//! | int8 | [`int8`] | int8 | qkv, projection, the stem behind its first layer |
//! | int8 | [`pointwise`] | int8, and int8 comes out | convolutions between int8 images |
//! | f32 | [`float`] | f32 | what sees pixels, router, attention, head |
//!
//! Training's products, [`bf16`], pack nothing ahead and stand apart.
//!
//! Here is what the integer formats share: one packed layout, one tile driver, one micro-kernel per instruction set.
//!
//! ```text
//! dot[m, n] = sum over k of lhs[m, k] * w[n, k]                       lhs int8, exact in i32
//! for each 64 rows of lhs, for each panel of 16 rows of w:            a panel of 512 k is 8 kB: the first-level cache
//!     panel = unpack(panel)                                           ternary weights only: a byte each
//!     for each tile of ROWS rows of lhs:                              ROWS fits the register file
//!         acc[ROWS, 16] += micro-kernel(tile, panel)                  i32, in registers over all of k
//!     out = f32(acc - offset * row_sum(lhs)) * step * scale + bias
//! ```
//!
//! Three ideas make it fast:
//! - **Columns sit in lanes, four k at a time**: a 32-bit lane holds four consecutive k of one column, which is what
//!   `vpdpbusd` and `sdot` reduce, and an activation is a broadcast of four bytes. No horizontal sums.
//! - **Ternary weights stay packed until they are needed**, at two bits or five to a byte: a byte holds the same lane of
//!   four or five successive k groups, so unpacking is a few operations a register, and its result serves 64 rows. With
//!   AVX-512 two bits are unpacked in registers, for a tile at a time, beside products that leave those units idle.
//! - **Unsigned weights**: x86 multiplies u8 by i8, so weights are stored as w + offset, and `offset * sum(lhs row)` is
//!   subtracted once per output. For ternary w + 1 in {0, 1, 2} the products are so small that `vpmaddubsw` and `smlal`
//!   sum many of them in 16 bits.
//!
//! Tried on paper and measured per instruction, and left out: table lookups (`vpermw` on the 27 sums of three
//! activations, indices straight from 1.8-bit packed weights) cost 1.3 to 1.5 cycles per 96 products on Zen 4 where
//! `vpdpbusd` takes one cycle per 64, and building the tables eats what is left of the gain.
//!
//! # Layout
//! A *group* is 64 bytes: byte `4 c + j` belongs to row c of a panel and column j of four. Panels of `PANEL` rows of w,
//! blocks of `K_BLOCK` columns (four groups), zero-padded in both directions. Let g count the groups of the matrix, panel
//! by panel and in each from the first columns to the last:
//! - int8: group g is bytes `64 g` and following;
//! - two bits, as w + 1: bits `2 i..2 i + 2` of the bytes from `64 (g div 4)` on, with `i = g mod 4`;
//! - five trits, as w + 1: digit `i = g mod 5`, highest first, of numbers in base 3 in the bytes from `64 (g div 5)` on. A
//!   number n is stored as the fraction `ceil(n * 256 / 243)` of 256, whose digits come out from the top. Groups of two
//!   panels may share bytes, so that nothing is lost at the seams.
//!
//! The same bytes serve every instruction set, except that int8 weights are stored as w + 128 where the
//! kernel wants them unsigned.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod avx512_bf16;
mod mat;
#[cfg(target_arch = "aarch64")]
mod neon;
mod pack;
mod portable;

pub mod bf16;
pub mod float;
pub mod int8;
pub mod pointwise;
pub mod scalar;
pub mod ternary;

pub use float::PackedF32;
pub use int8::{Int8Rows, PackedInt8};
pub use pointwise::PackedPointwise;
pub use ternary::{PackedTernary, TernaryStorage};

use std::ops::Range;
use std::sync::Arc;

use super::error::{KernelError, expect_len};
use super::isa::{Isa, Kind};
use super::requantize::Requantize;
use super::scales::Scales;

/// Rows of w in a panel: one 512-bit register of 32-bit lanes.
const PANEL: usize = 16;

/// Bytes of a group: four columns of a panel's rows.
const GROUP_BYTES: usize = 4 * PANEL;

/// Groups of a block.
const GROUPS: usize = 4;

/// Columns of w (k) in a block of a panel: what a kernel reads of an activation row at once.
const K_BLOCK: usize = 4 * GROUPS;

/// Most rows of a tile, over all micro-kernels.
const MAX_TILE_ROWS: usize = 16;

/// Rows of `lhs` that share the unpacking of a panel: a multiple of every kernel's tile.
const UNPACK_ROWS: usize = 64;

/// Blocks of a panel that are unpacked at a time: 1024 columns, 16 kB.
const SEGMENT: usize = 64;

/// Room for an unpacked segment, and for the groups of other panels and segments that share its first and last bytes.
const UNPACKED_BYTES: usize = (SEGMENT * GROUPS + 8) * GROUP_BYTES;

/// Panels whose sums are collected before they are written, so that a row of the output is written in runs of several
/// cache lines, and what is known per row is looked up once per run.
const PANELS_AT_ONCE: usize = 4;

/// The i32 sums of rows with a panel.
type Acc = [[i32; PANEL]];

/// How weights are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    /// Two bits, w + 1.
    TwoBits,
    /// Five to a byte, w + 1.
    FiveTrits,
    /// Eight bits: w, or w + 128 for kernels that multiply unsigned weights.
    Int8,
}

/// A packed matrix `[rows, cols]` and the instruction set that it was packed for.
#[derive(Debug, Clone)]
struct Packed {
    isa: Isa,
    format: Format,
    rows: usize,
    cols: usize,
    /// See the module's layout. The same allocation in matrices that share their codes.
    panels: Arc<[u8]>,
}

impl Packed {
    fn isa(&self) -> Isa {
        self.isa
    }

    fn rows(&self) -> usize {
        self.rows
    }

    fn cols(&self) -> usize {
        self.cols
    }

    fn resident_bytes(&self) -> usize {
        self.panels.len()
    }
}

/// Where the sums go.
enum Sink<'a> {
    /// As they are: `out[m, n]`.
    Dots(&'a mut [i32]),
    /// `out[m, n] = (f32(dot) * steps[m]) * scale[n] (+ bias[n])`.
    Scaled {
        /// The product, row-major `[m, rows]`.
        out: &'a mut [f32],
        /// One for each row of `out`: `[m]`.
        steps: &'a [f32],
        /// `[rows]`, padded to whole panels.
        scale: &'a Scales,
        /// `[rows]`, padded to whole panels.
        bias: Option<&'a [f32]>,
    },
    /// int8 codes: `out[m, n] = requantize(dot, added[m, n])`.
    Requantized {
        /// The product, row-major `[m, rows]`.
        out: &'a mut [i8],
        /// For as many features as `rows`.
        requantize: &'a Requantize,
        /// Codes to add, row-major `[m, rows]`.
        added: Option<&'a [i8]>,
    },
}

impl Sink<'_> {
    /// Where the scaled products of `rows` with the panel at `column` of `columns` go, if it is whole and they are wanted.
    /// `scale` begins with the panel's.
    #[inline(always)]
    fn panel<'s>(
        &'s mut self,
        rows: Range<usize>,
        columns: usize,
        column: usize,
        (corrections, scale): (&'s [i32], &'s [f32]),
    ) -> Option<Scaled<'s>> {
        match self {
            Sink::Scaled { out, steps, bias, .. } if column + PANEL <= columns => Some(Scaled {
                out: &mut out[rows.start * columns + column..],
                stride: columns,
                corrections: &corrections[..rows.len()],
                steps: &steps[rows],
                scale: scale.first_chunk()?,
                bias: match bias {
                    Some(bias) => Some(bias[column..].first_chunk()?),
                    None => None,
                },
            }),
            _ => None,
        }
    }
}

/// The part of a product that one call of a micro-kernel works on: a few rows of `lhs` and a segment of k.
#[derive(Clone, Copy)]
struct Tile<'a> {
    /// Activations, row-major `[rows, cols]`.
    lhs: &'a [i8],
    cols: usize,
    /// The last `cols % K_BLOCK` columns of every row, zero-padded, so that no kernel reads past a row's end.
    tail: &'a [[i8; K_BLOCK]],
    /// The first block of k, and how many.
    first_block: usize,
    blocks: usize,
}

impl Tile<'_> {
    /// Where the activations of block `block < blocks` are, and the bytes from one row to the next: each row of the
    /// tile has [`K_BLOCK`] there.
    #[inline(always)]
    fn lhs_block(&self, block: usize) -> (*const i8, usize) {
        let block = self.first_block + block;
        if block < self.cols / K_BLOCK {
            (self.lhs[block * K_BLOCK..].as_ptr(), self.cols)
        } else {
            (self.tail.as_flattened().as_ptr(), K_BLOCK)
        }
    }

    /// What kernels rely on: `rows` rows, and blocks that lie inside them.
    #[inline(always)]
    fn check(&self, rows: usize, weights: &[u8], acc: &Acc) {
        assert!(acc.len() >= rows);
        self.check_reads(rows, weights, 1);
    }

    /// What they rely on before they read weights, `per_byte` in a byte.
    #[inline(always)]
    fn check_reads(&self, rows: usize, weights: &[u8], per_byte: usize) {
        assert!(self.lhs.len() >= rows * self.cols && self.tail.len() >= rows);
        assert!(self.first_block + self.blocks <= self.cols.div_ceil(K_BLOCK));
        assert!(weights.len() >= self.blocks * GROUPS * GROUP_BYTES / per_byte);
    }
}

/// Where the sums of a tile with one panel go, scaled: the first panel column of the tile's first row, and so on.
#[cfg_attr(not(target_arch = "x86_64"), expect(dead_code, reason = "AVX-512 alone scales from registers"))]
struct Scaled<'a> {
    /// From there on, `stride` from row to row.
    out: &'a mut [f32],
    stride: usize,
    /// One for each row of the tile.
    steps: &'a [f32],
    /// To be subtracted from the sums of each row of the tile.
    corrections: &'a [i32],
    scale: &'a [f32; PANEL],
    bias: Option<&'a [f32; PANEL]>,
}

impl Scaled<'_> {
    /// What kernels rely on: `rows` rows.
    #[cfg_attr(not(target_arch = "x86_64"), expect(dead_code, reason = "AVX-512 alone scales from registers"))]
    #[inline(always)]
    fn check(&self, rows: usize) {
        assert!(rows > 0 && self.out.len() >= (rows - 1) * self.stride + PANEL);
        assert!(self.steps.len() >= rows && self.corrections.len() >= rows);
    }
}

/// An array that begins with a line of the cache, so that no register is loaded from two lines.
#[repr(align(64))]
struct Aligned<T>(T);

/// A micro-kernel: the sums of a tile with one panel.
trait Kernel {
    /// Rows of a tile that fit its registers; at most [`MAX_TILE_ROWS`].
    const TILE_ROWS: usize;
    /// Whether int8 weights are stored as w + 128.
    const UNSIGNED_INT8: bool;
    /// Whether the kernel scales sums while they are in registers, by the two functions whose names begin with `scaled`.
    const SCALES: bool = false;

    /// Writes the products of a tile of `rows` rows to `acc[..rows]`, where `rows` is in `1..=TILE_ROWS`, or adds them if
    /// the tile does not begin with the first block. `weights` has the
    /// groups of the tile's blocks, a byte a weight; `TERNARY` says that they are w + 1 of ternary weights, in 0..=2.
    ///
    /// # Safety
    /// The CPU has the kernel's instruction set.
    unsafe fn dots<const TERNARY: bool>(rows: usize, tile: Tile<'_>, weights: &[u8], acc: &mut Acc);

    /// Writes scaled products of a tile that has all of k: what [`Sums::scaled_panel`] says, to the last bit.
    ///
    /// # Safety
    /// The CPU has the kernel's instruction set.
    #[inline(always)]
    unsafe fn scaled_dots(_rows: usize, _tile: Tile<'_>, _weights: &[u8], _scaled: &mut Scaled<'_>) {
        unreachable!("the kernel does not scale");
    }

    /// The same with weights of two bits as they rest in memory, unpacked in registers.
    ///
    /// # Safety
    /// The CPU has the kernel's instruction set.
    #[inline(always)]
    unsafe fn scaled_dots_of_two_bits(_rows: usize, _tile: Tile<'_>, _packed: &[u8], _scaled: &mut Scaled<'_>) {
        unreachable!("the kernel does not scale");
    }

    /// The sum of a row's codes.
    ///
    /// # Safety
    /// The CPU has the kernel's instruction set.
    #[inline(always)]
    unsafe fn sum(row: &[i8]) -> i32 {
        row.iter().map(|&code| i32::from(code)).sum()
    }
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
fn matmul(weights: &Packed, lhs: &[i8], m: usize, sink: &mut Sink<'_>) -> Result<(), KernelError> {
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

/// The loops around the micro-kernels. Inlined into an entry function per instruction set, so that unpacking, row sums and
/// scaling are compiled for it as well.
#[inline(always)]
fn drive<K: Kernel>(weights: &Packed, lhs: &[i8], m: usize, sink: &mut Sink<'_>) {
    match weights.format {
        Format::TwoBits | Format::Int8 if K::SCALES && weights.rows.is_multiple_of(PANEL) => {
            if let Sink::Scaled { out, steps, scale, bias } = sink {
                return drive_scaled::<K>(weights, lhs, (out, steps), scale, *bias);
            }
        }
        _ => {}
    }
    match weights.format {
        Format::TwoBits | Format::FiveTrits => {
            drive_rows::<K, UNPACK_ROWS, UNPACKED_BYTES>(weights, lhs, m, UNPACK_ROWS, sink);
        }
        // Nothing is unpacked: a tile's activations stay in the first-level cache while the weights pass by.
        Format::Int8 => drive_rows::<K, MAX_TILE_ROWS, 0>(weights, lhs, m, K::TILE_ROWS, sink),
    }
}

/// The loops around a micro-kernel that scales, where nothing but the product itself has to be written.
#[inline(always)]
fn drive_scaled<K: Kernel>(
    weights: &Packed,
    lhs: &[i8],
    (out, steps): (&mut [f32], &[f32]),
    scales: &Scales,
    bias: Option<&[f32]>,
) {
    let (cols, columns, m) = (weights.cols, weights.rows, steps.len());
    let blocks = cols.div_ceil(K_BLOCK);
    let panel_bytes = blocks * GROUPS * GROUP_BYTES / pack::per_byte(weights.format);
    let rows_at_once = if weights.format == Format::Int8 { K::TILE_ROWS } else { UNPACK_ROWS };
    let (mut tail, mut corrections) = ([[0; K_BLOCK]; UNPACK_ROWS], [0; UNPACK_ROWS]);
    let mut first = 0;
    while first < m {
        let rows = (m - first).div_ceil((m - first).div_ceil(rows_at_once));
        let lhs = &lhs[first * cols..][..rows * cols];
        read_rows::<K>(weights, lhs, &mut tail, &mut corrections);
        for column in (0..columns).step_by(PANEL) {
            let mut scale = [0.0; PANEL];
            scales.read(column, &mut scale);
            let bias = bias.and_then(|bias| bias[column..].first_chunk());
            let panel = &weights.panels[column / PANEL * panel_bytes..][..panel_bytes];
            let mut row = 0;
            while row < rows {
                let tile_rows = (rows - row).div_ceil((rows - row).div_ceil(K::TILE_ROWS));
                let tile = Tile { lhs: &lhs[row * cols..], cols, tail: &tail[row..], first_block: 0, blocks };
                let out = &mut out[(first + row) * columns + column..];
                let (steps, corrections) = (&steps[first + row..], &corrections[row..]);
                let mut scaled = Scaled { out, stride: columns, steps, corrections, scale: &scale, bias };
                // SAFETY: the caller of the entry vouched for the instruction set.
                unsafe {
                    match weights.format {
                        Format::TwoBits => K::scaled_dots_of_two_bits(tile_rows, tile, panel, &mut scaled),
                        _ => K::scaled_dots(tile_rows, tile, panel, &mut scaled),
                    }
                }
                row += tile_rows;
            }
        }
        first += rows;
    }
}

/// Notes of rows of activations what does not depend on the panel: their last columns, and what to subtract from sums.
#[inline(always)]
fn read_rows<K: Kernel>(weights: &Packed, lhs: &[i8], tail: &mut [[i8; K_BLOCK]], corrections: &mut [i32]) {
    let offset = match weights.format {
        Format::TwoBits | Format::FiveTrits => 1,
        Format::Int8 if K::UNSIGNED_INT8 => 128,
        Format::Int8 => 0,
    };
    for (r, row) in lhs.chunks_exact(weights.cols.max(1)).enumerate() {
        let rest = row.chunks_exact(K_BLOCK).remainder();
        tail[r][..rest.len()].copy_from_slice(rest);
        if offset != 0 {
            // SAFETY: the caller of the entry vouched for the instruction set.
            corrections[r] = offset * unsafe { K::sum(row) };
        }
    }
}

/// `rows_at_once`, at most `ROWS`, is how many rows go through all panels together.
#[inline(always)]
fn drive_rows<K: Kernel, const ROWS: usize, const UNPACKED: usize>(
    weights: &Packed,
    lhs: &[i8],
    m: usize,
    rows_at_once: usize,
    sink: &mut Sink<'_>,
) {
    let cols = weights.cols;
    let panels = weights.rows.div_ceil(PANEL);
    let (mut unpacked, mut acc) = (Aligned([0; UNPACKED]), Aligned([[[0; PANEL]; ROWS]; PANELS_AT_ONCE]));
    let (unpacked, acc) = (&mut unpacked.0, &mut acc.0);
    let mut tail = [[0; K_BLOCK]; ROWS];
    let mut corrections = [0; ROWS];
    let mut first = 0;
    while first < m {
        // Nearly equal shares: 65 rows run as 33 + 32.
        let rows = (m - first).div_ceil((m - first).div_ceil(ROWS.min(rows_at_once)));
        let lhs = &lhs[first * cols..][..rows * cols];
        read_rows::<K>(weights, lhs, &mut tail, &mut corrections);
        for first_panel in (0..panels).step_by(PANELS_AT_ONCE) {
            let last_panel = panels.min(first_panel + PANELS_AT_ONCE);
            let columns = first_panel * PANEL..weights.rows.min(last_panel * PANEL);
            let mut scale = [0.0; PANELS_AT_ONCE * PANEL];
            if let Sink::Scaled { scale: scales, .. } = sink {
                scales.read(columns.start, &mut scale);
            }
            let mut written = 0;
            for panel in first_panel..last_panel {
                let column = panel * PANEL;
                let scale = &scale[column - columns.start..];
                let scaled = sink.panel(first..first + rows, weights.rows, column, (&corrections, scale));
                let (lhs, acc) = ((lhs, &tail[..rows]), &mut acc[panel - first_panel][..rows]);
                written += usize::from(multiply_panel::<K>(weights, panel, lhs, unpacked, acc, scaled));
            }
            // Panels that were written are the first ones: only the last may be narrower.
            let left = first_panel + written..last_panel;
            if !left.is_empty() {
                let scale = &scale[written * PANEL..];
                write_sums(weights, first..first + rows, left, &acc[written..], (&corrections, scale), sink);
            }
        }
        first += rows;
    }
}

/// Writes the sums of `rows` with a run of panels.
#[inline(always)]
fn write_sums<const ROWS: usize>(
    weights: &Packed,
    rows: Range<usize>,
    panels: Range<usize>,
    acc: &[[[i32; PANEL]; ROWS]],
    (corrections, scale): (&[i32; ROWS], &[f32]),
    sink: &mut Sink<'_>,
) {
    if let Sink::Requantized { out, requantize, added } = sink {
        let pixels = rows.start * weights.rows..rows.end * weights.rows;
        let (out, added) = (&mut out[pixels.clone()], added.map(|added| &added[pixels]));
        for (acc, panel) in acc.iter().zip(panels) {
            requantize.write(weights.isa, panel, (&acc[..rows.len()], corrections), added, out);
        }
        return;
    }
    let columns = panels.start * PANEL..weights.rows.min(panels.end * PANEL);
    for r in 0..rows.len() {
        let at = (rows.start + r) * weights.rows + columns.start;
        let sums = Sums { acc, row: r, correction: corrections[r] };
        match sink {
            Sink::Dots(out) => sums.write(&mut out[at..][..columns.len()]),
            Sink::Scaled { out, steps, bias, .. } => {
                let bias = match bias {
                    Some(bias) => &bias[columns.start..],
                    None => &[],
                };
                sums.write_scaled(&mut out[at..][..columns.len()], steps[rows.start + r], scale, bias);
            }
            Sink::Requantized { .. } => {}
        }
    }
}

/// Sets `acc` to the sums of the rows of `lhs` with one panel; or writes them to `scaled`, where the kernel can. Returns
/// whether it did the latter.
#[inline(always)]
fn multiply_panel<K: Kernel>(
    weights: &Packed,
    panel: usize,
    (lhs, tail): (&[i8], &[[i8; K_BLOCK]]),
    unpacked: &mut [u8],
    acc: &mut Acc,
    mut scaled: Option<Scaled<'_>>,
) -> bool {
    let (cols, rows) = (weights.cols, acc.len());
    let all_blocks = cols.div_ceil(K_BLOCK);
    if all_blocks == 0 {
        acc.fill([0; PANEL]);
    }
    let mut written = false;
    let mut first_block = 0;
    while first_block < all_blocks {
        let blocks = SEGMENT.min(all_blocks - first_block);
        // The segment's groups, and the whole bytes that hold them.
        let group = panel * pack::panel_groups(cols) + first_block * GROUPS;
        let per_byte = pack::per_byte(weights.format);
        let (first_byte, last_byte) = (group / per_byte, (group + blocks * GROUPS).div_ceil(per_byte));
        let packed = &weights.panels[first_byte * GROUP_BYTES..last_byte * GROUP_BYTES];
        let segment = if weights.format == Format::Int8 {
            packed
        } else {
            pack::unpack_groups(weights.format, packed, unpacked);
            &unpacked[group % per_byte * GROUP_BYTES..][..blocks * GROUPS * GROUP_BYTES]
        };
        let mut row = 0;
        while row < rows {
            // Tiles of nearly equal size: 17 rows run as 9 + 8, not as 16 + 1.
            let tile_rows = (rows - row).div_ceil((rows - row).div_ceil(K::TILE_ROWS));
            let tile = Tile { lhs: &lhs[row * cols..], cols, tail: &tail[row..], first_block, blocks };
            if let Some(scaled) = scaled.as_mut().filter(|_| K::SCALES && blocks == all_blocks) {
                let mut scaled = Scaled {
                    out: &mut scaled.out[row * scaled.stride..],
                    steps: &scaled.steps[row..],
                    corrections: &scaled.corrections[row..],
                    ..*scaled
                };
                // SAFETY: the caller of the entry vouched for the instruction set.
                unsafe { K::scaled_dots(tile_rows, tile, segment, &mut scaled) };
                written = true;
                row += tile_rows;
                continue;
            }
            let acc = &mut acc[row..row + tile_rows];
            // SAFETY: the caller of the entry vouched for the instruction set.
            unsafe {
                match weights.format {
                    Format::Int8 => K::dots::<false>(tile_rows, tile, segment, acc),
                    Format::TwoBits | Format::FiveTrits => K::dots::<true>(tile_rows, tile, segment, acc),
                }
            }
            row += tile_rows;
        }
        first_block += blocks;
    }
    written
}

/// One row's sums with a group of panels, on their way out. Plain inlined functions without closures: a closure is
/// compiled for the baseline CPU unless it happens to be inlined.
struct Sums<'a, const ROWS: usize> {
    acc: &'a [[[i32; PANEL]; ROWS]],
    row: usize,
    /// To be subtracted from every sum.
    correction: i32,
}

impl<const ROWS: usize> Sums<'_, ROWS> {
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
}

/// `values` zero-padded to whole panels, as [`Sink::Scaled`] wants its bias.
fn pad_to_panels(values: &[f32]) -> Box<[f32]> {
    let mut padded = values.to_vec();
    padded.resize(values.len().next_multiple_of(PANEL), 0.0);
    padded.into()
}
