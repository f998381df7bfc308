//! Teaching from features whose classes are known.

use model_core::random::SplitMix64;
use model_core::weights::{Background, Covariance};
use teaching::{Examples, Options, TeachError, teach};

const D_MODEL: usize = 48;

/// Features of images of `classes` classes, each around a mean of its own, in order of their classes.
struct Synthetic {
    features: Vec<f32>,
    labels: Vec<usize>,
    classes: Vec<String>,
}

impl Synthetic {
    fn new(classes: usize, images: usize, views: usize, distance: f64) -> Self {
        let mut random = SplitMix64::at(7, 0);
        let (mut features, mut labels) = (Vec::new(), Vec::new());
        for class in 0..classes {
            for _ in 0..images {
                let image = random.normals(D_MODEL, 1.0);
                for _ in 0..views {
                    let noise = random.normals(D_MODEL, 0.1);
                    features.extend(image.iter().zip(noise).map(|(a, b)| a + b));
                    let end = features.len();
                    features[end - D_MODEL + class % D_MODEL] += distance as f32;
                }
                labels.push(class);
            }
        }
        Self { features, labels, classes: (0..classes).map(|class| format!("class {class}")).collect() }
    }

    fn examples(&self, views: usize) -> Examples<'_> {
        let (labels, classes) = (&self.labels, &self.classes);
        Examples { features: &self.features, views, d_model: D_MODEL, labels, classes }
    }
}

fn background() -> Background {
    let covariance = Covariance::Diagonal { diagonal: vec![4.0; D_MODEL], factor: Vec::new() };
    Background { mean: vec![3.0; D_MODEL], covariance, source: "synthetic".to_owned(), images: 100 }
}

#[test]
fn classes_that_lie_apart_are_told_apart_and_strangers_are_unknown() {
    let synthetic = Synthetic::new(3, 20, 4, 8.0);
    let mut shares = Vec::new();
    let options = Options { threads: 2, ..Options::default() };
    let taught =
        teach(&synthetic.examples(4), Some(&background()), &options, &mut |share| shares.push(share), &|| false)
            .unwrap();
    let report = &taught.report;
    assert_eq!((report.accuracy.count, report.accuracy.of, report.folds), (60, 60, 5));
    assert!(report.accuracy.low > 0.9 && report.accuracy.high > 0.999, "{report:?}");
    assert!(report.confusions.is_empty() && report.suspects.is_empty());
    let unknown = &report.unknown;
    assert!(unknown.refused.share <= 0.05, "{unknown:?}");
    assert!(unknown.background_passes.unwrap().share < 0.05, "{unknown:?}");
    assert_eq!((unknown.class_passes.unwrap().count, unknown.class_passes.unwrap().of), (0, 60), "{unknown:?}");
    assert!(shares.is_sorted() && shares.last() == Some(&1.0), "{shares:?}");
    // The head, as it will be stored, on the features as they are.
    let weight = taught.head.weight.to_f32();
    for (row, &label) in synthetic.features.chunks_exact(D_MODEL).zip(synthetic.labels.iter().flat_map(|l| [l; 4])) {
        let logit = |class: usize| {
            let weight = &weight[class * D_MODEL..][..D_MODEL];
            weight.iter().zip(row).map(|(w, x)| w * x).sum::<f32>() + taught.head.bias[class]
        };
        let best = (0..3).max_by(|&a, &b| logit(a).total_cmp(&logit(b))).unwrap();
        assert_eq!(best, label);
    }
}

#[test]
fn the_threshold_is_that_of_images_that_were_held_out() {
    // More features than images: distances of images that means and covariance have seen would be far too small.
    let synthetic = Synthetic::new(4, 12, 1, 6.0);
    let taught = teach(&synthetic.examples(1), None, &Options::default(), &mut |_| (), &|| false).unwrap();
    let mut random = SplitMix64::at(8, 0);
    let fresh = (0..400).map(|i| {
        let mut row = random.normals(D_MODEL, 1.0);
        row[i % 4] += 6.0;
        row
    });
    let statistics = model_core::familiarity::Familiarity::new(&taught.familiarity, None).unwrap();
    let refused = fresh.filter(|row| statistics.is_unknown(statistics.distance(row, None))).count();
    assert!((2..=60).contains(&refused), "{refused} of 400 are refused where 20 are meant to be");
}

