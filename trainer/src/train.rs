//! The training loop: batches in, checkpoints and a diary out.
//!
//! A run lives in a folder: `checkpoint.safetensors` (to go on from), `metrics.jsonl` (what happened), `curve.png`
//! (a picture of it) and `store/` (the artifacts, at the end). The loop stops at the end of the recipe, at a time
//! limit, when asked to, or when the loss stops being a number; all but the last leave a checkpoint of the last step.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use candle_core::Var;
use indicatif::{ProgressBar, ProgressStyle};
use model_core::config::ViTConfig;
use model_core::image::Preprocess;
use model_core::random::AngleStart;
use training::optimizer::AdamW;
use training::parameters::Quantizers;
use training::shards::in_turn;
use training::step::{Batch, Inputs, StepStats, gradients_in};
use training::vit::ViT;

use crate::checkpoint::{Checkpoint, State, Values};
use crate::data::Dataset;
use crate::data::frozen_stem::StemOutputs;
use crate::data::heads::{Head, ranges};
use crate::data::loader::{Loader, Plan, Position, StochasticDepth, batches_per_epoch};
use crate::data::soft_labels::SoftTargets;
use crate::data::split::{HeldOut, hold_out};
use crate::diary::{Diary, HeadValidation, Line, StepLine, Validation};
use crate::evaluate::{Scores, Tally};
use crate::files::create_folder;
use crate::predict::{Candle, Prediction, by_shards, for_each_shard};
use crate::recipe::Recipe;
use crate::stop::{Ended, Stop};
use crate::teacher::Teacher;
use crate::temperature::HeldOutLogits;

/// Settings that do not change the result.
#[derive(Debug, Clone)]
pub struct Settings {
    pub out: PathBuf,
    pub threads: usize,
    pub checkpoint_every: Duration,
    pub validate_every: u64,
    /// Steps between lines of the diary.
    pub log_every: u64,
    /// Draw no progress bar.
    pub quiet: bool,
}

/// A run in memory.
pub struct Run {
    recipe: Recipe,
    settings: Settings,
    dataset: Arc<Dataset>,
    parts: HeldOut,
    preprocess: Preprocess,
    teacher: Option<Arc<Teacher>>,
    stem: Option<Arc<StemOutputs>>,
    soft: Option<SoftTargets>,
    quantizers: Quantizers,
    vit: ViT,
    angle_start: Option<AngleStart>,
    optimizer: AdamW,
    average: Values,
    position: Position,
    validation: Option<Validation>,
    /// Time spent by processes before this one.
    seconds_before: f64,
    started: Instant,
}

impl Run {
    /// A run at its beginning. `vit` holds the initial parameters, of which the recipe freezes some;
    /// `teacher` is the recipe's.
    ///
    /// # Errors
    /// When the recipe does not hold together or does not fit the images or the teacher.
    pub fn new(
        recipe: Recipe,
        settings: Settings,
        vit: ViT,
        dataset: Arc<Dataset>,
        preprocess: Preprocess,
        teacher: Option<Arc<Teacher>>,
    ) -> Result<Self> {
        recipe.validate()?;
        if let Some(teacher) = &teacher {
            teacher.check(&dataset)?;
        }
        let share = recipe.distillation.as_ref().map_or(0.0, |distillation| distillation.share);
        ensure!(
            recipe.distillation == teacher.as_ref().map(|teacher| teacher.distillation(share)),
            "the recipe's teacher is missing, or another one"
        );
        let config = &recipe.model;
        ensure!(
            dataset.num_classes() == config.num_classes,
            "the model has {} classes, but the data has {}",
            config.num_classes,
            dataset.num_classes()
        );
        ensure!(dataset.side == config.backbone.image_size, "images of side {} do not fit the model", dataset.side);
        let parts = hold_out(&dataset, recipe.hold_out, recipe.seed);
        let vit = vit.freeze(|name| recipe.is_frozen(name))?;
        let average = if recipe.ema_decay > 0.0 { values(&vit)? } else { Values::new() };
        Ok(Self {
            optimizer: AdamW::new(recipe.optimizer),
            average,
            position: Position::default(),
            validation: None,
            seconds_before: 0.0,
            started: Instant::now(),
            quantizers: recipe.quantizers(),
            recipe,
            settings,
            dataset,
            parts,
            preprocess,
            teacher,
            stem: None,
            soft: None,
            angle_start: vit.angle_start().cloned(),
            vit,
        })
    }

