//! Angle codes as they rest in memory, and their decoding to sines and cosines.

use std::sync::LazyLock;

use super::{LaneOrder, SeededAngles};
use crate::kernels::KernelError;
use crate::kernels::error::expect_len;
use crate::kernels::isa::Isa;
use crate::kernels::simd::{MAX_LANES, Simd, Turn, Work, dispatch};

/// The angle codes of one rotation site, all experts.
#[derive(Debug, Clone)]
pub struct PackedAngles {
    order: LaneOrder,
    stages: usize,
    codes: Codes,
}

#[derive(Debug, Clone)]
enum Codes {
    /// Bit-packed (least significant bit first), in lane order.
    Stored {
        bits: u32,
        /// Each expert starts at a byte of its own.
        expert_bytes: usize,
        bytes: Box<[u8]>,
    },
    /// Drawn whenever they are decoded.
    Seeded(SeededAngles),
}

impl PackedAngles {
    /// Packs `codes` `[experts, stages, features / 2]`, each below `2^bits`; code c stands for `c * 2 pi / 2^bits`.
    /// `bits` is 4, 6, 8 or 16.
    ///
    /// # Errors
    /// [`KernelError::Length`] when `codes` does not have that many elements or there are more
    /// stages than `order` allows.
    ///
    /// # Panics
    /// When `bits` is another number; configurations are validated before.
    pub fn pack(
        order: LaneOrder,
        codes: &[u16],
        experts: usize,
        stages: usize,
        bits: u32,
    ) -> Result<Self, KernelError> {
        assert!(matches!(bits, 4 | 6 | 8 | 16), "{bits} bits per angle code");
        let pairs = order.features() / 2;
        expect_len("angle codes", codes.len(), experts.saturating_mul(stages).saturating_mul(pairs))?;
        if stages > order.max_stages() {
            return Err(KernelError::Length { what: "stages", expected: order.max_stages(), got: stages });
        }
        let expert_bytes = (stages * pairs * bits as usize).div_ceil(8);
        // Asked for once for all experts: the answer takes several divisions.
        let position = |stage| move |pair| stage * pairs + order.angle_position(stage, pair);
        let positions: Vec<usize> = (0..stages).flat_map(|stage| (0..pairs).map(position(stage))).collect();
        let mut bytes = vec![0; experts * expert_bytes];
        for (expert, bytes) in bytes.chunks_exact_mut(expert_bytes.max(1)).enumerate() {
            let codes = &codes[expert * stages * pairs..][..stages * pairs];
            for (&position, &code) in positions.iter().zip(codes) {
                let bit = position * bits as usize;
                // A code straddles two bytes at most: 16 bits start at a byte, and fewer fit in two.
                let word = (u32::from(code) & ((1 << bits) - 1)) << (bit % 8);
                bytes[bit / 8] |= word as u8;
                if word > 0xff {
                    bytes[bit / 8 + 1] |= (word >> 8) as u8;
                }
            }
        }
        Ok(Self { order, stages, codes: Codes::Stored { bits, expert_bytes, bytes: bytes.into() } })
    }

    /// Codes that take no memory: `angles` draws them whenever they are decoded.
    ///
    /// # Errors
    /// [`KernelError::Length`] when there are more stages than `order` allows.
    pub fn seeded(order: LaneOrder, angles: SeededAngles, stages: usize) -> Result<Self, KernelError> {
        if stages > order.max_stages() {
            return Err(KernelError::Length { what: "stages", expected: order.max_stages(), got: stages });
        }
        Ok(Self { order, stages, codes: Codes::Seeded(angles) })
    }

    /// Stages of the rotation; 0 for the identity.
    pub fn stages(&self) -> usize {
        self.stages
    }

    pub(super) fn order(&self) -> LaneOrder {
        self.order
    }

