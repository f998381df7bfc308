//! What whole-system tests share: the real binaries, the committed test images, random models as real artifacts.

pub mod disk;
pub mod fixtures;
pub mod python;
pub mod server;
pub mod snapshots;
