//! Entropy-coded data to samples (sequential) or coefficients (progressive): T.81, annexes F and G.

use super::super::error::ImageError;
use super::broken;
use super::frame::{Component, Frame};
use super::huffman::{Bits, Table};
use super::idct;

/// Row and column of each coefficient in the order in which files hold them.
#[rustfmt::skip]
const ZIGZAG: [u8; 64] = [
     0,  1,  8, 16,  9,  2,  3, 10, 17, 24, 32, 25, 18, 11,  4,  5,
    12, 19, 26, 33, 40, 48, 41, 34, 27, 20, 13,  6,  7, 14, 21, 28,
    35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51,
    58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63,
];

/// Tables that segments define; each definition holds for the scans that follow.
pub(super) struct Tables {
    dc: [Option<Table>; 4],
    ac: [Option<Table>; 4],
    quantization: [Option<[u16; 64]>; 4],
    /// Units between restart markers; 0 for none.
    restart_interval: usize,
}

impl Tables {
    /// No tables; of a sequential frame the typical ones of T.81, K.3.3, which frames of Motion JPEG leave out.
    pub(super) fn new(frame: &Frame) -> Self {
        let mut tables = Self {
            dc: [None, None, None, None],
            ac: [None, None, None, None],
            quantization: [None; 4],
            restart_interval: 0,
        };
        if !frame.progressive {
            tables.define_huffman(&TYPICAL).expect("the tables of the standard are valid");
        }
        tables
    }

    pub(super) fn define_huffman(&mut self, mut payload: &[u8]) -> Result<(), ImageError> {
        while let Some((&kind, rest)) = payload.split_first() {
            let short = || broken("a Huffman table is too short");
            let Some((counts, rest)) = rest.split_first_chunk::<16>() else { return Err(short()) };
            let total = counts.iter().map(|&count| usize::from(count)).sum();
            let Some((symbols, rest)) = rest.split_at_checked(total) else { return Err(short()) };
            let tables = if kind >> 4 == 0 { &mut self.dc } else { &mut self.ac };
            let slot = tables.get_mut(usize::from(kind & 15)).filter(|_| kind >> 4 < 2);
            *slot.ok_or_else(|| broken("a Huffman table has a wrong number"))? = Some(Table::new(counts, symbols)?);
            payload = rest;
        }
        Ok(())
    }

    pub(super) fn define_quantization(&mut self, mut payload: &[u8]) -> Result<(), ImageError> {
        while let Some((&kind, rest)) = payload.split_first() {
            let wide = kind >> 4 != 0;
            let short = || broken("a quantisation table is too short");
            let Some((values, rest)) = rest.split_at_checked(if wide { 128 } else { 64 }) else { return Err(short()) };
            let mut table = [0; 64];
            for (i, &place) in ZIGZAG.iter().enumerate() {
                table[usize::from(place)] =
                    if wide { u16::from_be_bytes([values[2 * i], values[2 * i + 1]]) } else { values[i].into() };
            }
            let slot = self.quantization.get_mut(usize::from(kind & 15));
            *slot.ok_or_else(|| broken("a quantisation table has a wrong number"))? = Some(table);
            payload = rest;
        }
        Ok(())
    }

    pub(super) fn define_restart(&mut self, payload: &[u8]) -> Result<(), ImageError> {
        let interval = payload.first_chunk().ok_or_else(|| broken("its restart interval is too short"))?;
        self.restart_interval = u16::from_be_bytes(*interval).into();
        Ok(())
    }
}

pub(super) struct Scan {
    parts: Vec<Part>,
    /// The first and last coefficient in zigzag order.
    start: usize,
    end: usize,
    /// The bit that was sent before of each coefficient, 0 for none, and the one that is sent now.
    high: u32,
    low: u32,
}

/// A component in a scan.
#[derive(Clone, Copy)]
struct Part {
    component: usize,
    dc: usize,
    ac: usize,
}

