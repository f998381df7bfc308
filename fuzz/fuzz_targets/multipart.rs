//! Any bytes as the multipart body of `POST /classify`.

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
    let request = Request::post("/classify").header("content-type", "multipart/form-data; boundary=edge");
    let peak = measure(|| answer(request, bytes)).peak;
    assert!(peak <= MOST_BYTES, "{peak} bytes for a body of {}", bytes.len());
});
