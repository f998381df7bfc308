//! Which images are held out together.

use model_core::random::SplitMix64;

/// Deals the images of each class to `count` folds, in a random order that is the same every time. Folds differ by one
/// image at most, of every class and of all classes together.
pub(crate) fn stratified(labels: &[usize], classes: usize, count: usize) -> Vec<usize> {
    let mut random = SplitMix64::at(22, 0);
    let mut folds = vec![0; labels.len()];
    let mut dealt = 0;
    for class in 0..classes {
        let mut images: Vec<usize> = (0..labels.len()).filter(|&image| labels[image] == class).collect();
        for last in (1..images.len()).rev() {
            images.swap(last, (random.uniform() * (last + 1) as f64) as usize);
        }
        for image in images {
            folds[image] = dealt % count;
            dealt += 1;
        }
    }
    folds
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_fold_has_its_share_of_every_class() {
        let labels: Vec<usize> = (0..97).map(|image| if image < 13 { 0 } else { 1 + image % 3 }).collect();
        let folds = stratified(&labels, 4, 5);
        for class in 0..4 {
            let images = labels.iter().filter(|&&label| label == class).count();
            for fold in 0..5 {
                let held = (0..97).filter(|&i| labels[i] == class && folds[i] == fold).count();
                assert!((images / 5..=images.div_ceil(5)).contains(&held), "{held} of {images}");
            }
        }
        assert_eq!(folds, stratified(&labels, 4, 5));
    }
}