impl Scan {
    pub(super) fn parse(payload: &[u8], frame: &Frame) -> Result<Self, ImageError> {
        let broken = || broken("a scan header is broken");
        let (&count, rest) = payload.split_first().ok_or_else(broken)?;
        let (fields, rest) = rest.split_at_checked(2 * usize::from(count)).ok_or_else(broken)?;
        let &[start, end, bits, ..] = rest else { return Err(broken()) };
        let mut parts: Vec<Part> = Vec::new();
        for field in fields.chunks_exact(2) {
            let component = frame.components.iter().position(|c| c.id == field[0]).ok_or_else(broken)?;
            let (dc, ac) = (usize::from(field[1] >> 4), usize::from(field[1] & 15));
            if dc > 3 || ac > 3 || parts.iter().any(|part| part.component == component) {
                return Err(broken());
            }
            parts.push(Part { component, dc, ac });
        }
        let (start, end) = (usize::from(start), usize::from(end));
        // Sequential scans hold all coefficients in full, whatever these fields say.
        let scan = if frame.progressive {
            Self { parts, start, end, high: u32::from(bits >> 4), low: u32::from(bits & 15) }
        } else {
            Self { parts, start: 0, end: 63, high: 0, low: 0 }
        };
        let band = if scan.start == 0 { scan.end == 0 } else { scan.start <= scan.end && scan.parts.len() == 1 };
        let valid = !frame.progressive || band && scan.end < 64 && scan.low < 14;
        if scan.parts.is_empty() || !valid { Err(broken()) } else { Ok(scan) }
    }

    /// The codes of each of its components, which have to be there as far as the scan uses them.
    fn coders<'a>(&self, tables: &'a Tables) -> Result<Vec<Coder<'a>>, ImageError> {
        let (dc, ac) = (self.start == 0 && self.high == 0, self.end > 0);
        let coder = |part: &Part| {
            let coder = Coder { dc: tables.dc[part.dc].as_ref(), ac: tables.ac[part.ac].as_ref() };
            let complete = (!dc || coder.dc.is_some()) && (!ac || coder.ac.is_some());
            if complete { Ok(coder) } else { Err(no_code()) }
        };
        self.parts.iter().map(coder).collect()
    }
}

/// What the blocks of a component take.
pub(super) struct Layout {
    /// Samples of a block along a side.
    size: usize,
    /// Sampling factors: blocks of a unit of all components.
    h: usize,
    v: usize,
    /// Blocks that carry pixels.
    columns: usize,
    rows: usize,
    /// Blocks in a row and rows, filled up to whole units of all components.
    stride: usize,
    lines: usize,
    /// Coefficients that are kept of a block of a progressive file, as zigzag indices.
    kept: Vec<u8>,
}

impl Layout {
    fn blocks(&self) -> usize {
        self.stride * self.lines
    }

    /// Of the coefficients of a progressive file.
    pub(super) fn coefficient_bytes(&self) -> u64 {
        self.blocks() as u64 * (8 + 2 * self.kept.len() as u64)
    }

    pub(super) fn plane_bytes(&self) -> u64 {
        (self.blocks() * self.size * self.size) as u64
    }
}

/// The samples of a component at the chosen scale, and the factors by which it is still smaller than the largest.
pub(super) struct Plane {
    pub(super) samples: Vec<u8>,
    /// Samples of a row in memory.
    pub(super) stride: usize,
    /// Samples that carry pixels.
    pub(super) width: usize,
    pub(super) height: usize,
    pub(super) h_expand: usize,
    pub(super) v_expand: usize,
}

/// No place among 64.
const NOWHERE: u8 = u8::MAX;

/// A component on its way.
struct Plan {
    layout: Layout,
    plane: Plane,
    /// The table at its first scan.
    quantization: Option<[u16; 64]>,
    /// Of a progressive file, those that are kept of each block.
    coefficients: Vec<i16>,
    /// Of a progressive file, a bit for each coefficient of a block that is not zero, in zigzag order.
    nonzero: Vec<u64>,
    /// Where among the kept coefficients each is, in zigzag order; [`NOWHERE`] for the others.
    slots: [u8; 64],
    /// Of each coefficient, the lowest bit that was sent.
    sent: [Option<u32>; 64],
}

