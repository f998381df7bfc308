//! Depthwise convolutions: every channel has a window of weights of its own. int8 in, int8 out, channels last, one row
//! of the output at a time, so that a caller needs no more of the input in memory than its rows.
//!
//! The definition is [`scalar`]. The other instruction sets work on `LANES` channels of a row:
//! ```text
//! gather:  column[x] = for each channel the `kernel` codes above each other at x, four and four beside each other
//! for each pixel:  sums[16] = start + sum over kx, groups of four ky of column[pixel * stride + kx] . w[kx]
//! codes = requantize(sums)
//! ```
//! - **Four codes of one channel make a 32-bit lane**, which is what `vpdpbusd` and `sdot` reduce. Neighbouring pixels
//!   share columns, so each code is moved once a row, and edges and strides are gone when the sums begin.
//! - **One block of channels at a time**: its columns stay in the first-level cache, its weights in registers.
//! - A 3x3 window fills three of a lane's four bytes, a 5x5 window five of eight; zero weights take the rest.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;
pub mod scalar;
#[cfg(test)]
mod tests;

use super::error::{KernelError, expect_codes, expect_len};
use super::isa::{Isa, Kind};
use super::requantize::{LANES, Requantize};

/// Codes above each other that make a lane.
const GROUP: usize = 4;

/// Bytes of [`LANES`] lanes.
const LANE_BYTES: usize = LANES * GROUP;

/// Pixels whose sums are collected before they become codes.
const PIXELS: usize = 16;

/// Widest window. A sum is at most `64 * 64 * 128 * 127` in size, below 2^31.
pub const MAX_KERNEL: usize = 64;

/// Sizes of a depthwise convolution.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Channels of input and output.
    pub channels: usize,
    /// Side of the window.
    pub kernel: usize,
    /// Pixels from one window to the next, both ways.
    pub stride: usize,
    /// Rows that the first window begins above the input.
    pub top: usize,
    /// Columns that the first window begins left of the input.
    pub left: usize,
}

#[derive(Debug, Clone, Copy)]
pub struct Input<'a> {
    /// Codes of the image, `[height, width, channels]`.
    pub codes: &'a [i8],
    /// Pixels of a row.
    pub width: usize,
    /// The code of zero, which stands for pixels beyond the edges.
    pub zero: i8,
}

/// Weights of a depthwise convolution, packed for one instruction set.
#[derive(Debug, Clone)]
pub struct PackedDepthwise {
    isa: Isa,
    shape: Shape,
    weights: Weights,
    requantize: Requantize,
}

#[derive(Debug, Clone)]
enum Weights {
    /// `[channels, kernel, kernel]`, for the definition.
    Plain(Box<[i8]>),
    /// Blocks of [`LANES`] channels.
    Lanes {
        /// `[blocks, kernel (column), groups, LANES, GROUP (rows)]`.
        codes: Box<[i8]>,
        /// What the sums of a block start from: minus what unsigned activations add.
        start: Box<[[i32; LANES]]>,
    },
}

/// The sums of one block of channels.
trait Kernel {
    /// Whether columns hold codes + 128.
    const UNSIGNED: bool;

    /// `sums[i] = start + ` the products of `taps` lanes of columns from `i * step` lanes on with `weights`.
    ///
    /// # Safety
    /// The CPU has the kernel's instruction set.
    unsafe fn dots(columns: &[u8], step: usize, weights: &[i8], start: &[i32; LANES], sums: &mut [[i32; LANES]]);

    /// `columns[lanes x][4 c + i]` = channel c of pixel x of `lines[i]`, plus 128 if columns hold codes + 128, for as many
    /// pixels as there are such columns.
    ///
    /// # Safety
    /// The CPU has the kernel's instruction set.
    #[inline(always)]
    unsafe fn interleave(lines: &[Line<'_>; GROUP], columns: &mut [[u8; LANE_BYTES]], lanes: usize) {
        let flip = if Self::UNSIGNED { 0x80 } else { 0 };
        for (x, column) in columns.iter_mut().step_by(lanes).enumerate() {
            let pixels = [lines[0].pixel(x), lines[1].pixel(x), lines[2].pixel(x), lines[3].pixel(x)];
            for c in 0..LANES {
                for i in 0..GROUP {
                    column[GROUP * c + i] = pixels[i][c].cast_unsigned() ^ flip;
                }
            }
        }
    }
}

/// A row of the input from the block's first channel on, or the same zeros for every pixel.
#[derive(Clone, Copy)]
struct Line<'a> {
    codes: &'a [i8],
    /// Codes from one pixel to the next.
    step: usize,
}

