//! From image bytes to the pixels a model sees; trainer and server share it, so they cannot drift apart.
//!
//! [`decode`] turns an untrusted file into RGB8, with memory bounded from the header on; [`Preprocess`] cuts out a [`View`],
//! resizes and normalises as `FORMAT.md` says, to the last bit.
//!
//! [`probe`] reads a header with no decoder at all. Then each format has a file with a decoder that bounds itself, or that
//! is shown only what has been bounded before: `jpeg` is our own, `png`, `gif`, `webp` and `bmp` go around libraries.

mod bmp;
mod decode;
mod error;
mod flat;
mod folder;
mod format;
mod gif;
mod jpeg;
mod orientation;
mod picture;
mod png;
mod preprocess;
mod probe;
mod resize;
mod rgb;
mod source;
mod view;
mod webp;

pub use ::image::RgbImage;

pub use decode::{decode, decode_picture};
pub use error::ImageError;
pub use folder::{ClassFolder, FileError, FolderError, ImageFolder, read_image};
pub use picture::Picture;
pub use preprocess::{Preprocess, Resize, Sight};
pub use probe::{DecodeLimits, ImageInfo, probe, upright_size};
pub use view::{Crop, Fit, Seen, View, ViewError};