impl Plan {
    fn new(layout: Layout, component: &Component, frame: &Frame, reduction: u32) -> Self {
        let most = 8 / reduction as usize;
        let (h_expand, v_expand) =
            (frame.h_max * most / (component.h * layout.size), frame.v_max * most / (component.v * layout.size));
        let samples = |side: u32, factor: usize, max: usize| (side as usize * factor * layout.size).div_ceil(max * 8);
        let plane = Plane {
            samples: vec![0; layout.plane_bytes() as usize],
            stride: layout.stride * layout.size,
            width: samples(frame.width, component.h, frame.h_max),
            height: samples(frame.height, component.v, frame.v_max),
            h_expand,
            v_expand,
        };
        let (coefficients, nonzero) = if frame.progressive {
            (vec![0; layout.blocks() * layout.kept.len()], vec![0; layout.blocks()])
        } else {
            (Vec::new(), Vec::new())
        };
        let mut slots = [NOWHERE; 64];
        for (slot, &k) in (0u8..).zip(&layout.kept) {
            slots[usize::from(k)] = slot;
        }
        Self { layout, plane, quantization: None, coefficients, nonzero, slots, sent: [None; 64] }
    }

    /// The number of the block in this row and column.
    fn index(&self, (row, column): (usize, usize)) -> usize {
        row * self.layout.stride + column
    }

    /// Coefficient `k` of a block, if it is kept.
    fn coefficient(&mut self, block: usize, k: usize) -> Option<&mut i16> {
        let slot = usize::from(self.slots[k]);
        let kept = self.layout.kept.len();
        if slot < kept { self.coefficients.get_mut(block * kept + slot) } else { None }
    }

    fn transform(&mut self, (row, column): (usize, usize), coefficients: &[i16; 64]) {
        let (size, stride) = (self.layout.size, self.plane.stride);
        let quantization = self.quantization.as_ref().expect("a scan begins with its tables");
        let out = &mut self.plane.samples[row * size * stride + column * size..];
        idct::block(coefficients, quantization, size, out, stride);
    }
}

/// All components of a frame on their way.
pub(super) struct Blocks {
    plans: Vec<Plan>,
    progressive: bool,
}

impl Blocks {
    /// What each component takes at 1/`reduction` of the scale.
    pub(super) fn layout(frame: &Frame, reduction: u32) -> Vec<Layout> {
        let least = 8 / reduction as usize;
        let units = |side: u32, max: usize| (side as usize).div_ceil(8 * max);
        let (across, down) = (units(frame.width, frame.h_max), units(frame.height, frame.v_max));
        let layout = |component: &Component| {
            // A component that is sampled less is reduced less, where that makes both factors whole, as in libjpeg.
            let mut size = least;
            let divides = |max: usize, factor: usize, size: usize| (max * least).is_multiple_of(factor * size);
            while size < 8 && divides(frame.h_max, component.h, 2 * size) && divides(frame.v_max, component.v, 2 * size)
            {
                size *= 2;
            }
            let blocks = |side: u32, factor: usize, max: usize| (side as usize * factor).div_ceil(8 * max);
            let needed = |&zigzag: &u8| {
                let place = usize::from(ZIGZAG[usize::from(zigzag)]);
                idct::needs(size, (place / 8, place % 8))
            };
            Layout {
                size,
                h: component.h,
                v: component.v,
                columns: blocks(frame.width, component.h, frame.h_max),
                rows: blocks(frame.height, component.v, frame.v_max),
                stride: across * component.h,
                lines: down * component.v,
                kept: (0..64).filter(needed).collect(),
            }
        };
        frame.components.iter().map(layout).collect()
    }

    pub(super) fn new(frame: &Frame, reduction: u32) -> Self {
        let layouts = Self::layout(frame, reduction).into_iter().zip(&frame.components);
        let plans = layouts.map(|(layout, component)| Plan::new(layout, component, frame, reduction)).collect();
        Self { plans, progressive: frame.progressive }
    }

