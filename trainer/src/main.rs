//! `butterflyvit-trainer`: see [`butterflyvit_trainer`].

#![forbid(unsafe_code)]

fn main() {}
