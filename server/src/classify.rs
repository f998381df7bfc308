//! The journey of images from a request to their labels. Every front end, the command line among them, hands its images
//! to [`Classifier::answer`] and shows the answers in its own form.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use model_core::image::{Crop, Fit, ImageError, RgbImage, Seen, View};
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot::error::RecvError;
use tokio::time::{Instant, timeout_at};
use utoipa::ToSchema;

use crate::admission::{Admission, Entry, Refused};
use crate::compute::decode::{DecodeError, Decoder, Input, Prepared};
use crate::compute::{Closed, ForwardFailed, Job, Pipeline};
use crate::examples::Examples;
use crate::metrics::{ImageResult, Metrics};
use crate::repeats::REPEATS;
use crate::sets::loaded::{Answer, SetLease, SetRegistry};
use crate::sets::registry::SetError;
use crate::statistics::{Statistics, milliseconds};
use crate::verdict::{Evidence, MinScore, Reason};

/// What classifies: expert sets, and what images pass through on their way to one.
pub struct Classifier {
    pub registry: SetRegistry,
    pub decoder: Decoder,
    pub pipeline: Pipeline,
    /// Bounds on requests, images and bytes.
    pub admission: Admission,
    pub metrics: Arc<Metrics>,
    /// What each expert set has answered.
    pub statistics: Statistics,
    /// Longest wait for an expert set to be loaded.
    pub load_wait: Duration,
    /// Where frames go that are not named, if they are kept.
    pub examples: Option<Examples>,
}

/// Images to classify with one expert set.
#[derive(Debug)]
pub struct Request {
    pub set: String,
    /// Its version; the current one when absent.
    pub version: Option<u64>,
    /// The images; an error stands in the place of an image that could not be read.
    pub images: Vec<Result<Image, Error>>,
    /// Whether routing maps are wanted.
    pub routing: bool,
    /// The part of each picture that matters.
    pub look: Look,
    /// Score below which the best label does not count.
    pub min_score: Option<MinScore>,
    /// When the request began.
    pub started: Instant,
    /// When the answer must be there.
    pub deadline: Instant,
}

/// Which part of each picture a request wants looked at, and how it becomes a square; the set decides what is left out.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Look {
    pub crop: Option<Crop>,
    pub fit: Option<Fit>,
}

impl Look {
    /// What it leaves out, from another one.
    #[must_use]
    pub fn or(self, other: Self) -> Self {
        Self { crop: self.crop.or(other.crop), fit: self.fit.or(other.fit) }
    }

    fn of(self, view: View) -> (Crop, Fit) {
        (self.crop.unwrap_or(Crop::Shares(view.crop)), self.fit.unwrap_or(view.fit))
    }
}

/// An image to classify.
#[derive(Debug)]
pub enum Image {
    /// A file: JPEG, PNG and so on.
    Encoded(Bytes),
    /// Decoded, of any size.
    Rgb(RgbImage),
    /// The model's input `[side, side, 3]`.
    Prepared(Vec<f32>),
}

/// The answers to a [`Request`].
pub struct Answers {
    /// The expert set that answered.
    pub lease: SetLease,
    /// One for each image, in the request's order.
    pub images: Vec<Result<Answer, Error>>,
}

/// Why a request, or one of its images, was not answered.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no place for the request, or its images.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// The expert set is not to be had.
    #[error(transparent)]
    Set(#[from] SetError),
    /// The image is not one, or is broken or too large.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The image came in a form that cannot be read.
    #[error("{0}")]
    Form(String),
    /// Prepared pixels are not of the model's size.
    #[error("expert set `{set}` takes {side}x{side} pixels")]
    Side {
        set: String,
        /// Pixels along one side of its input.
        side: usize,
    },
    /// What came out of the model is no number.
    #[error(
        "expert set `{set}` gives no finite number for this image; its weights or the image's values are too large"
    )]
    NotFinite { set: String },
    #[error("the request could not be answered in time")]
    Deadline,
    /// The server is shutting down.
    #[error("{0}; try again later")]
    Closed(#[from] Closed),
    #[error("{0}")]
    Internal(String),
}

