//! The seam between server and `model-core`: files become models here, and nowhere else does the server see a tensor.

use std::sync::Arc;

use anyhow::{Context, bail};
use model_core::artifact::read_expert_set;
use model_core::config::BackboneConfig;
use model_core::image::{Preprocess, Seen, View};

use crate::metrics::Metrics;
use crate::routing_map::RoutingMap;
use crate::sets::descriptor::{self, BackboneDescriptor, Location, SetDescriptor};
use crate::sets::registry::{Lease, Loaded, Registry, Source};
use crate::statistics::Timings;
use crate::verdict::Verdict;
use model_core::engine::{self, Backbone, Crew, ExpertSet, Member, Session, SessionGroup};
use model_core::familiarity;

/// The registry as the server uses it.
pub type SetRegistry = Registry<ArtifactSource>;
/// A snapshot of a resident expert set.
pub type SetLease = Lease<ArtifactSource>;

/// Makes models from artifact files.
#[derive(Debug, Clone)]
pub struct ArtifactSource {
    /// The compute threads, each of which gets its own scratch for every backbone.
    pub crew: Crew,
    /// Most images in one forward pass.
    pub max_batch: usize,
    /// Bytes of preprocessed images that may be on their way; a backbone whose images are larger is of no use.
    pub queue_bytes: usize,
}

/// A backbone with the scratch of every compute thread: loaded, accounted and dropped together.
pub struct LoadedBackbone {
    backbone: Arc<Backbone>,
    /// The scratch of every compute thread.
    sessions: SessionGroup,
}

/// An expert set ready to run.
#[derive(Debug)]
pub struct LoadedSet {
    set: Arc<ExpertSet>,
    /// Tokens along one side of the patch grid.
    grid_side: usize,
    num_layers: usize,
}

/// One image of a batch.
pub struct Row<'a> {
    /// The expert set it runs on.
    pub set: &'a LoadedSet,
    /// The model's input `[side, side, 3]`.
    pub pixels: &'a [f32],
    /// Whether the routing map is wanted.
    pub routing: bool,
}

/// What the model made of an image.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    /// One per label.
    pub logits: Vec<f32>,
    /// Where its patches went, when asked for.
    pub routing: Option<RoutingMap>,
    /// Whether the set's statistics know pictures of this kind, if it has any.
    pub is_familiar: Option<bool>,
    /// The part of the picture that the model was shown; whoever cut it out adds it.
    pub seen: Option<Seen>,
    /// Whether the picture is unknown; whoever knows what the request asked for adds it.
    pub verdict: Verdict,
    /// Where the time went; each stage adds its own.
    pub timings: Timings,
}

impl LoadedSet {
    /// The set itself, for work that brings its own scratch.
    pub fn engine(&self) -> &Arc<ExpertSet> {
        &self.set
    }

    /// One per logit.
    pub fn labels(&self) -> &[String] {
        self.set.labels()
    }

    /// The part of a picture that it looks at, unless a request says otherwise.
    pub fn view(&self) -> View {
        self.set.view()
    }

    fn tokens(&self) -> usize {
        self.grid_side * self.grid_side
    }

    fn routing_len(&self) -> usize {
        self.num_layers * self.tokens() * self.set.config().top_k
    }

    fn routing_map(&self, chosen: &[u16]) -> RoutingMap {
        let config = self.set.config();
        RoutingMap::new(chosen, self.grid_side, config.num_experts, config.top_k)
    }
}

