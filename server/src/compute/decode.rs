//! Encoded images to a model's input, on a bounded number of threads and within a bounded number of bytes.

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use model_core::image::{
    Crop, DecodeLimits, Fit, ImageError, Picture, Preprocess, RgbImage, Seen, Sight, decode, decode_picture, probe,
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::metrics::Metrics;
use crate::threads::{BlockingPool, Panicked, Priority};

/// Grain of the byte budget: a semaphore counts at most 2^29 permits on 32-bit machines.
const GRAIN: u64 = 4096;

/// Decodes images; clones share threads and bytes.
#[derive(Clone)]
pub struct Decoder {
    pool: BlockingPool,
    memory: Arc<Semaphore>,
    memory_grains: u32,
    limits: DecodeLimits,
    metrics: Arc<Metrics>,
}

/// How a picture becomes the input of a model.
#[derive(Debug, Clone)]
pub struct Input {
    pub preprocess: Preprocess,
    /// Pixels along one side of the input.
    pub side: usize,
    /// The part of the picture that is looked at, and how it becomes a square.
    pub view: (Crop, Fit),
}

/// The input of a model.
#[derive(Debug)]
pub struct Prepared {
    /// `[side, side, 3]`, normalised.
    pub pixels: Vec<f32>,
    /// The part of the picture that it is; unknown when the client made it.
    pub seen: Option<Seen>,
    /// Whether that part shows nothing.
    pub is_flat: bool,
}

impl Input {
    /// Bytes that a decoded picture takes to become the input: sums, samples and normalised values.
    fn resizing_bytes(&self) -> u64 {
        let values = (self.side as u64).pow(2) * 3;
        values * (2 * size_of::<f32>() as u64 + 1)
    }

    fn prepare(&self, picture: &Picture) -> Result<Prepared, ImageError> {
        let Sight { samples, seen, is_flat } = self.preprocess.see(picture, self.view, self.side)?;
        Ok(Prepared { pixels: self.preprocess.normalize(&samples), seen: Some(seen), is_flat })
    }
}

/// Why there are no pixels.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// The image is not one, or is broken or too large.
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error("{0}")]
    Internal(String),
}

impl From<Panicked> for DecodeError {
    fn from(panicked: Panicked) -> Self {
        Self::Internal(panicked.to_string())
    }
}

/// What one attempt on a decode thread came to.
enum Attempt {
    Done(Result<Prepared, ImageError>),
    /// Others hold the memory; so many grains are needed.
    NeedsMemory(u32),
}

impl Decoder {
    /// A decoder with so many threads and bytes.
    ///
    /// # Errors
    /// When the operating system gives no thread.
    pub fn start(
        threads: usize,
        memory_bytes: usize,
        limits: DecodeLimits,
        metrics: Arc<Metrics>,
    ) -> std::io::Result<Self> {
        let grains = (memory_bytes as u64 / GRAIN).clamp(1, 1 << 28) as u32;
        Ok(Self {
            pool: BlockingPool::start("decode", threads, Priority::Normal)?,
            memory: Arc::new(Semaphore::new(grains as usize)),
            memory_grains: grains,
            limits,
            metrics,
        })
    }

    /// The model's input from an image file.
    ///
    /// # Errors
    /// [`DecodeError::Image`] when something is wrong with the bytes, or what is to be looked at is not in the picture.
    pub async fn decode(&self, encoded: Bytes, input: Input) -> Result<Prepared, DecodeError> {
        let started = Instant::now();
        let first = self.attempt(encoded.clone(), input.clone(), None).await?;
        let result = match first {
            Attempt::Done(result) => result,
            Attempt::NeedsMemory(grains) => {
                // Waiting is done here, not on a decode thread, so that small images pass large ones.
                let permit = Arc::clone(&self.memory).acquire_many_owned(grains).await;
                let permit = permit.map_err(|closed| DecodeError::Internal(closed.to_string()))?;
                match self.attempt(encoded, input, Some(permit)).await? {
                    Attempt::Done(result) => result,
                    Attempt::NeedsMemory(_) => {
                        return Err(DecodeError::Internal("decode memory was granted but not used".into()));
                    }
                }
            }
        };
        self.metrics.decode_duration.observe(started.elapsed().as_secs_f64());
        Ok(result?)
    }