impl From<DecodeError> for Error {
    fn from(error: DecodeError) -> Self {
        match error {
            DecodeError::Image(error) => Self::Image(error),
            DecodeError::Internal(cause) => Self::Internal(cause.to_owned()),
        }
    }
}

impl Error {
    /// How an image fared that got this error.
    fn image_result(&self) -> ImageResult {
        match self {
            Self::Image(ImageError::Stopped)
            | Self::Refused(_)
            | Self::Set(_)
            | Self::NotFinite { .. }
            | Self::Deadline
            | Self::Closed(_)
            | Self::Internal(_) => ImageResult::Failed,
            Self::Image(_) | Self::Form(_) | Self::Side { .. } => ImageResult::BadImage,
        }
    }
}

impl Classifier {
    /// Answers the images of a request that was let in: finds their expert set, decodes them, and runs the model.
    ///
    /// # Errors
    /// What stops the request as a whole; the error of one image stands in its place.
    pub async fn answer(&self, entry: &mut Entry, request: Request) -> Result<Answers, Error> {
        let (set, version, count) = (request.set.clone(), request.version, request.images.len());
        let (started, deadline) = (request.started, request.deadline);
        let answers = timeout_at(deadline, self.answer_in_time(entry, request)).await;
        let answers = answers.unwrap_or(Err(Error::Deadline));
        let elapsed = milliseconds(started.elapsed());
        match &answers {
            Ok(Answers { lease, images }) => {
                self.count(&set, images);
                self.count_answers(&set, lease, images);
                let timings = images.iter().map(|image| image.as_ref().ok().map(|answer| answer.timings));
                self.statistics.record(&set, lease.descriptor.version, timings, elapsed);
            }
            Err(_) => {
                // Labels made by clients would grow memory without end.
                let registered = self.registry.lookup(&set, None).is_ok().then_some(set.as_str());
                self.metrics.count_images(registered, ImageResult::Failed, count);
                if let Ok(target) = self.registry.lookup(&set, version) {
                    self.statistics.record_failure(&set, target.set.version, elapsed);
                }
            }
        }
        answers
    }

    async fn answer_in_time(&self, entry: &mut Entry, request: Request) -> Result<Answers, Error> {
        let Request { set, version, images, routing, look, min_score, started, deadline } = request;
        entry.charge(images.len())?;
        let wait = self.load_wait.min(deadline.saturating_duration_since(Instant::now()));
        let lease = self.registry.acquire(&set, version, wait).await?;
        // Places that are still taken for clients who have gone are given up first.
        let places =
            entry.images(&set, images.len(), lease.backbone.value.input_bytes(), || self.pipeline.drop_dead())?;

        let keeper = self.examples.as_ref().filter(|examples| examples.keeps_unsure());
        let pictures: Vec<Option<Bytes>> = images.iter().map(|image| keeper.and(encoded(image))).collect();
        let prepared = join_all(images.into_iter().map(|image| self.prepare(&lease, image, look))).await;

        let mut jobs = Vec::new();
        let mut slots = Vec::with_capacity(prepared.len());
        for (image, permit) in prepared.into_iter().zip(places) {
            slots.push(image.map(|(Prepared { pixels, seen, is_flat }, decode)| {
                jobs.push(Job { lease: lease.clone(), pixels, routing, deadline: deadline.into_std(), permit });
                Before { seen, is_flat, min_score, decode }
            }));
        }
        let mut receivers = self.pipeline.submit(jobs)?.into_iter();

        let mut answers = Vec::with_capacity(slots.len());
        for slot in slots {
            answers.push(match slot {
                Ok(before) => match receivers.next() {
                    Some(receiver) => finish(receiver.await, before, started, &lease.descriptor.name),
                    None => Err(Error::Internal("an image has no receiver".into())),
                },
                Err(error) => Err(error),
            });
        }
        if let Some(keeper) = keeper {
            for (answer, picture) in answers.iter().zip(pictures) {
                let reason = answer.as_ref().ok().and_then(|answer| answer.verdict.reason);
                // A frame that shows nothing teaches nothing.
                if let (Some(reason @ (Reason::Unfamiliar | Reason::Unsure)), Some(picture)) = (reason, picture) {
                    keeper.keep_unsure(&set, reason, &picture);
                }
            }
        }
        Ok(Answers { lease, images: answers })
    }