#[test]
fn a_wrong_label_is_suspected() {
    let mut synthetic = Synthetic::new(2, 20, 1, 8.0);
    synthetic.labels[3] = 1;
    let report = teach(&synthetic.examples(1), None, &Options::default(), &mut |_| (), &|| false).unwrap().report;
    assert_eq!(report.suspects.len(), 1, "{report:?}");
    let suspect = &report.suspects[0];
    assert_eq!((suspect.image, &*suspect.label, &*suspect.taken_for), (3, "class 1", "class 0"));
    assert_eq!(report.confusions[0].images, 1);
    assert_eq!(report.accuracy.count, 39);
}

#[test]
fn none_is_counted_apart() {
    let mut synthetic = Synthetic::new(3, 20, 1, 8.0);
    synthetic.classes[2] = "None".to_owned();
    let report = teach(&synthetic.examples(1), None, &Options::default(), &mut |_| (), &|| false).unwrap().report;
    assert_eq!((report.accuracy.of, report.none_accuracy.unwrap().of), (40, 20));
    assert_eq!((report.unknown.refused.of, report.unknown.none_passes.unwrap().of), (40, 20));
}

#[test]
fn what_cannot_be_taught_is_a_sentence() {
    let failure = |synthetic: &Synthetic| {
        teach(&synthetic.examples(1), None, &Options::default(), &mut |_| (), &|| false).unwrap_err().to_string()
    };
    assert_eq!(failure(&Synthetic::new(1, 9, 1, 1.0)), "a classifier needs two classes at least, and there is 1");
    assert_eq!(
        failure(&Synthetic::new(2, 1, 1, 1.0)),
        "the class `class 0` has 1 image; every class needs two at least"
    );
    assert!(failure(&Synthetic::new(1001, 2, 1, 1.0)).contains("1001 classes are too many"));
    let mut broken = Synthetic::new(2, 2, 1, 1.0);
    broken.features[D_MODEL] = f32::NAN;
    assert_eq!(failure(&broken), "the features of image 1 are not finite");
    broken.features.pop();
    assert!(failure(&broken).starts_with("features: "), "{}", failure(&broken));
    let fine = Synthetic::new(2, 9, 1, 1.0);
    let cancelled = teach(&fine.examples(1), None, &Options::default(), &mut |_| (), &|| true);
    assert_eq!(cancelled.unwrap_err(), TeachError::Cancelled);
}

#[test]
fn images_that_are_all_the_same_are_no_panic() {
    let mut synthetic = Synthetic::new(2, 5, 2, 0.0);
    synthetic.features.fill(0.25);
    let taught =
        teach(&synthetic.examples(2), Some(&background()), &Options::default(), &mut |_| (), &|| false).unwrap();
    assert!(taught.temperature.is_finite() && taught.familiarity.threshold.is_finite());
}

#[test]
fn what_lies_far_from_everything_is_unknown_to_a_set_that_spreads_widely() {
    // Its images spread three times as far as those of the background.
    let synthetic = Synthetic::new(2, 60, 1, 8.0);
    let narrow = Background {
        covariance: Covariance::Diagonal { diagonal: vec![0.1; D_MODEL], factor: Vec::new() },
        ..background()
    };
    let taught = teach(&synthetic.examples(1), Some(&narrow), &Options::default(), &mut |_| (), &|| false).unwrap();
    let statistics = model_core::familiarity::Familiarity::new(&taught.familiarity, None).unwrap();
    let far = [-40.0; D_MODEL];
    assert!(statistics.is_unknown(statistics.distance(&far, None)));
}

#[test]
fn few_features_are_taken_where_they_are_as_good_and_all_where_they_are_better() {
    let taught = |distance, features| {
        let synthetic = Synthetic::new(12, 12, 1, distance);
        let options = Options { features, ..Options::default() };
        let mut shares = Vec::new();
        let taught = teach(&synthetic.examples(1), None, &options, &mut |share| shares.push(share), &|| false).unwrap();
        assert!(shares.is_sorted() && shares.last() == Some(&1.0), "{shares:?}");
        let width = taught.projection.map_or(D_MODEL, |projection| projection.features());
        assert_eq!(taught.head.weight.len(), 12 * width);
        (taught.projection.is_some(), taught.report.accuracy.count)
    };
    let easy = taught(40.0, 12);
    assert_eq!(easy, (true, 144), "classes far apart need no more");
    // Overlapping classes get all features, even where fewer are right as often.
    assert!(!taught(2.0, D_MODEL - 1).0);
    // Four features in one have twice the noise, and classes of the same remainder fall together.
    let (is_small, right) = taught(5.0, 6);
    let (_, of_all) = taught(5.0, D_MODEL);
    assert_eq!((is_small, right), (false, of_all));
}
