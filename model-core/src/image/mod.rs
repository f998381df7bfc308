//! From image bytes to the pixels a model sees; trainer and server share it, so they cannot drift apart.
//!
//! [`decode`] turns an untrusted file into RGB8, with memory bounded from the header on; [`Preprocess`] crops, resizes
//! and normalises as `FORMAT.md` says, to the last bit.

mod decode;
mod error;
mod jpeg;
mod preprocess;
mod reduced;
mod resize;
mod turned;

pub use ::image::RgbImage;

pub use decode::{DecodeLimits, ImageInfo, decode, decode_square, probe};
pub use error::ImageError;
pub use preprocess::{Preprocess, Resize};
