//! Checks of what a document says, whatever its version.

use super::Parts;
use crate::artifact::contents::{
    BackboneHeader, BackgroundSource, Card, Contents, CovarianceForm, ExpertSetHeader, FamiliarityConfig,
    MAX_TEXT_BYTES, StatisticsFormat,
};
use crate::artifact::error::ArtifactError;
use crate::config::{ConfigError, MAX_SIZE};
use crate::image::{Crop, Preprocess, View};

/// Most bytes of a text of the model card.
const MAX_CARD_BYTES: usize = 4096;

/// Most rows of a background's factor: reading takes time that grows with their cube.
const MAX_BACKGROUND_RANK: usize = 256;
/// Most rows of the factor of an even covariance, for the same reason.
const MAX_EVEN_RANK: usize = 256;

pub(super) fn parts((name, contents, _): &Parts) -> Result<(), ArtifactError> {
    text("name", name)?;
    match contents {
        Contents::Backbone(header) => backbone(header),
        Contents::ExpertSet(header) => expert_set(header),
    }
}

fn backbone(header: &BackboneHeader) -> Result<(), ArtifactError> {
    let BackboneHeader { config, encoding, preprocess: pixels, background, card } = header;
    config.validate()?;
    if encoding.stem.len() != config.stem.len() {
        let reason = format!("{} layers, but the stem has {}", encoding.stem.len(), config.stem.len());
        return Err(ArtifactError::Field { field: "encoding.stem", reason });
    }
    preprocess(pixels)?;
    if let Some(BackgroundSource { source, rank, .. }) = background {
        card_text("background.source", source)?;
        let most = config.d_model.min(MAX_BACKGROUND_RANK);
        if let Some(rank) = rank.filter(|rank| *rank > most) {
            let reason = format!("{rank} is not in 0..={most}");
            return Err(ArtifactError::Field { field: "background.rank", reason });
        }
    }
    model_card(card.as_ref())
}

fn expert_set(header: &ExpertSetHeader) -> Result<(), ArtifactError> {
    header.backbone.validate()?;
    header.config.validate(&header.backbone)?;
    let classes = header.labels.len();
    if !(1..=MAX_SIZE).contains(&classes) {
        let reason = format!("{classes} is not in 1..={MAX_SIZE}");
        return Err(ConfigError { field: "num_classes", reason }.into());
    }
    labels(&header.labels)?;
    number("temperature", header.temperature, 0.01..=100.0)?;
    projection(header)?;
    header.familiarity.as_ref().map_or(Ok(()), |statistics| known(statistics, header.features()))?;
    looks_at(&header.view)?;
    model_card(header.card.as_ref())
}

/// Fewer features than there are; statistics of other forms than `even` are of all features.
fn projection(header: &ExpertSetHeader) -> Result<(), ArtifactError> {
    let Some(projection) = header.projection else { return Ok(()) };
    let (features, d_model) = (projection.features(), header.backbone.d_model);
    if features == 0 || features >= d_model {
        let reason = format!("{features} is not in 1..{d_model}, which is `d_model`");
        return Err(ArtifactError::Field { field: "projection.features", reason });
    }
    let even = |statistics: &FamiliarityConfig| matches!(statistics.covariance, CovarianceForm::Even { .. });
    if header.familiarity.as_ref().is_some_and(|statistics| !even(statistics)) {
        let reason = "statistics of projected features have the covariance `even`".to_owned();
        return Err(ArtifactError::Field { field: "projection", reason });
    }
    Ok(())
}

fn text(field: &'static str, text: &str) -> Result<(), ArtifactError> {
    let reason = if text.is_empty() {
        "it is empty".to_owned()
    } else if text.len() > MAX_TEXT_BYTES {
        format!("it has {} bytes, more than {MAX_TEXT_BYTES}", text.len())
    } else if text.chars().any(char::is_control) {
        format!("{text:?} contains a control character")
    } else {
        return Ok(());
    };
    Err(ArtifactError::Field { field, reason })
}

