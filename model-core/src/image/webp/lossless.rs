//! VP8L streams up to the Huffman codes of their pixels: an image may be divided into squares with codes of their own,
//! and the decoder behind builds tables for as many as a file cares to number.
//! See <https://developers.google.com/speed/webp/docs/webp_lossless_bitstream_specification>.

use super::super::error::ImageError;
use super::super::source::Stopped;
use super::{TRUNCATED, broken};

/// What the tables of a stream may take. Encoders write some hundred sets of five codes at most; a table has 1 to 4 KiB.
pub(super) const TABLE_BYTES: u64 = 8 << 20;

/// Colours of a pixel and distances; the first may be a length too, or a colour from a cache.
const ALPHABETS: [usize; 5] = [256 + 24, 256, 256, 256, 40];
/// The order in which lengths of codes for lengths come.
const LENGTH_ORDER: [usize; 19] = [17, 18, 0, 1, 2, 3, 4, 5, 16, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];
/// Codes are indices of tables up to this length; what is longer goes on in a tree.
const TABLE_BITS: usize = 10;
const NODE_BYTES: u64 = 16;
/// Of five codes without their tables, while a list of them grows.
const SET_BYTES: u64 = 3 * 5 * 64;

/// Pixels across and down.
pub(super) fn size(bytes: &[u8]) -> Result<(u32, u32), ImageError> {
    let header = body(bytes).and_then(|_| bytes.get(1..).and_then(<[u8]>::first_chunk).ok_or(TRUNCATED))?;
    let bits = u32::from_le_bytes(*header);
    Ok((1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)))
}

/// What follows the header.
pub(super) fn body(bytes: &[u8]) -> Result<&[u8], ImageError> {
    match bytes {
        [0x2F, _, _, _, _, body @ ..] => Ok(body),
        [0x2F, ..] => Err(TRUNCATED),
        _ => Err(broken("its image is no VP8L image")),
    }
}

/// Walks transforms and codes of an image.
///
/// # Errors
/// When tables would take more than [`TABLE_BYTES`], or the stream ends or is broken before its pixels.
pub(super) fn check(body: &[u8], (width, height): (u32, u32), stopped: Stopped) -> Result<(), ImageError> {
    let mut stream = Stream { bits: Bits { bytes: body, at: 0 }, table_bytes: 0, stopped };
    let mut width = width as usize;
    let height = height as usize;
    let mut seen = [false; 4];
    while stream.bits.flag()? {
        let kind = stream.bits.take(2)?;
        if std::mem::replace(&mut seen[kind], true) {
            return Err(broken("a transform comes twice"));
        }
        match kind {
            // Prediction and correlation of colours, for squares.
            0 | 1 => {
                let side = 1 << (stream.bits.take(3)? + 2);
                stream.image(width.div_ceil(side), height.div_ceil(side))?;
            }
            2 => {}
            // A palette; of few colours, several fit a byte.
            _ => {
                let colors = stream.bits.take(8)? + 1;
                stream.image(colors, 1)?;
                width = width.div_ceil(match colors {
                    0..=2 => 8,
                    3..=4 => 4,
                    5..=16 => 2,
                    _ => 1,
                });
            }
        }
    }
    let cache_bits = stream.cache_bits()?;
    let mut sets = 1;
    if stream.bits.flag()? {
        let side = 1 << (stream.bits.take(3)? + 2);
        let numbers = stream.image(width.div_ceil(side), height.div_ceil(side))?;
        sets += numbers.iter().map(|pixel| usize::from(pixel[0]) << 8 | usize::from(pixel[1])).max().unwrap_or(0);
    }
    stream.table_bytes = 0;
    for _ in 0..sets {
        stream.codes(cache_bits)?;
    }
    Ok(())
}

/// Red, green, blue, alpha.
type Pixel = [u8; 4];

struct Stream<'a> {
    bits: Bits<'a>,
    /// What the tables of the image in progress take.
    table_bytes: u64,
    stopped: Stopped<'a>,
}

