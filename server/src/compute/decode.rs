//! Encoded images to a model's input, on a bounded number of threads and within a bounded number of bytes.

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use model_core::image::{DecodeLimits, ImageError, Preprocess, RgbImage, decode_square, probe};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::error::{ApiError, ErrorCode};
use crate::metrics::Metrics;
use crate::threads::{BlockingPool, Priority};

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

/// What one attempt on a decode thread came to.
enum Attempt {
    Done(Result<Vec<f32>, ImageError>),
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

    /// The model's input `[side, side, 3]`.
    ///
    /// # Errors
    /// The status table's answer to what is wrong with the bytes.
    pub async fn pixels(&self, encoded: Bytes, preprocess: Preprocess, side: usize) -> Result<Vec<f32>, ApiError> {
        let started = Instant::now();
        let first = self.attempt(encoded.clone(), preprocess.clone(), side, None).await?;
        let result = match first {
            Attempt::Done(result) => result,
            Attempt::NeedsMemory(grains) => {
                // Waiting is done here, not on a decode thread, so that small images pass large ones.
                let permit = Arc::clone(&self.memory).acquire_many_owned(grains).await.map_err(ApiError::internal)?;
                match self.attempt(encoded, preprocess, side, Some(permit)).await? {
                    Attempt::Done(result) => result,
                    Attempt::NeedsMemory(_) => {
                        return Err(ApiError::internal("decode memory was granted but not used"));
                    }
                }
            }
        };
        self.metrics.decode_duration.observe(started.elapsed().as_secs_f64());
        result.map_err(|error| image_error(&error))
    }

    /// The model's input from an image that needs no decoding.
    ///
    /// # Errors
    /// 500 only.
    pub async fn fit(&self, image: RgbImage, preprocess: Preprocess, side: usize) -> Result<Vec<f32>, ApiError> {
        self.pool.run(move || preprocess.pixels(&image, side)).await.map_err(ApiError::internal)
    }

    async fn attempt(
        &self,
        encoded: Bytes,
        preprocess: Preprocess,
        side: usize,
        permit: Option<OwnedSemaphorePermit>,
    ) -> Result<Attempt, ApiError> {
        let (limits, memory, most) = (self.limits.for_side(side), Arc::clone(&self.memory), self.memory_grains);
        let work = move |gone: &dyn Fn() -> bool| {
            // Headers are read without memory of their own; decoders begin under the permit, and end with the request.
            let info = match probe(&encoded, &limits) {
                Ok(info) => info,
                Err(error) => return Attempt::Done(Err(error)),
            };
            // The limits see to it that no image needs more than there is, but for rounding.
            let grains = u32::try_from(info.decode_bytes_upper_bound.div_ceil(GRAIN)).unwrap_or(most).min(most);
            let _permit = match permit.map_or_else(|| memory.try_acquire_many_owned(grains), Ok) {
                Ok(permit) => permit,
                Err(_) => return Attempt::NeedsMemory(grains),
            };
            Attempt::Done(decode_square(&encoded, &limits, gone).map(|image| preprocess.pixels(&image, side)))
        };
        self.pool.run_watched(work).await.map_err(ApiError::internal)
    }
}

/// What an image error means to a client.
pub fn image_error(error: &ImageError) -> ApiError {
    let code = match error {
        ImageError::Empty => ErrorCode::EmptyBody,
        ImageError::NotAnImage | ImageError::UnsupportedFormat { .. } => ErrorCode::UnsupportedMediaType,
        ImageError::TooManyPixels { .. } | ImageError::TooMuchMemory { .. } => ErrorCode::ImageTooLarge,
        // Nobody reads the answer.
        ImageError::Stopped => ErrorCode::DeadlineExceeded,
        _ => ErrorCode::UndecodableImage,
    };
    ApiError::new(code, error.to_string())
}