impl LoadedBackbone {
    /// Runs a batch in the thread of `member`; rows may be of different sets of this backbone.
    ///
    /// # Errors
    /// When the engine refuses a row.
    ///
    /// # Panics
    /// When `member` is not of the crew of the [`ArtifactSource`].
    pub fn forward(
        &self,
        member: &mut Member,
        rows: &[Row<'_>],
        metrics: Option<&Metrics>,
    ) -> anyhow::Result<Vec<Answer>> {
        let mut logits: Vec<Vec<f32>> = rows.iter().map(|row| vec![0.0; row.set.labels().len()]).collect();
        let mut routing: Vec<Vec<u16>> = rows.iter().map(|row| vec![0; row.set.routing_len()]).collect();
        let len = self.backbone.config().d_model;
        // Of the rows whose sets have statistics.
        let measured = rows.iter().filter(|row| row.set.set.familiarity().is_some()).count();
        let mut features = vec![0.0; measured * len];
        let mut places = features.chunks_exact_mut(len);
        let mut engine_rows: Vec<_> = std::iter::zip(rows, std::iter::zip(&mut logits, &mut routing))
            .map(|(row, (logits, routing))| engine::Row {
                set: &row.set.set,
                pixels: row.pixels,
                logits,
                routing: Some(routing),
                features: row.set.set.familiarity().and_then(|_| places.next()),
            })
            .collect();
        self.sessions.forward(member, &mut engine_rows)?;
        if let Some(metrics) = metrics {
            count_expert_tokens(rows, &routing, metrics);
        }
        let (mut features, mut scratch) = (features.chunks_exact(len), familiarity::Scratch::default());
        let mut is_familiar = |set: &LoadedSet| {
            let familiarity = set.set.familiarity()?;
            let distance = familiarity.distance_in(features.next()?, self.backbone.background(), &mut scratch);
            Some(!familiarity.is_unknown(distance))
        };
        let outputs = std::iter::zip(rows, std::iter::zip(logits, routing)).map(|(row, (logits, routing))| Answer {
            logits,
            routing: row.routing.then(|| row.set.routing_map(&routing)),
            is_familiar: is_familiar(row.set),
            seen: None,
            verdict: Verdict::default(),
            timings: Timings::default(),
        });
        Ok(outputs.collect())
    }

    pub fn config(&self) -> &BackboneConfig {
        self.backbone.config()
    }

    /// The backbone itself, for work that brings its own scratch.
    pub fn engine(&self) -> &Arc<Backbone> {
        &self.backbone
    }

    /// How an image becomes pixels.
    pub fn preprocess(&self) -> &Preprocess {
        self.backbone.preprocess()
    }

    /// Bytes of one image's pixels.
    pub fn input_bytes(&self) -> usize {
        self.backbone.pixels_len() * size_of::<f32>()
    }

    /// The instruction set it was packed for.
    pub fn isa(&self) -> String {
        self.backbone.isa().to_string()
    }
}

/// Counts routed tokens and how evenly the last batch spread them.
fn count_expert_tokens(rows: &[Row<'_>], routing: &[Vec<u16>], metrics: &Metrics) {
    let layers = rows.iter().map(|row| row.set.num_layers).max().unwrap_or(0);
    for layer in 0..layers {
        let mut total = 0;
        let mut worst: f64 = 0.0;
        for (row, chosen) in std::iter::zip(rows, routing) {
            let per_layer = row.set.tokens() * row.set.set.config().top_k;
            let Some(chosen) = chosen.get(layer * per_layer..(layer + 1) * per_layer) else { continue };
            let mut counts = vec![0u32; row.set.set.config().num_experts];
            for &expert in chosen {
                if let Some(count) = counts.get_mut(usize::from(expert)) {
                    *count += 1;
                }
            }
            let busiest = counts.iter().copied().max().unwrap_or(0);
            worst = worst.max(f64::from(busiest) * counts.len() as f64 / per_layer.max(1) as f64);
            total += chosen.len() as u64;
        }
        let label = layer.to_string();
        metrics.expert_tokens.with_label_values(&[label.as_str()]).inc_by(total);
        metrics.expert_load_imbalance.with_label_values(&[label.as_str()]).set(worst);
    }
}

impl Source for ArtifactSource {
    type Backbone = LoadedBackbone;
    type Set = LoadedSet;

    fn describe_set(&self, name: &str, version: u64, location: &Location) -> anyhow::Result<SetDescriptor> {
        descriptor::describe_set(name, version, location)
    }

    fn load_backbone(&self, descriptor: &BackboneDescriptor) -> anyhow::Result<Loaded<LoadedBackbone>> {
        let location = &descriptor.location;
        let input_bytes = descriptor.config.image_size.pow(2) * 3 * size_of::<f32>();
        if input_bytes > self.queue_bytes {
            let (side, limit) = (descriptor.config.image_size, self.queue_bytes);
            bail!("{location}: an image of {side} x {side} takes {input_bytes} bytes, --queue-bytes is {limit}");
        }
        let bytes = location.read()?;
        let backbone = Arc::new(Backbone::from_bytes(&bytes).with_context(|| location.to_string())?);
        if backbone.digest() != descriptor.digest {
            bail!("{location}: the file was replaced by another backbone; restart to use it");
        }
        let sessions = SessionGroup::new(&backbone, self.max_batch, &self.crew);
        Ok(Loaded { bytes: backbone.resident_bytes(), value: LoadedBackbone { backbone, sessions } })
    }

    fn load_set(
        &self,
        descriptor: &SetDescriptor,
        backbone: &Arc<LoadedBackbone>,
        lender: Option<&LoadedSet>,
    ) -> anyhow::Result<Loaded<LoadedSet>> {
        let location = &descriptor.location;
        let set = || {
            // The file goes before the set is packed.
            let artifact = read_expert_set(&location.read()?)?;
            anyhow::Ok(ExpertSet::from_artifact(artifact, &backbone.backbone, lender.map(|lender| &*lender.set))?)
        };
        let set = set().with_context(|| location.to_string())?;
        if set.digest() != descriptor.digest {
            bail!("{location}: the file changed while it was being loaded");
        }
        let config = backbone.config();
        let (grid_side, num_layers) = (config.grid_side(), config.num_layers);
        Ok(Loaded { bytes: set.resident_bytes(), value: LoadedSet { set: Arc::new(set), grid_side, num_layers } })
    }

    fn scratch(&self, backbone: &LoadedBackbone) -> usize {
        backbone.sessions.resident_bytes()
    }

    fn scratch_growth(&self, set: &SetDescriptor, backbone: &BackboneDescriptor) -> usize {
        self.crew.size() * Session::growth(&backbone.config, self.max_batch, &set.experts)
    }

    fn shrink_scratch(backbone: &LoadedBackbone) {
        backbone.sessions.shrink();
    }
}
