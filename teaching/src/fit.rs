//! The whole of it: folds, the strength that does best, the head, the statistics, the report.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use model_core::projection::Projection;
use model_core::weights::{Background, Familiarity, Linear, Matrix, Precision};

use crate::examples::Examples;
use crate::logistic::{Rows, log_sum_exp, logits};
use crate::report::{Calibration, ClassReport, Confusion, FEW_IMAGES, Report, Share, Suspect, UnknownReport};
use crate::statistics::{DRAWS, Distances, fit as fit_statistics, threshold, with_room};
use crate::temperature::best_temperature;
use crate::{Options, Taught, TeachError, folds};

/// Strengths of the penalty that are tried, strongest first, on rows whose mean squared length is one.
const STRENGTHS: [f64; 6] = [1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4];
/// A weaker penalty must lower the loss by this share to be preferred.
const WORTH: f64 = 0.01;
/// If a larger share of the held-out images is right, the classes lie well apart, and projected features know strangers.
const WELL_APART: f64 = 0.9;
/// Entries of a list in the report.
const LISTED: usize = 10;
/// Score of another label from which an image is probably mislabelled.
const SUSPECT_SCORE: f64 = 0.8;
/// Classes at most that are left out, one after the other.
const MOST_LEFT_OUT: usize = 10;
/// Seed of the draws from the background that the threshold depends on.
const NEAREST_SEED: u64 = 24;
/// Seed of the draws of which the share that passes is reported.
const PASS_SEED: u64 = 25;
/// Images that are compared with each other at most, and steps of a fit that are remembered, with what goes with them.
const COMPARED: usize = 1024;
const REMEMBERED: usize = 40;

/// Bytes that teaching takes on one thread, the features included: those and a copy of them, the rows that are compared
/// with each other, and the parameters of the last steps.
pub fn memory(images: usize, views: usize, d_model: usize, classes: usize) -> usize {
    let rows = images.saturating_mul(views);
    let compared = rows.min(COMPARED);
    // All features and a copy of them; before that, projected ones and a copy of these take the place of the copy.
    let projected = Options::default().features;
    let width = if projected < d_model { d_model.max(2 * projected) } else { d_model };
    let features = rows
        .saturating_mul(d_model.saturating_add(width))
        .saturating_add((compared + 2 * DRAWS).saturating_mul(d_model));
    let parameters = classes.saturating_mul(d_model + 1).saturating_mul(REMEMBERED);
    let logits = images.saturating_mul(classes).saturating_mul(2 * STRENGTHS.len());
    [compared * compared, parameters, logits]
        .iter()
        .fold(features, |sum, part| sum.saturating_add(*part))
        .saturating_mul(4)
}

/// Rows moved and scaled to a mean of zero and a mean squared length of one, and back.
struct Scaling {
    mean: Vec<f32>,
    scale: f32,
}

impl Scaling {
    fn new<'a>(rows: impl Iterator<Item = &'a [f32]> + Clone, d_model: usize) -> Self {
        let (mut mean, mut count) = (vec![0.0f64; d_model], 0.0f64);
        for row in rows.clone() {
            mean.iter_mut().zip(row).for_each(|(mean, &value)| *mean += f64::from(value));
            count += 1.0;
        }
        mean.iter_mut().for_each(|mean| *mean /= count.max(1.0));
        let length = |row: &[f32]| -> f64 { row.iter().zip(&mean).map(|(&v, m)| (f64::from(v) - m).powi(2)).sum() };
        let squared = rows.map(length).sum::<f64>() / count.max(1.0);
        let scale = if squared > 1e-20 { squared.sqrt().recip() as f32 } else { 1.0 };
        Self { mean: mean.into_iter().map(|mean| mean as f32).collect(), scale }
    }

    fn apply<'a>(&'a self, row: &'a [f32]) -> impl Iterator<Item = f32> + 'a {
        row.iter().zip(&self.mean).map(|(value, mean)| (value - mean) * self.scale)
    }
}

/// What a fold says of the images that it holds out.
pub(crate) struct Held {
    pub(crate) image: usize,
    /// One row a strength.
    pub(crate) logits: Vec<Vec<f64>>,
    pub(crate) distance: f64,
}