fn card_text(field: &'static str, text: &str) -> Result<(), ArtifactError> {
    let reason = if text.len() > MAX_CARD_BYTES {
        format!("it has {} bytes, more than {MAX_CARD_BYTES}", text.len())
    } else if text.chars().any(|c| c.is_control() && c != '\n') {
        "it contains a control character other than a line feed".to_owned()
    } else {
        return Ok(());
    };
    Err(ArtifactError::Field { field, reason })
}

fn model_card(card: Option<&Card>) -> Result<(), ArtifactError> {
    let Some(Card { licence, origin, data }) = card else { return Ok(()) };
    card_text("card.licence", licence)?;
    card_text("card.origin", origin)?;
    card_text("card.data", data)
}

fn number(field: &'static str, value: f32, range: std::ops::RangeInclusive<f32>) -> Result<(), ArtifactError> {
    // A comparison that also fails for NaN.
    if range.contains(&value) {
        return Ok(());
    }
    Err(ArtifactError::Field { field, reason: format!("{value} is not in {range:?}") })
}

/// Bounds that keep every pixel a reasonable finite number.
fn preprocess(preprocess: &Preprocess) -> Result<(), ArtifactError> {
    let Preprocess { mean, std, reduction, .. } = preprocess;
    mean.iter().try_for_each(|&value| number("preprocess.mean", value, -10.0..=10.0))?;
    std.iter().try_for_each(|&value| number("preprocess.std", value, 1e-3..=10.0))?;
    number("preprocess.reduction", *reduction, 1.0..=64.0)
}

fn labels(labels: &[String]) -> Result<(), ArtifactError> {
    labels.iter().try_for_each(|label| text("labels", label))?;
    let mut sorted: Vec<&str> = labels.iter().map(String::as_str).collect();
    sorted.sort_unstable();
    match sorted.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(ArtifactError::Field { field: "labels", reason: format!("{:?} occurs twice", pair[0]) }),
        None => Ok(()),
    }
}

fn known(statistics: &FamiliarityConfig, d_model: usize) -> Result<(), ArtifactError> {
    let FamiliarityConfig { format, means, covariance, relative, threshold, pass_share } = *statistics;
    let count = |field, value: usize, most: usize, least: usize| {
        let reason = || format!("{value} is not in {least}..={most}");
        if (least..=most).contains(&value) { Ok(()) } else { Err(ArtifactError::Field { field, reason: reason() }) }
    };
    count("familiarity.means", means, MAX_SIZE, 1)?;
    match covariance {
        CovarianceForm::Packed => {}
        CovarianceForm::Diagonal { rank } => count("familiarity.covariance.rank", rank, d_model, 0)?,
        CovarianceForm::Background { scale, rank } => {
            count("familiarity.covariance.rank", rank, d_model, 0)?;
            number("familiarity.covariance.scale", scale, 1e-6..=1e6)?;
        }
        CovarianceForm::Even { scale, rank } => {
            count("familiarity.covariance.rank", rank, d_model.min(MAX_EVEN_RANK), 0)?;
            number("familiarity.covariance.scale", scale, 1e-6..=1e6)?;
        }
    }
    let is_even = matches!(covariance, CovarianceForm::Even { .. });
    if is_even != (format == StatisticsFormat::Int4) {
        let reason = "`int4` goes with the covariance `even`, and with no other".to_owned();
        return Err(ArtifactError::Field { field: "familiarity.format", reason });
    }
    if is_even && relative {
        let reason = "the covariance `even` is of scaled features, and those of the background are not".to_owned();
        return Err(ArtifactError::Field { field: "familiarity.relative", reason });
    }
    number("familiarity.threshold", threshold, f32::MIN..=f32::MAX)?;
    number("familiarity.pass_share", pass_share, 0.0..=1.0)
}

fn looks_at(view: &View) -> Result<(), ArtifactError> {
    let crop = Crop::new(view.crop, true);
    crop.map(drop).map_err(|error| ArtifactError::Field { field: "view.crop", reason: error.to_string() })
}
