//! Angle codes that a generator draws, for experts that nobody trained. `FORMAT.md`, "Angles from a seed", says the same.

/// Number `n` of the stream of `seed`: SplitMix64 (Steele, Lea and Flood, 2014), any of whose numbers can
/// be asked for alone.
#[inline(always)]
pub fn splitmix64(seed: u64, n: u64) -> u64 {
    let z = seed.wrapping_add(n.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// What draws the codes of one rotation site.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SeededAngles {
    seed: u64,
    /// Bits of an angle code.
    bits: u32,
    /// Random bits of an angle code.
    spread_bits: u32,
}

impl SeededAngles {
    /// The codes of `site` (0 for `in`, 1 for `hidden`, 2 for `out`) of block `layer`, of `bits` bits each, of
    /// which `spread_bits` are random.
    ///
    /// # Panics
    /// Unless `1 <= spread_bits <= bits <= 16`; configurations are validated before.
    pub fn new(seed: u64, layer: usize, site: usize, bits: u32, spread_bits: u32) -> Self {
        assert!(1 <= spread_bits && spread_bits <= bits && bits <= 16, "{spread_bits} random bits of {bits}");
        Self { seed: splitmix64(seed, 3 * layer as u64 + site as u64), bits, spread_bits }
    }

    /// Bits of a code.
    pub fn bits(&self) -> u32 {
        self.bits
    }

    /// Draws one row of codes: a stage of an expert, `row = expert * stages + stage`.
    #[inline(always)]
    pub fn draw(&self, row: usize, codes: &mut [u16]) {
        let Self { seed, bits, spread_bits } = *self;
        let numbers = (codes.len() as u64 * u64::from(spread_bits)).div_ceil(64);
        let mut next = row as u64 * numbers;
        let (mut word, mut left) = (0u64, 0);
        for code in codes {
            let mut random = word;
            if left < spread_bits {
                // The low bits of the next number continue the ones that are left.
                word = splitmix64(seed, next);
                next += 1;
                random |= word << left;
                word >>= spread_bits - left;
                left += 64 - spread_bits;
            } else {
                word >>= spread_bits;
                left -= spread_bits;
            }
            // Two's complement of `spread_bits` bits, modulo `2^bits`.
            let signed = ((random as u16) << (16 - spread_bits)).cast_signed() >> (16 - spread_bits);
            *code = signed.cast_unsigned() << (16 - bits) >> (16 - bits);
        }
    }

    /// The codes of all experts, `[experts, stages, pairs]`.
    pub fn codes(&self, experts: usize, stages: usize, pairs: usize) -> Vec<u16> {
        let mut codes = vec![0; experts * stages * pairs];
        for (row, codes) in codes.chunks_exact_mut(pairs.max(1)).enumerate() {
            self.draw(row, codes);
        }
        codes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stream_is_splitmix64() {
        // Sebastiano Vigna's splitmix64.c with x = 1234567.
        let published = [6_457_827_717_110_365_317u64, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423];
        assert!((0..3).map(|n| splitmix64(1_234_567, n)).eq(published));
    }

    #[test]
    fn codes_are_the_bits_of_the_stream_in_order() {
        for (bits, spread_bits, pairs) in [(4, 4, 96), (6, 5, 50), (8, 3, 7), (16, 16, 5), (4, 1, 3), (6, 6, 22)] {
            let angles = SeededAngles::new(9, 2, 1, bits, spread_bits);
            let (experts, stages) = (3, 2);
            let codes = angles.codes(experts, stages, pairs);
            let seed = splitmix64(9, 3 * 2 + 1);
            let numbers = (pairs * spread_bits as usize).div_ceil(64);
            for (row, codes) in codes.chunks(pairs).enumerate() {
                for (j, &code) in codes.iter().enumerate() {
                    let value = (0..spread_bits as usize).fold(0i32, |value, b| {
                        let bit = j * spread_bits as usize + b;
                        let word = splitmix64(seed, (row * numbers + bit / 64) as u64);
                        value | ((word >> (bit % 64)) as i32 & 1) << b
                    });
                    let signed = if value >> (spread_bits - 1) == 1 { value - (1 << spread_bits) } else { value };
                    assert_eq!(i32::from(code), signed.rem_euclid(1 << bits), "{bits} {spread_bits} {row} {j}");
                }
            }
        }
    }
}