/// Fits a classifier to `examples`. `background` is that of the backbone; `progress` is told the share that is done, and
/// `cancelled` is asked many times a second.
///
/// Where the backbone has more than [`Options::features`], a set that sees them projected to so many takes a quarter of the
/// bytes. The set sees all of them if its classes do not lie well apart, or if it then gains more than chance explains.
///
/// # Errors
/// [`TeachError`] when the examples are too few, too many or unfit, or it was cancelled.
pub fn teach(
    examples: &Examples<'_>,
    background: Option<&Background>,
    options: &Options,
    progress: &mut (dyn FnMut(f64) + Send),
    cancelled: &(dyn Fn() -> bool + Sync),
) -> Result<Taught, TeachError> {
    examples.check()?;
    if options.features >= examples.d_model {
        return teach_on(examples, (background, None), options, progress, cancelled);
    }
    let projection = Projection::Folded { features: options.features };
    let small = {
        let features = &projection.rows(examples.features, examples.d_model);
        let examples = Examples { features, d_model: projection.features(), ..*examples };
        let first = &mut |share: f64| progress(0.2 * share);
        teach_on(&examples, (background, Some(projection)), options, first, cancelled)
    };
    if matches!(small, Err(TeachError::Cancelled)) {
        return small;
    }
    let second = &mut |share: f64| progress(0.2 + 0.8 * share);
    let large = teach_on(examples, (background, None), options, second, cancelled)?;
    let Ok(small) = small else { return Ok(large) };
    // The standard deviation of a number of mistakes is about its root.
    let gain = large.report.accuracy.count.saturating_sub(small.report.accuracy.count);
    let missed = small.report.accuracy.of - small.report.accuracy.count;
    let suffices = small.report.accuracy.share >= WELL_APART && gain * gain <= missed;
    Ok(if suffices { small } else { large })
}

/// [`teach`] on features as they are; `projection` is what made them of the backbone's.
fn teach_on(
    examples: &Examples<'_>,
    (background, projection): (Option<&Background>, Option<Projection>),
    options: &Options,
    progress: &mut (dyn FnMut(f64) + Send),
    cancelled: &(dyn Fn() -> bool + Sync),
) -> Result<Taught, TeachError> {
    let all: Vec<usize> = (0..examples.labels.len()).collect();
    let smallest = (0..examples.classes.len()).map(|c| examples.labels.iter().filter(|&&l| l == c).count()).min();
    let count = options.folds.clamp(2, 10).min(smallest.unwrap_or(2).max(2));
    let folds = folds::stratified(examples.labels, examples.classes.len(), count);

    let mut statistics = fit_statistics(examples, &all, options.rank);
    let held = hold_out(examples, options, (&folds, count), progress, cancelled)?;
    let (best, temperature) = best_strength(examples, &held);
    let strength = STRENGTHS[best];
    let (scaling, parameters) = fit_head(examples, &all, &STRENGTHS[..=best], cancelled)?;
    let parameters = parameters.last().expect("one fit a strength");
    progress(0.95);

    let unknown = unknown_images(examples, &mut statistics, &held, (background, projection), options, cancelled)?;
    let report = report(examples, (&held, best), (strength, temperature), count, unknown);
    progress(1.0);
    Ok(Taught {
        head: head(&scaling, parameters, examples.d_model),
        projection,
        temperature: temperature as f32,
        familiarity: statistics,
        labels: examples.classes.to_vec(),
        report,
    })
}

/// Sets the threshold of `statistics` by the images that were held out, and says what it does to these and to others.
pub(crate) fn unknown_images(
    examples: &Examples<'_>,
    statistics: &mut Familiarity,
    held: &[Held],
    (background, projection): (Option<&Background>, Option<Projection>),
    options: &Options,
    cancelled: &dyn Fn() -> bool,
) -> Result<UnknownReport, TeachError> {
    let none = examples.none_class();
    let own = |image: usize| Some(examples.labels[image]) != none;
    let mut distances: Vec<f64> = held.iter().filter(|h| own(h.image)).map(|h| h.distance).collect();
    let measure = Distances::new(statistics)?;
    let drawn = |seed| background.map(|background| measure.of_draws(background, projection, seed)).unwrap_or_default();
    let limit = with_room(threshold(&mut distances, options.known_share), &drawn(NEAREST_SEED));
    statistics.threshold = limit as f32;
    let refused = Share::new(distances.iter().filter(|&&distance| distance > limit).count(), distances.len());
    // Other draws than those that the threshold depends on.
    let drawn = drawn(PASS_SEED);
    let passes = drawn.iter().filter(|&&distance| distance <= limit).count();
    let background_passes = (!drawn.is_empty()).then(|| Share::new(passes, drawn.len()));
    let class_passes = leave_classes_out(examples, (options.rank, limit), cancelled)?;
    let others: Vec<&Held> = held.iter().filter(|held| !own(held.image)).collect();
    let none_passes =
        none.map(|_| Share::new(others.iter().filter(|held| held.distance <= limit).count(), others.len()));
    statistics.pass_share = none_passes.or(background_passes).map_or(0.0, |share| share.share as f32);
    Ok(UnknownReport { threshold: limit, refused, background_passes, class_passes, none_passes })
}

