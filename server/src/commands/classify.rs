//! `butterflyvit classify`: labels for image files, without a server.

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use model_core::engine::Crew;
use model_core::image::{DecodeLimits, Seen};
use serde::Serialize;
use tokio::time::Instant;

use crate::admission::{Admission, Ceilings, Client, ImageLimits, Shares};
use crate::classify::{Classifier, Image, Look, Prediction, Request, predictions};
use crate::compute::Pipeline;
use crate::compute::decode::Decoder;
use crate::compute::queue::QueueSettings;
use crate::config::{ClassifyArgs, ModelArgs};
use crate::keys::Caller;
use crate::metrics::Metrics;
use crate::sets::descriptor::{BackboneDescriptor, SetDescriptor};
use crate::sets::loaded::{Answer, ArtifactSource};
use crate::sets::registry::{self, Registry};
use crate::sets::store::{self, Broken};
use crate::statistics::Statistics;
use crate::threads::{BlockingPool, Priority};
use crate::verdict::Verdict;

/// Longest time for one file. A file has no client that waits.
const DAY: Duration = Duration::from_secs(86400);

/// Classifies every file; one that cannot be classified is reported and makes the exit code 1.
///
/// # Errors
/// Names what is wrong with the model.
pub fn run(args: &ClassifyArgs) -> anyhow::Result<ExitCode> {
    let (backbone, sets) = find(&args.models, args.set.as_deref())?;
    let set = sets.last().context("no expert set")?.clone();
    let classifier = classifier(args, backbone, sets)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build()?;
    let mut out = std::io::stdout().lock();
    let mut exit = ExitCode::SUCCESS;
    runtime.block_on(async {
        let lease = classifier.registry.load(&set.name, Some(set.version), DAY).await?;
        for file in &args.files {
            match answer(&classifier, &set, file, args).await {
                Ok(answer) => {
                    print(&mut out, args, &set, lease.value.labels(), file, &answer).context("standard output")?;
                }
                Err(reason) => {
                    eprintln!("butterflyvit: {}: {reason}", file.display());
                    exit = ExitCode::FAILURE;
                }
            }
        }
        Ok(exit)
    })
}

/// The set asked for, or the one a server would use by default; its newest version, with its backbone. Before it comes the
/// set whose experts it borrows, if it does.
fn find(models: &ModelArgs, set: Option<&str>) -> anyhow::Result<(BackboneDescriptor, Vec<SetDescriptor>)> {
    let (mut contents, default) = match &models.model_store {
        Some(root) => (store::scan(root)?, None),
        None => (store::embedded()?, Some(store::EMBEDDED_DEFAULT)),
    };
    contents.sets.sort_by(|a, b| (&a.name, b.version).cmp(&(&b.name, a.version)));
    let wanted = set.or(models.default_set.as_deref()).or(default);
    let found = contents.sets.iter().find(|set| wanted.is_none_or(|wanted| wanted == set.name)).cloned();
    let broken = &contents.broken;
    let found = found.with_context(|| match wanted {
        Some(name) => missing(format!("there is no expert set `{name}`"), broken),
        None => missing("the model store holds no expert set".to_owned(), broken),
    })?;
    let place = &found.location;
    let backbone = contents.backbones.into_iter().find(|backbone| backbone.digest == found.backbone);
    let backbone = backbone.with_context(|| {
        missing(format!("{place}: bound to backbone {}, which is not here", found.backbone), broken)
    })?;
    let lender = match found.lender {
        None => None,
        Some(digest) => Some(contents.sets.iter().find(|set| set.digest == digest).cloned().with_context(|| {
            missing(format!("{place}: borrows the experts of set {digest}, which is not here"), broken)
        })?),
    };
    Ok((backbone, lender.into_iter().chain([found]).collect()))
}

/// What is not there, and the broken files of the store, one of which it may be.
fn missing(what: String, broken: &[Broken]) -> String {
    const NAMED: usize = 3;
    let reasons = broken.iter().take(NAMED).map(|broken| broken.reason.as_str());
    let more = broken.len().saturating_sub(NAMED);
    let more = (more > 0).then(|| format!("and {more} more files are broken"));
    std::iter::once(what.as_str()).chain(reasons).chain(more.as_deref()).collect::<Vec<_>>().join("; ")
}

