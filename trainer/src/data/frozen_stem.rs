//! Training behind a stem that does not move. The integer engine that serves computes its outputs once, for some views of
//! every image; they are kept on the disk, one file a view, and in memory while a run lasts.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use indicatif::{ProgressBar, ProgressStyle};
use model_core::artifact::{BackboneArtifact, Card, Digest, read_file};
use model_core::config::{Activation, BackboneConfig, StemLayer};
use model_core::engine::{Backbone, Session};
use model_core::image::Preprocess;
use model_core::kernels::Isa;
use model_core::weights::{BackboneWeights, Norm, StemWeights};
use serde_json::json;
use training::shards::in_turn;
use training::vit::ViT;

use super::Dataset;
use super::augment::Augment;
use super::random::{Purpose, rng};
use crate::files::{create_folder, write_atomically};
use crate::stop::Stop;

/// The first layers of a finished backbone's stem.
#[derive(Debug, Clone)]
pub struct FrozenStem {
    /// Of the backbone that they are taken from.
    pub digest: Digest,
    pub preprocess: Preprocess,
    pub card: Option<Card>,
    pub weights: Vec<StemWeights>,
    layers: Vec<StemLayer>,
    /// Of the last layer's output.
    step: f32,
}

impl FrozenStem {
    /// The stem of `backbone` up to its last layer with `d_model` channels.
    ///
    /// # Errors
    /// When it has no such layer, or no steps of its outputs.
    pub fn of(backbone: &BackboneArtifact, d_model: usize) -> Result<Self> {
        let stem = &backbone.weights.config.stem;
        let last = stem.iter().rposition(|layer| layer.channels == d_model).with_context(|| {
            let widths: std::collections::BTreeSet<usize> = stem.iter().map(|layer| layer.channels).collect();
            format!(
                "no layer of the stem of {} has the model's {d_model} channels; there are {widths:?}",
                backbone.name
            )
        })?;
        let weights = backbone.weights.stem[..=last].to_vec();
        // With norms, or without steps, the engine keeps f32 between the layers.
        let is_plain = |layer: &StemLayer| !layer.norm && layer.activation != Activation::Gelu;
        let has_steps = weights.iter().all(|layer| layer.step.is_some()) && stem[..=last].iter().all(is_plain);
        let step = weights[last].step.filter(|_| has_steps).with_context(|| {
            format!(
                "the stem of {} keeps no integers between its layers, as one that `import` wrote does",
                backbone.name
            )
        })?;
        Ok(Self {
            digest: backbone.digest,
            preprocess: backbone.preprocess.clone(),
            card: backbone.card.clone(),
            layers: stem[..=last].to_vec(),
            weights,
            step,
        })
    }

    /// Puts its layers in place of those of `config`.
    pub fn enter(&self, config: &mut BackboneConfig) {
        config.stem.clone_from(&self.layers);
    }

    /// Gives `vit` its weights, and makes the residual branches nearly silent: the model starts as good as its stem.
    ///
    /// # Errors
    /// When `vit` has another stem.
    pub fn begin(&self, vit: &ViT) -> Result<()> {
        let parameters = vit.parameters();
        for (i, layer) in self.weights.iter().enumerate() {
            parameters.set(&format!("stem.{i}.conv.weight"), &layer.conv.weight.to_f32())?;
            parameters.set(&format!("stem.{i}.conv.bias"), &layer.conv.bias)?;
        }
        /// Of zero a substrate would have no scale, and everything before it no gradient.
        const NEARLY_SILENT: f64 = 0.01;
        let last = [".attention.proj.weight", "moe.down", "moe.down_out", "moe.down_scale"];
        let is_last_of_branch = |name: &str| last.iter().any(|last| name.ends_with(last));
        for (name, var) in parameters.all().iter().filter(|(name, _)| is_last_of_branch(name)) {
            parameters.set(name, &(var.as_tensor() * NEARLY_SILENT)?.flatten_all()?.to_vec1::<f32>()?)?;
        }
        Ok(())
    }

    /// A backbone of these layers alone, on images of side `image_size`.
    fn backbone(&self, image_size: usize) -> Result<Arc<Backbone>> {
        let config = BackboneConfig {
            image_size,
            stem: self.layers.clone(),
            d_model: self.layers.last().map_or(0, |layer| layer.channels),
            d_ff: 1,
            num_layers: 0,
            num_heads: 1,
            substrates: Default::default(),
        };
        let weights = BackboneWeights {
            config,
            stem: self.weights.clone(),
            pos_embed: Vec::new(),
            blocks: Vec::new(),
            norm: Norm::default(),
            background: None,
        };
        let (preprocess, isa) = (self.preprocess.clone(), Isa::from_env()?);
        Ok(Arc::new(Backbone::from_weights("stem".into(), &weights, preprocess, self.digest, isa)?))
    }
}

/// Which views of every image a stem is shown, and where its outputs are kept.
#[derive(Debug, Clone)]
pub struct Views {
    /// At least one; the first is the image as it is, the others are varied.
    pub count: u64,
    pub augment: Augment,
    pub seed: u64,
    pub folder: PathBuf,
    /// Most bytes of all files of these views.
    pub budget: u64,
    pub threads: usize,
    pub quiet: bool,
}

/// A frozen stem's outputs for all views of all images of a data set.
#[derive(Debug)]
pub struct StemOutputs {
    /// `[views]`, each `[images, tokens, d_model]`, in steps.
    views: Vec<Vec<i16>>,
    step: f32,
    /// Tokens along one side of the grid that an image becomes.
    pub grid: usize,
    pub d_model: usize,
}