impl Stream<'_> {
    fn cache_bits(&mut self) -> Result<usize, ImageError> {
        let bits = if self.bits.flag()? { self.bits.take(4)? } else { return Ok(0) };
        if (1..=11).contains(&bits) { Ok(bits) } else { Err(broken("its cache of colours has a wrong size")) }
    }

    fn codes(&mut self, cache_bits: usize) -> Result<[Code; 5], ImageError> {
        let mut alphabets = ALPHABETS;
        alphabets[0] += if cache_bits > 0 { 1 << cache_bits } else { 0 };
        let mut codes = [const { Code { counts: [0; 16], symbols: Vec::new() } }; 5];
        self.table_bytes += SET_BYTES;
        for (code, alphabet) in codes.iter_mut().zip(alphabets) {
            *code = self.code(alphabet)?;
            self.table_bytes += code.table_bytes();
            if self.table_bytes > TABLE_BYTES {
                return Err(broken("its Huffman codes take too much memory"));
            }
        }
        Ok(codes)
    }

    fn code(&mut self, alphabet: usize) -> Result<Code, ImageError> {
        if self.bits.flag()? {
            // One or two symbols.
            let two = self.bits.flag()?;
            let width = if self.bits.flag()? { 8 } else { 1 };
            let mut symbols = vec![self.bits.take(width)? as u16];
            if two {
                symbols.push(self.bits.take(8)? as u16);
            }
            let mut counts = [0; 16];
            counts[usize::from(two)] = symbols.len() as u16;
            return Ok(Code { counts, symbols });
        }
        let mut lengths = [0; 19];
        let count = self.bits.take(4)? + 4;
        for &symbol in &LENGTH_ORDER[..count] {
            lengths[symbol] = self.bits.take(3)? as u8;
        }
        let lengths = self.lengths(&Code::new(&lengths), alphabet)?;
        Ok(Code::new(&lengths))
    }

    /// The lengths of the codes of an alphabet, which are coded themselves.
    fn lengths(&mut self, code: &Code, alphabet: usize) -> Result<Vec<u8>, ImageError> {
        let mut left = if self.bits.flag()? {
            let width = 2 + 2 * self.bits.take(3)?;
            2 + self.bits.take(width)?
        } else {
            alphabet
        };
        let (mut lengths, mut last) = (Vec::with_capacity(alphabet), 8);
        while lengths.len() < alphabet && left > 0 {
            left -= 1;
            let (value, count) = match code.read(&mut self.bits)? {
                16 => (last, 3 + self.bits.take(2)?),
                17 => (0, 3 + self.bits.take(3)?),
                18 => (0, 11 + self.bits.take(7)?),
                length => (length as u8, 1),
            };
            if value != 0 {
                last = value;
            }
            if lengths.len() + count > alphabet {
                return Err(broken("a Huffman code has more symbols than its alphabet"));
            }
            lengths.resize(lengths.len() + count, value);
        }
        lengths.resize(alphabet, 0);
        Ok(lengths)
    }

    /// The pixels of a small image that describes the large one.
    fn image(&mut self, width: usize, height: usize) -> Result<Vec<Pixel>, ImageError> {
        self.table_bytes = 0;
        let cache_bits = self.cache_bits()?;
        let mut cache = vec![[0; 4]; 1 << cache_bits];
        let [green, red, blue, alpha, distance] = self.codes(cache_bits)?;
        let all = width * height;
        let mut pixels: Vec<Pixel> = Vec::with_capacity(all);
        let mut cached = 0;
        while pixels.len() < all {
            if pixels.len() >> 16 != cached >> 16 && (self.stopped)() {
                return Err(ImageError::Stopped);
            }
            let symbol = green.read(&mut self.bits)?;
            match symbol {
                0..256 => {
                    let [red, blue, alpha] =
                        [red.read(&mut self.bits)?, blue.read(&mut self.bits)?, alpha.read(&mut self.bits)?];
                    pixels.push([red as u8, symbol as u8, blue as u8, alpha as u8]);
                }
                256..280 => {
                    let length = self.bits.long(symbol - 256)?;
                    let code = distance.read(&mut self.bits)?;
                    let back = to_distance(self.bits.long(code)?, width);
                    if back > pixels.len() || length > all - pixels.len() {
                        return Err(broken("it refers to pixels that are not there"));
                    }
                    for _ in 0..length {
                        pixels.push(pixels[pixels.len() - back]);
                    }
                }
                _ => pixels.push(*cache.get(symbol - 280).ok_or(broken("it refers to a colour that is not there"))?),
            }
            if cache_bits > 0 {
                for pixel in &pixels[cached..] {
                    let [r, g, b, a] = *pixel;
                    let hash = 0x1E35_A7BD_u32.wrapping_mul(u32::from_be_bytes([a, r, g, b])) >> (32 - cache_bits);
                    cache[hash as usize] = *pixel;
                }
            }
            cached = pixels.len();
        }
        Ok(pixels)
    }
}