    /// The codes of one expert, in lane order, where they have eight bits.
    pub(super) fn bytes(&self, expert: usize) -> Option<&[u8]> {
        match &self.codes {
            Codes::Stored { bits: 8, expert_bytes, bytes } => Some(&bytes[expert * expert_bytes..][..*expert_bytes]),
            _ => None,
        }
    }

    /// Bytes on the heap.
    pub fn resident_bytes(&self) -> usize {
        match &self.codes {
            Codes::Stored { bytes, .. } => bytes.len(),
            Codes::Seeded(_) => 0,
        }
    }

    /// Writes the sines and cosines of one expert's angles. Absolute error at most [`SINCOS_ERROR`].
    ///
    /// # Panics
    /// When there is no such expert, or `out` was made for fewer features or stages.
    pub fn decode(&self, isa: Isa, expert: usize, out: &mut Coefficients) {
        let count = self.stages * (self.order.features() / 2);
        let Coefficients { cos, sin, order, stages, drawn, ordered } = out;
        (*order, *stages) = (self.order, self.stages);
        let (cos, sin) = (&mut cos[..count], &mut sin[..count]);
        match &self.codes {
            Codes::Stored { bits, expert_bytes, bytes } => {
                let bytes = &bytes[expert * expert_bytes..][..*expert_bytes];
                dispatch(isa, Decode { bytes, bits: *bits, cos, sin });
            }
            Codes::Seeded(angles) => {
                let (order, stages) = (self.order, self.stages);
                dispatch(isa, DecodeSeeded { angles: *angles, expert, order, stages, drawn, ordered, cos, sin });
            }
        }
    }
}

/// The decoded angles of one expert at one site.
#[derive(Debug, Clone)]
pub struct Coefficients {
    pub(super) cos: Vec<f32>,
    pub(super) sin: Vec<f32>,
    pub(super) order: LaneOrder,
    pub(super) stages: usize,
    /// One stage's codes from a seed, as drawn and in lane order.
    drawn: Vec<u16>,
    ordered: Vec<u16>,
}

impl Coefficients {
    /// Room for any rotation of features in one of `orders`.
    pub fn new(orders: &[LaneOrder]) -> Self {
        let len = orders.iter().map(|order| order.max_stages() * order.features() / 2).max().unwrap_or(0);
        let pairs = orders.iter().map(|order| order.features() / 2).max().unwrap_or(0);
        Self {
            cos: vec![0.0; len],
            sin: vec![0.0; len],
            order: LaneOrder::new(0),
            stages: 0,
            drawn: vec![0; pairs],
            ordered: vec![0; pairs],
        }
    }

    /// Bytes on the heap.
    pub fn heap_bytes(&self) -> usize {
        (self.cos.capacity() + self.sin.capacity()) * size_of::<f32>()
            + (self.drawn.capacity() + self.ordered.capacity()) * size_of::<u16>()
    }
}

/// Largest absolute error of a decoded sine or cosine, against the exact one of the code's angle.
///
/// - 16 bits: 3.4e-9 for the polynomial, and its evaluation in f32: the last two of its roundings see values up to 1.6
///   and 1, so `(1.6 + 1) * 2^-24 = 1.6e-7`, and the ones before add less than a quarter of that.
/// - Fewer bits, from a table: 2^-25. From one table per digit (AVX-512), `cos(a + b) = cos a cos b - sin a sin b` and
///   its like for the sine: each of the four factors is off by 2^-25 and multiplied by another, which adds up to
///   `2 sqrt(2) * 2^-25` at most, and the two roundings are of values up to 1: `4.9 * 2^-25 = 1.5e-7`.
pub const SINCOS_ERROR: f32 = 2e-7;

/// `sin(pi/2 * v) = v * P(v^2)` on [-1, 1]: minimax in absolute error, 3.4e-9.
#[expect(
    clippy::approx_constant,
    clippy::excessive_precision,
    reason = "a minimax coefficient is near pi/2, not equal to it"
)]
const SIN: [f32; 5] = [1.570_796_3, -0.645_963_37, 0.079_688_48, -0.004_672_228, 0.000_150_820_55];

