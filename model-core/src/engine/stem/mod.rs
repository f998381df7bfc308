//! The stem, in one of two forms: with every layer's step in the artifact codes go from layer to layer (`calibrated`);
//! without them each tile of windows is rounded by itself and f32 goes from layer to layer (`windows`).

mod calibrated;
mod planes;
mod windows;

use super::crew::Loops;
use super::packed::{Quantized, TILE};
use super::parts::{Parts, PerThread};
use crate::config::BackboneConfig;
use crate::error::{ModelError, expect_len};
use crate::image::Preprocess;
use crate::kernels::Isa;
use crate::weights::BackboneWeights;
use calibrated::Calibrated;
use windows::Convolution;

/// A stem packed for this CPU.
#[derive(Debug)]
pub(super) struct Stem(Form);

#[derive(Debug)]
enum Form {
    Windows { isa: Isa, layers: Vec<Convolution> },
    Calibrated(Calibrated),
}

/// What a session keeps between the layers of a stem.
#[derive(Debug)]
pub(super) struct StemScratch {
    /// Two of `[max_batch, image_len]`.
    between: [Vec<f32>; 2],
    image_len: usize,
    /// The planes of one image.
    planes: Vec<i8>,
}

/// What one thread needs for a stem.
#[derive(Debug)]
pub(super) struct StemThread {
    /// Gathered windows of a tile.
    windows: Vec<f32>,
    /// A tile's output before its norm.
    rows: Vec<f32>,
    quantized: Quantized,
    /// As `windows`, in codes.
    codes: Vec<i8>,
    /// Columns of a depthwise convolution.
    columns: Vec<u8>,
}

impl Stem {
    /// # Errors
    /// [`ModelError`] when the weights do not fit the configuration, or the configuration is none that the engine runs.
    pub(super) fn pack(isa: Isa, weights: &BackboneWeights, preprocess: &Preprocess) -> Result<Self, ModelError> {
        let config = &weights.config;
        expect_len("stem layers", weights.stem.len(), config.stem.len())?;
        for (weights, layer) in weights.stem.iter().zip(&config.stem) {
            expect_len("stem norm", usize::from(weights.norm.is_some()), usize::from(layer.norm))?;
            for values in weights.norm.iter().flat_map(|norm| [&norm.gamma, &norm.beta]) {
                expect_len("stem norm", values.len(), layer.channels)?;
            }
        }
        if let Some(stem) = Calibrated::pack(isa, weights, preprocess)? {
            return Ok(Self(Form::Calibrated(stem)));
        }
        windows::check_supported(config)?;
        let layers = weights.stem.iter().zip(config.stem_inputs()).enumerate();
        let layers = layers.map(|(i, (weights, shape))| Convolution::pack(isa, weights, shape, i == 0));
        Ok(Self(Form::Windows { isa, layers: layers.collect::<Result<_, _>>()? }))
    }

    /// Bytes on the heap.
    pub(super) fn heap_bytes(&self) -> usize {
        match &self.0 {
            Form::Windows { layers, .. } => {
                layers.iter().map(|layer| size_of::<Convolution>() + layer.heap_bytes()).sum()
            }
            Form::Calibrated(stem) => stem.heap_bytes(),
        }
    }

    /// Runs the stem on every image of a batch: `pixels(image)` to `x` `[batch, tokens, d_model]`.
    pub(super) fn forward<'a>(
        &self,
        pixels: impl Fn(usize) -> &'a [f32] + Sync,
        loops: &mut dyn Loops,
        (scratch, threads): (&mut StemScratch, &PerThread<StemThread>),
        (images, x): (usize, &mut [f32]),
    ) {
        let x_len = x.len() / images.max(1);
        match &self.0 {
            Form::Windows { isa, layers } => {
                let StemScratch { between: [from, to], image_len, .. } = scratch;
                let (mut from, mut to, image_len) = (from, to, *image_len);
                for (i, layer) in layers.iter().enumerate() {
                    let is_last = i + 1 == layers.len();
                    let (target, target_len) = if is_last { (&mut *x, x_len) } else { (&mut to[..], image_len) };
                    let input = |image: usize| match i {
                        0 => pixels(image),
                        _ => &from[image * image_len..][..image_len],
                    };
                    let tiles = layer.windows().div_ceil(TILE);
                    let target = Parts::new(target);
                    loops.run(images * tiles, &|thread, item| {
                        let (image, first) = (item / tiles, item % tiles * TILE);
                        let len = TILE.min(layer.windows() - first) * layer.channels();
                        let start = image * target_len + first * layer.channels();
                        // SAFETY: a thread number is used by one call at a time, and tiles have outputs of their own.
                        let (thread, out) = unsafe { (threads.of(thread), target.part(start, len)) };
                        let buffers = (&mut thread.windows[..], &mut thread.rows[..], &mut thread.quantized);
                        layer.forward(*isa, input(image), first, buffers, out).expect(super::moe::LENGTHS);
                    });
                    std::mem::swap(&mut from, &mut to);
                }
            }
            Form::Calibrated(stem) => {
                for (image, x) in x.chunks_exact_mut(x_len.max(1)).enumerate() {
                    stem.forward(pixels(image), loops, (&mut scratch.planes, threads), x);
                }
            }
        }
    }
}

impl StemScratch {
    pub(super) fn new(stem: &Stem, config: &BackboneConfig, max_batch: usize) -> Self {
        let (image_len, planes) = match &stem.0 {
            Form::Windows { .. } => (windows::largest_between(config), 0),
            Form::Calibrated(stem) => (0, stem.planes_len()),
        };
        let between = || vec![0.0; max_batch * image_len];
        Self { between: [between(), between()], image_len, planes: vec![0; planes] }
    }

    pub(super) fn heap_bytes(&self) -> usize {
        let floats = self.between[0].capacity() + self.between[1].capacity();
        floats * size_of::<f32>() + self.planes.capacity()
    }
}

impl StemThread {
    pub(super) fn new(stem: &Stem) -> Self {
        let empty = Self {
            windows: Vec::new(),
            rows: Vec::new(),
            quantized: Quantized::new(0),
            codes: Vec::new(),
            columns: Vec::new(),
        };
        match &stem.0 {
            Form::Windows { layers, .. } => {
                let window = layers.iter().map(Convolution::window_len).max().unwrap_or(0);
                let channels = layers.iter().map(Convolution::channels).max().unwrap_or(0);
                let (windows, rows) = (vec![0.0; TILE * window], vec![0.0; TILE * channels]);
                Self { windows, rows, quantized: Quantized::new(window), ..empty }
            }
            Form::Calibrated(stem) => {
                Self { codes: vec![0; stem.windows_len()], columns: vec![0; stem.columns_len()], ..empty }
            }
        }
    }

    pub(super) fn heap_bytes(&self) -> usize {
        let floats = (self.windows.capacity() + self.rows.capacity()) * size_of::<f32>();
        floats + self.quantized.heap_bytes() + self.codes.capacity() + self.columns.capacity()
    }
}
