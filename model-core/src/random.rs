//! The one stream of random numbers: initial weights come from it, and so do models for measurements and tests. And the
//! start of a model's angles in it.

use std::f64::consts::TAU;

use serde::{Deserialize, Serialize};

use crate::kernels::rotation::splitmix64;

/// SplitMix64 (Steele, Lea and Flood, 2014): number `n` is a function of `seed` and `n` alone, so that a
/// stream can begin anywhere.
#[derive(Debug, Clone)]
pub struct SplitMix64 {
    seed: u64,
    drawn: u64,
}

impl SplitMix64 {
    /// The stream of `seed` after `drawn` numbers.
    pub fn at(seed: u64, drawn: u64) -> Self {
        Self { seed, drawn }
    }

    /// Numbers drawn so far.
    pub fn drawn(&self) -> u64 {
        self.drawn
    }

    /// The next number's 64 bits.
    pub fn bits(&mut self) -> u64 {
        let number = splitmix64(self.seed, self.drawn);
        self.drawn = self.drawn.wrapping_add(1);
        number
    }

    /// The next number, in `[0, 1)`: 53 random bits.
    pub fn uniform(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Uniform numbers around zero, one draw each.
    pub fn uniforms(&mut self, count: usize, std: f64) -> Vec<f32> {
        (0..count).map(|_| ((self.uniform() - 0.5) * 12f64.sqrt() * std) as f32).collect()
    }

    /// Normally distributed numbers (Box-Muller, the cosine only), two draws each.
    pub fn normals(&mut self, count: usize, std: f64) -> Vec<f32> {
        let normal = |stream: &mut Self| {
            let radius = (-2.0 * (1.0 - stream.uniform()).ln()).sqrt();
            (radius * (TAU * stream.uniform()).cos() * std) as f32
        };
        (0..count).map(|_| normal(self)).collect()
    }

    /// Fresh angles in radians for codes of `bits` bits, two draws each whatever the spread.
    pub fn angles(&mut self, count: usize, spread: AngleSpread, bits: u32) -> Vec<f32> {
        match spread {
            AngleSpread::Narrow => self.normals(count, NARROW_STD.max(TAU / f64::from(1u32 << bits))),
            AngleSpread::Uniform => {
                let angle = |stream: &mut Self| {
                    stream.uniform();
                    (TAU * stream.uniform()) as f32
                };
                (0..count).map(|_| angle(self)).collect()
            }
        }
    }
}

/// Standard deviation of narrow angles, radians; coarser grids widen it to one step.
const NARROW_STD: f64 = 0.1;

/// How the angles of fresh experts are spread.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AngleSpread {
    /// Normal around zero with a standard deviation of 0.1 rad, or of one code's step if that is wider: experts begin as
    /// slight turns of one another, over several codes.
    #[default]
    Narrow,
    /// Uniform over the circle.
    Uniform,
}

/// Where a model's angles started, so that anybody can rebuild the start from an artifact and compare.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AngleStart {
    pub generator: String,
    pub seed: u64,
    /// How the numbers become angles.
    pub spread: AngleSpread,
    /// For every layer how many numbers had been drawn before the first angle of the rotations `in`, `hidden` and `out`.
    pub drawn_before: Vec<[u64; 3]>,
}

impl AngleStart {
    /// The only generator there is.
    pub const GENERATOR: &str = "splitmix64";

    /// The `count` angles in radians that rotation `site` (0 for `in`, 1 for `hidden`, 2 for `out`) of `layer` started
    /// from; none for another generator or a layer that is not there.
    pub fn angles(&self, layer: usize, site: usize, count: usize, bits: u32) -> Option<Vec<f32>> {
        let drawn = *self.drawn_before.get(layer)?.get(site)?;
        (self.generator == Self::GENERATOR).then(|| SplitMix64::at(self.seed, drawn).angles(count, self.spread, bits))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stream_is_splitmix64() {
        // Sebastiano Vigna's splitmix64.c with x = 1234567.
        let published = [6_457_827_717_110_365_317u64, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423];
        let mut stream = SplitMix64::at(1_234_567, 0);
        for number in published {
            assert_eq!(stream.uniform(), (number >> 11) as f64 / (1u64 << 53) as f64);
        }
        assert_eq!(SplitMix64::at(1_234_567, 2).uniform(), (published[2] >> 11) as f64 / (1u64 << 53) as f64);
    }

    #[test]
    fn uniform_and_normal_numbers_have_the_mean_and_deviation_asked_for() {
        for draw in [SplitMix64::uniforms, SplitMix64::normals] {
            let values = draw(&mut SplitMix64::at(1, 0), 100_000, 2.0);
            let mean = values.iter().map(|&v| f64::from(v)).sum::<f64>() / 1e5;
            let variance = values.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / 1e5;
            // Five standard errors: 2 / sqrt(1e5) of the mean, and of the variance 4 sqrt(2 / 1e5) for normal numbers.
            assert!(mean.abs() < 0.032 && (variance - 4.0).abs() < 0.09, "{mean} {variance}");
        }
    }

    #[test]
    fn narrow_angles_keep_to_a_few_codes_and_uniform_ones_fill_the_circle() {
        let codes = |spread| {
            let mut stream = SplitMix64::at(1, 0);
            let angles = stream.angles(16_000, spread, 4);
            assert_eq!(stream.drawn(), 32_000, "what comes behind is the same for every spread");
            let mut counts = [0usize; 16];
            angles.iter().for_each(|a| counts[(f64::from(*a) / TAU * 16.0).round().rem_euclid(16.0) as usize] += 1);
            counts
        };
        // Code 8 is the half turn, eight standard deviations away.
        assert_eq!(codes(AngleSpread::Narrow)[8], 0);
        // 1000 expected, standard deviation 31.
        assert!(codes(AngleSpread::Uniform).iter().all(|count| (850..1150).contains(count)));
    }
}
