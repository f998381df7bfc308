//! One recipe, several variants of the model, several seeds: what each choice costs in accuracy and saves in memory.
//!
//! Every run is an ordinary run folder, `OUT/VARIANT-seed-N`, so an interrupted comparison goes on where it was, and a
//! variant added later reuses what is there. Runs differ in nothing but the variant's own change and the seed.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::path::Path;

use anyhow::{Context, Result};
use clap::ValueEnum;
use model_core::config::{FeedForwardKind, ViTConfig};
use model_core::footprint::{layer_bytes, runtime_compression};
use model_core::random::AngleSpread;
use model_core::weights::StemWeights;
use serde::{Deserialize, Serialize};
use training::ops::Activations;

use crate::files::write_atomically;
use crate::recipe::Recipe;

mod memory;
mod paired;
mod pictures;

pub use paired::Paired;

/// A change to the recipe.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Variant {
    /// The recipe as it is.
    Butterfly,
    /// As many experts behind the same router, each with fp32 matrices of its own.
    DenseExperts,
    /// A single fp32 feed-forward layer in each block, no router.
    Dense,
    /// Without spatial smoothness and contiguity losses.
    NoSmoothness,
    /// Angles stay where they started.
    FrozenAngles,
    /// Angles move at ten times the learning rate.
    AngleRate10,
    /// Angles move at thirty times the learning rate.
    AngleRate30,
    /// Angles start anywhere on the circle.
    UniformAngles,
    /// The same, and they move at thirty times the learning rate.
    UniformAngleRate30,
    /// The same, and they stay there.
    UniformFrozenAngles,
    /// Routers move at a tenth of the learning rate.
    #[value(name = "router-rate0.1")]
    #[serde(rename = "router-rate0.1")]
    RouterRateTenth,
    /// Routers move at ten times the learning rate.
    RouterRate10,
    /// Experts are drawn from the router's probabilities in training.
    RouterNoise,
    /// One expert for each token.
    Top1,
    /// As many experts, each with ternary matrices of its own. Cannot be served.
    TernaryExperts,
    /// As many experts, each with 4-bit matrices of its own. Cannot be served.
    Int4Experts,
    /// As many experts, each with 8-bit matrices of its own. Cannot be served.
    Int8Experts,
    /// As many experts, each with fp32 matrices of low rank of its own. Cannot be served.
    LowRankExperts,
    /// A hidden layer four times as wide.
    Wide,
    /// Two stages in both rotations.
    Stages2,
    /// Four stages in both rotations.
    Stages4,
    /// As many stages as the sizes allow.
    StagesAll,
    /// With an out rotation of four stages.
    OutRotation,
    /// 4-bit angle codes.
    Angles4,
    /// 6-bit angle codes.
    Angles6,
    /// 8-bit angle codes.
    Angles8,
    /// 16-bit angle codes.
    Angles16,
    /// 8-bit router codes.
    Router8,
    /// 16-bit router codes.
    Router16,
    /// A gain per expert and feature behind `up`. Cannot be served.
    Gains,
    /// `down` is the transpose of `up`. Cannot be served.
    Tied,
    /// Float activations at the substrates instead of int8. Cannot be served.
    FloatActivations,
}

