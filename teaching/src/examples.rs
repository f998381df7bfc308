//! What is given to teach from.

use crate::TeachError;

/// Classes of one set at most.
pub const MOST_CLASSES: usize = 1000;
/// Images to learn from at most.
pub const MOST_IMAGES: usize = 20_000;

/// Features of images with their labels.
#[derive(Debug, Clone, Copy)]
pub struct Examples<'a> {
    /// `[images, views, d_model]`: of each image the picture as it is, then changed copies of it.
    pub features: &'a [f32],
    pub views: usize,
    pub d_model: usize,
    /// Class of each image.
    pub labels: &'a [usize],
    /// The names of the classes.
    pub classes: &'a [String],
}

/// Whether so many images a class can be taught from, before any of them is looked at.
///
/// # Errors
/// [`TeachError`] when there is too little or too much.
pub fn check_counts<'a>(classes: impl ExactSizeIterator<Item = (&'a str, usize)>) -> Result<(), TeachError> {
    if classes.len() < 2 {
        return Err(TeachError::Classes { got: classes.len() });
    }
    if classes.len() > MOST_CLASSES {
        return Err(TeachError::TooMany { what: "classes", got: classes.len(), limit: MOST_CLASSES });
    }
    let mut total = 0usize;
    for (label, images) in classes {
        if images < 2 {
            return Err(TeachError::FewImages { label: label.to_owned(), images });
        }
        total = total.saturating_add(images);
    }
    if total > MOST_IMAGES {
        return Err(TeachError::TooMany { what: "images", got: total, limit: MOST_IMAGES });
    }
    Ok(())
}

/// Whether a class of that name collects what is none of the others.
pub fn is_none_label(label: &str) -> bool {
    label.eq_ignore_ascii_case("none") || label.eq_ignore_ascii_case("unknown")
}

impl Examples<'_> {
    /// # Errors
    /// [`TeachError`] when there is too little, too much, or what does not belong together.
    pub(crate) fn check(&self) -> Result<(), TeachError> {
        let Self { features, views, d_model, labels, classes } = *self;
        if classes.len() < 2 {
            return Err(TeachError::Classes { got: classes.len() });
        }
        for (what, got, limit) in [("classes", classes.len(), MOST_CLASSES), ("images", labels.len(), MOST_IMAGES)] {
            if got > limit {
                return Err(TeachError::TooMany { what, got, limit });
            }
        }
        let length = |what, expected, got| Err(TeachError::Length { what, expected, got });
        let row = views.saturating_mul(d_model);
        if row == 0 || labels.len().checked_mul(row) != Some(features.len()) {
            return length("features", labels.len().saturating_mul(row), features.len());
        }
        if let Some(&label) = labels.iter().find(|&&label| label >= classes.len()) {
            return length("classes", label + 1, classes.len());
        }
        for (class, label) in classes.iter().enumerate() {
            let images = labels.iter().filter(|&&l| l == class).count();
            if images < 2 {
                return Err(TeachError::FewImages { label: label.clone(), images });
            }
        }
        if let Some(at) = features.iter().position(|value| !value.is_finite()) {
            return Err(TeachError::NotFinite { image: at / row });
        }
        Ok(())
    }

    /// Class of what is none of the others, and unlike any of them.
    pub(crate) fn none_class(&self) -> Option<usize> {
        // With one other class, `none` is one of two things to be told apart.
        self.classes.iter().position(|label| is_none_label(label))
    }

    /// Rows of an image, `[views, d_model]`.
    pub(crate) fn image(&self, image: usize) -> &[f32] {
        let row = self.views * self.d_model;
        &self.features[image * row..][..row]
    }

    /// The row of an image as it is.
    pub(crate) fn plain(&self, image: usize) -> &[f32] {
        &self.image(image)[..self.d_model]
    }
}