    /// The model's input from an image that needs no decoding.
    ///
    /// # Errors
    /// [`DecodeError::Image`] when the part to look at is not in the picture;
    /// [`DecodeError::Internal`] when the decoder panics.
    pub async fn fit(&self, image: RgbImage, input: Input) -> Result<Prepared, DecodeError> {
        Ok(self.pool.run(move || input.prepare(&Picture::from(image))).await??)
    }

    /// What `finish` makes of a whole picture, decoded with at least `detail` pixels along its shorter side where it has
    /// them.
    ///
    /// # Errors
    /// [`DecodeError::Image`] when something is wrong with the bytes.
    pub async fn whole<T: Send + 'static>(
        &self,
        encoded: Bytes,
        detail: u32,
        finish: impl FnOnce(RgbImage) -> T + Send + 'static,
    ) -> Result<T, DecodeError> {
        let limits = DecodeLimits { detail, ..self.limits };
        // Turning it takes it twice.
        let bytes = probe(&encoded, &limits)?.decode_bytes_upper_bound.saturating_mul(2);
        let grains = u32::try_from(bytes.div_ceil(GRAIN)).unwrap_or(self.memory_grains).min(self.memory_grains);
        let permit = Arc::clone(&self.memory).acquire_many_owned(grains).await;
        let permit = permit.map_err(|closed| DecodeError::Internal(closed.to_string()))?;
        let work = move || {
            let _permit = permit;
            decode(&encoded, &limits).map(finish)
        };
        Ok(self.pool.run(work).await??)
    }

    /// Memory to decode a picture in on another thread than the decoder's, once there is some, and the limits under which
    /// it suffices. `input` says what the picture is to become.
    ///
    /// # Errors
    /// [`DecodeError::Image`] when the bytes are no picture, or one that is too large.
    pub async fn lend_memory(
        &self,
        encoded: &[u8],
        input: &Input,
    ) -> Result<(DecodeLimits, OwnedSemaphorePermit), DecodeError> {
        let limits = DecodeLimits { crop: input.view.0, ..self.limits }.for_input(&input.preprocess, input.side);
        let bytes = probe(encoded, &limits)?.decode_bytes_upper_bound.saturating_add(input.resizing_bytes());
        let grains = u32::try_from(bytes.div_ceil(GRAIN)).unwrap_or(self.memory_grains).min(self.memory_grains);
        let permit = Arc::clone(&self.memory).acquire_many_owned(grains).await;
        Ok((limits, permit.map_err(|closed| DecodeError::Internal(closed.to_string()))?))
    }

    async fn attempt(
        &self,
        encoded: Bytes,
        input: Input,
        permit: Option<OwnedSemaphorePermit>,
    ) -> Result<Attempt, DecodeError> {
        let (memory, most) = (Arc::clone(&self.memory), self.memory_grains);
        let limits = DecodeLimits { crop: input.view.0, ..self.limits }.for_input(&input.preprocess, input.side);
        let work = move |gone: &dyn Fn() -> bool| {
            // Headers are read without memory of their own; decoders begin under the permit, and end with the request.
            let info = match probe(&encoded, &limits) {
                Ok(info) => info,
                Err(error) => return Attempt::Done(Err(error)),
            };
            // The limits see to it that no image needs more than there is, but for rounding.
            let bytes = info.decode_bytes_upper_bound.saturating_add(input.resizing_bytes());
            let grains = u32::try_from(bytes.div_ceil(GRAIN)).unwrap_or(most).min(most);
            let _permit = match permit.map_or_else(|| memory.try_acquire_many_owned(grains), Ok) {
                Ok(permit) => permit,
                Err(_) => return Attempt::NeedsMemory(grains),
            };
            Attempt::Done(decode_picture(&encoded, &limits, gone).and_then(|picture| input.prepare(&picture)))
        };
        Ok(self.pool.run_watched(work).await?)
    }
}