impl Line<'_> {
    /// The first [`LANES`] codes of a pixel. Lanes that no channel has are 0, and their sums are not written.
    #[inline(always)]
    fn pixel(&self, x: usize) -> [i8; LANES] {
        let codes = &self.codes[x * self.step..];
        if let Some(pixel) = codes.first_chunk() {
            return *pixel;
        }
        let mut pixel = [0; LANES];
        pixel[..codes.len()].copy_from_slice(codes);
        pixel
    }
}

impl PackedDepthwise {
    /// Packs `codes` `[channels, kernel, kernel]`, each in -127..=127.
    ///
    /// # Errors
    /// [`KernelError`] when lengths do not match, a code is -128, or the window is wider than [`MAX_KERNEL`].
    pub fn pack(isa: Isa, codes: &[i8], shape: Shape, requantize: Requantize) -> Result<Self, KernelError> {
        let Shape { channels, kernel, .. } = shape;
        if kernel > MAX_KERNEL {
            return Err(KernelError::InnerDimension { max: MAX_KERNEL, got: kernel });
        }
        expect_len("weights of a depthwise convolution", codes.len(), channels.saturating_mul(kernel * kernel))?;
        expect_len("features of a depthwise convolution", requantize.features(), channels)?;
        expect_codes("weights of a depthwise convolution", codes)?;
        let weights = match isa.kind() {
            Kind::Scalar => Weights::Plain(codes.into()),
            _ => pack_lanes(codes, &shape, unsigned(isa)),
        };
        Ok(Self { isa, shape, weights, requantize })
    }

    /// The sizes that it was packed with.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// Bytes on the heap.
    pub fn resident_bytes(&self) -> usize {
        let weights = match &self.weights {
            Weights::Plain(codes) => size_of_val(&**codes),
            Weights::Lanes { codes, start } => size_of_val(&**codes) + size_of_val(&**start),
        };
        weights + self.requantize.resident_bytes()
    }

    /// Bytes of scratch for an output of `width` pixels a row.
    pub fn scratch_bytes(shape: &Shape, width: usize) -> usize {
        shape.columns(width) * shape.groups() * LANE_BYTES
    }

    /// Row `row` of the output, `out` `[width, channels]`. `added` are the codes of a residual connection, as many as
    /// `out` has; `scratch` has [`PackedDepthwise::scratch_bytes`].
    ///
    /// # Errors
    /// [`KernelError::Length`] when a slice does not hold whole pixels or rows, or `scratch` is too short.
    pub fn forward_row(
        &self,
        input: Input<'_>,
        row: usize,
        added: Option<&[i8]>,
        scratch: &mut [u8],
        out: &mut [i8],
    ) -> Result<(), KernelError> {
        let row_len = input.width * self.shape.channels;
        let height = input.codes.len().checked_div(row_len).unwrap_or(0);
        expect_len("rows of a depthwise convolution", input.codes.len(), height * row_len)?;
        let width = out.len().checked_div(self.shape.channels).unwrap_or(0);
        expect_len("pixels of a depthwise convolution", out.len(), width * self.shape.channels)?;
        expect_len("codes of a residual connection", added.map_or(out.len(), <[i8]>::len), out.len())?;
        let scratch_bytes = Self::scratch_bytes(&self.shape, width).min(scratch.len());
        expect_len("scratch", scratch_bytes, Self::scratch_bytes(&self.shape, width))?;
        let scratch = &mut scratch[..scratch_bytes];
        match &self.weights {
            Weights::Plain(codes) => self.definition(codes, input, row, added, out),
            Weights::Lanes { codes, start } => {
                let job = Row {
                    isa: self.isa,
                    shape: &self.shape,
                    requantize: &self.requantize,
                    codes,
                    start,
                    input,
                    row,
                    added,
                };
                job.dispatch(scratch, out);
            }
        }
        Ok(())
    }

    fn definition(&self, codes: &[i8], input: Input<'_>, row: usize, added: Option<&[i8]>, out: &mut [i8]) {
        let channels = self.shape.channels;
        for (i, out) in out.iter_mut().enumerate() {
            let (col, c) = (i / channels, i % channels);
            let window = self.shape.kernel.pow(2);
            let dot = scalar::dot(&codes[c * window..][..window], &self.shape, input, (row, col, c));
            *out = self.requantize.code(c, dot, added.map(|added| added[i]));
        }
    }
}

impl Shape {
    /// Groups of rows of a window.
    fn groups(&self) -> usize {
        self.kernel.div_ceil(GROUP)
    }

    /// Columns that `width` windows beside each other reach.
    fn columns(&self, width: usize) -> usize {
        if width == 0 { 0 } else { (width - 1) * self.stride + self.kernel }
    }
}

/// Whether the kernel of `isa` wants columns as codes + 128.
fn unsigned(isa: Isa) -> bool {
    match isa.kind() {
        #[cfg(target_arch = "x86_64")]
        Kind::Avx512 => avx512::Avx512::UNSIGNED,
        _ => false,
    }
}