impl Variant {
    pub fn apply(self, recipe: &mut Recipe) {
        let (d_model, d_ff) = (recipe.model.backbone.d_model, recipe.model.backbone.d_ff);
        let experts = &mut recipe.model.experts;
        let mut stages = |most: u32| {
            experts.stages_in = d_model.trailing_zeros().min(most) as usize;
            experts.stages_hidden = d_ff.trailing_zeros().min(most) as usize;
        };
        match self {
            Self::Butterfly => {}
            Self::DenseExperts => recipe.feed_forward = FeedForwardKind::DenseExperts,
            Self::Dense => recipe.feed_forward = FeedForwardKind::Dense,
            Self::NoSmoothness => (recipe.losses.smoothness, recipe.losses.contiguity) = (0.0, 0.0),
            Self::FrozenAngles => recipe.optimizer.angle_rate = 0.0,
            Self::AngleRate10 => recipe.optimizer.angle_rate = 10.0,
            Self::AngleRate30 => recipe.optimizer.angle_rate = 30.0,
            Self::UniformAngles => recipe.angle_spread = AngleSpread::Uniform,
            Self::UniformAngleRate30 => {
                (recipe.angle_spread, recipe.optimizer.angle_rate) = (AngleSpread::Uniform, 30.0);
            }
            Self::UniformFrozenAngles => {
                (recipe.angle_spread, recipe.optimizer.angle_rate) = (AngleSpread::Uniform, 0.0);
            }
            Self::RouterRateTenth => recipe.optimizer.router_rate = 0.1,
            Self::RouterRate10 => recipe.optimizer.router_rate = 10.0,
            Self::RouterNoise => recipe.router_noise = 1.0,
            Self::Top1 => experts.top_k = 1,
            Self::TernaryExperts => recipe.feed_forward = FeedForwardKind::TernaryExperts,
            Self::Int4Experts => recipe.feed_forward = FeedForwardKind::Int4Experts,
            Self::Int8Experts => recipe.feed_forward = FeedForwardKind::Int8Experts,
            Self::LowRankExperts => recipe.feed_forward = FeedForwardKind::LowRankExperts,
            Self::Wide => recipe.model.backbone.d_ff *= 4,
            Self::Stages2 => stages(2),
            Self::Stages4 => stages(4),
            Self::StagesAll => stages(16),
            Self::OutRotation => experts.stages_out = d_model.trailing_zeros().min(4) as usize,
            Self::Angles4 => experts.angle_bits = 4,
            Self::Angles6 => experts.angle_bits = 6,
            Self::Angles8 => experts.angle_bits = 8,
            Self::Angles16 => experts.angle_bits = 16,
            Self::Router8 => experts.router_bits = 8,
            Self::Router16 => experts.router_bits = 16,
            Self::Gains => recipe.feed_forward = FeedForwardKind::ButterflyGains,
            Self::Tied => recipe.feed_forward = FeedForwardKind::ButterflyTied,
            Self::FloatActivations => recipe.activations = Activations::Float,
        }
    }

    /// As on the command line.
    pub fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
    }
}

/// What one run came to.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    pub variant: Variant,
    /// The whole recipe with it.
    pub recipe: Recipe,
    pub parameters: usize,
    /// On the test part, by the integer path where the variant can be served.
    pub top1: f64,
    pub top5: f64,
    /// Of every image of the test part whether its label came first.
    pub right: Vec<bool>,
    /// Share of chosen experts that neighbouring patches have in common, on the test part; none without routers.
    pub routing_agreement: Option<f64>,
    /// The same of patches half the grid apart.
    pub far_agreement: Option<f64>,
    /// Training speed, over the whole run.
    pub images_per_second: f64,
    /// Share of all choices that went to each expert, layer by layer; empty without routers.
    pub load: Vec<Vec<f64>>,
    /// Some images of the test part and where their patches went; none without routers.
    pub sample: Option<Sample>,
}

/// Routing maps of a few images.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    /// Side of the images in pixels.
    pub side: usize,
    /// `[images, side, side, 3]`.
    pub images: Vec<u8>,
    /// Side of the grid of patches.
    pub grid_side: usize,
    /// For every layer the expert that each patch went to first, `[images, tokens]`.
    pub first_choices: Vec<Vec<u16>>,
}

/// Images in a [`Sample`].
pub const SAMPLE_IMAGES: usize = 6;

/// All runs of one variant. Accuracies, agreements and rates are means over the seeds.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Row {
    pub variant: Variant,
    pub seeds: usize,
    pub top1: f64,
    /// Accuracy of the worst seed.
    pub top1_lowest: f64,
    /// Accuracy of the best seed.
    pub top1_highest: f64,
    pub top5: f64,
    pub routing_agreement: Option<f64>,
    pub far_agreement: Option<f64>,
    /// `routing_agreement` minus `far_agreement`: what is due to patches' being neighbours.
    pub smoothness: Option<f64>,
    /// Against [`Variant::Butterfly`], or the first variant where that was not trained; none for itself.
    pub paired: Option<Paired>,
    /// Learning rate after the warm-up.
    pub learning_rate: f64,
    /// The measured path: the integer engine, or the candle model.
    pub path: &'static str,
    pub parameters: usize,
    /// Bytes of all feed-forward layers as the paper counts them.
    pub paper_bytes: f64,
    /// Bytes of all feed-forward layers at run time, everything counted.
    pub runtime_bytes: f64,
    /// Dense fp32 experts with router over `runtime_bytes`.
    pub runtime_ratio: f64,
    pub images_per_second: f64,
}