/// A quarter turn in units of a 16-bit code.
const QUARTER: f32 = 16384.0;

/// Made once, from f64.
pub(super) static TURN: LazyLock<Turn> = LazyLock::new(Turn::new);

struct Decode<'a> {
    bytes: &'a [u8],
    bits: u32,
    cos: &'a mut [f32],
    sin: &'a mut [f32],
}

impl Work for Decode<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { bytes, bits, cos, sin } = self;
        match bits {
            16 => sixteen_bits(simd, bytes, cos, sin),
            8 => eight_bits(simd, &TURN, bytes, cos, sin),
            _ => {
                // Narrower codes become the eight-bit codes of the same angles.
                let mut codes = [0; BUFFER];
                for (i, (cos, sin)) in cos.chunks_mut(BUFFER).zip(sin.chunks_mut(BUFFER)).enumerate() {
                    let codes = &mut codes[..cos.len()];
                    widen(&bytes[i * BUFFER * bits as usize / 8..], bits, codes);
                    eight_bits(simd, &TURN, codes, cos, sin);
                }
            }
        }
    }
}

struct DecodeSeeded<'a> {
    angles: SeededAngles,
    expert: usize,
    order: LaneOrder,
    stages: usize,
    drawn: &'a mut [u16],
    ordered: &'a mut [u16],
    cos: &'a mut [f32],
    sin: &'a mut [f32],
}

impl Work for DecodeSeeded<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { angles, expert, order, stages, drawn, ordered, cos, sin } = self;
        let pairs = order.features() / 2;
        let (drawn, ordered) = (&mut drawn[..pairs], &mut ordered[..pairs]);
        for stage in 0..stages {
            angles.draw(expert * stages + stage, drawn);
            order.permute_angles(stage, drawn, ordered);
            let (cos, sin) = (&mut cos[stage * pairs..][..pairs], &mut sin[stage * pairs..][..pairs]);
            for (i, (cos, sin)) in cos.chunks_mut(BUFFER).zip(sin.chunks_mut(BUFFER)).enumerate() {
                let wide = &ordered[i * BUFFER..][..cos.len()];
                if angles.bits() == 16 {
                    let mut turns = [0; BUFFER];
                    for (turn, code) in turns.iter_mut().zip(wide) {
                        *turn = code.cast_signed();
                    }
                    sin_cos(simd, &turns[..cos.len()], cos, sin);
                } else {
                    let mut codes = [0; BUFFER];
                    for (code, wide) in codes.iter_mut().zip(wide) {
                        *code = (wide << (8 - angles.bits())) as u8;
                    }
                    eight_bits(simd, &TURN, &codes[..cos.len()], cos, sin);
                }
            }
        }
    }
}

/// Codes unpacked at a time; a multiple of 8, so that every chunk starts at a byte.
const BUFFER: usize = 256;

/// Unpacks codes of four or six bits and shifts them to eight.
#[inline(always)]
fn widen(bytes: &[u8], bits: u32, codes: &mut [u8]) {
    if bits == 4 {
        let (pairs, last) = codes.as_chunks_mut::<2>();
        for (pair, byte) in pairs.iter_mut().zip(bytes) {
            *pair = [byte << 4, byte & 0xf0];
        }
        if let [last] = last {
            *last = bytes[pairs.len()] << 4;
        }
        return;
    }
    for (i, code) in codes.iter_mut().enumerate() {
        let bit = i * bits as usize;
        let high = bytes.get(bit / 8 + 1).copied().unwrap_or(0);
        let word = u16::from_le_bytes([bytes[bit / 8], high]) >> (bit % 8);
        *code = (word << (8 - bits)) as u8;
    }
}