fn pack_lanes(codes: &[i8], shape: &Shape, unsigned: bool) -> Weights {
    let Shape { channels, kernel, .. } = *shape;
    let blocks = channels.div_ceil(LANES);
    let mut packed = vec![0; blocks * kernel * shape.groups() * LANE_BYTES];
    let mut start = vec![[0; LANES]; blocks];
    for (c, window) in codes.chunks_exact(kernel.pow(2)).enumerate() {
        let (block, lane) = (c / LANES, c % LANES);
        for (i, &code) in window.iter().enumerate() {
            let (ky, kx) = (i / kernel, i % kernel);
            let group = (block * kernel + kx) * shape.groups() + ky / GROUP;
            packed[group * LANE_BYTES + lane * GROUP + ky % GROUP] = code;
            if unsigned {
                start[block][lane] -= 128 * i32::from(code);
            }
        }
    }
    Weights::Lanes { codes: packed.into(), start: start.into() }
}

/// One row of the output.
struct Row<'a> {
    isa: Isa,
    shape: &'a Shape,
    requantize: &'a Requantize,
    codes: &'a [i8],
    start: &'a [[i32; LANES]],
    input: Input<'a>,
    row: usize,
    added: Option<&'a [i8]>,
}

impl Row<'_> {
    fn dispatch(&self, scratch: &mut [u8], out: &mut [i8]) {
        match self.isa.kind() {
            Kind::Scalar => unreachable!("the definition has plain weights"),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: an `Isa` of this kind proves the features.
            Kind::Avx2 => unsafe { avx2::row(self, scratch, out) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Kind::Avx512 => unsafe { avx512::row(self, scratch, out) },
            #[cfg(target_arch = "aarch64")]
            // SAFETY: as above.
            Kind::Neon => unsafe { neon::row(self, scratch, out) },
            #[cfg(target_arch = "aarch64")]
            // SAFETY: as above.
            Kind::NeonDot => unsafe { neon::row_dot(self, scratch, out) },
        }
    }

    /// Inlined into an entry function per instruction set, so that gathering and requantising are compiled for it.
    #[inline(always)]
    fn run<K: Kernel>(&self, scratch: &mut [u8], out: &mut [i8]) {
        let Shape { channels, kernel, stride, .. } = *self.shape;
        let lanes = self.shape.groups();
        let block_len = kernel * lanes * LANE_BYTES;
        let mut sums = [[0; LANES]; PIXELS];
        for (block, (weights, start)) in self.codes.chunks_exact(block_len).zip(self.start).enumerate() {
            let first = block * LANES;
            self.gather::<K>(first, scratch);
            for (chunk, out) in out.chunks_mut(PIXELS * channels).enumerate() {
                let sums = &mut sums[..out.len() / channels];
                let columns = &scratch[chunk * PIXELS * stride * lanes * LANE_BYTES..];
                // SAFETY: the caller of the entry vouched for the instruction set.
                unsafe { K::dots(columns, stride * lanes, weights, start, sums) };
                let added = self.added.map(|added| &added[chunk * PIXELS * channels..][..out.len()]);
                self.requantize.write(self.isa, block, (sums, &[0; PIXELS]), added, out);
            }
        }
    }

    /// The columns of channels `first..first + LANES`.
    #[inline(always)]
    fn gather<K: Kernel>(&self, first: usize, columns: &mut [u8]) {
        let Shape { channels, kernel, stride, top, left } = *self.shape;
        let Input { codes, width, zero } = self.input;
        let lanes = self.shape.groups();
        let count = columns.len() / (lanes * LANE_BYTES);
        // Columns inside the input.
        let (begin, end) = (left.min(count), (left + width).min(count));
        let outside = zero.cast_unsigned() ^ if K::UNSIGNED { 0x80 } else { 0 };
        columns[..begin * lanes * LANE_BYTES].fill(outside);
        columns[end * lanes * LANE_BYTES..].fill(outside);
        if begin == end {
            return;
        }
        let (columns, _) = columns.as_chunks_mut::<LANE_BYTES>();
        let row_len = width * channels;
        let height = codes.len() / row_len.max(1);
        let zeros = [zero; LANES];
        for group in 0..lanes {
            // Rows below the window have weights of zero: any line will do.
            let mut lines = [Line { codes: &zeros, step: 0 }; GROUP];
            for (i, line) in lines.iter_mut().enumerate().take(kernel - group * GROUP) {
                let y = self.row * stride + group * GROUP + i;
                if y >= top && y - top < height {
                    let start = (y - top) * row_len;
                    *line = Line { codes: &codes[start + first..start + row_len], step: channels };
                }
            }
            let columns = &mut columns[begin * lanes + group..end * lanes];
            // SAFETY: the caller of the entry vouched for the instruction set.
            unsafe { K::interleave(&lines, columns, lanes) };
        }
    }
}
