//! RGB8 to the model's input. `FORMAT.md` says the same in words, for other languages.

use ::image::RgbImage;
use serde::{Deserialize, Serialize};

use super::error::ImageError;
use super::flat::is_flat;
use super::picture::{Picture, part};
use super::resize::resize;
use super::view::{Crop, Fit, Seen};

/// How an image of any size becomes the square a model was trained on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Resize {
    /// The largest centred square, then antialiased bilinear interpolation; untouched when it already fits.
    #[default]
    CenterCropBilinear,
}

/// How an image becomes the model's input: `(sample / 255 - mean) / std` per channel after [`Resize`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Preprocess {
    /// From any size to the model's.
    pub resize: Resize,
    /// Mean of red, green and blue over the training images, in 0..=1.
    pub mean: [f32; 3],
    /// Standard deviation of red, green and blue.
    pub std: [f32; 3],
    /// Large JPEG and PNG files are read at a fraction of their scale that leaves the shorter side at least so many times as
    /// long as the model's, from 1 to 64.
    #[serde(default = "default_reduction")]
    pub reduction: f32,
}

/// That of version 1 of the format.
const fn default_reduction() -> f32 {
    8.0
}

/// What a model sees of a picture.
#[derive(Debug, Clone, PartialEq)]
pub struct Sight {
    /// RGB8 `[side, side, 3]`.
    pub samples: Vec<u8>,
    /// Which part of the picture that is.
    pub seen: Seen,
    /// Whether it shows nothing: one colour, but for the noise of a sensor.
    pub is_flat: bool,
}

impl Default for Preprocess {
    /// Samples from -1 to 1.
    fn default() -> Self {
        Self { resize: Resize::default(), mean: [0.5; 3], std: [0.5; 3], reduction: default_reduction() }
    }
}

impl Preprocess {
    /// The model's input `[side, side, 3]` from the centre of an image of any size.
    pub fn pixels(&self, image: &RgbImage, side: usize) -> Vec<f32> {
        self.normalize(&self.fit(image, side))
    }

    /// The largest centred square of an image, resized to RGB8 `[side, side, 3]`.
    pub fn fit(&self, image: &RgbImage, side: usize) -> Vec<u8> {
        let whole = part(image, Crop::default(), Fit::Crop);
        resize(&whole.expect("the whole of an image is in it").0, side)
    }

    /// What a model whose input has that side sees of a picture.
    ///
    /// # Errors
    /// [`ImageError::Crop`] when the crop reaches outside of the picture; [`ImageError::TooLong`] when a side is longer than
    /// is padded or stretched.
    pub fn see(&self, picture: &Picture, (crop, fit): (Crop, Fit), side: usize) -> Result<Sight, ImageError> {
        let Resize::CenterCropBilinear = self.resize;
        let (part, seen) = picture.part(crop, fit)?;
        let samples = resize(&part, side);
        let (columns, rows) = part.within(side);
        let is_flat = is_flat(&samples, side, rows, columns);
        Ok(Sight { samples, seen, is_flat })
    }

    /// RGB8 samples `[.., 3]` to the values the model sees.
    pub fn normalize(&self, samples: &[u8]) -> Vec<f32> {
        let value = |(i, &sample): (usize, &u8)| (f32::from(sample) / 255.0 - self.mean[i % 3]) / self.std[i % 3];
        samples.iter().enumerate().map(value).collect()
    }
}
