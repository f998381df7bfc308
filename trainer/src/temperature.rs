//! The temperature of a trained set, fitted on images that were held out of its training: the same fit as `teach` makes.

use teaching::best_temperature;

/// Logits of held-out images, with their labels.
#[derive(Debug, Clone)]
pub struct HeldOutLogits {
    classes: usize,
    /// Of so many images one is kept.
    every: usize,
    seen: usize,
    rows: Vec<f64>,
    labels: Vec<usize>,
}

impl HeldOutLogits {
    /// None yet, of a head of so many classes. Of the `images` that will be added as many are kept as a fit has time for.
    pub fn new(classes: usize, images: usize) -> Self {
        /// Most logits; a fit goes over them some hundred times.
        const MOST: usize = 1 << 22;
        let every = images.saturating_mul(classes).div_ceil(MOST).max(1);
        Self { classes, every, seen: 0, rows: Vec::new(), labels: Vec::new() }
    }

    /// Adds an image's logits over the classes, one of which is its label.
    pub fn add(&mut self, logits: &[f32], label: usize) {
        if self.seen.is_multiple_of(self.every) {
            self.rows.extend(logits.iter().map(|&logit| f64::from(logit)));
            self.labels.push(label);
        }
        self.seen += 1;
    }

    /// What the logits are best divided by; 1 where there is nothing to fit it on.
    pub fn temperature(&self) -> f32 {
        let has_choice = self.classes > 1 && !self.labels.is_empty();
        if !has_choice || !self.rows.iter().all(|logit| logit.is_finite()) {
            return 1.0;
        }
        let held: Vec<(&[f64], usize)> =
            self.rows.chunks_exact(self.classes).zip(self.labels.iter().copied()).collect();
        best_temperature(&held).0 as f32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logits_that_are_too_sure_get_the_temperature_that_makes_them_right() {
        // Three of four right: at their best the logits say so.
        let mut held = HeldOutLogits::new(2, 4000);
        for image in 0..4000 {
            held.add(&[8.0, 0.0], usize::from(image % 4 == 0));
        }
        let wanted = 8.0 / 3f32.ln();
        assert!((held.temperature() / wanted - 1.0).abs() < 0.01, "{} {wanted}", held.temperature());
    }

    #[test]
    fn without_images_or_choice_the_temperature_is_one() {
        assert_eq!(HeldOutLogits::new(3, 0).temperature(), 1.0);
        let mut held = HeldOutLogits::new(1, 1);
        held.add(&[5.0], 0);
        assert_eq!(held.temperature(), 1.0);
        let mut held = HeldOutLogits::new(2, 1);
        held.add(&[f32::NAN, 1.0], 0);
        assert_eq!(held.temperature(), 1.0);
    }

    #[test]
    fn of_many_images_some_are_kept() {
        let mut held = HeldOutLogits::new(1 << 12, 1 << 12);
        (0..1 << 12).for_each(|image| held.add(&vec![0.0; 1 << 12], image));
        assert_eq!(held.labels.len(), 1 << 10);
    }
}