/// How many images of a class lie within `limit` of the others when these are all that there is.
fn leave_classes_out(
    examples: &Examples<'_>,
    (rank, limit): (usize, f64),
    cancelled: &dyn Fn() -> bool,
) -> Result<Option<Share>, TeachError> {
    let none = examples.none_class();
    let classes: Vec<usize> = (0..examples.classes.len()).filter(|&class| Some(class) != none).collect();
    if classes.len() < 3 {
        return Ok(None);
    }
    let (mut passes, mut of) = (0, 0);
    for &left_out in classes.iter().step_by(classes.len().div_ceil(MOST_LEFT_OUT)) {
        if cancelled() {
            return Err(TeachError::Cancelled);
        }
        let (own, others): (Vec<usize>, Vec<usize>) =
            (0..examples.labels.len()).partition(|&image| examples.labels[image] == left_out);
        let distances = Distances::new(&fit_statistics(examples, &others, rank))?;
        passes += own.iter().filter(|&&image| distances.of(examples.plain(image)) <= limit).count();
        of += own.len();
    }
    Ok(Some(Share::new(passes, of)))
}

/// Each fold in turn: what the others say of its images.
fn hold_out(
    examples: &Examples<'_>,
    options: &Options,
    (folds, count): (&[usize], usize),
    progress: &mut (dyn FnMut(f64) + Send),
    cancelled: &(dyn Fn() -> bool + Sync),
) -> Result<Vec<Held>, TeachError> {
    let (next, done) = (AtomicUsize::new(0), Mutex::new((0, progress, Vec::new())));
    let run = || loop {
        let fold = next.fetch_add(1, Ordering::Relaxed);
        if fold >= count {
            return Ok(());
        }
        let (inside, outside): (Vec<usize>, Vec<usize>) = (0..folds.len()).partition(|&image| folds[image] != fold);
        let (scaling, fits) = fit_head(examples, &inside, &STRENGTHS, cancelled)?;
        let statistics = fit_statistics(examples, &inside, options.rank);
        let distances = Distances::new(&statistics)?;
        let held = outside.into_iter().map(|image| {
            let plain = examples.plain(image);
            let row: Vec<f32> = scaling.apply(plain).collect();
            let logits = fits.iter().map(|parameters| logits(parameters, &row)).collect();
            Held { image, logits, distance: distances.of(plain) }
        });
        let held: Vec<Held> = held.collect();
        let mut done = done.lock().unwrap_or_else(PoisonError::into_inner);
        done.0 += 1;
        let share = 0.9 * f64::from(done.0) / count as f64;
        (done.1)(share);
        done.2.extend(held);
    };
    std::thread::scope(|scope| {
        let helpers: Vec<_> = (1..options.threads.clamp(1, count)).map(|_| scope.spawn(run)).collect();
        let own: Result<(), TeachError> = run();
        helpers.into_iter().map(|helper| helper.join().expect("fitting does not panic")).fold(own, Result::and)
    })?;
    let (.., mut held) = done.into_inner().unwrap_or_else(PoisonError::into_inner);
    held.sort_by_key(|held| held.image);
    Ok(held)
}

/// Parameters for each strength, each fitted from the one before, on rows scaled as returned. Every class weighs the same.
fn fit_head(
    examples: &Examples<'_>,
    chosen: &[usize],
    strengths: &[f64],
    cancelled: &dyn Fn() -> bool,
) -> Result<(Scaling, Vec<Vec<f32>>), TeachError> {
    let (d_model, classes) = (examples.d_model, examples.classes.len());
    let rows = chosen.iter().flat_map(|&image| examples.image(image).chunks_exact(d_model));
    let scaling = Scaling::new(rows.clone(), d_model);
    let mut values = Vec::with_capacity(chosen.len() * examples.views * d_model);
    rows.for_each(|row| values.extend(scaling.apply(row)));
    let labels = chosen.iter().flat_map(|&image| std::iter::repeat_n(examples.labels[image], examples.views));
    let labels: Vec<usize> = labels.collect();
    let mut counts = vec![0usize; classes];
    labels.iter().for_each(|&label| counts[label] += 1);
    let present = counts.iter().filter(|&&count| count > 0).count();
    let weights: Vec<f64> = labels.iter().map(|&label| 1.0 / (present * counts[label]) as f64).collect();
    let rows = Rows { values: &values, features: d_model, labels: &labels, weights: &weights, classes };
    let mut parameters = vec![0.0; rows.parameters()];
    let mut fits = Vec::with_capacity(strengths.len());
    for &strength in strengths {
        rows.fit(strength, &mut parameters, cancelled)?;
        fits.push(parameters.clone());
    }
    Ok((scaling, fits))
}

