//! Any bytes as an inference request with binary tensors. The first four stand for the header that says how long the
//! JSON is, so that it is varied too.

#![no_main]

#[path = "../../model-core/tests/common/counting.rs"]
mod counting;

use axum::http::Request;
use counting::{Counting, measure};
use fuzz::{MOST_BYTES, answer};
use libfuzzer_sys::fuzz_target;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fuzz_target!(|bytes: &[u8]| {
    let Some((length, body)) = bytes.split_first_chunk() else { return };
    let length = u32::from_le_bytes(*length);
    let request = Request::post("/v2/models/cifar100/infer").header("inference-header-content-length", length);
    let peak = measure(|| answer(request, body)).peak;
    assert!(peak <= MOST_BYTES, "{peak} bytes for a body of {}", body.len());
});