impl StemOutputs {
    /// Reads what is in the folder of `views`, and computes the rest.
    ///
    /// # Errors
    /// When the views take more than their budget, the stem does not fit the images, or a file cannot be written; and
    /// [`crate::stop::Stopped`] when `stop` says so, with the views that are whole kept.
    pub fn prepare(stem: &FrozenStem, dataset: &Dataset, views: &Views, stop: &Stop) -> Result<Self> {
        let backbone = stem.backbone(dataset.side)?;
        let config = backbone.config();
        let (grid, d_model) = (config.grid_side(), config.d_model);
        let row = grid * grid * d_model;
        let bytes = (dataset.len() * row * size_of::<i16>()) as u64;
        let all = bytes.saturating_mul(views.count);
        ensure!(
            all <= views.budget,
            "the stem's outputs for {} views of {} images take {all} bytes, more than --stem-cache-bytes {}; take fewer \
             --views or a smaller image size",
            views.count,
            dataset.len(),
            views.budget
        );
        create_folder(&views.folder)?;
        let outputs = (0..views.count).map(|view| {
            stop.check()?;
            let path = views.folder.join(file_name(stem, dataset, views, view));
            match read(&path, bytes)? {
                Some(outputs) => Ok(outputs),
                None => {
                    let outputs = compute(stem, &backbone, dataset, (views, view), stop)?;
                    let mut bytes: Vec<u8> = outputs.iter().flat_map(|code| code.to_le_bytes()).collect();
                    let digest = Digest::of("", &bytes).to_string();
                    bytes.extend_from_slice(digest.as_bytes());
                    write_atomically(&path, &bytes)?;
                    Ok(outputs)
                }
            }
        });
        Ok(Self { views: outputs.collect::<Result<_>>()?, step: stem.step, grid, d_model })
    }

    /// The view that `epoch` shows.
    pub fn view_of(&self, epoch: u64) -> usize {
        (epoch % self.views.len() as u64) as usize
    }

    /// The outputs for a view of some images, `[images, tokens, d_model]`.
    ///
    /// # Panics
    /// When there is no such view or image.
    pub fn tokens(&self, view: usize, images: &[u32]) -> Vec<f32> {
        let row = self.grid * self.grid * self.d_model;
        let codes = images.iter().flat_map(|&image| &self.views[view][image as usize * row..][..row]);
        codes.map(|&code| f32::from(code) * self.step).collect()
    }
}

/// Everything that the outputs depend on is in the name, so that no file is taken for another's.
fn file_name(stem: &FrozenStem, dataset: &Dataset, views: &Views, view: u64) -> String {
    let varied = (view > 0).then(|| json!({ "seed": views.seed, "augment": views.augment, "view": view }));
    let key = json!({
        "backbone": stem.digest.to_string(),
        "layers": stem.layers.len(),
        "images": dataset.fingerprint(),
        "view": varied,
        "format": 2,
    });
    format!("view-{view}-{}.i16", &Digest::of(&key.to_string(), &[]).to_string()[..16])
}

/// What a file holds, if it is there: `len` bytes of codes, and their digest in 64 digits.
fn read(path: &Path, len: u64) -> Result<Option<Vec<i16>>> {
    let bytes = match read_file(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).with_context(|| path.display().to_string()),
    };
    let split = usize::try_from(len).ok().and_then(|len| bytes.split_at_checked(len));
    let whole = split.filter(|(codes, digest)| Digest::of("", codes).to_string().as_bytes() == *digest);
    let Some((codes, _)) = whole else { bail!("{}: it is damaged, delete it", path.display()) };
    Ok(Some(codes.chunks_exact(2).map(|code| i16::from_le_bytes([code[0], code[1]])).collect()))
}

fn compute(
    stem: &FrozenStem,
    backbone: &Arc<Backbone>,
    dataset: &Dataset,
    (views, view): (&Views, u64),
    stop: &Stop,
) -> Result<Vec<i16>> {
    let row = backbone.config().num_tokens() * backbone.config().d_model;
    let bar = if views.quiet { ProgressBar::hidden() } else { ProgressBar::new(dataset.len() as u64) };
    let template =
        format!("view {} of {} through the stem  {{bar:24}} {{pos}}/{{len}}, {{eta}} to go", view + 1, views.count);
    bar.set_style(ProgressStyle::with_template(&template).expect("the template is well-formed"));
    /// Images that a thread takes at once.
    const SHARD: usize = 256;
    let mut codes = vec![0; dataset.len() * row];
    let shards = codes.chunks_mut(SHARD * row).enumerate().collect();
    let done = in_turn(views.threads, shards, |(shard, codes): (usize, &mut [i16])| -> Result<()> {
        let mut session = Session::new(backbone, 1, 1);
        let (mut varied, mut tokens) = (vec![0; dataset.image_bytes()], vec![0.0; row]);
        for (index, codes) in (shard * SHARD..).zip(codes.chunks_exact_mut(row)) {
            stop.check()?;
            let mut image = dataset.image(index);
            if view > 0 {
                // Views are numbered like epochs.
                let mut rng = rng(views.seed, Purpose::Image, view, index as u64);
                views.augment.apply(image, dataset.side, &mut rng, &mut varied);
                image = &varied;
            }
            session.stem(&stem.preprocess.normalize(image), &mut tokens)?;
            // Whole numbers of at most 255, which f32 holds.
            codes.iter_mut().zip(&tokens).for_each(|(code, token)| *code = (token / stem.step).round() as i16);
            bar.inc(1);
        }
        Ok(())
    });
    bar.finish_and_clear();
    done?;
    Ok(codes)
}