/// Gathers outcomes by variant.
pub fn rows(outcomes: &[Outcome]) -> Vec<Row> {
    let variants: BTreeSet<Variant> = outcomes.iter().map(|outcome| outcome.variant).collect();
    let against = variants.first().copied();
    let row = |variant: Variant| {
        let runs: Vec<&Outcome> = outcomes.iter().filter(|outcome| outcome.variant == variant).collect();
        let mean = |value: fn(&Outcome) -> f64| runs.iter().map(|run| value(run)).sum::<f64>() / runs.len() as f64;
        let highest = runs.iter().map(|run| run.top1).fold(f64::MIN, f64::max);
        let lowest = runs.iter().map(|run| run.top1).fold(f64::MAX, f64::min);
        let recipe = &runs[0].recipe;
        let (backbone, experts) = (&recipe.model.backbone, &recipe.model.experts);
        let layers = backbone.num_layers as f64;
        let shared = |value: fn(&Outcome) -> Option<f64>| {
            let values: Vec<f64> = runs.iter().filter_map(|run| value(run)).collect();
            (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
        };
        let (near, far) = (shared(|run| run.routing_agreement), shared(|run| run.far_agreement));
        let (paper_bytes, runtime_bytes) = layer_bytes(recipe.feed_forward, &backbone.shape(), experts);
        Row {
            variant,
            seeds: runs.len(),
            top1: mean(|run| run.top1),
            top1_lowest: lowest,
            top1_highest: highest,
            top5: mean(|run| run.top5),
            routing_agreement: near,
            far_agreement: far,
            smoothness: near.zip(far).map(|(near, far)| near - far),
            paired: against
                .filter(|against| *against != variant)
                .and_then(|against| Paired::new(outcomes, variant, against)),
            learning_rate: recipe.learning_rate,
            path: if recipe.is_servable() { "integer" } else { "float" },
            parameters: runs[0].parameters,
            paper_bytes: layers * paper_bytes,
            runtime_bytes: layers * runtime_bytes,
            runtime_ratio: runtime_compression(&backbone.shape(), experts).dense_bytes / runtime_bytes,
            images_per_second: mean(|run| run.images_per_second),
        }
    };
    variants.into_iter().map(row).collect()
}

/// Writes tables (`table.md`, `table.json`, `memory.json`) and pictures (`accuracy-memory.png`, `memory-experts.png`,
/// `routing-maps.png`, `expert-utilisation.png`) into `folder`, and returns the main table.
pub fn write(folder: &Path, outcomes: &[Outcome]) -> Result<String> {
    let rows = rows(outcomes);
    let agreement = |share: Option<f64>| share.map_or_else(String::new, |share| format!("{:.1}", 100.0 * share));
    let mut table = String::from(
        "| variant | path | seeds | top-1 % | spread | top-5 % | neighbours agree % | far patches agree % | difference | \
         parameters | expert kB (paper) | expert kB (all counted) | smaller than dense | images/s | rate |\n\
         |---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|\n",
    );
    for row in &rows {
        writeln!(
            table,
            "| {} | {} | {} | {:.2} | {:.2} | {:.2} | {} | {} | {} | {} | {:.1} | {:.1} | {:.0}x | {:.0} | {} |",
            row.variant.name(),
            row.path,
            row.seeds,
            100.0 * row.top1,
            100.0 * (row.top1_highest - row.top1_lowest),
            100.0 * row.top5,
            agreement(row.routing_agreement),
            agreement(row.far_agreement),
            agreement(row.smoothness),
            row.parameters,
            row.paper_bytes / 1e3,
            row.runtime_bytes / 1e3,
            row.runtime_ratio,
            row.images_per_second,
            row.learning_rate,
        )
        .context("formatting the table")?;
    }
    table.push_str(&differences(&rows).context("formatting the differences")?);
    write_atomically(&folder.join("table.md"), table.as_bytes())?;
    write_atomically(&folder.join("table.json"), serde_json::to_string_pretty(&rows)?.as_bytes())?;
    pictures::accuracy_against_memory(&folder.join("accuracy-memory.png"), &rows)?;
    // Pictures of single runs show the first seed's.
    let seed = outcomes[0].recipe.seed;
    let of_first_seed: Vec<&Outcome> = outcomes.iter().filter(|outcome| outcome.recipe.seed == seed).collect();
    pictures::expert_utilisation(&folder.join("expert-utilisation.png"), &of_first_seed)?;
    let smooth_or_not = |outcome: &&&Outcome| matches!(outcome.variant, Variant::Butterfly | Variant::NoSmoothness);
    let shown: Vec<&Outcome> = of_first_seed.iter().filter(smooth_or_not).copied().collect();
    pictures::routing_maps(&folder.join("routing-maps.png"), &shown)?;
    Ok(table)
}

/// The second table: what every variant is above or below the first, in points of top-1.
fn differences(rows: &[Row]) -> std::result::Result<String, std::fmt::Error> {
    let paired: Vec<(&Row, &Paired)> = rows.iter().filter_map(|row| Some((row, row.paired.as_ref()?))).collect();
    let Some((_, first)) = paired.first() else { return Ok(String::new()) };
    let mut table = format!(
        "\n| variant against {} | points | 95%, these models on other images | p | by seed | 95%, other seeds |\n\
         |---|---:|---:|---:|---|---:|\n",
        first.against.name()
    );
    let points = |share: f64| format!("{:+.2}", 100.0 * share);
    let interval = |[low, high]: [f64; 2]| format!("{} to {}", points(low), points(high));
    for (row, paired) in paired {
        let seeds: Vec<String> =
            paired.by_seed.iter().map(|(seed, share)| format!("{seed}: {}", points(*share))).collect();
        writeln!(
            table,
            "| {} | {} | {} | {:.4} | {} | {} |",
            row.variant.name(),
            points(paired.difference),
            interval(paired.interval),
            paired.p,
            seeds.join(", "),
            paired.interval_over_seeds.map_or_else(|| "one seed".to_owned(), interval)
        )?;
    }
    Ok(table)
}

/// Writes `memory.json` and `memory-experts.png` into `folder`: what 8 to 256 experts of this shape take,
/// behind `stem` where there is one.
pub fn write_memory(folder: &Path, config: &ViTConfig, stem: Option<&[StemWeights]>) -> Result<()> {
    let points = memory::by_number_of_experts(config, stem)?;
    write_atomically(&folder.join("memory.json"), serde_json::to_string_pretty(&points)?.as_bytes())?;
    pictures::memory_against_experts(&folder.join("memory-experts.png"), &points)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_variant_is_a_valid_recipe_and_changes_what_it_says() {
        let base = Recipe::scratch(ViTConfig::preset("cifar").unwrap());
        for &variant in Variant::value_variants() {
            let mut recipe = base.clone();
            variant.apply(&mut recipe);
            recipe.validate().unwrap_or_else(|error| panic!("{}: {error}", variant.name()));
            // The preset has 4-bit angles and 8-bit routers.
            let same = matches!(variant, Variant::Butterfly | Variant::Angles4 | Variant::Router8);
            assert_eq!(recipe == base, same, "{}", variant.name());
        }
        let mut recipe = base.clone();
        Variant::StagesAll.apply(&mut recipe);
        assert_eq!(1 << recipe.model.experts.stages_in, base.model.backbone.d_model);
    }

    #[test]
    fn rows_average_over_seeds() {
        let outcome = |variant: Variant, top1| {
            let mut recipe = Recipe::scratch(ViTConfig::preset("tiny").unwrap());
            variant.apply(&mut recipe);
            Outcome {
                variant,
                recipe,
                parameters: 7,
                top1,
                top5: 0.9,
                right: vec![true, top1 > 0.5],
                routing_agreement: Some(0.5),
                far_agreement: Some(0.25),
                images_per_second: 10.0,
                load: vec![vec![0.25; 4]; 2],
                sample: Some(Sample {
                    side: 1,
                    images: vec![1, 2, 3],
                    grid_side: 2,
                    first_choices: vec![vec![0, 1, 2, 3]; 2],
                }),
            }
        };
        let outcomes =
            [outcome(Variant::Butterfly, 0.5), outcome(Variant::Angles4, 0.25), outcome(Variant::Butterfly, 0.75)];
        let rows = rows(&outcomes);
        assert_eq!((rows[0].seeds, rows[0].top1, rows[0].top1_lowest, rows[0].top1_highest), (2, 0.625, 0.5, 0.75));
        assert!(rows[1].runtime_bytes < rows[0].runtime_bytes);
        let folder = tempfile::tempdir().unwrap();
        let table = write(folder.path(), &outcomes).unwrap();
        assert!(table.contains("| butterfly | integer | 2 | 62.50 | 25.00 | 90.00 | 50.0 | 25.0 | 25.0 |"), "{table}");
        assert_eq!((rows[0].smoothness, &rows[0].paired), (Some(0.25), &None));
        // All have seed 1, and the last butterfly counts: right on both images, where angles4 is right on one.
        assert!(table.contains("| angles4 | -50.00 |"), "{table}");
        for picture in ["accuracy-memory.png", "routing-maps.png", "expert-utilisation.png"] {
            assert!(folder.path().join(picture).is_file(), "{picture}");
        }
    }
}