    /// The same run on what a frozen stem made of its images.
    pub fn behind(self, stem: Arc<StemOutputs>) -> Self {
        Self { stem: Some(stem), ..self }
    }

    /// The same run with the soft labels of its recipe.
    pub fn with_soft_labels(self, soft: SoftTargets) -> Self {
        Self { soft: Some(soft), ..self }
    }

    /// Puts the run where `checkpoint` was.
    ///
    /// # Errors
    /// When the checkpoint belongs to another recipe, other images or another model.
    pub fn resume(&mut self, checkpoint: &Checkpoint) -> Result<()> {
        self.recipe.check_same(&checkpoint.state.recipe)?;
        ensure!(
            checkpoint.state.data_fingerprint == self.dataset.fingerprint(),
            "the images are not those that the checkpoint was trained on: the data folder has changed"
        );
        restore(&self.vit, &checkpoint.parameters)?;
        self.optimizer = checkpoint.optimizer();
        self.angle_start = checkpoint.state.angle_start.clone();
        self.average = checkpoint.average.clone();
        self.position = checkpoint.state.position;
        self.preprocess = checkpoint.state.preprocess.clone();
        self.validation = checkpoint.state.validation.clone();
        self.seconds_before = checkpoint.state.seconds;
        Ok(())
    }

    /// Trains until the end of the recipe, or until `stop` says so.
    ///
    /// # Errors
    /// When the loss is no longer finite or a file cannot be written. The last checkpoint is kept.
    pub fn train(&mut self, stop: &Stop) -> Result<Ended> {
        ensure!(self.recipe.soft_labels.is_some() == self.soft.is_some(), "the recipe's soft labels are missing");
        self.started = Instant::now();
        create_folder(&self.settings.out)?;
        let steps_per_epoch = batches_per_epoch(self.parts.train.len(), self.recipe.batch_size);
        let total = steps_per_epoch * self.recipe.epochs;
        let bar = self.progress_bar(total);
        let mut diary = Diary::open(&self.settings.out, self.optimizer.step)?;
        let mut recent = Recent::default();
        let mut last_save = Instant::now();
        let mut loader = self.loader();

        while self.optimizer.step < total {
            if stop.is_asked() {
                bar.abandon_with_message("interrupted");
                self.checkpoint()?.save(&self.settings.out)?;
                return Ok(Ended::Interrupted);
            }
            let rate = self.recipe.rate_at(self.optimizer.step, steps_per_epoch);
            let (stats, norm) = self.step(&mut loader, rate)?;
            recent.add(stats, norm);
            bar.inc(1);
            if self.optimizer.step.is_multiple_of(self.settings.log_every) || self.position.batch == 0 {
                let images = recent.steps * self.recipe.batch_size.min(self.parts.train.len()) as u64;
                let line = StepLine {
                    step: self.optimizer.step,
                    epoch: self.optimizer.step as f64 / steps_per_epoch as f64,
                    learning_rate: rate,
                    seconds: self.seconds(),
                    ..recent.line(images)
                };
                bar.set_message(self.describe(&line));
                diary.write(&Line::Step(line))?;
                recent = Recent::default();
            }
            if self.position.batch == 0
                && (self.position.epoch.is_multiple_of(self.settings.validate_every.max(1))
                    || self.optimizer.step == total)
                && let Some(validation) = self.validate()?
            {
                diary.write(&Line::Validation(validation))?;
                recent.since = Instant::now();
            }
            // After the step, so that even the shortest limit gets somewhere.
            if self.optimizer.step < total && stop.is_late() {
                bar.abandon_with_message("out of time");
                self.checkpoint()?.save(&self.settings.out)?;
                return Ok(Ended::OutOfTime);
            }
            if last_save.elapsed() >= self.settings.checkpoint_every {
                self.checkpoint()?.save(&self.settings.out)?;
                last_save = Instant::now();
            }
        }
        self.checkpoint()?.save(&self.settings.out)?;
        bar.finish();
        Ok(Ended::Finished)
    }

