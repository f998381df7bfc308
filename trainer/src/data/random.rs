//! Random numbers as a pure function of what they are for.

use rand::Rng;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

/// What a generator is for; two purposes never share a stream.
#[derive(Debug, Clone, Copy)]
pub enum Purpose {
    /// Which images are held out.
    Split = 1,
    /// The order of one epoch's images.
    Order = 2,
    /// Crop, flip, colour of one image.
    Image = 3,
    /// Mixing of one image with its partner.
    Mix = 4,
    /// Which of one image's residual branches are left out.
    Depth = 5,
    /// Noise on the routers of one image.
    Route = 6,
}

/// The generator for `purpose` number `index` of `epoch`, under `seed`.
pub fn rng(seed: u64, purpose: Purpose, epoch: u64, index: u64) -> ChaCha8Rng {
    let mut key = [0; 32];
    for (slot, word) in key.chunks_exact_mut(8).zip([seed, purpose as u64, epoch, index]) {
        slot.copy_from_slice(&word.to_le_bytes());
    }
    ChaCha8Rng::from_seed(key)
}

/// A draw from Beta(`alpha`, `alpha`), by Johnk's rejection: X / (X + Y) with X = U^(1/alpha), Y = V^(1/alpha),
/// given X + Y <= 1. Cheap for the alphas of mixing (at most 1); acceptance falls off above.
pub fn beta(rng: &mut impl Rng, alpha: f64) -> f64 {
    loop {
        let (x, y) = (rng.random::<f64>().powf(1.0 / alpha), rng.random::<f64>().powf(1.0 / alpha));
        if x + y <= 1.0 && x + y > 0.0 {
            return x / (x + y);
        }
    }
}

/// Fisher-Yates.
pub fn shuffle<T>(rng: &mut impl Rng, items: &mut [T]) {
    for i in (1..items.len()).rev() {
        items.swap(i, rng.random_range(0..=i));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn beta_has_the_right_mean_and_variance() {
        for alpha in [0.2, 1.0] {
            let mut rng = rng(1, Purpose::Mix, 0, 0);
            let draws: Vec<f64> = (0..20_000).map(|_| beta(&mut rng, alpha)).collect();
            let mean = draws.iter().sum::<f64>() / draws.len() as f64;
            let variance = draws.iter().map(|d| (d - mean).powi(2)).sum::<f64>() / draws.len() as f64;
            // Standard error of the mean is at most 0.5 / sqrt(20000) = 0.0035.
            assert!((mean - 0.5).abs() < 0.015, "{alpha}: {mean}");
            assert!((variance - 0.25 / (2.0 * alpha + 1.0)).abs() < 0.01, "{alpha}: {variance}");
        }
    }

    #[test]
    fn streams_differ_in_every_coordinate() {
        let first = |seed, purpose, epoch, index| rng(seed, purpose, epoch, index).random::<u64>();
        let base = first(1, Purpose::Image, 2, 3);
        assert_eq!(base, first(1, Purpose::Image, 2, 3));
        for other in [
            first(2, Purpose::Image, 2, 3),
            first(1, Purpose::Mix, 2, 3),
            first(1, Purpose::Image, 3, 3),
            first(1, Purpose::Image, 2, 4),
        ] {
            assert_ne!(base, other);
        }
    }
}
