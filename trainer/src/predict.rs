//! Running a model over a data set, shard by shard on several threads.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::Result;
use candle_core::{Device, Tensor};
use model_core::image::Preprocess;
use model_core::vit::{Quantizers, ViT};

use crate::data::Dataset;

/// What a model made of some images.
#[derive(Debug, Clone, Default)]
pub struct Prediction {
    /// `[images, classes]`.
    pub logits: Vec<f32>,
    /// For every layer the chosen experts `[images, tokens, top_k]`, best first.
    pub experts: Vec<Vec<u16>>,
}

/// A model ready to look at images.
pub trait Predictor: Sync {
    /// Looks at `len` images of normalised `pixels [len, side, side, 3]`.
    ///
    /// # Errors
    /// When shapes do not fit.
    fn predict(&self, pixels: Vec<f32>, len: usize) -> Result<Prediction>;
}

/// The candle model, with the roundings it is asked for.
#[derive(Debug)]
pub struct Candle {
    /// The model; frozen, so that no graph is kept.
    pub vit: ViT,
    /// Which roundings to apply.
    pub quantizers: Quantizers,
}

impl Predictor for Candle {
    fn predict(&self, pixels: Vec<f32>, len: usize) -> Result<Prediction> {
        let side = self.vit.config().backbone.image_size;
        let pixels = Tensor::from_vec(pixels, (len, side, side, 3), &Device::Cpu)?;
        let output = self.vit.forward(&pixels, self.quantizers)?;
        Ok(Prediction {
            logits: output.logits.flatten_all()?.to_vec1()?,
            experts: output.routing.iter().map(|routing| routing.experts.to_vec()).collect(),
        })
    }
}

/// Images a thread looks at in one go.
const SHARD: usize = 32;

/// Shows the images `indices` of `dataset` to `model` and hands every shard's answer, with the shard's indices, to
/// `take`, in order.
///
/// # Errors
/// When the model does not fit the images.
pub fn for_each_shard(
    model: &dyn Predictor,
    dataset: &Dataset,
    indices: &[u32],
    preprocess: &Preprocess,
    threads: usize,
    take: &mut (dyn FnMut(&[u32], Prediction) + Send),
) -> Result<()> {
    // Answers wait in slots so that `take` sees them in order, whichever thread was faster; a window bounds them.
    for window in indices.chunks(SHARD * threads.max(1) * 4) {
        let shards: Vec<&[u32]> = window.chunks(SHARD).collect();
        let next = AtomicUsize::new(0);
        let answers: Vec<Mutex<Option<Result<Prediction>>>> = shards.iter().map(|_| Mutex::new(None)).collect();
        let work = || {
            while let Some((shard, slot)) = {
                let i = next.fetch_add(1, Ordering::Relaxed);
                shards.get(i).zip(answers.get(i))
            } {
                let bytes: Vec<u8> = shard.iter().flat_map(|&i| dataset.image(i as usize)).copied().collect();
                let answer = model.predict(preprocess.normalize(&bytes), shard.len());
                *slot.lock().expect("nobody panics while holding a slot") = Some(answer);
            }
        };
        std::thread::scope(|scope| {
            for _ in 1..threads {
                scope.spawn(work);
            }
            work();
        });
        for (shard, slot) in shards.iter().zip(answers) {
            let answer = slot.into_inner().expect("nobody panics while holding a slot");
            take(shard, answer.expect("every shard is taken by a thread")?);
        }
    }
    Ok(())
}