    fn step(&mut self, loader: &mut Loader, rate: f64) -> Result<(StepStats, f64)> {
        let mut batch = loader.next_batch();
        debug_assert_eq!(batch.position, self.position);
        if let (Some(teacher), Some(distillation), Inputs::Pixels(pixels)) =
            (&self.teacher, &self.recipe.distillation, &batch.inputs)
        {
            let (share, threads) = (distillation.share, self.settings.threads);
            teacher.teach(pixels, &self.preprocess, &mut batch.targets, share, threads)?;
        }
        let len = batch.labels.len();
        let batch = Batch {
            inputs: batch.inputs,
            targets: batch.targets,
            heads: self.recipe.head_classes(),
            len,
            branch_scales: batch.branch_scales,
            router_noise: self.recipe.router_noise,
            noise_seeds: batch.noise_seeds,
        };
        let float = self.position.epoch < self.recipe.float_epochs;
        let (gradients, stats) = gradients_in(
            self.recipe.products,
            &self.vit,
            if float { Quantizers::NONE } else { self.quantizers },
            &batch,
            self.recipe.losses,
            (self.recipe.shard_size, self.settings.threads),
        )?;
        let norm = self.optimizer.step(self.vit.parameters(), &gradients, rate, self.settings.threads)?;
        if !stats.loss.is_finite() || !norm.is_finite() {
            bail!(
                "the loss stopped being a number at step {} (loss {}, gradient {}); the last checkpoint in {} is from \
                 before. A lower learning rate or a longer warm-up usually helps",
                self.optimizer.step,
                stats.loss,
                if norm.is_finite() { "finite" } else { "not finite" },
                self.settings.out.display()
            );
        }
        self.update_average()?;
        self.position.batch += 1;
        if self.position.batch == batches_per_epoch(self.parts.train.len(), self.recipe.batch_size) {
            self.position = Position { epoch: self.position.epoch + 1, batch: 0 };
        }
        Ok((stats, norm))
    }

    /// `average <- d average + (1 - d) parameter`. The decay d starts low, so that the average forgets the
    /// random initial weights quickly.
    fn update_average(&mut self) -> Result<()> {
        if self.recipe.ema_decay == 0.0 {
            return Ok(());
        }
        let steps = self.optimizer.step as f64;
        let decay = self.recipe.ema_decay.min((1.0 + steps) / (10.0 + steps)) as f32;
        let moved: BTreeMap<&String, &Var> = self.vit.parameters().trainable().collect();
        let averages: Vec<_> =
            self.average.iter_mut().filter_map(|(name, average)| Some((*moved.get(name)?, average))).collect();
        ensure!(averages.len() == moved.len(), "the average misses a parameter");
        in_turn(self.settings.threads, averages, |(var, average): (&Var, &mut Vec<f32>)| {
            let values = var.flatten_all()?.to_vec1::<f32>()?;
            average.iter_mut().zip(&values).for_each(|(a, v)| *a += (1.0 - decay) * (v - *a));
            anyhow::Ok(())
        })?;
        Ok(())
    }

    fn loader(&self) -> Loader {
        let plan = Plan {
            seed: self.recipe.seed,
            batch_size: self.recipe.batch_size,
            augment: self.recipe.augment,
            mixing: self.recipe.mixing,
            label_smoothing: self.recipe.label_smoothing,
            heads: self.recipe.head_classes(),
            soft: self.soft.clone(),
            preprocess: self.preprocess.clone(),
            depth: StochasticDepth {
                probability: self.recipe.drop_path,
                layers: self.recipe.model.backbone.num_layers,
            },
            router_noise: self.recipe.router_noise > 0.0,
        };
        let (stem, dataset) = (self.stem.clone(), self.dataset.clone());
        Loader::start_behind(stem, dataset, self.parts.train.clone().into(), plan, self.position)
    }

    /// The model with the averaged weights, apart from the one in training.
    ///
    /// # Errors
    /// Never for a run that was built.
    pub fn averaged(&self) -> Result<ViT> {
        averaged(&self.recipe, &values(&self.vit)?, &self.average)
    }