/// A classifier for one caller and these sets, whatever memory they take.
fn classifier(
    args: &ClassifyArgs,
    backbone: BackboneDescriptor,
    sets: Vec<SetDescriptor>,
) -> anyhow::Result<Classifier> {
    let metrics = Arc::new(Metrics::new(false)?);
    let (crew, members) = Crew::new(1);
    let source = ArtifactSource { crew, max_batch: 1, queue_bytes: usize::MAX };
    let settings = registry::Settings { budget_bytes: usize::MAX, ..registry::Settings::default() };
    let loader = BlockingPool::start("load", 1, Priority::Normal)?;
    let registry = Registry::new(source, settings, loader, metrics.sets().clone())?;
    registry.register_backbone(backbone);
    sets.into_iter().try_for_each(|set| registry.register(set))?;
    let limits = DecodeLimits { max_pixels: args.max_pixels, ..DecodeLimits::default() };
    let batching = QueueSettings { max_batch: 1, max_wait: Duration::ZERO, threads: 1 };
    let images = ImageLimits { images: 1, bytes: usize::MAX, images_per_set: 1, images_when_busy: 1 };
    let admission = Admission::new(1, 0, images, Shares::new(Ceilings::NONE, None));
    admission.lifecycle.set_ready();
    let pipeline = Pipeline::new(batching, members);
    pipeline.start(&metrics, |_| Ok(()))?;
    Ok(Classifier {
        registry,
        decoder: Decoder::start(1, limits.max_bytes as usize, limits, Arc::clone(&metrics))?,
        pipeline,
        admission,
        metrics,
        statistics: Statistics::default(),
        load_wait: DAY,
        examples: None,
    })
}

/// The answer for a file, or the reason why there is none.
async fn answer(
    classifier: &Classifier,
    set: &SetDescriptor,
    file: &Path,
    args: &ClassifyArgs,
) -> anyhow::Result<Answer> {
    let bytes = model_core::artifact::read_file(file)?;
    let started = Instant::now();
    let request = Request {
        set: set.name.clone(),
        version: Some(set.version),
        images: vec![Ok(Image::Encoded(bytes.into()))],
        routing: false,
        look: Look { crop: args.crop, fit: args.fit },
        min_score: args.min_score,
        started,
        deadline: started + DAY,
    };
    let mut entry = classifier.admission.enter(&Caller::default(), Client::UNKNOWN)?;
    let mut answers = classifier.answer(&mut entry, request).await?;
    Ok(answers.images.pop().context("the image has no answer")??)
}

/// A file's line of JSON. Scores have the digits that HTTP answers have, which a detour over `Value` would lengthen.
#[derive(Serialize)]
struct Classified<'a> {
    file: &'a str,
    set: &'a str,
    version: u64,
    generation: &'a str,
    predictions: &'a [Prediction],
    #[serde(flatten)]
    verdict: Verdict,
    seen: Option<Seen>,
    #[serde(skip_serializing_if = "Option::is_none")]
    logits: Option<&'a [f32]>,
}

fn print(
    out: &mut impl Write,
    args: &ClassifyArgs,
    set: &SetDescriptor,
    labels: &[String],
    file: &Path,
    answer: &Answer,
) -> std::io::Result<()> {
    let logits = &answer.logits[..];
    let predictions = predictions(logits, labels, args.top_k);
    if args.json {
        let document = Classified {
            file: &file.display().to_string(),
            set: &set.name,
            version: set.version,
            generation: &set.generation(),
            predictions: &predictions,
            verdict: answer.verdict,
            seen: answer.seen,
            logits: args.logits.then_some(logits),
        };
        return writeln!(out, "{}", serde_json::to_string(&document)?);
    }
    match answer.verdict.reason {
        Some(reason) => writeln!(out, "{}: unknown, {}", file.display(), reason.as_str())?,
        None => writeln!(out, "{}", file.display())?,
    }
    for prediction in &predictions {
        writeln!(out, "  {:>6.2}%  {}", prediction.score * 100.0, prediction.label)?;
    }
    if args.logits {
        writeln!(out, "  logits {logits:?}")?;
    }
    Ok(())
}
