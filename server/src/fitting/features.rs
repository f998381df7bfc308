//! What the backbone makes of pictures: features, by the integer engine that serves.

use std::sync::Arc;

use anyhow::ensure;
use model_core::artifact::Digest;
use model_core::config::ExpertConfig;
use model_core::engine::{Backbone, ExpertSet, Row, Session};
use model_core::image::{Crop, DecodeLimits, Sight, View, decode_picture};
use model_core::weights::{ExpertSetWeights, Linear};

/// Bytes of a picture's file at most, as everywhere.
pub const MOST_FILE_BYTES: u64 = 256 << 20;
/// Up to so many images, each is looked at in so many ways.
const VIEWS: [(usize, usize); 2] = [(1000, 4), (4000, 2)];
/// Share of the sides of what is seen that a cropped view sees.
const CROPPED: f64 = 0.9;

/// In how many ways each of so many images is looked at.
pub fn views_of(images: usize) -> usize {
    VIEWS.iter().find(|(most, _)| images <= *most).map_or(1, |(_, views)| *views)
}

/// Runs a backbone over pictures.
pub struct Extractor {
    backbone: Arc<Backbone>,
    /// Through whose experts pictures go.
    set: Arc<ExpertSet>,
    view: View,
}

impl Extractor {
    /// `lender` is the set whose experts are borrowed, on a backbone with blocks.
    ///
    /// # Errors
    /// When the backbone needs experts, and there are none.
    pub fn new(backbone: Arc<Backbone>, lender: Option<Arc<ExpertSet>>, view: View) -> anyhow::Result<Self> {
        let set = lender.map_or_else(|| without_experts(&backbone).map(Arc::new), Ok)?;
        Ok(Self { backbone, set, view })
    }

    pub fn backbone(&self) -> &Arc<Backbone> {
        &self.backbone
    }

    /// Identity of the set through whose experts pictures go.
    pub fn experts(&self) -> Digest {
        self.set.digest()
    }

    /// Scratch of one thread that looks at each picture in so many ways.
    pub fn session(&self, views: usize) -> Session {
        Session::new(&self.backbone, views, 1)
    }

    /// Features `[views, d_model]` of a picture's file, with as many views as the session has room for: the picture as it
    /// is, then changed copies of it.
    ///
    /// # Errors
    /// When the file holds no picture that can be read, or one that shows nothing.
    pub fn features(
        &self,
        encoded: &[u8],
        limits: &DecodeLimits,
        session: &mut Session,
        gone: &dyn Fn() -> bool,
    ) -> anyhow::Result<Vec<f32>> {
        let picture = decode_picture(encoded, limits, gone)?;
        let (preprocess, side) = (self.backbone.preprocess(), self.backbone.config().image_size);
        let Sight { samples: plain, seen, is_flat } =
            preprocess.see(&picture, (Crop::Shares(self.view.crop), self.view.fit), side)?;
        ensure!(!is_flat, "it shows nothing, and such pictures are called unknown before any set is asked");
        let views = session.max_batch();
        let mut inputs = vec![preprocess.normalize(&plain)];
        if views > 1 {
            inputs.push(preprocess.normalize(&mirrored(&plain, side)));
        }
        // Opposite corners of what is seen; one of the two mirrored.
        for view in 2..views {
            let [x, y, w, h] = seen.crop;
            let corner = (1.0 - CROPPED) * (view % 2) as f64;
            let crop = [x + corner * w, y + corner * h, CROPPED * w, CROPPED * h];
            let cropped = preprocess.see(&picture, (Crop::Shares(crop), self.view.fit), side)?.samples;
            let cropped = if view % 2 == 1 { mirrored(&cropped, side) } else { cropped };
            inputs.push(preprocess.normalize(&cropped));
        }
        let mut features = vec![0.0; views * self.backbone.config().d_model];
        // Features come out before the head, whatever that is.
        let labels = self.set.labels().len();
        let mut logits = vec![0.0; views * labels];
        let outputs = features.chunks_exact_mut(self.backbone.config().d_model).zip(logits.chunks_exact_mut(labels));
        let rows = inputs.iter().zip(outputs).map(|(pixels, (features, logits))| Row {
            set: &self.set,
            pixels,
            logits,
            routing: None,
            features: Some(features),
        });
        session.forward(&mut rows.collect::<Vec<_>>())?;
        Ok(features)
    }
}

/// A set for a backbone without blocks.
fn without_experts(backbone: &Backbone) -> anyhow::Result<ExpertSet> {
    let d_model = backbone.config().d_model;
    let weights = ExpertSetWeights {
        config: ExpertConfig::NONE,
        layers: Vec::new(),
        head: Linear { weight: vec![0.0; d_model].into(), bias: vec![0.0] },
        labels: vec!["none".to_owned()],
        projection: None,
        temperature: 1.0,
        familiarity: None,
    };
    Ok(ExpertSet::from_weights("features".to_owned(), weights, Digest::of("", &[]), backbone)?)
}

/// RGB8 `[side, side, 3]` with left and right exchanged.
fn mirrored(samples: &[u8], side: usize) -> Vec<u8> {
    let rows = samples.chunks_exact(3 * side.max(1));
    rows.flat_map(|row| row.chunks_exact(3).rev().flatten().copied()).collect()
}