    fn validate(&mut self) -> Result<Option<Validation>> {
        if self.parts.validation.is_empty() {
            return Ok(None);
        }
        let model = Candle { vit: self.averaged()?, quantizers: self.quantizers };
        let config = &self.recipe.model;
        let mut tallies = HeadTallies::new(&self.recipe, self.parts.validation.len());
        let mut tally = Tally::new(config);
        let (dataset, indices) = (&self.dataset, &self.parts.validation);
        let mut take = |shard: &[u32], mut answer: Prediction| {
            let labels: Vec<u16> = shard.iter().map(|&i| dataset.labels[i as usize]).collect();
            let soft: Option<Vec<usize>> =
                self.soft.as_ref().map(|soft| shard.iter().map(|&image| soft.labels.first(image)).collect());
            tallies.add(&labels, soft.as_deref(), &mut answer);
            tally.add(&labels, &answer);
        };
        let threads = self.settings.threads;
        match &self.stem {
            None => for_each_shard(&model, dataset, indices, &self.preprocess, threads, &mut take)?,
            Some(stem) => {
                let answer = |shard: &[u32]| model.predict_behind_stem(stem.tokens(0, shard), shard.len());
                by_shards(indices, threads, answer, &mut take)?;
            }
        }
        let scores = tally.scores();
        self.validation = Some(Validation {
            step: self.optimizer.step,
            epoch: self.position.epoch,
            cross_entropy: scores.cross_entropy,
            top1: scores.top1,
            top5: scores.top5,
            routing_agreement: scores.routing_agreement,
            seconds: self.seconds(),
            temperature: tallies.of_only_head.temperature(),
            heads: tallies.scores(&self.recipe),
        });
        Ok(self.validation.clone())
    }

    /// The run at rest.
    ///
    /// # Errors
    /// Never for a run that was built.
    pub fn checkpoint(&self) -> Result<Checkpoint> {
        Ok(Checkpoint {
            state: State {
                version: State::VERSION,
                recipe: self.recipe.clone(),
                data_fingerprint: self.dataset.fingerprint(),
                position: self.position,
                step: self.optimizer.step,
                seconds: self.seconds(),
                preprocess: self.preprocess.clone(),
                angle_start: self.angle_start.clone(),
                labels: self.dataset.class_names.clone(),
                validation: self.validation.clone(),
            },
            parameters: values(&self.vit)?,
            average: self.average.clone(),
            moments: self.optimizer.moments.clone(),
        })
    }

    fn seconds(&self) -> f64 {
        self.seconds_before + self.started.elapsed().as_secs_f64()
    }

    fn progress_bar(&self, total: u64) -> ProgressBar {
        if self.settings.quiet {
            return ProgressBar::hidden();
        }
        let template = "{bar:24} {pos}/{len} steps, {elapsed} gone, {eta} to go  {msg}";
        let bar = ProgressBar::new(total);
        bar.set_style(ProgressStyle::with_template(template).expect("the template is well-formed"));
        bar.set_position(self.optimizer.step);
        bar.reset_eta();
        bar
    }

    fn describe(&self, line: &StepLine) -> String {
        let held_out =
            self.validation.as_ref().map(|v| format!(", held out {:.1}%", 100.0 * v.top1)).unwrap_or_default();
        format!(
            "epoch {:.1}, loss {:.3}, accuracy {:.1}%{held_out}, {:.0} images/s",
            line.epoch,
            line.loss,
            100.0 * line.accuracy,
            line.images_per_second
        )
    }
}

/// What each of several heads does on the images of its data set; where there is one, its logits alone.
struct HeadTallies {
    classes: Vec<Range<usize>>,
    tallies: Vec<(Tally, HeldOutLogits)>,
    of_only_head: HeldOutLogits,
}

impl HeadTallies {
    fn new(recipe: &Recipe, images: usize) -> Self {
        let of = |head: &Head| {
            let tally = Tally::new(&ViTConfig { num_classes: head.classes, ..recipe.model.clone() });
            (tally, HeldOutLogits::new(head.classes, images))
        };
        Self {
            classes: ranges(&recipe.head_classes(), recipe.model.num_classes),
            tallies: recipe.heads.iter().map(of).collect(),
            of_only_head: HeldOutLogits::new(recipe.model.num_classes, images),
        }
    }