/// The linear layer on features as they are.
fn head(scaling: &Scaling, parameters: &[f32], d_model: usize) -> Linear {
    let (mut weight, mut bias) = (Vec::new(), Vec::new());
    for class in parameters.chunks_exact(d_model + 1) {
        let row: Vec<f32> = class[..d_model].iter().map(|w| w * scaling.scale).collect();
        let moved: f64 = row.iter().zip(&scaling.mean).map(|(&w, &m)| f64::from(w) * f64::from(m)).sum();
        bias.push((f64::from(class[d_model]) - moved) as f32);
        weight.extend(row);
    }
    Linear { weight: Matrix::encode(&weight, bias.len(), Precision::Int8), bias }
}

/// The strength whose held-out logits have the least loss at their best temperature; the stronger one of near equals.
fn best_strength(examples: &Examples<'_>, held: &[Held]) -> (usize, f64) {
    let mut best: Option<(usize, f64, f64)> = None;
    for strength in 0..STRENGTHS.len() {
        let logits: Vec<(&[f64], usize)> =
            held.iter().map(|held| (&*held.logits[strength], examples.labels[held.image])).collect();
        let (temperature, loss) = best_temperature(&logits);
        if best.is_none_or(|(.., least)| loss < least * (1.0 - WORTH)) {
            best = Some((strength, temperature, loss));
        }
    }
    best.map_or((0, 1.0), |(strength, temperature, _)| (strength, temperature))
}

pub(crate) fn report(
    examples: &Examples<'_>,
    (held, best): (&[Held], usize),
    (strength, temperature): (f64, f64),
    folds: usize,
    unknown: UnknownReport,
) -> Report {
    let classes = examples.classes;
    let none = examples.none_class();
    let mut confusion = vec![0usize; classes.len() * classes.len()];
    let images = held.len();
    let (mut suspects, mut scores, mut log_loss) = (Vec::new(), Vec::new(), 0.0);
    for held in held {
        let label = examples.labels[held.image];
        let scaled: Vec<f64> = held.logits[best].iter().map(|logit| logit / temperature).collect();
        let total = log_sum_exp(&scaled);
        let (taken, score) = scaled
            .iter()
            .enumerate()
            .fold((0, f64::NEG_INFINITY), |best, (class, &logit)| if logit > best.1 { (class, logit) } else { best });
        let score = (score - total).exp();
        confusion[label * classes.len() + taken] += 1;
        scores.push((score, taken == label));
        log_loss += (total - scaled[label]) / images as f64;
        if taken != label && score >= SUSPECT_SCORE {
            let (label, taken_for) = (classes[label].clone(), classes[taken].clone());
            suspects.push(Suspect { image: held.image, label, taken_for, score });
        }
    }
    suspects.sort_by(|a, b| b.score.total_cmp(&a.score));
    suspects.truncate(LISTED);
    let count = |class: usize| confusion[class * classes.len()..][..classes.len()].iter().sum::<usize>();
    let right = |class: usize| confusion[class * classes.len() + class];
    let others = || (0..classes.len()).filter(|&class| Some(class) != none);
    let mut confusions: Vec<Confusion> = Vec::new();
    for (cell, &images) in confusion.iter().enumerate() {
        let (label, taken) = (cell / classes.len(), cell % classes.len());
        if label != taken && images > 0 {
            confusions.push(Confusion { label: classes[label].clone(), taken_for: classes[taken].clone(), images });
        }
    }
    confusions.sort_by_key(|confusion| std::cmp::Reverse(confusion.images));
    confusions.truncate(LISTED);
    let class_report = |class: usize| ClassReport {
        label: classes[class].clone(),
        images: count(class),
        correct: right(class),
        few: count(class) < FEW_IMAGES,
    };
    Report {
        images,
        folds,
        accuracy: Share::new(others().map(right).sum(), others().map(count).sum()),
        none_accuracy: none.map(|class| Share::new(right(class), count(class))),
        classes: (0..classes.len()).map(class_report).collect(),
        confusions,
        suspects,
        calibration: calibration(scores, temperature, log_loss),
        strength,
        unknown,
    }
}

fn calibration(mut scores: Vec<(f64, bool)>, temperature: f64, log_loss: f64) -> Calibration {
    scores.sort_by(|a, b| a.0.total_cmp(&b.0));
    let n = scores.len().max(1) as f64;
    let mean_score = scores.iter().map(|(score, _)| score).sum::<f64>() / n;
    let bins = scores.chunks(scores.len().div_ceil(10).max(1)).map(|bin| {
        let score: f64 = bin.iter().map(|(score, _)| score).sum();
        let right = bin.iter().filter(|(_, right)| *right).count() as f64;
        (score - right).abs() / n
    });
    Calibration { temperature, mean_score, expected_error: bins.sum(), log_loss }
}