    /// The model's input, with the time it took.
    async fn prepare(
        &self,
        lease: &SetLease,
        image: Result<Image, Error>,
        look: Look,
    ) -> Result<(Prepared, Duration), Error> {
        let started = Instant::now();
        let model = &lease.backbone.value;
        let side = model.config().image_size;
        let input = || Input { preprocess: model.preprocess().clone(), side, view: look.of(lease.value.view()) };
        let prepared = match image? {
            Image::Encoded(bytes) => self.decoder.decode(bytes, input()).await?,
            Image::Rgb(image) => self.decoder.fit(image, input()).await?,
            Image::Prepared(_) if look != Look::default() => {
                let reason = "`crop` and `fit` are of pictures; nothing can be cut out of the model's own input";
                return Err(Error::Form(reason.into()));
            }
            Image::Prepared(pixels) if pixels.len() == side * side * 3 => {
                Prepared { pixels, seen: None, is_flat: false }
            }
            Image::Prepared(_) => return Err(Error::Side { set: lease.descriptor.name.clone(), side }),
        };
        Ok((prepared, started.elapsed()))
    }

    fn count(&self, set: &str, images: &[Result<Answer, Error>]) {
        let result =
            |image: &Result<Answer, Error>| image.as_ref().map_or_else(Error::image_result, |_| ImageResult::Ok);
        for wanted in ImageResult::ALL {
            let count = images.iter().filter(|image| result(image) == wanted).count();
            self.metrics.count_images(Some(set), wanted, count);
        }
        for reason in images.iter().flatten().filter_map(|answer| answer.verdict.reason) {
            self.metrics.count_unknown(set, reason);
        }
    }
}

impl Classifier {
    /// Counts best labels and their scores.
    fn count_answers(&self, set: &str, lease: &SetLease, images: &[Result<Answer, Error>]) {
        let labels = lease.value.labels();
        self.metrics.declare_answers(set, labels);
        for answer in images.iter().flatten() {
            let is_unknown = answer.verdict.unknown == Some(true);
            let label = best(&answer.logits).and_then(|best| labels.get(best)).filter(|_| !is_unknown);
            self.metrics.count_answer(set, label.map(String::as_str), best_score(&answer.logits));
        }
    }
}

/// The file of an image, if it came as one.
fn encoded(image: &Result<Image, Error>) -> Option<Bytes> {
    match image {
        Ok(Image::Encoded(bytes)) => Some(bytes.clone()),
        _ => None,
    }
}

/// What is known of an image before the model runs.
struct Before {
    seen: Option<Seen>,
    is_flat: bool,
    min_score: Option<MinScore>,
    /// Time it took to get there.
    decode: Duration,
}

fn finish(
    reply: Result<Result<Answer, ForwardFailed>, RecvError>,
    before: Before,
    started: Instant,
    set: &str,
) -> Result<Answer, Error> {
    let mut answer = match reply {
        Ok(Ok(answer)) => answer,
        Ok(Err(ForwardFailed)) => return Err(Error::Internal("the forward pass failed".into())),
        // The queue drops only images whose deadline has passed.
        Err(_) => return Err(Error::Deadline),
    };
    if !answer.logits.iter().all(|logit| logit.is_finite()) {
        // JSON has no word for such numbers, and a score made of them means nothing.
        if let Some(repeated) = REPEATS.admit("not finite") {
            tracing::error!(set.name = set, repeated, "an expert set gives numbers that are not finite");
        }
        return Err(Error::NotFinite { set: set.to_owned() });
    }
    let evidence =
        Evidence { is_flat: before.is_flat, is_familiar: answer.is_familiar, best_score: best_score(&answer.logits) };
    answer.verdict = evidence.decide(before.min_score);
    answer.seen = before.seen;
    answer.timings.decode = milliseconds(before.decode);
    answer.timings.total = milliseconds(started.elapsed());
    Ok(answer)
}

/// One label with its score.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct Prediction {
    pub label: String,
    /// Softmax over all labels of the set, unless another function was asked for.
    pub score: f32,
    /// The label's place in the set.
    pub index: usize,
}