    /// Every bit of every coefficient is there.
    pub(super) fn is_final(&self) -> bool {
        self.plans.iter().all(|plan| plan.sent.iter().all(|&low| low == Some(0)))
    }

    /// There is a mean of every block, which is what an encoder has to send at least.
    pub(super) fn is_begun(&self) -> bool {
        self.plans.iter().all(|plan| plan.sent[0].is_some())
    }

    /// Checks a scan against those before, which bounds their number: each sends something new.
    pub(super) fn begin(&mut self, scan: &Scan, frame: &Frame, tables: &Tables) -> Result<(), ImageError> {
        for part in &scan.parts {
            let plan = &mut self.plans[part.component];
            if scan.start > 0 && plan.sent[0].is_none() {
                return Err(broken("a scan of details comes before that of the means"));
            }
            for low in &mut plan.sent[scan.start..=scan.end] {
                let follows = match *low {
                    None => scan.high == 0,
                    Some(last) => scan.high == last && scan.low + 1 == last,
                };
                if !follows {
                    return Err(broken("its scans are not in order"));
                }
                *low = Some(scan.low);
            }
            if plan.quantization.is_none() {
                let table = tables.quantization[frame.components[part.component].quantization];
                plan.quantization = Some(table.ok_or_else(|| broken("a quantisation table is not there"))?);
            }
        }
        Ok(())
    }

    /// Reads the entropy-coded data at the start of `bytes`, and returns where it ends.
    pub(super) fn read(
        &mut self,
        scan: &Scan,
        tables: &Tables,
        bytes: &[u8],
        stopped: &dyn Fn() -> bool,
    ) -> Result<usize, ImageError> {
        let decode = match (self.progressive, scan.start, scan.high) {
            (false, ..) => Reader::sequential,
            (true, 0, 0) => Reader::dc_first,
            (true, 0, _) => Reader::dc_refine,
            (true, _, 0) => Reader::ac_first,
            (true, ..) => Reader::ac_refine,
        };
        let coders = scan.coders(tables)?;
        let mut reader = Reader { bits: Bits::new(bytes), scan, dc: [0; 3], zero_blocks: 0 };
        // A scan of one component has its blocks as units, and those that only fill up units are left out.
        let single = scan.parts.len() == 1;
        let first = &self.plans[scan.parts[0].component].layout;
        let (across, down) =
            if single { (first.columns, first.rows) } else { (first.stride / first.h, first.lines / first.v) };
        let (mut until_restart, mut restarts) = (tables.restart_interval, 0);
        for unit in 0..across * down {
            let (row, column) = (unit / across, unit % across);
            if column == 0 && stopped() {
                return Err(ImageError::Stopped);
            }
            let missing = || ImageError::MissingBlocks { done: unit, all: across * down };
            if tables.restart_interval > 0 {
                if until_restart == 0 {
                    if !reader.bits.restart(restarts % 8) {
                        return Err(missing());
                    }
                    (restarts, until_restart) = (restarts + 1, tables.restart_interval);
                    (reader.dc, reader.zero_blocks) = ([0; 3], 0);
                }
                until_restart -= 1;
            }
            for (part, coder) in scan.parts.iter().zip(&coders) {
                let plan = &mut self.plans[part.component];
                let (h, v) = if single { (1, 1) } else { (plan.layout.h, plan.layout.v) };
                for block in 0..h * v {
                    let at = (row * v + block / h, column * h + block % h);
                    let decoded = decode(&mut reader, *coder, plan, part.component, at);
                    // Past the end nothing but zeros is read, which may be no code.
                    if reader.bits.overrun() {
                        return Err(missing());
                    }
                    decoded?;
                }
            }
        }
        Ok(reader.bits.end())
    }

