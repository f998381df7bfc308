//! Holding out a validation part of the training images.

use super::Dataset;
use super::random::{Purpose, rng, shuffle};

/// Indices into a [`Dataset`], each part in ascending order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeldOut {
    pub train: Vec<u32>,
    /// Never learnt from; every choice is made on it.
    pub validation: Vec<u32>,
}

/// Holds out `fraction` of every class, chosen by `seed`. A class keeps at least one image to learn from.
pub fn hold_out(dataset: &Dataset, fraction: f64, seed: u64) -> HeldOut {
    let mut by_class = vec![Vec::new(); dataset.num_classes()];
    for (index, &label) in (0u32..).zip(&dataset.labels) {
        by_class[usize::from(label)].push(index);
    }
    let mut parts = HeldOut { train: Vec::new(), validation: Vec::new() };
    for (class, mut indices) in by_class.into_iter().enumerate() {
        shuffle(&mut rng(seed, Purpose::Split, 0, class as u64), &mut indices);
        let wanted = (indices.len() as f64 * fraction).round() as usize;
        let held = wanted.min(indices.len().saturating_sub(1));
        parts.validation.extend(&indices[..held]);
        parts.train.extend(&indices[held..]);
    }
    parts.train.sort_unstable();
    parts.validation.sort_unstable();
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labelled(labels: Vec<u16>) -> Dataset {
        let images = vec![0; labels.len() * 3];
        Dataset { images, side: 1, labels, class_names: vec!["a".into(), "b".into(), "c".into()] }
    }

    #[test]
    fn every_class_gives_its_share_and_nothing_is_in_both_parts() {
        let dataset = labelled((0..300).map(|i| i % 2).chain([2]).collect());
        let parts = hold_out(&dataset, 0.1, 7);
        let count = |part: &[u32], class| part.iter().filter(|&&i| dataset.labels[i as usize] == class).count();
        assert_eq!([0, 1, 2].map(|class| count(&parts.validation, class)), [15, 15, 0]);
        assert_eq!([0, 1, 2].map(|class| count(&parts.train, class)), [135, 135, 1]);
        let mut all: Vec<u32> = parts.train.iter().chain(&parts.validation).copied().collect();
        all.sort_unstable();
        assert_eq!(all, (0..301).collect::<Vec<_>>());
    }

    #[test]
    fn the_seed_decides() {
        let dataset = labelled((0..300).map(|i| i % 3).collect());
        assert_eq!(hold_out(&dataset, 0.1, 7), hold_out(&dataset, 0.1, 7));
        assert_ne!(hold_out(&dataset, 0.1, 7), hold_out(&dataset, 0.1, 8));
        assert!(hold_out(&dataset, 0.0, 7).validation.is_empty());
    }
}