/// The `top_k` best labels with their softmax scores, best first; ties in label order.
pub fn predictions(logits: &[f32], labels: &[String], top_k: usize) -> Vec<Prediction> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let exponentials: Vec<f32> = logits.iter().map(|logit| (logit - max).exp()).collect();
    let sum: f32 = exponentials.iter().sum();
    let mut order: Vec<usize> = (0..logits.len().min(labels.len())).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
    order.truncate(top_k);
    let prediction =
        |index: usize| Prediction { label: labels[index].clone(), score: exponentials[index] / sum, index };
    order.into_iter().map(prediction).collect()
}

/// The place of the best label; ties in label order.
fn best(logits: &[f32]) -> Option<usize> {
    let best = logits.iter().enumerate().max_by(|(a, left), (b, right)| left.total_cmp(right).then(b.cmp(a)));
    best.map(|(index, _)| index)
}

/// The softmax score of the best label.
fn best_score(logits: &[f32]) -> f32 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    logits.iter().map(|logit| (logit - max).exp()).sum::<f32>().recip()
}

/// What turns logits into scores.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
#[schema(rename_all = "lowercase")]
pub enum ScoreFunction {
    /// All scores together are 1.
    #[default]
    Softmax,
    /// Each by itself, between 0 and 1.
    Sigmoid,
    /// The logits themselves, of any size.
    None,
}

impl ScoreFunction {
    /// As [`predictions`], with the scores of this function. The order is the same for all.
    pub fn predictions(self, logits: &[f32], labels: &[String], top_k: usize) -> Vec<Prediction> {
        let mut found = predictions(logits, labels, top_k);
        for prediction in &mut found {
            match self {
                Self::Softmax => {}
                Self::Sigmoid => prediction.score = 1.0 / (1.0 + (-logits[prediction.index]).exp()),
                Self::None => prediction.score = logits[prediction.index],
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::statistics::Timings;
    use crate::verdict::Verdict;

    #[test]
    fn numbers_that_are_not_finite_are_an_error_with_a_reason() {
        for (logit, is_good) in [(1.0, true), (f32::NAN, false), (f32::INFINITY, false), (f32::NEG_INFINITY, false)] {
            let answer = Answer {
                logits: vec![0.0, logit],
                routing: None,
                is_familiar: None,
                seen: None,
                verdict: Verdict::default(),
                timings: Timings::default(),
            };
            let before = Before { seen: None, is_flat: false, min_score: None, decode: Duration::ZERO };
            let finished = finish(Ok(Ok(answer)), before, Instant::now(), "flowers");
            match finished {
                Ok(_) => assert!(is_good, "{logit}"),
                Err(error) => {
                    assert!(!is_good && error.to_string().contains("`flowers`"), "{logit}: {error}");
                    assert_eq!(error.image_result(), ImageResult::Failed);
                }
            }
        }
    }

    #[test]
    fn predictions_are_softmax_descending_and_cut() {
        let labels: Vec<String> = ["a", "b", "c"].map(str::to_owned).to_vec();
        let all = predictions(&[1.0, 3.0, 2.0], &labels, 9);
        assert_eq!(all.iter().map(|p| p.index).collect::<Vec<_>>(), [1, 2, 0]);
        assert!((all.iter().map(|p| p.score).sum::<f32>() - 1.0).abs() < 1e-6);
        assert_eq!(predictions(&[1.0, 3.0, 2.0], &labels, 1), all[..1]);
        assert_eq!((best(&[1.0, 3.0, 3.0]), best(&[])), (Some(1), None));
        let scores = |function: ScoreFunction| {
            let found = function.predictions(&[1.0, 3.0, 2.0], &labels, 3);
            found.iter().map(|p| p.score).collect::<Vec<_>>()
        };
        assert_eq!(scores(ScoreFunction::None), [3.0, 2.0, 1.0]);
        assert!(scores(ScoreFunction::Sigmoid).iter().zip([0.9526, 0.8808, 0.7311]).all(|(a, b)| (a - b).abs() < 1e-4));
        assert_eq!(scores(ScoreFunction::Softmax), all.iter().map(|p| p.score).collect::<Vec<_>>());
        assert_eq!(predictions(&[500.0, 500.0, -500.0], &labels, 1)[0].index, 0, "ties in label order, no overflow");
    }
}