    /// The samples of all components.
    pub(super) fn into_planes(self, stopped: &dyn Fn() -> bool) -> Result<Vec<Plane>, ImageError> {
        let progressive = self.progressive;
        let finish = |mut plan: Plan| {
            for row in 0..if progressive { plan.layout.lines } else { 0 } {
                if stopped() {
                    return Err(ImageError::Stopped);
                }
                for column in 0..plan.layout.stride {
                    let kept = &plan.layout.kept;
                    let mut block = [0; 64];
                    let start = (row * plan.layout.stride + column) * kept.len();
                    for (&zigzag, &coefficient) in kept.iter().zip(&plan.coefficients[start..]) {
                        block[usize::from(ZIGZAG[usize::from(zigzag)])] = coefficient;
                    }
                    plan.transform((row, column), &block);
                }
            }
            Ok(plan.plane)
        };
        self.plans.into_iter().map(finish).collect()
    }
}

/// The codes of a component in a scan.
#[derive(Clone, Copy)]
struct Coder<'a> {
    dc: Option<&'a Table>,
    ac: Option<&'a Table>,
}

/// Where a scan has got to.
struct Reader<'a> {
    bits: Bits<'a>,
    scan: &'a Scan,
    /// The last mean of each component; a restart resets it.
    dc: [i32; 3],
    /// Blocks to come of which nothing new is sent; a restart resets it.
    zero_blocks: u32,
}

fn no_code() -> ImageError {
    broken("a scan uses a Huffman table that is not there")
}

fn too_long() -> ImageError {
    broken("a block has more coefficients than its scan")
}