    /// Counts the answers for images with these labels, and with these most probable classes of soft ones. In `answer` only the logits of an image's own head stay finite.
    fn add(&mut self, labels: &[u16], soft: Option<&[usize]>, answer: &mut Prediction) {
        let width = self.classes.last().map_or(1, |last| last.end);
        if self.tallies.is_empty() {
            let rows = answer.logits.chunks_exact(width).zip(labels);
            rows.for_each(|(row, &label)| self.of_only_head.add(row, usize::from(label)));
            return;
        }
        let count = |(tally, held): &mut (Tally, HeldOutLogits), logits: &[f32], label: usize| {
            tally.add(&[label as u16], &Prediction { logits: logits.to_vec(), ..Prediction::default() });
            held.add(logits, label);
        };
        for (i, (row, &label)) in answer.logits.chunks_exact_mut(width).zip(labels).enumerate() {
            if let (Some(soft), Some(classes), Some(tally)) = (soft, self.classes.last(), self.tallies.last_mut()) {
                count(tally, &row[classes.clone()], soft[i]);
            }
            let own = self.classes.iter().position(|classes| classes.contains(&usize::from(label)));
            let Some(head) = own else { continue };
            let classes = self.classes[head].clone();
            count(&mut self.tallies[head], &row[classes.clone()], usize::from(label) - classes.start);
            row[..classes.start].fill(f32::NEG_INFINITY);
            row[classes.end..].fill(f32::NEG_INFINITY);
        }
    }

    fn scores(&self, recipe: &Recipe) -> Vec<HeadValidation> {
        let of = |(head, (tally, held)): (&Head, &(Tally, HeldOutLogits))| {
            let Scores { images, cross_entropy, top1, top5, .. } = tally.scores();
            HeadValidation {
                name: head.name.clone(),
                images,
                cross_entropy,
                top1,
                top5,
                temperature: held.temperature(),
            }
        };
        recipe.heads.iter().zip(&self.tallies).map(of).collect()
    }
}

/// Sums since the last line of the diary.
struct Recent {
    steps: u64,
    sum: StepStats,
    norm: f64,
    since: Instant,
}

impl Default for Recent {
    fn default() -> Self {
        Self { steps: 0, sum: StepStats::default(), norm: 0.0, since: Instant::now() }
    }
}

impl Recent {
    fn add(&mut self, stats: StepStats, norm: f64) {
        self.steps += 1;
        self.norm += norm;
        self.sum.loss += stats.loss;
        self.sum.cross_entropy += stats.cross_entropy;
        self.sum.balance += stats.balance;
        self.sum.smoothness += stats.smoothness;
        self.sum.contiguity += stats.contiguity;
        self.sum.accuracy += stats.accuracy;
    }

    fn line(&self, images: u64) -> StepLine {
        let n = self.steps.max(1) as f64;
        StepLine {
            loss: self.sum.loss / n,
            cross_entropy: self.sum.cross_entropy / n,
            balance: self.sum.balance / n,
            smoothness: self.sum.smoothness / n,
            contiguity: self.sum.contiguity / n,
            accuracy: self.sum.accuracy / n,
            gradient_norm: self.norm / n,
            images_per_second: images as f64 / self.since.elapsed().as_secs_f64().max(1e-9),
            ..StepLine::default()
        }
    }
}

fn values(vit: &ViT) -> Result<Values> {
    let all = vit.parameters().all().iter();
    all.map(|(name, var)| Ok((name.clone(), var.flatten_all()?.to_vec1()?))).collect()
}

fn restore(vit: &ViT, from: &Values) -> Result<()> {
    for name in vit.parameters().all().keys() {
        let values = from.get(name).with_context(|| format!("the checkpoint has no parameter {name}"))?;
        vit.parameters().set(name, values).with_context(|| format!("parameter {name} of the checkpoint"))?;
    }
    Ok(())
}

/// The model that is validated and exported: the average where there is one, the parameters elsewhere. Keeps no graph.
///
/// # Errors
/// When names or sizes do not fit the recipe's model.
pub fn averaged(recipe: &Recipe, parameters: &Values, average: &Values) -> Result<ViT> {
    let vit = recipe.init_model()?.freeze(|_| true)?;
    restore(&vit, parameters)?;
    for (name, values) in average {
        vit.parameters().set(name, values)?;
    }
    Ok(vit)
}