#[inline(always)]
fn eight_bits<S: Simd>(simd: S, turn: &Turn, codes: &[u8], cos: &mut [f32], sin: &mut [f32]) {
    assert!(cos.len() == codes.len() && sin.len() == codes.len());
    let mut i = 0;
    while i + S::LANES <= codes.len() {
        let (c, s) = simd.cos_sin(turn, &codes[i..]);
        simd.store(&mut cos[i..], c);
        simd.store(&mut sin[i..], s);
        i += S::LANES;
    }
    let tail = codes.len() - i;
    if tail > 0 {
        let mut lanes = [0; MAX_LANES];
        lanes[..tail].copy_from_slice(&codes[i..]);
        let (c, s) = simd.cos_sin(turn, &lanes);
        cos[i..].copy_from_slice(&simd.to_array(c, 0.0)[..tail]);
        sin[i..].copy_from_slice(&simd.to_array(s, 0.0)[..tail]);
    }
}

/// As signed fractions of a turn: an unsigned code wraps to the same angle.
#[inline(always)]
fn sixteen_bits<S: Simd>(simd: S, bytes: &[u8], cos: &mut [f32], sin: &mut [f32]) {
    let mut turns = [0i16; BUFFER];
    let chunks = cos.chunks_mut(BUFFER).zip(sin.chunks_mut(BUFFER)).zip(bytes.chunks(2 * BUFFER));
    for ((cos, sin), bytes) in chunks {
        let turns = &mut turns[..cos.len()];
        for (turn, &code) in turns.iter_mut().zip(bytes.as_chunks::<2>().0) {
            *turn = i16::from_le_bytes(code);
        }
        sin_cos(simd, turns, cos, sin);
    }
}

#[inline(always)]
fn sin_cos<S: Simd>(simd: S, turns: &[i16], cos: &mut [f32], sin: &mut [f32]) {
    let mut i = 0;
    while i < turns.len() {
        if i + S::LANES <= turns.len() {
            let (c, s) = sin_cos_vector(simd, simd.load_i16(&turns[i..]));
            simd.store(&mut cos[i..], c);
            simd.store(&mut sin[i..], s);
        } else {
            let mut lanes = [0; MAX_LANES];
            let tail = turns.len() - i;
            lanes[..tail].copy_from_slice(&turns[i..]);
            let (c, s) = sin_cos_vector(simd, simd.load_i16(&lanes));
            cos[i..].copy_from_slice(&simd.to_array(c, 0.0)[..tail]);
            sin[i..].copy_from_slice(&simd.to_array(s, 0.0)[..tail]);
        }
        i += S::LANES;
    }
}

/// Cosine and sine of `code` in -32768..32768, 65536 to the turn. All but the polynomial is exact.
#[inline(always)]
fn sin_cos_vector<S: Simd>(simd: S, code: S::V) -> (S::V, S::V) {
    // cos(c) = sin(quarter - |c|), which is within a quarter turn of zero.
    let cos = quarter_sin(simd, simd.sub(simd.splat(QUARTER), simd.abs(code)));
    // Folds what lies beyond a quarter turn back: sin(c) = sin(half - c) = sin(-half - c).
    let folded = simd.min(code, simd.sub(simd.splat(2.0 * QUARTER), code));
    let folded = simd.max(folded, simd.sub(simd.splat(-2.0 * QUARTER), code));
    (cos, quarter_sin(simd, folded))
}

/// Sine of `w` in -[`QUARTER`]..=[`QUARTER`].
#[inline(always)]
fn quarter_sin<S: Simd>(simd: S, w: S::V) -> S::V {
    let v = simd.mul(w, simd.splat(1.0 / QUARTER));
    let u = simd.mul(v, v);
    let mut p = simd.splat(SIN[4]);
    for &coefficient in SIN[..4].iter().rev() {
        p = simd.mul_add(p, u, simd.splat(coefficient));
    }
    simd.mul(p, v)
}
