//! Any bytes, read as a backbone and as an expert set.

#![no_main]

use libfuzzer_sys::fuzz_target;
use model_core::artifact::{read_backbone, read_expert_set};

fuzz_target!(|bytes: &[u8]| {
    drop(read_backbone(bytes));
    drop(read_expert_set(bytes));
});