impl Reader<'_> {
    /// The mean of a block, which is coded as a difference to the last.
    fn mean(&mut self, coder: Coder, component: usize) -> Result<i32, ImageError> {
        let count = self.bits.symbol(coder.dc.ok_or_else(no_code)?)?;
        if count > 11 {
            return Err(broken("a mean is out of range"));
        }
        self.dc[component] = self.dc[component].wrapping_add(self.bits.signed(count.into()));
        Ok(self.dc[component])
    }

    /// All coefficients of a block of a sequential file, and its samples (F.2.2).
    fn sequential(
        &mut self,
        coder: Coder,
        plan: &mut Plan,
        component: usize,
        at: (usize, usize),
    ) -> Result<(), ImageError> {
        let mut block = [0; 64];
        block[0] = self.mean(coder, component)? as i16;
        let ac = coder.ac.ok_or_else(no_code)?;
        let only_mean = plan.layout.size == 1;
        let mut k = 1;
        while k < 64 {
            let symbol = self.bits.symbol(ac)?;
            let (zeros, count) = (usize::from(symbol >> 4), u32::from(symbol & 15));
            if count == 0 {
                if zeros < 15 {
                    break;
                }
                k += 16;
                continue;
            }
            k += zeros;
            let place = *ZIGZAG.get(k).ok_or_else(too_long)?;
            if only_mean {
                self.bits.take(count);
            } else {
                block[usize::from(place)] = self.bits.signed(count) as i16;
            }
            k += 1;
        }
        plan.transform(at, &block);
        Ok(())
    }

    /// The upper bits of a mean (G.1.2.1).
    fn dc_first(
        &mut self,
        coder: Coder,
        plan: &mut Plan,
        component: usize,
        at: (usize, usize),
    ) -> Result<(), ImageError> {
        let mean = self.mean(coder, component)? << self.scan.low;
        *plan.coefficient(plan.index(at), 0).expect("the mean is always kept") = mean as i16;
        Ok(())
    }

    /// The next bit of a mean.
    fn dc_refine(&mut self, _: Coder, plan: &mut Plan, _: usize, at: (usize, usize)) -> Result<(), ImageError> {
        if self.bits.bit() {
            *plan.coefficient(plan.index(at), 0).expect("the mean is always kept") |= 1 << self.scan.low;
        }
        Ok(())
    }

    /// The upper bits of a band of coefficients (G.1.2.2).
    fn ac_first(&mut self, coder: Coder, plan: &mut Plan, _: usize, at: (usize, usize)) -> Result<(), ImageError> {
        if self.zero_blocks > 0 {
            self.zero_blocks -= 1;
            return Ok(());
        }
        let (ac, block) = (coder.ac.ok_or_else(no_code)?, plan.index(at));
        let mut k = self.scan.start;
        while k <= self.scan.end {
            let symbol = self.bits.symbol(ac)?;
            let (zeros, count) = (usize::from(symbol >> 4), u32::from(symbol & 15));
            if count == 0 {
                if zeros < 15 {
                    self.zero_blocks = (1 << zeros) - 1 + self.bits.take(zeros as u32);
                    break;
                }
                k += 16;
                continue;
            }
            k += zeros;
            if k > self.scan.end {
                return Err(too_long());
            }
            let value = self.bits.signed(count) << self.scan.low;
            plan.nonzero[block] |= 1 << k;
            if let Some(kept) = plan.coefficient(block, k) {
                *kept = value as i16;
            }
            k += 1;
        }
        Ok(())
    }

    /// The next bit of a band of coefficients: of each that is not zero, and of those that become so (G.1.2.3).
    fn ac_refine(&mut self, coder: Coder, plan: &mut Plan, _: usize, at: (usize, usize)) -> Result<(), ImageError> {
        let (ac, block) = (coder.ac.ok_or_else(no_code)?, plan.index(at));
        let (end, bit) = (self.scan.end, 1i16 << self.scan.low);
        let mut k = self.scan.start;
        while self.zero_blocks == 0 && k <= end {
            let symbol = self.bits.symbol(ac)?;
            let (mut zeros, count) = (symbol >> 4, symbol & 15);
            let value = match count {
                0 if zeros < 15 => {
                    // This block is the first of them.
                    self.zero_blocks = (1 << zeros) + self.bits.take(zeros.into());
                    break;
                }
                0 => 0,
                1 if self.bits.bit() => bit,
                1 => -bit,
                _ => return Err(broken("a coefficient gets more than one bit at once")),
            };
            while k <= end {
                if plan.nonzero[block] >> k & 1 == 1 {
                    self.refine(plan, block, k, bit);
                } else if zeros == 0 {
                    break;
                } else {
                    zeros -= 1;
                }
                k += 1;
            }
            if value != 0 {
                if k > end {
                    return Err(too_long());
                }
                plan.nonzero[block] |= 1 << k;
                if let Some(kept) = plan.coefficient(block, k) {
                    *kept = value;
                }
            }
            k += 1;
        }
        if self.zero_blocks > 0 {
            self.zero_blocks -= 1;
            // The coefficients left in the band that are not zero.
            let mut left = if k <= end { plan.nonzero[block] & (u64::MAX >> (63 - end)) & (u64::MAX << k) } else { 0 };
            while left != 0 {
                self.refine(plan, block, left.trailing_zeros() as usize, bit);
                left &= left - 1;
            }
        }
        Ok(())
    }

    /// The next bit of a coefficient that is not zero, away from zero.
    fn refine(&mut self, plan: &mut Plan, block: usize, k: usize, bit: i16) {
        if self.bits.bit()
            && let Some(kept) = plan.coefficient(block, k)
        {
            *kept = kept.wrapping_add(if *kept < 0 { -bit } else { bit });
        }
    }
}

