//! The trainer: from a folder of images to a backbone and its expert sets.
//!
//! The mathematics (layers, losses, optimiser) is `model-core`'s; what is here is everything around it.
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`data`] | image sets in memory, held-out splits, augmentation, batches on their own thread |

#![forbid(unsafe_code)]
#![warn(missing_docs)]

pub mod data;
