//! What the whole-system tests share: random models, images, and a server process to talk to.

pub mod fixtures;
