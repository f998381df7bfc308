//! Which part of a picture a model looks at, and how that part becomes a square.

use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::error::ImageError;

/// How a picture becomes a square.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fit {
    /// Its largest centred square.
    #[default]
    Crop,
    /// All of it, between bars of black.
    Pad,
    /// All of it, its sides scaled apart.
    Stretch,
}

/// The part of a picture that a set looks at, unless a request says otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct View {
    /// Left edge, top edge, width and height, as shares of the upright picture.
    pub crop: [f64; 4],
    /// How that part becomes a square.
    pub fit: Fit,
}

impl Default for View {
    fn default() -> Self {
        Self { crop: WHOLE, fit: Fit::Crop }
    }
}

/// The whole picture.
const WHOLE: [f64; 4] = [0.0, 0.0, 1.0, 1.0];

/// Why a text names no part of a picture, or no way to fit one.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ViewError {
    /// The text is not four numbers.
    #[error("a crop is `x,y,w,h`: four numbers, in pixels of the upright picture or in shares of it")]
    Numbers,
    #[error("the crop {0:?} has no area")]
    Empty([f64; 4]),
    /// Shares from below 0 or to above 1.
    #[error("the crop {0:?} reaches outside of the picture, which in shares is 0, 0, 1, 1")]
    Outside([f64; 4]),
    #[error("a fit is `crop`, `pad` or `stretch`")]
    Fit,
}

impl FromStr for Fit {
    type Err = ViewError;

    fn from_str(text: &str) -> Result<Self, ViewError> {
        match text.trim() {
            "crop" => Ok(Self::Crop),
            "pad" => Ok(Self::Pad),
            "stretch" => Ok(Self::Stretch),
            _ => Err(ViewError::Fit),
        }
    }
}

/// A part of a picture: left edge, top edge, width and height.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Crop {
    /// Of the upright picture.
    Shares([f64; 4]),
    /// Of the upright picture at its own size.
    Pixels([u32; 4]),
}

impl Default for Crop {
    fn default() -> Self {
        Self::Shares(WHOLE)
    }
}

impl FromStr for Crop {
    type Err = ViewError;

    /// Reads `x,y,w,h`: shares when any of the four has a decimal point or all are at most 1, otherwise pixels.
    fn from_str(text: &str) -> Result<Self, ViewError> {
        let mut numbers = [0.0; 4];
        let mut words = text.split(',');
        for number in &mut numbers {
            let word = words.next().map(str::trim).filter(|word| word.bytes().all(|b| b"0123456789.-".contains(&b)));
            *number = word.and_then(|word| word.parse().ok()).ok_or(ViewError::Numbers)?;
        }
        if words.next().is_some() {
            return Err(ViewError::Numbers);
        }
        Self::new(numbers, text.contains('.'))
    }
}

impl Crop {
    /// From four numbers, one of which `has_point` if it was written with a decimal point.
    ///
    /// # Errors
    /// [`ViewError`] when they are no part of any picture.
    pub fn new(numbers: [f64; 4], has_point: bool) -> Result<Self, ViewError> {
        let [left, top, width, height] = numbers;
        if !numbers.iter().all(|number| number.is_finite()) {
            return Err(ViewError::Numbers);
        }
        if left < 0.0 || top < 0.0 {
            return Err(ViewError::Outside(numbers));
        }
        if width <= 0.0 || height <= 0.0 {
            return Err(ViewError::Empty(numbers));
        }
        if !has_point && numbers.iter().any(|&number| number > 1.0) {
            // Saturating: no picture is so large, and it is refused when its size is known.
            return Ok(Self::Pixels(numbers.map(|number| number as u32)));
        }
        // Shares such as 0.7 and 0.3 need not add up to one in binary.
        if left + width > 1.0 + 1e-9 || top + height > 1.0 + 1e-9 {
            return Err(ViewError::Outside(numbers));
        }
        Ok(Self::Shares(numbers))
    }

    /// As shares of an upright picture of that width and height.
    ///
    /// # Errors
    /// [`ImageError::Crop`] when it reaches outside of the picture.
    pub fn shares(&self, (width, height): (u32, u32)) -> Result<[f64; 4], ImageError> {
        let [x, y, w, h] = match *self {
            Self::Shares(shares) => return Ok(shares),
            Self::Pixels(pixels) => pixels.map(u64::from),
        };
        if x + w > u64::from(width) || y + h > u64::from(height) {
            return Err(ImageError::Crop { crop: [x, y, w, h], width, height });
        }
        let share = |pixels: u64, of: u32| pixels as f64 / f64::from(of);
        Ok([share(x, width), share(y, height), share(w, width), share(h, height)])
    }
}

/// The part of a picture that a model was shown. Asked for again, it is seen again.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Seen {
    /// Left edge, top edge, width and height, as shares of the upright picture.
    pub crop: [f64; 4],
    /// How that part became a square.
    pub fit: Fit,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn four_numbers_are_shares_or_pixels() {
        let read = |text: &str| text.parse::<Crop>();
        assert_eq!(read("0,0,1,1"), Ok(Crop::default()));
        assert_eq!(read("0, 0, 1, 1"), Ok(Crop::default()));
        assert_eq!(read("0.25,0,0.5,1"), Ok(Crop::Shares([0.25, 0.0, 0.5, 1.0])));
        assert_eq!(read("0.7,0.7,0.3,0.3"), Ok(Crop::Shares([0.7, 0.7, 0.3, 0.3])));
        assert_eq!(read("0,0,1,2"), Ok(Crop::Pixels([0, 0, 1, 2])));
        assert_eq!(read("100,50,320,240"), Ok(Crop::Pixels([100, 50, 320, 240])));
        for text in
            ["", "1", "1,2,3", "1,2,3,4,5", "a,b,c,d", "1,2,3,", "nan,0,1,1", "inf,0,1,1", "1e3,0,1,1", "0;0;1;1"]
        {
            assert_eq!(read(text), Err(ViewError::Numbers), "{text}");
        }
        for text in ["0,0,0,1", "0,0,1,0", "10,10,0,20", "0,0,-5,5", "0.1,0.1,0.0,0.2"] {
            assert!(matches!(read(text), Err(ViewError::Empty(_))), "{text}");
        }
        for text in ["-1,0,5,5", "0.5,0,0.6,1", "1,0,1,1", "0,0,2.0,1", "0,-0.5,1,1"] {
            assert!(matches!(read(text), Err(ViewError::Outside(_))), "{text}");
        }
        assert!("Crop".parse::<Fit>().is_err() && " pad ".parse() == Ok(Fit::Pad));
    }

    #[test]
    fn pixels_are_those_of_the_picture() {
        assert_eq!(Crop::Pixels([320, 0, 320, 240]).shares((640, 480)).unwrap(), [0.5, 0.0, 0.5, 0.5]);
        for pixels in [[0, 0, 641, 480], [1, 0, 640, 480], [0, 479, 1, 2], [u32::MAX, 0, u32::MAX, 1]] {
            let error = Crop::Pixels(pixels).shares((640, 480)).unwrap_err();
            assert!(error.to_string().contains("640x480"), "{error}");
        }
    }
}