/// The typical tables of T.81, K.3.3, as the payload of a segment.
#[rustfmt::skip]
const TYPICAL: [u8; 416] = [
    // Luminance, means.
    0x00, 0, 1, 5, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11,
    // Chrominance, means.
    0x01, 0, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11,
    // Luminance, details.
    0x10, 0, 2, 1, 3, 3, 2, 4, 3, 5, 5, 4, 4, 0, 0, 1, 125,
    0x01, 0x02, 0x03, 0x00, 0x04, 0x11, 0x05, 0x12, 0x21, 0x31, 0x41, 0x06, 0x13, 0x51, 0x61, 0x07, 0x22, 0x71,
    0x14, 0x32, 0x81, 0x91, 0xA1, 0x08, 0x23, 0x42, 0xB1, 0xC1, 0x15, 0x52, 0xD1, 0xF0, 0x24, 0x33, 0x62, 0x72,
    0x82, 0x09, 0x0A, 0x16, 0x17, 0x18, 0x19, 0x1A, 0x25, 0x26, 0x27, 0x28, 0x29, 0x2A, 0x34, 0x35, 0x36, 0x37,
    0x38, 0x39, 0x3A, 0x43, 0x44, 0x45, 0x46, 0x47, 0x48, 0x49, 0x4A, 0x53, 0x54, 0x55, 0x56, 0x57, 0x58, 0x59,
    0x5A, 0x63, 0x64, 0x65, 0x66, 0x67, 0x68, 0x69, 0x6A, 0x73, 0x74, 0x75, 0x76, 0x77, 0x78, 0x79, 0x7A, 0x83,
    0x84, 0x85, 0x86, 0x87, 0x88, 0x89, 0x8A, 0x92, 0x93, 0x94, 0x95, 0x96, 0x97, 0x98, 0x99, 0x9A, 0xA2, 0xA3,
    0xA4, 0xA5, 0xA6, 0xA7, 0xA8, 0xA9, 0xAA, 0xB2, 0xB3, 0xB4, 0xB5, 0xB6, 0xB7, 0xB8, 0xB9, 0xBA, 0xC2, 0xC3,
    0xC4, 0xC5, 0xC6, 0xC7, 0xC8, 0xC9, 0xCA, 0xD2, 0xD3, 0xD4, 0xD5, 0xD6, 0xD7, 0xD8, 0xD9, 0xDA, 0xE1, 0xE2,
    0xE3, 0xE4, 0xE5, 0xE6, 0xE7, 0xE8, 0xE9, 0xEA, 0xF1, 0xF2, 0xF3, 0xF4, 0xF5, 0xF6, 0xF7, 0xF8, 0xF9, 0xFA,
    // Chrominance, details.
    0x11, 0, 2, 1, 2, 4, 4, 3, 4, 7, 5, 4, 4, 0, 1, 2, 119,
    0x00, 0x01, 0x02, 0x03, 0x11, 0x04, 0x05, 0x21, 0x31, 0x06, 0x12, 0x41, 0x51, 0x07, 0x61, 0x71, 0x13, 0x22,
    0x32, 0x81, 0x08, 0x14, 0x42, 0x91, 0xA1, 0xB1, 0xC1, 0x09, 0x23, 0x33, 0x52, 0xF0, 0x15, 0x62, 0x72, 0xD1,
    0x0A, 0x16, 0x24, 0x34, 0xE1, 0x25, 0xF1, 0x17, 0x18, 0x19, 0x1A, 0x26, 0x27, 0x28, 0x29, 0x2A, 0x35, 0x36,
    0x37, 0x38, 0x39, 0x3A, 0x43, 0x44, 0x45, 0x46, 0x47, 0x48, 0x49, 0x4A, 0x53, 0x54, 0x55, 0x56, 0x57, 0x58,
    0x59, 0x5A, 0x63, 0x64, 0x65, 0x66, 0x67, 0x68, 0x69, 0x6A, 0x73, 0x74, 0x75, 0x76, 0x77, 0x78, 0x79, 0x7A,
    0x82, 0x83, 0x84, 0x85, 0x86, 0x87, 0x88, 0x89, 0x8A, 0x92, 0x93, 0x94, 0x95, 0x96, 0x97, 0x98, 0x99, 0x9A,
    0xA2, 0xA3, 0xA4, 0xA5, 0xA6, 0xA7, 0xA8, 0xA9, 0xAA, 0xB2, 0xB3, 0xB4, 0xB5, 0xB6, 0xB7, 0xB8, 0xB9, 0xBA,
    0xC2, 0xC3, 0xC4, 0xC5, 0xC6, 0xC7, 0xC8, 0xC9, 0xCA, 0xD2, 0xD3, 0xD4, 0xD5, 0xD6, 0xD7, 0xD8, 0xD9, 0xDA,
    0xE2, 0xE3, 0xE4, 0xE5, 0xE6, 0xE7, 0xE8, 0xE9, 0xEA, 0xF2, 0xF3, 0xF4, 0xF5, 0xF6, 0xF7, 0xF8, 0xF9, 0xFA,
];