/// Distances up to 120 name near pixels, of rows above too.
fn to_distance(code: usize, width: usize) -> usize {
    #[rustfmt::skip]
    const NEAR: [(i8, i8); 120] = [
        (0, 1),  (1, 0),  (1, 1),  (-1, 1), (0, 2),  (2, 0),  (1, 2),  (-1, 2),
        (2, 1),  (-2, 1), (2, 2),  (-2, 2), (0, 3),  (3, 0),  (1, 3),  (-1, 3),
        (3, 1),  (-3, 1), (2, 3),  (-2, 3), (3, 2),  (-3, 2), (0, 4),  (4, 0),
        (1, 4),  (-1, 4), (4, 1),  (-4, 1), (3, 3),  (-3, 3), (2, 4),  (-2, 4),
        (4, 2),  (-4, 2), (0, 5),  (3, 4),  (-3, 4), (4, 3),  (-4, 3), (5, 0),
        (1, 5),  (-1, 5), (5, 1),  (-5, 1), (2, 5),  (-2, 5), (5, 2),  (-5, 2),
        (4, 4),  (-4, 4), (3, 5),  (-3, 5), (5, 3),  (-5, 3), (0, 6),  (6, 0),
        (1, 6),  (-1, 6), (6, 1),  (-6, 1), (2, 6),  (-2, 6), (6, 2),  (-6, 2),
        (4, 5),  (-4, 5), (5, 4),  (-5, 4), (3, 6),  (-3, 6), (6, 3),  (-6, 3),
        (0, 7),  (7, 0),  (1, 7),  (-1, 7), (5, 5),  (-5, 5), (7, 1),  (-7, 1),
        (4, 6),  (-4, 6), (6, 4),  (-6, 4), (2, 7),  (-2, 7), (7, 2),  (-7, 2),
        (3, 7),  (-3, 7), (7, 3),  (-7, 3), (5, 6),  (-5, 6), (6, 5),  (-6, 5),
        (8, 0),  (4, 7),  (-4, 7), (7, 4),  (-7, 4), (8, 1),  (8, 2),  (6, 6),
        (-6, 6), (8, 3),  (5, 7),  (-5, 7), (7, 5),  (-7, 5), (8, 4),  (6, 7),
        (-6, 7), (7, 6),  (-7, 6), (8, 5),  (7, 7),  (-7, 7), (8, 6),  (8, 7)
    ];
    match NEAR.get(code - 1) {
        Some(&(x, y)) => (isize::from(x) + isize::from(y) * width as isize).max(1) as usize,
        None => code - NEAR.len(),
    }
}

/// A canonical Huffman code.
struct Code {
    /// Symbols of each length; a single symbol has none.
    counts: [u16; 16],
    /// By length, then value.
    symbols: Vec<u16>,
}

impl Code {
    fn new(lengths: &[u8]) -> Self {
        let mut symbols: Vec<u16> = (0..).zip(lengths).filter(|(_, length)| **length > 0).map(|(s, _)| s).collect();
        symbols.sort_by_key(|&symbol| lengths[usize::from(symbol)]);
        let mut counts = [0; 16];
        if symbols.len() == 1 {
            counts[0] = 1;
        } else {
            symbols.iter().for_each(|&symbol| counts[usize::from(lengths[usize::from(symbol)])] += 1);
        }
        Self { counts, symbols }
    }

    /// What the decoder builds for it.
    fn table_bytes(&self) -> u64 {
        let longest = self.counts.iter().rposition(|&count| count > 0).unwrap_or(0);
        let beyond = self.counts[TABLE_BITS + 1..].iter().map(|&count| u64::from(count)).sum::<u64>();
        // Entries of four bytes, and two nodes for each symbol beyond; a list that grows is copied.
        (4 << longest.min(TABLE_BITS)) + 3 * 2 * beyond * NODE_BYTES
    }

    fn read(&self, bits: &mut Bits) -> Result<usize, ImageError> {
        let (mut code, mut first, mut index) = (0, 0, 0);
        for (length, &count) in self.counts.iter().enumerate() {
            let count = usize::from(count);
            if length > 0 {
                code = code << 1 | bits.take(1)?;
                first <<= 1;
            }
            if code < first + count {
                return Ok(self.symbols[index + code - first].into());
            }
            (index, first) = (index + count, first + count);
        }
        Err(broken("it holds a code that its tables have not"))
    }
}

/// Bits, the lowest of a byte first.
struct Bits<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Bits<'_> {
    fn flag(&mut self) -> Result<bool, ImageError> {
        Ok(self.take(1)? == 1)
    }

    /// At most 24 bits.
    fn take(&mut self, count: usize) -> Result<usize, ImageError> {
        if self.at + count > 8 * self.bytes.len() {
            return Err(TRUNCATED);
        }
        let mut window = [0; 4];
        let bytes = &self.bytes[self.at / 8..];
        let available = bytes.len().min(4);
        window[..available].copy_from_slice(&bytes[..available]);
        let value = u32::from_le_bytes(window) >> (self.at % 8) & ((1 << count) - 1);
        self.at += count;
        Ok(value as usize)
    }

    /// A length or distance: a prefix says its order of magnitude.
    fn long(&mut self, prefix: usize) -> Result<usize, ImageError> {
        if prefix < 4 {
            return Ok(prefix + 1);
        }
        let extra = (prefix - 2) >> 1;
        Ok(((2 + (prefix & 1)) << extra) + self.take(extra)? + 1)
    }
}
